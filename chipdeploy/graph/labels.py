"""Channel labels: one integer per channel of every tensor; channels that must live and die together share a class.

The labels of a tensor are an array of its rank: full size along the dimensions in which channels differ, 1 along
all others. Images [N, C, H, W] have labels [1, C, 1, 1]; queries [N, heads, tokens, width] have [1, heads, 1, width].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Labels:
    """A union-find over channel labels, with the reasons for which some may not be cut."""

    def __init__(self) -> None:
        self._count = 0
        self._parents = np.zeros(0, dtype=np.int64)  # longer than the count, so that growing is cheap
        self._reason = np.zeros(0, dtype=np.int64)  # of a root: 1 + its place in the texts, 0 where it is free
        self._texts: list[str] = []

    def new(self, *sizes: int) -> Ints:
        """Fresh labels in an array of these sizes, each a class of its own."""
        first, self._count = self._count, self._count + int(np.prod(sizes))
        if self._count > len(self._parents):
            room = max(1024, 2 * self._count)
            self._parents = np.concatenate([self._parents, np.arange(len(self._parents), room)])
            self._reason = np.concatenate([self._reason, np.zeros(room - len(self._reason), dtype=np.int64)])
        return np.arange(first, self._count, dtype=np.int64).reshape(sizes)

    def roots(self, labels: Ints) -> Ints:
        """The representative of every label's class: its smallest label."""
        found = self._parents[labels]
        while not np.array_equal(found, above := self._parents[found]):
            found = above
        self._parents[labels] = found
        return found

    def unite(self, left: Ints, right: Ints) -> Ints:
        """Join class by class, element by element, after broadcasting; returns the roots.

        Raises:
            ValueError: the shapes do not broadcast.
        """
        one, other = (np.ascontiguousarray(side) for side in np.broadcast_arrays(left, right))
        a, b = self.roots(one), self.roots(other)
        joined = []
        while (differ := a != b).any():
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            # Several partners of one root: the smallest is taken now, the others are found different again.
            np.minimum.at(self._parents, high, low)
            joined.append(high[self._reason[high] > 0])
            a, b = self.roots(a), self.roots(b)
        if joined:
            self._move_reasons(np.unique(np.concatenate(joined)))
        return a

    def merge(self, labels: Ints, axis: int) -> Ints:
        """Make one class of all that differs along `axis`; returns the roots, of size 1 there."""
        first = np.take(labels, [0], axis)
        self.unite(labels, first)
        return self.roots(first)

    def reduced(self, labels: Ints) -> Ints:
        """The roots, of size 1 along every dimension in which no classes differ."""
        roots = self.roots(labels)
        for axis, size in enumerate(roots.shape):
            if size > 1:
                first = np.take(roots, [0], axis)
                roots = first if (roots == first).all() else roots
        return roots

    def pin(self, labels: Ints, reason: str) -> None:
        """Forbid cutting these channels; the first reason given to a class stays."""
        roots = self.roots(labels)
        free = roots[self._reason[roots] == 0]
        if free.size:
            self._texts.append(reason)
            self._reason[free] = len(self._texts)

    def reason(self, root: int) -> str | None:
        """Why the class of `root` is pinned, or None."""
        number = int(self._reason[self.roots(np.array([root]))[0]])
        return self._texts[number - 1] if number else None

    def free(self, labels: Ints) -> NDArray[np.bool_]:
        """Where the channels are not pinned."""
        found: NDArray[np.bool_] = self._reason[self.roots(labels)] == 0
        return found

    def _move_reasons(self, pinned: Ints) -> None:
        """The reasons of roots that are none any more go to their new ones; the earliest reason wins."""
        roots, place = np.unique(self.roots(pinned), return_inverse=True)
        now = self._reason[roots]
        earliest = np.where(now == 0, np.iinfo(np.int64).max, now)
        np.minimum.at(earliest, place, self._reason[pinned])
        self._reason[roots] = earliest
