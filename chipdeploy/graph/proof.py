"""The invariant, checked on the user's own network before any time is spent on it: gated by 0/1 equals cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from chipdeploy.copying import copied, in_mode
from chipdeploy.errors import InputError, ModelError
from chipdeploy.graph.channels import KEPT, ChannelGraph, Mask
from chipdeploy.graph.gating import Gating, gated_call, swapped
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.loud import randomize
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune

Inputs = tuple[Tensor, ...]
# Of the largest output. What is off by more is computed once again in float64: rounding goes, a fault stays.
EXACT = {torch.float64: 1e-8, torch.float32: 2e-6}
# Where the network does not run in float64.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
COARSE = 1e-2  # for any other type
# Gates of every group in trials of equal widths: code may ask whether two shapes are one, or for an even number.
EQUAL = (8, 2)
MOST_EQUAL = 6
MOST_JOINED = 8
THOROUGH = 2  # trials that are made with all weights there are
MORE_SEEDS = 3  # of loud weights, where groups are not heard with the first ones
SILENT = 1e-6  # of the largest gradient: below it a group's gates do not count in the output
# What networks raise on tensors that they were not made for.
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Failure:
    """What went wrong with a cut."""

    text: str
    path: str | None  # the module whose forward could not follow; None where the outputs differ
    mask: Mask | None = None  # the cut, where one of eval mode failed
    dead: bool = False  # branches were gone
    vanished: bool = False  # so were groups outside branches
    training: bool = False  # only in train mode


class Stopped(Exception):
    """A network that does not run, or another one than it should be."""

    def __init__(self, text: str, path: str | None = None) -> None:
        super().__init__(text)
        self.text, self.path = text, path


class Trials:
    """A network cut by a few plans and compared with its gated self, in eval mode.

    Rules decide what may be cut; this looks at what they cannot see, such as numbers written into the forward pass.
    Both networks compute with loud weights, and with others only where those overflow; the first plans with all of
    them. Where the output does not hear some gates, since a ReLU behind them is closed, the plans are tried once more
    with weights by which it does. The first plan is tried on the example, the others on one image more where the
    network takes that: it may take the batch apart, too. On the meta device only shapes are compared.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs = inputs
        self._model = model
        self._networks: tuple[nn.Module, ...] = (model,)
        if not inputs[0].is_meta:
            # A copy with its own weights, too: what a forward keeps on modules is the user's.
            self._networks = (self._loud(0), self._loud(1), in_mode(copied(model)))
        if not inputs[0].is_meta:
            _check_own(self._networks[0], model, inputs)
        more = _one_more(inputs)
        with torch.no_grad(), evaluating(model):
            self.larger = more if _runs(self._networks[0], more) else inputs

    def _loud(self, seed: int) -> nn.Module:
        """A copy with weights that hide little; of odd seeds without negative biases, scales and gains."""
        return in_mode(randomize(copied(self._model), seed=seed, positive=seed % 2 == 1))

    def failure(self, graph: ChannelGraph) -> Failure | None:
        """The first cut that goes wrong."""
        gating = Gating(graph, self.inputs[0].device)
        return self._tried(graph, gating, self._networks) or self._unheard(graph, gating) or self._in_training(graph)

    def _tried(self, graph: ChannelGraph, gating: Gating, networks: Sequence[nn.Module]) -> Failure | None:
        """The first of the trials that goes wrong."""
        for number, trial in enumerate(_trials(graph)):
            inputs = self.larger if number else self.inputs
            try:
                _compare(networks, graph, gating, trial.mask, inputs, thorough=number < THOROUGH)
            except Stopped as found:
                return Failure(found.text, found.path, trial.mask, trial.dead, trial.vanished)
        return None

    def _unheard(self, graph: ChannelGraph, gating: Gating) -> Failure | None:
        """The first trial that goes wrong where groups are heard that are silent with the first weights."""
        if self.inputs[0].is_meta:
            return None
        silent, told = np.ones(len(graph.groups), dtype=np.bool_), True
        more = (self._loud(seed) for seed in range(2, 2 + MORE_SEEDS))
        for network in chain(self._networks, more):
            still = _silent(network, graph, gating, self.larger)
            if still is None:
                told = False
                continue
            tried = network is self._networks[0]
            if (silent & ~still).any() and not tried and (failure := self._tried(graph, gating, (network,))):
                return failure
            silent &= still
            if not silent.any():
                return None
        if told and silent.all():
            return Failure("nothing in the network changes its output on the example, so no cut can be compared", None)
        return None

    def check(self, graph: ChannelGraph, mask: Mask) -> None:
        """Raises ModelError where the cut by this very plan goes wrong, with a group that is to be kept."""
        try:
            gating = Gating(graph, self.inputs[0].device)
            _compare(self._networks, graph, gating, mask, self.inputs, thorough=True)
        except Stopped as found:
            group = self.culprit(graph, mask)
            keep = "" if group is None else f"; keep {graph.groups[group].name!r} whole by --exclude"
            raise ModelError(f"the plan that was found cannot be cut: {found.text}{keep}") from found

    def culprit(self, graph: ChannelGraph, mask: Mask) -> int | None:
        """A group whose cut, on top of others, makes a failing plan fail; None where the whole network fails."""
        gating = Gating(graph, self.inputs[0].device)

        def holds(count: int) -> bool:
            part = np.where(graph.group_of < count, mask, True)
            try:
                for inputs in (self.inputs, self.larger):
                    _compare(self._networks, graph, gating, part, inputs, thorough=True)
            except Stopped:
                return False
            return True

        low, high = 0, len(graph.groups)
        if not holds(low) or holds(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def _in_training(self, graph: ChannelGraph) -> Failure | None:
        """Where the network trains its cut must, too: eval mode leaves out parts such as auxiliary heads."""
        on_gpu = [self.inputs[0].device] if self.inputs[0].is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(on_gpu):
            found = self._trained(graph, random_mask(graph, 1, 0.4))
            if found is None or not _runs(in_mode(copied(self._networks[0]), training=True), self.larger):
                return None
            dead = self._trained(graph, random_mask(graph, 1, 0.0)) is None
        return Failure(f"in train mode {found.text}", found.path, dead=dead, training=True)

    def _trained(self, graph: ChannelGraph, mask: Mask) -> Stopped | None:
        """What stops a cut network in train mode."""
        small = in_mode(hard_prune(self._networks[0], graph, PrunePlan.from_mask(graph, mask)), training=True)
        try:
            _run(small, self.larger)
        except Stopped as stopped:
            return stopped
        return None


def _compare(
    networks: Sequence[nn.Module],
    graph: ChannelGraph,
    gating: Gating,
    mask: Mask,
    inputs: Inputs,
    *,
    thorough: bool,
) -> None:
    """Raises Stopped where a cut network does not run or differs; tries the first network of finite outputs, or all."""
    finite = False
    for network in networks:
        with torch.no_grad(), evaluating(network):
            gap = _gap(network, graph, gating, mask, inputs)
        if gap is None:
            continue
        if gap > 0:
            raise Stopped(
                f"the cut network differs from the gated one by {gap:.1e} of its largest output; the forward holds "
                "or compares numbers of channels, or is random, and chipdeploy cannot follow: take numbers from "
                "tensors' shapes, and choose the way in __init__"
            )
        finite = True
        if not thorough:
            return
    if not finite:
        raise Stopped("the network's output is not finite on the example: check its weights and the example")


def _silent(network: nn.Module, graph: ChannelGraph, gating: Gating, inputs: Inputs) -> np.ndarray | None:
    """Whether a group's open gates do not count in the output, bool [groups]; None where that cannot be told."""
    gates = torch.ones(graph.channels, device=inputs[0].device, dtype=_dtype(network), requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), evaluating(network):
            outputs = _floating(gated_call(network, gating, gates, *_copies(inputs)))
            # By random weights: what a softmax gives adds up to 1, whatever its gates.
            parts = [(x * torch.randn(x.shape, generator=draw).to(x)).sum() for x in outputs]
            (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), gates, materialize_grads=True)
    except (*ERRORS, ModelError):
        return None
    strengths = gradient.abs().double().cpu().numpy()
    if not np.isfinite(strengths).all():
        return None
    heard = np.zeros(len(graph.groups))
    np.maximum.at(heard, graph.group_of, strengths)
    return np.asarray(heard <= SILENT * heard.max())


