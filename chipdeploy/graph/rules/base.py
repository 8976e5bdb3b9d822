"""The registry of rules and what a rule may see and say. An op without a rule pins its channels: default deny."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from chipdeploy.graph.labels import Ints, Labels

# The labels of a tensor; None where nothing in it is ever cut; a list for an op with several results.
Flow: TypeAlias = "Ints | list[Ints | None] | None"
Rule: TypeAlias = "Callable[[Tracing, Node], Flow]"
RULES: dict[str, Rule] = {}
AGAIN = re.compile(r"@\d+(?=\.|$)")


class Denied(Exception):
    """A rule's refusal; its text becomes the reason for which the channels are pinned."""


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops by base name; in-place twins (`relu_`) share it."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


# ATen's second names of one op, as NumPy has them.
ALIASES = {
    "absolute": "abs",
    "arctan2": "atan2",
    "clip": "clamp",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "positive": "alias",
    "subtract": "sub",
    "true_divide": "div",
}


def op_name(node: Node) -> str:
    """`aten.relu_.default` becomes `relu`, `aten.clip.default` becomes `clamp`."""
    name = getattr(node.target, "__name__", "") if isinstance(node.target, FunctionType) else str(node.target)
    if name.startswith("<built-in"):
        return name.split()[-1].rstrip(">")
    parts = name.split(".")
    name = (parts[1] if len(parts) > 1 else name).rstrip("_")
    return ALIASES.get(name, name)


def shape(node: Node) -> tuple[int, ...]:
    """The traced shape of a node's tensor.

    Raises:
        Denied: it depends on the values of the images.
    """
    sizes = node.meta["val"].shape
    if any(not isinstance(size, int) for size in sizes):
        raise Denied(f"the shape of {node.name} depends on what the images show")
    return tuple(sizes)


def argument(node: Node, index: int, name: str, default: object = None) -> object:
    """An op's argument, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


@dataclass
class LayerUse:
    """One use of a convolution or linear weight, before labels become channel numbers."""

    node: Node
    name: str
    out_labels: Ints
    in_labels: Ints  # of one group; empty where each output reads a constant number of channels
    positions: int
    kernel: float
    mult: bool = False  # a product of activations: it makes no channels


@dataclass
class SizeUse:
    """A size along a labelled dimension that a reshape was told: a number in the code, or a module's attribute."""

    path: str
    labels: Ints
    axis: int
    size: int
    sure: bool = False  # a slice's end: an attribute of this value is what ends it


@dataclass
class Doubt:
    """Channels that pass through code whose numbers may be literals; a trial cut tells."""

    path: str
    labels: Ints
    why: str = "holds numbers of channels that cannot follow a cut"


