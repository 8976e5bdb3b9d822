"""Two costs as one: a weighted sum of what they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chipdeploy.chipnet.costs import Cost, Floats
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints


@dataclass(frozen=True, eq=False)
class Blend:
    """first · share of the first cost + second · share of the second. Implements `Cost`.

    Args:
        terms: how many terms the first cost has.
    """

    parts: tuple[Cost, Cost]
    weights: tuple[float, float]
    terms: int

    @classmethod
    def of(cls, graph: ChannelGraph, parts: tuple[Cost, Cost], weights: tuple[float, float]) -> Blend:
        """Of two costs of one graph; the dense network costs the sum of the weights."""
        touched = parts[0].touching(tuple(range(len(graph.groups))))
        return cls(parts, weights, 1 + int(touched.max(initial=-1)))

    @property
    def dense(self) -> float:
        """The unit: plans are counted in shares already."""
        return 1.0

    def count(self, widths: Ints) -> float:
        """The cost at widths [G]."""
        return float(self.counts(np.asarray(widths)[None])[0])

    def counts(self, widths: Ints) -> Floats:
        """[K, G] ▶ [K]."""
        one, two = (
            weight * part.counts(widths) / part.dense for part, weight in zip(self.parts, self.weights, strict=True)
        )
        return np.asarray(one + two)

    def touching(self, groups: tuple[int, ...]) -> Ints:
        """Terms of the first cost, then those of the second."""
        one, two = (part.touching(groups) for part in self.parts)
        return np.concatenate([one, two + self.terms])

    def partial(self, widths: Ints, terms: Ints) -> Floats:
        """The sums of some terms, [K, G] ▶ [K]."""
        total = np.zeros(len(widths))
        split = terms < self.terms
        for part, weight, chosen in zip(
            self.parts, self.weights, (terms[split], terms[~split] - self.terms), strict=True
        ):
            if len(chosen):
                total += weight * part.partial(widths, chosen) / part.dense
        return total

    def soft(self, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """The blended share at soft widths [G] and soft presence of the branches [B], differentiable."""
        one, two = (part.soft(device) for part in self.parts)
        return lambda widths, alive: self.weights[0] * one(widths, alive) + self.weights[1] * two(widths, alive)
