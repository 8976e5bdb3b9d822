"""Where an ONNX file parts from what it was made from: the first tensor of one name that differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chipdeploy.copying import copied, in_mode
from chipdeploy.engines.base import Images
from chipdeploy.export.probe import all_outputs

if TYPE_CHECKING:
    from torch import nn

TINY = 1e-12


def first_divergence(reference: Path, path: Path, images: Images, tolerance: float) -> str:
    """A sentence that names the first layer of `path` whose output differs from that of `reference`, an ONNX file.

    Compared are tensors that bear one name in both, in the order in which they are computed: conversions keep the names
    of the layers.

    Args:
        images: float32 [N, C, H, W]; a few are enough.
        tolerance: largest difference of a value over the largest value of its tensor.

    Raises:
        MissingError, ExportError: ONNX Runtime is not installed, or cannot run one of the files.
    """
    expected = {name: values for name, (_, values) in _outputs(reference, images).items()}
    return _sentence(expected, _outputs(path, images).items(), tolerance)


def first_divergence_from_torch(model: nn.Module, path: Path, images: Images, tolerance: float) -> str:
    """The same against the traced module: its activations and sums keep their names in the file.

    Raises:
        MissingError, ExportError: as `first_divergence`.
    """
    import torch
    from torch import Tensor, fx

    expected: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                expected[n.name] = value.numpy()
            return value

    network, pixels = in_mode(copied(model).cpu().float()), torch.from_numpy(images)
    with torch.no_grad():
        Recorder(torch.export.export(network, (pixels,)).module()).run(pixels)
    return _sentence(expected, _outputs(path, images).items(), tolerance)


def _outputs(path: Path, images: Images) -> dict[str, tuple[str, Any]]:
    import onnx

    return next(all_outputs(onnx.load(path), images))


def _sentence(expected: Mapping[str, Any], got: Iterable[tuple[str, tuple[str, Any]]], tolerance: float) -> str:
    worst = 0.0
    for name, (node, values) in got:
        known = expected.get(name)
        if known is None or known.shape != values.shape or not np.issubdtype(values.dtype, np.floating):
            continue
        difference = float(np.abs(known - values.astype(np.float32)).max()) / max(TINY, float(np.abs(known).max()))
        if not difference <= tolerance:
            return f"the first layer that differs is {node}, by {difference:.2g} of its largest value"
        worst = max(worst, difference)
    return f"no single layer differs by more than {worst:.2g}: the error adds up, or arises where names are not kept"
