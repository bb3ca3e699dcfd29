"""06_eval.py: metrics and intervals by hand, and a table that any model joins by a file."""

import hashlib
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SCRIPTS, command, script

try:
    import resource
except ImportError:  # Windows
    resource = None

evaluation = script(6)

N, TOP = 40, 20


def write_run(run, targets):
    """A run folder as 01_data.py leaves it: a user's events are 39, 40, and the item to find."""
    U = len(targets)
    run.mkdir(exist_ok=True)
    events = torch.stack([torch.full((U,), 39), torch.full((U,), 40), torch.as_tensor(targets)], 1)
    torch.save({"made_from": {}, "events": events.flatten().int(), "offsets": 3 * torch.arange(U + 1),
                "item_ids": [""] + [f"id{i}" for i in range(1, N + 1)], "user_ids": [f"u{u}" for u in range(U)],
                "train_counts": torch.arange(N + 1, dtype=torch.int32), "categories": [[]] * (N + 1),
                "titles": [""] * (N + 1), "has_image": torch.zeros(N + 1, dtype=torch.bool)}, run / "data.pt")
    return run


def lists(targets, ranks):
    """Recommendations that hold each user's item at the given rank (None: nowhere). -> int32 (U, TOP)"""
    rows = []
    for target, rank in zip(targets, ranks):
        others = [i for i in range(1, N + 1) if i != target]
        rows.append(others[:rank - 1] + [target] + others[rank - 1:TOP - 1] if rank else others[:TOP])
    return torch.tensor(rows, dtype=torch.int32)


def write_predictions(run, name, test, seed=0, **other):
    saved = {"name": name, "seed": seed, "valid": test, "test": test, "scores": torch.zeros(test.shape),
             "seconds": {"train": 60.0 + seed, "predict": 2.0}, "parameters": 12345, "bytes": 2_500_000,
             "peak_memory": 2**31, "options": {"name": name}}
    torch.save(saved | other, run / f"predictions-{name}-s{seed}.pt")


def results(run, *options):
    evaluation.main(["--run", str(run), *options])
    return torch.load(run / "results.pt", weights_only=True), (run / "results.md").read_text(encoding="utf-8")


def refused(capsys, run, *options):
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--run", str(run), *options])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said and "\n" not in said
    assert not list(run.glob("results*"))
    return said


def cells(table, name):
    """The rows of all tables that begin with this name: lists of cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    return [row for row in rows if row[0] == name]


def test_metrics_of_ranks_1_3_11_and_absent(tmp_path):
    targets = [5, 7, 30, 31]
    top = lists(targets, [1, 3, 11, None])
    rank = evaluation.rank_of(torch.tensor(targets), top)
    assert rank.tolist() == [1, 3, 11, math.inf]
    third = 1 / math.log2(3 + 1)
    assert evaluation.gains(rank).tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, third, third], [0] * 5, [0] * 5]

    run = write_run(tmp_path / "run", targets)
    write_predictions(run, "sasrec", top)
    saved, table = results(run)
    assert saved["rows"]["sasrec"]["mean"] == [0.25, 0.5, 0.5, 0.375, 0.375]
    assert saved["rows"]["sasrec"]["std"] is None and "interval" not in saved["rows"]["sasrec"]
    quality, pairs, cost, popular = cells(table, "sasrec")
    assert quality == ["sasrec", "1", "0.2500", "0.5000", "0.5000", "0.3750", "0.3750", "", ""]
    shown = top[:, :10].unique()
    assert pairs == ["sasrec", "-", "-", "0.5000", "0.3750"]  # no two training events follow each other
    assert cost == ["sasrec", "12,345", "2.5", "60", "500.00", "2.0"]
    assert popular[:2] == ["sasrec", f"{len(shown) / N:.0%}"] and popular[4] == f"{top[:, :10].float().mean():.0f}"


def test_mean_and_deviation_over_seeds(tmp_path):
    targets = [1, 2, 3, 4]
    run = write_run(tmp_path / "run", targets)
    for seed, ranks in enumerate(([1, 1, 1, 1], [1, 1, None, None], [None] * 4)):
        write_predictions(run, "sasrec", lists(targets, ranks), seed)
    saved, table = results(run)
    row = saved["rows"]["sasrec"]
    assert row["seeds"] == [0, 1, 2] and row["mean"] == [0.5] * 5 and row["train"] == 61
    assert row["std"] == pytest.approx([0.5] * 5)
    assert row["deciles"][:4] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])  # a user each
    assert cells(table, "sasrec")[0][1:3] == ["3", "0.5000 ± 0.5000"]


def test_interval_of_equal_models_holds_zero_and_of_a_better_one_does_not(tmp_path):
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(1, N + 1, (400,), generator=rng).tolist()

    def draw(most):
        return [r if r <= TOP else None for r in torch.randint(1, most, (400,), generator=rng).tolist()]

    run, same = write_run(tmp_path / "run", targets), lists(targets, draw(60))
    write_predictions(run, "sasrec", same)
    write_predictions(run, "twin", same)
    write_predictions(run, "alike", lists(targets, draw(60)))
    write_predictions(run, "better", lists(targets, draw(15)))
    saved, table = results(run)
    rows = saved["rows"]
    assert rows["twin"]["interval"] == [[0.0] * 5] * 2
    low, high = torch.tensor(rows["alike"]["interval"])
    assert (low < 0).all() and (high > 0).all()
    low, high = torch.tensor(rows["better"]["interval"])
    difference = torch.tensor(rows["better"]["mean"]) - torch.tensor(rows["sasrec"]["mean"])
    assert (0 < low).all() and (low < difference).all() and (difference < high).all()
    assert cells(table, "better")[0][-2].startswith("[+") and cells(table, "sasrec")[0][-2:] == ["", ""]
    assert [line.split()[1] for line in table.split("\n") if line.startswith("| ")][1:8][-1] == "better"
    against = results(run, "--against", "better")[0]["rows"]
    assert torch.tensor(against["sasrec"]["interval"]).max() < 0 and "interval" not in against["better"]


def test_with_one_seed_the_interval_is_that_of_users():
    """Differences of 0 or 1, 100 of 400: a mean of 0.25, a standard error of sqrt(0.25 * 0.75 / 400)."""
    ours = torch.zeros(1, 400, 5, dtype=torch.double)
    ours[:, :100] = 1
    error = math.sqrt(0.25 * 0.75 / 400)
    for same_seeds in (False, True):
        low, high = evaluation.interval_of_difference(ours, torch.zeros_like(ours), same_seeds)
        assert low.tolist() == pytest.approx([0.25 - 1.96 * error] * 5)
        assert high.tolist() == pytest.approx([0.25 + 1.96 * error] * 5)


def test_with_two_seeds_and_users_that_are_all_alike_the_interval_is_student_s():
    """Seeds gain 1 and 3: a mean of 2 with a standard error of sqrt(2) / sqrt(2) and one degree of freedom."""
    ours, theirs = torch.ones(2, 50, 5, dtype=torch.double), torch.ones(1, 50, 5, dtype=torch.double)
    ours[1] = 3
    low, high = evaluation.interval_of_difference(ours, theirs, False)
    assert low.tolist() == pytest.approx([1 - 12.706] * 5, abs=1e-3)
    assert high.tolist() == pytest.approx([1 + 12.706] * 5, abs=1e-3)


def test_student_s_t_is_that_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 29: 2.0452, 99: 1.9842}
    for degrees, t in table.items():
        assert evaluation.student_t(degrees) == pytest.approx(t, abs=5e-4)
    assert evaluation.student_t(1000) == pytest.approx(1.9623, abs=5e-4)


def test_the_users_part_is_what_two_seeds_have_in_common():
    """var(user) is the covariance, over users, of the gains with two seeds: the mean over all pairs of seeds."""
    torch.manual_seed(0)
    x = torch.randn(1, 30, 1, dtype=torch.double) + 2 * torch.randn(3, 30, 1, dtype=torch.double)
    covariance = torch.cov(x[:, :, 0], correction=0)  # (3, 3)
    pairs = [covariance[a, b].item() for a, b in ((0, 1), (0, 2), (1, 2))]
    users_part = sum(pairs) / 3 / 30
    assert users_part > 0
    seeds_part = x.mean(1).var().item() / 3
    half = evaluation.half_interval(x)
    assert half.item() == pytest.approx(math.sqrt(1.96 ** 2 * users_part + 4.3027 ** 2 * seeds_part), rel=1e-4)


USERS = 400   # they stand for 4,000: with sqrt(10) times the effects the parts have the same shares
REPEATS = 500
LIMIT = 0.2533  # a normal number is above it in 4 of 10 cases


def hits(seeds, effect, users, rng):
    """Whether a model finds users' items, again and again. users: (USERS, REPEATS), what is hard for every
    model; effect: the deviation of a seed's recall. -> (seeds, USERS, REPEATS), its expected mean"""
    slope = 0.386  # of recall, if all users become harder
    shift = effect / slope * torch.randn(seeds, 1, REPEATS, generator=rng)
    tastes = torch.randn(USERS, REPEATS, generator=rng)  # what this model is good at, with any seed
    luck = torch.randn(seeds, USERS, REPEATS, generator=rng)
    score = 0.7 * users + 0.4 * tastes + math.sqrt(1 - 0.7 ** 2 - 0.4 ** 2) * luck + shift
    deviation = math.sqrt(1 + (effect / slope) ** 2)
    expected = 0.5 * math.erfc(LIMIT / deviation / math.sqrt(2))
    return (score > LIMIT).double(), expected


