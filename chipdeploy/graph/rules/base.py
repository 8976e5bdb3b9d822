"""The registry of rules and what a rule may see and say. An op without a rule pins its channels: default deny."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from chipdeploy.graph.labels import Flow, Ints, Labels

Rule: TypeAlias = "Callable[[Tracing, Node], Flow | None]"
RULES: dict[str, Rule] = {}


class Denied(Exception):
    """A rule's refusal; its text becomes the reason for which the channels are pinned."""


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops by base name; in-place twins (`relu_`) share it."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def op_name(node: Node) -> str:
    """`aten.relu_.default` becomes `relu`."""
    name = str(node.target)
    parts = name.split(".")
    return (parts[1] if len(parts) > 1 else name).rstrip("_")


def shape(node: Node) -> tuple[int, ...]:
    """The traced shape of a node's tensor."""
    return tuple(int(size) for size in node.meta["val"].shape)


@dataclass
class LayerUse:
    """One use of a convolution or linear weight, before labels become channel numbers."""

    node: Node
    name: str
    out_labels: Ints
    in_labels: Ints  # empty for a depthwise layer
    positions: int
    kernel: int


@dataclass
class Tracing:
    """What the rules share while they walk the graph."""

    model: nn.Module
    labels: Labels
    tensors: dict[str, str]  # placeholder name ▶ parameter or buffer name
    flows: dict[Node, Flow | None] = field(default_factory=dict)
    dims: dict[tuple[str, int], tuple[Ints, bool]] = field(default_factory=dict)  # (tensor, dim) ▶ labels, gated
    counts: list[tuple[str, str, Ints]] = field(default_factory=list)
    layers: list[LayerUse] = field(default_factory=list)
    tensors_of: dict[Node, list[str]] = field(default_factory=dict)  # parameters that a node reads
    _owners: dict[Node, tuple[str, nn.Module]] = field(default_factory=dict)

    def flow(self, node: object, dim: int) -> Ints:
        """Labels of `node` along `dim`; fresh pinned ones where nothing is known."""
        assert isinstance(node, Node)
        known = self.flows.get(node)
        if known is not None and known.dim == dim:
            return known.labels
        if known is not None:
            self.labels.pin(known.labels, f"read along another dimension by {node.name}")
        fresh = self.labels.new(shape(node)[dim])
        self.labels.pin(fresh, "comes from an operation without a channel rule")
        return fresh

    def is_tensor(self, node: object) -> bool:
        """Whether `node` is a parameter or buffer itself, not computed from one."""
        return isinstance(node, Node) and node.op == "placeholder" and node.name in self.tensors

    def is_parameter(self, node: object) -> bool:
        """Whether `node` is a parameter itself; gates cannot be folded into a buffer."""
        return self.is_tensor(node) and self.tensor_name(node) in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_parameters())

    def tensor_name(self, node: object) -> str:
        """The parameter or buffer behind a placeholder; Denied when the tensor is computed."""
        if self.is_tensor(node):
            assert isinstance(node, Node)
            return self.tensors[node.name]
        raise Denied("its weight is computed in the forward pass")

    def bind(self, user: Node, tensor: object, dim: int, labels: Ints, *, gated: bool = False) -> None:
        """Say that `tensor`'s dimension `dim` carries `labels`; a tensor used twice unites its labels."""
        name = self.tensor_name(tensor)
        self.tensors_of.setdefault(user, []).append(name)
        known = self.dims.get((name, dim))
        if known is not None:
            labels = self.labels.unite(known[0], labels)
        self.dims[name, dim] = (labels, gated)

    def count(self, module: str, attribute: str, labels: Ints) -> None:
        """Say that a module's integer attribute states how many of `labels` there are."""
        self.counts.append((module, attribute, labels))

    def owner(self, node: Node) -> tuple[str, nn.Module]:
        """Path and module whose forward issued the op."""
        if node in self._owners:
            return self._owners[node]
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        # A module called a second time is traced under the name `path@1`.
        path = path.split("@")[0]
        self._owners[node] = path, self.model.get_submodule(path)
        return self._owners[node]


def keeps_zero(node: Node) -> bool:
    """Whether an op maps zeros to zeros."""
    if op_name(node) == "hardtanh":
        low, high = (*node.args[1:3], -1.0, 1.0)[:2] if len(node.args) != 2 else (node.args[1], 1.0)
        return isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high
    return op_name(node) in ("relu", "dropout", "leaky_relu", "clone", "contiguous", "relu6")


def positions(node: Node, channel_dim: int) -> int:
    """Elements per channel of one sample: the product of all sizes but batch and channels."""
    sizes = shape(node)
    return int(np.prod([size for dim, size in enumerate(sizes) if dim not in (0, channel_dim)], dtype=np.int64))


def tensor_arguments(node: Node) -> list[Node]:
    """The tensors that a node reads, nested lists (cat) included."""
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]
