"""The cost of layers and products whose rule refuses them: they stay as they are, and are counted all the same."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.rules.base import LayerUse, Tracing, argument, op_name, shape
from chipdeploy.graph.rules.linear import NONE

WEIGHTED = frozenset({"linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))})
PRODUCTS, ADDED = ("matmul", "mm", "bmm"), ("addmm", "baddbmm")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
COSTLY = {*WEIGHTED, *PRODUCTS, *ADDED, *RECURRENT, "einsum", "scaled_dot_product_attention"}


def is_costly(node: Node) -> bool:
    """Whether an op may take MACs."""
    return node.op == "call_function" and op_name(node) in COSTLY


def count_fixed(tracing: Tracing, node: Node, reason: str) -> None:
    """Add a layer of constant width for an op that PyTorch's counter counts; other ops cost no MACs."""
    macs = _macs(node)
    if macs is None:
        return
    path, _ = tracing.owner(node)
    elements = 1 if op_name(node) in RECURRENT else max(1, int(np.prod(shape(node), dtype=np.int64)))
    layer = op_name(node) in WEIGHTED
    channels = shape(node)[1 if "conv" in op_name(node) else -1] if layer else 1
    labels = np.repeat(tracing.labels.new(1), channels)
    tracing.labels.pin(labels, reason)
    positions = max(1, elements // (channels * tracing.batch))
    kernel = macs / (positions * channels * tracing.batch)
    tracing.layers.append(LayerUse(node, path, labels, NONE, positions, kernel, mult=not layer))


def _macs(node: Node) -> float | None:
    """Multiplications of the traced op, as torch.utils.flop_counter counts them (2 FLOPs are one)."""
    name = op_name(node)
    if name not in COSTLY:
        return None
    inputs = [arg for arg in node.args if isinstance(arg, Node)]
    elements = float(np.prod(shape(node))) if hasattr(node.meta.get("val"), "shape") else 0.0
    if name in WEIGHTED:
        each = float(np.prod(shape(inputs[1])[1:]))
        return each * float(np.prod(shape(inputs[0]))) if "transpose" in name else each * elements
    if name in PRODUCTS:
        return elements * shape(inputs[0])[-1]
    if name in ADDED:
        return elements * shape(inputs[1])[-1]
    if name == "einsum":
        return _einsum(node)
    if name in RECURRENT:
        return _recurrent(node)
    q, k, v = (shape(part) for part in inputs[:3])  # scaled_dot_product_attention
    return elements * k[-2] * (1 + q[-1] / v[-1])


def _recurrent(node: Node) -> float:
    """Every weight once a time step and sequence."""
    weights = [shape(part) for part in cast("list[Node]", node.args[2])]
    read = shape(cast(Node, node.args[0]))  # [N, T, C], or in another order
    return sum(float(np.prod(each)) for each in weights if len(each) == 2) * float(np.prod(read[:-1]))


def _einsum(node: Node) -> float | None:
    """The product of all sizes that the equation names."""
    operands = cast("list[Node]", argument(node, 1, "tensors"))
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    if len(operands) < 2 or "." in str(node.args[0]):
        return None
    sizes = {
        letter: size
        for term, part in zip(terms, operands, strict=True)
        for letter, size in zip(term, shape(part), strict=True)
    }
    return float(np.prod(list(sizes.values())))
