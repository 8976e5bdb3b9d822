"""Which layers suffer most from int8, and keeping those in float until the network agrees well enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chipdeploy.engines.base import Images
from chipdeploy.errors import UsageError
from chipdeploy.export.precision import DEFAULTS, PrecisionOptions, int8_ranges, load_float
from chipdeploy.export.probe import Agreement, logits
from chipdeploy.export.quantize import quantisable, quantize


@dataclass(frozen=True)
class LayerSensitivity:
    """What int8 in one layer does to the logits.

    Args:
        name: the layer's node in the ONNX file.
        sqnr_db: power of the logits over that of their error, in decibels, where only this layer is quantised; infinite
            where it changes nothing.
    """

    name: str
    sqnr_db: float


@dataclass(frozen=True)
class Kept:
    """Layers to keep in float.

    Args:
        keep_float: their names, worst first: for `PrecisionOptions`.
        agreement: of the int8 network with the fp32 one, with these kept.
        met: whether that is what was asked for.
    """

    keep_float: tuple[str, ...]
    agreement: Agreement
    met: bool

    def options(self, options: PrecisionOptions) -> PrecisionOptions:
        """The same options with these layers kept."""
        return replace(options, keep_float=self.keep_float)


def sensitivity(
    source: Path,
    images: Images,
    *,
    options: PrecisionOptions = DEFAULTS,
) -> list[LayerSensitivity]:
    """Every layer that int8 takes, the worst first: each is quantised alone, and the network run once on all images.

    Args:
        source: an fp32 file of `export_onnx`.
        images: [N, C, H, W] float32, normalised. The cost is one run over them a layer.
        options: of calibration; layers of `keep_float` are left out, the rest is fp32.

    Raises:
        as `chipdeploy.export.precision.convert`.
    """
    proto = load_float(source, images, options)
    return _ranked(proto, images, int8_ranges(proto, images, options), logits(proto, images), options)


def keep_worst(
    source: Path,
    images: Images,
    *,
    min_top1: float = 0.0,
    min_sqnr_db: float = 0.0,
    limit: int = 3,
    options: PrecisionOptions = DEFAULTS,
) -> Kept:
    """Keep the worst layers in float, one by one, until int8 agrees with fp32 on the images, or `limit` are kept.

    Args:
        source: an fp32 file of `export_onnx`.
        images: [N, C, H, W] float32, normalised.
        min_top1: share of images, 0 to 1, that must get the same class.
        min_sqnr_db: least ratio of the logits to their error, in decibels.
        limit: most layers to keep beside those of `options.keep_float`.

    Raises:
        UsageError: nothing to meet, or a value outside its range.
        as `chipdeploy.export.precision.convert`.
    """
    if not (0 <= min_top1 <= 1 and min_sqnr_db >= 0 and limit >= 0) or min_top1 == min_sqnr_db == 0:
        raise UsageError(
            f"min_top1 must be 0 to 1, min_sqnr_db and limit not negative, and one of the first two above 0, "
            f"got {min_top1}, {min_sqnr_db} and {limit}; try 0.99, 0 and 3"
        )
    proto = load_float(source, images, options)
    ranges, expected = int8_ranges(proto, images, options), logits(proto, images)
    layers, kept = _layers(proto, options), list(options.keep_float)
    worst: list[LayerSensitivity] | None = None
    while True:
        agreement = Agreement.of(expected, logits(quantize(proto, ranges, layers), images))
        met = agreement.top1 >= min_top1 and _decibels(agreement) >= min_sqnr_db
        # One layer is left in int8 in any case: a network without any is another precision.
        if met or len(kept) - len(options.keep_float) == limit or len(layers) == 1:
            return Kept(tuple(kept), agreement, met)
        # Late: most networks meet their aim as they are.
        worst = worst or _ranked(proto, images, ranges, expected, options)
        kept.append(worst.pop(0).name)
        layers.remove(kept[-1])


def _ranked(
    proto: Any, images: Images, ranges: Any, expected: Images, options: PrecisionOptions
) -> list[LayerSensitivity]:
    found = [
        LayerSensitivity(name, _decibels(Agreement.of(expected, logits(quantize(proto, ranges, [name]), images))))
        for name in _layers(proto, options)
    ]
    return sorted(found, key=lambda layer: (layer.sqnr_db, layer.name))


def _layers(proto: Any, options: PrecisionOptions) -> list[str]:
    return [name for name in quantisable(proto) if name not in options.keep_float]


def _decibels(agreement: Agreement) -> float:
    return math.inf if agreement.sqnr_db is None else agreement.sqnr_db
