"""Where two ONNX files of one network part: the first tensor of one name that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chipdeploy.engines.base import Images
from chipdeploy.export.probe import all_outputs

TINY = 1e-12


def first_divergence(reference: Path, path: Path, images: Images, tolerance: float) -> str:
    """A sentence that names the first layer of `path` whose output differs from that of `reference`.

    Both run in ONNX Runtime with all tensors as outputs; compared are those that bear one name in both, in the order in
    which they are computed: conversions keep the names of the layers.

    Args:
        images: float32 [N, C, H, W]; a few are enough.
        tolerance: largest difference of a value over the largest value of its tensor.

    Raises:
        MissingError, ExportError: ONNX Runtime is not installed, or cannot run one of the files.
    """
    import onnx

    ours, theirs = (next(all_outputs(onnx.load(file), images)) for file in (path, reference))
    worst = 0.0
    for name, (node, values) in ours.items():
        expected = theirs.get(name, ("", None))[1]
        if expected is None or expected.shape != values.shape or not np.issubdtype(values.dtype, np.floating):
            continue
        largest = max(TINY, float(np.abs(expected).max()))
        difference = float(np.abs(expected - values.astype(np.float32)).max()) / largest
        if not difference <= tolerance:
            return f"the first layer that differs is {node}, by {difference:.2g} of its largest value"
        worst = max(worst, difference)
    return f"no single layer differs by more than {worst:.2g}: the error adds up over all"
