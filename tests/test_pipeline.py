"""The six scripts together: they run in order, keep their contracts, leak nothing, repeat to the bit."""
import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT, SCRIPTS, run_script

MOVIES = ROOT.parent / "shared" / "data" / "movietweetings-2013"


def load(path):
    return torch.load(path, weights_only=True)


def test_all_six_run_and_end_in_a_table(smoke):
    run, printed = smoke
    for name in ("popularity", "sasrec", "mscgrec"):
        assert f"| {name} " in printed[6]
        assert f"| {name} " in (run / "results.md").read_text()
    assert not list(run.glob("*.partial"))


KINDS = {"list": list, "dict": dict, "str": str, "int": int, "float": float}


def test_docstring_contracts_match_the_files(smoke):
    """Every key, type and shape that a script's docstring promises is in the file, and no other key (but made_from).

    A letter stands for one number within a file, and N, U, L, K for one number everywhere."""
    run, _ = smoke
    everywhere, checked = {}, 0
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(script.read_text()), clean=False)
        file = None
        found = {}
        for line in docstring[docstring.index("\nwrites") + 1:].split("\n"):
            name = re.match(r"^(?:        |writes  )(\S+\.(?:pt|md))", line)
            if name:
                file = name.group(1)
                if file.endswith(".pt"):
                    found[file] = {}
            entry = re.match(r"^          (\w+) +(u?int\d+|bool|float32|list|dict|str|int|float)\b"
                             r"(?: \(([^)]*)\))?", line)
            if entry and file:
                found[file][entry.group(1)] = entry.groups()[1:]
        for file, keys in found.items():
            artifact, letters = load(run / file), {}
            if not keys:
                continue
            assert set(keys) | {"made_from"} == set(artifact), f"{script.name}: {file}"
            for key, (kind, shape) in keys.items():
                value, where = artifact[key], f"{script.name}: {file}: {key}"
                if kind in KINDS:
                    assert isinstance(value, KINDS[kind]), where
                else:
                    assert str(value.dtype) == f"torch.{kind}", where
                if shape:
                    numbers = value.shape if torch.is_tensor(value) else [len(value)]
                    assert len(numbers) == len(shape.split(",")), where
                    for letter, number in zip(shape.split(","), numbers):
                        letter, plus = letter.strip().removesuffix("+1"), letter.strip().endswith("+1")
                        if letter.isdigit():
                            assert number == int(letter), where
                        else:
                            memory = everywhere if letter in "NULK" else letters
                            assert memory.setdefault(letter, number - plus) == number - plus, where
                checked += 1
    assert checked > 40


def repeated_texts(script):
    """The functions and classes under the section rules that say "the same text". -> name -> text"""
    source = script.read_text()
    lines = source.split("\n")
    rules = [n for n, line in enumerate(lines, 1) if line.startswith("# --- ")]
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            rule = max((n for n in rules if n < node.lineno), default=0)
            if rule and "the same text" in lines[rule - 1]:
                texts[node.name] = ast.get_source_segment(source, node)
    return texts


def test_what_scripts_repeat_has_one_text():
    """The scripts share no code but repeat some, on purpose: what is repeated must not drift."""
    seen = {}
    for script in SCRIPTS:
        for name, text in repeated_texts(script).items():
            other, where = seen.setdefault(name, (text, script.name))
            assert text == other, f"{name} differs between {where} and {script.name}"
    assert {"Run", "fail", "resume", "finish_codes", "training_windows"} <= seen.keys()


def test_a_letter_means_one_thing_in_all_scripts():
    """Each capital letter in a shape is explained by the script's own `letters`, in the same words everywhere."""
    meanings = {}
    for script in SCRIPTS:
        source = script.read_text()
        listed = re.search(r"^letters  (.*?)\n(?:reads|writes)", ast.get_docstring(ast.parse(source)), re.S | re.M)
        assert listed, f"{script.name} has no line of letters"
        letters = {entry.split()[0]: " ".join(entry.split()[1:]) for entry in re.split(r",\s", listed.group(1))}
        for letter, meaning in letters.items():
            if (letter, script.name[:2]) != ("B", "03"):  # there it counts pictures
                assert meanings.setdefault(letter, meaning) == meaning, f"{letter} in {script.name}"
        for number, line in enumerate(source.split("\n"), 1):
            for shape in re.findall(r"  # (\([^()]*[,)].*)", line):
                for letter in re.findall(r"\b[A-Z]\b", shape):
                    assert letter in letters, f"{script.name}:{number}: {letter} is not among its letters"


