"""What `chipdeploy doctor` says of this machine, of an empty one, and of packages that are broken or there twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from chipdeploy.doctor import BROKEN, CORE, EXPECTED, MISSING, OK, PYTHONS, RELU, VALUES

ROOT = Path(__file__).parents[1]
TARGETS = ["ort-cpu", "ort-cuda", "torch-cpu", "torch-cuda", "trt", "rtx"]
NO_TORCH = 'print("noise on stdout")\nraise ImportError("libtorch.so: cannot open\\nand a second line")\n'
NVML = """
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
class NVMLError(Exception): ...
class Memory: free, total = 20_000_000_000, 24_000_000_000
def nvmlInit(): ...
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return ("Card A", "Card B")[handle]
def nvmlDeviceGetCudaComputeCapability(handle): return 8, 6 + 3 * handle
def nvmlSystemGetDriverVersion(): return "595.10"
def nvmlDeviceGetMemoryInfo(handle):
    if handle: raise NVMLError("Not Supported")
    return Memory
def nvmlDeviceGetClockInfo(handle, kind): return 1800
def nvmlDeviceGetPowerUsage(handle): return 50_000
def nvmlDeviceGetTemperature(handle, kind): return 40
def nvmlDeviceGetCurrentClocksEventReasons(handle): return 0x24 * handle
def nvmlDeviceGetComputeRunningProcesses(handle): return [1, 2, 3][handle:]
"""


def python(*arguments, path=()):
    """Run this interpreter; modules in `path` come before the installed ones."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