def coverage_and_width(mean, half, truth):
    """How often the interval holds the truth, and its width in units of that which knows all variances."""
    off = mean - truth
    deviation = off.square().mean().sqrt()
    return (off.abs() <= half).double().mean().item(), (half.mean() / (1.96 * deviation)).item()


@pytest.mark.parametrize("seeds", (3, 5, 10))
@pytest.mark.parametrize("effect", (0.0, 0.012), ids=("no effect of seeds", "an effect of .012"))
def test_intervals_hold_the_truth_in_95_of_100_repetitions(seeds, effect):
    """Two models that are as good, Recall@10 .4: the difference, seeds paired or not, and the bar of one."""
    rng = torch.Generator().manual_seed(0)
    effect = effect * math.sqrt(10)
    users = torch.randn(USERS, REPEATS, generator=rng)
    ours, expected = hits(seeds, effect, users, rng)
    theirs, _ = hits(seeds, effect, users, rng)
    found = [coverage_and_width(ours.mean((0, 1)), evaluation.half_interval(ours), expected)]
    for same_seeds in (True, False):
        low, high = evaluation.interval_of_difference(ours, theirs, same_seeds)
        found.append(coverage_and_width((low + high) / 2, (high - low) / 2, 0))
    for coverage, width in found:
        assert coverage >= 0.93
        assert width <= (1.6 if seeds >= 5 else 2.1)


@pytest.mark.parametrize("seeds", (3, 5, 10))
def test_intervals_hold_the_truth_where_only_seeds_matter(seeds):
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(seeds, 1, 20_000, generator=rng).double().expand(-1, 10, -1)
    coverage, width = coverage_and_width(ours.mean((0, 1)), evaluation.half_interval(ours), 0)
    assert 0.945 <= coverage <= 0.955  # nothing else is unsure: the interval is exact
    assert width <= (1.6 if seeds >= 5 else 2.1)


def write_seeds(run, targets, name, found, files=None):
    """Predictions of a model whose seed s finds the items of the first found[s] users."""
    for seed, count in enumerate(found):
        ranks = [1] * count + [None] * (len(targets) - count)
        write_predictions(run, name, lists(targets, ranks), seed)
        if files:
            (run / f"predictions-{name}-s{seed}.pt").rename(run / files[seed])


def test_seeds_of_two_models_are_paired_and_users_too(tmp_path):
    """Seed by seed one model finds the items of 10 more users of 100, while seeds differ by 60: paired, all
    that is unsure is which users came. A gain of 1/3 for 30 users of 100 has the variance .0233."""
    targets = torch.arange(100).remainder(N).add(1).tolist()
    run = write_run(tmp_path / "run", targets)
    write_seeds(run, targets, "sasrec", [10, 40, 70])
    write_seeds(run, targets, "better", [20, 50, 80], ["predictions-z.pt", "predictions-y.pt", "predictions-x.pt"])
    row = results(run)[0]["rows"]["better"]
    assert row["seeds"] == [0, 1, 2]  # whatever the order of the files
    low, high = (part[2] for part in row["interval"])
    assert (low + high) / 2 == pytest.approx(0.1)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt((0.3 / 9 - 0.1 ** 2) / 100))


def test_other_seeds_are_not_paired_and_users_still_are(tmp_path):
    """The same two models, as if one had been trained with seeds 3, 4, 5: six seeds that differ by 30."""
    targets = torch.arange(100).remainder(N).add(1).tolist()
    run = write_run(tmp_path / "run", targets)
    write_seeds(run, targets, "sasrec", [10, 40, 70])
    write_seeds(run, targets, "other", [20, 50, 80])
    for seed in range(3):
        path = run / f"predictions-other-s{seed}.pt"
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {"seed": 3 + seed}, path)
    low, high = (part[2] for part in results(run)[0]["rows"]["other"]["interval"])
    assert (low + high) / 2 == pytest.approx(0.1)
    seeds_part = 2 * 0.3 ** 2 / 3
    assert (high - low) / 2 == pytest.approx(4.3027 * math.sqrt(seeds_part), rel=0.01)


def test_users_that_are_easy_for_both_models_leave_the_difference_sure():
    """One seed each: 50 of 100 users are found by both, 10 more by one. Not paired, the variance would be twofold."""
    ours, theirs = torch.zeros(1, 100, 5, dtype=torch.double), torch.zeros(1, 100, 5, dtype=torch.double)
    ours[:, :60] = 1
    theirs[:, :50] = 1
    low, high = evaluation.interval_of_difference(ours, theirs, False)
    assert ((high - low) / 2).tolist() == pytest.approx([1.96 * math.sqrt(0.1 * 0.9 / 100)] * 5)


