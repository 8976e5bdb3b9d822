"""Ops that never mix channels. A gate stands on the consumers' weights, so f(0) ≠ 0 does no harm here."""

from __future__ import annotations

from torch.fx import Node

from chipdeploy.graph.labels import Flow
from chipdeploy.graph.rules.base import Denied, Tracing, rule, shape

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
    return tracing.flows.get(node.args[0])


@rule("add", "sub", "mul", "div", "maximum", "minimum")
def binary(tracing: Tracing, node: Node) -> Flow | None:
    """Equal shapes along the channels: both sides become one. A scalar passes the labels of the other side."""
    operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
    known = [(arg, flow) for arg in operands if (flow := tracing.flows.get(arg)) is not None]
    if len(operands) == 1:
        return known[0][1] if known else None
    if len(known) < 2:
        raise Denied("one operand has no channel labels")
    (left, a), (right, b) = known
    if len(shape(left)) != len(shape(right)) or a.dim != b.dim:
        raise Denied("its operands have their channels along different dimensions")
    if len(a.labels) != len(b.labels):
        raise Denied("broadcasts one channel over many")
    return Flow(a.dim, tracing.labels.unite(a.labels, b.labels))
