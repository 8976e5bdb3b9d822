"""What is installed here and works, which targets run and can be built, and the command for everything that is missing.

Nothing here is an error: a package that fails to import, or a GPU that is not there, is a finding.
"""

from __future__ import annotations

import importlib
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from chipdeploy.errors import MissingError

OK, MISSING, BROKEN = "ok", "missing", "broken"
# Without these nothing is pruned, exported or run.
CORE = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy", "safetensors", "pydantic")
PYTHONS = (3, 11), (3, 14)  # from, and below
USE_A_GPU = "use a machine with an NVIDIA GPU and its driver (a container: docker run --gpus all)"

# logits = relu(images) in ONNX, float32 [n, 1, 1, 2], opset 17: what runs must run without the package onnx too.
SIZES = b"\x12\x17\n\x15\x08\x01\x12\x11\n\x03\x12\x01n\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x02"
RELU = (
    b'\x08\x08:d\n\x16\n\x06images\x12\x06logits"\x04Relu\x12\x04relu'
    + (b"Z!\n\x06images" + SIZES + b"b!\n\x06logits" + SIZES)
    + b"B\x04\n\x00\x10\x11"
)
RAN = "ran a network"
VALUES, EXPECTED = [-1.0, 2.0], [0.0, 2.0]


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, missing or broken; `fix` is what to run or do, empty where all is well."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Readiness:
    """What one target can do here; `builds` is None where nothing is built before it runs, `fix` gets what it lacks."""

    name: str
    runs: bool
    builds: bool | None
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Package:
    """A package to look for.

    Args:
        name: what we call it. module: what is imported.
        distributions: the names under which it is published.
        install, repair: the commands for a missing and for a broken one.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    install: str
    repair: str = ""

    def check(self) -> Check:
        """Import it and say what came of it."""
        found = next(filter(None, map(_installed, self.distributions)), None)
        module, reason = _import(self.module)
        if module is None and found is None and reason == f"No module named '{self.module}'":
            return Check(self.name, MISSING, "not installed", self.install)
        distribution, version = found or (self.distributions[0], str(getattr(module, "__version__", "unknown version")))
        label = version if distribution == self.name else f"{distribution} {version}"
        if module is not None:
            return Check(self.name, OK, label)
        repair = self.repair or f"pip install --force-reinstall {distribution}"
        return Check(self.name, BROKEN, f"{label}: {reason}" if found else reason, repair)


# torchvision's compiled ops fit one version of torch: they are installed and repaired together.
TORCH = "pip install torch torchvision", "pip install --force-reinstall torch torchvision"
REQUIRED = (
    Package("torch", "torch", ("torch",), *TORCH),
    Package("torchvision", "torchvision", ("torchvision",), *TORCH),
    Package("onnx", "onnx", ("onnx",), "pip install onnx"),
    Package(
        "onnxconverter-common", "onnxconverter_common", ("onnxconverter-common",), "pip install onnxconverter-common"
    ),
    Package("nvidia-ml-py", "pynvml", ("nvidia-ml-py",), "pip install nvidia-ml-py"),
    *(
        Package(name, name, (name,), f"pip install {name}")
        for name in ("onnxscript", "numpy", "scipy", "safetensors", "pydantic", "psutil", "matplotlib")
    ),
)
ORT = Package("onnxruntime", "onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "pip install 'chipdeploy[cpu]'")
OPTIONAL = (
    Package("tensorrt", "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "pip install 'chipdeploy[trt]'"),
    Package("tensorrt_rtx", "tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx"), "pip install 'chipdeploy[rtx]'"),
    # An environment of its own: its pins and ours exclude each other.
    Package(
        "nvidia-modelopt",
        "modelopt",
        ("nvidia-modelopt",),
        "python3 -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]'",
    ),
    Package("timm", "timm", ("timm",), "pip install 'chipdeploy[zoo]'"),
)


def examine() -> list[Check]:
    """Python, every package, ONNX Runtime on a tiny network, and the GPUs; a check each. Imports them all: seconds."""
    required = [package.check() for package in REQUIRED]
    return [_python(), *required, _onnxruntime(), *(package.check() for package in OPTIONAL), *_gpus()]


def lacking(checks: Iterable[Check]) -> list[Check]:
    """The checks of the core that failed: with one of them chipdeploy does not work."""
    return [check for check in checks if check.name in CORE and check.status != OK]


def require(checks: Iterable[Check]) -> None:
    """Raise unless the core works.

    Raises:
        MissingError: a package of the core is missing or broken, or ONNX Runtime is installed twice.
    """
    if failed := lacking(checks):
        first = failed[0]
        raise MissingError(f"{first.name} is {first.status}: {first.detail}; run: {first.fix}")


def targets() -> list[Readiness]:
    """What every target can do here, tried on a tiny network where that takes no longer than a second."""
    return [_ort_cpu(), _ort_cuda(), _torch_cpu(), _torch_cuda(), _trt(), _rtx()]


def _python() -> Check:
    low, high = PYTHONS
    supported = low <= sys.version_info[:2] < high
    wanted = f"{'.'.join(map(str, low))} or newer, below {'.'.join(map(str, high))}"
    fix = "" if supported else "python3.11 -m venv .venv && .venv/bin/pip install 'chipdeploy[cpu]'"
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", OK if supported else BROKEN, where if supported else f"{where}, needs {wanted}", fix)


def _installed(distribution: str) -> tuple[str, str] | None:
    """Name and version of a distribution; None where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return distribution, metadata.version(distribution)
    return None


