"""From a module to its channel graph: export to ATen, let labels flow through the rules, group what is cut together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from chipdeploy.copying import in_mode
from chipdeploy.errors import ModelError, UsageError
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
from chipdeploy.graph.inline import drop_conversions, hidden_graphs, inline_blocks, is_dark
from chipdeploy.graph.labels import Ints, Labels
from chipdeploy.graph.proof import Failure, Trials, evaluating
from chipdeploy.graph.repair import repair
from chipdeploy.graph.rules import RULES, Denied, Tracing
from chipdeploy.graph.rules.base import Flow, op_name, tensor_arguments
from chipdeploy.graph.rules.fixed import count_fixed, is_costly
from chipdeploy.graph.settle import settle
from chipdeploy.graph.simplify import drop_mean_weights
from chipdeploy.quiet import quiet

Example = Tensor | tuple[Tensor, ...]
# What a rule meets when an op is called in a way that it was not written for: denied, like an op without a rule.
UNREADABLE = (AttributeError, TypeError, ValueError, IndexError, KeyError, AssertionError)
MOST_REPAIRS = 48  # after which a model that cannot follow its cuts is refused


def trace(model: nn.Module, example: Example, *, exclude: Sequence[str] = ()) -> ChannelGraph:
    """The channel graph of `model` for inputs shaped like `example`: images [N, C, H, W], or a tuple of all its inputs.

    The model is analysed in eval mode and handed back as it was. What the rules accept is cut by several plans and
    compared with its gated self; code that cannot follow a cut keeps its channels.

    Args:
        exclude: patterns such as `layer4.*`; the layers that match keep all their outputs.

    Raises:
        ModelError: `torch.export` cannot follow the model, nothing in it can be pruned, or its cut would not equal
            its gated self.
        UsageError: a pattern that matches no layer.
    """
    if hasattr(model, "_orig_mod"):
        raise UsageError("the model is compiled; give the module itself, and compile what is cut from it")
    inputs, exclude = _inputs(model, example), (exclude,) if isinstance(exclude, str) else exclude
    program = export_program(model, inputs)
    trials = Trials(model, inputs)
    found = _search(model, trials, program, exclude)
    if isinstance(found, Failure) and found.training:
        trained = export_program(model, trials.larger, training=True)
        found = _search(model, trials, program, exclude, trained)
    if isinstance(found, Failure):
        raise ModelError(found.text)
    return found


def _inputs(model: object, example: Example) -> tuple[Tensor, ...]:
    """Raises UsageError where the model is none, or the example something else than tensors, or none is a batch."""
    inputs = example if isinstance(example, tuple) else (example,)
    wrong = [type(each).__name__ for each in inputs if not isinstance(each, Tensor)]
    if wrong or not inputs:
        got = f"a {wrong[0]}" if wrong else "none"
        raise UsageError(f"the example is a tensor, or a tuple of the model's input tensors; got {got}")
    if all(each.dim() == 0 for each in inputs):
        raise UsageError("the example is a batch of images [N, C, H, W]; got a single number")
    if any(each.numel() == 0 for each in inputs):
        raise UsageError(f"the example is a batch of images, e.g. 2; got {[list(each.shape) for each in inputs]}")
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UsageError(f"the model is an nn.Module, got {got}; give an instance")
    return inputs


def _batch_shape(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Of the first input that is no single number."""
    return tuple(next(each.shape for each in inputs if each.dim()))


def _search(
    model: nn.Module,
    trials: Trials,
    program: ExportedProgram,
    exclude: Sequence[str],
    trained: ExportedProgram | None = None,
) -> ChannelGraph | Failure:
    """The graph of which all trials hold, after as many repairs as that takes; the last failure where none is left.

    `trained` is the network in train mode, for those that run other layers there.
    """
    tracing = _walk(model, program, trials.inputs)
    if trained is not None:
        _walk_training(tracing, trained)
    settle(tracing, exclude)
    output = next(node for node in program.graph.nodes if node.op == "output")
    ops = Counter(op_name(node) for node in program.graph.nodes if node.op == "call_function")
    banned: dict[str, type | None] = {}
    whole, failure = False, Failure("", None)
    for _ in range(MOST_REPAIRS):
        branches = find_branches(tracing, output, banned)
        graph = _Numbering(tracing, branches, whole=whole).graph(model, _batch_shape(trials.inputs))
        if not graph.groups:
            raise ModelError(f"nothing to prune: every channel is pinned; {_most_frequent(graph, tracing)}")
        found = trials.failure(graph)
        if found is None:
            return replace(graph, ops=tuple(sorted(ops.items())))
        failure = found
        if failure.vanished:
            whole = True  # outside branches every group keeps a channel
            continue
        if failure.training and trained is None:
            break
        if not (repair(tracing, failure, graph, banned) or _pin_culprit(tracing, failure, graph, trials)):
            break
    return failure


