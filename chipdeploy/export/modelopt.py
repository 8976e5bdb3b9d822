"""bf16 and fp8, which NVIDIA's Model Optimizer makes: an optional package, whose versions conflict with ours."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipdeploy.engines.base import Images
from chipdeploy.errors import MissingError
from chipdeploy.export.onnx import INPUT, step
from chipdeploy.quiet import quiet

NOT_RUN = (
    "made by Model Optimizer and not run here: ONNX Runtime has no kernels for it on the CPU; time and check the engine"
)


MODULES = {"bf16": "modelopt.onnx.autocast.convert", "fp8": "modelopt.onnx.quantization"}


def check_installed(precision: str) -> None:
    """Raises MissingError where a precision needs nvidia-modelopt and it is not installed."""
    if precision in MODULES:
        _module(precision)


def to_bf16(proto: Any, *, keep_io: bool) -> Any:
    """An `onnx.ModelProto` in bf16, which has the range of fp32: nothing overflows.

    Raises:
        MissingError: nvidia-modelopt is not installed.
        ExportError: it cannot convert the network.
    """
    convert = _module("bf16")
    with step("convert the network to bf16"), quiet():
        return convert.convert_to_f16(proto, low_precision_type="bf16", keep_io_types=keep_io)


def to_fp8(proto: Any, images: Images, *, keep_float: Sequence[str], rest: str) -> Any:
    """An `onnx.ModelProto` in fp8 (E4M3) by Q and DQ nodes, calibrated on images [N, C, H, W]; the rest in `rest`.

    Raises:
        MissingError: nvidia-modelopt is not installed.
        ExportError: it cannot convert the network.
    """
    quantization = _module("fp8")
    with step("convert the network to fp8"), quiet(), tempfile.TemporaryDirectory() as folder:
        import onnx

        source, target = Path(folder) / "fp32.onnx", Path(folder) / "fp8.onnx"
        onnx.save(proto, source)
        quantization.quantize(
            str(source),
            quantize_mode="fp8",
            calibration_data={INPUT: images},
            calibration_method="max",
            calibration_eps=["cpu"],
            nodes_to_exclude=list(keep_float),
            high_precision_dtype=rest,
            output_path=str(target),
        )
        return onnx.load(target)


def _module(precision: str) -> Any:
    try:
        return importlib.import_module(MODULES[precision])
    except ImportError as error:
        raise MissingError(
            f"{precision} needs NVIDIA's Model Optimizer; in an environment of its own, since its versions conflict "
            "with ours, run: pip install 'nvidia-modelopt[onnx]'"
        ) from error
