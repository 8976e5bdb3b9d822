"""A verified fp32 ONNX file in another precision, checked on real images.

The precision lives in the graph: TensorRT 11 builds what it reads, and knows no flag for fp16 or int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.engines.base import Images, check_images
from chipdeploy.engines.ort import ENTRY
from chipdeploy.engines.target import PRECISIONS
from chipdeploy.errors import ExportError, InputError, UsageError, VerificationError
from chipdeploy.export import modelopt
from chipdeploy.export.half import QDQ, to_half
from chipdeploy.export.onnx import INPUT, OnnxFile, clean_onnx, describe_onnx, save_onnx
from chipdeploy.export.probe import METHODS, NO_REWRITING, Agreement, first_not_finite, logits, tensor_ranges
from chipdeploy.export.quantize import WEIGHTED, quantisable, quantize, store_int8
from chipdeploy.files import atomic

__all__ = ["DEFAULTS", "PRECISIONS", "Converted", "PrecisionOptions", "convert", "int8_ranges", "load_float"]

RESTS = ("fp32", "fp16")
METADATA = "chipdeploy.precision"
FOR_TENSORRT = f"int8 with fp16 is for TensorRT; ONNX Runtime is slow: its biases need {NO_REWRITING}=1"


@dataclass(frozen=True)
class PrecisionOptions:
    """How a network is converted.

    Args:
        keep_io: images and logits stay float32. They become fp16 where False, but for int8 with an fp32 rest.
        method: calibration of int8: minmax, entropy or percentile.
        percentile: of |x| that the range of a tensor covers, above 50 and at most 100.
        keep_float: names of nodes of the ONNX file that are not quantised (int8), or stay in fp32 (fp16).
        rest: what is not int8 in an int8 network: fp32, or fp16 for TensorRT; a note says what ONNX Runtime does to it.
        store_int8: weights are stored as int8, a quarter of the size. Otherwise as floats with the node that quantises
            them, which older parsers want.
    """

    keep_io: bool = True
    method: str = "minmax"
    percentile: float = 99.999
    keep_float: tuple[str, ...] = ()
    rest: str = "fp32"
    store_int8: bool = False


DEFAULTS = PrecisionOptions()


@dataclass(frozen=True)
class Converted:
    """A network in another precision.

    Args:
        file: on disk.
        precision: one of PRECISIONS.
        kept_float: names of the nodes that stay in a higher precision than the one asked for.
        notes: what was done about values that the precision cannot hold, one line each.
        agreement: with the fp32 network on the images; None where this machine cannot run the file.
    """

    file: OnnxFile
    precision: str
    kept_float: tuple[str, ...]
    notes: tuple[str, ...]
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "file": self.file.to_dict(),
            "precision": self.precision,
            "kept_float": list(self.kept_float),
            "notes": list(self.notes),
            "agreement": self.agreement and self.agreement.to_dict(),
        }


@dataclass(frozen=True)
class Result:
    """What a converter hands back: an `onnx.ModelProto`, and for the record as in `Converted`."""

    proto: Any
    kept_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    runs_here: bool = True


Converter = Callable[[Any, Images, PrecisionOptions], Result]


def convert(
    source: Path,
    target: Path,
    precision: str,
    images: Images,
    *,
    options: PrecisionOptions = DEFAULTS,
) -> Converted:
    """Write the network of `source` to `target` in `precision`; fp32 is a copy, byte for byte.

    Args:
        source: an fp32 file of `export_onnx`.
        images: [N, C, H, W] float32, normalised, of the kind that the network will see; some hundreds for int8.

    Raises:
        UsageError: an unknown precision, method or node, or an option outside its range.
        InputError: no images, images that the network does not take, or values that are not finite.
        ExportError: `source` is missing, damaged, not fp32 or cannot be converted, or `target` cannot be written.
        MissingError: a package that the precision needs is not installed.
        VerificationError: the logits are not finite in the new precision. Nothing is left at `target`.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    proto = load_float(source, images, options)
    expected = logits(proto, images)
    _check_finite(source.name, expected, proto, images)
    if precision == "fp32":
        return Converted(_copy(source, target, proto), precision, (), (), Agreement.of(expected, expected))
    result = _CONVERTERS[precision](proto, images, options)
    facts = {METADATA: precision} | ({ENTRY: f"{NO_REWRITING}=1"} if FOR_TENSORRT in result.notes else {})
    clean_onnx(result.proto, {entry.key: entry.value for entry in proto.metadata_props} | facts)
    agreement = None
    if result.runs_here:
        got = logits(result.proto, images)
        _check_finite(f"{source.name} in {precision}", got, result.proto, images)
        agreement = Agreement.of(expected, got)
    return Converted(save_onnx(result.proto, target), precision, result.kept_float, result.notes, agreement)