def test_bars_know_that_other_seeds_would_be_better_or_worse(tmp_path):
    """Three seeds with Recall@10 of .1, .4, .7: a standard error of .3 / sqrt(3), and users beside."""
    targets = torch.arange(100).remainder(N).add(1).tolist()
    run = write_run(tmp_path / "run", targets)
    write_seeds(run, targets, "sasrec", [10, 40, 70])
    error = results(run)[0]["rows"]["sasrec"]["half"][2]
    assert 4.3027 * 0.3 / math.sqrt(3) < error < 1.05 * 4.3027 * 0.3 / math.sqrt(3)


def test_the_table_says_what_its_intervals_are_for(tmp_path):
    targets = [1, 2, 3, 4]
    run = write_run(tmp_path / "run", targets)
    write_predictions(run, "sasrec", lists(targets, [1, 2, 3, 4]))
    table = results(run)[1]
    assert "for other users and other seeds\n(a model with one seed adds nothing for seeds" in table


def test_a_foreign_model_joins_with_two_keys(tmp_path, capsys):
    targets = [4, 8]
    run = write_run(tmp_path / "run", targets)
    write_predictions(run, "sasrec", lists(targets, [2, 2]))
    test = torch.zeros(2, 12, dtype=torch.long)  # shorter, 0 where it recommends nothing
    test[0, :2] = torch.tensor([4, 9])
    torch.save({"name": "by hand", "test": test}, run / "predictions-anything.pt")
    saved, table = results(run)
    assert saved["rows"]["by hand"]["mean"] == [0.5] * 5 and saved["rows"]["by hand"]["seeds"] == [0]
    quality, _, cost, shown = cells(table, "by hand")
    assert quality[2] == "0.5000" and cost == ["by hand", "-", "-", "-", "-", "-"] and shown[1] == "5%"
    assert cells(table, "sasrec") and table.strip() in capsys.readouterr().out
    torch.save({"name": "by hand", "seed": 1, "test": torch.zeros_like(test), "seconds": {"train": 3}},
               run / "predictions-nothing.pt")
    results(run)
    assert "3 files, 2 users: all ids of `test` are items of data.pt, none comes twice" in \
        capsys.readouterr().out


def test_tables_of_codes(tmp_path):
    run = write_run(tmp_path / "run", [4, 8])
    write_predictions(run, "foreign", lists([4, 8], [2, 2]))
    known = torch.ones(N + 1, dtype=torch.bool)
    known[:11] = False  # 30 of 40 items: codes 0 0 0 and 1 0 0 of 10 and 9 items, eleven with a first code alone
    codes = torch.zeros(N + 1, 4, dtype=torch.int16)
    codes[21:30, 0], codes[30:, 0] = 1, 2
    codes[30:, 1] = torch.arange(11)
    torch.save({"codebooks": torch.zeros(3, 16, 5), "known": known, "moved": 3, "codes": codes}, run / "text_codes.pt")
    saved, table = results(run)
    assert saved["codes"]["text"]["used"] == [3 / 16, 11 / 16, 1 / 16, 1 / 16]
    assert "interval" not in saved["rows"]["foreign"]
    first = torch.tensor([10, 9, 11]) / 30
    assert saved["codes"]["text"]["perplexity"][0] == pytest.approx(float((-first * first.log()).sum().exp()))
    assert cells(table, "text") == [["text", "75%", "16", "19, 69, 6", "3, 4, 1, 1", "0, 37, 37", "11, 10, 10", "3"]]


def test_codes_from_anywhere_are_shown(tmp_path):
    """Modalities of other K and other L: each has its own K in the table, and its own number of levels."""
    run = write_run(tmp_path / "run", [4, 8])
    write_predictions(run, "sasrec", lists([4, 8], [2, 2]))
    known = torch.arange(N + 1) > 0
    torch.manual_seed(0)
    for modality, L, K in (("one", 1, 1000), ("two", 2, 300), ("four", 4, 7), ("five", 5, 8)):
        codes = torch.randint(K, (N + 1, L)).to(torch.int16)
        codebooks = torch.zeros(max(1, L - 1), K, 5)
        torch.save({"codes": codes, "known": known, "codebooks": codebooks}, run / f"{modality}_codes.pt")
    saved, table = results(run)
    used = {modality: len(stats["used"]) for modality, stats in saved["codes"].items()}
    alone = {modality: len(stats["unique"]) for modality, stats in saved["codes"].items()}
    assert used == {"one": 1, "two": 2, "four": 4, "five": 5}
    assert alone == {"one": 1, "two": 1, "four": 3, "five": 4}
    assert [cells(table, modality)[0][2] for modality in used] == [
        {"one": "1000", "two": "300", "four": "7", "five": "8"}[modality] for modality in used]
    assert "levels 1-4" in table and "perplexity, 1-5" in table and "after 1, 2, 3, 4 " in table
    for modality in used:
        with Image.open(run / f"tree-{modality}.png") as picture:
            assert picture.height > 200
    with Image.open(run / "codes.png") as picture:
        assert picture.height == evaluation.HEIGHT


@pytest.mark.parametrize("change, says", [
    (lambda saved: {"codes": saved["codes"]}, "lacks"),
    (lambda saved: saved | {"codes": saved["codes"][1:]}, "other data")])
def test_codes_that_fit_no_items_are_one_sentence(tmp_path, capsys, change, says):
    run = write_run(tmp_path / "run", [4, 8])
    saved = {"codes": torch.zeros(N + 1, 4).short(), "known": torch.arange(N + 1) > 0,
             "codebooks": torch.zeros(3, 8, 2)}
    torch.save(change(saved), run / "text_codes.pt")
    said = refused(capsys, run)
    assert says in said and "text_codes.pt" in said


def without(name):
    return lambda saved: {key: value for key, value in saved.items() if key != name}


@pytest.mark.parametrize("change, says", [
    (lambda saved: saved | {"test": saved["test"] + N}, "other data"),
    (lambda saved: saved | {"test": saved["test"] - 2}, "other data"),
    (lambda saved: saved | {"test": saved["test"][:1]}, "other data"),
    (lambda saved: saved | {"test": saved["test"].float()}, "item ids"),
    (lambda saved: saved | {"test": saved["test"][:, 0]}, "item ids"),
    (lambda saved: saved | {"test": saved["test"].tolist()}, "item ids"),
    (lambda saved: saved | {"test": saved["test"][:, :0]}, "item ids"),
    (lambda saved: saved | {"test": saved["test"][:, [0, 1, 1]]}, "twice"),
    (lambda saved: saved | {"seed": "one"}, "`seed`"),
    (without("name"), "`name`"), (without("test"), "`test`"), (lambda saved: saved["test"], "damaged"),
    (lambda saved: saved | {"options": {"run": Path("runs")}}, "damaged")])
def test_files_that_cannot_be_compared_are_one_sentence(tmp_path, capsys, change, says):
    run = write_run(tmp_path / "run", [4, 8])
    write_predictions(run, "sasrec", lists([4, 8], [1, 1]))
    file = run / "predictions-sasrec-s0.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    said = refused(capsys, run)
    assert says in said and file.name in said


def test_one_seed_counts_once(tmp_path, capsys):
    run = write_run(tmp_path / "run", [4, 8])
    write_predictions(run, "sasrec", lists([4, 8], [1, 1]))
    (run / "predictions-sasrec-copy.pt").write_bytes((run / "predictions-sasrec-s0.pt").read_bytes())
    assert "seed 0" in refused(capsys, run)


