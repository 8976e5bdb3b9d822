"""Where two ONNX files of one network part: the first tensor of one name that differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chipdeploy.engines.base import Images

FAR = 1e-12


def first_divergence(reference: Path, path: Path, images: Images, tolerance: float) -> str:
    """A sentence that names the first layer of `path` whose output differs from that of `reference`.

    Both run in ONNX Runtime with all tensors as outputs; compared are those that bear one name in both, in the order in
    which they are computed: conversions keep the names of the layers.

    Args:
        images: float32 [N, C, H, W]; a few are enough.
        tolerance: largest difference of a value over the largest value of its tensor.
    """
    import numpy as np

    ours, theirs = _all_outputs(path, images), _all_outputs(reference, images)
    worst = 0.0
    for name, (kind, values) in ours.items():
        expected = theirs.get(name, ("", None))[1]
        if expected is None or expected.shape != values.shape or not np.issubdtype(values.dtype, np.floating):
            continue
        difference = float(np.abs(expected - values.astype(np.float32)).max() / max(FAR, float(np.abs(expected).max())))
        if not difference <= tolerance:
            return f"the first layer that differs is {kind} {name!r}, by {difference:.2g} of its largest value"
        worst = max(worst, difference)
    return f"no single layer differs by more than {worst:.2g}: the error adds up over all"


def _all_outputs(path: Path, images: Images) -> dict[str, tuple[str, Any]]:
    """Tensor name ▶ (operator, values), in the order of the graph."""
    import onnx
    import onnxruntime as ort

    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
    kinds = {name: node.op_type for node in proto.graph.node for name in node.output if name in types}
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(types[name] for name in kinds if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused layers have no outputs
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(kinds)
    return {
        name: (kinds[name], values)
        for name, values in zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True)
    }
