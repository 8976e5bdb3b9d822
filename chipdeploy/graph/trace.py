"""From a module to its channel graph: export to ATen, let labels flow through the rules, group what is cut together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from chipdeploy.errors import ModelError
from chipdeploy.graph.branches import BranchUse, find_branches
from chipdeploy.graph.channels import (
    KEPT,
    Branch,
    ChannelGraph,
    ChannelGroup,
    Count,
    Layer,
    PinnedGroup,
    Slot,
    Tally,
)
from chipdeploy.graph.labels import Flow, Ints, Labels
from chipdeploy.graph.rules import RULES, Denied, Tracing
from chipdeploy.graph.rules.base import op_name, shape, tensor_arguments


def trace(model: nn.Module, example: Tensor) -> ChannelGraph:
    """The channel graph of `model` for inputs shaped like `example` [N, C, H, W].

    The model is analysed in eval mode and handed back as it was.

    Raises:
        ModelError: `torch.export` cannot follow the model, a layer is registered under two names, or nothing in it can
            be pruned.
    """
    _refuse_aliases(model)
    program = export_program(model, example)
    tracing = _walk(model, program)
    output = next(node for node in program.graph.nodes if node.op == "output")
    graph = _Numbering(tracing, find_branches(tracing, output)).graph(model, tuple(example.shape))
    if not graph.groups:
        raise ModelError(f"nothing to prune: every channel is pinned; got {len(graph.pinned)} pinned groups")
    return graph


def _refuse_aliases(model: nn.Module) -> None:
    """`torch.func.functional_call` leaves a module that is registered twice with the tensors of the call."""
    paths: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in paths and (module._parameters or module._buffers):
            raise ModelError(
                f"{path} and {paths[module]} are one module under two names; register it once and call it twice"
            )
        paths[module] = path


def export_program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """`torch.export` of the model in eval mode.

    Raises:
        ModelError: the model cannot be traced, with the first line of the cause.
    """
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, (example,))
        except Exception as error:  # the exporter raises many kinds; each means the same to the user
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the model cannot be traced for images {list(example.shape)[1:]}: {first}; "
                "make its forward free of data-dependent Python, or check the image size"
            ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _walk(model: nn.Module, program: ExportedProgram) -> Tracing:
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = _first_names(model)
    tracing = Tracing(model, Labels(), {name: first[str(target)] for name, target in targets.items()})
    untouchable: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in tracing.tensors:
            tracing.flows[node] = _pinned_flow(tracing, node, "the network's input")
        elif node.op == "output":
            for value in node.all_input_nodes:
                _pin_inputs(tracing, value, "feeds the model's output")
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            tracing.flows[node] = _apply(tracing, node, untouchable)
        elif node.op == "call_function":
            for value in tensor_arguments(node):
                _pin_inputs(tracing, value, f"no rule for {node.target}")
                if tracing.is_tensor(value):
                    untouchable.add(tracing.tensor_name(value))
    for (name, _), (labels, _) in tracing.dims.items():
        if name in untouchable:
            tracing.labels.pin(labels, f"{name} is also read by an operation without a rule")
    return tracing


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer ▶ the first of its names: tied ones have several."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _apply(tracing: Tracing, node: Node, untouchable: set[str]) -> Flow | None:
    """Default deny: without a rule, or when the rule refuses, all channels that go in are pinned."""
    apply = RULES.get(op_name(node))
    try:
        if apply is None:
            raise Denied("no rule for it")
        flow = apply(tracing, node)
        bound = tracing.tensors_of.get(node, [])
        read = (tracing.tensor_name(value) for value in tensor_arguments(node) if tracing.is_tensor(value))
        untouchable.update(name for name in read if name not in bound)
        return flow
    except Denied as refusal:
        path = tracing.owner(node)[0] or "the model"
        for value in tensor_arguments(node):
            _pin_inputs(tracing, value, f"{op_name(node)} in {path}: {refusal}")
            if tracing.is_tensor(value):
                untouchable.add(tracing.tensor_name(value))
        return None


def _pin_inputs(tracing: Tracing, node: Node, reason: str) -> None:
    flow = tracing.flows.get(node)
    if flow is not None:
        tracing.labels.pin(flow.labels, reason)


def _pinned_flow(tracing: Tracing, node: Node, reason: str) -> Flow | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    labels = tracing.labels.new(shape(node)[1])
    tracing.labels.pin(labels, reason)
    return Flow(1, labels)


class _Numbering:
    """Turns label classes into groups and global channel numbers."""

    def __init__(self, tracing: Tracing, branches: list[BranchUse]) -> None:
        self._tracing = tracing
        self._uses = branches
        self._number: dict[int, int] = {}  # root ▶ global channel
        self._roots: list[list[int]] = []  # of every group
        for members in self._classes().values():
            self._number.update({root: len(self._number) + i for i, root in enumerate(members)})
            self._roots.append(members)

    def graph(self, model: nn.Module, input_shape: tuple[int, ...]) -> ChannelGraph:
        tracing = self._tracing
        slots = tuple(
            Slot(name, dim, self._index(labels), gated) for (name, dim), (labels, gated) in tracing.dims.items()
        )
        layers = tuple(
            Layer(
                use.name,
                self._index(use.out_labels),
                self._index(use.in_labels),
                use.positions,
                use.kernel,
                self._branch_of_node(use.node),
            )
            for use in tracing.layers
        )
        groups = self._groups(slots, layers)
        counts = {(m, a): Count(m, a, self._index(labels)) for m, a, labels in tracing.counts}
        return ChannelGraph(
            groups=groups,
            pinned=self._pinned(),
            slots=slots,
            counts=tuple(counts.values()),
            layers=layers,
            tallies=self._tallies(model, slots),
            branches=self._branches(groups),
            input_shape=input_shape,
        )

    def _classes(self) -> dict[tuple[tuple[str, int], ...], list[int]]:
        """Prunable roots by the tensors in which they occur: those that always occur together form one group."""
        places: dict[int, list[tuple[str, int]]] = {}
        for key, (labels, _) in self._tracing.dims.items():
            for root in np.unique(self._tracing.labels.roots(labels)).tolist():
                if self._tracing.labels.reason(root) is None:
                    places.setdefault(root, []).append(key)
        classes: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for root in sorted(places):
            classes.setdefault(tuple(places[root]), []).append(root)
        return classes

    def _index(self, labels: Ints) -> Ints:
        roots = self._tracing.labels.roots(labels).tolist()
        return np.array([self._number.get(root, KEPT) for root in roots], dtype=np.int64)

    def _branch_of_node(self, node: Node) -> int | None:
        return next((i for i, use in enumerate(self._uses) if node in use.nodes), None)

    def _groups(self, slots: tuple[Slot, ...], layers: tuple[Layer, ...]) -> tuple[ChannelGroup, ...]:
        branch_of = {root: i for i, use in enumerate(self._uses) for root in use.inside}
        makers = [self._producers(layers, self._number[roots[0]]) for roots in self._roots]
        branches = [branch_of.get(roots[0]) for roots in self._roots]
        vanish = _may_vanish(slots, [len(roots) for roots in self._roots], branches)
        names: list[str] = []
        for roots, made in zip(self._roots, makers, strict=True):
            name = made[0] if made else f"zeros{roots[0]}"
            taken = sum(other.split("#")[0] == name for other in names)
            names.append(f"{name}#{taken + 1}" if taken else name)
        return tuple(
            ChannelGroup(name, len(roots), made, branch, may)
            for name, roots, made, branch, may in zip(names, self._roots, makers, branches, vanish, strict=True)
        )

    @staticmethod
    def _producers(layers: tuple[Layer, ...], channel: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.name for layer in layers if (layer.out_index == channel).any()))

    def _pinned(self) -> tuple[PinnedGroup, ...]:
        """Pinned outputs of the layers, one entry a layer and reason."""
        found: dict[tuple[str, str], int] = {}
        for use in self._tracing.layers:
            for root in np.unique(self._tracing.labels.roots(use.out_labels)).tolist():
                reason = self._tracing.labels.reason(root)
                if reason is not None:
                    found[use.name, reason] = found.get((use.name, reason), 0) + 1
        return tuple(PinnedGroup(name, size, reason) for (name, reason), size in found.items())

    def _tallies(self, model: nn.Module, slots: tuple[Slot, ...]) -> tuple[Tally, ...]:
        readers = {name: node for node, names in self._tracing.tensors_of.items() for name in names}
        indices: dict[str, list[Slot]] = {}
        for slot in slots:
            indices.setdefault(slot.tensor, []).append(slot)
        tallies = []
        for name, parameter in model.named_parameters():
            bound = indices.get(name, [])
            unit = int(np.prod([n for dim, n in enumerate(parameter.shape) if dim not in {s.dim for s in bound}]))
            branch = self._branch_of_node(readers[name]) if name in readers else None
            tallies.append(Tally(name, unit, tuple(slot.index for slot in bound), branch))
        return tuple(tallies)

    def _branches(self, groups: tuple[ChannelGroup, ...]) -> tuple[Branch, ...]:
        found = []
        for number, use in enumerate(self._uses):
            inside = tuple(i for i, group in enumerate(groups) if group.branch == number)
            name = _common_path([module for module, _ in use.stubs])
            found.append(Branch(name, inside, use.stubs, use.tail))
        return tuple(found)


def _common_path(paths: list[str]) -> str:
    """`layer1.0` for `layer1.0.conv1` and `layer1.0.bn1`."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or paths[0]


def _may_vanish(slots: tuple[Slot, ...], sizes: list[int], branches: list[int | None]) -> list[bool]:
    """A group outside all branches may reach width 0 only where something else stays in each of its tensors.

    Decided last group first, so that of a stream's spans the earliest one is the one that stays.
    """
    owner = np.repeat(np.arange(len(sizes)), sizes)
    vanish = [branch is not None for branch in branches]
    contents = [set(owner[slot.index[slot.index != KEPT]].tolist()) for slot in slots]
    fixed = [bool((slot.index == KEPT).any()) for slot in slots]
    for group in reversed(range(len(sizes))):
        if vanish[group]:
            continue
        homes = [i for i, content in enumerate(contents) if group in content]
        vanish[group] = all(fixed[i] or any(not vanish[g] for g in contents[i] - {group}) for i in homes)
    return vanish