def _import(name: str) -> tuple[Any, str]:
    """A module and an empty reason, or None and the first line of why it does not import."""
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # stdout is for the answer
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except (Exception, SystemExit) as error:
        return None, _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _split(error: BaseException) -> tuple[str, str]:
    """Detail and fix of an error: ours say both in one line, others have no fix."""
    if not isinstance(error, MissingError):
        return _first_line(error), ""
    what, _, fix = str(error).partition("; ")
    return what, fix.removeprefix("run: ")


def _onnxruntime() -> Check:
    """ONNX Runtime, of which there are two distributions and at most one may be there: loaded, and run on the CPU."""
    found = [each for each in map(_installed, ORT.distributions) if each]
    check = ORT.check()
    if len(found) < 2 and check.status != OK:
        return check
    try:
        _run_ort("ort-cpu")
    except Exception as error:
        detail, fix = _split(error)
        return Check(
            ORT.name, BROKEN, detail, fix or f"pip install --force-reinstall {found[0][0] if found else ORT.name}"
        )
    return Check(ORT.name, OK, f"{check.detail}, ran a network on the CPU")


def _run_ort(target: str) -> None:
    """Run the tiny network through our own engine.

    Raises:
        MissingError: ONNX Runtime or its provider is not there, or computes something else. Others as the engine does.
    """
    import numpy as np

    from chipdeploy.engines.base import open_engine

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "relu.onnx"
        path.write_bytes(RELU)
        logits = open_engine(target, path).run(np.array(VALUES, np.float32).reshape(1, 1, 1, 2))
    if (got := logits.ravel().tolist()) != EXPECTED:
        raise MissingError(
            f"{target} computes {got} where {EXPECTED} is right; run: pip install --force-reinstall onnxruntime"
        )


def _ort_cpu() -> Readiness:
    try:
        _run_ort("ort-cpu")
    except Exception as error:
        detail, fix = _split(error)
        return Readiness("ort-cpu", False, None, detail, fix or ORT.install)
    return Readiness("ort-cpu", True, None, RAN)


def _ort_cuda() -> Readiness:
    gpu, why, fix = _gpu()
    if not gpu:
        return Readiness("ort-cuda", False, None, why, fix)
    try:
        _run_ort("ort-cuda")
    except Exception as error:
        detail, fix = _split(error)
        # A provider that is there and does not start lacks a library of CUDA: torch brings all of them but curand.
        command = fix if fix.startswith("pip ") else "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return Readiness("ort-cuda", False, None, detail, command)
    return Readiness("ort-cuda", True, None, RAN)


def _torch_cpu() -> Readiness:
    return _torch("cpu")


def _torch_cuda() -> Readiness:
    gpu, why, fix = _gpu()
    return _torch("cuda") if gpu else Readiness("torch-cuda", False, None, why, fix)


def _torch(device: str) -> Readiness:
    torch, reason = _import("torch")
    if torch is None:
        return Readiness(f"torch-{device}", False, None, reason, TORCH[0])
    try:
        got = torch.relu(torch.tensor(VALUES, device=device)).tolist()
    except Exception as error:
        return Readiness(f"torch-{device}", False, None, _first_line(error), TORCH[1])
    if got != EXPECTED:
        return Readiness(f"torch-{device}", False, None, f"computes {got} where {EXPECTED} is right", TORCH[1])
    return Readiness(f"torch-{device}", True, None, RAN)


