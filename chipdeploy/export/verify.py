"""An exported file against the network that it came from: the same inputs, the same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from chipdeploy.copying import copied, in_mode
from chipdeploy.engines.base import Engine, check_images
from chipdeploy.engines.ort import CPU_PROVIDER, open_session
from chipdeploy.errors import InputError, UsageError, VerificationError
from chipdeploy.export.onnx import Inputs, as_inputs, step

Values = NDArray[Any]
Run = Callable[[tuple[Values, ...]], list[Values]]  # a batch of every input ▶ every output
# Largest difference over an output's largest value, by precision: rounding stays well below it, a fault far above.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3, "fp8": 0.3}


@dataclass(frozen=True)
class Verification:
    """How well an exported file agrees with its network.

    Args:
        max_relative_error: largest difference of a value over the largest of its output, of all outputs at all batches.
        top1_agreement: share of images with the same class, at the worst batch size; in outputs of more dimensions,
            of positions [N, :, ...] with the same class; of several outputs, in the worst.
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
    images: Inputs,
    *,
    batches: Sequence[int] = (1, 8),
    tolerance: float = TOLERANCES["fp32"],
    threads: int = 1,
) -> Verification:
    """Run `model` and the ONNX file at `path` in ONNX Runtime on the same inputs and compare all outputs.

    Args:
        images: [N, C, H, W], or a tuple of all inputs, each [N, ...].
        threads: of ONNX Runtime.

    Otherwise as `verify_engine`.
    """
    session = open_session(path, threads, CPU_PROVIDER)
    declared = session.get_inputs()
    names = [value.name for value in declared]

    def run(inputs: tuple[Values, ...]) -> list[Values]:
        if len(inputs) != len(names):
            raise InputError(f"{path.name} takes {len(names)} inputs, {', '.join(names)}; got {len(inputs)}")
        for value, got in zip(declared, inputs, strict=True):
            if value.type == "tensor(float)":
                what = path.name if len(names) == 1 else f"{path.name} as {value.name}"
                check_images(what, got, tuple(value.shape))
        with step(f"run {path.name} in ONNX Runtime"):
            return list(session.run(None, dict(zip(names, inputs, strict=True))))

    return _verify(model, run, path.name, images, batches, tolerance)


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
        InputError: no images, images that the engine does not take, or a network of several outputs.
        VerificationError: the logits differ by more than `tolerance`, or are not finite.
    """
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"verification needs images [N, C, H, W], got {list(images.shape)}; give at least one image")
    return _verify(model, lambda inputs: [engine.run(inputs[0])], what, images, batches, tolerance, most_outputs=1)


def _verify(
    model: nn.Module,
    run: Run,
    what: str,
    images: Inputs,
    batches: Sequence[int],
    tolerance: float,
    most_outputs: int | None = None,
) -> Verification:
    if not batches or min(batches) < 1 or not tolerance > 0:
        raise UsageError(
            f"batches and tolerance must be positive, got {list(batches)} and {tolerance}; try 1, 8 and 1e-4"
        )
    inputs = as_inputs(images)
    values = tuple(value.numpy() for value in inputs)
    results = [_run(run, values, batch) for batch in batches]
    expected = _expected(model, inputs)
    if most_outputs is not None and len(expected) > most_outputs:
        raise InputError(f"{what} gives one output, its network {len(expected)}; check its ONNX file by verify_onnx")
    result = Verification(
        max_relative_error=max(_largest_error(expected, got) for got in results),
        top1_agreement=min(_agreement(expected, got) for got in results),
        batches=tuple(batches),
        tolerance=tolerance,
        images=len(values[0]),
    )
    if not result.max_relative_error <= tolerance:
        largest = "logit" if len(expected) == 1 else "value of an output"
        raise VerificationError(
            f"{what} differs from its network by {result.max_relative_error:.2g} of the largest {largest}, "
            f"allowed {tolerance:.2g}; export the network again"
        )
    return result


def _expected(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Values]:
    """All outputs of the network itself, in the file's order; the model stays in its mode and on its device."""
    network = in_mode(copied(model).cpu().float())
    with torch.inference_mode():
        returned = pytree.tree_leaves(network(*inputs))
    return [value.numpy() for value in returned if isinstance(value, Tensor)]


def _run(run: Run, inputs: tuple[Values, ...], batch: int) -> list[Values]:
    """Outputs [N, ...] of inputs [N, ...], run at exactly `batch` at a time."""
    images = len(inputs[0])
    count = math.ceil(images / batch) * batch
    filled = [value[np.arange(count) % images] for value in inputs]
    parts = [run(tuple(value[start : start + batch] for value in filled)) for start in range(0, count, batch)]
    return [np.concatenate(output)[:images] for output in zip(*parts, strict=True)]


def _largest_error(expected: list[Values], got: list[Values]) -> float:
    """Over all outputs; infinite where their numbers differ."""
    if len(expected) != len(got):
        return math.inf
    return max(_relative_error(*pair) for pair in zip(expected, got, strict=True))


def _agreement(expected: list[Values], got: list[Values]) -> float:
    """Share of places with the same class: the largest value along dimension 1. Of the worst output that has one."""
    pairs = zip(expected, got, strict=False)
    classed = [(a, b) for a, b in pairs if a.ndim > 1 and a.size and a.shape == b.shape]
    return min((float(np.mean(a.argmax(1) == b.argmax(1))) for a, b in classed), default=1.0)


def _relative_error(expected: Values, got: Values) -> float:
    """max |a - b| / max |a|; infinite where a value is not finite or the shapes differ."""
    if expected.shape != got.shape or not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return math.inf
    if expected.size == 0:
        return 0.0
    if not np.issubdtype(expected.dtype, np.floating):  # classes, masks
        expected, got = expected.astype(np.float64), got.astype(np.float64)
    difference, largest = float(np.abs(expected - got).max()), float(np.abs(expected).max())
    if largest == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / largest
