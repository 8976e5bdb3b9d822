"""Export with precisions, engines and a bundle, and the bench on many targets, from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import chipdeploy as cd


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory, call):
    """The finished run, exported with everything that a machine without a GPU can make."""
    import shutil

    folder = tmp_path_factory.mktemp("exported")
    run = shutil.copytree(finished, folder / "run")
    options = ("--precision", "fp32,int8", "--rtx", "--gpu", "sm86,sm120", "--batch", "1:2:4")
    outcome = call("export", "--run", run, *options, "--bundle", folder / "bundle", "--with-preprocess", "--top-k", "2")
    assert outcome.code == 0, outcome
    return run, folder / "bundle", outcome


def test_people_see_every_file_and_what_comes_next(exported):
    run, bundle, outcome = exported
    lines = outcome.out.splitlines()
    for name in ("dense.onnx", "pruned.onnx", "dense-int8.onnx", "pruned-int8.onnx"):
        (line,) = [line for line in lines if line.startswith(f"{run / name}: ")]
        assert "validation images right" in line
    for name in ("dense-rtx-int8.engine", "pruned-rtx-fp32.engine"):
        (line,) = [line for line in lines if line.startswith(f"{run / name}: ")]
        assert "batches [1, 2, 4], for sm86, sm120" in line
    assert lines[-2] == f"bundle: {bundle}, in fp32; run it with python {bundle / 'infer.py'} IMAGES.npy"
    assert lines[-1] == f"next: chipdeploy bench --on ort-cpu,ort-cpu-int8 --run {run}"


def test_the_bundle_classifies_without_this_package(exported, finished):
    _, bundle, _ = exported
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.save(bundle.parent / "images.npy", images)
    code = (
        "import sys, numpy, json; from infer import classify; assert 'torch' not in sys.modules\n"
        f"print(json.dumps(classify(numpy.load({str(bundle.parent / 'images.npy')!r})).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=True)
    data = json.loads((finished / "data.json").read_text())
    mean, std = (np.array(data[key], np.float32)[:, None, None] for key in ("mean", "std"))
    pixels = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        expected = cd.load(finished)(torch.from_numpy(pixels)).argmax(1).tolist()
    assert json.loads(done.stdout) == expected


def test_programs_get_the_same_facts(exported, call):
    run, _, _ = exported
    outcome = call("bench", "--run", run, "--on", "ort-cpu,ort-cpu-int8", "--batch", "2", "--seconds", "0.1", "--json")
    if outcome.code == 6:  # a busy machine
        assert outcome.json["error"]["kind"] == "NoisyError"
    else:
        assert [item["target"] for item in outcome.json["comparisons"]] == ["ort-cpu", "ort-cpu-int8"]
    facts = json.loads((run / "export.json").read_text())
    assert facts["asked"] == "fp32"
    assert list(facts["engines"]) == ["rtx-fp32", "rtx-int8"]


def test_the_slowest_layers_are_shown(exported, call):
    run, _, _ = exported
    outcome = call("bench", "--run", run, "--batch", "1", "--seconds", "0.1", "--layers")
    for name in ("dense", "pruned"):
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(f"  {name}, ")]
        assert "layers" in line and "(Conv)" in line
    (item,) = [item for item in json.loads((run / "bench.json").read_text()) if "layers" in item]
    for name in ("dense", "pruned"):
        assert sum(layer["kind"] == "Conv" for layer in item["layers"][name]) >= 10
    before = (run / "bench.json").read_bytes()
    refused = call("bench", "--run", run, "--on", "ort-cpu,torch-cpu", "--layers")
    assert "torch-cpu does not tell the times of layers" in refused.error
    assert (run / "bench.json").read_bytes() == before


def test_trtexec_times_are_shown_beside(exported, call, tmp_path):
    run, _, _ = exported
    path = tmp_path / "times.json"
    path.write_text(json.dumps([{"computeMs": 0.5, "latencyMs": 0.7}] * 10))
    outcome = call("bench", "--run", run, "--batch", "1", "--seconds", "0.1", "--trtexec", path)
    assert "trtexec, times.json: on the device p50 0.500, p90 0.500, p99 0.500 ms; with copies p50 0.700" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "--precision", "fp64"), 2, "unknown precision 'fp64'; use fp32, fp16, bf16, int8, fp8"),
        (("export", "--max-drop", "1"), 2, "add --precision best"),
        (("export", "--gpu", "sm86"), 2, "add --rtx"),
        (("export", "--max-batch", "0"), 2, "must be at least 2 for a free batch size, got 0; e.g. 64"),
        (("export", "--rtx", "--gpu", "sm90"), 2, "does not build for sm90; known: sm75"),
        (("export", "--rtx", "--gpu", "sm86", "--batch", "8:4"), 2, "smallest:usual:largest"),
        (("export", "--rtx", "--gpu", "sm86", "--batch", "8:4:2"), 2, "got 8:4:2"),
        (("export", "--rtx", "--gpu", "sm86", "--level", "9"), 2, "0 to 5, got 9"),
        (("export", "--top-k", "0"), 2, "add --bundle DIR"),
        (("export", "--top-k", "0", "--with-preprocess", "--bundle", "b"), 2, "got 0"),
        (("export", "--top-k", "2", "--bundle", "b"), 2, "ask for preprocessing"),
        (("export", "--precision", "best,fp16"), 2, "give it alone"),
        (("export", "--level", "3"), 2, "--level is about an engine and none is made; add --trt or --rtx"),
        (("export", "--batch", "1:2:4"), 2, "--batch is about an engine"),
        (("export", "--int8-rest", "fp16", "--precision", "fp16"), 2, "--int8-rest is about an int8 network"),
        (("export", "--rtx", "--gpu", ""), 2, "does not build for ; known: sm75"),
        (("bench", "--threads", "99999999999"), 2, "threads must be at most 1024"),
        (("bench", "--batch", "9" * 30), 2, "from 1 to 65536"),
        (("bench", "--batch", "65"), 3, "made for batches up to 64, got 65; run 'chipdeploy export --max-batch 65"),
        (("export", "--calibration", "folder:nowhere", "--precision", "int8"), 3, "nowhere"),
        (("export", "--data", "npz:gone.npz"), 3, "gone.npz' does not exist"),
        (("export", "--data", "fashion-mini"), 3, "fashion-mini has others; give those that it was made with"),
        (("export", "--data-root", "gone", "--data", "cifar10"), 3, "gone"),
        (("export", "--calibration-method", "magic", "--precision", "int8"), 2, "minmax, entropy, percentile"),
        (("export", "--int8-rest", "fp8", "--precision", "int8"), 2, "fp32 or fp16, got 'fp8'"),
        (("export", "--keep-float", "-1", "--precision", "int8"), 2, "counted from 0 on, got -1"),
        (("bench", "--on", "ort-cqu"), 2, "'cqu' is unknown"),
        (("bench", "--on", "trt-fp16"), 3, "chipdeploy export --trt --precision fp16"),
        (("bench", "--on", "ort-cpu-fp16"), 3, "chipdeploy export --precision fp16"),
        (("bench", "--on", "rtx-int8", "--batch", "64"), 3, "takes batches of 1 to 4, got 64"),
        (("bench", "--trtexec", "nowhere.json"), 3, "there is no nowhere.json"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(exported, call, arguments, code, message):
    run, _, _ = exported
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "lock"}
    outcome = call(*arguments, "--run", run)
    assert outcome.code == code
    assert message in outcome.error
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "lock"} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--rtx"), "no GPU is here to build rtx-fp32 on; name the GPUs with --gpu"),
        (("bench", "--on", "torch-cuda-fp16"), "torch-cuda-fp16 runs on an NVIDIA GPU and none is here"),
        (("bench", "--on", "rtx-int8", "--batch", "1"), "rtx-int8 runs on an NVIDIA GPU and none is here"),
        (("bench", "--on", "ort-cuda"), "no CUDAExecutionProvider"),
    ],
)
def test_what_needs_a_gpu_says_so(exported, call, arguments, message):
    run, _, _ = exported
    outcome = call(*arguments, "--run", run)
    assert outcome.code == 4
    assert message in outcome.error


def test_a_bundle_is_refused_before_anything_is_exported(exported, call, tmp_path):
    run, bundle, _ = exported
    before = (run / "export.json").stat().st_mtime_ns
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for place, message in (
        (tmp_path / "full", "is no bundle of chipdeploy"),
        (bundle / "engines", "lies in the bundle"),
        (run / "bundle", "lies in the run"),
        (run, "lies in the run"),
    ):
        assert message in call("export", "--run", run, "--bundle", place).error
    assert (run / "export.json").stat().st_mtime_ns == before


def test_commands_to_paste_are_quoted(exported, call, tmp_path):
    import shutil

    run = shutil.copytree(exported[0], tmp_path / "odd [bold]dir é")
    outcome = call("report", "--run", run)
    assert f"report: {run / 'report.md'}" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("next: ")
    (run / "bench.json").unlink(missing_ok=True)
    assert f"next: chipdeploy bench --run '{run}'" in call("report", "--run", run).out


def test_a_file_that_was_edited_is_neither_timed_nor_packed(exported, call, tmp_path):
    import shutil

    run = shutil.copytree(exported[0], tmp_path / "run")
    for name in ("pruned-int8.onnx", "pruned-rtx-int8.engine"):
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / name).write_bytes(content)
    assert "pruned-int8.onnx was edited" in call("bench", "--run", run, "--on", "ort-cpu-int8").error
    assert "pruned-rtx-int8.engine was edited" in call("bench", "--run", run, "--on", "rtx-int8", "--batch", "1").error
