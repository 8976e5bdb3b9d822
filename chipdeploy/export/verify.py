"""An exported file against the network that it came from: the same images, the same logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chipdeploy.engines.base import Engine, Images, open_engine
from chipdeploy.errors import InputError, UsageError, VerificationError

# Largest difference of a logit over the largest logit, by precision: rounding stays well below it, a fault far above.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3, "fp8": 0.3}


@dataclass(frozen=True)
class Verification:
    """How well an exported file agrees with its network.

    Args:
        max_relative_error: largest difference of a logit over the largest logit, at the worst batch size.
        top1_agreement: share of images with the same class, at the worst batch size.
        batches: the batch sizes that were run.
        tolerance: the largest `max_relative_error` that was allowed.
        images: how many different images were compared.
    """

    max_relative_error: float
    top1_agreement: float
    batches: tuple[int, ...]
    tolerance: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"batches": list(self.batches)}


def verify_onnx(
    model: nn.Module,
    path: Path,
    images: Tensor,
    *,
    batches: Sequence[int] = (1, 8),
    tolerance: float = 1e-4,
    threads: int = 1,
) -> Verification:
    """Run `model` and the ONNX file at `path` in ONNX Runtime on the same images; see `verify_engine`.

    Args:
        threads: of ONNX Runtime.
    """
    return verify_engine(
        model, open_engine("ort-cpu", path, threads=threads), path.name, images, batches=batches, tolerance=tolerance
    )


def verify_engine(
    model: nn.Module,
    engine: Engine,
    what: str,
    images: Tensor,
    *,
    batches: Sequence[int] = (1, 8),
    tolerance: float = TOLERANCES["fp32"],
) -> Verification:
    """Run `model` (eval, fp32, a copy on the CPU) and an engine on the same images and compare logits.

    Args:
        what: the engine's name in messages: its file.
        images: [N, C, H, W]. The last batch of each size is filled up from the first images.
        batches: batch sizes to run the engine at.
        tolerance: largest difference of a logit, over the largest logit of the network.

    Raises:
        UsageError: no batch size, one below 1, or a tolerance that is not positive.
        InputError: no images, or images that the engine does not take.
        VerificationError: the logits differ by more than `tolerance`, or are not finite.
    """
    if not batches or min(batches) < 1 or not tolerance > 0:
        raise UsageError(
            f"batches and tolerance must be positive, got {list(batches)} and {tolerance}; try 1, 8 and 1e-4"
        )
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"verification needs images [N, C, H, W], got {list(images.shape)}; give at least one image")
    pixels: Images = images.detach().cpu().float().numpy()
    outputs = [_run(engine, pixels, batch) for batch in batches]
    expected = _logits(model, images)
    result = Verification(
        max_relative_error=max(_relative_error(expected, got) for got in outputs),
        top1_agreement=min(float(np.mean(expected.argmax(1) == got.argmax(1))) for got in outputs),
        batches=tuple(batches),
        tolerance=tolerance,
        images=len(pixels),
    )
    if not result.max_relative_error <= tolerance:
        raise VerificationError(
            f"{what} differs from its network by {result.max_relative_error:.2g} of the largest logit, "
            f"allowed {tolerance:.2g}; export the network again"
        )
    return result


def _logits(model: nn.Module, images: Tensor) -> Images:
    """The network's own logits [N, classes]; the model itself stays in its mode and on its device."""
    network = copy.deepcopy(model).cpu().float().eval()
    with torch.inference_mode():
        logits: Images = network(images.detach().cpu().float()).numpy()
    return logits


def _run(engine: Engine, pixels: Images, batch: int) -> Images:
    """Logits [N, classes] of pixels [N, C, H, W], run at exactly `batch` images at a time."""
    count = math.ceil(len(pixels) / batch) * batch
    filled = pixels[np.arange(count) % len(pixels)]
    return np.concatenate([engine.run(part) for part in np.split(filled, count // batch)])[: len(pixels)]


def _relative_error(expected: Images, got: Images) -> float:
    """max |a - b| / max |a|; infinite where a value is not finite or the shapes differ."""
    if expected.shape != got.shape or not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return math.inf
    difference, largest = float(np.abs(expected - got).max()), float(np.abs(expected).max())
    if largest == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / largest
