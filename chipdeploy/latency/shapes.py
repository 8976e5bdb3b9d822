"""Shapes of the layers as linear functions of group widths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chipdeploy.chipnet.costs import CONSTANT, Floats, inside_branches, spans
from chipdeploy.graph.channels import ChannelGraph, Layer
from chipdeploy.graph.labels import Ints

Kind = tuple[int, float, int, int, bool]


@dataclass(frozen=True, eq=False)
class LayerShapes:
    """Input and output channels of every layer: widths · weights + constants.

    Layers that differ in nothing but their widths are of one kind: what is learnt of one holds for all.
    """

    names: tuple[str, ...]
    kinds: tuple[int, ...]  # [L]
    positions: Ints  # [L], outputs of a channel
    work: Floats  # [L], MACs of a pair of channels, or of a channel of a depthwise layer
    into: Floats  # [G + 1, L], the last row the constants
    out: Floats  # [G + 1, L]
    branch: Ints  # [L], B where the layer is in none
    branch_groups: tuple[tuple[int, ...], ...]
    depthwise: NDArray[np.bool_]  # [L]
    full: Floats  # [G + 1], widths of the dense network and a 1 for the constants

    @classmethod
    def of(cls, graph: ChannelGraph) -> LayerShapes:
        known: dict[Kind, int] = {}
        kinds = [known.setdefault(_kind(layer), len(known)) for layer in graph.layers]
        count = len(graph.layers)
        into, out = (np.zeros((len(graph.groups) + 1, count)) for _ in range(2))
        for number, layer in enumerate(graph.layers):
            for table, index in ((into, layer.in_index), (out, layer.out_index)):
                for times, group in spans(graph, index):
                    table[len(graph.groups) if group == CONSTANT else group, number] += times
        nowhere = len(graph.branches)
        return cls(
            tuple(layer.name for layer in graph.layers),
            tuple(kinds),
            np.array([layer.positions for layer in graph.layers], dtype=np.int64),
            np.array([layer.positions * layer.kernel for layer in graph.layers], dtype=np.float64),
            into,
            out,
            np.array([nowhere if layer.branch is None else layer.branch for layer in graph.layers], dtype=np.int64),
            tuple(branch.groups for branch in graph.branches),
            np.array([not len(layer.in_index) for layer in graph.layers], dtype=np.bool_),
            np.append(graph.sizes, 1).astype(np.float64),
        )

    def at(self, widths: Ints, layers: Ints | None = None) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Input channels, output channels and whether a layer lives, each [K, L], at widths [K, G]; of some layers."""
        chosen = slice(None) if layers is None else layers
        extended = np.concatenate([widths, np.ones((len(widths), 1))], axis=1)
        into, out = extended @ self.into[:, chosen], extended @ self.out[:, chosen]
        alive = (out > 0) & ((into > 0) | self.depthwise[chosen])
        present = (extended > 0).astype(np.float32) @ self._inside[:, self.branch[chosen]] > 0
        return into, out, alive & present

    @cached_property
    def _inside(self) -> NDArray[np.float32]:
        return inside_branches(len(self.full) - 1, self.branch_groups)

    @cached_property
    def touched(self) -> NDArray[np.bool_]:
        """Layers whose time depends on a group, [G, L]."""
        touched = (self.into[:-1] > 0) | (self.out[:-1] > 0)
        for number, groups in enumerate(self.branch_groups):
            touched[list(groups)] |= self.branch == number
        return np.asarray(touched)


def _kind(layer: Layer) -> Kind:
    return layer.positions, layer.kernel, len(layer.in_index), len(layer.out_index), layer.product