def _pin_culprit(tracing: Tracing, failure: Failure, graph: ChannelGraph, trials: Trials) -> bool:
    """Pin a group without whose cut the others of a failed plan can be followed; False where there is none."""
    group = None if failure.mask is None else trials.culprit(graph, failure.mask)
    if group is None:
        return False
    span = graph.span(group)
    for slot in graph.slots:
        own = (slot.index >= span.start) & (slot.index < span.stop)
        if own.any():
            tracing.labels.pin(tracing.dims[slot.tensor, slot.dim][0][own], f"cut on trial, {failure.text}")
    return True


def _most_frequent(graph: ChannelGraph, tracing: Tracing) -> str:
    """The reason that holds most channels; of a network without layers, what was met that may hide them."""
    held: dict[str, int] = {}
    for group in graph.pinned:
        held[group.reason] = held.get(group.reason, 0) + group.size
    if not held:
        hidden = [text for node, text in tracing.reasons.items() if node.op == "call_function"]
        return hidden[0] if hidden else "it has no layer with channels"
    reason = max(held, key=lambda text: held[text])
    return f"{held[reason]} of {sum(held.values())}: {reason}"


def export_program(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool = False) -> ExportedProgram:
    """`torch.export` of the model in eval mode, or in train mode.

    Raises:
        ModelError: the model cannot be traced, with the first line of the cause.
    """
    with evaluating(model), _handed_back(model), quiet():
        try:
            program = torch.export.export(in_mode(model, training=training), inputs)
            return drop_mean_weights(drop_conversions(inline_blocks(program)))
        except Exception as error:  # the exporter raises many kinds; each means the same to the user
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the model cannot be traced {'in train mode ' if training else ''}for images "
                f"{list(inputs[0].shape)[1:]}: {first}; "
                "make its forward free of data-dependent Python, or check the image size"
            ) from error


