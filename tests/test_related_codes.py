"""tests/related: MMGRec, LAMIA, MACRec and UTGRec make codes anew, each with the idea that it is named after."""
import pathlib
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import run_script, script

sys.path.append(str(pathlib.Path(__file__).parent / "related"))
import lamia
import macrec
import mmgrec
import utgrec

SYSTEMS = [mmgrec, lamia, macrec, utgrec]
VARIANTS = [(system, variant) for system in SYSTEMS for variant in system.VARIANTS]
VARIANTS += [(utgrec, variant) for variant in utgrec.TRANSFERS]
FAST = ["--smoke", "--length", "2", "--batch", "512"]  # few lengths of histories: few batches


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    """--smoke makes 05 small, and what takes longest before it; here the rest is short as well."""
    monkeypatch.setattr(mmgrec, "STEPS", 10)
    monkeypatch.setattr(lamia, "TURNS", 5)
    monkeypatch.setattr(macrec, "BATCH", 64)
    monkeypatch.setattr(utgrec, "BATCH", 64)


@pytest.fixture(scope="module")
def codes_made(smoke, tmp_path_factory):
    """A folder with all that 05 can show, SASRec with content included."""
    run = tmp_path_factory.mktemp("related")
    for name in ("data.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt"):
        shutil.copy(smoke[0] / name, run)
    content = ("--name", "sasrec-content", "--content", "text,image")
    process = run_script(2, "--run", run, *FAST, *content)
    assert process.returncode == 0, process.stderr
    return run


