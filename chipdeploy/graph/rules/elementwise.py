"""Ops that never mix channels. A gate stands on the consumers' weights, so f(0) ≠ 0 does no harm here."""

from __future__ import annotations

from math import isclose, prod, sqrt

from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import ZERO_KEEPERS, Flow, Tracing, op_name, rule, shape, tensor_arguments

UNARY = (
    *sorted(ZERO_KEEPERS),
    "hardtanh",
    "sigmoid",
    "hardsigmoid",
    "softplus",
    "softsign",
    "log_sigmoid",
    "clamp",
    "clamp_min",
    "clamp_max",
    "alpha_dropout",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "sin",
    "cos",
    "rsqrt",
    "reciprocal",
    "erf",
    "sign",
    "round",
    "floor",
    "ceil",
    "_to_copy",
    "threshold",
    "hardshrink",
    "softshrink",
    "fill",
    "zero",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "logical_not",
    "lift_fresh_copy",
    "atan",
    "asinh",
    "cosh",
    "erfc",
    "frac",
    "isfinite",
    "isinf",
    "isnan",
    "log10",
    "log2",
    "logit",
    "nan_to_num",
    "sgn",
    "sinh",
    "tan",
    "trunc",
)
JOINING = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "where",
    "masked_fill",
    "copy",
    "lerp",
    "atan2",
    "fmod",
    "remainder",
    "pow",
    "addcmul",
    "addcdiv",
    "copysign",
    "floor_divide",
    "fmax",
    "fmin",
    "heaviside",
    "hypot",
    "xlogy",
)
COMPARING = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "__and",
    "__or",
    "__xor",
)


@rule(*UNARY)
def unary(tracing: Tracing, node: Node) -> Flow:
    """Labels pass; limits of several numbers join them."""
    if any(prod(shape(limit)) > 1 for limit in tensor_arguments(node) if limit is not node.args[0]):
        return join(tracing, node)
    return tracing.flow(node.args[0])


@rule("type_as")
def type_as(tracing: Tracing, node: Node) -> Ints | None:
    """Of the second tensor only the type is read."""
    return tracing.flow(node.args[0])


@rule("prelu")
def prelu(tracing: Tracing, node: Node) -> Ints | None:
    """One slope for all channels, or one for each along dimension 1."""
    slope = node.args[1]
    assert isinstance(slope, Node)
    if shape(slope) == (1,):
        return tracing.flow(node.args[0])
    labels = tracing.channels(node.args[0], 1)
    tracing.bind(node, slope, 0, labels)
    path, module = tracing.owner(node)
    if hasattr(module, "num_parameters"):
        tracing.count(path, "num_parameters", labels)
    return tracing.flow(node.args[0])


@rule(*JOINING, *COMPARING)
def join(tracing: Tracing, node: Node) -> Ints | None:
    """Operands of one shape become one, element by element; a scalar passes the labels of the other side."""
    operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Node)]
    rank = len(shape(node))
    result: Ints | None = None
    joined: tuple[int, ...] = ()
    for operand in operands:
        flow, sizes = _padded(tracing, operand, rank)
        if joined == ():
            result, joined = flow, sizes
        else:
            result = meet(tracing, (result, joined), (flow, sizes))
            joined = tuple(max(a, b) for a, b in zip(joined, sizes, strict=True))
    if result is not None and len(operands) == 1:
        _suspect_count(tracing, node, result)
    return result


def _padded(tracing: Tracing, node: Node, rank: int) -> tuple[Ints | None, tuple[int, ...]]:
    """Labels and sizes with leading dimensions of 1, as broadcasting sees them."""
    flow, sizes = tracing.flow(node), shape(node)
    ones = (1,) * (rank - len(sizes))
    return (None if flow is None else flow.reshape(ones + flow.shape)), ones + sizes


Operand = tuple["Ints | None", tuple[int, ...]]


def meet(tracing: Tracing, left: Operand, right: Operand) -> Ints | None:
    """Labels of an elementwise op on two operands of one rank, after broadcasting."""
    labels = tracing.labels
    for (flow, sizes), (_, others) in ((left, right), (right, left)):
        if flow is not None and flow.size == 1 and any(a == 1 < b for a, b in zip(sizes, others, strict=True)):
            labels.pin(flow, "is one channel that is broadcast over many")
    (a, a_sizes), (b, b_sizes) = left, right
    if a is None or b is None:
        known, sizes = (b, a_sizes) if a is None else (a, b_sizes)
        if known is not None and any(size > 1 for size, n in zip(sizes, known.shape, strict=True) if n > 1):
            labels.pin(known, "meets a tensor of fixed channels")
        return known
    if _over(a, a_sizes, b):
        return b
    if _over(b, b_sizes, a):
        return a
    both = labels.unite(a, b)
    return labels.reduced(both)


def _over(one: Ints, sizes: tuple[int, ...], many: Ints) -> bool:
    """Whether `one` is a single class that is broadcast along the channels of `many`."""
    spread = [size for size, n in zip(sizes, many.shape, strict=True) if n > 1]
    return one.size == 1 and bool(spread) and all(size == 1 for size in spread)


def _suspect_count(tracing: Tracing, node: Node, flow: Ints) -> None:
    """`x / x.shape[1]` is traced as `x / 64` and would divide by another number after the cut."""
    if op_name(node) not in ("mul", "div"):
        return
    values = [float(arg) for arg in node.args[:2] if isinstance(arg, int | float)]
    for axis, channels in enumerate(flow.shape):
        suspects = (channels, sqrt(channels), 1 / channels, 1 / sqrt(channels)) if channels > 1 else ()
        if any(isclose(n, s) for n in values for s in suspects):
            tracing.scales.append((tracing.owner(node)[0], flow, axis))
