"""What to pin, or which branches to keep, after a cut that the network's code could not follow."""

from __future__ import annotations

from collections.abc import Iterator

from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.proof import Failure
from chipdeploy.graph.rules.base import Doubt, Tracing, nodes_of
from chipdeploy.graph.settle import follow_attributes


def repair(tracing: Tracing, failure: Failure, graph: ChannelGraph, banned: dict[str, type | None]) -> bool:
    """Pin what a failed cut went through, or forbid the branches; False when there is nothing left to try.

    `banned`: the ends of forbidden branches, with the kind of the module that failed; added to.
    """
    if failure.dead and graph.branches:
        return _ban(tracing, failure, graph, banned)
    for path in [] if failure.path is None else _upwards(failure.path):
        kind = type(tracing.model.get_submodule(path))
        if kind.__module__.startswith("torch.nn."):  # a layer that was given a wrong width by the module around it
            continue
        if follow_attributes(tracing, kind):
            return True
        alike = _alike(tracing, kind)
        for blamed in (_doubts(tracing, alike), _inputs(tracing, alike)):
            if blamed and any(doubt.path == path for doubt in blamed):
                _pin(tracing, blamed)
                return True
    left = _doubts(tracing, None)
    _pin(tracing, left)
    return bool(left)


def _pin(tracing: Tracing, doubts: list[Doubt]) -> None:
    for doubt in doubts:
        tracing.labels.pin(doubt.labels, f"the forward of {doubt.path or 'the model'} {doubt.why}")


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


def _ban(tracing: Tracing, failure: Failure, graph: ChannelGraph, banned: dict[str, type | None]) -> bool:
    """Forbid the branches that the failing module takes part in, or all of them.

    When a second module of a kind fails, all of the kind are taken to: deep networks have many.
    """
    paths = [] if failure.path is None else [failure.path]
    kind = _kind(tracing, failure.path or "")
    if kind is not None and kind in banned.values():
        paths = _alike(tracing, kind)
    found = (
        {branch.end for branch in graph.branches if any(near(path, stub) for path in paths for stub, _ in branch.stubs)}
        for near in (_around, _beside)
    )
    # The nearest that are found at all; where nothing is near, no branch may go.
    new = next((ends for ends in found if ends), {branch.end for branch in graph.branches})
    banned.update(dict.fromkeys(new, kind))
    return bool(new)


def _kind(tracing: Tracing, path: str) -> type | None:
    """Of the module, or of the nearest around it that is no layer of PyTorch's; None for the whole model."""
    kinds = (type(tracing.model.get_submodule(place)) for place in _upwards(path) if place)
    return next((kind for kind in kinds if not kind.__module__.startswith("torch.nn.")), None)


def _alike(tracing: Tracing, kind: type) -> list[str]:
    """Paths of all modules of a kind: what fails in one of them fails in all."""
    return [name for name, module in tracing.model.named_modules() if type(module) is kind]


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
