"""Three related systems that vary SASRec: each runs in all its variants, and is what its docstring says it is."""
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent / "related"))


def related(name):
    """The file of that name in tests/related as a new module, with a script 02 of its own."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "related" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_with(smoke, folder):
    """A new run with links to the small shop and its codes."""
    folder.mkdir()
    for file in ("data.pt", "text_codes.pt", "image_codes.pt"):
        os.symlink(smoke[0] / file, folder / file)
    return folder


@pytest.fixture(params=["ccfrec", "missrec", "hymirec"])
def system(request):
    return related(request.param)


# --- All of them ------------------------------------------------------------------------------------------------------
def test_every_variant_recommends_items_of_the_pool_and_writes_nothing_of_other_scripts(system, smoke, tmp_path):
    run = run_with(smoke, tmp_path / "run")
    given = {path.name for path in run.iterdir()}
    N = len(torch.load(run / "data.pt", weights_only=True)["item_ids"]) - 1
    for variant in system.VARIANTS:
        system.main(["--run", str(run), "--smoke", "--device", "cpu", "--variant", variant])
        made = torch.load(run / f"predictions-{variant}-s0.pt", weights_only=True)
        assert made["name"] == variant
        assert made["scores"].isfinite().all()
        for split in ("valid", "test"):
            assert all(len(set(row)) == 20 and 1 <= min(row) <= max(row) <= N for row in made[split].tolist())
    files = {f"{stem}.pt" for v in system.VARIANTS for stem in (v, f"{v}_codes", f"predictions-{v}-s0")}
    assert {path.name for path in run.iterdir()} == given | files


def test_a_control_draws_from_the_seed_and_from_nothing_else(system, smoke, tmp_path):
    """Whatever was drawn before, the same seed ends in the same bits, another one in others."""
    scores = []
    for number, seed in enumerate((0, 0, 1)):
        run = run_with(smoke, tmp_path / str(number))
        control = next(variant for variant in system.VARIANTS if variant.endswith("-control"))
        torch.manual_seed(number)
        system.main(["--run", str(run), "--smoke", "--device", "cpu", "--epochs", "1", "--variant", control,
                     "--seed", str(seed)])
        scores.append(torch.load(run / f"predictions-{control}-s{seed}.pt", weights_only=True)["scores"])
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_what_cannot_be_ends_in_a_sentence(system, smoke, tmp_path, capsys):
    run = run_with(smoke, tmp_path / "run")
    for options, message in ((["--post-norm"], "has no --post-norm"),
                             (["--content", "sound"], "sound_codes.pt is missing"),
                             (["--name", "text"], f"a --name has {system.__name__} in it")):
        with pytest.raises(SystemExit) as stop:
            system.main(["--run", str(run), "--smoke", *options])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1


# --- CCFRec -----------------------------------------------------------------------------------------------------------
def source_of(N, K, width):
    """What the file of a modality's codes holds, at random: the item N lacks it."""
    codes = torch.randint(K, (N + 1, 4), dtype=torch.int16)
    codes[0] = -1
    known = torch.ones(N + 1, dtype=torch.bool)
    known[[0, N]] = False
    return {"codes": codes, "known": known, "codebooks": torch.randn(3, K, width),
            "embeddings": torch.randn(N + 1, width) * known.unsqueeze(1)}


def rank_of_unseen(variant):
    """Fifty items (and one without content) of one content, of which the last ten were never bought, but have the codes
    of the first ten. -> their median rank after what the first ten were bought after, once that is learnt"""
    system = related("ccfrec")
    torch.manual_seed(0)
    source = source_of(51, 8, 12)
    source["codes"][41:51] = source["codes"][1:11]
    source["embeddings"][1:51] = source["embeddings"][1]
    system.CCFRec.sources, system.CCFRec.variant = [source], variant
    model = system.CCFRec(51, 4, 16, 2, 1, 0.0, source["embeddings"] / 12 ** 0.5).apply(system.s.initialise)
    assert all(len(weight) not in (51, 52) for weight in model.parameters()) or variant == "ccfrec-id"

    # After item 11 + i came item 1 + i, and after that 21 + i.
    events = torch.arange(1, 11).unsqueeze(1) + torch.tensor([10, 0, 20])
    args = system.s.options(["--device", "cpu", "--batch", "20"])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=system.s.WEIGHT_DECAY)
    for _ in range(80):
        system.s.train_step(model, model, optimizer, 0.01, events, None, args)
    with torch.no_grad():
        scores = model.score(model(events[:, :1])[:, -1], model.vectors()[1:].T)
    assert scores.isfinite().all()
    place = scores.argsort(1, descending=True).argsort(1)
    return place[torch.arange(10), torch.arange(40, 50)].median() + 1


