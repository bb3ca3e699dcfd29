"""What the tests share: the scripts as modules, and one small run of all six, made once."""
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("0?_*.py"))


def script(number):
    """The script of that number as a new module: names that start with a digit cannot be imported."""
    path = SCRIPTS[number - 1]
    spec = importlib.util.spec_from_file_location(f"script{path.name[:2]}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(number, *options, processes=1):
    """The command line of a script, under torchrun where several processes are asked for. -> list of str"""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--")
    return [sys.executable, *(torchrun if processes > 1 else ()), *map(str, (SCRIPTS[number - 1], *options))]


def run_script(number, *options, processes=1):
    """Runs the script of that number as a student would. -> the finished process"""
    return subprocess.run(command(number, *options, processes=processes), capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def scripts():
    """The six scripts as modules, by number."""
    return {number: script(number) for number in range(1, 7)}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A folder with the artifacts of all six scripts, run small and in order, and what they printed."""
    run = tmp_path_factory.mktemp("smoke")
    printed = {}
    for number in range(1, 7):
        process = run_script(number, "--run", run, "--smoke")
        assert process.returncode == 0, f"script 0{number} failed:\n{process.stderr}"
        printed[number] = process.stdout
    return run, printed
