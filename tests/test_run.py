"""The run directory: whole files or none, one writer, no change unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chipdeploy.errors import RunError
from chipdeploy.files import atomic, digest
from chipdeploy.run import Run, read_json, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "runs", "prune", {"seed": 0, "mean": (0.5, 0.5), "lr": None})


def test_a_new_run_has_its_settings_and_is_not_finished(run):
    assert run.path.parent.name == "runs" and "-prune-" in run.path.name
    assert run.config == {"seed": 0, "mean": [0.5, 0.5], "lr": None}
    assert not run.finished
    assert names(run.path) == ["config.json", "manifest.json"]


def test_the_latest_run_is_the_one_that_finished_last(tmp_path):
    root = tmp_path / "runs"
    with pytest.raises(RunError, match="no finished run"):
        Run.latest(root)
    first = Run.create(root, "prune", {})
    second = Run.create(root, "prune", {})
    with pytest.raises(RunError, match="no finished run"):
        Run.latest(root)
    second.finish("prune")
    first.finish("prune")
    assert first.finished
    assert Run.latest(root).path == first.path
    with pytest.raises(RunError, match="chipdeploy train"):
        Run.latest(root, command="train")


def test_a_run_whose_pointer_could_not_be_written_is_not_finished(run):
    """The same command goes on with it, and writes the pointer."""
    blocker = run.root / "latest-prune"
    blocker.mkdir()
    with pytest.raises(RunError, match="latest-prune"):
        run.finish("prune")
    assert not run.finished
    blocker.rmdir()
    run.finish("prune")
    assert run.finished and Run.latest(run.root).path == run.path


def test_a_run_that_lies_elsewhere_can_be_the_latest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.create(Path("runs"), "prune", {}, path=Path("elsewhere/mine"))
    run.finish("prune")
    assert names(tmp_path / "elsewhere") == ["mine"]
    assert Run.latest(Path("runs")).path.samefile("elsewhere/mine")
    Run.create(Path("runs"), "prune", {}, path=Path("runs/mine")).finish("prune")
    assert Run.latest(Path("runs")).path == Path("runs/mine")


def test_where_no_pointer_can_be_written_no_run_is_begun(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/runs: File exists"):
        Run.create(tmp_path / "runs", "prune", {}, path=tmp_path / "mine")
    assert names(tmp_path) == ["runs"]
    (tmp_path / "runs").unlink()
    run = Run.create(tmp_path / "runs", "prune", {}, path=tmp_path / "mine")
    assert names(tmp_path) == ["mine", "runs"] and names(tmp_path / "runs") == []
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/runs"):
        Run.create(tmp_path / "runs", "prune", {}, path=run.path)


def test_a_finished_run_needs_no_pointer(tmp_path):
    run = Run.create(tmp_path / "runs", "prune", {}, path=tmp_path / "mine")
    run.finish("prune")
    assert Run.create(Path("/proc/runs"), "prune", {}, path=run.path).finished


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"gone\n", b"\0"])
def test_a_damaged_pointer_is_one_error(tmp_path, content):
    (tmp_path / "latest-prune").write_bytes(content)
    with pytest.raises(RunError, match=r"latest-prune cannot be read|is no run directory") as caught:
        Run.latest(tmp_path)
    assert "\n" not in str(caught.value)


def test_runs_can_be_moved_together(tmp_path):
    run = Run.create(tmp_path / "runs", "prune", {})
    run.finish("prune")
    (tmp_path / "runs").rename(tmp_path / "archive")
    assert Run.latest(tmp_path / "archive").path == tmp_path / "archive" / run.path.name


def test_a_run_is_taken_up_again_with_its_own_settings(run, tmp_path):
    before = run.path.joinpath("manifest.json").read_bytes()
    again = Run.create(tmp_path, "prune", {"seed": 0, "mean": (0.5, 0.5), "lr": None}, path=run.path)
    assert again.path == run.path
    assert run.path.joinpath("manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"seed": 1, "mean": (0.5, 0.5), "lr": None}, "seed=0, now 1"),
        ({"seed": 0, "mean": (0.5, 0.6), "lr": None}, "mean="),
        ({"seed": 0, "mean": (0.5, 0.5), "lr": 0.1}, "lr=None, now 0.1"),
        ({"seed": 0, "mean": (0.5, 0.5), "lr": None, "new": 1}, "new=None, now 1"),
        ({"mean": (0.5, 0.5), "lr": None}, "seed=0, now None"),
    ],
)
def test_changed_settings_are_refused(run, tmp_path, config, word):
    with pytest.raises(RunError, match=word):
        Run.create(tmp_path, "prune", config, path=run.path)


def test_a_run_of_another_command_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="made by 'prune'"):
        Run.create(tmp_path, "train", run.config, path=run.path)


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(RunError, match="no chipdeploy run"):
            Run.create(tmp_path, "prune", {}, path=path)
    assert names(tmp_path / "mine") == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path, "prune", {}, path=tmp_path / "empty").config == {}


def test_a_run_that_cannot_be_begun_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError):
        Run.create(tmp_path / "runs", "prune", {"seed": object()})
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        Run.create(tmp_path / "file", "prune", {})


def test_artifacts_that_were_sealed_cannot_change_unseen(run):
    run.write("plan.json", {"a": 1})
    with pytest.raises(RunError, match="no finished plan"):
        run.check("plan.json")
    run.seal(["plan.json"])
    assert run.check("plan.json") == run.file("plan.json")
    write_text(run.file("plan.json"), run.file("plan.json").read_text().replace("1", "2"))
    with pytest.raises(RunError, match="was changed"):
        run.check("plan.json")
    run.file("plan.json").unlink()
    with pytest.raises(RunError, match="no finished plan"):
        run.check("plan.json")


def test_a_second_seal_keeps_the_first(run):
    run.write("a.json", 1)
    run.seal(["a.json"])
    run.write("b.json", 2)
    run.seal(["b.json"])
    assert run.check("a.json") and run.check("b.json")


def test_metrics_are_replaced_whole(run):
    assert run.metrics() == []
    run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    run.write_metrics([{"epoch": 1}])
    assert run.metrics() == [{"epoch": 1}]
    run.file("metrics.jsonl").write_text('{"epoch": 1}\n{"ep')
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        run.metrics()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"schema": 2}'])
def test_a_damaged_manifest_is_one_error(run, content):
    run.file("manifest.json").write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json|schema 2"):
        _ = run.finished


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_damaged_settings_are_one_error(run, tmp_path, content):
    run.file("config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json"):
        Run.create(tmp_path, "prune", {}, path=run.path)


def test_a_failed_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError, match="half"), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(RunError, match="the disk is full"), atomic(tmp_path / "a"):
        Path("/dev/full").write_text("x")
    assert names(tmp_path) == []


def test_a_missing_file_is_one_error(tmp_path):
    with pytest.raises(RunError, match="did it finish"):
        read_json(tmp_path / "result.json")
    with pytest.raises(RunError, match="no run directory"):
        Run.open(tmp_path)


def test_a_digest_is_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HOLD = """
import sys
from pathlib import Path
from chipdeploy.run import Run
with Run(Path(sys.argv[1])).locked():
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(run):
    """Another process that holds the lock of the run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_one_writer_at_a_time(run, holder):
    with pytest.raises(RunError, match=f"in use by process {holder.pid};"), run.locked():
        pass
    holder.communicate()
    with run.locked():
        pass


def test_the_lock_of_a_killed_process_is_free(run, holder):
    holder.kill()
    holder.wait()
    assert run.file("lock").read_text().strip() == str(holder.pid)
    with run.locked():
        assert run.file("lock").read_text().strip() == str(os.getpid())


CONTENTS = {
    "empty": "",
    "words": "nonsense",
    "init": "1\n",
    "us": f"{os.getpid()}\n",
    "negative": "-1",
    "huge": "9" * 40,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_a_lock_file_says_locks_nobody_out(run, content):
    run.file("lock").write_text(content)
    with run.locked():
        pass


def test_a_lock_is_let_go_after_an_error(run):
    with pytest.raises(RuntimeError), run.locked():
        raise RuntimeError
    with run.locked(), pytest.raises(RunError, match="in use"), Run(run.path).locked():
        pass


def test_a_lock_that_cannot_be_made(run):
    run.file("lock").mkdir()
    with pytest.raises(RunError, match="cannot write"), run.locked():
        pass


def test_json_artifacts_end_in_a_newline_and_can_be_read_elsewhere(run):
    run.write("a.json", {"text": "é", "n": [1, 2.5, None]})
    text = run.file("a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and json.loads(text) == run.read("a.json") == run.read_if("a.json")
    assert run.read_if("b.json") is None


def test_what_a_killed_process_was_writing_is_swept_away(run):
    old, young = run.file(".tmp-0000-pruned.safetensors"), run.file(".tmp-0001-report.md")
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    with run.locked():
        assert not old.exists() and young.exists()
