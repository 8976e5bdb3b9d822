"""After the walk: unions and pins that need all of the network to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from chipdeploy.errors import UsageError
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.multihead import FOLLOWING
from chipdeploy.graph.rules.base import Doubt, Tracing
from chipdeploy.graph.rules.pick import attribute_of


def settle(tracing: Tracing, exclude: Sequence[str] = ()) -> None:
    """Make every split dimension a grid, turn element-wise tensors into slots and sizes into counts, pin the rest.

    Raises:
        UsageError: a pattern in `exclude` matches no layer.
    """
    _pin_frozen(tracing)
    _pin_excluded(tracing, exclude)
    for grid in tracing.grids:
        _make_grid(tracing, grid)
    _doubt_scaled(tracing)
    _pin_unmade(tracing)
    _slice_whole(tracing)
    _state_sizes(tracing)
    _pin_contradictions(tracing)


def _pin_frozen(tracing: Tracing) -> None:
    frozen = {name for name, parameter in tracing.model.named_parameters() if not parameter.requires_grad}
    for (name, _), (labels, _) in tracing.dims.items():
        if name in frozen:
            tracing.labels.pin(labels, f"{name} is frozen (requires_grad is False)")
    for name in frozen & set(tracing.whole):
        tracing.labels.pin(tracing.whole[name], f"{name} is frozen (requires_grad is False)")


def _pin_excluded(tracing: Tracing, exclude: Sequence[str]) -> None:
    layers = [use for use in tracing.layers if not use.mult]
    for pattern in exclude:
        matched = [use for use in layers if fnmatchcase(use.name, pattern) or fnmatchcase(use.name, f"{pattern}.*")]
        if not matched:
            raise UsageError(f"--exclude {pattern} matches no layer; see 'chipdeploy inspect' for the names")
        for use in matched:
            tracing.labels.pin(use.out_labels, f"excluded by {pattern}")


def _make_grid(tracing: Tracing, grid: Ints) -> None:
    """Channels may differ along one dimension only, the longest: along the others they live and die together."""
    reduced = tracing.labels.reduced(grid)
    varying = [axis for axis, size in enumerate(reduced.shape) if size > 1]
    if len(varying) < 2 or not tracing.labels.free(reduced).any():
        return
    free = max(varying, key=lambda axis: (reduced.shape[axis], axis))
    for axis in varying:
        if axis != free:
            reduced = tracing.labels.merge(reduced, axis)


def _doubt_scaled(tracing: Tracing) -> None:
    """A factor that equals a number of channels may be computed from it, unless these channels stay together."""
    for path, flow, axis in tracing.scales:
        labels = tracing.labels.reduced(flow)
        if labels.shape[axis] > 1:
            count = labels.shape[axis]
            tracing.doubts.append(
                Doubt(path, labels, f"scales by a number that comes from the count of its {count} channels")
            )


def _pin_unmade(tracing: Tracing) -> None:
    """Only what a layer makes can be cut: a table of parameters that meets no layer's channels stays."""
    made = [use.out_labels.reshape(-1) for use in tracing.layers if not use.mult]
    made += [labels for _, attribute, labels in tracing.counts if attribute in ("before", "after")]
    if not made:
        return
    roots = np.unique(tracing.labels.roots(np.concatenate(made)))
    for name, labels in tracing.whole.items():
        own = tracing.labels.roots(labels)
        tracing.labels.pin(own[~np.isin(own, roots)], f"no layer makes the channels of {name}")


def _slice_whole(tracing: Tracing) -> None:
    """Parameters and buffers that are read element by element: sliced along the dimension of their channels."""
    bound = {name for name, _ in tracing.dims}
    for name, labels in tracing.whole.items():
        reduced = tracing.labels.reduced(labels)
        axes = [axis for axis, size in enumerate(reduced.shape) if size > 1]
        if name in bound:
            for (tensor, _), (own, _) in tracing.dims.items():
                if tensor == name:
                    tracing.labels.pin(own, f"{name} is read as a weight and element by element")
            tracing.labels.pin(labels, f"{name} is read as a weight and element by element")
        elif len(axes) > 1:
            tracing.labels.pin(labels, f"the channels of {name} vary along several dimensions")
        elif axes:
            tracing.dims[name, axes[0]] = (reduced.reshape(-1), False)


def follow_attributes(tracing: Tracing, kind: type) -> bool:
    """From now on widths that are attributes of modules of this kind follow the cut; False where none would.

    They do not before a trial has shown the need: `if self.dim != self.dim_out` takes another way when `dim` changes.
    """
    if kind in tracing.following:
        return False
    tracing.following.add(kind)
    before = len(tracing.counts)
    _state_sizes(tracing, kind)
    _pin_contradictions(tracing)
    return len(tracing.counts) > before


def _state_sizes(tracing: Tracing, kind: type | None = None) -> None:
    """Count what attributes state: ends of slices and numbers of heads, or all widths in modules of one kind."""
    for use in tracing.sizes:
        module = tracing.model.get_submodule(use.path)
        labels = tracing.labels.reduced(use.labels)
        if labels.shape[use.axis] == 1 or kind not in (None, type(module)):
            continue
        if labels.size > labels.shape[use.axis]:
            tracing.labels.pin(labels, f"reshaped in {use.path} to channels along several dimensions")
            continue
        if type(module) in FOLLOWING:  # its widths follow by `graph/multihead.py`
            continue
        name = attribute_of(module, use.size, heads=use.axis < labels.ndim - 1)
        if name is not None and (kind is not None or use.sure or _counts_heads(name)):
            tracing.count(use.path, name, labels.reshape(-1))


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name


def _pin_contradictions(tracing: Tracing) -> None:
    """An attribute that would have to state two widths holds both."""
    stated: dict[tuple[str, str], Ints] = {}
    for path, attribute, labels in tracing.counts:
        other = stated.setdefault((path, attribute), labels)
        if not np.array_equal(tracing.labels.roots(other), tracing.labels.roots(labels)):
            for each in (other, labels):
                tracing.labels.pin(each, f"{path}.{attribute} states the widths of two things")