def load_float(source: Path, images: Images, options: PrecisionOptions) -> Any:
    """The `onnx.ModelProto` of an fp32 file, after images and options were checked against it.

    Raises:
        UsageError, InputError, ExportError: as `convert` says.
    """
    proto = _read(source)
    types = {node.op_type for node in proto.graph.node}
    input_type = proto.graph.input[0].type.tensor_type
    if input_type.elem_type != _float_type() or not types.isdisjoint(QDQ):
        raise ExportError(f"{source.name} is not in fp32; convert the file that 'chipdeploy export' wrote")
    if len(images) == 0:
        raise InputError("calibration needs images, got 0; give some hundreds of the training images")
    check_images(source.name, images, tuple(dim.dim_param or dim.dim_value for dim in input_type.shape.dim))
    if not np.isfinite(images).all():
        raise InputError("calibration images hold NaN or infinity; look at the data and how they are normalised")
    check_options(options)
    _check_nodes(options, {node.name for node in proto.graph.node})
    return proto


def int8_ranges(proto: Any, images: Images, options: PrecisionOptions) -> Any:
    """The ranges of the tensors that int8 needs, an onnxruntime `TensorsData`."""
    return tensor_ranges(proto, images, options.method, op_types=WEIGHTED, percentile=options.percentile)


def _read(source: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load(source)
    except OSError as error:
        raise ExportError(f"cannot read {source.name}: {error.strerror}; export the network again") from error
    except DecodeError as error:
        raise ExportError(f"{source.name} is damaged or no ONNX file; export the network again") from error
    names = [node.name for node in proto.graph.node]
    if [value.name for value in proto.graph.input] != [INPUT] or len(set(names)) < len(names) or "" in names:
        raise ExportError(f"{source.name} is no network of chipdeploy; convert a file that 'chipdeploy export' wrote")
    return proto


def _float_type() -> int:
    from onnx import TensorProto

    return int(TensorProto.FLOAT)


def check_options(options: PrecisionOptions) -> None:
    """Raises UsageError for an unknown method or rest, or a percentile outside its range."""
    if options.method not in METHODS:
        raise UsageError(f"unknown calibration method {options.method!r}; known: {', '.join(METHODS)}")
    if not 50 < options.percentile <= 100:
        raise UsageError(f"percentile must be above 50 and at most 100, got {options.percentile}; try 99.999")
    if options.rest not in RESTS:
        raise UsageError(f"the rest of an int8 network is {' or '.join(RESTS)}, got {options.rest!r}")


def _check_nodes(options: PrecisionOptions, nodes: set[str]) -> None:
    if unknown := [name for name in options.keep_float if name not in nodes]:
        raise UsageError(f"the network has no node {unknown[0]!r} to keep in float; take names from its ONNX file")


def _check_finite(what: str, got: Images, proto: Any, images: Images) -> None:
    if not np.isfinite(got).all():
        node = first_not_finite(proto, images)
        raise VerificationError(
            f"{what} gives logits that are not finite, first at node {node}; keep it in float, or check the images"
        )


def _copy(source: Path, target: Path, proto: Any) -> OnnxFile:
    content = source.read_bytes()
    with atomic(target, ExportError) as temporary:
        temporary.write_bytes(content)
    return describe_onnx(proto, content, target)


def _fp16(proto: Any, images: Images, options: PrecisionOptions) -> Result:
    half = to_half(proto, images, keep_io=options.keep_io, keep_float=options.keep_float)
    return Result(half.proto, half.kept_float, half.notes)


def _int8(proto: Any, images: Images, options: PrecisionOptions) -> Result:
    layers = [name for name in quantisable(proto) if name not in options.keep_float]
    quantised = quantize(proto, int8_ranges(proto, images, options), layers)
    kept = _in_order(proto, options.keep_float)
    notes: tuple[str, ...] = ()
    if options.rest == "fp16":
        half = to_half(quantised, images, keep_io=options.keep_io)
        quantised, notes = half.proto, (*half.notes, FOR_TENSORRT)
        kept = _in_order(proto, {*kept, *half.kept_float})
    if options.store_int8:
        store_int8(quantised)
    return Result(quantised, kept, notes)


def _in_order(proto: Any, names: Sequence[str] | set[str]) -> tuple[str, ...]:
    """Names of nodes in the order of the graph."""
    return tuple(node.name for node in proto.graph.node if node.name in names)


def _bf16(proto: Any, images: Images, options: PrecisionOptions) -> Result:
    return Result(modelopt.to_bf16(proto, keep_io=options.keep_io), notes=(modelopt.NOT_RUN,), runs_here=False)


def _fp8(proto: Any, images: Images, options: PrecisionOptions) -> Result:
    result = modelopt.to_fp8(proto, images, keep_float=options.keep_float, rest=options.rest)
    return Result(result, _in_order(proto, options.keep_float), (modelopt.NOT_RUN,), runs_here=False)


_CONVERTERS: dict[str, Converter] = {"fp16": _fp16, "bf16": _bf16, "int8": _int8, "fp8": _fp8}