@pytest.fixture
def run(codes_made, tmp_path):
    """A copy of it: variants write their codes into it."""
    for path in codes_made.glob("*.pt"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    """Codes are made, 05 is called with them, and does nothing. -> what it is called with"""
    calls = []
    for system in SYSTEMS:
        monkeypatch.setattr(system.five, "main", calls.append)
    return calls


def call(system, run, variant, *options):
    system.main(["--run", str(run), *FAST, "--variant", variant, *options])


def with_codes_of_utgrec(run):
    """What utgrec-transfer reads of another run: here, it has the codebooks of 04."""
    other = run / "other"
    other.mkdir()
    shutil.copy(run / "text_codes.pt", other / "utgrec_codes.pt")
    return ["--codebooks-of", str(other)]


@pytest.mark.parametrize("system, variant", VARIANTS, ids=[variant for _, variant in VARIANTS])
def test_a_variant_recommends_items_of_the_shop(system, variant, run):
    options = with_codes_of_utgrec(run) if variant in utgrec.TRANSFERS else []
    call(system, run, variant, *options)
    saved = load(run / f"predictions-{variant}-s0.pt")
    N = len(load(run / "data.pt")["item_ids"]) - 1
    for split in ("valid", "test"):
        assert 1 <= saved[split].min() and saved[split].max() <= N
    assert saved["scores"].isfinite().all()
    assert system.BASE in ("mscgrec", *system.VARIANTS)


def test_a_shop_without_pictures_has_all_but_macrec(run, no_training, capsys):
    (run / "image_codes.pt").unlink()
    call(mmgrec, run, "mmgrec")
    call(lamia, run, "lamia")
    call(utgrec, run, "utgrec")
    shown = [options[options.index("--modalities") + 1] for options in no_training]
    assert shown == ["text,mmgrec", "text,lamia", "utgrec"]

    with pytest.raises(SystemExit) as stop:
        call(macrec, run, "macrec")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "needs texts and pictures both" in said


@pytest.mark.parametrize("system, variant", [(lamia, "lamia-text"), (macrec, "macrec"), (utgrec, "utgrec")],
                         ids=["lamia", "macrec", "utgrec"])
def test_a_shop_without_texts_is_one_sentence(system, variant, run, capsys):
    text = load(run / "text_codes.pt")
    text["known"][:] = False
    text["embeddings"][:] = 0
    torch.save(text, run / "text_codes.pt")
    with pytest.raises(SystemExit) as stop:
        call(system, run, variant)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "text" in said
    assert not (run / f"{variant}_codes.pt").exists()


def test_same_seed_same_codes_and_another_seed_others(run, no_training):
    for system, name in ((mmgrec, "mmgrec"), (lamia, "lamia"), (macrec, "macrec-text"), (utgrec, "utgrec")):
        variant = name.split("-")[0]
        made = []
        for seed in (0, 0, 1):
            call(system, run, variant, "--seed", str(seed))
            made.append(load(run / f"{name}_codes.pt")["embeddings"])
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
def test_codes_are_the_same_file_in_every_run_and_made_by_one_process_and_for_no_history(system, run, no_training,
                                                                                        monkeypatch):
    """05 refuses codes that are not those of its training, which it may be asked about, or go on with."""
    variant = system.__name__
    path = run / ("macrec-text_codes.pt" if system is macrec else f"{variant}_codes.pt")
    call(system, run, variant)
    before = path.read_bytes()
    call(system, run, variant, "--fresh")
    assert path.read_bytes() == before

    path.unlink()
    call(system, run, variant, "--history", "a title")
    monkeypatch.setenv("RANK", "1")  # as torchrun has it for the second process
    call(system, run, variant)
    assert not path.exists() and len(no_training) == 4  # 05 was called, all the same


def test_vectors_that_were_learnt_from_histories_are_shrunk_and_those_of_texts_are_shown_whole(run, no_training):
    for system, variant, learnt in ((lamia, "lamia", True), (lamia, "lamia-text", False), (mmgrec, "mmgrec", True),
                                    (utgrec, "utgrec", False)):
        call(system, run, variant)
        shrunk = system.five.options(no_training[-1]).shrunk.split(",")
        assert (variant in shrunk) == learnt and "collab-content" in shrunk, variant


def test_neither_validation_nor_test_events_reach_the_codes(run, no_training):
    made = {}
    for held_out in ("real", "shuffled"):
        data = load(run / "data.pt")
        if held_out == "shuffled":
            for back in (1, 2):
                last = data["offsets"][1:] - back                       # (U,)
                data["events"][last] = data["events"][last.flip(0)]
        assert mmgrec.training_edges(data)[0].shape[0] == len(data["events"]) - 2 * len(data["user_ids"])
        made[held_out] = [*mmgrec.training_edges(data), utgrec.neighbours(data, torch.ones(999, dtype=torch.bool))]
    for real, shuffled in zip(made["real"], made["shuffled"]):
        assert torch.equal(real, shuffled)


def nearer(vectors, label):
    """How much larger the cosine of two rows with one label is than that of two labels. (n, d), (n,) -> float"""
    direction = F.normalize(vectors - vectors.mean(0), dim=1)           # (n, d)
    cosine = direction @ direction.T                                    # (n, n)
    same = label == label.unsqueeze(1)                                  # (n, n)
    others = ~torch.eye(len(label), dtype=torch.bool)                   # (n, n)
    return (cosine[same & others].mean() - cosine[~same].mean()).item()


# --- MMGRec -----------------------------------------------------------------------------------------------------------


def two_camps(seed=0):
    """Forty items, the odd ones for even users, the even ones for odd users; content knows nothing of it.

    -> content x (41, 8), user, item (edges,) both
    """
    torch.manual_seed(seed)
    x = F.pad(torch.randn(40, 8), (0, 0, 1, 0))                         # (41, 8)
    user = torch.arange(60).repeat_interleave(8)                        # (480,)
    item = 1 + 2 * torch.randint(20, user.shape) + user % 2             # (480,)
    return x, user, item


def test_mmgrec_brings_items_nearer_that_are_bought_together(monkeypatch):
    monkeypatch.setattr(mmgrec, "STEPS", 100)
    x, user, item = two_camps()
    permuted = item[torch.randperm(len(item))]                          # (480,)
    camp = torch.arange(1, 41) % 2                                      # (40,)
    users, items = mmgrec.mix(x, user, item, 60, 16)                    # (60, 16), (41, 16)
    _, control = mmgrec.mix(x, user, permuted, 60, 16)                  # (41, 16)
    assert abs(nearer(x[1:], camp)) < 0.1
    assert nearer(items[1:], camp) > 0.5
    assert abs(nearer(control[1:], camp)) < 0.2

    # And users come near to what they have: to all items of their camp, that is.
    score = users @ items[1:].T                                         # (60, 40)
    own = (torch.arange(60) % 2).unsqueeze(1) != camp                   # (60, 40) even users have odd items
    assert score[own].mean() > score[~own].mean() + 1


def test_a_node_hears_the_mean_of_its_neighbours():
    """User 0 had items 1 and 2, user 1 had item 2: nodes are users 0 and 1, then items 0, 1 and 2."""
    graph = mmgrec.Graph(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), U=2, N=2, d=3, E=4)
    by_hand = torch.tensor([[0, 0, 0, 0.5, 0.5],
                            [0, 0, 0, 0, 1],
                            [0, 0, 0, 0, 0],
                            [1, 0, 0, 0, 0],
                            [0.5, 0.5, 0, 0, 0]])
    assert torch.equal(graph.mean.to_dense(), by_hand)


