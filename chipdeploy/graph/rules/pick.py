"""Putting tensors together and taking them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, Doubt, SizeUse, Tracing, argument, rule, shape

MOST_PARTS = 4  # a slice at a fraction of the channels is taken for a chunk up to this many parts


@rule("cat", "concat", "concatenate")
def cat(tracing: Tracing, node: Node) -> Ints | None:
    """Along the channels: spans one after the other. Along another dimension: the operands become one."""
    parts = cast("Sequence[Node]", node.args[0])
    rank = len(shape(node))
    dim = cast(int, argument(node, 1, "dim", 0)) % rank
    parts = [part for part in parts if len(shape(part)) == rank]  # torch lets [0] tensors be joined to any
    flows = [tracing.flow(part) for part in parts]
    elsewhere = [f for f in flows if f is not None and any(n > 1 for axis, n in enumerate(f.shape) if axis != dim)]
    if not elsewhere:
        labels = [tracing.channels(part, dim) for part in parts]
        return tracing.labels.reduced(
            np.concatenate(labels).reshape([-1 if axis == dim else 1 for axis in range(rank)])
        )
    first = elsewhere[0] if elsewhere[0].shape[dim] == 1 else tracing.labels.merge(elsewhere[0], dim)
    for flow in flows:
        if flow is None:
            tracing.labels.pin(first, "is joined to a tensor of fixed channels")
        else:
            first = tracing.labels.unite(*np.broadcast_arrays(first, tracing.labels.merge(flow, dim)))
    return tracing.labels.reduced(first)


@rule("stack")
def stack(tracing: Tracing, node: Node) -> Ints | None:
    """Along a new dimension: the operands become one."""
    parts = cast("Sequence[Node]", node.args[0])
    flows = [tracing.flow(part) for part in parts]
    known = [flow for flow in flows if flow is not None]
    if not known:
        return None
    first = known[0]
    for flow in known[1:]:
        first = tracing.labels.unite(*np.broadcast_arrays(first, flow))
    if len(known) < len(flows):
        tracing.labels.pin(first, "is stacked on a tensor of fixed channels")
    dim = cast(int, argument(node, 1, "dim", 0)) % len(shape(node))
    return np.expand_dims(tracing.labels.reduced(first), dim)


@rule("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "split_with_sizes")
def split(tracing: Tracing, node: Node) -> list[Ints | None]:
    """Parts of the channels. Equal ones stay equal: the same channels of each part are one."""
    source = node.args[0]
    assert isinstance(source, Node)
    parts = [tuple(part.shape) for part in node.meta["val"]]
    flow = tracing.flow(source)
    dim = cast(int, argument(node, 2, "dim", 0)) % len(shape(source))
    if flow is None or flow.shape[dim] == 1:
        return [flow] * len(parts)
    widths = [int(part[dim]) for part in parts]
    axis_first = np.moveaxis(flow, dim, 0)
    pieces = np.split(axis_first, np.cumsum(widths)[:-1])
    if len(parts) == 1:
        return [flow]
    if len(set(widths)) > 1:
        raise Denied(f"splits the channels in parts of {widths}, by numbers")
    if flow.size > flow.shape[dim]:
        pieces = [tracing.labels.merge(axis_first, 0)] * len(parts)
        return [tracing.labels.reduced(np.moveaxis(piece, 0, dim)) for piece in pieces]
    tracing.labels.merge(flow.reshape(len(parts), -1), 0)  # how many parts there are is the code's own: it stays
    path, _ = tracing.owner(node)
    for piece in pieces:
        if not isinstance(node.args[1], int) or node.args[1] == widths[0]:
            tracing.sizes.append(SizeUse(path, np.moveaxis(piece, 0, dim), dim, widths[0]))
    tracing.doubts.append(Doubt(path, flow))
    return [np.moveaxis(piece, 0, dim) for piece in pieces]


@rule("glu")
def gated_half(tracing: Tracing, node: Node) -> Ints | None:
    """The first half times the sigmoid of the second: the same channels of both are one."""
    source = node.args[0]
    assert isinstance(source, Node)
    dim = cast(int, argument(node, 1, "dim", -1)) % len(shape(source))
    flow = tracing.flow(source)
    if flow is None or flow.shape[dim] == 1:
        return flow
    if flow.size > flow.shape[dim]:
        raise Denied("halves channels that lie along several dimensions")
    halves = tracing.labels.merge(flow.reshape(2, -1), 0)
    return np.reshape(halves[0], [-1 if axis == dim else 1 for axis in range(flow.ndim)])


@rule("getitem")
def getitem(tracing: Tracing, node: Node) -> Ints | None:
    """One of an op's results."""
    source, number = node.args[:2]
    flows = tracing.flows.get(cast(Node, source))
    return flows[cast(int, number)] if isinstance(flows, list) else None


