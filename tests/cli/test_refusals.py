"""What the command line refuses: one line, the right exit code, and nothing left behind."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

MODELS = '''
"""Models that something is wrong with."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes, end=lambda x: x):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, classes)
        self.end = end

    def forward(self, x):
        return self.end(self.head(torch.relu(self.body(x)).mean((2, 3))))


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def good(num_classes):
    return Net(num_classes)


def untraceable(num_classes):
    return Branching(num_classes)


def untranslatable(num_classes):
    return Net(num_classes, lambda x: x + torch.special.bessel_j0(x.detach().float()))


def two_faced(num_classes):
    return Net(num_classes, lambda x: 2 * x if torch.compiler.is_exporting() else x)


def random(num_classes):
    return Net(num_classes, lambda x: x + torch.rand_like(x))


def shrinking(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(64), nn.Flatten(), nn.Linear(8, num_classes))


class Aided(Net):
    def forward(self, x):
        x = super().forward(x)
        return (x, x) if self.training else x


def aided(num_classes):
    return Aided(num_classes)


def failing(num_classes):
    def end(x):
        if torch.is_grad_enabled():
            raise RuntimeError("only in training")
        return x

    return Net(num_classes, end)


def ten(num_classes):
    return Net(10)


def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def talking(num_classes):
    print("hello from the model")
    return Net(num_classes)


def raising():
    raise RuntimeError("first line\\nsecond line")


def number():
    return 3