def test_nothing_to_compare_is_one_sentence(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert "01_data.py" in refused(capsys, tmp_path / "run")
    run = write_run(tmp_path / "run", [4, 8])
    assert "--seed" in refused(capsys, run, "--seed", "-1")
    assert "nobody" in refused(capsys, run, "--against", "nobody")


def test_popularity_needs_no_file_and_none_of_an_old_run_disturbs_it(tmp_path):
    """Items are bought as often as their number says: everyone is shown 40, 39, .. 21."""
    run = write_run(tmp_path / "run", [40, 38, 21, 1])
    write_predictions(run, "popularity", lists([1] * 4, [1] * 4), seed=0)
    saved, table = results(run)
    row = saved["rows"].pop("popularity")
    assert row["mean"][:3] == [0.25, 0.5, 0.5] and row["std"] is None and row["seeds"] == [0]
    assert row["parameters"] == N and row["bytes"] == 4 * N and saved["rows"].keys() == {"last-item", "co-occurrence"}
    half = 1.96 * math.sqrt(0.25 * 0.75 / 4)  # of four users one has the item first
    assert row["half"][0] == pytest.approx(half)


def shop_of(histories, items=N):
    """What the baselines read of data.pt, of these histories: the last two events are held out."""
    lengths = torch.tensor([0] + [len(history) for history in histories])
    training = torch.tensor([item for history in histories for item in history[:-2]], dtype=torch.long)
    return {"events": torch.tensor([item for history in histories for item in history], dtype=torch.int32),
            "offsets": lengths.cumsum(0), "train_counts": torch.bincount(training, minlength=items + 1).int(),
            "item_ids": [""] * (items + 1), "user_ids": [""] * len(histories)}


def random_histories(users=60, items=30):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (users,), generator=rng).tolist()
    return [(1 + torch.randperm(items, generator=rng)[:length]).tolist() for length in lengths]


def test_last_item_lists_what_came_next_most_often_then_the_best_sellers():
    """After 5 came 6 twice, 7 and 8 once each, of which 8 sells better. After 9 nothing came but what is held out."""
    histories = [[1, 5, 6, 2, 3], [4, 5, 6, 9, 8], [5, 7, 4, 9], [3, 5, 8, 1, 2], [8, 2, 5, 9], [2, 9, 1]]
    top = evaluation.last_item(shop_of(histories, items=9))["test"]
    assert top[4].tolist()[:10] == [6, 8, 7, 5, 2, 1, 3, 4, 9, 0]
    assert top[5].tolist()[:10] == [5, 2, 6, 8, 1, 3, 4, 7, 9, 0]


def test_co_occurrence_is_the_sum_over_all_pairs_of_near_items():
    histories = random_histories()
    data = shop_of(histories, 30)
    strength = torch.zeros(31, 31)
    for history in histories:
        for a, one in enumerate(history[:-2]):
            for b, other in enumerate(history[:-2]):
                if 1 <= abs(a - b) <= evaluation.NEAR:
                    strength[one, other] += 1 / abs(a - b)
    bought = data["train_counts"].float()
    strength += (strength > 0) * 0.01 * bought / bought.max()  # the best seller of equals
    top = evaluation.co_occurrence(data)["test"].long()
    for user, history in enumerate(histories):
        known = history[:-1][::-1][:evaluation.NEAR]
        score = sum(0.5 ** a * strength[item] for a, item in enumerate(known))
        assert score[top[user, :8]].tolist() == pytest.approx(score.sort(descending=True).values[:8].tolist())


def test_of_a_pair_seen_in_training_the_table_says_how_often_it_was_found(tmp_path):
    """In training 3 was followed by 4, 4 by 5. The third user's pair 5, 3 was seen the other way round only, the
    fourth one's in held-out events only."""
    histories = [[3, 4, 5, 9, 8], [7, 3, 4], [1, 5, 3], [2, 9, 8]]
    data = shop_of(histories)
    assert evaluation.seen_pairs(data).tolist() == [False, True, False, False]
    run = write_run(tmp_path / "run", [8, 4, 3, 8])
    torch.save(torch.load(run / "data.pt") | data, run / "data.pt")
    write_predictions(run, "sasrec", lists([8, 4, 3, 8], [None, 1, 3, 1]))
    saved, table = results(run)
    assert saved["rows"]["sasrec"]["seen pairs"][2] == 1
    assert saved["rows"]["sasrec"]["new pairs"][2] == pytest.approx(2 / 3)
    assert cells(table, "sasrec")[1] == ["sasrec", "1.0000", "1.0000", "0.6667", "0.5000"]
    assert "seen pairs (1 users)" in table and "new pairs (3 users)" in table


def test_baselines_count_no_event_that_is_to_be_found():
    """Other test items change no list. Other validation items do, as they are known by then, but no count."""
    histories = random_histories()
    other_test = [history[:-1] + [30 - history[-1] or 30] for history in histories]
    data = shop_of(histories, 30)
    other = shop_of(other_test, 30)
    for baseline in (evaluation.popularity, evaluation.last_item, evaluation.co_occurrence):
        assert torch.equal(baseline(data)["test"], baseline(other)["test"])

    other_validation = [history[:-2] + [31 - history[-2], history[-1]] for history in histories]
    other = shop_of(other_validation, 30)
    for places in range(1, 12):
        for ours, theirs in zip(evaluation.training_pairs(data, places), evaluation.training_pairs(other, places)):
            assert torch.equal(ours, theirs)


def test_only_the_strongest_neighbours_are_kept(monkeypatch):
    monkeypatch.setattr(evaluation, "NEIGHBOURS", 2)
    before = torch.tensor([1, 1, 1, 1, 2, 1])
    after = torch.tensor([2, 3, 4, 3, 1, 4])
    strength = torch.tensor([5.0, 1, 1, 2, 7, 3])  # of 1: 2 has 5, 3 has 3, 4 has 4
    items, strengths = evaluation.strongest(shop_of([[1, 2, 3]], 4), before, after, strength)
    assert items.tolist() == [[0, 0], [2, 4], [1, 0], [0, 0], [0, 0]]
    assert strengths[1].tolist() == pytest.approx([5, 4], abs=0.01)


def test_the_share_of_the_best_possible_is_shown_where_that_is_known(tmp_path):
    run = write_run(tmp_path / "run", [1, 2])
    write_predictions(run, "sasrec", lists([1, 2], [1, None]))
    assert "share of best" not in results(run)[1]
    write_predictions(run, "best-possible", lists([1, 2], [1, 3]))
    table = results(run)[1]
    assert "share of best" in table
    assert cells(table, "sasrec")[0][-1] == "67%"  # .5 of .75
    assert cells(table, "best-possible")[0][-1] == "100%"


def test_shown_items_against_hand_counts(scripts):
    """Two users, four items: the first ten of one user holds items 1 and 2, of the other 1 alone."""
    top, target = torch.tensor([[1, 2], [1, 0]]), torch.tensor([2, 3])
    rank = scripts[6].rank_of(target, top)
    shown = scripts[6].shown_items(top, rank, target, torch.tensor([0, 9, 5, 1, 0]))
    assert shown["coverage"] == 0.5 and abs(shown["popularity"] - (9 + 9 + 5) / 3) < 1e-9
    assert abs(shown["top_tenth"] - 2 / 3) < 1e-9  # the tenth of four items is one item: the first
    by_hand = sum(abs(a - b) for a in (2, 1, 0, 0) for b in (2, 1, 0, 0)) / (2 * 4 * 3)
    assert abs(shown["gini"] - by_hand) < 1e-9
    assert [x for x in shown["deciles"] if x == x] == [0.0, 1.0]  # the rarer target was missed