@pytest.mark.parametrize("number", range(2, 7))
def test_a_missing_input_is_one_sentence(number, tmp_path):
    process = run_script(number, "--run", tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "run 01_data.py" in process.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", range(1, 7))
def test_help_is_worth_reading(number):
    process = run_script(number, "--help")
    assert process.returncode == 0 and "default:" in process.stdout and "--seed" in process.stdout


def test_same_seed_same_bits(smoke, tmp_path):
    """Run again, 02, 04 and 05 write the same numbers: whoever repeats a run gets that run."""
    run, _ = smoke
    for file in ("data.pt", "image_codes.pt"):
        shutil.copy(run / file, tmp_path)
    for number in (2, 4, 5):
        assert run_script(number, "--run", tmp_path, "--smoke").returncode == 0
    for file in ("collab_codes.pt", "text_codes.pt", "predictions-sasrec-s0.pt", "predictions-mscgrec-s0.pt"):
        ours, theirs = load(run / file), load(tmp_path / file)
        for key, value in ours.items():
            if torch.is_tensor(value):
                assert torch.equal(value, theirs[key]), f"{file}: {key}"


def test_no_held_out_event_reaches_training(smoke, tmp_path):
    """With other test items, and after one epoch with other validation items, training is the same.

    Validation may choose the epoch; with one epoch there is nothing to choose."""
    run, _ = smoke
    data = load(run / "data.pt")
    shuffled = torch.randperm(len(data["user_ids"]), generator=torch.Generator().manual_seed(1))
    for back in (1, 2):
        last = data["offsets"][1:] - back
        data["events"][last] = data["events"][last[shuffled]]
    torch.save(data, tmp_path / "data.pt")
    shutil.copytree(run, tmp_path / "real")
    codes = load(run / "image_codes.pt")
    codes.pop("made_from")  # it would be refused: made from other data
    torch.save(codes, tmp_path / "image_codes.pt")
    for folder in (tmp_path, tmp_path / "real"):
        for number in (2, 4, 5):
            assert run_script(number, "--run", folder, "--smoke", *["--epochs", 1][:2 * (number != 4)]).returncode == 0
    for file, keys in (("sasrec.pt", ["item_embeddings", "losses"]), ("collab_codes.pt", ["codes", "embeddings"]),
                       ("text_codes.pt", ["codes"]), ("generator-mscgrec.pt", ["losses"])):
        for key in keys:
            assert torch.equal(load(tmp_path / file)[key], load(tmp_path / "real" / file)[key]), f"{file}: {key}"
    weights = [load(folder / "generator-mscgrec.pt")["weights"] for folder in (tmp_path, tmp_path / "real")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_modality_is_a_bijection_and_padding_stays_out(smoke):
    run, _ = smoke
    N = len(load(run / "data.pt")["item_ids"]) - 1
    for modality in ("image", "text", "collab"):
        saved = load(run / f"{modality}_codes.pt")
        codes, K = saved["codes"], saved["codebooks"].shape[1]
        assert len(codes[1:].unique(dim=0)) == N and 0 <= codes[1:].min() and codes.max() < K
        assert (codes[0] == -1).all() and not saved["known"][0] and not saved["embeddings"][0].any()
        assert saved["embeddings"].isfinite().all() and saved["codebooks"].isfinite().all()


def test_embeddings_line_up_with_item_ids(smoke):
    """Off by one between SASRec's rows and item ids would shift every collaborative code, silently."""
    run, _ = smoke
    items, codes = load(run / "sasrec.pt")["item_embeddings"], load(run / "collab_codes.pt")
    known = codes["known"]
    standardised = (items - items[known].mean(0)) / items[known].std()
    assert torch.allclose(standardised[known], codes["embeddings"][known], atol=1e-4)
    residual = codes["embeddings"]
    for level in range(3):
        distance = torch.cdist(residual, codes["codebooks"][level])
        right = distance.argmin(1) == codes["codes"][:, level]
        assert right[known].float().mean() > 0.99  # all but redistributed items, of which there are few
        residual = residual - codes["codebooks"][level][codes["codes"][:, level].long()]


def test_predictions_are_real_items_without_repeats(smoke):
    run, _ = smoke
    N = len(load(run / "data.pt")["item_ids"]) - 1
    for path in run.glob("predictions-*.pt"):
        saved = load(path)
        for split in ("valid", "test"):
            top = saved[split]
            assert top.dtype == torch.int32 and 1 <= top.min() and top.max() <= N, path.name
            assert all(len(set(row)) == len(row) for row in top.tolist()), path.name


def test_history_prints_titles(smoke):
    run, _ = smoke
    data = load(run / "data.pt")
    shown = run_script(5, "--run", run, "--smoke", "--history", f"{data['item_ids'][3]}; {data['item_ids'][5].upper()}")
    assert shown.returncode == 0, shown.stderr
    given, new = shown.stdout.split("probably")
    assert data["titles"][3] in given and "%" in new and f"[{data['item_ids'][3]}]" not in new
    with Image.open(run / "history.png") as page:  # the two given above, what comes next below
        assert page.width > 900 and page.crop((5, 5, 100, 100)).getcolors(10) is None
    saved = load(run / "generator-mscgrec.pt")
    saved["options"]["device"] = "cuda"  # where it was trained: it may be asked elsewhere
    torch.save(saved, run / "generator-elsewhere.pt")
    again = run_script(5, "--run", run, "--name", "elsewhere",
                       "--history", f"{data['item_ids'][3]};{data['item_ids'][5]}")
    assert again.stdout == shown.stdout, again.stderr
    (run / "generator-elsewhere.pt").unlink()
    unclear = run_script(5, "--run", run, "--smoke", "--history", "no such title")
    assert unclear.returncode == 2 and "0 titles have" in unclear.stderr


def test_ablations_and_other_targets_run(smoke):
    run, _ = smoke
    for name, options in (("tiger", ("--modalities", "text", "--target", "text")),
                          ("noimage", ("--modalities", "text,collab")),
                          ("plain-softmax", ("--unconstrained",)), ("image-target", ("--target", "image"))):
        process = run_script(5, "--run", run, "--smoke", "--name", name, *options)
        assert process.returncode == 0, process.stderr
        assert load(run / f"predictions-{name}-s0.pt")["test"].min() >= 1
    wrong = run_script(5, "--run", run, "--smoke", "--target", "taste")
    assert wrong.returncode == 2 and "taste_codes.pt is missing" in wrong.stderr


def test_ids_only_data_runs_through(tmp_path):
    """No text and no picture at all: two modalities are missing everywhere, nothing breaks."""
    run = tmp_path / "run"
    assert run_script(1, "--run", run, "--smoke").returncode == 0
    data, images = load(run / "data.pt"), load(run / "images.pt")
    N = len(data["item_ids"]) - 1
    data |= {"titles": [""] * (N + 1), "texts": [""] * (N + 1), "categories": [[] for _ in range(N + 1)]}
    data["has_image"][:], data["made_from"] = False, {}  # of the pictures that are blanked here
    images["images"][:] = 0
    torch.save(data, run / "data.pt")
    torch.save(images, run / "images.pt")
    for number in (2, 3, 4, 5, 6):
        process = run_script(number, "--run", run, "--smoke")
        assert process.returncode == 0, process.stderr
    assert not load(run / "text_codes.pt")["known"].any()


def test_questions_are_answered(smoke):
    """The long parts are run by hand; these two ask models that are there."""
    process = subprocess.run([sys.executable, ROOT / "tests" / "questions.py", "lost", "missing", "--run", smoke[0]],
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "| collab " in process.stdout and "| mscgrec " in process.stdout and "exhaustive" in process.stdout


@pytest.mark.skipif(not (MOVIES.exists() or os.environ.get("CI")),
                    reason="the real data of ../shared is not here: it is measured on, not shipped")
def test_real_films_run_through(tmp_path):
    """Real events, posters for some items, plots for some: the whole chain, small."""
    for number in range(1, 7):
        dataset = ("--dataset", MOVIES, "--max-users", 300) if number == 1 else ()
        process = run_script(number, "--run", tmp_path, "--smoke", *dataset)
        assert process.returncode == 0, process.stderr
    assert 0.3 < load(tmp_path / "image_codes.pt")["known"].float().mean() < 1


def test_pinned_torch_is_the_one_in_use():
    pinned = re.search(r"torch==(\S+)", pathlib.Path(ROOT / "requirements.txt").read_text()).group(1)
    assert torch.__version__.split("+")[0] == pinned
