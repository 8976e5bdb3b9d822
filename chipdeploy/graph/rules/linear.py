"""Convolutions and linear layers: where channels are made and read."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, LayerUse, Tracing, argument, op_name, rule, shape

NONE: Ints = np.zeros(0, dtype=np.int64)
FEW_GROUPS = 4  # up to here a grouped convolution is cut inside its groups, beyond by whole groups


@rule("conv1d", "conv2d", "conv3d")
def convolution(tracing: Tracing, node: Node) -> Ints:
    """Dense: new output labels, the weight reads [out, in]. Grouped: whole groups, or the same channels of each."""
    images, weight, groups = _operands(node)
    inputs = tracing.channels(images, 1)
    out_channels, in_per_group, *kernel = shape(weight)
    refusal = _refusal(tracing, node, groups)
    if refusal is not None:
        return _pinned(tracing, node, inputs, refusal)
    if groups == 1:
        outputs, reads = tracing.labels.new(out_channels), inputs
        tracing.bind(node, weight, 1, inputs, gated=True)
    elif groups <= FEW_GROUPS and in_per_group > groups and out_channels // groups > 1:
        reads = tracing.labels.merge(inputs.reshape(groups, in_per_group), 0)[0]
        outputs = np.tile(tracing.labels.new(out_channels // groups), groups)
        tracing.bind(node, weight, 1, reads, gated=True)
    else:
        units, reads = tracing.labels.merge(inputs.reshape(groups, in_per_group), 1)[:, 0], NONE
        outputs = np.repeat(units, out_channels // groups)
        _count(tracing, node, "groups", units)
    tracing.bind(node, weight, 0, outputs)
    _finish(tracing, node, inputs, outputs)
    size = float(np.prod(kernel)) * (1 if len(reads) else in_per_group)
    _use(tracing, node, weight, outputs, reads, size)
    return _along(outputs, 1, len(shape(node)))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(tracing: Tracing, node: Node) -> Ints:
    """The weight is [in, out / groups, ...]; every input element is multiplied k·k times."""
    images, weight, groups = _operands(node)
    inputs = tracing.channels(images, 1)
    in_channels, out_per_group, *kernel = shape(weight)
    refusal = _refusal(tracing, node, groups)
    if refusal is not None:
        return _pinned(tracing, node, inputs, refusal)
    if groups == 1:
        outputs, reads = tracing.labels.new(out_per_group), inputs
        tracing.bind(node, weight, 0, inputs, gated=True)
        tracing.bind(node, weight, 1, outputs)
    else:
        units, reads = tracing.labels.merge(inputs.reshape(groups, -1), 1)[:, 0], NONE
        outputs = np.repeat(units, out_per_group)
        tracing.bind(node, weight, 0, np.repeat(units, in_channels // groups))
        _count(tracing, node, "groups", units)
    _finish(tracing, node, inputs, outputs)
    # macs = positions of the input, not of the output.
    share = tracing.positions(images, in_channels) / tracing.positions(node, len(outputs))
    size = float(np.prod(kernel)) * share * (1 if len(reads) else in_channels // groups)
    _use(tracing, node, weight, outputs, reads, size)
    return _along(outputs, 1, len(shape(node)))


def _operands(node: Node) -> tuple[Node, Node, int]:
    """Input, weight and number of groups, the seventh argument of plain and transposed convolutions alike."""
    images, weight = node.args[:2]
    groups = argument(node, 6, "groups", 1)
    assert isinstance(images, Node) and isinstance(weight, Node) and isinstance(groups, int)
    return images, weight, groups


def _refusal(tracing: Tracing, node: Node, groups: int) -> str | None:
    """Why a convolution must stay as it is."""
    images, weight, _ = _operands(node)
    if len(shape(images)) != len(shape(weight)):
        return "its input has no batch dimension"
    _, module = tracing.owner(node)
    if not tracing.is_tensor(weight):
        return "its weight is computed in the forward pass; only a parameter can be cut"
    if not tracing.is_parameter(weight):
        return "its weight is a buffer; only a parameter can be cut"
    if groups != 1 and getattr(module, "groups", None) != groups:
        return "groups written in the code; give its module the attribute groups"
    bias = argument(node, 2, "bias")
    if bias is not None and not tracing.is_tensor(bias):
        return "its bias is computed in the forward pass"
    return None


def _finish(tracing: Tracing, node: Node, inputs: Ints, outputs: Ints) -> None:
    """Bias and the module's own channel counts."""
    bias = argument(node, 2, "bias")
    if bias is not None:
        tracing.bind(node, bias, 0, outputs)
    _count(tracing, node, "out_channels", outputs)
    _count(tracing, node, "in_channels", inputs)


