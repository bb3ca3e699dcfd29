"""Nothing lost, nothing trusted, nothing silent: killed runs, files that are damaged or do not belong together."""
import os
import pickle
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from conftest import command, run_script

WRITTEN = {2: ("sasrec.pt", "collab_codes.pt", "predictions-sasrec-s0.pt"),
           3: ("dino.pt", "image_codes.pt"),
           5: ("generator-mscgrec.pt", "predictions-mscgrec-s0.pt")}
CHECKPOINT = {2: "sasrec.checkpoint", 3: "dino.checkpoint", 5: "generator-mscgrec.checkpoint"}


def inputs(smoke, folder, links=True):
    """A new run that starts with what scripts 1 to 4 made."""
    folder.mkdir()
    for name in ("data.pt", "images.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt"):
        (os.symlink if links else shutil.copy)(smoke[0] / name, folder / name)
    return folder


def same(a, b, where=""):
    """Are two artifacts equal bit for bit, but for the clock's and the memory's readings?"""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "peak_memory", "run", "made_from"}:
            same(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def kill_after_first_checkpoint(number, run, *options):
    """Starts the script, kills it as soon as there is a checkpoint. -> False where it was too quick"""
    process = subprocess.Popen(command(number, "--run", run, "--smoke", *options), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (run / CHECKPOINT[number]).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return (run / CHECKPOINT[number]).exists()


@pytest.mark.parametrize("number", (2, 3, 5))
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(smoke, tmp_path, number):
    runs = [inputs(smoke, tmp_path / name) for name in ("whole", "killed")]
    for run in runs:
        for name in WRITTEN[number]:
            (run / name).unlink(missing_ok=True)
    options = ("--epochs", 6)
    assert run_script(number, "--run", runs[0], "--smoke", *options).returncode == 0
    assert kill_after_first_checkpoint(number, runs[1], *options)
    state = torch.load(runs[1] / CHECKPOINT[number], weights_only=True)
    state["options"] |= {"device": "cuda"} | ({"bf16": True} if number == 5 else {})
    torch.save(state, runs[1] / CHECKPOINT[number])  # as if begun on a GPU: where it goes on is free
    other = run_script(number, "--run", runs[1], "--smoke", "--epochs", 7)
    assert other.returncode == 2 and "--epochs 6" in other.stderr, "another command must not go on with it"
    process = run_script(number, "--run", runs[1], "--smoke", *options)
    assert process.returncode == 0, process.stderr
    began = re.search("^epoch (  0|1:)", process.stdout, re.M)
    assert began is None, "it began anew"
    for name in WRITTEN[number]:
        same(*(torch.load(run / name, weights_only=True) for run in runs), name)
    assert not list(runs[1].glob("*.checkpoint")) and not list(runs[1].glob("*.partial"))
    torch.save(state, runs[1] / CHECKPOINT[number])
    fresh = run_script(number, "--run", runs[1], "--smoke", "--epochs", 1, "--fresh")
    assert "epoch   0" in fresh.stdout or "epoch 1:" in fresh.stdout, "it went on with what --fresh leaves aside"


def test_files_that_do_not_belong_together_are_refused(smoke, tmp_path):
    run = inputs(smoke, tmp_path / "run", links=False)
    assert run_script(1, "--run", run, "--smoke", "--seed", 1).returncode == 0
    process = run_script(5, "--run", run, "--smoke")
    assert process.returncode == 2 and "image_codes.pt was made from another" in process.stderr
    assert "data.pt" in process.stderr and not list(run.glob("generator*"))
    shutil.copy(smoke[0] / "data.pt", run)  # as many items, other pictures
    process = run_script(3, "--run", run, "--smoke")
    assert process.returncode == 2 and "data.pt was made from another" in process.stderr
    assert "images.pt" in process.stderr and not (run / "dino.pt").exists()


def test_a_generator_whose_codes_were_made_again_recommends_nothing(smoke, tmp_path):
    """Codes of another seed under weights that learned the old ones: wrong items, if nobody noticed."""
    run = inputs(smoke, tmp_path / "run", links=False)
    shutil.copy(smoke[0] / "generator-mscgrec.pt", run)
    item = torch.load(run / "data.pt", weights_only=True)["item_ids"][3]
    assert run_script(5, "--run", run, "--history", item).returncode == 0
    assert run_script(4, "--run", run, "--seed", 1).returncode == 0
    process = run_script(5, "--run", run, "--history", item)
    assert process.returncode == 2 and "made from another" in process.stderr and "text_codes.pt" in process.stderr


def test_a_folder_that_takes_no_file_is_one_sentence(scripts, tmp_path, monkeypatch, capsys):
    """A read-only file system refuses to open the partial file, and to delete it as well."""
    run = scripts[6].Run(tmp_path)

    def refuse(*given, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(scripts[6].Path, "unlink", refuse)
    monkeypatch.setattr(scripts[6].os, "fsync", refuse)
    with pytest.raises(SystemExit) as stop:
        run.save({"x": 1}, "x.pt")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "x.pt cannot be written" in said


class Bomb:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_damaged_and_hostile_files_end_in_one_sentence(smoke, tmp_path):
    whole = (smoke[0] / "data.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({"item_ids": ["", "x"]}, tmp_path / "foreign.pt")
    for name, content in (("short", whole[:len(whole) // 2]), ("flipped", bytes(flipped)), ("empty", b""),
                          ("bomb", pickle.dumps(Bomb())), ("foreign", (tmp_path / "foreign.pt").read_bytes())):
        run = inputs(smoke, tmp_path / name)
        (run / "data.pt").unlink()
        (run / "data.pt").write_bytes(content)
        before = sorted(run.iterdir())
        for number in (2, 3, 4, 5):
            process = run_script(number, "--run", run, "--smoke")
            assert process.returncode == 2 and process.stderr.count("\n") == 1, (name, number, process.stderr)
            assert "damaged" in process.stderr and "01_data.py" in process.stderr
        assert sorted(run.iterdir()) == before and (run / "data.pt").read_bytes() == content
    assert not list(tmp_path.rglob("harmed")) and not os.path.exists("harmed")


@pytest.mark.parametrize("number", (2, 5))
def test_a_loss_that_is_no_number_ends_the_run(smoke, tmp_path, number):
    run = inputs(smoke, tmp_path / "run")
    before = sorted(run.iterdir())
    process = run_script(number, "--run", run, "--smoke", "--lr", 1e30)
    assert process.returncode == 2 and "no number" in process.stderr, process.stderr
    assert sorted(run.iterdir()) == before
