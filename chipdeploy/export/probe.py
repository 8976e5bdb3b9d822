"""A network at work on real images in ONNX Runtime: its logits, the ranges of its tensors, where it stops being finite.

One thread, so that the same images give the same numbers on every machine of a kind.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.engines.base import Images
from chipdeploy.engines.ort import ERRORS_ONLY, check_installed
from chipdeploy.errors import ExportError, MissingError
from chipdeploy.export.onnx import INPUT, OUTPUT, step
from chipdeploy.quiet import quiet

BATCH_VALUES = 1_000_000  # input values of a batch: all tensors of a network at 224 pixels then take below 1 GB
LARGEST_BATCH = 64
NO_REWRITING = "session.disable_quant_qdq"
# ONNX Runtime's own 128 bins are the 128 levels that it fits: its entropy never clips, and is min-max by another name.
ENTROPY_BINS = 256
PERCENTILE_BINS = 2048


@dataclass(frozen=True)
class Agreement:
    """How well logits agree with those of the float network.

    Args:
        top1: share of images with the same class.
        sqnr_db: power of the logits over the power of their error, in decibels; None where there is no error.
    """

    top1: float
    sqnr_db: float | None

    @classmethod
    def of(cls, expected: Images, got: Images) -> Agreement:
        """Of logits [N, classes] with the expected ones."""
        noise = float(np.square(expected - got, dtype=np.float64).sum())
        signal = float(np.square(expected, dtype=np.float64).sum())
        sqnr = None if noise == 0 else 10 * math.log10(max(signal, np.finfo(np.float64).tiny) / noise)
        return cls(float(np.mean(expected.argmax(1) == got.argmax(1))), sqnr)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def logits(proto: Any, images: Images) -> Images:
    """Logits [N, classes] float32 of images [N, C, H, W], whatever type the network takes and gives.

    Raises:
        MissingError: ONNX Runtime is not installed.
        ExportError: it cannot load or run the network.
    """
    session = _session(proto.SerializeToString())
    with step("run the network in ONNX Runtime"):
        results = [session.run([OUTPUT], {INPUT: part})[0] for part in _batches(images, session)]
    return np.concatenate(results).astype(np.float32)


def tensor_ranges(
    proto: Any, images: Images, method: str = "minmax", *, op_types: Sequence[str] = (), percentile: float = 99.999
) -> Any:
    """The range of every float tensor around nodes of `op_types` (all by default), an onnxruntime `TensorsData`.

    Args:
        method: one of METHODS.
        percentile: of |x|, where the method is percentile.

    Raises:
        MissingError: ONNX Runtime is not installed.
        ExportError: it cannot load or run the network.
    """
    _runtime()
    with tempfile.TemporaryDirectory() as folder, step("find the ranges of the network's tensors"), quiet():
        import onnx

        path, augmented = Path(folder) / "network.onnx", Path(folder) / "augmented.onnx"
        onnx.save(proto, path)
        calibrator = METHODS[method](path, list(op_types), str(augmented), percentile)
        calibrator.augment_graph()
        # In place of the calibrator's own session, which has all threads and a voice.
        calibrator.infer_session = session = _session(augmented.read_bytes(), optimize=False)
        for part in _batches(images, session):
            # Batch by batch: a calibrator keeps all that one call gives it.
            calibrator.collect_data(_Reader([{INPUT: part}]))
        return calibrator.compute_data()


def all_outputs(proto: Any, images: Images) -> Iterator[dict[str, tuple[str, Any]]]:
    """Of every node in the order of the graph, a batch of images at a time: output tensor ▶ (node, values)."""
    import onnx

    exposed = onnx.shape_inference.infer_shapes(proto)
    known = {value.name: value for value in exposed.graph.value_info}
    makers = {name: node.name for node in exposed.graph.node for name in node.output if name in known or name == OUTPUT}
    exposed.graph.output.extend(known[name] for name in makers if name in known)
    session = _session(exposed.SerializeToString(), optimize=False)
    with np.errstate(over="ignore"):  # Images beyond fp16 are what is looked for.
        for part in _batches(images, session):
            values = session.run(list(makers), {INPUT: part})
            yield {name: (makers[name], value) for name, value in zip(makers, values, strict=True)}


def first_not_finite(proto: Any, images: Images) -> str | None:
    """Name of the first node, in the order of the graph, that gives a value that is not finite on the images."""
    broken: dict[str, bool] = {}
    for outputs in all_outputs(proto, images):
        for node, value in outputs.values():
            broken[node] = broken.get(node, False) or not np.isfinite(value).all()
    return next((node for node, is_broken in broken.items() if is_broken), None)


class _Reader:
    """Feeds for a calibrator: it wants `get_next`, and None at the end."""

    def __init__(self, feeds: Sequence[dict[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _minmax(path: Path, op_types: list[str], augmented: str, percentile: float) -> Any:
    from onnxruntime.quantization.calibrate import MinMaxCalibrater

    return MinMaxCalibrater(path, op_types, augmented)


def _entropy(path: Path, op_types: list[str], augmented: str, percentile: float) -> Any:
    from onnxruntime.quantization.calibrate import EntropyCalibrater

    return EntropyCalibrater(path, op_types, augmented, num_bins=ENTROPY_BINS)


def _percentile(path: Path, op_types: list[str], augmented: str, percentile: float) -> Any:
    from onnxruntime.quantization.calibrate import PercentileCalibrater

    return PercentileCalibrater(
        path, op_types, augmented, symmetric=True, num_bins=PERCENTILE_BINS, percentile=percentile
    )


METHODS: dict[str, Callable[[Path, list[str], str, float], Any]] = {
    "minmax": _minmax,
    "entropy": _entropy,
    "percentile": _percentile,
}


def _batches(images: Images, session: Any) -> Iterator[Any]:
    """The images in parts, in the type that the session takes."""
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    size = max(1, min(LARGEST_BATCH, BATCH_VALUES // images[0].size))
    with np.errstate(over="ignore"):
        for start in range(0, len(images), size):
            yield images[start : start + size].astype(dtype)


def _session(content: bytes, *, optimize: bool = True) -> Any:
    """A silent `onnxruntime.InferenceSession` on one thread of the CPU."""
    ort = _runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Its rewriting of quantised graphs makes int32 biases, with scales that underflow where they are fp16.
    options.add_session_config_entry(NO_REWRITING, "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(content, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"ONNX Runtime cannot load the network: {reason}; export it again") from error


def _runtime() -> Any:
    check_installed()
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError("onnxruntime is not installed; run: pip install 'chipdeploy[cpu]'") from error
    return onnxruntime
