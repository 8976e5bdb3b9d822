"""The machine and the packages of a measurement, as JSON values."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

VECTORS = {"amx_tile": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
PACKAGES = (
    "chipdeploy",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
    "torch-pruning",  # the peer of the benchmarks
)


def environment() -> dict[str, Any]:
    """The machine and the packages, as JSON values. No host, user or path is named; no package is imported."""
    cpu, cores, threads = _cpu_model(), _cores(), _threads()
    gpu = "an NVIDIA GPU" if Path("/dev/nvidia0").exists() else "no GPU"
    # Processors of one name differ by what a vector holds, and so does the time of every kernel.
    vectors = next((isa for flag, isa in VECTORS.items() if flag in _cpuinfo("flags").split()), "")
    return {
        "machine": ", ".join(filter(None, (cpu, vectors, f"{cores} core{'s' if cores > 1 else ''}", gpu))),
        "cpu": cpu,
        "vectors": vectors,
        "cores": cores,
        "threads": threads,
        "frequency_mhz": _frequency_mhz(),
        "load_before": load_averages(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _frequency_mhz() -> float | None:
    """Of the first core, now; None where the system does not say."""
    try:
        return round(float(_cpuinfo("cpu MHz")))
    except ValueError:
        return None


def _cpuinfo(key: str) -> str:
    """The first value of a key in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _threads() -> int:
    """Hardware threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cores() -> int:
    """Physical cores of the machine."""
    import psutil  # type: ignore[import-untyped]

    return psutil.cpu_count(logical=False) or _threads()


def load_averages() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes; None where the system has none."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None