def test_an_item_that_was_never_bought_is_recommended_as_others_of_its_codes_are():
    assert rank_of_unseen("ccfrec") <= 3
    assert rank_of_unseen("ccfrec-control") > 10
    assert rank_of_unseen("ccfrec-id") > 10


def test_codes_are_numbered_apart_and_a_modality_that_lacks_is_masked():
    system = related("ccfrec")
    sources = [source_of(30, 8, 12), source_of(30, 8, 6)]
    codes, V = system.codes_that_ask(sources, "ccfrec")
    assert V == 48 and codes[0].tolist() == codes[30].tolist() == list(range(48, 54))
    for number, source in enumerate(sources):
        own = codes[1:30, 3 * number:3 * number + 3]
        assert torch.equal(own - torch.tensor([0, 8, 16]) - 24 * number, source["codes"][1:30, :3].long())
    shuffled, _ = system.codes_that_ask(sources, "ccfrec-control")
    assert sorted(shuffled.tolist()) == sorted(codes.tolist()) and not torch.equal(shuffled, codes)


def test_codes_hear_nothing_of_a_modality_that_the_item_lacks():
    """Item 5 lacks the second of two modalities: all that is heard is the first one. Item 30 lacks both."""
    system = related("ccfrec")
    torch.manual_seed(0)
    sources = [source_of(30, 8, 12), source_of(30, 8, 6)]
    sources[1]["known"][5] = False
    sources[1]["embeddings"][5] = 0
    system.CCFRec.sources = sources
    content = torch.cat([source["embeddings"] for source in sources], 1)
    model = system.CCFRec(30, 6, 16, 2, 1, 0.0, content)
    items = torch.tensor([5, 30])
    answer = model.heard(model.codes[items], content[items]) - model.items(model.codes[items])
    torch.testing.assert_close(answer[0], model.project(content[5]).expand(6, 16))
    assert torch.equal(answer[1], torch.zeros(6, 16))


# --- MISSRec ----------------------------------------------------------------------------------------------------------
def interests_of(variant, *histories):
    """What the last event of each history hears from its interests, all these events being the same. -> (E,) each"""
    system = related("missrec")
    torch.manual_seed(0)
    source = source_of(30, 8, 12)
    source["codes"][1:11, 0] = 3    # ten items of one cluster
    source["codes"][11:21, 0] = 5   # and ten of another
    system.MISSRec.sources, system.MISSRec.variant = [source], variant
    model = system.MISSRec(30, 20, 16, 2, 1, 0.0, source["embeddings"]).apply(system.s.initialise).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    heard = []
    for history in histories:
        x = torch.arange(16.0).expand(1, len(history), 16)
        heard.append(model.interests(x, torch.tensor([history]))[0, -1])
    return heard


def test_ten_items_of_one_cluster_count_once():
    ten, one, both, unknown, only_unknown = interests_of(
        "missrec", [11, *range(1, 11)], [11, 1], [11, 1, 12, 2, 13], [11, 30, 1], [30])
    assert one.norm() > 0.1 and torch.allclose(ten, one, atol=1e-5)
    assert torch.allclose(both, one, atol=1e-5) and torch.allclose(unknown, one, atol=1e-5)
    assert torch.equal(only_unknown, torch.zeros(16)), "who has no interest is told nothing"
    ten, one, other = interests_of("missrec-repeats", [11, *range(1, 11)], [11, 1], [1, 1])
    assert (ten - one).norm() > 0.1 and (one - other).norm() > 0.1


def test_interests_to_come_are_not_heard():
    system = related("missrec")
    torch.manual_seed(0)
    source = source_of(30, 8, 12)
    system.MISSRec.sources = [source, source_of(30, 8, 6)]
    content = torch.randn(31, 18)
    model = system.MISSRec(30, 6, 16, 2, 2, 0.0, content).eval()
    history = torch.randint(1, 31, (8, 6))
    changed = history.clone()
    changed[:, 4:] = torch.randint(1, 31, (8, 2))
    assert torch.allclose(model(history)[:, :4], model(changed)[:, :4], atol=1e-6)


