"""What the tests share: the scripts as modules, and one small run of all six, made once."""
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("0?_*.py"))


def run_script(number, *options):
    """Runs the script of that number as a student would. -> the finished process"""
    script = next(path for path in SCRIPTS if path.name.startswith(f"0{number}_"))
    return subprocess.run([sys.executable, script, *map(str, options)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def scripts():
    """The six scripts as modules, by number: names that start with a digit cannot be imported."""
    modules = {}
    for path in SCRIPTS:
        spec = importlib.util.spec_from_file_location(f"script{path.name[:2]}", path)
        modules[int(path.name[1])] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return modules


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
