"""Reshapes, permutations and copies: labels move with their dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, Doubt, SizeUse, Tracing, argument, numbers, op_name, rule, shape
from chipdeploy.graph.rules.elementwise import meet

STATE_NO_SIZES = frozenset({"squeeze", "unsqueeze", "flatten", "expand_dims", "view_as", "reshape_as"})


@rule(
    "flatten",
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "unflatten",
    "_unsafe_view",
    "squeeze",
    "unsqueeze",
    "expand_dims",
)
def reshape(tracing: Tracing, node: Node) -> Ints | None:
    """Dimensions are split and merged in blocks; what is left of a split one after the cut must be a grid again."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flow(source)
    if flow is None or shape(source) == shape(node):
        return _told(tracing, node, source, flow)
    result = reshaped(tracing, flow, shape(source), shape(node))
    return _told(tracing, node, source, result)


@rule("view_as", "reshape_as")
def reshape_as(tracing: Tracing, node: Node) -> Ints | None:
    """As many channels as another tensor has: they are one with its own."""
    own = cast("Ints | None", reshape(tracing, node))
    return meet(tracing, (own, shape(node)), (tracing.flow(node.args[1]), shape(node)))


def reshaped(tracing: Tracing, flow: Ints, before: tuple[int, ...], after: tuple[int, ...]) -> Ints:
    """Labels of a tensor of shape `before`, viewed as `after`."""
    if 0 in before:
        raise Denied("reshapes an empty tensor")
    for old, new in blocks(before, after):
        if all(flow.shape[axis] == 1 for axis in old):
            continue
        if len(new) > 1:
            # The grid alone: labels along the block's dimensions, the others of no concern to it.
            whole = np.broadcast_to(flow, [before[a] if a in old else flow.shape[a] for a in range(len(before))])
            rest = [a for a in range(len(before)) if a not in old]
            grid = whole.transpose(*rest, *old).reshape(-1, *(after[a] for a in new))
            if len(rest) == 0 or all(flow.shape[a] == 1 for a in rest):
                grid = grid[0]
            tracing.grids.append(np.ascontiguousarray(grid))
    full = [1] * len(before)
    target = [1] * len(after)
    for old, new in blocks(before, after):
        if any(flow.shape[axis] > 1 for axis in old):
            for axis in old:
                full[axis] = before[axis]
            for axis in new:
                target[axis] = after[axis]
    return tracing.labels.reduced(np.broadcast_to(flow, full).reshape(target))


def blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions that hold the same elements in both shapes. Sizes are 1 or more."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        left = right = 1
        if i < len(before):
            old, left, i = [i], before[i], i + 1
        if j < len(after):
            new, right, j = [j], after[j], j + 1
        while left != right:
            if left < right:
                old.append(i)
                left, i = left * before[i], i + 1
            else:
                new.append(j)
                right, j = right * after[j], j + 1
        yield old, new


def _told(tracing: Tracing, node: Node, source: Node, flow: Ints | None) -> Ints | None:
    """Note the sizes along labelled dimensions that the code states, by number or attribute."""
    if flow is None or op_name(node) in STATE_NO_SIZES:
        return flow
    path, _ = tracing.owner(node)
    stated = argument(node, 2 if op_name(node) == "unflatten" else 1, "size")
    first = cast(int, node.args[1]) % len(shape(source)) if op_name(node) == "unflatten" else 0
    for place, size in enumerate(cast("Sequence[object]", stated)):
        axis = first + place
        if isinstance(size, int) and size != -1 and flow.shape[axis] > 1:
            tracing.sizes.append(SizeUse(path, flow, axis, size))
            tracing.doubts.append(Doubt(path, flow))
    return flow


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "numpy_T", "mT")
def permute(tracing: Tracing, node: Node) -> Ints | None:
    """Labels are permuted alike."""
    flow = tracing.flow(node.args[0])
    return None if flow is None else flow.transpose(_order(node))


