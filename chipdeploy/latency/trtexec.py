"""Times that NVIDIA's trtexec measured, read from the file that its --exportTimes writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.errors import InputError

COMPUTE, LATENCY = "computeMs", "latencyMs"


@dataclass(frozen=True)
class TrtexecTimes:
    """What trtexec timed, an entry an inference: `compute_ms` on the device, `latency_ms` with the copies."""

    file: str
    compute_ms: tuple[float, ...]
    latency_ms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: counts and percentiles, in ms."""
        return {
            "file": self.file,
            "inferences": len(self.compute_ms),
            "compute_ms": _percentiles(self.compute_ms),
            "latency_ms": _percentiles(self.latency_ms),
        }


def read_trtexec(path: Path) -> TrtexecTimes:
    """Read a file of `trtexec --exportTimes=FILE`: a JSON list with an object an inference.

    Raises:
        InputError: no such file, or not of this form.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        compute, latency = (tuple(float(row[key]) for row in rows) for key in (COMPUTE, LATENCY))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}; write it with trtexec --exportTimes={path.name}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path.name} holds no trtexec times ({error!r}); write it with --exportTimes") from error
    if not compute or not np.isfinite(compute + latency).all():
        raise InputError(f"{path.name} holds no trtexec times; write it with --exportTimes")
    return TrtexecTimes(path.name, compute, latency)


def _percentiles(times: tuple[float, ...]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)}
