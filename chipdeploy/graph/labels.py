"""Channel labels: one integer per channel of every tensor; channels that must live and die together share a class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Flow:
    """The labelled dimension of one tensor: `labels[i]` names channel i along `dim`."""

    dim: int
    labels: Ints


class Labels:
    """A union-find over channel labels, with the reasons for which some may not be cut."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._reasons: dict[int, str] = {}

    def new(self, count: int) -> Ints:
        """`count` fresh labels, each a class of its own."""
        first = len(self._parent)
        fresh = np.arange(first, first + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        return fresh

    def roots(self, labels: Ints) -> Ints:
        """The representative of every label's class."""
        found = self._parent[labels]
        while not np.array_equal(found, self._parent[found]):
            found = self._parent[found]
        self._parent[labels] = found
        return found

    def unite(self, left: Ints, right: Ints) -> Ints:
        """Join class by class, element by element; returns the roots. Both have the same length."""
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            a, b = self._find(one), self._find(other)
            if a != b:
                keep, drop = min(a, b), max(a, b)
                self._parent[drop] = keep
                if drop in self._reasons:
                    self._reasons.setdefault(keep, self._reasons[drop])
        return self.roots(left)

    def pin(self, labels: Ints, reason: str) -> None:
        """Forbid cutting these channels; the first reason given to a class stays."""
        for root in np.unique(self.roots(labels)).tolist():
            self._reasons.setdefault(root, reason)

    def reason(self, root: int) -> str | None:
        """Why the class of `root` is pinned, or None."""
        return self._reasons.get(root)

    def _find(self, label: int) -> int:
        while (up := int(self._parent[label])) != label:
            label = up
        return label