'''
SHORT = ("--batch", "32", "--align", "1", "--train-epochs", "1", "--soft-epochs", "1", "--finetune-epochs", "0")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nets.py"
    path.write_text(MODELS)
    return path


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.is_file() and path.read_bytes()) for path in folder.rglob("*"))


@pytest.fixture
def refused(tmp_path, call):
    """Call, and check that nothing came of it; returns the error line."""

    def check(code, *arguments):
        (tmp_path / "runs").mkdir(exist_ok=True)
        before = listing(tmp_path)
        outcome = call(*arguments, cwd=tmp_path)
        assert outcome.code == code, outcome
        assert outcome.out == ""
        assert listing(tmp_path) == before
        return outcome.error

    return check


@pytest.mark.parametrize(
    "budget", ["0", "1", "-1", "2", "50", "nan", "inf", "-inf", "abc", "", "0%", "100%", "%", "1e999"]
)
def test_a_share_outside_0_and_1(refused, data, budget):
    assert "--flops is the share that stays" in refused(2, "prune", "--data", data, "--flops", budget)


def test_two_budgets_or_none(refused, data):
    assert "--flops and --params" in refused(2, "prune", "--data", data, "--flops", "0.5", "--params", "0.5")
    assert "no budget" in refused(2, "prune", "--data", data)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--align", ["0", "-1", "x"]),
        ("--batch", ["0", "-3", "1.5", "many"]),
        ("--image-size", ["0", "-1"]),
        ("--train-epochs", ["0"]),
        ("--soft-epochs", ["0"]),
        ("--finetune-epochs", ["-1"]),
        ("--lr", ["0", "-1", "nan", "inf"]),
        ("--seed", ["-1", "2147483648", "0.5"]),
        ("--mean", ["a,b,c", "", "0.5,0.5", "nan,0,0"]),
        ("--std", ["0,1,1", "1,1"]),
        ("--recipe", ["papper"]),
        ("--config", ["nothing.toml", "."]),
    ],
)
def test_options_out_of_range(refused, data, option, values):
    for value in values:
        line = refused(2, "prune", "--data", data, "--flops", "0.5", option, value)
        assert option.strip("-").replace("-", " ") in line.replace("-", " ") or option == "--config"


@pytest.mark.parametrize(
    "arguments",
    [
        ("prnue",),
        ("--json-lines",),
        ("prune", "resnet20", "0.5"),
        ("prune", "--flops"),
        ("prune", "--flop", "0.5"),
        ("export", "some/folder"),
        ("bench", "--seconds", "long"),
    ],
)
def test_words_that_mean_nothing(refused, arguments):
    command = f"chipdeploy {arguments[0]}" if arguments[0] in ("prune", "export", "bench") else "chipdeploy"
    assert f"see '{command} --help'" in refused(2, *arguments)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("resnet21", "did you mean 'resnet"),
        ("", "unknown model"),
        ("torchvision:resnet19", "did you mean"),
        ("timm:", "no model"),
        ("nowhere.py:build", "does not exist"),
        ("nowhere.py", "without a function"),
        ("x" * 300, "unknown model"),
        ("x" * 300 + ".py:build", "File name too long"),
    ],
)
def test_models_that_are_not_there(refused, data, model, word):
    if model.startswith("timm"):
        pytest.importorskip("timm")
    assert word in refused(3, "prune", model, "--data", data, "--flops", "0.5")


@pytest.mark.parametrize(
    ("factory", "word"),
    [
        ("untraceable", "cannot be traced"),
        ("raising", "RuntimeError: first line"),
        ("number", "gave a int"),
        ("missing", "no function 'missing'"),
    ],
)
def test_models_that_cannot_be_used(refused, data, models, factory, word):
    assert word in refused(3, "prune", f"{models}:{factory}", "--data", data, "--flops", "0.5")
    assert word in refused(3, "inspect", f"{models}:{factory}")


def test_what_torch_logs_of_a_failure_is_not_shown(tmp_path, data, models, command):
    outcome = command("prune", f"{models}:shrinking", "--data", data, "--flops", "0.5", cwd=tmp_path)
    assert outcome.code == 3
    assert outcome.err.splitlines() == [outcome.error]
    assert "check the image size" in outcome.error


def test_a_network_that_never_says_the_same_twice(refused, data, models):
    assert "differs" in refused(3, "prune", f"{models}:random", "--data", data, "--flops", "0.5", "--device", "cpu")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"x_train": np.zeros((256, 16, 16, 3), np.float32)}, "must be uint8"),
        ({"x_train": np.zeros((256, 3), np.uint8)}, "must be uint8"),
        ({"x_train": np.zeros((256, 16, 12, 3), np.uint8)}, "12x16"),
        ({"x_test": np.zeros((64, 8, 8, 3), np.uint8)}, "store them alike"),
        ({"y_train": np.arange(256) % 3 - 1}, "must lie in"),
        ({"y_test": np.full(64, 3)}, "must lie in"),
        ({"y_train": np.zeros(256, np.float32)}, "whole numbers"),
        ({"y_train": np.zeros(256, np.int64)}, "at least 2 classes"),
        ({"y_train": np.zeros(255, np.int64)}, "255 labels"),
        ({"x_train": np.zeros((1, 16, 16, 3), np.uint8), "y_train": np.zeros(1, np.int64)}, "at least 2"),
        ({"x_train": np.zeros((0, 16, 16, 3), np.uint8), "y_train": np.zeros(0, np.int64)}, "must be uint8"),
    ],
)
def test_data_that_cannot_be_used(refused, make_data, tmp_path, changed, word):
    path = make_data(tmp_path / "bad.npz", **changed)
    assert word in refused(3, "prune", "--data", f"npz:{path}", "--flops", "0.5")


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("fashion-mnits", "did you mean 'fashion-mnist'"),
        ("npz:", "lacks its path"),
        ("npz:nowhere.npz", "does not exist"),
        ("npz:runs", "does not exist"),
        ("folder:runs", "has no train/"),
        ("cifar10", "--data-root"),
        ("small.npz", "unknown data"),
        ("npz:" + "x" * 300, "File name too long"),
    ],
)
def test_data_that_are_not_there(refused, spec, word):
    assert word in refused(3, "train", "--data", spec)


def test_a_budget_below_the_smallest_network(refused, data):
    line = ("prune", "resnet20", "--data", data, "--device", "cpu", "--flops")
    assert "smallest connected network" in refused(5, *line, "0.0001")
    # Free widths could meet it, a least width cannot: that is known before anything is trained.
    assert "smallest connected network" in refused(5, *line, "0.005", "--min-width", "16")


@pytest.mark.parametrize("device", ["cuda:63", "meta", "toaster", ""])
def test_devices_that_are_not_here(refused, data, device):
    assert "no device" in refused(4, "prune", "--data", data, "--flops", "0.5", "--device", device)


def test_more_memory_than_there_is(refused, copy):
    assert "out of memory" in refused(4, "inspect", "--image-size", "10000000")
    assert "from 1 to 65536" in refused(2, "bench", "--run", copy, "--batch", "1000000000000")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_weights_that_cannot_be_used(refused, tmp_path, data, finished):
    line = ("prune", "resnet20", "--data", data, "--flops", "0.5", "--device", "cpu", "--weights")
    whole = (finished / "dense.safetensors").read_bytes()
    short, bomb, other = tmp_path / "short.safetensors", tmp_path / "bomb.pth", tmp_path / "other.pth"
    short.write_bytes(whole[: len(whole) // 2])
    bomb.write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "exploded")}))
    torch.save({"weight": torch.zeros(3)}, other)
    assert "damaged" in refused(3, *line, short)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "damaged or holds more than tensors" in refused(3, *line, bomb)
    assert not (tmp_path / "exploded").exists()
    assert "of another model" in refused(3, *line, other)
    assert "of another model" in refused(3, *line, finished / "pruned.safetensors")
    assert "does not exist" in refused(3, *line, tmp_path / "none.safetensors")
    assert "does not exist" in refused(3, *line, tmp_path)


def test_places_that_cannot_be_written(refused, tmp_path, data):
    line = ("prune", "resnet20", "--data", data, "--flops", "0.5", "--device", "cpu")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    assert "cannot write" in refused(3, *line, "--runs", tmp_path / "file" / "runs")
    assert "cannot write" in refused(3, *line, "--run", "/proc/chipdeploy/run")
    assert "no chipdeploy run" in refused(3, *line, "--run", tmp_path / "other")
    assert "no chipdeploy run" in refused(3, *line, "--run", tmp_path / "file")
    assert "File name too long" in refused(3, *line, "--run", "x" * 300)


@pytest.mark.parametrize("step", ["export", "bench", "report"])
def test_folders_that_are_no_finished_run(refused, tmp_path, copy, step):
    assert "no finished run in runs/" in refused(3, step)
    assert "no run directory" in refused(3, step, "--run", tmp_path)
    assert "no run directory" in refused(3, step, "--run", "/dev/null")
    manifest = json.loads((copy / "manifest.json").read_text())
    for damaged in ("", "[]", json.dumps(manifest | {"schema": 99}), "\x00\xff"):
        (copy / "manifest.json").write_text(damaged)
        line = refused(3, step, "--run", copy)
        assert "manifest.json" in line or "schema 99" in line
    del manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "has no finished" in refused(3, step, "--run", copy)


@pytest.mark.parametrize("name", ["pruned.safetensors", "dense.safetensors", "plan.json", "data.json", "config.json"])
def test_edited_files_are_not_exported(refused, copy, name):
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    for path in copy.glob("*.onnx"):
        path.unlink()
    (copy / "export.json").unlink()
    assert f"{name} was changed" in refused(3, "export", "--run", copy)


def test_edited_onnx_files_are_not_timed(refused, copy):
    with (copy / "pruned.onnx").open("ab") as file:
        file.write(b"\0")
    assert "pruned.onnx was edited since export" in refused(3, "bench", "--run", copy)
    (copy / "pruned.onnx").unlink()
    assert "cannot read pruned.onnx" in refused(3, "bench", "--run", copy)
    (copy / "export.json").unlink()
    assert "chipdeploy export --run" in refused(3, "bench", "--run", copy)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch", "0"),
        ("--batch", "1,,2"),
        ("--batch", ""),
        ("--batch", "1;2"),
        ("--threads", "0"),
        ("--seconds", "0"),
        ("--seconds", "-1"),
        ("--seconds", "nan"),
        ("--seconds", "inf"),
    ],
)
def test_benches_that_make_no_sense(refused, copy, arguments):
    refused(2, "bench", "--run", copy, *arguments)


def test_a_damaged_bench_is_not_reported(refused, copy):
    for damaged in ("{", "{}", "3", "[3]", '[{"schema": 1}]'):
        (copy / "bench.json").write_text(damaged)
        refused(3, "report", "--run", copy)
    (copy / "bench.json").unlink()
    (copy / "metrics.jsonl").write_text("{\n")
    assert "metrics.jsonl is damaged" in refused(3, "report", "--run", copy)


def test_an_export_for_one_image_at_a_time(copy, call):
    outcome = call("export", "--run", copy, "--max-batch", "1")
    assert outcome.code == 2 and "max_batch" in outcome.error


@pytest.mark.parametrize(("factory", "code", "word"), [("untranslatable", 3, "ONNX"), ("two_faced", 5, "differs")])
def test_networks_that_cannot_be_exported_leave_no_file(tmp_path, data, models, call, factory, code, word):
    line = ("prune", f"{models}:{factory}", "--data", data, "--flops", "0.5", *SHORT, "--device", "cpu")
    assert call(*line, "--run", "run", cwd=tmp_path).code == 0
    outcome = call("export", "--run", "run", cwd=tmp_path)
    assert outcome.code == code
    assert word in outcome.error
    assert not [path.name for path in (tmp_path / "run").iterdir() if "onnx" in path.name or "export" in path.name]
    assert "chipdeploy export" in call("bench", "--run", "run", cwd=tmp_path).error


@pytest.mark.parametrize("command", [("train",), ("prune", "--flops", "0.5")])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("aided", "in train mode the model returns a tuple"),
        ("ten", "returns [2, 10] for 2 images of 3 classes"),
        ("lazy", "lazy layers"),
        ("shrinking", "images [3, 16, 16]"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_at_once(tmp_path, data, models, call, command, factory, words):
    outcome = call(*command, f"{models}:{factory}", "--data", data, *SHORT[:2], "--device", "cpu", cwd=tmp_path)
    assert outcome.code == 3
    assert words in outcome.error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_a_model_prints_is_not_on_stdout(models, call):
    outcome = call("inspect", f"{models}:talking", "--json")
    assert outcome.json["model"].endswith(":talking")
    assert "hello from the model" in outcome.err


def test_flags_that_change_nothing_are_named(tmp_path, data, call, finished):
    weights = finished / "dense.safetensors"
    idle = ("--on", "trt-fp16", "--minutes", "9", "--bench-batch", "4", "--train-epochs", "7")
    line = ("prune", "resnet20", "--data", data, "--flops", "0.0001", *SHORT, "--weights", weights, *idle)
    notes = call(*line, cwd=tmp_path).err.splitlines()
    assert "note: there is no latency goal, so nothing comes of --minutes" in notes
    assert "note: there is no latency goal and no --max-size-mb, so nothing comes of --on, --bench-batch" in notes
    assert "note: the weights are given, so nothing comes of --train-epochs" in notes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", '{"schema": 1}', "it has no command; make the run again"),
        ("result.json", "{}", "result.json was changed after it was written"),
        ("metrics.jsonl", "3\n", "a line of it holds no JSON object"),
    ],
)
def test_damaged_facts_of_a_run_are_named(copy, call, settings, name, content, words):
    (copy / name).write_text(content)
    command = ("report", "--run", copy) if name == "metrics.jsonl" else ("prune", *settings, "--run", copy)
    outcome = call(*command)
    assert outcome.code == 3
    assert words in outcome.error


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_damaged_facts_of_a_dense_network_can_be_deleted(tmp_path, data, models, call, content):
    line = ("train", f"{models}:good", "--data", data, *SHORT[:2], "--train-epochs", "1", "--device", "cpu")
    assert call(*line, cwd=tmp_path).code == 0
    (facts,) = (tmp_path / "runs" / "dense").glob("*.json")
    whole = facts.read_bytes()
    facts.write_text(content)
    outcome = call(*line, cwd=tmp_path)
    assert outcome.code == 3
    assert "delete it, and the dense network is trained again" in outcome.error
    facts.unlink()
    assert call(*line, cwd=tmp_path).code == 0
    assert facts.read_bytes() == whole


def test_a_diverged_training_says_so(tmp_path, data, models, call):
    line = ("train", f"{models}:good", "--data", data, *SHORT[:2], "--lr", "1e30", "--device", "cpu")
    outcome = call(*line, cwd=tmp_path)
    assert outcome.code == 5
    assert "--lr" in outcome.error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def test_a_disk_that_fills_up_leaves_no_half_file_and_can_be_resumed(tmp_path, data, command, call, finished):
    """No file may grow beyond a limit: the small files of a run can be written, the weights cannot."""
    weights = finished / "dense.safetensors"
    line = ("prune", "resnet20", "--data", data, "--flops", "0.5", *SHORT, "--device", "cpu", "--run", "mine")
    outcome = command(*line, cwd=tmp_path, before=FULL.format(100_000))
    assert outcome.code == 3
    assert "cannot write" in outcome.error
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "manifest.json", "lock"}
    with_weights = (*line[:-1], "given", "--weights", weights)
    outcome = command(*with_weights, cwd=tmp_path, before=FULL.format(100_000))
    assert outcome.code == 3
    assert "cannot write" in outcome.error
    left = {path.name for path in (tmp_path / "given").iterdir()}
    assert left == {"config.json", "manifest.json", "lock", "metrics.jsonl"}
    assert call(*with_weights, cwd=tmp_path).code == 0
    assert (tmp_path / "given" / "pruned.safetensors").is_file()


def test_an_export_onto_a_full_disk_leaves_no_file(copy, tmp_path, command):
    for name in ("dense.onnx", "pruned.onnx", "export.json"):
        (copy / name).unlink()
    before = sorted(path.name for path in copy.iterdir())
    outcome = command("export", "--run", copy, cwd=tmp_path, before=FULL.format(100_000))
    assert outcome.code == 3
    assert "dense.onnx" in outcome.error
    assert sorted(path.name for path in copy.iterdir()) == before


def test_a_missing_latest_run_is_named(tmp_path, call, finished):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "latest-prune").write_text("gone\n")
    outcome = call("report", cwd=tmp_path)
    assert outcome.code == 3 and "gone is no run directory" in outcome.error
    shutil.copytree(finished, runs / "gone")
    assert call("report", cwd=tmp_path).code == 0


def test_data_of_two_images_can_be_pruned_with_or_say_why_not(tmp_path, make_data, models, call):
    path = make_data(tmp_path / "two.npz", train=2, test=2)
    line = ("prune", f"{models}:good", "--data", f"npz:{path}", "--flops", "0.5", *SHORT, "--device", "cpu")
    assert call(*line, cwd=tmp_path).code == 0
