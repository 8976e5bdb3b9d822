"""TensorRT-RTX compiles no fp32 matrix product for Turing (sm75): linear layers are built as 1x1 convolutions there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

TURING = "sm75"
SPATIAL = "chipdeploy_spatial_axes"
QDQ = ("QuantizeLinear", "DequantizeLinear")


def linear_as_convolution(path: Path) -> bytes:
    """The ONNX file at `path` with every Gemm x Wᵀ + b over [N, C] as a convolution over [N, C, 1, 1]; same numbers.

    Weights that are quantised on their way to the layer are followed to where they lie. Other matrix products stay: the
    builder names them.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    graph = proto.graph
    weights = _Weights(graph)
    nodes = [part for node in graph.node for part in (_convolution(node) if weights.widen(node) else [node])]
    if len(nodes) != len(graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), SPATIAL))
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]  # the shapes of the weights are no longer those that it states
    content: bytes = proto.SerializeToString()
    return content


class _Weights:
    """The initializers of a graph, and how they reach the layers that read them."""

    def __init__(self, graph: Any) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers = Counter(name for node in graph.node for name in node.input)

    def widen(self, node: Any) -> bool:
        """Give the weight of a plain linear layer two dimensions more; False where `node` is none, or shares it."""
        from onnx import numpy_helper

        if node.op_type != "Gemm" or not _plain(node):
            return False
        name = node.input[1]
        while self._readers[name] == 1 and name in self._makers and self._makers[name].op_type in QDQ:
            name = self._makers[name].input[0]
        if self._readers[name] != 1 or name not in self._tensors:
            return False
        tensor = self._tensors[name]
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values[:, :, None, None].copy(), name))
        return True


def _convolution(node: Any) -> list[Any]:
    from onnx import helper

    wide, narrow = f"{node.output[0]}_wide", f"{node.output[0]}_out"
    return [
        helper.make_node("Unsqueeze", [node.input[0], SPATIAL], [wide]),
        helper.make_node("Conv", [wide, *node.input[1:]], [narrow], name=node.name),
        helper.make_node("Squeeze", [narrow, SPATIAL], [node.output[0]]),
    ]


def _plain(node: Any) -> bool:
    """x Wᵀ + b, as torch's linear layers are exported; the scales of quantised weights then belong to rows."""
    ones = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return bool(ones and _attribute(node, "transB", 0) and not _attribute(node, "transA", 0))


def _attribute(node: Any, name: str, default: float) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
