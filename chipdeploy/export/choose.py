"""The precision to deploy: the fastest that holds its accuracy. int8 is not always the fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.engines.base import open_engine
from chipdeploy.engines.target import Target
from chipdeploy.latency.timing import time_engines

SECONDS, BLOCKS = 2.0, 30  # of a comparison, about and at least
REFERENCE = "fp32"


def choose(
    files: Mapping[Target, Path],
    accuracies: Mapping[str, float],
    shape: Sequence[int],
    *,
    max_drop: float,
    batch: int = 1,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Time every precision against fp32, interleaved, and name the fastest that loses at most `max_drop` points.

    Args:
        files: what each target runs, one of them in fp32.
        accuracies: top-1 in [0, 1] by precision.
        shape: [C, H, W] of an image.
        max_drop: points of accuracy.
        seconds: about how long to measure each.

    Returns:
        `target` and `precision` that were chosen, and `table`: a row a precision with accuracy, drop in points, time as
        a share of fp32's with its 95 % interval, and why it was not taken.
    """
    images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    reference = next(target for target in files if target.precision == REFERENCE)
    rows = []
    for target, path in files.items():
        drop = (accuracies[REFERENCE] - accuracies[target.precision]) * 100
        row: dict[str, Any] = {
            "target": target.name,
            "precision": target.precision,
            "accuracy": accuracies[target.precision],
            "drop_points": drop,
            "bytes": path.stat().st_size,
            "batch": batch,
            "ratio": 1.0,
            "ratio_interval": [1.0, 1.0],
            "holds": drop <= max_drop + 1e-9,
        }
        if target is not reference:
            dense, control, other = (open_engine(one, files[one]) for one in (reference, reference, target))
            measured = time_engines(target, dense, control, [other], images, seconds=seconds, blocks=BLOCKS)[0]
            row |= {"ratio": measured.ratio, "ratio_interval": list(measured.ratio_interval), "noise": measured.noise}
        rows.append(row)
    best = min((row for row in rows if row["precision"] == REFERENCE or _better(row)), key=lambda row: row["ratio"])
    return {"target": best["target"], "precision": best["precision"], "max_drop_points": max_drop, "table": rows}


def _better(row: Mapping[str, Any]) -> bool:
    """Whether a precision holds its accuracy, and its speedup is certain: otherwise fp32 stays."""
    return bool(row["holds"] and row["ratio_interval"][1] < 1 and not row["noise"])