def _order(node: Node) -> list[int]:
    """Where every dimension of the result comes from."""
    name = op_name(node)
    rank = len(shape(node))
    if name == "permute":
        return [dim % rank for dim in numbers(node.args[1])]
    order = list(range(rank))
    if name == "movedim":
        sources, targets = ([dim % rank for dim in numbers(arg)] for arg in node.args[1:3])
        order = [dim for dim in order if dim not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
        return order
    if name == "numpy_T":
        return order[::-1]
    a, b = numbers(list(node.args[1:3])) if name in ("transpose", "swapaxes", "swapdims") else (-2 % rank, -1)
    order[a], order[b] = order[b], order[a]
    return order


@rule("expand", "expand_as", "broadcast_to")
def expand(tracing: Tracing, node: Node) -> Ints | None:
    """Copies along new dimensions and along those of size 1."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flow(source)
    if flow is None:
        return None
    ones = (1,) * (len(shape(node)) - len(shape(source)))
    grown = any(a == 1 < b for a, b in zip(shape(source), shape(node)[len(ones) :], strict=True))
    if flow.size == 1 and grown and not ones:
        tracing.labels.pin(flow, "is one channel that is expanded to many")
    flow = flow.reshape(ones + flow.shape)
    return _told(tracing, node, node, flow) if op_name(node) == "expand" else flow


@rule("repeat", "tile")
def repeat(tracing: Tracing, node: Node) -> Ints | None:
    """Copies of the whole tensor, one after the other along each dimension."""
    flow = tracing.flow(node.args[0])
    if flow is None:
        return None
    times = numbers(node.args[1])
    ones = (1,) * (len(times) - flow.ndim)
    flow = flow.reshape(ones + flow.shape)
    return tracing.labels.reduced(
        np.tile(flow, [n if size > 1 else 1 for n, size in zip(times, flow.shape, strict=True)])
    )


@rule("pixel_shuffle")
def pixel_shuffle(tracing: Tracing, node: Node) -> Ints | None:
    """[N, C·r², H, W] ▶ [N, C, H·r, W·r]: the r² channels of one output channel are a unit."""
    labels = tracing.channels(node.args[0], 1)
    factor = cast(int, node.args[1])
    return tracing.labels.merge(labels.reshape(-1, factor * factor), 1).reshape(1, -1, 1, 1)


@rule("pixel_unshuffle")
def pixel_unshuffle(tracing: Tracing, node: Node) -> Ints | None:
    """[N, C, H, W] ▶ [N, C·r², H/r, W/r]: every label r² times."""
    labels = tracing.channels(node.args[0], 1)
    return np.repeat(labels, cast(int, node.args[1]) ** 2).reshape(1, -1, 1, 1)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tracing: Tracing, node: Node) -> Ints | None:
    """[g, C/g] ▶ [C/g, g]: the same channels of each group."""
    labels = tracing.channels(node.args[0], 1)
    groups = cast(int, node.args[1])
    # The number of groups is the code's own: it stays, and the groups keep the same channels.
    kept = tracing.labels.merge(labels.reshape(groups, -1), 0)
    return np.repeat(kept.reshape(-1), groups).reshape([-1 if dim == 1 else 1 for dim in range(len(shape(node)))])


@rule("roll")
def roll(tracing: Tracing, node: Node) -> Ints | None:
    """Along dimensions without channels."""
    source = node.args[0]
    assert isinstance(source, Node)
    dims = numbers(node.args[2]) if len(node.args) > 2 else []
    if not dims:
        raise Denied("rolls the flattened tensor")
    return tracing.mixed(source, dims, "rolls")


@rule("flip")
def flip(tracing: Tracing, node: Node) -> Ints | None:
    """Backwards; so are the labels."""
    flow = tracing.flow(node.args[0])
    return None if flow is None else np.flip(flow, tuple(numbers(node.args[1])))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(tracing: Tracing, node: Node) -> Ints | None:
    """Zero channels before and after (option-A shortcuts) get labels of their own, which the sum then joins.

    How many zeros to add after the cut must be an attribute of the module: `before` and `after`.
    """
    source, amounts = node.args[0], numbers(node.args[1])
    assert isinstance(source, Node)
    flow = tracing.flow(source)
    if flow is None:
        return None
    rank = len(shape(source))
    padded = {rank - 1 - pair: (amounts[2 * pair], amounts[2 * pair + 1]) for pair in range(len(amounts) // 2)}
    axes = [axis for axis, pair in padded.items() if any(pair) and flow.shape[axis] > 1]
    if not axes:
        return flow
    if len(axes) > 1 or flow.size > flow.shape[axes[0]]:
        raise Denied("pads several dimensions of channels")
    if (op_name(node) == "pad" and len(node.args) > 2 and node.args[2] != "constant") or "reflect" in op_name(node):
        raise Denied("pads channels with copies of others")
    before, after = padded[axes[0]]
    path, module = tracing.owner(node)
    if (getattr(module, "before", None), getattr(module, "after", None)) != (before, after):
        raise Denied("pads channels by numbers written in the code; give its module the attributes before and after")
    head, tail = tracing.labels.new(before), tracing.labels.new(after)
    tracing.count(path, "before", head)
    tracing.count(path, "after", tail)
    joined = np.concatenate([head, flow.reshape(-1), tail])
    return joined.reshape([-1 if axis == axes[0] else 1 for axis in range(rank)])
