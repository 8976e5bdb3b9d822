"""A tiny data set, the command line in two ways, and one finished run that tests copy."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from chipdeploy.cli import main

COMMAND = Path(sys.executable).parent / "chipdeploy"
# Seven steps an epoch: short, and still through every part of the soft phase's schedule.
SETTINGS = ("resnet20", "--flops", "0.5", "--align", "4", "--batch", "32", "--device", "cpu")
EPOCHS = ("--train-epochs", "2", "--soft-epochs", "2", "--finetune-epochs", "3")


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one object on stdout."""
        assert self.out.count("\n") == 1, self.out
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self):
        """The one line that says what is wrong; nothing else but notes may stand before it."""
        lines = self.err.splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        assert self.code, self
        assert lines and found == lines[-1:], self.err
        assert "Traceback" not in self.err
        return found[0]


def images(count, size, classes, seed):
    """Noise with one bright channel, the number of the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = generator.integers(0, 60, (count, size, size, 3))
    for number, label in enumerate(labels):
        pixels[number, :, :, label % 3] += 120
    return pixels.astype(np.uint8), labels.astype(np.int64)


def write_data(path, *, train=256, test=64, size=16, classes=3, **changed):
    """A learnable .npz data set; `changed` replaces arrays."""
    x_train, y_train = images(train, size, classes, 0)
    x_test, y_test = images(test, size, classes, 1)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    np.savez(path, **arrays | changed)
    return path


@pytest.fixture(scope="session")
def make_data():
    return write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The spec of a small data set that can be learnt."""
    return f"npz:{write_data(tmp_path_factory.mktemp('data') / 'small.npz')}"


@pytest.fixture(scope="session")
def settings(data):
    """Arguments of the shortest run that goes through all phases more than once."""
    return (*SETTINGS, "--data", data, *EPOCHS)


def environment():
    """This process's own, without settings; one thread, so that sums are added up in one order."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("CHIPDEPLOY_")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def command():
    """Run the installed command in a process of its own."""

    def call(*arguments, cwd, before="", extra=None):
        line = [str(COMMAND), *map(str, arguments)]
        if before:
            line = [sys.executable, "-c", f"import os, sys\n{before}\nos.execv(sys.argv[1], sys.argv[1:])", *line]
        done = subprocess.run(line, cwd=cwd, env=environment() | (extra or {}), capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def start():
    """Start the installed command and hand back its process."""
    running = []

    def begin(*arguments, cwd):
        process = subprocess.Popen(
            [str(COMMAND), *map(str, arguments)],
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def call():
    """Run the command line inside this process."""

    def run(*arguments, cwd="."):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run([str(argument) for argument in arguments])
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CHIPDEPLOY_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def job(tmp_path_factory, command, call, settings):
    """The main job in a folder of its own, without naming the run: the outcome of every command, by its name."""
    cwd = tmp_path_factory.mktemp("job")
    outcomes = {"prune": command("prune", *settings, cwd=cwd)}
    outcomes["report first"] = call("report", cwd=cwd)
    outcomes["export"] = call("export", cwd=cwd)
    outcomes["bench"] = call("bench", "--seconds", "0.2", "--batch", "1,4", cwd=cwd)
    outcomes["report"] = call("report", cwd=cwd)
    return cwd, outcomes


@pytest.fixture(scope="session")
def finished(job):
    """The folder of the finished run; read only, by agreement."""
    cwd, _ = job
    return cwd / "runs" / (cwd / "runs" / "latest-prune").read_text().strip()


@pytest.fixture
def copy(finished, tmp_path):
    """A run of one's own: pruned, exported, benchmarked, reported."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