@contextmanager
def _handed_back(model: nn.Module) -> Iterator[None]:
    """No attributes are left that a forward made: in an export they have no values. The exporter resets old ones."""
    before = [(module, set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, names in before:
            for name in set(vars(module)) - names:
                del vars(module)[name]


def _walk(model: nn.Module, program: ExportedProgram, inputs: tuple[Tensor, ...]) -> Tracing:
    """All that the rules say of the program's ops."""
    names = _tensor_names(model, program)
    images = frozenset(map(str, program.graph_signature.user_inputs))
    tracing = Tracing(model, Labels(), names, max(1, _batch_shape(inputs)[0]), images)
    _apply_rules(tracing, program)
    return tracing


def _walk_training(tracing: Tracing, program: ExportedProgram) -> None:
    """Let the labels flow through the network in train mode, too: what only runs there must follow the cut.

    Its ops are no part of the network that is deployed: they make no costs, no branches and no groups.
    """
    names = _tensor_names(tracing.model, program)
    aside = replace(tracing, tensors=names, flows={}, reasons={}, layers=[], tensors_of={}, _owners={})
    _apply_rules(aside, program)
    known = {use.name for use in tracing.layers}
    for use in aside.layers:
        if use.name not in known:
            tracing.labels.pin(use.out_labels, f"{use.name} runs in train mode only")


def _tensor_names(model: nn.Module, program: ExportedProgram) -> dict[str, str]:
    """Placeholder ▶ the parameter or buffer that it stands for."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = _first_names(model)
    return {name: first[str(target)] for name, target in targets.items() if str(target) in first}


def _apply_rules(tracing: Tracing, program: ExportedProgram) -> None:
    untouchable: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in tracing.tensors:
                kind = "the network's input" if node.name in tracing.inputs else "a constant of the forward"
                tracing.flows[node], tracing.reasons[node] = None, kind
        elif node.op == "output":
            for value in node.all_input_nodes:
                _pin_inputs(tracing, value, "feeds the model's output", untouchable)
        elif node.op == "call_function":
            tracing.flows[node] = _apply(tracing, node, untouchable)
    for name in untouchable:
        _pin_tensor(tracing, name, f"{name} is also read by an operation without a rule")


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer ▶ the first of its names: tied ones have several."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _apply(tracing: Tracing, node: Node, untouchable: set[str]) -> Flow:
    """Default deny: without a rule, or when the rule refuses, all channels that go in are pinned."""
    apply = RULES.get(op_name(node))
    several = isinstance(node.meta.get("val"), tuple | list)
    try:
        if is_dark(node):
            raise Denied("it runs without gradients, so nothing can be learnt of its channels")
        if apply is None:
            raise Denied("no rule for it")
        try:
            flow = apply(tracing, node)
        except UNREADABLE as error:
            raise Denied(f"arguments that its rule cannot read ({type(error).__name__})") from error
        if several and not isinstance(flow, list):
            raise Denied("its rule knows one result, and here it has several")
        return flow
    except Denied as refusal:
        path = tracing.owner(node)[0] or "the model"
        reason = f"{op_name(node)} in {path}: {refusal}"
        for value in tensor_arguments(node):
            _pin_inputs(tracing, value, reason, untouchable)
        tracing.reasons[node] = reason
        if any(is_costly(inner) for graph in hidden_graphs(node) for inner in graph.graph.nodes):
            raise ModelError(f"{reason}; the layers inside cannot be counted, take them out of there") from refusal
        try:
            count_fixed(tracing, node, reason)
        except Denied as unknown:
            raise ModelError(f"{reason}; its cost cannot be counted: {unknown}") from unknown
        return [None] * len(node.meta["val"]) if several else None


def _pin_inputs(tracing: Tracing, node: Node, reason: str, untouchable: set[str]) -> None:
    if tracing.is_tensor(node):
        untouchable.add(tracing.tensor_name(node))
        return
    flow = tracing.flows.get(node)
    for labels in flow if isinstance(flow, list) else [flow]:
        if labels is not None:
            tracing.labels.pin(labels, reason)


def _pin_tensor(tracing: Tracing, name: str, reason: str) -> None:
    for (tensor, _), (labels, _) in tracing.dims.items():
        if tensor == name:
            tracing.labels.pin(labels, reason)
    if name in tracing.whole:
        tracing.labels.pin(tracing.whole[name], reason)


class _Numbering:
    """Turns label classes into groups and global channel numbers."""

    def __init__(self, tracing: Tracing, branches: list[BranchUse], *, whole: bool = False) -> None:
        """`whole`: only groups inside branches may reach width 0."""
        self._whole = whole
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
                use.mult,
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
            norms=tuple(Slot(name, 0, index, True) for name, index in self._norms()),
        )

    def _classes(self) -> dict[tuple[tuple[str, int, int], ...], list[int]]:
        """Prunable roots by the tensors in which they occur, and how often: those of one kind form one group."""
        places: dict[int, list[tuple[str, int, int]]] = {}
        for (name, dim), (labels, _) in self._tracing.dims.items():
            free = labels[self._tracing.labels.free(labels)]
            roots, times = np.unique(self._tracing.labels.roots(free), return_counts=True)
            for root, count in zip(roots.tolist(), times.tolist(), strict=True):
                places.setdefault(root, []).append((name, dim, count))
        classes: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
        for root in sorted(places):
            classes.setdefault(tuple(places[root]), []).append(root)
        return classes

    def _index(self, labels: Ints) -> Ints:
        roots = self._tracing.labels.roots(labels).tolist()
        return np.array([self._number.get(root, KEPT) for root in roots], dtype=np.int64)

    def _norms(self) -> list[tuple[str, Ints]]:
        """Weights of norms over channels of which some may be cut."""
        found = ((name, self._index(labels)) for name, labels in self._tracing.living.items())
        return [(name, index) for name, index in found if (index != KEPT).any()]

    def _branch_of_node(self, node: Node) -> int | None:
        return next((i for i, use in enumerate(self._uses) if node in use.nodes), None)

    def _groups(self, slots: tuple[Slot, ...], layers: tuple[Layer, ...]) -> tuple[ChannelGroup, ...]:
        branch_of = {root: i for i, use in enumerate(self._uses) for root in use.inside}
        makers = [self._producers(layers, self._number[roots[0]]) for roots in self._roots]
        branches = [branch_of.get(roots[0]) for roots in self._roots]
        inside = [branch is not None for branch in branches]
        vanish = inside if self._whole else _may_vanish(slots, [len(roots) for roots in self._roots], branches)
        names = [self._name(layers, made, roots) for made, roots in zip(makers, self._roots, strict=True)]
        return tuple(
            ChannelGroup(name, len(roots), made, branch, may, self._unit(layers, roots[0]))
            for name, roots, made, branch, may in zip(names, self._roots, makers, branches, vanish, strict=True)
        )

    def _name(self, layers: tuple[Layer, ...], made: tuple[str, ...], roots: list[int]) -> str:
        """The first layer that makes the channels, with their place in it: what else is pinned changes no name."""
        if not made:
            return f"zeros{roots[0]}"
        outputs = next(layer.out_index for layer in layers if layer.name == made[0] and not layer.product)
        place = int((outputs == self._number[roots[0]]).argmax())
        return f"{made[0]}#{place}" if place else made[0]

    def _unit(self, layers: tuple[Layer, ...], root: int) -> int:
        """Channels of one layer that a gate stands for, e.g. the width of a head."""
        channel = self._number[root]
        return max((int((layer.out_index == channel).sum()) for layer in layers if not layer.product), default=1) or 1

    @staticmethod
    def _producers(layers: tuple[Layer, ...], channel: int) -> tuple[str, ...]:
        makers = (layer for layer in layers if not layer.product and (layer.out_index == channel).any())
        return tuple(dict.fromkeys(layer.name for layer in makers))

    def _pinned(self) -> tuple[PinnedGroup, ...]:
        """Pinned outputs of the layers, one entry a layer and reason; a layer that is called again counts once."""
        found: dict[tuple[str, str], int] = {}
        for use in self._tracing.layers:
            if use.mult:
                continue
            roots, times = np.unique(self._tracing.labels.roots(use.out_labels), return_counts=True)
            here: dict[tuple[str, str], int] = {}
            for root, count in zip(roots.tolist(), times.tolist(), strict=True):
                reason = self._tracing.labels.reason(root)
                if reason is not None:
                    here[use.name, reason] = here.get((use.name, reason), 0) + count
            found |= {key: max(size, found.get(key, 0)) for key, size in here.items()}
        return tuple(PinnedGroup(name, size, reason) for (name, reason), size in found.items())

    def _tallies(self, model: nn.Module, slots: tuple[Slot, ...]) -> tuple[Tally, ...]:
        homes = [(path, number) for number, use in enumerate(self._uses) for path, _ in use.stubs]
        indices: dict[str, list[Slot]] = {}
        for slot in slots:
            indices.setdefault(slot.tensor, []).append(slot)
        tallies = []
        for name, parameter in model.named_parameters():
            bound = indices.get(name, [])
            unit = int(np.prod([n for dim, n in enumerate(parameter.shape) if dim not in {s.dim for s in bound}]))
            home = next((number for path, number in homes if name.startswith(f"{path}.")), None)
            branch = None if home is None or self._read_outside(name, home) else home
            tallies.append(Tally(name, unit, tuple(slot.index for slot in bound), branch))
        return tuple(tallies)

    def _read_outside(self, name: str, branch: int) -> bool:
        """Whether a tensor is shared with what stays when the branch goes."""
        nodes = self._uses[branch].nodes
        return any(name in names and node not in nodes for node, names in self._tracing.tensors_of.items())

    def _branches(self, groups: tuple[ChannelGroup, ...]) -> tuple[Branch, ...]:
        found = []
        for number, use in enumerate(self._uses):
            inside = tuple(i for i, group in enumerate(groups) if group.branch == number)
            name = _common_path([module for module, _ in use.stubs])
            found.append(Branch(name, inside, use.stubs, use.tail, use.end, use.folds))
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
