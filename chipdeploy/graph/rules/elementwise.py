"""Ops that never mix channels. A gate stands on the consumers' weights, so f(0) ≠ 0 does no harm here."""

from __future__ import annotations

from math import isclose, sqrt

from torch.fx import Node

from chipdeploy.graph.labels import Flow
from chipdeploy.graph.rules.base import Denied, Tracing, op_name, rule, shape, tensor_arguments

UNARY = (
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "hardsigmoid",
    "hardswish",
    "tanh",
    "softplus",
    "clamp",
    "clamp_min",
    "dropout",
    "feature_dropout",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "abs",
    "neg",
    "exp",
    "sqrt",
    "square",
    "to",
)


@rule(*UNARY)
def unary(tracing: Tracing, node: Node) -> Flow | None:
    """Labels pass."""
    assert isinstance(node.args[0], Node)
    if len(tensor_arguments(node)) > 1:
        raise Denied("its limits are tensors")
    return tracing.flows.get(node.args[0])


@rule("add", "sub", "mul", "div", "maximum", "minimum")
def binary(tracing: Tracing, node: Node) -> Flow | None:
    """Equal shapes along the channels: both sides become one. A scalar passes the labels of the other side."""
    operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
    known = [(arg, flow) for arg in operands if (flow := tracing.flows.get(arg)) is not None]
    if len(operands) == 1:
        if known:
            _refuse_count(node, len(known[0][1].labels))
        return known[0][1] if known else None
    if len(known) < 2:
        raise Denied("one operand has no channel labels")
    (left, a), (right, b) = known
    if len(shape(left)) != len(shape(right)) or a.dim != b.dim:
        raise Denied("its operands have their channels along different dimensions")
    if len(a.labels) != len(b.labels):
        raise Denied("broadcasts one channel over many")
    return Flow(a.dim, tracing.labels.unite(a.labels, b.labels))


def _refuse_count(node: Node, channels: int) -> None:
    """`x / x.shape[1]` is traced as `x / 64` and would divide by another number after the cut."""
    numbers = [float(arg) for arg in node.args[:2] if isinstance(arg, int | float)]
    suspects = (channels, sqrt(channels), 1 / channels, 1 / sqrt(channels))
    if channels > 1 and op_name(node) in ("mul", "div") and any(isclose(n, s) for n in numbers for s in suspects):
        raise Denied(f"scales by a number that may come from the count of its {channels} channels")