def test_ten_groups_of_users_by_how_rare_their_item_is():
    """Twenty users in any order; who looks for one of the ten rarest has it in place 10, all others in place 11."""
    target = torch.randperm(20, generator=torch.Generator().manual_seed(0)) + 1
    rank = torch.where(target <= 10, 10.0, 11.0)
    shown = evaluation.shown_items(torch.tensor([[1]]), rank, target, torch.arange(21))
    assert shown["deciles"] == [1.0] * 5 + [0.0] * 5


def test_the_tenth_of_twenty_items_is_two_items():
    top = torch.tensor([[20, 19, 18], [20, 17, 0]])  # 20 and 19 sell best: three of five places
    shown = evaluation.shown_items(top, torch.ones(2), torch.tensor([1, 2]), torch.arange(21))
    assert shown["top_tenth"] == pytest.approx(3 / 5)


def test_use_of_codes_against_hand_counts():
    """Prefixes of one code: three items, two items, one item. Of two codes: two, one, two, one."""
    codes = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1], [2, 0, 0]])
    stats = evaluation.use(codes, 4)
    assert stats["used"] == [3 / 4, 2 / 4, 2 / 4]
    assert stats["unique"] == [1 / 6, 2 / 6]
    assert stats["largest"] == [3, 2]
    entropy = math.log(6) - (3 * math.log(3) + 2 * math.log(2)) / 6
    assert stats["perplexity"] == pytest.approx([math.exp(entropy), 2, math.exp(entropy_of(2 / 6))])


def entropy_of(share):
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def test_nmi_and_purity_against_hand_counts():
    """In units of log 2: categories have entropy 1.5, the first code 1, both together 1.5; the first two codes 2."""
    codes = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    told = evaluation.meaning(codes, torch.tensor([7, 7, 8, 9]))
    assert told["nmi"] == pytest.approx([2 * 1 / 2.5, 2 * 1.5 / 3.5])
    assert told["purity"] == [3 / 4, 1.0]


def test_meaning_is_that_of_known_items_with_a_label_beside_shuffled_codes():
    """Codes are the colour wherever the item is known and has one, and noise elsewhere."""
    rng = torch.Generator().manual_seed(0)
    colour = torch.randint(4, (201,), generator=rng)
    codes = torch.stack([colour, torch.zeros(201).long()], 1)
    known = torch.arange(201) % 3 > 0
    codes[~known, 0] = 5
    label = colour.clone()
    label[1::3] = -1
    tree = {"codes": codes.short(), "known": known, "codebooks": torch.zeros(1, 8, 2)}
    stats = evaluation.describe_codes({"image": tree}, {"colour": label}, rng)["image"]
    assert stats["used"][0] == 4 / 8
    assert stats["colour"] == {"nmi": [pytest.approx(1)], "purity": [1.0]}
    assert stats["colour, shuffled"]["nmi"][0] < 0.3 and stats["colour, shuffled"]["purity"][0] < 0.6


def test_a_category_is_the_first_that_fewer_than_half_of_the_items_have():
    categories = [[], ["all", "red", "round"], ["all", "blue"], ["all", "red"], ["all"], []]
    data = {"item_ids": [""] * 6, "categories": categories, "meta": {"truth": {"size": [-1, 3, 3, 0, 3, 1]}}}
    labels = evaluation.labels_of_items(data)
    assert labels.keys() == {"category", "size"}
    assert labels["category"].tolist() == [-1, 0, 1, 0, -1, -1]
    size = labels["size"].tolist()
    assert size[1] == size[2] == size[4] and len(set(size)) == 4 and min(size) >= 0


def test_meaning_of_codes(scripts):
    """Codes that are the category say all of it at level 1; shuffled codes say little."""
    generator = torch.Generator().manual_seed(0)
    category = torch.randint(4, (400,), generator=generator)
    codes = torch.stack([category, *torch.randint(3, (3, 400), generator=generator)], 1)
    told = scripts[6].meaning(codes, category)
    assert abs(told["nmi"][0] - 1) < 1e-5 and told["purity"] == [1.0, 1.0, 1.0]
    assert told["nmi"][0] > told["nmi"][1] > told["nmi"][2]  # prefixes finer than the categories share less
    mixed = scripts[6].meaning(codes[torch.randperm(400, generator=generator)], category)
    assert mixed["nmi"][0] < 0.05 and mixed["purity"][0] < 0.4


def draws(script):
    """The names of the PNG files in the script's docstring."""
    return {name.replace("MODALITY", m) for name in re.findall(r"[\w-]+\.png", script.__doc__)
            for m in ("image", "text", "collab")}


def test_every_picture_of_the_docstring_is_drawn(smoke):
    run, _ = smoke
    of_others = {"items.png", "history.png"}  # 01's; 05 draws the other if it is asked for a --history
    assert draws(evaluation) == {path.name for path in run.glob("*.png")} - of_others
    assert len(draws(evaluation)) == 10
    for name in draws(evaluation):
        with Image.open(run / name) as picture:
            picture.load()
            assert 600 <= picture.width <= 1520 and picture.height > 200
            assert len(picture.convert("L").getcolors()) > 20, f"{name} is empty"


def test_what_is_missing_is_not_drawn_but_said(tmp_path, capsys):
    """No pictures at all, no curves, no codes: histories are grey tiles with titles."""
    run = write_run(tmp_path / "run", [4, 8])
    results(run)
    said = capsys.readouterr().out
    assert {path.name for path in run.glob("*.png")} == {"recall.png", "rarity.png", "histories.png"}
    assert all(f"{name} is not drawn" in said for name in ("curves.png", "codes.png", "neighbours.png", "one-item.png"))
    with Image.open(run / "histories.png") as picture:
        assert picture.getpixel((112 + 30, 38 + 5)) == (208, 208, 208)


def test_letters_and_ticks():
    """The font knows no accents: they are dropped. Axes have few, round numbers."""
    assert evaluation.cut("Amélie (2001)", 200, 11, 2) == "Amelie (2001)"
    assert evaluation.cut("one two three four five six", 40, 11, 2).count("\n") == 1
    assert evaluation.ticks(0, 0.43) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert evaluation.ticks(4.7, 7.3) == pytest.approx([5, 5.5, 6, 6.5, 7])


def drawn_by(monkeypatch, draw, *arguments):
    """The panels that a function would have drawn."""
    panels = []
    monkeypatch.setattr(evaluation, "chart", lambda run, name, columns, some: panels.extend(some))
    draw(None, *arguments)
    return panels


def points(series):
    return [(round(x, 6), round(y, 6)) for x, y, low, high in series.points]


MEANS = {"weak": {"mean": [0, 0, 0.1], "deciles": [0.0] * 9 + [math.nan]},
         "strong": {"mean": [0, 0, 0.2], "deciles": [0.5] * 10}}


