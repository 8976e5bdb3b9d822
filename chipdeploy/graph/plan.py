"""A prune plan: the channels of every group that stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chipdeploy.errors import InputError
from chipdeploy.graph.channels import KEPT, ChannelGraph, Mask
from chipdeploy.graph.labels import Ints

SCHEMA = 1


@dataclass(frozen=True)
class PrunePlan:
    """Kept channel indices of every group, ascending, by group name. Groups not named stay whole."""

    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_mask(cls, graph: ChannelGraph, mask: Mask) -> PrunePlan:
        """The plan that keeps the channels at which `mask` [channels] is true."""
        return cls(
            {group.name: tuple(np.flatnonzero(mask[graph.span(i)]).tolist()) for i, group in enumerate(graph.groups)}
        )

    def mask(self, graph: ChannelGraph) -> Mask:
        """True where a channel stays, bool [channels].

        Raises:
            InputError: a group or channel that the graph does not have, or a cut that breaks the network.
        """
        mask = np.ones(graph.channels, dtype=np.bool_)
        numbers = {group.name: i for i, group in enumerate(graph.groups)}
        for name, kept in self.kept.items():
            if name not in numbers:
                raise InputError(
                    f"the plan names the group {name!r}, which the model lacks; use the model it was made for"
                )
            span = graph.span(numbers[name])
            size = span.stop - span.start
            if len(set(kept)) != len(kept) or any(not 0 <= channel < size for channel in kept):
                raise InputError(f"the plan keeps channels of {name} outside 0..{size - 1}, or one of them twice")
            mask[span] = False
            mask[np.array(kept, dtype=np.int64) + span.start] = True
        check_mask(graph, mask)
        return mask

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kept": {name: list(kept) for name, kept in self.kept.items()}}

    @classmethod
    def from_dict(cls, raw: Any) -> PrunePlan:
        """Raises InputError where `raw` is no plan of this schema."""
        try:
            if raw["schema"] != SCHEMA:
                raise InputError(f"a plan of schema {raw['schema']}; this version reads schema {SCHEMA}")
            return cls({str(name): tuple(int(channel) for channel in kept) for name, kept in raw["kept"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a prune plan: {error!r}; write it anew with 'chipdeploy prune'") from error


def group_widths(graph: ChannelGraph, mask: Mask) -> Ints:
    """Kept channels of every group, int64 [G]."""
    return np.bincount(graph.group_of, weights=mask, minlength=len(graph.groups)).astype(np.int64)


def dead_branches(graph: ChannelGraph, widths: Ints) -> list[int]:
    """Branches whose groups are empty."""
    return [i for i, branch in enumerate(graph.branches) if not widths[list(branch.groups)].any()]


def check_mask(graph: ChannelGraph, mask: Mask) -> None:
    """Refuse a cut after which the network would fall apart.

    Raises:
        InputError: an empty group that must not be, a branch that is empty in part, or a tensor with no channel left.
    """
    widths = group_widths(graph, mask)
    for group, width in zip(graph.groups, widths.tolist(), strict=True):
        if width == 0 and not group.may_vanish:
            raise InputError(
                f"the plan keeps nothing of {group.name}, which cuts the network in two; keep 1 channel or more"
            )
    for branch in graph.branches:
        inside = widths[list(branch.groups)]
        if inside.any() and not inside.all():
            raise InputError(f"the plan empties the branch {branch.name} in part; empty all of its groups or none")
    gone = tuple(f"{module}." for i in dead_branches(graph, widths) for module, _ in graph.branches[i].stubs)
    for slot in graph.slots:
        alive = (slot.index == KEPT) | mask[slot.index]
        if not alive.any() and not slot.tensor.startswith(gone):
            raise InputError(f"the plan keeps no channel of {slot.tensor}; keep 1 or more")