def test_mmgrec_s_control_keeps_all_degrees_and_no_edge(run, no_training, monkeypatch):
    edges = {}

    def mix(x, user, item, U, E):
        edges[variant] = (x, user, item)
        return None, torch.randn(len(x), E)

    monkeypatch.setattr(mmgrec, "mix", mix)
    for variant in mmgrec.VARIANTS:
        call(mmgrec, run, variant)
    x, user, item = edges["mmgrec"]
    _, same_user, other_item = edges["mmgrec-control"]
    assert torch.equal(user, same_user) and torch.equal(item.bincount(), other_item.bincount())
    assert (item == other_item).float().mean() < 0.2

    other_x, _, same_item = edges["mmgrec-no-content"]
    assert torch.equal(item, same_item) and torch.equal(x.sort(0).values, other_x.sort(0).values)
    assert not torch.equal(x, other_x)

    # The same graph, so the same three codes: only the numbers of those that share them differ.
    by_sales = load(run / "mmgrec_codes.pt")["codes"]                   # (N+1, L)
    at_random = load(run / "mmgrec-unsorted_codes.pt")["codes"]         # (N+1, L)
    assert torch.equal(by_sales[:, :3], at_random[:, :3]) and not torch.equal(by_sales[:, 3], at_random[:, 3])


# --- LAMIA ------------------------------------------------------------------------------------------------------------


def test_to_subtract_one_code_leaves_the_other_heads_of_lamia_as_they_are():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=rng)                             # (n, d)
    codebooks = lamia.parallel_kmeans(x, 8, rng)                        # (3, K, d)
    codes, _ = lamia.four.quantise(x, codebooks)                        # (n, 3)
    for a, own in enumerate(lamia.columns(x)):
        left = x - codebooks[a][codes[:, a]]                            # (n, d)
        changed = (left != x).any(0)                                    # (d,)
        assert changed.nonzero()[:, 0].tolist() == own.tolist()
        # So a code is that of its head alone, whatever the others are.
        assert torch.equal(codes[:, a], lamia.four.nearest(x[:, own], codebooks[a][:, own]))
    swapped, _ = lamia.four.quantise(x, codebooks.flip(0))              # (n, 3)
    assert torch.equal(swapped.flip(1), codes)


def what_heads_tell(x, aspects, rng):
    """NMI of each head's code with each aspect. x: (n, d), aspects: (n, 3) -> (3, 3)"""
    codebooks = lamia.parallel_kmeans(x, 8, rng)                        # (3, K, d)
    codes, _ = lamia.four.quantise(x, codebooks)                        # (n, 3)
    table = torch.zeros(3, 3)                                           # (3, 3)
    for a in range(3):
        for b in range(3):
            table[a, b] = lamia.six.meaning(codes[:, a:a + 1], aspects[:, b])["nmi"][0]
    return table


def test_each_head_of_lamia_finds_an_aspect_of_its_own():
    """Vectors are sums of three aspects' vectors, turned so that every coordinate has something of each."""
    rng = torch.manual_seed(0)
    aspects = torch.randint(4, (500, 3))                                # (n, 3)
    vectors = torch.randn(3, 4, 4)                                      # of each value of each aspect
    parts = [vectors[b][aspects[:, b]] for b in range(3)]
    x = torch.cat(parts, 1) + 0.3 * torch.randn(500, 12)                # (n, d)
    x = x @ torch.linalg.qr(torch.randn(12, 12)).Q                      # (n, d)

    learnt = what_heads_tell(lamia.learn_heads(x, 8, rng, turns=200), aspects, rng)
    assert sorted(learnt.argmax(1).tolist()) == [0, 1, 2]  # no two heads have the same
    assert learnt.max(1).values.min() > 0.75 and learnt.sort(1).values[:, :2].max() < 0.1
    rotated = what_heads_tell(lamia.learn_heads(x, 8, rng, turns=0), aspects, rng)
    assert rotated.max(1).values.max() < 0.5