def prove(model: nn.Module, graph: ChannelGraph, example: Tensor | Inputs) -> None:
    """Raises ModelError where a cut of the model would not equal its gated self on `example`."""
    failure = Trials(model, example if isinstance(example, tuple) else (example,)).failure(graph)
    if failure is not None:
        raise ModelError(failure.text)


@dataclass(frozen=True)
class Trial:
    """A plan that is tried: with dead branches or not, with empty groups outside of them or not."""

    mask: Mask
    dead: bool = False
    vanished: bool = False


def _trials(graph: ChannelGraph) -> Iterator[Trial]:
    """One channel in every group is the hardest for code that divides; the emptiest plan is what small budgets take."""
    single = _equal_mask(graph, 1)
    yield Trial(single)
    yield Trial(random_mask(graph, 0, 0.0))
    for width in _equal_widths(graph):
        yield Trial(_equal_mask(graph, width))
    yield from _joined(graph)
    dead, empty = single.copy(), single.copy()
    for number, group in enumerate(graph.groups):
        dead[graph.span(number)] &= group.branch is None
        empty[graph.span(number)] &= not group.may_vanish
    if graph.branches:
        yield Trial(dead, dead=True)
        yield Trial(random_mask(graph, 1, 0.4), dead=True)
    if not np.array_equal(dead, empty):
        yield Trial(empty, dead=bool(graph.branches), vanished=True)