def _gpu() -> tuple[str, str, str]:
    """Compute capability of the first GPU that torch can use, e.g. sm86; or an empty one, why, and the fix."""
    torch, reason = _import("torch")
    if torch is None:
        return "", f"torch: {reason}", TORCH[0]
    with warnings.catch_warnings(record=True) as heard:  # a driver that is missing or too old is a warning
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return "sm{}{}".format(*torch.cuda.get_device_capability()), "", ""
        except Exception as error:
            return "", _first_line(error), USE_A_GPU
    why = str(heard[0].message).partition(". ")[0] if heard else "torch sees no GPU"
    return "", why, USE_A_GPU


def _trt() -> Readiness:
    """TensorRT builds on the GPU where it runs. Not tried: that takes many seconds."""
    check = OPTIONAL[0].check()
    if check.status != OK:
        return Readiness("trt", False, False, f"tensorrt: {check.detail}", check.fix)
    gpu, why, fix = _gpu()
    if not gpu:
        return Readiness("trt", False, False, why, fix)
    return Readiness("trt", True, True, f"tensorrt {check.detail} and a GPU ({gpu}) are here; not tried")


def _rtx() -> Readiness:
    """TensorRT-RTX builds without a GPU, for the GPUs that it knows; it runs on those."""
    check = OPTIONAL[1].check()
    if check.status != OK:
        return Readiness("rtx", False, False, f"tensorrt_rtx: {check.detail}", check.fix)
    try:
        known = _built_ahead()
    except Exception as error:
        detail, fix = _split(error)
        return Readiness("rtx", False, False, detail, fix or "pip install --force-reinstall 'chipdeploy[rtx]'")
    gpu, why, _ = _gpu()
    built = f"built an engine for {known[-1]}"
    if gpu in known:
        return Readiness("rtx", True, True, f"{built}; a GPU ({gpu}) is here, running is not tried")
    why = f"does not know {gpu}" if gpu else why
    return Readiness(
        "rtx", False, True, f"{built}; {why}", f"build with --gpu {','.join(known)}, and run on one of them"
    )


def _built_ahead() -> tuple[str, ...]:
    """Build the tiny network for the newest GPU that TensorRT-RTX knows; returns all that it knows."""
    from chipdeploy.engines.build import BuildOptions, build_engine, buildable_gpus
    from chipdeploy.engines.target import Target

    known = buildable_gpus()
    with tempfile.TemporaryDirectory() as folder:
        onnx, built = Path(folder) / "relu.onnx", Path(folder) / "relu.engine"
        onnx.write_bytes(RELU)
        build_engine(onnx, built, Target.parse("rtx"), BuildOptions(batches=(1, 1, 1), gpus=known[-1:]))
    return known


def _gpus() -> list[Check]:
    """A check for every GPU that NVML sees; one that says why where it sees none."""
    nvml, _ = _import("pynvml")
    if nvml is None:
        return [Check("gpu", MISSING, "not asked: NVML is read through nvidia-ml-py", "pip install nvidia-ml-py")]
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        found = [_gpu_check(nvml, index) for index in range(count)]
    except Exception as error:  # NVMLError, of which every code is a class of its own
        return [Check("gpu", MISSING, f"no driver: {_first_line(error)}", USE_A_GPU)]
    return found or [Check("gpu", MISSING, "the driver sees no GPU", USE_A_GPU)]


def _gpu_check(nvml: Any, index: int) -> Check:
    """Name, compute capability, driver, memory, clock, slowdowns and other processes of one GPU: what NVML tells."""
    from chipdeploy.latency.gpu import GpuWatch

    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    facts = GpuWatch(nvml, handle).facts()
    parts = [facts.get("name", "unnamed")]
    with suppress(nvml.NVMLError):
        parts.append("sm{}{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    if "driver" in facts:
        parts.append(f"driver {facts['driver']}")
    with suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        parts.append(f"{memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    if "sm_mhz" in facts:
        parts.append(f"{facts['sm_mhz']} MHz")
    if "slowdowns" in facts:
        parts.append(f"slowed down by: {', '.join(facts['slowdowns']) or 'nothing'}")
    if "processes" in facts:
        parts.append(f"{facts['processes']} processes")
    return Check(f"gpu {index}", OK, ", ".join(parts))