def test_curves_are_over_minutes_with_the_sum_of_the_codes_losses(monkeypatch):
    saved = {"ndcg": torch.tensor([0.25, math.nan]), "losses": torch.tensor([[2.0, 1.0], [1.5, 0.5]]), "seconds": 240.0}
    data = {"item_ids": [""] * 101}
    panels = drawn_by(monkeypatch, evaluation.draw_curves, MEANS, {"strong": saved, "mscgrec": saved}, data)
    loss, ndcg, levels = panels
    assert loss.title == "loss, nats (uniform over items: 4.61)"
    assert loss.unit == ndcg.unit == "minutes of training and validation"
    assert [(one.name, one.style) for one in loss.series] == [("strong", 0), ("mscgrec", 2)]
    assert points(loss.series[0]) == [(2, 3), (4, 2)] and points(ndcg.series[0]) == [(2, 0.25)]
    assert levels.title == "mscgrec: loss of each code, nats"
    assert [points(one) for one in levels.series] == [[(1, 2), (2, 1.5)], [(1, 1), (2, 0.5)]]


def test_rarity_is_drawn_rare_first_and_the_best_model_first(monkeypatch):
    data = {"train_counts": torch.arange(21), "events": torch.arange(20, 0, -1), "offsets": torch.arange(21)}
    panel, = drawn_by(monkeypatch, evaluation.draw_rarity, MEANS, data)
    assert panel.labels == ["1-2", "3-4", "5-6", "7-8", "9-10", "11-12", "13-14", "15-16", "17-18", "19-20"]
    assert [one.name for one in panel.series] == ["strong", "weak"]
    assert points(panel.series[0]) == [(x, 0.5) for x in range(10)] and len(points(panel.series[1])) == 9


def test_use_of_codes_is_drawn_in_per_cent_and_levels(monkeypatch):
    stats = {"used": [0.5, 1.0], "perplexity": [3.0, 7.0]}
    used, perplexity = drawn_by(monkeypatch, evaluation.draw_codes, {"image": stats})
    assert points(used.series[0]) == [(0, 50), (1, 100)] and points(perplexity.series[0]) == [(0, 3), (1, 7)]
    assert used.labels == ["1", "2: collisions"]
    other = {"used": [0.5, 1.0, 0.1], "perplexity": [3.0, 7.0, 1.0]}
    used, _ = drawn_by(monkeypatch, evaluation.draw_codes, {"image": stats, "text": other})
    assert used.labels == ["1", "2", "3"]


def test_bars_are_as_high_as_their_numbers_and_stand_at_their_names(tmp_path):
    """Left: at "a" bars of .5, with an interval from .25 to 1, and of 1; at "b" 1 and .5. Right: a line from 0 to 1."""
    bars = [evaluation.Series(0, "first", [(0, 0.5, 0.25, 1.0), (1, 1.0, 1.0, 1.0)]),
            evaluation.Series(1, "second", [(0, 1.0, 1.0, 1.0), (1, 0.5, 0.5, 0.5)])]
    line = [evaluation.Series(2, "third", [(0, 0.0, 0.0, 0.0), (4, 1.0, 1.0, 1.0)])]
    panels = [evaluation.Panel("bars", "y", "x", ["a", "b"], bars), evaluation.Panel("lines", "y", "x", None, line)]
    evaluation.chart(evaluation.Run(tmp_path), "x.png", 2, panels)
    white, black, blue, orange, sky = (255,) * 3, (0,) * 3, (31, 59, 92), (213, 94, 0), (125, 184, 232)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (evaluation.WIDTH, evaluation.HEIGHT)
        # y from 225 (0) to 68 (1); .5 is at 147. Bars of "a" begin at x = 79, 153 and end at 226; "b" is 185 right.
        for x, y, colour in ((100, 120, white), (100, 170, blue), (200, 120, orange), (200, 170, orange),
                             (285, 120, blue), (285, 170, blue), (385, 120, white), (385, 170, orange),
                             (115, 110, black), (115, 180, black), (115, 200, blue)):
            assert picture.getpixel((x, y)) == colour, (x, y)
        places = [(x, y) for x in range(500, 900) for y in range(60, 240) if picture.getpixel((x, y)) == sky]
    first, last = min(places), max(places)
    assert abs(first[0] - 510) < 10 and abs(first[1] - 225) < 10
    assert abs(last[0] - 880) < 10 and abs(last[1] - 68) < 10


def test_a_picture_is_shown_where_the_item_has_one(tmp_path):
    run = write_run(tmp_path / "run", [4, 8])
    data = torch.load(run / "data.pt", weights_only=True)
    data["has_image"][39] = True
    torch.save(data, run / "data.pt")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    torch.save({"made_from": {}, "images": red.view(1, 3, 1, 1).expand(N + 1, 3, 8, 8).clone()}, run / "images.pt")
    results(run)
    with Image.open(run / "histories.png") as picture:
        assert picture.getpixel((112 + 30, 38 + 30)) == (255, 0, 0)  # item 39, the first of the history
        assert picture.getpixel((112 + 72 + 30, 38 + 30)) == (208, 208, 208)  # item 40


def test_the_item_to_be_found_is_framed(tmp_path):
    """In the history it is the last one; in a list it is framed where it was found, and nothing else is."""
    run = write_run(tmp_path / "run", [38, 38])
    write_predictions(run, "sasrec", lists([38, 38], [1, 2]))
    models = evaluation.read_predictions(evaluation.Run(run), torch.load(run / "data.pt"))
    strips = evaluation.history_strips({"user 0": 0, "user 1": 1}, models, torch.load(run / "data.pt"))
    rows = [(strip.label, strip.items[:3], strip.framed) for strip in strips if strip.items]
    assert rows == [("history", [39, 40, 38], [38]), ("popularity", [40, 39, 38], [38]), ("sasrec", [38, 1, 2], [38]),
                    ("history", [39, 40, 38], [38]), ("popularity", [40, 39, 38], [38]), ("sasrec", [1, 38, 2], [38])]
    results(run)
    orange = (213, 94, 0)
    with Image.open(run / "histories.png") as picture:
        for y, framed in ((38, 2), (138, 2), (238, 0)):  # below the heading: history, popularity, sasrec
            for column in range(3):
                left = 112 + 72 * column - 2  # between the picture and the one before
                assert (picture.getpixel((left, y + 30)) == orange) == (column == framed)


def test_of_a_long_history_the_end_is_shown_and_of_a_list_its_first_ten_items():
    """Fifteen events; a list that names items 1 to 12, and one that has only two."""
    data = {"events": torch.arange(21, 36), "offsets": torch.tensor([0, 15])}
    full, short = torch.arange(1, 13).unsqueeze(0), torch.tensor([[7, 35] + [0] * 10])
    models = {"popularity": [{"top": full}], "mscgrec": [{"top": short}]}
    heading, *strips = evaluation.history_strips({"user 0": 0}, models, data)
    assert heading.items == () and heading.label.startswith("user 0")
    assert strips == [("history", list(range(25, 36)), [35]), ("popularity", list(range(1, 11)), [35]),
                      ("mscgrec", [7, 35], [35])]


