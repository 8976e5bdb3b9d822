"""What a network costs, as a polynomial of its group widths: counted on what is deployed, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipdeploy.errors import UsageError
from chipdeploy.graph.channels import KEPT, ChannelGraph
from chipdeploy.graph.labels import Ints

Floats = NDArray[np.float64]
CONSTANT = -1  # "no group": the factor 1
Term = tuple[float, int, int, int]  # coefficient, group, group, branch (CONSTANT where there is none)

COSTS: dict[str, Callable[[ChannelGraph], Iterator[Term]]] = {}
UNITS = {"macs": "MACs", "params": "params", "channels": "channels", "volume": "activations"}
# The budget's name on the command line ▶ the cost it limits. FLOPs are 2 · MACs, so the kept share is the same.
BUDGETS = {"flops": "macs", "params": "params", "channels": "channels", "volume": "volume"}


def cost(name: str) -> Callable[[Callable[[ChannelGraph], Iterator[Term]]], Callable[[ChannelGraph], Iterator[Term]]]:
    """Register a cost formula."""

    def register(terms: Callable[[ChannelGraph], Iterator[Term]]) -> Callable[[ChannelGraph], Iterator[Term]]:
        COSTS[name] = terms
        return terms

    return register


@cost("macs")
def macs(graph: ChannelGraph) -> Iterator[Term]:
    """Σ H·W·k²·n_out·n_in over convolutions, linear layers and products; biases and norms cost none, as in PyTorch."""
    for layer in graph.layers:
        scale = layer.positions * layer.kernel
        for out_times, out_group in spans(graph, layer.out_index):
            if not len(layer.in_index):
                yield scale * out_times, out_group, CONSTANT, _branch(layer.branch)
            for in_times, in_group in spans(graph, layer.in_index):
                yield scale * out_times * in_times, out_group, in_group, _branch(layer.branch)


@cost("params")
def params(graph: ChannelGraph) -> Iterator[Term]:
    """All parameters: weights, biases, norms, and those that no rule knows."""
    for tally in graph.tallies:
        firsts = spans(graph, tally.indices[0]) if tally.indices else [(1, CONSTANT)]
        seconds = spans(graph, tally.indices[1]) if len(tally.indices) > 1 else [(1, CONSTANT)]
        for one_times, one in firsts:
            for two_times, two in seconds:
                yield tally.unit * one_times * two_times, one, two, _branch(tally.branch)


@cost("channels")
def channels(graph: ChannelGraph) -> Iterator[Term]:
    """Σ n_out over convolutions and linear layers."""
    for layer in graph.layers:
        for times, group in [] if layer.product else spans(graph, layer.out_index):
            yield times, group, CONSTANT, _branch(layer.branch)


@cost("volume")
def volume(graph: ChannelGraph) -> Iterator[Term]:
    """Activation volume: Σ H·W·n_out over the outputs of convolutions and linear layers, for one image."""
    for layer in graph.layers:
        for times, group in [] if layer.product else spans(graph, layer.out_index):
            yield layer.positions * times, group, CONSTANT, _branch(layer.branch)


def spans(graph: ChannelGraph, index: Ints) -> list[tuple[int, int]]:
    """A dimension as Σ times · n_group: (times, group) pairs, the always kept channels as (count, CONSTANT)."""
    pairs = []
    kept = int((index == KEPT).sum())
    if kept:
        pairs.append((kept, CONSTANT))
    owners = graph.group_of[index[index != KEPT]]
    for group, count in zip(*np.unique(owners, return_counts=True), strict=True):
        pairs.append((int(count) // graph.groups[group].size, int(group)))
    return pairs


def _branch(branch: int | None) -> int:
    return CONSTANT if branch is None else branch


class Cost(Protocol):
    """What a projection limits: a sum of terms over group widths n, int64 [G]."""

    @property
    def dense(self) -> float:
        """The cost of the whole network."""

    def count(self, widths: Ints) -> float:
        """The cost at widths [G]."""

    def counts(self, widths: Ints) -> Floats:
        """The costs of many width vectors [K, G] ▶ [K]."""

    def touching(self, groups: tuple[int, ...]) -> Ints:
        """Numbers of the terms that depend on any of the groups."""

    def partial(self, widths: Ints, terms: Ints) -> Floats:
        """The sums of some terms, [K, G] ▶ [K]."""

    def soft(self, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """The share of the dense cost at soft widths [G] and soft presence of the branches [B], differentiable."""


@dataclass(frozen=True, eq=False)
class CostModel:
    """cost(n) = Σ coefficient · n_i · n_j · alive_b over the terms; n are group widths."""

    name: str
    coefficients: Floats  # [T]
    first: Ints  # [T], G for the constant 1
    second: Ints  # [T], likewise
    branch: Ints  # [T], B for no branch
    sizes: Ints  # [G]
    branch_groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, graph: ChannelGraph, name: str) -> CostModel:
        """Compile a cost by its name in COSTS.

        Raises:
            UsageError: an unknown cost.
        """
        if name not in COSTS:
            raise UsageError(f"unknown cost {name!r}; known: {', '.join(COSTS)}")
        merged: dict[tuple[int, int, int], float] = {}
        for coefficient, one, two, branch in COSTS[name](graph):
            key = (min(one, two), max(one, two), branch)
            merged[key] = merged.get(key, 0.0) + coefficient
        keys = np.array(list(merged), dtype=np.int64).reshape(-1, 3)
        groups, branches = len(graph.groups), len(graph.branches)
        return cls(
            name,
            np.array(list(merged.values()), dtype=np.float64),
            np.where(keys[:, 0] == CONSTANT, groups, keys[:, 0]),
            np.where(keys[:, 1] == CONSTANT, groups, keys[:, 1]),
            np.where(keys[:, 2] == CONSTANT, branches, keys[:, 2]),
            graph.sizes,
            tuple(branch.groups for branch in graph.branches),
        )

    @property
    def dense(self) -> float:
        """The cost of the whole network."""
        return self.count(self.sizes)

    def count(self, widths: Ints) -> float:
        """The cost at integer widths [G]."""
        return float(self.counts(np.asarray(widths)[None])[0])

    def counts(self, widths: Ints) -> Floats:
        """The costs of many width vectors [K, G] ▶ [K]."""
        return self.partial(widths, np.arange(len(self.coefficients)))

    def touching(self, groups: tuple[int, ...]) -> Ints:
        """Numbers of the terms in which any of the groups, or a branch of theirs, occurs."""
        branches = [b for b, members in enumerate(self.branch_groups) if set(members) & set(groups)]
        involved = np.isin(self.first, groups) | np.isin(self.second, groups) | np.isin(self.branch, branches)
        return np.flatnonzero(involved)

    def partial(self, widths: Ints, terms: Ints) -> Floats:
        """The sums of some terms, [K, G] ▶ [K]."""
        extended = np.concatenate([widths, np.ones((len(widths), 1), dtype=np.int64)], axis=1).astype(np.float64)
        alive = (extended > 0).astype(np.float32) @ self._inside[:, self.branch[terms]] > 0
        parts = extended[:, self.first[terms]] * extended[:, self.second[terms]] * alive
        return np.asarray(parts @ self.coefficients[terms], dtype=np.float64)

    @cached_property
    def _inside(self) -> NDArray[np.float32]:
        return inside_branches(len(self.sizes), self.branch_groups)

    def soft(self, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """V in [0, 1] of soft widths [G] and soft presence of the branches [B]."""
        return SoftCost(self, device)


def inside_branches(groups: int, branch_groups: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """1 where a group is inside a branch, [G + 1, B + 1]; the constant 1 behind the groups is in no branch alone.

    (widths with a 1 behind them > 0) @ this > 0 tells which branches live.
    """
    inside = np.zeros((groups + 1, len(branch_groups) + 1), dtype=np.float32)
    for number, members in enumerate(branch_groups):
        inside[list(members), number] = 1
    inside[-1, -1] = 1
    return inside


class SoftCost:
    """The share of a cost that soft widths keep, as one differentiable tensor expression."""

    def __init__(self, model: CostModel, device: torch.device | str = "cpu") -> None:
        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device)

        self._share = tensor((model.coefficients / model.dense).astype(np.float32))
        self._first, self._second, self._branch = tensor(model.first), tensor(model.second), tensor(model.branch)

    def __call__(self, widths: Tensor, alive: Tensor) -> Tensor:
        """V in [0, 1]. widths: soft widths [G]; alive: soft presence of every branch [B]."""
        one = widths.new_ones(1)
        extended, present = torch.cat([widths, one]), torch.cat([alive, one])
        return (self._share * extended[self._first] * extended[self._second] * present[self._branch]).sum()