def test_lamia_turns_vectors_and_its_base_has_the_codes_of_02(run, no_training):
    before = load(run / "collab-content_codes.pt")
    known = before["known"]
    lost = {}
    for variant in ("lamia", "lamia-rotated"):
        call(lamia, run, variant)
        after = load(run / f"{variant}_codes.pt")
        vectors = after["embeddings"]                                   # (N+1, d)
        assert torch.allclose(vectors @ vectors.T, before["embeddings"] @ before["embeddings"].T, atol=1e-3)
        lost[variant] = lamia.four.quantise(vectors, after["codebooks"])[1].square().sum()
    assert lost["lamia"] < 0.95 * lost["lamia-rotated"]
    call(lamia, run, "lamia-base")
    assert torch.equal(load(run / "lamia-base_codes.pt")["codes"][known], before["codes"][known])

    # The control has the codes of the heads, each given to other items.
    call(lamia, run, "lamia-control")
    codes = load(run / "lamia_codes.pt")["codes"]
    dealt = load(run / "lamia-control_codes.pt")["codes"]
    for a in range(3):
        assert torch.equal(codes[known, a].sort().values, dealt[known, a].sort().values)
    assert (codes == dealt)[known].all(1).float().mean() < 0.2


# --- MACRec -----------------------------------------------------------------------------------------------------------


def related_modalities(seed=0):
    """300 items of two loud aspects, and of a quiet one, which the other modality's clusters are. -> x (n, d), (n,)"""
    torch.manual_seed(seed)
    label = torch.randint(6, (300,))                                    # (n,)
    parts = []
    for loudness, values in ((3, torch.randint(8, (300,))), (1.5, torch.randint(8, (300,))), (0.6, label)):
        parts.append(loudness * torch.randn(8, 4)[values])              # (n, 4)
    x = torch.cat(parts, 1) + 0.3 * torch.randn(300, 12)                # (n, d)
    return x / x.square().mean().sqrt(), label


def test_macrec_with_weight_0_is_an_autoencoder_that_no_cluster_changes():
    x, label = related_modalities()
    made = {}
    for weight in (0, 0.1):
        for clusters in ("real", "permuted"):
            rng = torch.manual_seed(1)
            given = label.flip(0) if clusters == "permuted" else label  # (n,)
            made[weight, clusters] = macrec.cross(x, given, weight, 8, 20, rng)
    for real, permuted in zip(made[0, "real"], made[0, "permuted"]):
        assert torch.equal(real, permuted)
    assert not torch.equal(made[0.1, "real"][0], made[0.1, "permuted"][0])
    assert not torch.equal(made[0.1, "real"][0], made[0, "real"][0])


def test_macrec_s_contrast_reaches_what_codes_are_cut_from_and_that_of_the_public_code_does_not():
    x, label = related_modalities()
    codebooks = macrec.three.residual_kmeans(x, 8, torch.manual_seed(0))  # (3, K, d)
    z = x.clone().requires_grad_()                                      # (n, d)
    macrec.contrast(macrec.after_two_codes(z, codebooks), label).backward()
    assert (z.grad.norm(dim=1) > 0).all()

    # The public code: what is subtracted is straight-through, and so has the gradient of z itself.
    z = x.clone().requires_grad_()                                      # (n, d)
    left = z                                                            # (n, d)
    for codebook in codebooks[:2]:
        centroid = codebook[macrec.three.nearest(left.detach(), codebook)]  # (n, d)
        left = left - (left + (centroid - left).detach())               # (n, d)
    macrec.contrast(left, label).backward()
    assert not z.grad.any()


