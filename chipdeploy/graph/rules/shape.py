"""Pooling, reductions, concatenation, padding and flattening."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Flow
from chipdeploy.graph.rules.base import Denied, Tracing, op_name, rule, shape


@rule("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d")
def pool(tracing: Tracing, node: Node) -> Flow | None:
    """Spatial windows only: labels pass."""
    assert isinstance(node.args[0], Node)
    return tracing.flows.get(node.args[0])


@rule("mean")
def mean(tracing: Tracing, node: Node) -> Flow | None:
    """Spatial mean: labels pass, their dimension moves when dimensions before it are dropped."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flows.get(source)
    if flow is None:
        return None
    rank = len(shape(source))
    dims = {dim % rank for dim in cast("Sequence[int]", node.args[1] if len(node.args) > 1 else range(rank))}
    if flow.dim in dims:
        raise Denied("averages over the channels")
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    return Flow(flow.dim if keep else flow.dim - sum(dim < flow.dim for dim in dims), flow.labels)


@rule("cat")
def cat(tracing: Tracing, node: Node) -> Flow:
    """Along the channels: spans one after the other. Along another dimension: the operands become one."""
    parts = cast("Sequence[Node]", node.args[0])
    rank = len(shape(node))
    dim = cast(int, node.args[1] if len(node.args) > 1 else 0) % rank
    flows = [tracing.flows.get(part) for part in parts]
    channel_dims = {flow.dim for flow in flows if flow is not None}
    if len(channel_dims) != 1:
        raise Denied("its operands have their channels along different dimensions")
    channel_dim = channel_dims.pop()
    labels = [tracing.flow(part, channel_dim) for part in parts]
    if dim == channel_dim:
        return Flow(dim, np.concatenate(labels))
    first = labels[0]
    for other in labels[1:]:
        first = tracing.labels.unite(first, other)
    return Flow(channel_dim, first)


@rule("pad", "constant_pad_nd")
def pad(tracing: Tracing, node: Node) -> Flow | None:
    """Zero channels before and after (option-A shortcuts) get labels of their own, which the sum then joins.

    How many zeros to add after the cut must be an attribute of the module: `before` and `after`.
    """
    source, amounts = node.args[0], cast("Sequence[int]", node.args[1])
    assert isinstance(source, Node)
    flow = tracing.flows.get(source)
    if flow is None:
        return None
    # Amounts come in pairs, last dimension first.
    pair = 2 * (len(shape(source)) - 1 - flow.dim)
    before, after = (amounts[pair], amounts[pair + 1]) if pair + 1 < len(amounts) else (0, 0)
    if not before and not after:
        return flow
    if len(node.args) > 2 and node.args[2] != "constant":
        raise Denied("pads channels with copies of others")
    path, module = tracing.owner(node)
    if (getattr(module, "before", None), getattr(module, "after", None)) != (before, after):
        raise Denied("pads channels by numbers written in the code; give its module the attributes before and after")
    head, tail = tracing.labels.new(before), tracing.labels.new(after)
    tracing.count(path, "before", head)
    tracing.count(path, "after", tail)
    return Flow(flow.dim, np.concatenate([head, flow.labels, tail]))


@rule("slice")
def take(tracing: Tracing, node: Node) -> Flow | None:
    """A spatial slice passes the labels."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flows.get(source)
    dim = cast(int, node.args[1] if len(node.args) > 1 else 0)
    if flow is not None and dim % len(shape(source)) == flow.dim and shape(node) != shape(source):
        raise Denied("takes a fixed slice of the channels")
    return flow


@rule("flatten", "view", "reshape")
def flatten(tracing: Tracing, node: Node) -> Flow | None:
    """[N, C, H, W] ▶ [N, C·H·W]: every label is repeated H·W times."""
    source = node.args[0]
    assert isinstance(source, Node)
    flow = tracing.flows.get(source)
    before, after = shape(source), shape(node)
    if flow is None:
        return None
    sizes = node.args[1] if op_name(node) != "flatten" else None
    if isinstance(sizes, Sequence) and (len(sizes) <= flow.dim or sizes[flow.dim] != -1):
        raise Denied("reshapes to numbers written in the code; use flatten(1), or -1 for the channels")
    if before == after:
        return flow
    if flow.dim == 1 and len(after) == 2 and before[0] == after[0]:
        return Flow(1, np.repeat(flow.labels, int(np.prod(before[2:], dtype=np.int64))))
    raise Denied(f"reshapes {list(before)} to {list(after)}")