def _count(tracing: Tracing, node: Node, attribute: str, labels: Ints) -> None:
    path, module = tracing.owner(node)
    if hasattr(module, attribute):
        tracing.count(path, attribute, labels)


def _use(tracing: Tracing, node: Node, weight: Node, outputs: Ints, reads: Ints, kernel: float) -> None:
    # A module with several weights, or the model's own: the weight's name tells them apart.
    tensor = tracing.tensor_name(weight)
    path, _, last = tensor.rpartition(".")
    name = path if path and last == "weight" else tensor
    tracing.layers.append(LayerUse(node, name, outputs, reads, tracing.positions(node, len(outputs)), kernel))


def _along(labels: Ints, axis: int, rank: int) -> Ints:
    """Labels [size] as an array of a tensor's rank."""
    return labels.reshape([-1 if dim == axis else 1 for dim in range(rank)])


def _pinned(tracing: Tracing, node: Node, inputs: Ints, reason: str) -> Ints:
    """A convolution that stays as it is; its cost is still counted, as one of constant width."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    path, _ = tracing.owner(node)
    channels = shape(node)[1]
    outputs = np.repeat(tracing.labels.new(1), channels)
    reason = f"{op_name(node)} in {path or 'the model'}: {reason}"
    for labels in (inputs, outputs):
        tracing.labels.pin(labels, reason)
    per_output = float(np.prod(shape(weight)[1:]))
    tracing.layers.append(LayerUse(node, path, outputs, NONE, tracing.positions(node, channels), per_output))
    for tensor in (weight, argument(node, 2, "bias")):
        if isinstance(tensor, Node) and (flow := tracing.flow(tensor)) is not None:
            tracing.labels.pin(flow, reason)
    return _along(outputs, 1, len(shape(node)))


@rule("linear")
def linear(tracing: Tracing, node: Node) -> Ints:
    """y = x Wᵀ + b over the last dimension; b may be put together from several parameters."""
    features, weight = node.args[:2]
    assert isinstance(features, Node) and isinstance(weight, Node)
    return _linear(tracing, node, features, weight, argument(node, 2, "bias"), (0, 1))


def _linear(tracing: Tracing, node: Node, features: Node, weight: Node, bias: object, dims: tuple[int, int]) -> Ints:
    """`dims` are the weight's dimensions of outputs and inputs."""
    if not tracing.is_parameter(weight):
        what = "a buffer" if tracing.is_tensor(weight) else "computed in the forward pass"
        raise Denied(f"its weight is {what}; only a parameter can be cut")
    rank = len(shape(node))
    inputs = tracing.channels(features, rank - 1)
    outputs = tracing.labels.new(shape(node)[-1])
    tracing.bind(node, weight, dims[0], outputs)
    tracing.bind(node, weight, dims[1], inputs, gated=True)
    if tracing.is_tensor(bias):
        tracing.bind(node, bias, 0, outputs)
    elif isinstance(bias, Node):
        flow = tracing.flow(bias)
        if flow is None:
            tracing.labels.pin(outputs, "its bias is computed in the forward pass")
        else:
            tracing.labels.unite(outputs, flow)
    _count(tracing, node, "out_features", outputs)
    _count(tracing, node, "in_features", inputs)
    _use(tracing, node, weight, outputs, inputs, 1.0)
    return _along(outputs, rank - 1, rank)
