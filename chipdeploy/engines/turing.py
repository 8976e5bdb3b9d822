"""TensorRT-RTX compiles no fp32 matrix product for Turing (sm75): linear layers are built as 1x1 convolutions there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TURING = "sm75"
SPATIAL = "chipdeploy_spatial_axes"


def linear_as_convolution(path: Path) -> bytes:
    """The ONNX file at `path` with every Gemm x Wᵀ + b over [N, C] as a convolution over [N, C, 1, 1]; same numbers.

    Other matrix products stay: the builder names them.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "Gemm" and _plain(node) and node.input[1] in weights:
            weight = weights[node.input[1]]
            values = numpy_helper.to_array(weight)
            columns = values if _attribute(node, "transB", 0) else values.T
            kernel = f"{node.name}_kernel"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(columns)[:, :, None, None], kernel))
            nodes += _convolution(node, kernel)
        else:
            nodes.append(node)
    if len(nodes) != len(graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), SPATIAL))
        del graph.node[:]
        graph.node.extend(nodes)
    content: bytes = proto.SerializeToString()
    return content


def _convolution(node: Any, kernel: str) -> list[Any]:
    from onnx import helper

    wide, narrow = f"{node.output[0]}_wide", f"{node.output[0]}_out"
    return [
        helper.make_node("Unsqueeze", [node.input[0], SPATIAL], [wide]),
        helper.make_node("Conv", [wide, kernel, *node.input[2:]], [narrow], name=node.name),
        helper.make_node("Squeeze", [narrow, SPATIAL], [node.output[0]]),
    ]


def _plain(node: Any) -> bool:
    ones = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return bool(ones and not _attribute(node, "transA", 0))


def _attribute(node: Any, name: str, default: float) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