def test_macrec_s_contrast_is_its_formula():
    torch.manual_seed(0)
    left = torch.randn(7, 4)                                            # (B, d)
    label = torch.tensor([0, 1, 0, 2, 0, -1, -1])                       # the last two lack the other modality
    f = F.normalize(left, dim=1)
    losses = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        total = sum((f[i] @ f[j] / macrec.TAU).exp() for j in others)
        pulls = [-((f[i] @ f[p] / macrec.TAU).exp() / total).log() for p in others if label[p] == label[i] >= 0]
        losses.append(sum(pulls) / max(1, len(pulls)))
    assert macrec.contrast(left, label).item() == pytest.approx(float(sum(losses) / 7), rel=1e-5)


def test_no_item_is_its_own_positive(monkeypatch):
    """A batch with an item twice would pull it to itself."""
    x = related_modalities()[0][:80]                                    # (n, d) a few more than a batch has
    batches = []
    monkeypatch.setattr(macrec, "contrast", lambda left, label: batches.append(label) or left.sum())
    macrec.cross(x, torch.arange(80), 0.1, 8, 5, torch.manual_seed(0))
    assert all(len(label.unique()) == len(label) == macrec.BATCH for label in batches) and len(batches) == 5


def test_macrec_s_control_permutes_the_clusters_and_its_base_has_weight_0(run, no_training, monkeypatch):
    given = {}

    def cross(x, label, weight, K, steps, rng):
        given.setdefault(variant, []).append((label, weight))  # of the pictures, then of the texts
        return x, torch.zeros(3, K, x.shape[1])

    monkeypatch.setattr(macrec, "cross", cross)
    for variant in macrec.VARIANTS:
        call(macrec, run, variant)
    for ours, base, control in zip(given["macrec"], given["macrec-base"], given["macrec-control"]):
        assert (ours[1], base[1], control[1]) == (macrec.WEIGHT, 0, macrec.WEIGHT)
        assert torch.equal(ours[0], base[0]) and not torch.equal(ours[0], control[0])
        assert torch.equal(ours[0].sort().values, control[0].sort().values)
    image = load(run / "image_codes.pt")
    of_text = given["macrec"][1][0]                                     # (n,): every item has a text here
    assert torch.equal(of_text >= 0, image["known"][1:])  # who has no picture has no cluster
    assert torch.equal(of_text[of_text >= 0], image["codes"][image["known"], 0])


# --- UTGRec -----------------------------------------------------------------------------------------------------------


def loud_and_quiet():
    """64 items, whose text says of what kind they are, and more quietly their style, which neighbours share.

    -> text, as 04 writes it; pairs of neighbours (P, 2)
    """
    kind = torch.arange(64) % 8                                         # (n,)
    style = torch.arange(64) // 8                                       # (n,)
    x = torch.cat([1.4 * torch.eye(8)[kind], torch.eye(8)[style]], 1)   # (n, 16)
    x = F.pad(x - x.mean(0), (0, 0, 1, 0))                              # (65, 16)
    text = {"embeddings": x, "codebooks": utgrec.three.residual_kmeans(x[1:], 8, torch.manual_seed(0))}
    pairs = (style == style.unsqueeze(1)).fill_diagonal_(False).nonzero() + 1  # (P, 2)
    return text, pairs


def shared(x, pairs):
    """The share of pairs that have the first code of x in common. x: (65, d) -> float"""
    codebooks = utgrec.three.residual_kmeans(x[1:], 8, torch.manual_seed(0))  # (3, K, d)
    codes, _ = utgrec.three.quantise(x, codebooks)                      # (65, 3)
    return (codes[pairs[:, 0], 0] == codes[pairs[:, 1], 0]).float().mean().item()


def test_neighbours_share_more_codes_after_utgrec_and_neither_in_base_nor_control():
    text, pairs = loud_and_quiet()
    dealt = torch.stack([pairs[:, 0], pairs[torch.randperm(len(pairs)), 1]], 1)  # (P, 2)
    share = {"before": shared(text["embeddings"], pairs)}
    for name, eta, given in (("utgrec", 0.3, pairs), ("base", 0, pairs), ("control", 0.3, dealt)):
        # With many more steps a contrast with any neighbours makes kind and style equally loud.
        z = utgrec.tune(text, None, given, eta, 120, torch.manual_seed(1))  # (65, d)
        share[name] = shared(z, pairs)
    assert share["before"] < 0.2 and share["base"] < 0.2 and share["control"] < 0.4
    assert share["utgrec"] > 0.6


