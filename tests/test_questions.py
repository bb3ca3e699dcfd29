"""tests/questions.py: the best that any model could do in the toy shop; how it runs the ten related systems."""
import argparse
import importlib
import itertools
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import questions
from conftest import ROOT, script

one = script(1)


def probability(rules, liked, history, item):
    """p(item | favourites, history) as 01's docstring has it: the softmax of the score, or a whim. liked: of TASTE"""
    favourites = {name: np.array([value]) for name, value in zip(one.TASTE, liked)}
    score = one.taste_of(favourites, rules)  # (1, n)
    if history:
        one.add_what_follows(score, np.array(history[-1:]), rules)
    free = [i for i in range(len(rules.rank)) if i not in history]
    total = sum(math.exp(score[0, i]) for i in free)
    return (1 - one.WHIM) * math.exp(score[0, item]) / total + one.WHIM / len(free)


@pytest.mark.parametrize("history", ([], [3], [3, 0, 7]), ids=len)
def test_the_ceiling_s_probabilities_are_those_of_all_favourites_tried_one_by_one(history):
    rules = one.toy_rules(9, 1, np.random.default_rng(0))
    combinations = itertools.product(*[range(len(one.PROPERTIES[name])) for name in one.TASTE])
    by_hand = np.zeros(9)
    evidence = 0
    for liked in combinations:
        likelihood = 1
        for t, item in enumerate(history):
            likelihood *= probability(rules, liked, history[:t], item)
        evidence += likelihood
        for item in set(range(9)) - set(history):
            by_hand[item] += likelihood * probability(rules, liked, history, item)

    asked = np.array([history, history], dtype=int)  # two customers alike
    chance = questions.next_item(one, rules, asked)  # (2, 9)
    assert chance.sum(1) == pytest.approx(1)
    assert chance == pytest.approx(np.tile(by_hand / evidence, (2, 1)))


def test_of_an_item_without_training_events_the_ceiling_knows_all_but_the_circle():
    rules = one.toy_rules(9, 1, np.random.default_rng(0))
    history = np.array([[3], [4], [7]])
    circle = rules.truth["circle"]
    tried = []
    for guess in range(one.CIRCLES):
        circle[4] = guess
        tried.append(questions.what_follows(one, rules, history))  # (3, n)
    told = questions.what_follows(one, questions.forget_circles(rules, np.array([4])), history)  # (3, n)
    assert told[[0, 2]] == pytest.approx(np.mean(tried, 0)[[0, 2]])
    # After item 4 any circle may come, so that each is as likely as it is without one.
    assert told[1].max() <= math.exp(one.FOLLOWING) and told[1].argmin() == 4
    assert circle[4] == one.CIRCLES - 1  # and the rules that were given are as they were


def test_what_the_ceiling_promises_of_a_drawn_shop_comes_true():
    """4,000 customers and their fourth item: it is among the likeliest ten as often as their probabilities say, and
    the others too. So these are the rules by which 01 draws."""
    rng = np.random.default_rng(0)
    rules = one.toy_rules(100, 4000, rng)
    walks, _ = one.toy_walks(rules, rng)
    chance = questions.next_item(one, rules, walks[:, :3])  # (U, n)
    order = (-chance).argsort(1)
    for places in (slice(0, 1), slice(1, 3), slice(3, 10), slice(10, 30), slice(30, 60)):
        some = order[:, places]
        promised = np.take_along_axis(chance, some, 1).sum(1)  # (U,)
        kept = (some == walks[:, 3:4]).any(1)  # (U,)
        error = math.sqrt((promised * (1 - promised)).sum()) / len(walks)
        assert abs(kept.mean() - promised.mean()) < 3 * error


def ceiling(run):
    return subprocess.run([sys.executable, ROOT / "tests" / "questions.py", "ceiling", "--run", run],
                          capture_output=True, text=True)


def test_no_model_is_above_the_ceiling(smoke, tmp_path):
    for path in smoke[0].glob("*.pt"):
        shutil.copy(path, tmp_path)
    process = ceiling(tmp_path)
    assert process.returncode == 0, process.stderr
    rows = torch.load(tmp_path / "results.pt", weights_only=True)["rows"]
    best = rows.pop("best-possible")["mean"]
    assert {"popularity", "sasrec", "mscgrec"} <= rows.keys()
    for row in rows.values():
        assert all(mean < most for mean, most in zip(row["mean"], best))


def test_a_shop_of_other_rules_has_no_ceiling(smoke, tmp_path):
    data = torch.load(smoke[0] / "data.pt", weights_only=True)
    data["events"] = data["events"].roll(1)  # as if drawn by another version of 01
    torch.save(data, tmp_path / "data.pt")
    process = ceiling(tmp_path)
    assert process.returncode == 1 and "another version" in process.stderr
    data["meta"]["source"] = "my_folder"
    torch.save(data, tmp_path / "data.pt")
    process = ceiling(tmp_path)
    assert process.returncode == 1 and "of a toy shop only" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.pt"]


# --- The related systems ----------------------------------------------------------------------------------------------


def test_epochs_are_those_of_05_and_no_row_needs_another_run(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(questions, "prepare", lambda *given: None)
    monkeypatch.setattr(questions, "compare_related", lambda *given: None)
    monkeypatch.setattr(questions, "show", lambda line: lines.append(" ".join(line)) or 0)
    torch.save({"has_image": torch.tensor([False, True])}, tmp_path / "data.pt")
    questions.related(argparse.Namespace(run=tmp_path, only=[], seeds=[0], epochs=8))
    for name in questions.RELATED:
        own = [line for line in lines if f"{name}.py" in line]
        of_02 = name in ("ccfrec", "missrec", "hymirec")  # their base has 02's epochs
        assert own and all(("--epochs 8" in line) != of_02 for line in own)
        assert len(own) == len(set(own)), "a base that is a variant, too, is trained once"
    assert not any("transfer" in line or "noise" in line for line in lines if "utgrec.py" in line)


@pytest.mark.parametrize("name", questions.RELATED)
def test_help_shows_variants_and_the_options_of_the_script(name, capsys):
    system = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        system.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--variant" in said and "--epochs" in said
    assert all(f"  {variant} " in said for variant in system.VARIANTS)


def test_a_system_that_a_student_runs_has_as_many_threads_as_the_scripts():
    """conftest.py, from which it takes them, gives one thread to pytest alone."""
    code = "import liger, torch; print(torch.get_num_threads())"
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "tests" / "related")}
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert process.stdout == "2\n", process.stderr
