"""What to pin, or which branches to keep, after a cut that the network's code could not follow."""

from __future__ import annotations

from collections.abc import Iterator

from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.proof import Failure
from chipdeploy.graph.rules.base import Doubt, Tracing, nodes_of
from chipdeploy.graph.settle import follow_attributes


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
