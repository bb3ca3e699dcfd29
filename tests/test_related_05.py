"""tests/related: LIGER, MTGRec and GAMER run with all their variants, and each has the property that makes it that
system."""
import argparse
import importlib
import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from conftest import ROOT, script

sys.path.insert(0, str(ROOT / "tests" / "related"))
SYSTEMS = {name: importlib.import_module(name) for name in ("liger", "mtgrec", "gamer")}
questions = importlib.import_module("questions")


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def run(smoke, tmp_path):
    """The small run with a quarter of its users, and its codes."""
    data = load(smoke[0] / "data.pt")
    users = len(data["user_ids"]) // 4
    events = int(data["offsets"][users])
    data |= {"user_ids": data["user_ids"][:users], "offsets": data["offsets"][:users + 1],
             "events": data["events"][:events], "levels": data["levels"][:events]}
    torch.save(data, tmp_path / "data.pt")
    for name in ("image", "text", "collab"):
        codes = load(smoke[0] / f"{name}_codes.pt")
        codes["made_from"] = {}  # of the data with all users
        torch.save(codes, tmp_path / f"{name}_codes.pt")
    return tmp_path


@pytest.fixture
def unseen(run):
    """The same without any event of some items, but where they are a user's last one. -> run, bool (N+1,)"""
    data = load(run / "data.pt")
    held = torch.zeros(len(data["item_ids"]), dtype=torch.bool)
    held[1::10] = True
    data = questions.without_training_events(data, held)
    torch.save(data, run / "data.pt")
    return run, data["train_counts"] == 0


def variants():
    return [(name, variant) for name, system in SYSTEMS.items() for variant in system.VARIANTS]