def test_new_interests_are_counted_over_training_events_whose_items_have_the_modality():
    system = related("missrec")
    codes = torch.tensor([[-1], [3], [3], [4], [7]])  # items 1 and 2 are of one cluster, item 4 lacks the modality
    source = {"codes": codes, "known": torch.tensor([False, True, True, True, False])}
    # In training one user had 1, 2, 3 and 4, another one 2: of four events that count, three bring a new interest.
    data = {"events": torch.tensor([1, 2, 3, 4, 1, 1, 2, 3, 3]), "offsets": torch.tensor([0, 6, 9])}
    assert system.distinct(data, source) == 3 / 4


# --- HyMiRec ----------------------------------------------------------------------------------------------------------
def test_the_match_of_queries_and_clusters_is_the_best_of_all_orders():
    system = related("hymirec")
    torch.manual_seed(0)
    centre = F.normalize(torch.randn(200, 3, 8), dim=2)
    queries = F.normalize(torch.randn(200, 3, 8), dim=2)
    match = system.best_match(centre, queries)
    for c, q, chosen in zip(centre, queries, match.tolist()):
        totals = {order: sum(c[j] @ q[order[j]] for j in range(3)) for order in itertools.permutations(range(3))}
        assert tuple(chosen) == max(totals, key=totals.get)
    drawn = {tuple(order) for order in system.random_match(centre, queries).tolist()}
    assert drawn == set(itertools.permutations(range(3))), "the control draws all of them"


def test_each_event_of_the_window_is_asked_of_the_query_that_its_cluster_is_matched_to():
    """By hand, place after place: the events to come as far as the history goes, their clusters, the best order."""
    system = related("hymirec")
    torch.manual_seed(0)
    system.HyMiRec.variant = "hymirec"
    model = system.HyMiRec(30, 6, 8, 2, 1, 0.0).apply(system.s.initialise)
    events = torch.randint(1, 31, (5, 7))
    hidden = torch.randn(5, 6, 8)
    loss = model.loss(hidden, events, None, system.s.options(["--device", "cpu"]))

    vectors = F.normalize(model.items.weight, dim=1)
    losses = []
    for row, outputs in zip(events, hidden):
        for t, h in enumerate(outputs):
            queries = F.normalize(model.ask(h).view(3, 8), dim=1)
            window = row[t + 1:t + 5]
            items = torch.zeros(1, 4, 8)
            items[0, :len(window)] = vectors[window]
            label, centre = system.cluster(items, 3)
            best = max(itertools.permutations(range(3)), key=lambda p: (centre[0] * queries[list(p)]).sum())
            for item, cluster in zip(window, label[0]):
                scores = queries[best[cluster]] @ vectors[1:].T / 0.07
                losses.append(F.cross_entropy(scores, item - 1))
    torch.testing.assert_close(loss, torch.stack(losses).mean() * 30)
    scores = model.score(hidden[0], vectors[1:].T)
    queries = F.normalize(model.ask(hidden[0]).view(6, 3, 8), dim=2)
    torch.testing.assert_close(scores, (queries @ vectors[1:].T).max(1).values)


def test_one_query_and_one_event_are_sasrec_with_cosines():
    system = related("hymirec")
    torch.manual_seed(0)
    system.HyMiRec.variant = "hymirec-next"
    model = system.HyMiRec(30, 6, 8, 2, 1, 0.0)
    events = torch.randint(1, 31, (5, 7))
    hidden = torch.randn(5, 6, 8)
    loss = model.loss(hidden, events, None, system.s.options(["--device", "cpu"]))
    cosines = F.normalize(model.ask(hidden), dim=2) @ F.normalize(model.items.weight[1:], dim=1).T
    by_hand = F.cross_entropy(cosines.flatten(0, 1) / 0.07, events[:, 1:].flatten() - 1, reduction="sum")
    torch.testing.assert_close(loss, by_hand)


def test_clusters_bring_together_what_points_one_way():
    system = related("hymirec")
    a, b, c = torch.eye(3)
    items = F.normalize(torch.stack([a, b, c, a + 0.1 * b, b + 0.1 * c, torch.zeros(3)]), dim=1)
    label, centre = system.cluster(items.unsqueeze(0), 3)
    assert label[0, :5].tolist() == [0, 1, 2, 0, 1]
    sums = torch.stack([items[0] + items[3], items[1] + items[4], c])
    torch.testing.assert_close(centre[0], F.normalize(sums, dim=1))