def test_neither_the_item_itself_nor_its_neighbour_s_copy_is_a_wrong_answer():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(6, 4), dim=1)                           # (n, d)
    a = torch.tensor([1, 2, 1, 4, 0])                                   # (B,)
    b = torch.tensor([2, 3, 3, 1, 0])                                   # (B,) 2's neighbour 3 is there twice
    losses = []
    for i in range(5):
        answers = [j for j in range(5) if j == i or (b[j] != b[i] and b[j] != a[i])]
        total = sum((x[a[i]] @ x[b[j]] / utgrec.TAU).exp() for j in answers)
        losses.append(total.log() - x[a[i]] @ x[b[i]] / utgrec.TAU)
    assert utgrec.pull(x[a], x[b], a, b).item() == pytest.approx(float(sum(losses) / 5), rel=1e-5)


def test_utgrec_s_control_keeps_how_often_an_item_is_a_neighbour_and_its_base_has_eta_0(run, no_training, monkeypatch):
    given = {}

    def tune(text, kept, pairs, eta, steps, rng):
        given[variant] = (pairs, eta)
        return text["embeddings"]

    monkeypatch.setattr(utgrec, "tune", tune)
    for variant in ("utgrec", "utgrec-base", "utgrec-control"):
        call(utgrec, run, variant)
    pairs, eta = given["utgrec"]                                        # (P, 2)
    dealt, same_eta = given["utgrec-control"]                           # (P, 2)
    assert (eta, given["utgrec-base"][1], same_eta) == (utgrec.ETA, 0, utgrec.ETA)
    assert torch.equal(pairs, given["utgrec-base"][0]) and torch.equal(pairs[:, 0], dealt[:, 0])
    assert torch.equal(pairs[:, 1].bincount(), dealt[:, 1].bincount())
    assert (pairs[:, 1] == dealt[:, 1]).float().mean() < 0.2


def test_neighbours_are_pairs_in_a_row_both_ways_and_once():
    data = {"events": torch.tensor([1, 2, 3, 4, 5, 2, 1, 6, 7]), "offsets": torch.tensor([0, 5, 9])}
    known = torch.tensor([False, True, True, True, True, True, True, True])
    # The first user's training events are 1 2 3, the second one's 2 1.
    assert utgrec.neighbours(data, known).tolist() == [[1, 2], [2, 1], [2, 3], [3, 2]]
    known[3] = False
    assert utgrec.neighbours(data, known).tolist() == [[1, 2], [2, 1]]


def test_utgrec_keeps_the_codebooks_of_another_run_bit_for_bit(run, no_training, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("data.pt", "text_codes.pt"):
        shutil.copy(run / name, other)
    call(utgrec, other, "utgrec")
    theirs = load(other / "utgrec_codes.pt")["codebooks"]               # (3, K, d)
    assert not torch.equal(theirs, load(run / "text_codes.pt")["codebooks"])

    call(utgrec, run, "utgrec-transfer", "--codebooks-of", str(other))
    made = load(run / "utgrec-transfer_codes.pt")
    assert torch.equal(made["codebooks"], theirs)
    assert not torch.equal(made["embeddings"], load(run / "text_codes.pt")["embeddings"])  # f was tuned
    codes, _ = script(4).quantise(made["embeddings"], theirs)           # (N+1, 3)
    known = made["known"]
    assert torch.equal(codes[known], made["codes"][known, :3].long()) or made["moved"] > 0

    call(utgrec, run, "utgrec-noise", "--codebooks-of", str(other))
    noise = load(run / "utgrec-noise_codes.pt")["codebooks"]            # (3, K, d)
    assert noise.shape == theirs.shape and not torch.equal(noise, theirs)


def test_utgrec_without_another_run_is_one_sentence(run, capsys):
    """The run itself is no other one: a transfer from a shop to the same shop would show nothing."""
    shutil.copy(run / "text_codes.pt", run / "utgrec_codes.pt")
    for options, message in (([], "needs --codebooks-of"), (["--codebooks-of", str(run)], "needs --codebooks-of"),
                             (["--codebooks-of", str(run / "nowhere")], "utgrec_codes.pt is missing")):
        with pytest.raises(SystemExit) as stop:
            call(utgrec, run, "utgrec-transfer", *options)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and message in said
