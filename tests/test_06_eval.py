"""06_eval.py: metrics and intervals by hand, and a table that any model joins by a file."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import script
from PIL import Image

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
    evaluation.main(["--run", str(run), "--draws", "100", *options])
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
    quality, cost, popular = cells(table, "sasrec")
    assert quality == ["sasrec", "1", "0.2500", "0.5000", "0.5000", "0.3750", "0.3750", "", ""]
    shown = top[:, :10].unique()
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
    assert cells(table, "sasrec")[0][1:3] == ["3", "0.5000 ± 0.5000"]


def test_interval_of_equal_models_holds_zero_and_of_a_better_one_does_not(tmp_path):
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(1, N + 1, (400,), generator=rng).tolist()
    draw = lambda most: [r if r <= TOP else None for r in torch.randint(1, most, (400,), generator=rng).tolist()]
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
    assert [line.split()[1] for line in table.split("\n") if line.startswith("| ")][1:6][-1] == "better"
    against = results(run, "--against", "better")[0]["rows"]
    assert torch.tensor(against["sasrec"]["interval"]).max() < 0 and "interval" not in against["better"]


def test_interval_is_as_wide_as_theory_says():
    """Differences of 0 or 1, 100 of 400: a mean of 0.25, a standard error of sqrt(0.25 * 0.75 / 400)."""
    ours, theirs = torch.zeros(1, 400, 5, dtype=torch.double), torch.zeros(1, 400, 5, dtype=torch.double)
    ours[:, :100] = 1
    low, high = evaluation.paired_bootstrap(ours, theirs, 2000, torch.Generator().manual_seed(0))
    error = math.sqrt(0.25 * 0.75 / 400)
    torch.testing.assert_close(low, torch.full((5,), 0.25 - 1.96 * error, dtype=torch.double), atol=5e-3, rtol=0)
    torch.testing.assert_close(high, torch.full((5,), 0.25 + 1.96 * error, dtype=torch.double), atol=5e-3, rtol=0)


def test_seeds_that_differ_widen_the_interval():
    """No user differs from another here: all there is to be unsure of is which seeds were run."""
    ours, theirs = torch.ones(2, 50, 5, dtype=torch.double), torch.ones(1, 50, 5, dtype=torch.double)
    ours[1] = 3
    low, high = evaluation.paired_bootstrap(ours, theirs, 200, torch.Generator().manual_seed(0))
    assert low.tolist() == pytest.approx([0.0] * 5) and high.tolist() == pytest.approx([2.0] * 5)


def test_a_foreign_model_joins_with_two_keys(tmp_path, capsys):
    targets = [4, 8]
    run = write_run(tmp_path / "run", targets)
    write_predictions(run, "sasrec", lists(targets, [2, 2]))
    test = torch.zeros(2, 12, dtype=torch.long)  # shorter, 0 where it recommends nothing
    test[0, :2] = torch.tensor([4, 9])
    torch.save({"name": "by hand", "test": test}, run / "predictions-anything.pt")
    saved, table = results(run)
    assert saved["rows"]["by hand"]["mean"] == [0.5] * 5 and saved["rows"]["by hand"]["seeds"] == [0]
    quality, cost, shown = cells(table, "by hand")
    assert quality[2] == "0.5000" and cost == ["by hand", "-", "-", "-", "-", "-"] and shown[1] == "5%"
    assert cells(table, "sasrec") and table.strip() in capsys.readouterr().out
    torch.save({"name": "by hand", "seed": 1, "test": torch.zeros_like(test), "seconds": {"train": 3}},
               run / "predictions-nothing.pt")
    results(run)
    assert "3 files, 2 users: all ids are real items, none comes twice" in \
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
    assert saved["codes"]["text"]["used"] == [3 / 16, 11 / 16, 1 / 16, 1 / 16] and "interval" not in saved["rows"]["foreign"]
    first = torch.tensor([10, 9, 11]) / 30
    assert saved["codes"]["text"]["perplexity"][0] == pytest.approx(float((-first * first.log()).sum().exp()))
    assert cells(table, "text") == [["text", "75%", "16", "19, 69, 6", "3, 4, 1, 1", "0, 37, 37", "11, 10, 10", "3"]]


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
    assert "--draws" in refused(capsys, run, "--draws", "0")


def test_popularity_needs_no_file_and_none_of_an_old_run_disturbs_it(tmp_path):
    """Items are bought as often as their number says: everyone is shown 40, 39, .. 21."""
    run = write_run(tmp_path / "run", [40, 38, 21, 1])
    write_predictions(run, "popularity", lists([1] * 4, [1] * 4), seed=0)
    saved, table = results(run)
    row = saved["rows"].pop("popularity")
    assert row["mean"][:3] == [0.25, 0.5, 0.5] and row["std"] is None and row["seeds"] == [0]
    assert row["parameters"] == N and row["bytes"] == 4 * N and not saved["rows"]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 4)  # of four users one has the item first
    assert row["error"][0] == pytest.approx(half)


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
    assert draws(evaluation) == {path.name for path in run.glob("*.png")} - {"items.png"} and len(draws(evaluation)) == 9
    for name in draws(evaluation):
        with Image.open(run / name) as picture:
            picture.load()
            assert 600 <= picture.width <= 1400 and picture.height > 200
            assert len(picture.convert("L").getcolors()) > 20, f"{name} is empty"


def test_what_is_missing_is_not_drawn_but_said(tmp_path, capsys):
    """No pictures at all, no curves, no codes: histories are grey tiles with titles."""
    run = write_run(tmp_path / "run", [4, 8])
    results(run)
    said = capsys.readouterr().out
    assert {path.name for path in run.glob("*.png")} == {"recall.png", "rarity.png", "histories.png"}
    assert all(f"{name} is not drawn" in said for name in ("curves.png", "codes.png", "neighbours.png"))
    with Image.open(run / "histories.png") as picture:
        assert picture.getpixel((112 + 30, 38 + 5)) == (208, 208, 208)


def test_letters_and_ticks():
    """The font knows no accents: they are dropped. Axes have few, round numbers."""
    assert evaluation.cut("Amélie (2001)", 200, 11, 2) == "Amelie (2001)"
    assert evaluation.cut("one two three four five six", 40, 11, 2).count("\n") == 1
    assert evaluation.ticks(0, 0.43) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert evaluation.ticks(4.7, 7.3) == pytest.approx([5, 5.5, 6, 6.5, 7])