def test_neighbours_begin_with_the_item_itself(smoke):
    run = evaluation.Run(smoke[0])
    data = run.load("data.pt", "01_data.py")
    images = evaluation.read_images(run, data)
    tree = run.load("image_codes.pt", "03")
    strips = evaluation.neighbour_strips(tree, data, images, torch.Generator().manual_seed(0))
    bought = data["train_counts"].masked_fill(~tree["known"], -1)
    assert len(strips) == 10 and strips[0].framed == [bought.argmax().item()]
    for strip in strips:
        assert strip.framed == strip.items[:1]
        kind = tree["embeddings"] if strip.label.startswith("RQ-DINO") else images.flatten(1).float()
        distance = (kind[strip.items] - kind[strip.items[0]]).norm(dim=1)  # (columns,)
        assert (distance.diff() >= -1e-3).all()


def test_branches_of_the_tree_hold_the_items_that_begin_so(tmp_path):
    """Codes 5, 5, 5, 2, 2, .. and then 1, 1, 0, ..: the fullest first code, then its two branches."""
    codes = torch.tensor([[0, 0], [5, 1], [5, 1], [5, 0], [2, 3], [2, 3]])
    tree = {"codes": codes, "known": torch.tensor([False] + [True] * 5)}
    data = {"train_counts": torch.tensor([0, 1, 2, 3, 4, 5])}
    labels = {"colour": torch.tensor([-1, 7, 7, 7, 0, 1]), "kind": torch.tensor([-1, 0, 1, 2, 3, 3]),
              "none": torch.tensor([-1, -1, -1, -1, -1, 0])}
    strips = evaluation.tree_strips("image", tree, labels, data)
    assert [strip.items for strip in strips] == [(), [3, 2, 1], [2, 1], [3], (), [5, 4], [5, 4]]
    assert strips[1].label == "5, ..\n3 items\n100% one\ncolour"
    assert strips[-1].label == "2, 3, ..\n2 items\n100% one\nkind"
    tree["codes"] = torch.arange(6).unsqueeze(1)  # five first codes with an item each: the four best sellers'
    strips = evaluation.tree_strips("image", tree, labels, data)
    assert [strip.items for strip in strips] == [(), [5], (), [4], (), [3], (), [2]]


def test_more_models_than_inks_can_be_told_apart():
    looks = [evaluation.look(style) for style in range(24)]
    assert len(set(looks)) == 24


def test_a_bar_s_interval_holds_nothing_that_recall_cannot_be(monkeypatch):
    """Two seeds far apart: half the interval is more than 1."""
    drawn = []
    monkeypatch.setattr(evaluation, "chart", lambda run, name, columns, panels: drawn.extend(panels))
    evaluation.draw_recall(None, {"sasrec": {"mean": [0.5] * 5, "half": [6.4] * 5},
                                  "other": {"mean": [0.25] * 5, "half": [0.125] * 5}})
    assert drawn[0].labels == ["sasrec", "other"]
    assert drawn[0].series[0].points == [(0, 0.5, 0, 1), (1, 0.25, 0.125, 0.375)]