def doctor(*options, path=()):
    done = python("-m", "chipdeploy.cli", "doctor", *options, path=path)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def bare(*path):
    """All checks and targets by name, in an interpreter that sees no installed package."""
    code = """
import json
from chipdeploy.doctor import examine, targets
print(json.dumps({each.name: each.to_dict() for each in [*examine(), *targets()]}))
"""
    done = python("-S", "-c", code, path=(*path, ROOT))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def distribution(folder, name, version="1.0"):
    """A distribution that says it is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def facts():
    """The JSON object for this machine."""
    done = doctor("--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_json_has_a_check_a_line_and_a_target_a_line(facts):
    assert set(facts) == {"schema", "ready", "checks", "targets", "next"}
    assert (facts["ready"], facts["next"]) == (True, "chipdeploy demo")
    for check in facts["checks"]:
        assert list(check) == ["name", "status", "detail", "fix"]
        assert check["status"] in (OK, MISSING, BROKEN)
        assert check["detail"]
        assert bool(check["fix"]) == (check["status"] != OK), check
    for target in facts["targets"]:
        assert list(target) == ["name", "runs", "builds", "detail", "fix"]
        assert target["detail"]
        assert bool(target["fix"]) == (not target["runs"]), target
    assert [target["name"] for target in facts["targets"]] == TARGETS


def test_what_this_machine_has_is_found_and_was_tried(facts):
    checks = {check["name"]: check for check in facts["checks"]}
    assert {name: checks[name]["status"] for name in ("python", "torchvision", *CORE)} == dict.fromkeys(
        ("python", "torchvision", *CORE), OK
    )
    assert checks["onnx"]["detail"] == onnx.__version__
    assert checks["onnxruntime"]["detail"].endswith("ran a network on the CPU")
    ready = {target["name"]: target for target in facts["targets"]}
    assert ready["ort-cpu"]["runs"]
    assert ready["torch-cpu"]["runs"]
    assert ready["ort-cpu"]["builds"] is None
    assert ready["rtx"]["builds"] is (checks["tensorrt_rtx"]["status"] == OK)
    assert ready["trt"]["builds"] is ready["trt"]["runs"]


def test_a_broken_package_is_one_line_and_no_reason_to_fail(tmp_path):
    error = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError('{error}\\nmore')\n", encoding="utf-8")
    done = doctor(path=[tmp_path])
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["torchvision"].split()[1] == BROKEN
    assert lines["torchvision"].endswith(f"{error}; fix: pip install --force-reinstall torch torchvision")
    assert lines["torch"].split()[1] == OK
    assert lines["ort-cpu"].split()[1] == "runs:"
    assert set(TARGETS) <= set(lines)
    assert done.stdout.splitlines()[-1] == "next: chipdeploy demo"


def test_a_broken_core_fails_with_one_json_object(tmp_path):
    (tmp_path / "torch.py").write_text(NO_TORCH, encoding="utf-8")
    done = doctor("--json", path=[tmp_path])
    assert done.returncode == 4
    facts = json.loads(done.stdout)
    torch = next(check for check in facts["checks"] if check["name"] == "torch")
    assert torch["status"] == BROKEN
    assert torch["detail"].endswith(": libtorch.so: cannot open")
    assert (facts["ready"], facts["next"]) == (False, torch["fix"])
    ready = {target["name"]: target["runs"] for target in facts["targets"]}
    assert (ready["torch-cpu"], ready["ort-cpu"]) == (False, True)


def test_a_package_that_is_missing_is_no_bug_of_ours(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'safetensors'\", name='safetensors')\n"
    (tmp_path / "safetensors.py").write_text(missing, encoding="utf-8")
    done = python("-m", "chipdeploy.cli", "prune", "--flops", "0.3", path=[tmp_path])
    assert done.returncode == 4
    assert done.stderr == "error: the Python package 'safetensors' is missing; pip install safetensors\n"
    checks = {check["name"]: check for check in json.loads(doctor("--json", path=[tmp_path]).stdout)["checks"]}
    assert checks["safetensors"]["status"] != OK


def test_both_distributions_of_onnx_runtime_at_once_fail(tmp_path):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        distribution(tmp_path, name)
    done = doctor(path=[tmp_path])
    assert done.returncode == 4
    line = next(line for line in done.stdout.splitlines() if line.startswith("onnxruntime "))
    assert line.split()[1] == BROKEN
    assert line.endswith(
        "fix: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'chipdeploy[cpu]' (or [gpu] on a GPU)"
    )
    assert [error for error in done.stderr.splitlines() if error.startswith("error: ")] == [
        "error: onnxruntime is broken: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
        "run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'chipdeploy[cpu]' (or [gpu] on a GPU)"
    ]


def test_where_nothing_is_installed_everything_has_a_fix():
    found = bare()
    assert found.pop("python")["status"] == OK
    for name, each in found.items():
        assert each["fix"], name
        assert each.get("status", MISSING) == MISSING, name
        assert not each.get("runs") and not each.get("builds"), name
    assert found["tensorrt"]["fix"] == "pip install 'chipdeploy[trt]'"
    assert found["torch-cuda"]["fix"] == "pip install torch torchvision"


def test_a_distribution_whose_files_are_gone_is_broken(tmp_path):
    distribution(tmp_path, "timm", "1.2")
    timm = bare(tmp_path)["timm"]
    assert timm["status"] == BROKEN
    assert timm["detail"] == "1.2: No module named 'timm'"
    assert timm["fix"] == "pip install --force-reinstall timm"


def test_gpus_tell_what_nvml_tells(tmp_path):
    (tmp_path / "pynvml.py").write_text(NVML, encoding="utf-8")
    found = bare(tmp_path)
    assert found["gpu 0"] == {
        "name": "gpu 0",
        "status": OK,
        "detail": "Card A, sm86, driver 595.10, 20.0 of 24.0 GB free, 1800 MHz, slowed down by: nothing, 3 processes",
        "fix": "",
    }
    slowdowns = "slowed down by: power cap, software thermal slowdown"
    assert found["gpu 1"]["detail"] == f"Card B, sm89, driver 595.10, 1800 MHz, {slowdowns}, 2 processes"


def test_a_driver_that_is_not_there_is_a_finding(tmp_path):
    source = "class NVMLError(Exception): ...\ndef nvmlInit(): raise NVMLError('NVML Shared Library Not Found')\n"
    (tmp_path / "pynvml.py").write_text(source, encoding="utf-8")
    gpu = bare(tmp_path)["gpu"]
    assert (gpu["status"], gpu["detail"]) == (MISSING, "no driver: NVML Shared Library Not Found")


def test_the_tiny_network_is_what_it_says():
    model = onnx.load_from_string(RELU)
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import] == [17]
    (logits,) = ReferenceEvaluator(model).run(None, {"images": np.array(VALUES, np.float32).reshape(1, 1, 1, 2)})
    assert logits.ravel().tolist() == EXPECTED


def test_the_pythons_are_those_of_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    assert wanted == f">={low},<{high}"
