"""What the tests share: the scripts as modules, and one small run of all six, made once."""
import contextlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("0?_*.py"))


# What a second pytest runs, while the first one runs the others: about half of the minutes.
OTHER_HALF = ("test_05_*.py", "test_questions.py", "test_related_*.py")


def pytest_configure(config):
    """One thread for the tests, and for them alone: others import this file for what stands below.

    `pytest tests`, if nothing else is asked for, uses two cores."""
    torch.set_num_threads(1)
    if config.invocation_params.args in (("tests",), ("tests/",)) and (os.cpu_count() or 1) > 1:
        config.pluginmanager.register(SecondPytest())


class SecondPytest:
    """Starts another pytest on OTHER_HALF, waits for it, and shows at the end what it printed."""

    def __init__(self):
        files = [path for pattern in OTHER_HALF for path in sorted((ROOT / "tests").glob(pattern))]
        self.names = {path.name for path in files}
        self.printed = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen([sys.executable, "-m", "pytest", *files], cwd=ROOT, stdout=self.printed,
                                        stderr=subprocess.STDOUT)

    def pytest_ignore_collect(self, collection_path):
        return True if collection_path.name in self.names else None

    def pytest_sessionfinish(self, session):
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            self.process.terminate()
        if self.process.wait() != 0 and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        self.printed.seek(0)
        terminalreporter.section("beside it: " + ", ".join(OTHER_HALF))
        terminalreporter.write(self.printed.read())
        terminalreporter.section("and the others")


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


def run_script(number, *options, processes=0):
    """Runs the script of that number as a student would, on one thread. -> code and output, as of a finished process

    0 processes: in this one, which has imported torch already and so is seconds faster; 2: under torchrun."""
    if processes == 0:
        return run_here(number, *options)
    return subprocess.run(command(number, *options, processes=processes), capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_here(number, *options):
    """Runs a script in this process, from a fresh module, its output caught. -> as subprocess.run returns it"""
    module = script(number)
    before = sys.argv
    sys.argv = [str(SCRIPTS[number - 1]), *map(str, options)]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
            module.start(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    out.seek(0)
    err.seek(0)
    return subprocess.CompletedProcess(options, code, out.read(), err.read())


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
        process = run_script(number, "--run", run, "--smoke", processes=1)
        assert process.returncode == 0, f"script 0{number} failed:\n{process.stderr}"
        printed[number] = process.stdout
    return run, printed