@dataclass
class Tracing:
    """What the rules share while they walk the graph."""

    model: nn.Module
    labels: Labels
    tensors: dict[str, str]  # placeholder name ▶ parameter or buffer name
    batch: int = 1
    inputs: frozenset[str] = frozenset()  # placeholders of the images; others may be constants of the forward
    flows: dict[Node, Flow] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)  # of nodes in which nothing is ever cut
    dims: dict[tuple[str, int], tuple[Ints, bool]] = field(default_factory=dict)  # (tensor, dim) ▶ labels, gated
    whole: dict[str, Ints] = field(default_factory=dict)  # tensors read element by element ▶ labels of all dimensions
    counts: list[tuple[str, str, Ints]] = field(default_factory=list)
    layers: list[LayerUse] = field(default_factory=list)
    tensors_of: dict[Node, list[str]] = field(default_factory=dict)  # parameters that a node reads
    grids: list[Ints] = field(default_factory=list)  # dimensions split in several: what is left must be a grid
    sizes: list[SizeUse] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    following: set[type] = field(default_factory=set)  # modules whose widths are attributes, as a trial has shown
    scales: list[tuple[str, Ints, int]] = field(default_factory=list)  # path, labels, axis whose size may be a factor
    living: dict[str, Ints] = field(default_factory=dict)  # weights of norms over channels ▶ labels
    _owners: dict[Node, tuple[str, nn.Module]] = field(default_factory=dict)

    def flow(self, node: object) -> Ints | None:
        """The labels of a tensor, or None where nothing in it is ever cut."""
        if not isinstance(node, Node):
            return None
        if self.is_tensor(node):
            return self._whole(node)
        flow = self.flows.get(node)
        assert not isinstance(flow, list)
        return None if flow is None else self.labels.reduced(flow)

    def channels(self, node: object, axis: int) -> Ints:
        """Labels along `axis`, int64 [size]; pinned ones where nothing is known.

        Raises:
            Denied: channels differ along another dimension, too.
        """
        assert isinstance(node, Node)
        sizes = shape(node)
        flow = self.flow(node)
        if flow is None:
            one = self.labels.new(1)
            self.labels.pin(one, self.reasons.get(node, "comes from an operation without a channel rule"))
            return np.repeat(one, sizes[axis])
        if any(size > 1 for dim, size in enumerate(flow.shape) if dim != axis % len(sizes)):
            raise Denied("its channels lie along another dimension")
        return np.broadcast_to(flow.reshape(-1), (sizes[axis],))

    def mixed(self, node: Node, axes: Sequence[int], what: str) -> Ints | None:
        """The labels after an op that mixes along `axes`: where other dimensions tell channels apart, those are units.

        Raises:
            Denied: the channels themselves are mixed.
        """
        flow = self.flow(node)
        for axis in axes:
            if flow is None or flow.shape[axis] == 1:
                continue
            if flow.size == flow.shape[axis]:
                raise Denied(f"{what} the channels")
            flow = self.labels.merge(flow, axis)
        return flow

    def is_tensor(self, node: object) -> bool:
        """Whether `node` is a parameter or buffer itself, not computed from one."""
        return isinstance(node, Node) and node.op == "placeholder" and node.name in self.tensors

    def is_parameter(self, node: object) -> bool:
        """Whether `node` is a parameter itself; gates cannot be folded into a buffer."""
        return self.is_tensor(node) and self.tensor_name(node) in self._parameters

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_parameters())

    def tensor_name(self, node: object) -> str:
        """The parameter or buffer behind a placeholder; Denied when the tensor is computed."""
        if self.is_tensor(node):
            assert isinstance(node, Node)
            return self.tensors[node.name]
        raise Denied("its weight is computed in the forward pass")

    def _whole(self, node: Node) -> Ints | None:
        name = self.tensor_name(node)
        if name not in self.whole:
            if not node.meta["val"].is_floating_point():
                return None
            self.whole[name] = self.labels.new(*shape(node))
        return self.labels.reduced(self.whole[name])

    def bind(self, user: Node, tensor: object, dim: int, labels: Ints, *, gated: bool = False) -> None:
        """Say that `tensor`'s dimension `dim` carries `labels`; a tensor used twice unites its labels."""
        name = self.tensor_name(tensor)
        self.tensors_of.setdefault(user, []).append(name)
        known = self.dims.get((name, dim))
        if known is not None:
            labels, gated = self.labels.unite(known[0], labels), gated or known[1]
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
        path = path if path in self._modules else AGAIN.sub("", path)
        self._owners[node] = path, self._modules[path]
        return self._owners[node]

    def positions(self, node: Node, channels: int) -> int:
        """Elements per channel of one sample."""
        return int(np.prod(shape(node), dtype=np.int64)) // max(1, channels * self.batch)


def nodes_of(tracing: Tracing, path: str) -> frozenset[Node]:
    """All ops that a module and those in it issue."""
    return frozenset(
        node
        for node in tracing.flows
        if node.op == "call_function" and f"{tracing.owner(node)[0]}.".startswith(f"{path}.")
    )


def keeps_zero(node: Node) -> bool:
    """Whether an op maps zeros to zeros."""
    if op_name(node) == "hardtanh":
        low, high = (*node.args[1:3], -1.0, 1.0)[:2] if len(node.args) != 2 else (node.args[1], 1.0)
        return isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high
    if op_name(node) == "div":
        return isinstance(node.args[0], Node) and not isinstance(node.args[1], Node)
    return op_name(node) in ZERO_KEEPERS


ZERO_KEEPERS = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "tanh",
        "abs",
        "neg",
        "sqrt",
        "square",
        "dropout",
        "feature_dropout",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
    ]
)


def tensor_arguments(node: Node) -> list[Node]:
    """The tensors that a node reads, nested lists (cat) and ops with several results included."""
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor | tuple | list)]


def numbers(values: object) -> list[int]:
    """A dimension or a list of them as a list of integers.

    Raises:
        Denied: a size is not a constant of the trace.
    """
    listed = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(value, int) for value in listed):
        raise Denied("its sizes are computed in the forward pass")
    return [int(value) for value in cast("Sequence[int]", listed)]