def _equal_widths(graph: ChannelGraph) -> list[int]:
    """Widths that all groups may have at once: some of their own, and those of the image and of what is pinned."""
    widest = int(graph.sizes.max())
    return [width for width in (*EQUAL, *sorted(_fixed_widths(graph) - {*EQUAL})) if 1 < width < widest][:MOST_EQUAL]


def _fixed_widths(graph: ChannelGraph) -> set[int]:
    """Widths of the image and of what is pinned."""
    return {graph.input_shape[1] if len(graph.input_shape) > 1 else 1, *(group.size for group in graph.pinned)}


def _joined(graph: ChannelGraph) -> Iterator[Trial]:
    """Cuts after which concatenated tensors are as wide as single ones: code may compare these, too."""
    parts, joins = np.zeros(len(graph.groups), dtype=np.bool_), set[tuple[int, int]]()
    for slot in graph.slots:
        groups, counts = np.unique(graph.group_of[slot.index[slot.index != KEPT]], return_counts=True)
        times, kept = int((counts // graph.sizes[groups]).sum()), int((slot.index == KEPT).sum())
        if times > 1 or (times and kept):
            parts[groups] = True
            joins.add((times, kept))
    shares = [
        (width, (width - kept) // times)
        for times, kept in sorted(joins)
        for width in (kept + 4 * times, *sorted(_fixed_widths(graph)))
        if width > kept and (width - kept) % times == 0
    ]
    for width, share in dict.fromkeys(shares[:MOST_JOINED]):
        yield Trial(_mask_of(graph, np.where(parts, share, width)))
    inside = np.array([group.branch is not None for group in graph.groups])
    for kept in sorted({kept for _, kept in joins if kept})[:MOST_JOINED]:
        if inside.any():
            yield Trial(_mask_of(graph, np.where(inside, 0, kept)), dead=True)


def _equal_mask(graph: ChannelGraph, width: int) -> Mask:
    """The first gates of every group, as many in each, or all that it has."""
    return _mask_of(graph, np.full(len(graph.groups), width))


def _mask_of(graph: ChannelGraph, widths: Ints) -> Mask:
    """The first gates of every group: its width [G], or all that it has."""
    place = np.arange(graph.channels) - np.repeat(graph.offsets[:-1], graph.sizes)
    return np.asarray(place < np.repeat(widths, graph.sizes), dtype=np.bool_)


def _gap(network: nn.Module, graph: ChannelGraph, gating: Gating, mask: Mask, inputs: Inputs) -> float | None:
    """Difference of gated and cut network over the largest output, 0 where it is rounding; None where the gated
    network's output is not finite.

    Raises:
        Stopped: one of them does not run, or the plan is none.
    """
    gates = torch.from_numpy(mask).to(inputs[0].device, _dtype(network))
    try:
        small = in_mode(hard_prune(network, graph, PrunePlan.from_mask(graph, mask)))
    except InputError as error:
        raise Stopped(str(error)) from error
    got = _run(small, inputs)
    try:
        expected = gated_call(network, gating, gates, *_copies(inputs))
    except (*ERRORS, ModelError) as error:
        raise Stopped(f"the gated network does not run: {_first_line(error)}") from error
    if not _floating(expected):
        raise Stopped("in eval mode the model returns no real numbers by which a cut could be compared; return logits")
    if not _finite(expected):
        return None
    gap = difference(expected, got)
    if gap <= EXACT.get(gates.dtype, 0.0):
        return 0.0
    precise = None if gates.dtype == torch.float64 else _in_double(network, graph, gating, mask, inputs)
    if precise is not None:
        return precise
    return 0.0 if gap <= TOLERANCES.get(gates.dtype, COARSE) else gap


def _in_double(network: nn.Module, graph: ChannelGraph, gating: Gating, mask: Mask, inputs: Inputs) -> float | None:
    """The same in float64, where rounding cannot be taken for a fault; None for a network that does not run there."""
    doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    try:
        return _gap(copied(network).double(), graph, gating, mask, doubled)
    except Stopped:
        return None


def random_mask(graph: ChannelGraph, seed: int, dead_share: float) -> Mask:
    """A legal cut: a branch is dead with probability `dead_share`, every other group loses one or more channels."""
    draw = np.random.default_rng(seed)
    dead = draw.random(len(graph.branches)) < dead_share
    mask = np.zeros(graph.channels, dtype=np.bool_)
    for number, group in enumerate(graph.groups):
        width = 0 if group.branch is not None and dead[group.branch] else int(draw.integers(1, max(2, group.size)))
        mask[graph.span(number).start + draw.permutation(group.size)[:width]] = True
    return mask


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


def _check_own(copy_of: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    """Raises ModelError where a copy of the model computes with the model's own weights: a cut copy would, too."""
    with torch.no_grad(), evaluating(model):
        own: list[Tensor] = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        lost = {tensor: tensor.new_full((), torch.nan).expand_as(tensor) for tensor in own}
        try:
            before = copy_of(*_copies(inputs))
            with swapped(model, lost):
                after = copy_of(*_copies(inputs))
        except ERRORS:
            return  # it does not run: the trials say why
    if _finite(before) and not _finite(after):
        raise ModelError(
            "a copy of the model still computes with the model's own weights: its forward, or a part of it, is a "
            "lambda or closure that holds the original; make it a method that takes layers from self"
        )


def _run(model: nn.Module, inputs: Inputs) -> object:
    """The model's output.

    Raises:
        Stopped: with the path of the module that failed and the first line of its error.
    """
    stack: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    enter = nn.modules.module.register_module_forward_pre_hook(lambda module, _: stack.append(names.get(module, "")))
    leave = nn.modules.module.register_module_forward_hook(lambda module, _, __: _pop(stack))
    try:
        return model(*_copies(inputs))
    except ERRORS as error:
        path = stack[-1] if stack else ""
        raise Stopped(_cannot_follow(path, _first_line(error)), path) from error
    finally:
        enter.remove()
        leave.remove()


def _pop(stack: list[str]) -> None:
    """Returns nothing: what a forward hook returns replaces the output."""
    stack.pop()


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        model(*_copies(inputs))
    except ERRORS:
        return False
    return True


def _copies(inputs: Inputs) -> Inputs:
    """A forward may write to its inputs."""
    return tuple(x.clone() for x in inputs)


def _one_more(inputs: Inputs) -> Inputs:
    """The batch with its first sample once again at the end."""
    count = inputs[0].shape[:1]
    return tuple(torch.cat([x, x[:1]]) if x.dim() and x.shape[:1] == count else x for x in inputs)


def _floating(outputs: object) -> list[Tensor]:
    """Its tensors of real numbers; complex ones by their parts."""
    tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors if x.is_floating_point() or x.is_complex()]


def _finite(outputs: object) -> bool:
    tensors = (x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and not x.is_meta)
    return all(bool(x.isfinite().all()) for x in tensors)


def _cannot_follow(path: str, error: str) -> str:
    return (
        f"the cut network does not run: {error}; the forward of {path or 'the model'} holds numbers of channels that "
        "chipdeploy cannot follow: take them from the tensors' shapes"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def difference(expected: object, got: object) -> float:
    """Largest difference of two outputs of one structure, over the largest value of each tensor; inf where they differ
    in shape."""
    ones, others = (pytree.tree_flatten(side) for side in (expected, got))
    if str(ones[1]) != str(others[1]):
        return float("inf")
    errors = [0.0]
    for one, other in zip(ones[0], others[0], strict=True):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            continue
        if one.shape != other.shape:
            return float("inf")
        if not one.numel() or one.is_meta:
            continue
        if one.is_floating_point() or one.is_complex():
            errors.append(float((one - other).abs().max() / one.abs().max().clamp_min(1e-12)))
        else:  # classes, masks: the share that differs
            errors.append(float((one != other).double().mean()))
    return max(errors) if np.isfinite(errors).all() else float("inf")
