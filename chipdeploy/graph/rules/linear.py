"""Convolutions and linear layers: where channels are made and read."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Flow, Ints
from chipdeploy.graph.rules.base import Denied, LayerUse, Tracing, positions, rule, shape

NONE: Ints = np.zeros(0, dtype=np.int64)


def _argument(node: Node, index: int, name: str, default: object) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


@rule("conv1d", "conv2d", "conv3d")
def convolution(tracing: Tracing, node: Node) -> Flow:
    """Dense: new output labels, the weight reads [out, in]. Depthwise: the input's labels pass through."""
    images, weight = node.args[:2]
    assert isinstance(images, Node) and isinstance(weight, Node)
    bias = _argument(node, 2, "bias", None)
    groups = _argument(node, 6, "groups", 1)
    out_channels, in_per_group, *kernel = shape(weight)
    inputs = tracing.flow(images, 1)
    depthwise = groups != 1 and in_per_group == 1 and out_channels == len(inputs)
    if not tracing.is_tensor(weight):
        return _pinned(tracing, node, inputs, "its weight is computed in the forward pass")
    if not tracing.is_parameter(weight):
        return _pinned(tracing, node, inputs, "its weight is a buffer")
    if groups != 1 and not depthwise:
        return _pinned(tracing, node, inputs, f"convolution with {groups} groups of {in_per_group} channels")
    path, module = tracing.owner(node)
    if depthwise and getattr(module, "groups", None) != groups:
        return _pinned(tracing, node, inputs, "groups written in the code; give its module the attribute groups")
    name = tracing.tensor_name(weight).rpartition(".")[0]
    outputs = inputs if depthwise else tracing.labels.new(out_channels)
    if not depthwise:
        tracing.bind(node, weight, 1, inputs, gated=True)
    tracing.bind(node, weight, 0, outputs)
    if bias is not None:
        tracing.bind(node, bias, 0, outputs)
    if hasattr(module, "out_channels"):
        tracing.count(path, "out_channels", outputs)
        tracing.count(path, "in_channels", inputs)
    if groups != 1:
        tracing.count(path, "groups", outputs)
    reads = inputs if groups == 1 else NONE
    tracing.layers.append(LayerUse(node, name, outputs, reads, positions(node, 1), int(np.prod(kernel))))
    return Flow(1, outputs)


def _pinned(tracing: Tracing, node: Node, inputs: Ints, reason: str) -> Flow:
    """A convolution that stays as it is; its cost is still counted, as one of constant width."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    out_channels, in_per_group, *kernel = shape(weight)
    outputs = tracing.labels.new(out_channels)
    path, _ = tracing.owner(node)
    tracing.labels.pin(inputs, f"{path}: {reason}")
    tracing.labels.pin(outputs, f"{path}: {reason}")
    tracing.layers.append(LayerUse(node, path, outputs, NONE, positions(node, 1), int(np.prod(kernel)) * in_per_group))
    return Flow(1, outputs)


@rule("linear")
def linear(tracing: Tracing, node: Node) -> Flow:
    """y = x Wᵀ + b over the last dimension."""
    features, weight = node.args[:2]
    assert isinstance(features, Node) and isinstance(weight, Node)
    bias = _argument(node, 2, "bias", None)
    name = tracing.tensor_name(weight).rpartition(".")[0]
    if not tracing.is_parameter(weight):
        raise Denied("its weight is a buffer")
    last = len(shape(features)) - 1
    inputs = tracing.flow(features, last)
    outputs = tracing.labels.new(shape(weight)[0])
    tracing.bind(node, weight, 0, outputs)
    tracing.bind(node, weight, 1, inputs, gated=True)
    if bias is not None:
        tracing.bind(node, bias, 0, outputs)
    path, module = tracing.owner(node)
    if hasattr(module, "out_features"):
        tracing.count(path, "out_features", outputs)
        tracing.count(path, "in_features", inputs)
    tracing.layers.append(LayerUse(node, name, outputs, inputs, positions(node, last), 1))
    return Flow(last, outputs)
