"""The invariant, checked on the user's own network before any time is spent on it: gated by 0/1 equals cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from chipdeploy.errors import InputError, ModelError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.rules.base import Doubt, Tracing, nodes_of
from chipdeploy.graph.settle import follow_attributes
from chipdeploy.graph.surgery import hard_prune

# Of the largest output. Right cuts are off by 1e-6 in float32; a quiet network's output hears little of a wrong one.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
COARSE = 1e-2  # for any other type


@dataclass(frozen=True)
class Failure:
    """What went wrong with a cut."""

    text: str
    path: str | None  # the module whose forward could not follow; None where the outputs differ
    dead: bool  # branches were gone
    vanished: bool  # so were groups outside branches


def try_cut(model: nn.Module, graph: ChannelGraph, inputs: tuple[Tensor, ...]) -> Failure | None:
    """Cut the model by a few plans and compare with the gated model on `inputs`, in eval mode.

    Rules decide what may be cut; this looks at what they cannot see, such as numbers written into the forward pass.
    On the meta device only shapes are compared.
    """
    gating = Gating(graph, inputs[0].device)
    for trial in _trials(graph):
        text, path = _attempt(model, graph, gating, trial.mask, inputs)
        if text is not None:
            return Failure(text, path, trial.dead, trial.vanished)
    return None


@dataclass(frozen=True)
class Trial:
    """A plan that is tried: with dead branches or not, with empty groups outside of them or not."""

    mask: Mask
    dead: bool = False
    vanished: bool = False


def _trials(graph: ChannelGraph) -> Iterator[Trial]:
    """One channel in every group is the hardest for code that divides; the emptiest plan is what small budgets take."""
    single = np.zeros(graph.channels, dtype=np.bool_)
    single[graph.offsets[:-1]] = True
    yield Trial(single)
    yield Trial(random_mask(graph, 0, 0.0))
    dead, empty = single.copy(), single.copy()
    for number, group in enumerate(graph.groups):
        dead[graph.span(number)] &= group.branch is None
        empty[graph.span(number)] &= not group.may_vanish
    if graph.branches:
        yield Trial(dead, dead=True)
        yield Trial(random_mask(graph, 1, 0.4), dead=True)
    if not np.array_equal(dead, empty):
        yield Trial(empty, dead=bool(graph.branches), vanished=True)


def _attempt(
    model: nn.Module, graph: ChannelGraph, gating: Gating, mask: Mask, inputs: tuple[Tensor, ...]
) -> tuple[str | None, str | None]:
    """Why a cut failed and in which module; (None, None) for one that equals its gated self."""
    gates = torch.from_numpy(mask).to(inputs[0].device, _dtype(model))
    try:
        small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
    except InputError as error:
        return str(error), None
    with torch.no_grad(), evaluating(model):
        got, failed = _run(small, inputs)
        if failed is not None:
            return _cannot_follow(*failed), failed[0]
        try:
            expected = gated_call(model, gating, gates, *inputs)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ModelError) as error:
            return f"the gated network does not run: {_first_line(error)}", None
    gap = difference(expected, got)
    if gap <= TOLERANCES.get(gates.dtype, COARSE):
        return None, None
    return (
        f"the cut network differs from the gated one by {gap:.1e} of its largest output; the forward holds "
        "numbers of channels, or is random, and chipdeploy cannot follow: take numbers from tensors' shapes"
    ), None


def prove(model: nn.Module, graph: ChannelGraph, example: Tensor | tuple[Tensor, ...]) -> None:
    """Raises ModelError where a cut of the model would not equal its gated self on `example`."""
    failure = try_cut(model, graph, example if isinstance(example, tuple) else (example,))
    if failure is not None:
        raise ModelError(failure.text)


def repair(tracing: Tracing, failure: Failure, graph: ChannelGraph, banned: set[str]) -> bool:
    """Pin what a failed cut went through, or forbid the branches; False when there is nothing left to try."""
    if failure.dead and graph.branches:
        return _ban(failure, graph, banned)
    for path in [] if failure.path is None else _upwards(failure.path):
        kind = type(tracing.model.get_submodule(path))
        if kind.__module__.startswith("torch.nn."):  # a layer that was given a wrong width by the module around it
            continue
        if follow_attributes(tracing, kind):
            return True
        # What fails in one block of a kind fails in all of them.
        alike = [name for name, module in tracing.model.named_modules() if type(module) is kind]
        for blamed in (_doubts(tracing, alike), _inputs(tracing, alike)):
            if blamed and any(doubt.path == path for doubt in blamed):
                _pin(tracing, blamed)
                return True
    left = _doubts(tracing, None)
    _pin(tracing, left)
    return bool(left)


def _pin(tracing: Tracing, doubts: list[Doubt]) -> None:
    for doubt in doubts:
        where = doubt.path or "the model"
        tracing.labels.pin(doubt.labels, f"the forward of {where} holds numbers of channels that cannot follow a cut")


def _doubts(tracing: Tracing, paths: list[str] | None) -> list[Doubt]:
    """Noted doubts in modules, or in all of them, about channels that are not pinned."""
    return [
        doubt
        for doubt in tracing.doubts
        if (paths is None or doubt.path in paths) and tracing.labels.free(doubt.labels).any()
    ]


def _inputs(tracing: Tracing, paths: list[str]) -> list[Doubt]:
    """Channels that enter modules and are not pinned: widths of heads may be computed from those of the input."""
    found = []
    for path in filter(None, paths):
        nodes = nodes_of(tracing, path)
        read = {a for node in nodes for a in node.all_input_nodes if a not in nodes and not tracing.is_tensor(a)}
        flows = [tracing.flows.get(node) for node in read]
        labels = [flow for flow in flows if flow is not None and not isinstance(flow, list)]
        found += [Doubt(path, flow) for flow in labels if tracing.labels.free(flow).any()]
    return found


def _ban(failure: Failure, graph: ChannelGraph, banned: set[str]) -> bool:
    """Forbid the branches that the failing module takes part in, or all of them."""
    path = failure.path
    kinds = [] if path is None else [_around, _beside]
    found = ({b.end for b in graph.branches if any(near(path or "", m) for m, _ in b.stubs)} for near in kinds)
    # The nearest that are found at all; where nothing is near, no branch may go.
    new = next((ends for ends in found if ends), {branch.end for branch in graph.branches}) - banned
    banned |= new
    return bool(new)


def _around(path: str, other: str) -> bool:
    """Whether one of two modules lies in the other."""
    return bool(path) and (f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."))


def _beside(path: str, other: str) -> bool:
    """Whether a module lies in another's parent."""
    parent = other.rpartition(".")[0]
    return path == parent or (bool(parent) and path.startswith(f"{parent}."))


def _upwards(path: str) -> Iterator[str]:
    """A module's path, then those of the modules around it, the model itself ("") last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


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


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[object, tuple[str, str] | None]:
    """The output, or the path of the module that failed and the first line of its error."""
    stack: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    enter = nn.modules.module.register_module_forward_pre_hook(lambda module, _: stack.append(names.get(module, "")))
    leave = nn.modules.module.register_module_forward_hook(lambda module, _, __: _pop(stack))
    try:
        return model(*inputs), None
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
        return None, (stack[-1] if stack else "", _first_line(error))
    finally:
        enter.remove()
        leave.remove()


def _pop(stack: list[str]) -> None:
    """Returns nothing: what a forward hook returns replaces the output."""
    stack.pop()


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
        if one.is_floating_point() and one.numel() and not one.is_meta:
            errors.append(float((one - other).abs().max() / one.abs().max().clamp_min(1e-12)))
    return max(errors) if np.isfinite(errors).all() else float("inf")