@pytest.mark.parametrize("name, variant", variants())
def test_each_variant_recommends_items_of_the_shop(run, name, variant):
    SYSTEMS[name].main(["--run", str(run), "--smoke", "--seed", "0", "--variant", variant])
    data = load(run / "data.pt")
    saved = load(run / f"predictions-{variant}-s0.pt")
    assert saved["name"] == variant and saved["test"].shape == (len(data["user_ids"]), 20)
    for split in ("valid", "test"):
        top = saved[split]
        assert 1 <= top.min() and top.max() < len(data["item_ids"])
        assert all(len(set(row)) == len(row) for row in top.tolist())
    assert saved["scores"].isfinite().all() and (saved["scores"].diff() <= 0).all()
    assert load(run / f"generator-{variant}.pt")["losses"].isfinite().all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_works_with_lookahead_and_goes_on_after_a_stop(run, name, monkeypatch):
    system = SYSTEMS[name]
    line = ["--run", str(run), "--smoke", "--epochs", "2", "--lookahead"]
    system.main([*line, "--name", "whole"])

    validate = system.five.validate
    calls = itertools.count()

    def stop(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return validate(*given)
    monkeypatch.setattr(system.five, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        system.main([*line, "--name", "again"])
    monkeypatch.undo()
    system.main([*line, "--name", "again"])
    whole, again = [load(run / f"predictions-{name}-s0.pt") for name in ("whole", "again")]
    assert torch.equal(whole["test"], again["test"]) and torch.equal(whole["scores"], again["scores"])


# --- LIGER ------------------------------------------------------------------------------------------------------------
def liger_list(unseen, variant, monkeypatch, favour):
    """A model of this variant, and its lists; favour: which items its cosines put first.

    -> model, items (B, 20), what the beam had found (B, 20)
    """
    run, new = unseen
    liger = SYSTEMS["liger"]
    args = liger.five.options(["--run", str(run), "--smoke"])
    monkeypatch.setattr(liger.five, "main", lambda line: None)
    liger.main(["--run", str(run), "--smoke", "--variant", variant])
    folder = liger.five.Run(run)
    data = folder.load("data.pt", "01_data.py")
    model, trie = liger.five.build(liger.five.read_codes(folder, data, args), data, args)
    model.eval()
    history = torch.arange(1, 13).view(4, 3)
    found, _ = liger.plain.beam_search(model, trie, history, 20)
    scores = torch.rand(4, 3, len(new)) + favour
    monkeypatch.setattr(model, "cosines", lambda: scores)
    items, log_p = liger.five.beam_search(model, trie, history, 20)
    assert torch.equal(scores[:, -1].gather(1, items).sort(descending=True)[0], scores[:, -1].gather(1, items))
    assert (log_p <= 0).all()
    return model, items, found


@pytest.mark.parametrize("variant", ["liger", "liger-beam"])
def test_liger_recommends_items_without_events_and_nothing_beyond_beam_and_new_items(unseen, monkeypatch, variant):
    new = unseen[1]
    _, items, found = liger_list(unseen, variant, monkeypatch, favour=10.0 * new)
    pool = torch.zeros(4, len(new), dtype=torch.bool).scatter(1, found, True)
    if variant == "liger":
        assert not pool[:, new].all(1).any()  # the beam alone would not have them all
        pool |= new
        assert all(set(new.nonzero()[1:, 0].tolist()) <= set(row) for row in items.tolist())
    assert pool.gather(1, items).all() and (items > 0).all()


def test_joined_new_items_stand_by_their_probability_and_the_beam_keeps_its_order(monkeypatch):
    """Equal cosines make each item 1 / (N + 1) likely: less than ten of this beam, more than the other ten."""
    liger = SYSTEMS["liger"]
    new = torch.arange(60) >= 40  # as the padding is
    new[0] = True
    beam = torch.arange(1, 21).unsqueeze(0)                             # (1, 20)
    log_p = torch.tensor([[20.0] * 10 + [0.05] * 10]).div(60).log()     # (1, 20)
    monkeypatch.setattr(liger.plain, "beam_search", lambda *given: (beam, log_p))
    cosines = torch.zeros(1, 1, 60)                                     # (B, T, N+1)
    model = types.SimpleNamespace(variant="liger-joined", new=new, joins=new, cosines=lambda: cosines)
    items, _ = liger.beam_search(model, None, None, 20)
    assert sorted(items[0, :10].tolist()) == list(range(1, 11)) and (items[0, 10:] >= 40).all()

    cosines[:, :, 50] = math.log(100)
    items, _ = liger.beam_search(model, None, None, 20)
    assert items[0, 0] == 50 and sorted(items[0, 1:11].tolist()) == list(range(1, 11))


def test_the_control_of_liger_gives_new_items_each_other_s_vectors(unseen, monkeypatch):
    new = unseen[1]
    right, _, _ = liger_list(unseen, "liger", monkeypatch, 0.0)
    monkeypatch.undo()
    wrong, _, _ = liger_list(unseen, "liger-control", monkeypatch, 0.0)
    assert torch.equal(right.content[~new], wrong.content[~new])
    moved = (right.content != wrong.content).any(1)
    assert moved[new][1:].float().mean() > 0.5
    assert torch.equal(right.content[new].sort(0)[0], wrong.content[new].sort(0)[0])


def test_liger_trained_is_searched_as_05_is_and_trained_as_liger_is(unseen, monkeypatch):
    """So liger-beam less liger-trained is what the new order does."""
    liger = SYSTEMS["liger"]
    monkeypatch.setattr(liger.five, "main", lambda line: None)
    for variant, search in (("liger-trained", liger.plain.beam_search), ("liger-beam", liger.beam_search)):
        liger.main(["--run", str(unseen[0]), "--smoke", "--variant", variant])
        assert liger.five.beam_search is search and liger.five.batch_losses is liger.batch_losses


def test_what_liger_knows_of_items_is_where_its_model_is_and_not_saved(unseen, monkeypatch):
    """A device is chosen late: under torchrun each process has another one."""
    model, _, _ = liger_list(unseen, "liger", monkeypatch, 0.0)
    assert model.to("meta").new.is_meta and model.joins.is_meta
    assert not {"new", "joins", "content"} & model.state_dict().keys()


def test_liger_learns_beside_the_codes_and_never_that_a_new_item_is_wrong(unseen, monkeypatch):
    model, _, _ = liger_list(unseen, "liger", monkeypatch, 0.0)
    monkeypatch.undo()
    liger = SYSTEMS["liger"]
    events = (~unseen[1]).nonzero()[:12, 0].view(3, 4)
    args = argparse.Namespace(masking=0.0, unconstrained=False, bf16=False, device="cpu")
    losses = liger.batch_losses(model, model.trie, events, args)
    assert torch.allclose(losses, liger.plain.batch_losses(model, model.trie, events, args))
    scores = model.cosines().detach().requires_grad_()
    monkeypatch.setattr(model, "cosines", lambda: scores)
    liger.batch_losses(model, model.trie, events, args).sum().backward()
    assert scores.grad[..., unseen[1]].eq(0).all() and scores.grad[..., ~unseen[1]].ne(0).all()
    # As by hand: softmax minus what was taken, for each target, with weight 1.
    p = scores.detach().masked_fill(unseen[1], -torch.inf).softmax(-1)
    taken = torch.nn.functional.one_hot(events[:, 1:], scores.shape[-1])
    assert torch.allclose(scores.grad, p - taken, atol=1e-6)


def test_liger_prints_what_new_items_win_and_the_others_lose(unseen, capsys):
    run, new = unseen
    data = load(run / "data.pt")
    target = data["events"][data["offsets"][1:] - 1]
    for name, top in (("mscgrec", torch.full((len(target), 20), 2)), ("liger", target.unsqueeze(1).repeat(1, 20))):
        torch.save({"test": top.int()}, run / f"predictions-{name}-s0.pt")
    SYSTEMS["liger"].report(argparse.Namespace(run=run, name="liger", seed=0), data, new)
    base, ours = capsys.readouterr().out.strip().split("\n")
    those = "of those who look for a new item"
    assert base == f"mscgrec: Recall@10 0.0000 {those}, 0.0000 of others; new items by chance 0.0000"
    assert ours.startswith(f"liger: Recall@10 1.0000 {those}, 1.0000 of others; ")


def test_liger_without_texts_and_pictures_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as stop:
        SYSTEMS["liger"].main(["--run", str(run), "--smoke", "--modalities", "collab"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# --- MTGRec -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source():
    """2,000 vectors in 60 groups, and their codes as 02 makes them. -> as collab_codes.pt, train_counts"""
    two = script(2)
    rng = torch.Generator().manual_seed(0)
    groups = torch.randn(60, 24, generator=rng)
    x = groups[torch.randint(60, (2001,), generator=rng)] + 0.8 * torch.randn(2001, 24, generator=rng)
    known = torch.ones(2001, dtype=torch.bool)
    known[0] = False
    x[0] = 0
    codebooks = two.residual_kmeans(x[known], 32, rng)
    counts = torch.randint(1, 50, (2001,), generator=rng)
    codes, _ = two.finish_codes(x, known, codebooks, counts, rng)
    return {"codes": codes, "codebooks": codebooks, "embeddings": x, "known": known}, counts


def versions_of(source, variant):
    codes, _ = SYSTEMS["mtgrec"].make_versions(*source, variant, torch.Generator().manual_seed(0))
    assert all(len(version[1:].unique(dim=0)) == 2000 for version in codes)
    return codes[:, 1:]


def shares(versions):
    """Over all pairs of versions: items with another first code, items with any other. -> two floats"""
    changed = [one != other for one, other in itertools.combinations(versions, 2)]
    changed = torch.stack(changed).float()
    return changed[..., 0].mean().item(), changed.amax(2).mean().item()


def test_versions_of_mtgrec_are_neighbours_and_those_of_its_controls_are_not(source):
    versions = versions_of(source, "mtgrec")
    first, some = shares(versions)
    assert 0.002 < first < 0.03 and 0.15 < some < 0.55
    beside = [shares([one, other])[1] for one, other in zip(versions, versions[1:])]
    assert max(beside) < shares(versions[[0, -1]])[1]  # the further apart, the more differ

    anew = versions_of(source, "mtgrec-control")
    assert torch.equal(anew[0], versions[0])
    assert shares(anew)[0] > 0.9

    noise = versions_of(source, "mtgrec-noise")
    assert torch.equal(noise[0], versions[0])
    for ours, theirs in zip(noise[1:], versions[1:]):
        assert torch.equal((ours != noise[0]).any(1), (theirs != noise[0]).any(1))
    assert shares(noise)[0] > 5 * first


def test_an_item_without_a_vector_has_the_same_random_codes_in_all_versions(source):
    lacking, counts = dict(source[0]), source[1]
    lacking["known"] = torch.arange(2001) > 100
    for variant in ("mtgrec", "mtgrec-control"):
        codes = versions_of((lacking, counts), variant)[:, :100, :3]
        assert all(torch.equal(codes[0], other) for other in codes)


def restless(x, codebooks, rng):
    """Codebooks of five versions that differ: in a shop so small those of the quantiser hardly do."""
    for _ in range(5):
        yield codebooks + 0.5 * torch.randn(codebooks.shape, generator=rng)


def test_a_version_of_mtgrec_with_lookahead_has_a_table_of_its_own(run, monkeypatch):
    """It holds the means of the items that share a first code, and versions differ in these."""
    mtgrec = SYSTEMS["mtgrec"]
    monkeypatch.setattr(mtgrec, "quantisers", restless)
    args = mtgrec.five.options(["--run", str(run), "--smoke", "--lookahead"])
    data = load(run / "data.pt")
    mtgrec.five.variant = "mtgrec"
    model, _ = mtgrec.build(mtgrec.five.read_codes(mtgrec.five.Run(run), data, args), data, args)
    last, first = model.versions[0].table, model.versions[-1].table
    assert torch.equal(model.table, last) and not torch.equal(last, first)
    mtgrec.show(model, -1)
    assert torch.equal(model.table, first)


def test_a_step_of_mtgrec_reads_and_writes_one_version_and_all_else_has_the_last(run, monkeypatch):
    mtgrec = SYSTEMS["mtgrec"]
    made = []
    build = mtgrec.build
    seen = []

    def watch(model, trie, optimizer, events, args):
        codes = trie.codes[1:].cpu()
        assert trie is model.trie
        assert torch.equal(model.written[1:] - model.target_level, codes)
        known = load(run / "collab_codes.pt")["known"][1:]
        assert torch.equal(model.shown[1:, 2][known], model.written[1:][known])
        seen.append(codes)
        return torch.ones(4)

    def keep(sources, data, args):
        model, trie = build(sources, data, args)
        made.append(model)
        return model, trie

    monkeypatch.setattr(mtgrec, "build", keep)
    monkeypatch.setattr(mtgrec, "quantisers", restless)
    monkeypatch.setattr(mtgrec.plain, "train_step", watch)
    mtgrec.main(["--run", str(run), "--smoke", "--epochs", "3"])
    model, = made
    versions = [version.trie.codes[1:] for version in model.versions]
    assert len({tuple(version.flatten().tolist()) for version in versions}) > 2
    assert torch.equal(model.trie.codes[1:], versions[0]) and torch.equal(model.codes[1:].long(), versions[0])
    of_many = [not torch.equal(codes, versions[0]) for codes in seen]
    assert any(of_many[:len(seen) // 2]) and not any(of_many[-len(seen) // 6:])
    assert all(any(torch.equal(codes, version) for version in versions) for codes in seen)


def test_the_base_of_mtgrec_is_05_on_the_codes_of_the_last_version(run):
    mtgrec = SYSTEMS["mtgrec"]
    mtgrec.main(["--run", str(run), "--smoke", "--variant", "mtgrec-base"])
    saved = load(run / "generator-mtgrec-base.pt")
    codes = load(run / "collab_codes.pt")
    data = load(run / "data.pt")
    rng = torch.Generator().manual_seed(0)
    versions, codebooks = mtgrec.make_versions(codes, data["train_counts"], "mtgrec", rng)
    torch.save(codes | {"codes": versions[0], "codebooks": codebooks}, run / "last_codes.pt")
    script(5).main(["--run", str(run), "--smoke", "--name", "last", "--target", "last", "--modalities",
                    "image,text,last"])
    for name, weight in load(run / "generator-last.pt")["weights"].items():
        assert torch.equal(weight, saved["weights"][name]), name


# --- GAMER ------------------------------------------------------------------------------------------------------------
V, N = 3, 30


def levels_model(variant, kind="Gamer", dropout=0.0):
    """A small model of random codes, with attentions that are no longer near zero. -> model, trie"""
    gamer = SYSTEMS["gamer"]
    torch.manual_seed(0)
    gamer.Levels.variant = variant
    gamer.Levels.V = V
    codes = torch.cartesian_prod(*[torch.arange(4)] * 4)[torch.randperm(256)[:N]]  # (N, L)
    codes = torch.cat([torch.zeros(1, 4).long() - 1, codes])  # (N+1, L)
    known = torch.arange(N + 1) > 0
    one = {"codes": codes, "codebooks": torch.randn(3, 4, 8), "known": known, "embeddings": torch.randn(N + 1, 8)}
    sources = {name: one for name in ("image", "collab")}
    size = argparse.Namespace(width=16, heads=2, head=8, inner=32, layers=2, dropout=dropout, shrunk="collab")
    trie = gamer.plain.Trie(codes, 4)
    neighbours = []
    if kind == "GamerLookahead":
        log = {"events": torch.arange(1, N + 1), "offsets": torch.tensor([0, N]), "item_ids": [""] * (N + 1)}
        neighbours = [gamer.plain.Neighbours(log, 5)]
    model = getattr(gamer, kind)(sources, ["image", "collab"], "collab", trie, size, *neighbours)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.5)
    return model, trie


def seen_by(variant, level):
    """Which places the gated attention of each place takes something from. level: (T,) -> bool (T, T)"""
    model, _ = levels_model(variant)
    T = len(level)
    x = torch.randn(1, 3 * T, 16, requires_grad=True)
    taken = model.look_back(x, torch.tensor([level]))
    seen = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        # What a token takes depends on itself too, by its question and its gate: not asked here.
        gradient, = torch.autograd.grad(taken[0, 3 * t + 1].sum(), x, retain_graph=True)
        seen[t] = gradient[0].view(T, -1).ne(0).any(1)
        seen[t, t] &= False
    return seen, taken[0].view(T, -1)


@pytest.mark.parametrize("variant, sees", [
    ("gamer", lambda asks, answers: answers < asks), ("gamer-reversed", lambda asks, answers: answers > asks),
    ("gamer-bias", lambda asks, answers: True), ("gamer-told", lambda asks, answers: False)])
def test_an_event_of_gamer_sees_earlier_events_of_lower_levels_and_without_any_gets_exactly_zero(variant, sees):
    level = [1, 0, 2, 0, 1, 2, 2, 0]
    seen, taken = seen_by(variant, level)
    for t, asks in enumerate(level):
        expected = [s < t and sees(asks, answers) for s, answers in enumerate(level)]
        assert seen[t].tolist() == expected, (variant, t)
        assert taken[t].eq(0).all() == (not any(expected)), (variant, t)
        if variant == "gamer" and asks == 0:
            assert taken[t].eq(0).all()


def test_no_event_of_gamer_tells_of_a_later_one_in_training():
    """The level of the event to write is told, of course: but neither its item nor what comes after it."""
    N1 = N + 1
    for kind in ("Gamer", "GamerLookahead"):
        model, _ = levels_model("gamer", kind)
        model.train()
        history = torch.randint(1, N1, (5, 8)) + N1 * torch.randint(V, (5, 8))
        target = torch.randint(1, N1, (5, 8)) + N1 * torch.randint(V, (5, 8))
        changed = history.clone()
        changed[:, 5:] = torch.randint(1, N1, (5, 3)) + N1 * torch.randint(V, (5, 3))
        torch.manual_seed(1)
        before = model(history, target)
        torch.manual_seed(1)
        after = model(changed, target)
        assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_the_search_of_gamer_asks_for_the_highest_level():
    gamer = SYSTEMS["gamer"]
    model, trie = levels_model("gamer")
    model.eval()
    history = torch.randint(1, N + 1, (5, 8)) + (N + 1) * torch.randint(V, (5, 8))
    items, scores = gamer.plain.beam_search(model, trie, history, N)
    assert all(sorted(row) == list(range(1, N + 1)) for row in items.tolist())
    for level, same in ((0, False), (1, False), (2, True)):
        model.train()  # where the level of each target is told; no dropout, nothing hidden
        target = torch.zeros_like(history)
        target[:, -1] = items[:, 3]
        with torch.no_grad():
            logits = model(history, target + (N + 1) * level)[:, -1]
        losses = [gamer.plain.code_losses(logits[u:u + 1], target[u:u + 1, -1] + (N + 1) * level, trie).sum()
                  for u in range(5)]
        assert torch.allclose(-torch.stack(losses), scores[:, 3], atol=1e-4) == same


def test_the_number_of_an_event_tells_its_item_and_its_level(run):
    gamer = SYSTEMS["gamer"]
    data = load(run / "data.pt")
    args = argparse.Namespace(device="cpu")
    gamer.five.levels = data["levels"]
    start = data["offsets"][:-1]
    found = gamer.events_at(data, start, 4, args)
    place = start.unsqueeze(1) + torch.arange(4)
    rows = len(data["item_ids"])
    assert torch.equal(found % rows, data["events"][place].long())
    assert torch.equal(found // rows, data["levels"][place].long())


def test_the_control_of_gamer_shuffles_levels_within_the_training_events_of_a_user(run, monkeypatch):
    gamer = SYSTEMS["gamer"]
    monkeypatch.setattr(gamer.five, "main", lambda line: None)
    gamer.main(["--run", str(run), "--smoke", "--variant", "gamer-control"])
    data = load(run / "data.pt")
    before, after = data["levels"], gamer.five.levels
    for begin, end in zip(data["offsets"][:-1], data["offsets"][1:]):
        assert torch.equal(before[end - 2:end], after[end - 2:end])
        assert torch.equal(before[begin:end].sort()[0], after[begin:end].sort()[0])
    assert 0.1 < (before != after).float().mean() < 0.5


def test_gamer_prints_recall_by_the_level_of_the_test_event(run, monkeypatch, capsys):
    gamer = SYSTEMS["gamer"]
    data = load(run / "data.pt")
    last = data["offsets"][1:] - 1
    top = torch.where(data["levels"][last] == 1, data["events"][last], 0)  # found where the level is 1
    for name in ("mscgrec", "gamer-told", "gamer"):
        torch.save({"test": top.unsqueeze(1).repeat(1, 20).int()}, run / f"predictions-{name}-s0.pt")
    monkeypatch.setattr(gamer.five, "main", lambda line: None)
    gamer.main(["--run", str(run), "--smoke"])
    assert capsys.readouterr().out.split("\n")[:3] == [
        f"{name}: Recall@10 0.0000 of level 0, 1.0000 of level 1" for name in ("mscgrec", "gamer-told", "gamer")]


def test_gamer_without_the_levels_of_a_history_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as stop:
        SYSTEMS["gamer"].main(["--run", str(run), "--history", "a title"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "no --history" in said


def test_a_run_without_levels_is_one_sentence(run, capsys):
    data = load(run / "data.pt")
    del data["levels"]
    torch.save(data, run / "data.pt")
    with pytest.raises(SystemExit) as stop:
        SYSTEMS["gamer"].main(["--run", str(run), "--smoke"])
    assert stop.value.code == 2 and "no levels" in capsys.readouterr().err
    assert not Path(run, "generator-gamer.pt").exists()
