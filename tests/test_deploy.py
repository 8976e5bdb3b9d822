"""From a finished run to checked ONNX files, times and a report; nothing unchecked is left lying about."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from chipdeploy.config import PruneConfig
from chipdeploy.deploy import bench_run, export_run, report_run
from chipdeploy.errors import ExportError, RunError, UsageError, VerificationError
from chipdeploy.latency.measure import Comparison, headline
from chipdeploy.pipeline import check_budget, load, prepare, prune, train_dense
from chipdeploy.run import Run
from chipdeploy.training.loop import Silent

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes, end):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, classes)
        self.end = end

    def forward(self, x):
        return self.end(self.head(self.body(x).mean((2, 3))))


def plain(num_classes):
    return Net(num_classes, lambda x: x)


def untranslatable(num_classes):
    return Net(num_classes, lambda x: x + torch.special.bessel_j0(x.detach().float()))


def two_faced(num_classes):
    return Net(num_classes, lambda x: 2 * x if torch.compiler.is_exporting() else x)
"""


def write_data(path, classes=3):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 16)):
        labels = np.arange(count) % classes
        pixels = generator.integers(0, 60, (count, 8, 8, 3))
        pixels[np.arange(count), :, :, labels % 3] += 120
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    np.savez(path, **arrays)


def make_run(folder, factory):
    """A finished run of the network that `factory` builds."""
    (folder / "net.py").write_text(NET)
    write_data(folder / "data.npz")
    short = {"batch": 32, "train_epochs": 1, "soft_epochs": 1, "finetune_epochs": 1, "align": 1, "device": "cpu"}
    names = {"model": f"{folder / 'net.py'}:{factory}", "data": f"npz:{folder / 'data.npz'}"}
    config = PruneConfig(**names, **short, keep=0.4)
    job = prepare(config)
    check_budget(config, job)
    run = Run.create(folder / "runs", "prune", config.model_dump(), path=folder / factory)
    prune(config, job, run, train_dense(job, folder / "dense", Silent()), Silent())
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("deploy"), "plain")
    return run, export_run(run, max_batch=16)


@pytest.fixture
def copy(exported, tmp_path):
    run, _ = exported
    return Run(Path(shutil.copytree(run.path, tmp_path / "copy")))


@pytest.mark.parametrize("name", ["dense", "pruned"])
@pytest.mark.parametrize("batch", [1, 16])
def test_an_exported_file_computes_what_the_loaded_network_does(exported, name, batch):
    run, facts = exported
    images = np.random.default_rng(batch).standard_normal((batch, 3, 8, 8), dtype=np.float32)
    session = onnxruntime.InferenceSession(run.file(f"{name}.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        expected = load(run.path, dense=name == "dense")(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert facts[name]["bytes"] == run.file(f"{name}.onnx").stat().st_size
    assert facts[name] == run.read("export.json")[name]


def test_a_file_says_what_it_is_and_how_its_images_are_made(exported):
    run, _ = exported
    data = run.read("data.json")
    for name in ("dense", "pruned"):
        model = onnx.load(run.file(f"{name}.onnx"))
        said = {entry.key.removeprefix("chipdeploy."): entry.value for entry in model.metadata_props}
        assert (said["network"], said["model"]) == (name, "net.py:plain")
        assert said["classes"].split("\n") == data["classes"] == ["0", "1", "2"]
        assert [float(value) for value in said["mean"].split(",")] == pytest.approx(data["mean"])
        assert [float(value) for value in said["std"].split(",")] == pytest.approx(data["std"])
        assert said["plan_sha256"] == (run.read("result.json")["plan_digest"] if name == "pruned" else "")


def test_an_export_can_be_repeated(copy, exported):
    assert export_run(copy, max_batch=16) == exported[1]


@pytest.mark.parametrize(("factory", "error"), [("untranslatable", ExportError), ("two_faced", VerificationError)])
def test_a_failed_export_leaves_what_was_there(tmp_path, factory, error):
    run = make_run(tmp_path, factory)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(error) as caught:
        export_run(run)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_options_out_of_range_change_nothing(copy):
    before = {path.name: path.read_bytes() for path in copy.path.iterdir()}
    with pytest.raises(UsageError, match="max_batch"):
        export_run(copy, max_batch=1)
    for wrong in ({"threads": 0}, {"seconds": 0.0}, {"batches": [0]}):
        with pytest.raises(UsageError):
            bench_run(copy, **wrong)
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before


def test_other_data_are_not_exported_with(tmp_path):
    run = make_run(tmp_path, "plain")
    write_data(tmp_path / "data.npz", classes=2)
    with pytest.raises(RunError, match=r"the data of .* changed"):
        export_run(run)
    assert not run.file("dense.onnx").exists()


@pytest.mark.parametrize("name", ["pruned.safetensors", "dense.safetensors", "plan.json", "data.json", "config.json"])
def test_changed_files_are_not_exported(copy, name):
    with copy.file(name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match=f"{name} was changed"):
        export_run(copy)


def test_the_bench_keeps_every_time_and_both_batches(copy):
    seen = []
    results = bench_run(copy, batches=(1, 3), seconds=0.05, on_block=lambda done, all_: seen.append((done, all_)))
    assert results == copy.read("bench.json")
    assert [item["batch"] for item in results] == [1, 3]
    for item in results:
        measured = Comparison.from_dict(item)
        assert len(measured.dense_s) == len(measured.pruned_s) == len(measured.control_s) >= 30
        assert min(min(block) for block in measured.pruned_s) > 0
        assert item["environment"]["engine"]["threads"] == 1
    assert seen[0][0] == 1 and seen[-1][0] == seen[-1][1]


def test_only_the_files_that_were_exported_are_timed(copy):
    with copy.file("dense.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ExportError, match=r"dense\.onnx was edited"):
        bench_run(copy)
    copy.file("dense.onnx").unlink()
    with pytest.raises(ExportError, match=r"dense\.onnx"):
        bench_run(copy)
    edited = copy.read("export.json")
    edited["dense"]["sha256"] = edited["pruned"]["sha256"]
    copy.write("export.json", edited)
    with pytest.raises(RunError, match=r"export\.json was changed"):
        bench_run(copy)
    copy.file("export.json").unlink()
    with pytest.raises(RunError, match="chipdeploy export"):
        bench_run(copy)


def test_the_report_says_what_there_is(copy):
    page = report_run(copy)
    assert page.read_text().splitlines()[0] == "not benchmarked yet: run chipdeploy bench"
    (measured,) = bench_run(copy, batches=(2,), seconds=0.05)
    assert report_run(copy).read_text().splitlines()[0] == headline(Comparison.from_dict(measured))
    assert copy.file("channels.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("damaged", ["{", "{}", "[3]", "7", '[{"schema": 1}]', '[{"schema": 99}]'])
def test_damaged_times_are_not_reported(copy, damaged):
    copy.file("bench.json").write_text(damaged)
    with pytest.raises(RunError):
        report_run(copy)
    assert not copy.file("report.md").exists()


def test_changed_results_are_not_reported(copy):
    result = copy.read("result.json")
    result["accuracy"]["pruned"] = 1.0
    copy.file("result.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=r"result\.json was changed"):
        report_run(copy)
