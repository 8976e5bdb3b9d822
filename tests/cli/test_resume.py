"""A run is a function of its settings: the same bytes for one seed, interrupted or not."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from chipdeploy import checkpoint
from chipdeploy.errors import RunError
from chipdeploy.run import Run

ARTIFACTS = ("plan.json", "pruned.safetensors", "dense.safetensors", "result.json", "metrics.jsonl")


def artifacts(folder):
    return {name: (folder / name).read_bytes() for name in ARTIFACTS}


def rows(path):
    """The epochs that a checkpoint holds; none where there is no checkpoint yet."""
    with contextlib.suppress(RunError, FileNotFoundError):
        return [f"{row['phase']} {row['epoch']}" for row in checkpoint.load(path)[1]["rows"]]
    return []


def wait_for(process, pattern, folder, row):
    """Wait until the process has saved the epoch `row` in a file like `pattern`."""
    while process.poll() is None:
        if any(row in rows(path) for path in folder.glob(pattern)):
            return
        time.sleep(0.005)
    raise AssertionError(f"{row} was not seen: {process.stderr.read()}")


def own_folder(tmp_path, job, *, dense):
    """A working folder, with the dense network of the finished run where it need not be trained again."""
    cwd, _ = job
    if dense:
        shutil.copytree(cwd / "runs" / "dense", tmp_path / "runs" / "dense")
    return tmp_path


def test_one_seed_gives_the_same_bytes(tmp_path, command, settings, finished):
    assert command("prune", *settings, "--run", "again", cwd=tmp_path).code == 0
    assert artifacts(tmp_path / "again") == artifacts(finished)


def test_another_seed_gives_another_network(tmp_path, call, settings, finished):
    assert call("prune", *settings, "--seed", "1", "--run", "other", cwd=tmp_path).code == 0
    other, one = artifacts(tmp_path / "other"), artifacts(finished)
    assert other["dense.safetensors"] != one["dense.safetensors"]
    assert other["plan.json"] != one["plan.json"]
    assert other["pruned.safetensors"] != one["pruned.safetensors"]


@pytest.mark.parametrize(
    ("pattern", "row", "how", "code"),
    [
        ("runs/dense/[!.]*.partial", "dense 1", signal.SIGINT, 130),
        ("mine/checkpoint.safetensors", "soft 1", signal.SIGTERM, 143),
        ("mine/checkpoint.safetensors", "finetune 1", signal.SIGKILL, -9),
    ],
)
def test_an_interrupted_run_ends_as_if_nothing_had_been(
    tmp_path, job, finished, command, call, start, settings, pattern, row, how, code
):
    phase, number = row.split()
    cwd = own_folder(tmp_path, job, dense=phase != "dense")
    line = ("prune", *settings, "--run", "mine")
    process = start(*line, cwd=cwd)
    wait_for(process, pattern, cwd, row)
    process.send_signal(signal.SIGSTOP)
    # While it lives, nobody else may write into its folder.
    refused = call(*line, cwd=cwd)
    assert (refused.code, f"in use by process {process.pid};" in refused.error) == (3, True)
    unfinished = call("export", "--run", "mine", cwd=cwd)
    assert unfinished.code == 3 and "in use by process" in unfinished.error
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert process.returncode == code
    assert out == ""
    if how != signal.SIGKILL:
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and last.count("--run") == 1
    assert not (cwd / "mine" / "pruned.safetensors").exists()
    assert not (cwd / "runs" / "latest-prune").exists()
    assert call("export", "--run", "mine", cwd=cwd).code == 3
    resumed = command(*line, cwd=cwd)
    assert resumed.code == 0, resumed.err
    assert f"{phase} epoch {number}" not in resumed.err
    assert f"{phase} epoch {int(number) + 1}" in resumed.err
    assert artifacts(cwd / "mine") == artifacts(finished)
    if how != signal.SIGKILL:
        assert not list(cwd.rglob(".tmp-*"))
    assert not list(cwd.rglob("*.partial"))
    assert not (cwd / "mine" / "checkpoint.safetensors").exists()


@pytest.fixture
def unfinished(tmp_path, settings, copy):
    """A run that has only begun, by hand: the same folder without what the end of a run writes."""
    for path in copy.iterdir():
        if path.name not in ("config.json", "manifest.json"):
            path.unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return copy


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("--seed", "1"), "seed"),
        (("--batch", "16"), "batch"),
        (("--soft-epochs", "5"), "soft_epochs"),
        (("--align", "8"), "align"),
        (("--recipe", "paper"), "recipe"),
        (("--image-size", "8"), "image_size"),
    ],
)
def test_changed_settings_are_refused_by_their_key(tmp_path, call, settings, unfinished, changed, key):
    before = sorted(path.name for path in unfinished.iterdir())
    outcome = call("prune", *settings, *changed, "--run", unfinished, cwd=tmp_path)
    assert outcome.code == 3
    assert f"was started with {key}=" in outcome.error
    assert "keep at most" not in outcome.err  # before the network is traced and cut on trial
    assert sorted(path.name for path in unfinished.iterdir()) == before


def test_another_budget_is_refused(tmp_path, call, data, settings, unfinished):
    line = [{"--flops": "--params"}.get(argument, argument) for argument in settings]
    assert "kind='flops', now 'params'" in call("prune", *line, "--run", unfinished, cwd=tmp_path).error
    line[line.index("0.5")] = "0.4"
    line[line.index("--params")] = "--flops"
    assert "keep=0.5, now 0.4" in call("prune", *line, "--run", unfinished, cwd=tmp_path).error


def test_a_damaged_checkpoint_is_named(tmp_path, job, call, settings, unfinished):
    cwd = own_folder(tmp_path, job, dense=True)
    (unfinished / "checkpoint.safetensors").write_bytes(b"nothing")
    outcome = call("prune", *settings, "--run", unfinished, cwd=cwd)
    assert outcome.code == 3
    assert "checkpoint.safetensors is damaged" in outcome.error and "delete it" in outcome.error


def test_a_lock_that_names_a_living_stranger_is_taken_over(copy, call):
    # After a restart, in a container above all, the number of the dead process belongs to somebody else.
    (copy / "lock").write_text(f"{os.getppid()}\n")
    assert call("bench", "--run", copy, "--seconds", "0.1", "--batch", "1").code in (0, 6)


def test_a_run_in_use_is_refused_by_every_command_that_writes(copy, call):
    with Run.open(Path(copy)).locked():
        for line in (("export",), ("bench", "--seconds", "0.1")):
            outcome = call(*line, "--run", copy)
            assert outcome.code == 3
            assert f"in use by process {os.getpid()};" in outcome.error
