"""From a finished run to checked ONNX files, times and a report; nothing unchecked is left lying about."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from chipdeploy.cli.export import file_line

from chipdeploy.bench import _same_machine, artifact, bench_run
from chipdeploy.bundling import bundle_run
from chipdeploy.config import PruneConfig
from chipdeploy.dense import train_dense
from chipdeploy.deploy import ExportOptions, Notes, _drawn, export_run, onnx_name
from chipdeploy.engines.build import BuildOptions
from chipdeploy.engines.target import Target
from chipdeploy.engines.trt import EngineManifest
from chipdeploy.errors import (
    DataError,
    ExportError,
    InputError,
    MissingError,
    RunError,
    UsageError,
    VerificationError,
)
from chipdeploy.export.precision import _CONVERTERS, Result
from chipdeploy.export.verify import TOLERANCES
from chipdeploy.files import digest
from chipdeploy.job import prepare
from chipdeploy.latency.measure import Comparison, headline
from chipdeploy.pipeline import check_budget, prune
from chipdeploy.reporting import report_run
from chipdeploy.result import load
from chipdeploy.run import Run
from chipdeploy.training.data import load_data
from chipdeploy.training.loop import Silent
from chipdeploy.training.splits import MemorySplit

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


def write_data(path, classes=3, brighter=0):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 16)):
        labels = np.arange(count) % classes
        pixels = generator.integers(0, 60, (count, 8, 8, 3))
        pixels[np.arange(count), :, :, labels % 3] += 120 + brighter
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
    return run, export_run(run, ExportOptions(max_batch=16))


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
    assert export_run(copy, ExportOptions(max_batch=16)) == exported[1]


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
    with pytest.raises(UsageError, match="max_batch must be at least 2"):
        export_run(copy, ExportOptions(max_batch=1))
    for wrong in ({"threads": 0}, {"seconds": 0.0}, {"batches": [0]}):
        with pytest.raises(UsageError):
            bench_run(copy, **{"batches": (1,)} | wrong)
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before


def test_other_data_are_not_exported_with(tmp_path):
    run = make_run(tmp_path, "plain")
    write_data(tmp_path / "data.npz", classes=2)
    other = f"npz:{tmp_path / 'data.npz'}"
    for options in (ExportOptions(), ExportOptions(data=other)):
        with pytest.raises(RunError, match=r"the data of .* changed since it was made: npz:.*data\.npz has others"):
            export_run(run, options)
    assert not run.file("dense.onnx").exists()
    write_data(tmp_path / "data.npz", brighter=1)
    with pytest.raises(RunError, match=r"the data of .* changed since it was made: npz:.*data\.npz has others"):
        export_run(run)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(DataError, match=r"data\.npz' does not exist.* say so with --data or --data-root"):
        export_run(run)


def test_data_that_lie_elsewhere_now(exported, tmp_path, monkeypatch):
    """The run keeps no place of its data but that of its settings."""
    run = Run(Path(shutil.copytree(exported[0].path, tmp_path / "run")))
    config = run.config | {"data": "npz:gone.npz", "data_root": "roots"}
    run.write("config.json", config)
    run.seal(["config.json"])
    write_data(tmp_path / "here.npz")
    with pytest.raises(DataError, match="does not exist"):
        export_run(run)
    spec = f"npz:{tmp_path / 'here.npz'}"
    roots = []

    def spy(spec, *, root=None, **rest):
        roots.append(root)
        return load_data(spec, root=root, **rest)

    monkeypatch.setattr("chipdeploy.deploy.load_data", spy)
    for given, root in ((None, Path("roots")), (tmp_path / "other", tmp_path / "other")):
        export_run(run, ExportOptions(precisions=("int8",), data=spec, data_root=given, calibration=spec))
        assert roots.pop() == root
    assert run.config == config
    assert all(str(tmp_path) not in path.read_text() for path in run.path.glob("*.json") if path.name != "config.json")


@pytest.mark.parametrize("name", ["pruned.safetensors", "dense.safetensors", "plan.json", "data.json", "config.json"])
def test_changed_files_are_not_exported(copy, name):
    with copy.file(name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match=f"{name} was changed"):
        export_run(copy)


def test_the_bench_keeps_every_time_and_both_batches(copy):
    seen = []
    results = bench_run(copy, batches=(1, 3), seconds=0.05, on_block=lambda *at: seen.append(at))
    assert results == copy.read("bench.json")
    assert [item["batch"] for item in results] == [1, 3]
    for item in results:
        measured = Comparison.from_dict(item)
        assert len(measured.dense_s) == len(measured.pruned_s) == len(measured.control_s) >= 30
        assert min(min(block) for block in measured.pruned_s) > 0
        assert item["environment"]["engine"]["threads"] == 1
    assert seen[0][:2] == ("ort-cpu, batch 1", 1)
    assert seen[-1][0] == "ort-cpu, batch 3"
    assert seen[-1][1] == seen[-1][2]


def test_only_the_files_that_were_exported_are_timed(copy):
    with copy.file("dense.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ExportError, match=r"dense\.onnx was edited"):
        bench_run(copy, batches=(1,))
    copy.file("dense.onnx").unlink()
    with pytest.raises(ExportError, match=r"dense\.onnx"):
        bench_run(copy, batches=(1,))
    edited = copy.read("export.json")
    edited["dense"]["sha256"] = edited["pruned"]["sha256"]
    copy.write("export.json", edited)
    with pytest.raises(RunError, match=r"export\.json was changed"):
        bench_run(copy, batches=(1,))
    copy.file("export.json").unlink()
    with pytest.raises(RunError, match="chipdeploy export"):
        bench_run(copy, batches=(1,))


def test_the_report_says_what_there_is(copy):
    page = report_run(copy)
    assert page.read_text().splitlines()[0] == "not benchmarked yet: run chipdeploy bench"
    (measured,) = bench_run(copy, batches=(2,), seconds=0.05)
    assert report_run(copy).read_text().splitlines()[0] == headline(Comparison.from_dict(measured))
    assert copy.file("channels.svg").read_text().lstrip().startswith("<?xml")


def times(run):
    return [(item["target"], item["batch"]) for item in run.read("bench.json")]


def test_times_add_up_until_their_files_change(copy):
    lost = []
    export_run(copy, ExportOptions(precisions=("int8",)))
    bench_run(copy, targets=["ort-cpu", "ort-cpu-int8"], batches=(1,), seconds=0.05)
    bench_run(copy, targets=["torch-cpu"], batches=(1,), seconds=0.05)
    (again,) = bench_run(copy, targets=["ort-cpu"], batches=(1,), seconds=0.05)
    assert times(copy) == [("ort-cpu-int8", 1), ("torch-cpu", 1), ("ort-cpu", 1)]
    assert copy.read("bench.json")[-1] == again
    before = copy.file("bench.json").read_bytes()
    export_run(copy, ExportOptions(max_batch=32), Notes(lost=lost.append))
    assert copy.file("bench.json").read_bytes() == before
    assert lost == []
    export_run(copy, ExportOptions(precisions=("int8",), keep_worst=1), Notes(lost=lost.append))
    assert times(copy) == [("torch-cpu", 1), ("ort-cpu", 1)]
    assert lost == ["dropping the times of batch 1, ort-cpu-int8: the files are others now"]


def test_times_of_other_threads_stay_beside_each_other(copy):
    bench_run(copy, batches=(1,), seconds=0.05)
    bench_run(copy, batches=(1,), seconds=0.05, threads=2)
    assert [Comparison.from_dict(item).threads for item in copy.read("bench.json")] == [1, 2]
    assert "latency, batch 1, ort-cpu, 2 threads" in report_run(copy).read_text()
    with pytest.raises(UsageError, match="rtx-fp16 runs on a GPU"):
        bench_run(copy, targets=["rtx-fp16"], batches=(1,), threads=2)


@pytest.mark.parametrize("fact", ["cpu", "vectors", "cores"])
def test_times_of_another_cpu_do_not_stay(copy, fact):
    """Processors of one name differ by their vectors."""
    bench_run(copy, batches=(1,), seconds=0.05)
    (item,) = copy.read("bench.json")
    item["environment"][fact] = "another"
    copy.write("bench.json", [item])
    told = []
    bench_run(copy, batches=(2,), seconds=0.05, tell=told.append)
    assert times(copy) == [("ort-cpu", 2)]
    assert told == [f"dropping the times of batch 1, ort-cpu: they are of {item['environment']['machine']}"]


def test_times_of_another_gpu_do_not_stay_beside_those_of_one(copy):
    bench_run(copy, batches=(1,), seconds=0.05)
    (item,) = copy.read("bench.json")
    on_gpu = [item | {"environment": item["environment"] | {"gpu_name": name}} for name in ("one", "one", "other")]
    assert _same_machine(on_gpu[0], on_gpu[1]) and _same_machine(on_gpu[0], item)
    assert not _same_machine(on_gpu[0], on_gpu[2])


def test_times_that_cannot_be_read_take_no_others_with_them(copy):
    bench_run(copy, batches=(1,), seconds=0.05)
    (item,) = copy.read("bench.json")
    copy.write("bench.json", [item | {"schema": 0}, item])
    told = []
    bench_run(copy, batches=(2,), seconds=0.05, tell=told.append)
    assert times(copy) == [("ort-cpu", 1), ("ort-cpu", 2)]
    assert told == ["dropping times that cannot be read: bench.json is damaged, or of another version"]


def test_a_precision_that_nothing_here_runs_is_written_and_said_to_be_untried(copy, monkeypatch):
    """Its converter is an optional package; what stands in for it gives fp32."""
    monkeypatch.setattr("chipdeploy.deploy.check_installed", lambda *_: None)
    monkeypatch.setitem(_CONVERTERS, "bf16", lambda proto, *_: Result(proto, runs_here=False))
    exported = export_run(copy, ExportOptions(precisions=("bf16", "int8")))
    assert exported["precisions"]["bf16"]["verification"] == {}
    assert set(exported["precisions"]["int8"]["verification"]) == {"dense", "pruned"}
    entry = exported["precisions"]["bf16"]["pruned"]
    assert copy.file(entry["file"]).is_file()
    assert file_line(copy.path, entry, None).endswith("not compared with PyTorch")
    assert "| pruned-bf16.onnx |" in (page := report_run(copy).read_text()) and "not compared" in page


def test_a_file_of_the_user_stays(copy):
    mine = ("pruned.simplified.onnx", "dense-old.onnx", "pruned.engine")
    for name in mine:
        copy.file(name).write_bytes(b"mine")
    copy.file("pruned-int8.onnx").write_bytes(b"of an export that no record names")
    export_run(copy)
    assert all(copy.file(name).read_bytes() == b"mine" for name in mine)
    assert not copy.file("pruned-int8.onnx").exists()


def test_images_that_are_sorted_by_class_are_drawn_from_all():
    labels = torch.arange(10).repeat_interleave(600)
    split = MemorySplit(torch.zeros(6000, 4, 4, 3, dtype=torch.uint8), labels, (0.5,) * 3, (0.5,) * 3)
    few = [next(_drawn(split, 64, 64))[1] for _ in range(2)]
    assert set(few[0].tolist()) == set(range(10)) and torch.equal(*few)
    assert sum(len(found) for _, found in _drawn(split, 50, 6000)) == 6000  # all of them, where that is few enough


@pytest.mark.parametrize("damaged", ["{", "{}", "[3]", "7", '[{"schema": 1}]', '[{"schema": 99}]'])
def test_damaged_times_are_not_reported(copy, damaged):
    copy.file("bench.json").write_text(damaged)
    with pytest.raises(RunError):
        report_run(copy)
    assert not copy.file("report.md").exists()
    bench_run(copy, batches=(1,), seconds=0.05)
    assert times(copy) == [("ort-cpu", 1)]


def test_changed_results_are_not_reported(copy):
    result = copy.read("result.json")
    result["accuracy"]["pruned"] = 1.0
    copy.file("result.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=r"result\.json was changed"):
        report_run(copy)


RTX = ExportOptions(
    precisions=("fp32", "fp16", "int8"), runtimes=("rtx",), build=BuildOptions(batches=(1, 2, 4), gpus=("sm86",))
)


@pytest.fixture(scope="module")
def deployed(exported, tmp_path_factory):
    """An export in three precisions with engines, in a copy of the run."""
    run = Run(Path(shutil.copytree(exported[0].path, tmp_path_factory.mktemp("deployed") / "run")))
    told = []
    facts = export_run(run, RTX, Notes(step=told.append))
    return run, facts, told


def test_every_precision_is_written_verified_and_scored(deployed):
    run, facts, told = deployed
    assert list(facts["precisions"]) == ["fp16", "int8"]
    for precision, entry in {"fp32": facts, **facts["precisions"]}.items():
        for name in ("dense", "pruned"):
            assert f"{name} network in {precision}" in told
            path = run.file(entry[name]["file"])
            assert digest(path) == entry[name]["sha256"]
            checked = entry["verification"][name]
            assert checked["max_relative_error"] <= checked["tolerance"] == TOLERANCES[precision]
            assert entry[name]["accuracy"]["images"] == len(prepare(PruneConfig(**run.config)).data.val)
    sizes = [run.file(f).stat().st_size for f in ("pruned.onnx", "pruned-fp16.onnx")]
    assert sizes[1] < sizes[0]
    assert not run.file(".export").exists()


def test_every_engine_has_its_manifest(deployed):
    run, facts, told = deployed
    assert list(facts["engines"]) == ["rtx-fp32", "rtx-fp16", "rtx-int8"]
    for target, entry in facts["engines"].items():
        for name in ("dense", "pruned"):
            assert f"{name} engine for {target}" in told
            manifest = EngineManifest.read(run.file(entry[name]["file"]))
            assert manifest.onnx_sha256 == digest(run.file(onnx_name(name, manifest.precision)))
            assert manifest.gpus == ("sm86",)


def test_every_target_that_was_exported_can_be_timed(deployed):
    run, _, _ = deployed
    targets = ["ort-cpu", "ort-cpu-int8", "torch-cpu"]
    results = bench_run(run, targets=targets, batches=(2,), seconds=0.05)
    assert [item["target"] for item in results] == targets
    assert {Comparison.from_dict(item).where for item in results} == {f"batch 2, {target}" for target in targets}
    page = report_run(run).read_text()
    assert "latency, batch 2, ort-cpu-int8" in page


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ort-cpu-bf16", r"no bf16 network; run 'chipdeploy export --precision bf16"),
        ("trt-fp16", r"no trt-fp16 engine; run 'chipdeploy export --trt --precision fp16"),
    ],
)
def test_a_target_that_was_not_exported_names_the_command(deployed, target, message):
    with pytest.raises(RunError, match=message):
        bench_run(deployed[0], targets=[target], batches=(1,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_is_not_timed_without_a_gpu(deployed):
    before = deployed[0].read_if("bench.json")
    with pytest.raises(MissingError, match="rtx-fp16 runs on an NVIDIA GPU and none is here"):
        bench_run(deployed[0], targets=["ort-cpu", "rtx-fp16"], batches=(1,))
    assert deployed[0].read_if("bench.json") == before


def test_a_batch_that_an_engine_was_not_built_for_is_said_before_anything_runs(deployed):
    with pytest.raises(
        InputError, match=r"dense-rtx-fp16\.engine takes batches of 1 to 4, got 8; build it with another"
    ):
        bench_run(deployed[0], targets=["ort-cpu", "rtx-fp16"], batches=(1, 8))


def test_the_best_precision_is_timed_and_holds_its_accuracy(copy):
    facts = export_run(copy, ExportOptions(best=True, max_drop=100.0))
    best = facts["best"]
    assert facts["asked"] == best["precision"]
    assert [row["precision"] for row in best["table"]] == ["fp32", "fp16", "int8"]
    ratios = {row["precision"]: row["ratio"] for row in best["table"]}
    certain = [row["precision"] for row in best["table"] if row["ratio_interval"][1] < 1 and not row["noise"]]
    assert best["precision"] == min(["fp32", *certain], key=ratios.get)


def test_a_bundle_has_the_precision_that_was_asked_for_last(copy, tmp_path, monkeypatch):
    choice = {"target": "ort-cpu", "precision": "fp32", "max_drop_points": 0.5, "table": []}
    monkeypatch.setattr("chipdeploy.deploy.choose", lambda *_, **__: choice)
    for wanted, precision in (
        (ExportOptions(precisions=("int8", "fp16")), "int8"),
        (ExportOptions(), "int8"),
        (ExportOptions(best=True), "fp32"),
        (ExportOptions(), "fp32"),
        (ExportOptions(precisions=("fp16",)), "fp16"),
    ):
        facts = export_run(copy, wanted)
        assert facts["asked"] == precision
        manifest = bundle_run(copy, tmp_path / "bundle")
        assert manifest["run"]["precision"] == precision
        assert digest(tmp_path / "bundle" / "model.onnx") == digest(copy.file(onnx_name("pruned", precision)))
    assert facts["best"] == choice  # what was measured stays in the report


def test_an_engine_of_fp16_comes_alone(copy):
    build = BuildOptions(batches=(1, 2, 4), gpus=("sm86",))
    facts = export_run(copy, ExportOptions(precisions=("fp16",), runtimes=("rtx",), build=build))
    assert list(facts["engines"]) == ["rtx-fp16"]
    assert [path.name for path in sorted(copy.path.glob("*.engine"))] == [
        "dense-rtx-fp16.engine",
        "pruned-rtx-fp16.engine",
    ]


def test_the_layers_that_int8_hurts_most_stay_in_float(copy):
    facts = export_run(copy, ExportOptions(precisions=("int8",), keep_worst=1))
    for name in ("dense", "pruned"):
        (kept,) = facts["precisions"]["int8"][name]["kept_float"]
        graph = onnx.load(copy.file(f"{name}-int8.onnx")).graph
        (node,) = [node for node in graph.node if node.name == kept]
        makers = {output: other.op_type for other in graph.node for output in other.output}
        assert makers.get(node.input[1]) != "DequantizeLinear"
        assert "DequantizeLinear" in makers.values()
    assert facts["asked"] == "int8"


def test_a_failed_conversion_leaves_the_older_export(copy):
    before = {path.name: path.read_bytes() for path in copy.path.iterdir()}
    with pytest.raises(DataError, match="none"):
        export_run(copy, ExportOptions(precisions=("int8",), calibration="folder:none"))
    with pytest.raises(InputError, match=r"the calibration data fashion-mini do not fit the network: .*one a channel"):
        export_run(copy, ExportOptions(precisions=("int8",), calibration="fashion-mini"))
    with pytest.raises(UsageError, match="does not build for sm90"):
        export_run(copy, ExportOptions(runtimes=("rtx",), build=BuildOptions(batches=(1, 2, 4), gpus=("sm90",))))
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_precision_that_needs_a_package_is_refused_before_any_work(copy, monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    told = []
    with pytest.raises(MissingError, match=f"{precision} needs NVIDIA's Model Optimizer"):
        export_run(copy, ExportOptions(precisions=("fp16", precision)), Notes(step=told.append))
    assert told == []


@pytest.mark.parametrize(
    ("asked", "networks", "engines"),
    [
        ({}, ("fp32",), ("fp32",)),
        ({"precisions": ("fp16",)}, ("fp32", "fp16"), ("fp16",)),
        ({"precisions": ("int8", "fp32", "int8")}, ("fp32", "int8"), ("int8", "fp32")),
        ({"best": True}, ("fp32", "fp16", "int8"), ("fp32", "fp16", "int8")),
    ],
)
def test_engines_are_built_in_the_precisions_that_were_asked_for(asked, networks, engines):
    options = ExportOptions(**asked)
    assert options.all_precisions == networks
    assert options.engine_precisions == engines


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precisions": ("fp64",)}, "unknown precision 'fp64'"),
        ({"runtimes": ("ort",)}, "unknown runtime 'ort'"),
        ({"runtimes": ("rtx",), "max_batch": 16}, "batches up to 32 need networks for as many, got 16"),
        ({"max_drop": -1.0}, "from 0 to 100, got -1"),
        ({"max_batch": 0}, "max_batch must be at least 2 for a free batch size, got 0; e.g. 64"),
    ],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(UsageError, match=message):
        ExportOptions(**wrong)


def files_of_exports(run):
    return sorted(path.name for path in run.path.iterdir() if ".onnx" in path.name or ".engine" in path.name)


def untimed(run, folder):
    """A copy of a run, as it was before any bench."""
    copied = Run(Path(shutil.copytree(run.path, folder / "run")))
    copied.file("bench.json").unlink(missing_ok=True)
    return copied


def test_an_engine_of_an_export_that_did_not_end_is_not_timed(deployed, tmp_path):
    run = untimed(deployed[0], tmp_path)
    exported = run.read("export.json")
    target = Target.parse("rtx-fp16")
    assert artifact(run, exported, target, "pruned") == run.file("pruned-rtx-fp16.engine")
    for end in ("", ".json"):  # whole, but another's
        shutil.copy(run.file(f"dense-rtx-fp16.engine{end}"), run.file(f"pruned-rtx-fp16.engine{end}"))
    with pytest.raises(ExportError, match="is not the engine of the last whole export; export it again"):
        artifact(run, exported, target, "pruned")


def test_exports_add_up(deployed, tmp_path):
    run = untimed(deployed[0], tmp_path)
    run.file("pruned-rtx-fp16.engine.cache").write_bytes(b"kernels")
    run.file("dense-int8.onnx").write_bytes(b"edited")
    before = files_of_exports(run)
    lost = []
    facts = export_run(run, notes=Notes(lost=lost.append))
    # What was edited is forgotten, with its other half; all else stays, kernels of an engine with it.
    assert lost == ["dropping int8: dense-int8.onnx is missing or was edited"]
    assert list(facts["precisions"]) == ["fp16"]
    assert list(facts["engines"]) == ["rtx-fp32", "rtx-fp16", "rtx-int8"]
    assert files_of_exports(run) == [name for name in before if name not in ("dense-int8.onnx", "pruned-int8.onnx")]
    assert export_run(run, ExportOptions(precisions=("int8",)))["precisions"].keys() == {"fp16", "int8"}


def test_what_was_made_stays_for_other_largest_batches(deployed, tmp_path):
    run, first, _ = deployed
    run = untimed(run, tmp_path)
    before, lost = files_of_exports(run), []
    for given, largest in ((2, 2), (None, 2), (128, 128)):
        facts = export_run(run, ExportOptions(max_batch=given), Notes(lost=lost.append))
        assert facts["max_batch"] == largest
        assert (facts["precisions"], facts["engines"]) == (first["precisions"], first["engines"])
        with pytest.raises(InputError, match=f"batches up to {largest}, got 129"):
            bench_run(run, targets=["ort-cpu"], batches=(129,))
        with pytest.raises(InputError, match="takes batches of 1 to 4, got 8"):  # an engine has its own largest batch
            bench_run(run, targets=["rtx-fp16"], batches=(8,))
    assert files_of_exports(run) == before
    assert lost == []


def test_an_export_of_other_networks_begins_anew(deployed, tmp_path):
    run = untimed(deployed[0], tmp_path)
    edited, lost = run.read("export.json"), []
    edited["dense"]["sha256"] = edited["pruned"]["sha256"]
    run.write("export.json", edited)
    run.seal(["export.json"])
    facts = export_run(run, ExportOptions(), Notes(lost=lost.append))
    assert facts["precisions"] == facts["engines"] == {}
    names = ("fp16", "int8", "rtx-fp32", "rtx-fp16", "rtx-int8")
    assert lost == [f"dropping {name}: the fp32 networks are others now" for name in names]
    assert files_of_exports(run) == ["dense.onnx", "pruned.onnx"]
    assert run.file("pruned.safetensors").is_file()


def test_an_edited_record_counts_nothing_and_that_is_said(copy):
    with copy.file("export.json").open("a") as file:
        file.write(" ")
    lost = []
    assert export_run(copy, notes=Notes(lost=lost.append))["max_batch"] == 64
    assert lost == ["dropping what was exported before: export.json was edited, or is of another version"]


def test_engines_go_with_the_network_that_they_were_built_of(deployed, tmp_path):
    run = untimed(deployed[0], tmp_path)
    lost = []
    facts = export_run(run, ExportOptions(precisions=("int8",), keep_worst=1), Notes(lost=lost.append))
    assert list(facts["engines"]) == ["rtx-fp32", "rtx-fp16"]
    assert lost == ["dropping rtx-int8: the int8 networks are others now"]


def test_a_bundle_holds_the_pruned_network(deployed, tmp_path):
    run, facts, _ = deployed
    manifest = bundle_run(run, tmp_path / "bundle")
    assert digest(tmp_path / "bundle" / "model.onnx") == facts["pruned"]["sha256"]
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text()) == manifest
    assert len(list((tmp_path / "bundle" / "engines").glob("*.engine"))) == 3
