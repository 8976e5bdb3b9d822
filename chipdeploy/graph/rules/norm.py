"""Norms: those that treat every channel alone, and those over all living channels."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, Tracing, argument, numbers, rule, shape


@rule("batch_norm", "instance_norm")
def batch_norm(tracing: Tracing, node: Node) -> Ints:
    """Per channel, with its own statistics: labels pass, up to four tensors are sliced."""
    return _affine(tracing, node, node.args[1:5])


def _affine(tracing: Tracing, node: Node, tensors: tuple[object, ...]) -> Ints:
    labels = tracing.channels(node.args[0], 1)
    for tensor in tensors:  # weight, bias, running mean, running variance
        if tensor is not None:
            tracing.bind(node, tensor, 0, labels)
    path, module = tracing.owner(node)
    for attribute in ("num_features", "num_channels"):
        if hasattr(module, attribute):
            tracing.count(path, attribute, labels)
    return labels.reshape([-1 if dim == 1 else 1 for dim in range(len(shape(node)))])


@rule("group_norm")
def group_norm(tracing: Tracing, node: Node) -> Ints:
    """Whole groups are the units. One group over all channels is a norm over the living ones."""
    groups = cast(int, node.args[1])
    labels = tracing.channels(node.args[0], 1)
    tensors = (argument(node, 2, "weight"), argument(node, 3, "bias"))
    path, module = tracing.owner(node)
    if groups == 1:
        _live(tracing, tensors[0], labels)
        return _affine(tracing, node, tensors)
    if getattr(module, "num_groups", None) != groups:
        raise Denied("groups written in the code; give its module the attribute num_groups")
    units = tracing.labels.merge(labels.reshape(groups, -1), 1)[:, 0]
    tracing.count(path, "num_groups", units)
    return _affine(tracing, node, tensors)


@rule("layer_norm", "rms_norm")
def layer_norm(tracing: Tracing, node: Node) -> Ints | None:
    """Over the last dimension: inside units such as heads; over the channels it is taken of the living ones."""
    source = node.args[0]
    assert isinstance(source, Node)
    dims = len(numbers(node.args[1]))
    rank = len(shape(source))
    flow = tracing.flow(source)
    if flow is None or flow.shape[-1] == 1 or flow.size > flow.shape[-1] or dims > 1:
        return tracing.mixed(source, range(rank - dims, rank), "normalises over")
    labels = tracing.channels(source, rank - 1)
    tensors = [argument(node, 2, "weight"), argument(node, 3, "bias")]
    path, module = tracing.owner(node)
    if not isinstance(getattr(module, "normalized_shape", None), tuple):
        raise Denied("its shape is written in the code; give its module the attribute normalized_shape")
    _live(tracing, tensors[0], labels)
    for tensor in tensors[: 2 if "layer" in str(node.target) else 1]:
        if tensor is not None:
            tracing.bind(node, tensor, 0, labels)
    tracing.count(path, "normalized_shape", labels)
    return flow


def _live(tracing: Tracing, weight: object, labels: Ints) -> None:
    """Note that a norm's statistics are to be taken of living channels: its weight carries the gates."""
    if len(np.unique(tracing.labels.roots(labels))) > 1 or tracing.labels.free(labels).any():
        if not tracing.is_parameter(weight):
            raise Denied("normalises over the channels without a weight of its own")
        tracing.living[tracing.tensor_name(weight)] = labels