# --- One item -------------------------------------------------------------------------------------------------------
def searched(run, targets, **other):
    """A run whose item i has the codes (i // 9, i % 9), and lookahead's predictions with a trace: at the first level
    the right prefix is the second one, at the last level it is the first."""
    write_run(run, targets)
    data = torch.load(run / "data.pt", weights_only=True)
    torch.save(data | {"texts": [""] * (N + 1)}, run / "data.pt")
    item = torch.arange(N + 1)
    codes = torch.stack([item // 9, item % 9], 1).short()
    torch.save({"codes": codes, "known": item > 0, "codebooks": torch.zeros(1, 9, 3),
                "embeddings": torch.randn(N + 1, 3)}, run / "collab_codes.pt")
    right = codes[torch.tensor(targets)]
    trace = torch.full((len(targets), 2, 3, 2), -1, dtype=torch.int16)
    trace[:, 0, 0, 0] = right[:, 0] + 1
    trace[:, 0, 1, 0] = right[:, 0]
    trace[:, 1, 0] = right
    trace[:, 1, 1] = torch.stack([right[:, 0], (right[:, 1] + 1) % 9], 1)
    log_p = torch.tensor([[0.6, 0.3, 0.0], [0.2, 0.1, 0.0]]).log().expand(len(targets), -1, -1).clone()
    trace = {"target": "collab", "codes": trace, "log_p": log_p}
    write_predictions(run, "lookahead", lists(targets, [1] * len(targets)), **{"trace": trace} | other)
    return run


def test_what_is_marked_is_on_the_path_of_the_item_s_code(tmp_path, capsys):
    """Two levels: the second box of the first column, the first box of the second. A third box there is not."""
    run = searched(tmp_path / "run", [4, 8])
    results(run)
    assert "one-item.png: user 1, item 8." in capsys.readouterr().out
    with Image.open(run / "one-item.png") as picture:
        assert picture.width == evaluation.SLIDE and len(picture.convert("L").getcolors()) > 20
        orange, grey = (213, 94, 0), (160, 160, 160)
        # A column of pixels that crosses the upper and the lower edge of each box of a level.
        edges = []
        for x in (150, 900):
            top = picture.height - 3 * evaluation.ROW - 180
            column = [picture.getpixel((x, y)) for y in range(top, picture.height)]
            edges.append([now for before, now in zip(column, column[1:]) if now != before and now in (orange, grey)])
    first, second = edges
    assert first == [grey, grey, orange, orange, grey] and second == [orange, orange, grey, grey, grey]  # and a heading


@pytest.mark.parametrize("trace", [
    {}, [], {"target": "collab"}, {"target": "text", "codes": 1},
    {"target": "collab", "codes": torch.zeros(2, 3, 5, 3), "log_p": torch.zeros(2, 3, 5)},
    {"target": "collab", "codes": torch.zeros(3, 2, 5, 2), "log_p": torch.zeros(3, 2, 5)},
    {"target": "collab", "codes": torch.zeros(2, 2, 5, 2), "log_p": torch.zeros(2, 2)}])
def test_a_run_without_a_trace_that_fits_ends_with_a_line_that_says_so(tmp_path, capsys, trace):
    run = searched(tmp_path / "run", [4, 8], trace=trace)
    results(run)
    said = "one-item.png is not drawn: no predictions of lookahead or mscgrec have the `trace`"
    assert said in capsys.readouterr().out
    assert not (run / "one-item.png").exists()


def test_of_several_seeds_the_one_with_the_codes_of_the_run_is_drawn(tmp_path, capsys):
    """Seed 0's codes have been replaced since by those of seed 1."""
    run = searched(tmp_path / "run", [4, 8], made_from={"collab_codes.pt": "of seed 0"})
    results(run)
    assert "one-item.png is not drawn" in capsys.readouterr().out
    digest = hashlib.sha256((run / "collab_codes.pt").read_bytes()).hexdigest()
    saved = torch.load(run / "predictions-lookahead-s0.pt", weights_only=True)
    torch.save(saved | {"seed": 1, "made_from": {"collab_codes.pt": digest}}, run / "predictions-lookahead-s1.pt")
    results(run)
    assert (run / "one-item.png").exists()


def user_of(targets, ranks, sasrec, pictures, mscgrec=None):
    """The user whose item is drawn, where it is in the lists, the rule. Item i was bought i times; those of the users
    in `pictures` have one."""
    data = {"events": torch.tensor(targets), "offsets": torch.arange(len(targets) + 1),
            "train_counts": torch.arange(N + 1), "has_image": torch.zeros(N + 1, dtype=torch.bool)}
    data["has_image"][[targets[user] for user in pictures]] = True
    trace = {"target": "collab", "codes": torch.zeros(len(targets), 2, 3, 2), "log_p": torch.zeros(len(targets), 2, 3)}
    entry = {"seed": 0, "top": lists(targets, ranks), "trace": trace}
    models = {"sasrec": [{"seed": 0, "top": lists(targets, sasrec)}]} if sasrec else {}
    if mscgrec:
        models["mscgrec"] = [{"seed": 0, "top": lists(targets, mscgrec)}]
    return evaluation.pick_user("lookahead", entry, models, data)


def test_the_item_that_is_drawn_is_found_by_the_rule_that_is_printed():
    """Step by step: sasrec misses the last four, of these three have place 2, two a picture, one more events."""
    user, places, rule = user_of([30, 5, 6, 7, 9], [1, 3, 2, 2, 2], [10, None, 11, 12, None], [0, 1, 2, 3])
    assert user == 3 and places == "lookahead 2, sasrec 12"
    assert "not in sasrec's first ten" in rule and "best place in lookahead's list" in rule
    user, places, _ = user_of([30, 5, 6], [1, 1, None], [1, 1, None], [])  # conditions that none meets, but the first
    assert user == 2 and places == "lookahead none, sasrec none"
    user, places, rule = user_of([30, 5, 6], [2, 1, None], None, [0, 2])
    assert user == 1 and places == "lookahead 1" and "sasrec" not in rule
    user, places, rule = user_of([30, 5, 6], [2, 1, 2], None, [0, 2], mscgrec=[10, None, 11])
    assert user == 0 and places == "lookahead 2, mscgrec 10" and "item is in mscgrec's" in rule


def test_who_bought_it_after_what_is_of_training_alone():
    """Item 9 is bought first, in the middle, last of training, for validation and for the test."""
    histories = [[9, 1, 2, 3], [1, 2, 9, 3, 4], [1, 2, 3, 4, 5, 6, 9, 7, 8], [1, 2, 9, 3], [1, 2, 3, 9]]
    data = shop_of(histories) | {"has_image": torch.arange(N + 1) > 2}
    assert evaluation.bought_before(9, data) == [[2, 3, 4, 5, 6], [1, 2]]


def test_of_the_items_that_begin_so_those_with_a_picture_come_first_then_the_most_bought(monkeypatch):
    tree = {"codes": torch.tensor([[1, 0], [1, 0], [1, 1], [2, 0], [1, 2], [1, 3]])}
    data = {"has_image": torch.tensor([False, True, True, True, False, True]), "train_counts": torch.arange(6)}
    among = torch.tensor([False, True, True, True, True, True])
    slide = evaluation.Slide(data, torch.zeros(6, 3, 8, 8, dtype=torch.uint8))
    drawn = []
    monkeypatch.setattr(slide, "tiles", lambda x, y, items: drawn.append(items) or x)
    monkeypatch.setattr(slide, "write", lambda x, y, text, *other: drawn.append(text))
    slide.node(0, 0, 400, tree, [1], among, "item")
    slide.node(0, 0, 400, tree, [1, 0], among, "item")
    slide.node(0, 0, 76 + 2 * evaluation.STEP, tree, [1], among, "other")
    assert drawn == ["1", [5, 2, 1, 4], "4 items", "1, 0", [1], "1 item", "1", [5, 2], "4 others"]


# --- Files, consoles, notebooks ---------------------------------------------------------------------------------------
def test_popularity_counts_training_events_only(tmp_path):
    """Test events say that item 1 is the best seller, training events say item 40."""
    run = write_run(tmp_path / "run", [1] * 30)
    row = results(run)[0]["rows"]["popularity"]
    assert row["mean"][2] == 0  # item 1 is the worst seller of 40


def test_main_may_be_called_for_another_run_in_the_same_process(tmp_path):
    for name, targets in (("first", [4, 8]), ("second", [5, 9, 7])):
        run = write_run(tmp_path / name, targets)
        digest = hashlib.sha256((run / "data.pt").read_bytes()).hexdigest()
        write_predictions(run, name, lists(targets, [1] * len(targets)), made_from={"data.pt": digest})
        made_from = results(run)[0]["made_from"]
        assert made_from.keys() == {"data.pt", f"predictions-{name}-s0.pt"}
        assert made_from["data.pt"] == digest


@pytest.mark.skipif(resource is None, reason="Windows has no such limits")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_picture(tmp_path):
    """Files may grow as large as results.pt, which is less than a picture needs."""
    targets = [4, 8]
    run = write_run(tmp_path / "run", targets)
    write_predictions(run, "sasrec", lists(targets, [1, 1]))
    results(run)
    most = max((run / name).stat().st_size for name in ("results.pt", "results.md")) + 200
    assert most < (run / "recall.png").stat().st_size
    (run / "recall.png").write_bytes(b"the old one")
    full = subprocess.run(command(6, "--run", run), capture_output=True, text=True, preexec_fn=lambda:
                          resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert full.returncode == 2 and full.stderr.count("\n") == 1
    assert "recall.png cannot be written" in full.stderr
    assert (run / "recall.png").read_bytes() == b"the old one"
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize("name", ("results.pt", "results.md", "rarity.png", "histories.png"))
def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, capsys, name):
    run = write_run(tmp_path / "run", [4, 8])
    (run / name).write_bytes(b"the old one")
    replace = os.replace

    def full(partial, path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        replace(partial, path)

    monkeypatch.setattr(evaluation.os, "replace", full)
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--run", str(run)])
    assert end.value.code == 2 and f"{name} cannot be written" in capsys.readouterr().err
    assert (run / name).read_bytes() == b"the old one"
    assert not list(run.glob("*.partial"))


def test_a_console_that_lacks_a_letter_ends_in_pictures_too(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [4, 8])
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = subprocess.run(command(6, "--run", run), capture_output=True)
    assert process.returncode == 0 and process.stderr == b""
    assert "histories.png" in {path.name for path in run.glob("*.png")}
    assert "±" in (run / "results.md").read_text(encoding="utf-8")


def test_python_that_skips_asserts_checks_all_the_same(tmp_path, capsys):
    """Compiled as python -O compiles it, the script refuses data of which one bit has flipped."""
    run = write_run(tmp_path / "run", [4, 8])
    script_without_asserts = {"__name__": "optimised"}
    exec(compile(SCRIPTS[5].read_text(), SCRIPTS[5], "exec", optimize=2), script_without_asserts)
    script_without_asserts["main"](["--run", str(run)])
    whole = bytearray((run / "data.pt").read_bytes())
    events = torch.load(run / "data.pt", weights_only=True)["events"].numpy().tobytes()
    whole[whole.index(events)] ^= 1
    (run / "data.pt").write_bytes(whole)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script_without_asserts["main"](["--run", str(run)])
    assert end.value.code == 2 and "damaged" in capsys.readouterr().err
