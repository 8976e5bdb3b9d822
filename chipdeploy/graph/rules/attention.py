"""Products of activations. What is summed over cannot be cut by a consumer's weight, so heads are cut whole."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, LayerUse, Tracing, argument, rule, shape
from chipdeploy.graph.rules.elementwise import meet
from chipdeploy.graph.rules.linear import NONE, _linear

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@rule("matmul", "mm", "bmm")
def matmul(tracing: Tracing, node: Node) -> Ints | None:
    """[..., i, k] · [..., k, j]; with a parameter [k, j] on the right it is a linear layer."""
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    if tracing.is_parameter(right) and len(shape(right)) == 2 and len(shape(left)) > 1:
        return _linear(tracing, node, left, right, None, (1, 0))
    ranks = len(shape(left)), len(shape(right))
    if min(ranks) < 2:
        raise Denied("multiplies vectors")
    batch = LETTERS[: max(ranks) - 2]
    one = batch[len(batch) - ranks[0] + 2 :] + "xz"
    other = batch[len(batch) - ranks[1] + 2 :] + "zy"
    return product(tracing, node, [(left, one), (right, other)], batch + "xy")


@rule("einsum")
def einsum(tracing: Tracing, node: Node) -> Ints | None:
    """Any equation with one letter a dimension."""
    equation = str(node.args[0]).replace(" ", "")
    operands = cast("list[Node]", node.args[1])
    if "." in equation or "->" not in equation or len(operands) != 2:
        raise Denied(f"the equation {equation} is not of the form 'ab,bc->ac'")
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    if any(len(set(term)) < len(term) for term in (*terms, output)):
        raise Denied(f"the equation {equation} takes a diagonal")
    return product(tracing, node, list(zip(operands, terms, strict=True)), output)


def product(tracing: Tracing, node: Node, operands: list[tuple[Node, str]], output: str) -> Ints | None:
    """Sum over the letters that the output lacks; the other dimensions meet as in an elementwise product."""
    extents = dict(zip(output, shape(node), strict=True))
    result: Ints | None = None
    sizes: tuple[int, ...] | None = None
    summed = 1
    for operand, letters in operands:
        gone = [axis for axis, letter in enumerate(letters) if letter not in extents]
        summed = max(summed, int(np.prod([shape(operand)[axis] for axis in gone])))
        flow = tracing.mixed(operand, gone, "sums over")
        if flow is not None:
            kept = [letters.index(letter) for letter in output if letter in letters]
            dims = [letters.index(letter) if letter in letters else None for letter in output]
            flow = flow.transpose(kept + gone).reshape([1 if d is None else flow.shape[d] for d in dims])
        own = tuple(shape(operand)[letters.index(letter)] if letter in letters else 1 for letter in output)
        if sizes is None:
            result, sizes = flow, own
        else:
            result = _heads(tracing, (result, sizes), (flow, own))
    _tally(tracing, node, result, summed)
    return result


def _heads(
    tracing: Tracing, left: tuple[Ints | None, tuple[int, ...]], right: tuple[Ints | None, tuple[int, ...]]
) -> Ints | None:
    """Channels of one operand that the other lacks would need gates on activations: they join its units."""
    (a, _), (b, _) = left, right
    if a is not None and b is not None:
        return tracing.labels.reduced(tracing.labels.unite(a, b))
    return meet(tracing, left, right)


@rule("scaled_dot_product_attention")
def attention(tracing: Tracing, node: Node) -> Ints | None:
    """softmax(q kᵀ / √d + mask) v with [..., heads, tokens, width]: the labels of the heads, all else whole."""
    q, k, v = (cast(Node, arg) for arg in node.args[:3])
    if argument(node, 7, "enable_gqa", False):
        raise Denied("shares keys between heads")
    rank = len(shape(q))
    flows = [tracing.mixed(part, (rank - 2, rank - 1), "mixes") for part in (q, k, v)]
    if any(flow is None for flow in flows):
        raise Denied("one of its inputs has no channel labels")
    heads = flows[0]
    for flow in flows[1:]:
        heads = tracing.labels.unite(cast(Ints, heads), cast(Ints, flow))
    mask = argument(node, 3, "attn_mask")
    result: Ints | None = tracing.labels.reduced(cast(Ints, heads))
    sizes = shape(node)
    if isinstance(mask, Node):
        ones = (1,) * (rank - len(shape(mask)))
        bias = tracing.mixed(mask, range(len(shape(mask)) - 2, len(shape(mask))), "mixes")
        padded = None if bias is None else bias.reshape(ones + bias.shape)
        result = meet(tracing, (result, sizes), (padded, ones + shape(mask)))
    _tally(tracing, node, result, shape(k)[-2] + shape(q)[-1] * shape(k)[-2] // shape(v)[-1])
    return result


def _tally(tracing: Tracing, node: Node, flow: Ints | None, summed: int) -> None:
    """The MACs of a product: its elements times what is summed over, by the classes of its channels."""
    elements = int(np.prod(shape(node), dtype=np.int64)) // tracing.batch
    labels = tracing.labels.new(1) if flow is None else flow.reshape(-1)
    if flow is None:
        tracing.labels.pin(labels, "a product without channel labels")
    path, _ = tracing.owner(node)
    each = elements // len(labels)
    tracing.layers.append(LayerUse(node, path, labels, NONE, each, float(summed), mult=True))