@rule("unbind")
def unbind(tracing: Tracing, node: Node) -> list[Ints | None]:
    """All parts along a dimension, which goes; see `select`."""
    dim = cast(int, argument(node, 1, "dim", 0))
    flow = _one_of(tracing, node, dim)
    return [flow] * len(node.meta["val"])


@rule("select")
def select(tracing: Tracing, node: Node) -> Ints | None:
    """One part along a dimension, which goes. Where it is one of several that tell channels apart (queries, keys and
    values), the parts become one."""
    return _one_of(tracing, node, cast(int, node.args[1]))


def _one_of(tracing: Tracing, node: Node, dim: int) -> Ints | None:
    source = node.args[0]
    assert isinstance(source, Node)
    dim %= len(shape(source))
    flow = tracing.mixed(source, [dim], "picks one of")
    return None if flow is None else tracing.labels.reduced(np.squeeze(flow, dim))


@rule("slice", "narrow")
def take(tracing: Tracing, node: Node) -> Ints | None:
    """A run of the channels, up to a number that is an attribute of the module, or a fraction of them all."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flow(source)
    dim = cast(int, argument(node, 1, "dim", 0)) % len(shape(source))
    if flow is None or flow.shape[dim] == 1 or shape(node) == shape(source):
        return flow
    if flow.size > flow.shape[dim]:
        return tracing.mixed(source, [dim], "slices")
    size, length = shape(source)[dim], shape(node)[dim]
    start = cast(int, argument(node, 2, "start", 0) or 0)
    start = min(size, start + size if start < 0 else start)
    if argument(node, 4, "step", 1) != 1 and "slice" in str(node.target):
        raise Denied("takes every n-th of the channels")
    path, _ = tracing.owner(node)
    labels = flow.reshape(-1)
    for border in {start, start + length} - {0, size}:
        _border(tracing, path, labels, border)
    tracing.doubts.append(Doubt(path, flow))
    return labels[start : start + length].reshape([-1 if axis == dim else 1 for axis in range(flow.ndim)])


def _border(tracing: Tracing, path: str, labels: Ints, border: int) -> None:
    """Where a slice ends: an attribute that follows the cut, or a fraction, whose parts must stay equal."""
    module = tracing.model.get_submodule(path)
    if attribute_of(module, border) is not None:
        tracing.sizes.append(SizeUse(path, labels[:border], 0, border, sure=True))
        return
    parts = next(
        (n for n in range(2, MOST_PARTS + 1) if len(labels) % n == 0 and border % (len(labels) // n) == 0), None
    )
    if parts is None:
        raise Denied(f"takes channels up to {border}, a number written in the code; make it an attribute of the module")
    tracing.labels.merge(labels.reshape(parts, -1), 0)


def attribute_of(module: torch.nn.Module, value: int, *, heads: bool = False) -> str | None:
    """The module's attribute that states a number of channels of this value, by the names that models use."""
    names = [
        name
        for name, held in vars(module).items()
        if type(held) is int and held == value and (name in SHORT or any(word in name for word in CHANNEL_WORDS))
    ]
    heads_first = sorted(names, key=lambda name: ("head" in name and "dim" not in name) != heads)
    return heads_first[0] if heads_first else None


CHANNEL_WORDS = ("head", "channel", "feature", "dim", "chs", "width", "planes", "hidden", "groups")
SHORT = frozenset({"c", "ch", "h", "d", "e", "n", "inner", "oup", "inp", "n_feat"})


@rule("index", "index_select", "embedding")
def index(tracing: Tracing, node: Node) -> Ints | None:
    """Along dimensions without channels; a table of parameters is read by rows."""
    if "embedding" in str(node.target):
        return _rows(tracing, node, cast(Node, node.args[0]), 0, len(shape(cast(Node, node.args[1]))))
    source = node.args[0]
    assert isinstance(source, Node)
    if "index_select" in str(node.target):
        return _rows(tracing, node, source, cast(int, node.args[1]), 1)
    places = [axis for axis, index in enumerate(cast("Sequence[Node | None]", node.args[1])) if index is not None]
    if places != list(range(places[0], places[-1] + 1)):
        raise Denied("reads several dimensions apart by numbers")
    new = len(shape(node)) - len(shape(source)) + len(places)
    return _rows(tracing, node, source, places[0], new, len(places))


def _rows(tracing: Tracing, node: Node, source: Node, axis: int, new: int, old: int = 1) -> Ints | None:
    """`old` dimensions from `axis` on are read by number and give `new` ones."""
    axis %= len(shape(source))
    axes = list(range(axis, axis + old))
    if tracing.is_tensor(source) and (whole := tracing.flow(source)) is not None:
        flow: Ints | None = whole
        for each in axes:
            flow = tracing.labels.merge(cast(Ints, flow), each)
    else:
        flow = tracing.mixed(source, axes, "picks by number from")
    if flow is None:
        return None
    return flow.reshape(flow.shape[:axis] + (1,) * new + flow.shape[axis + old :])
