"""The channel graph: what may be cut in a network, what must be cut together, and what each cut touches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chipdeploy.graph.labels import Ints

KEPT = -1  # the index of a channel that is always kept
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that share one gate vector: channel i of every member is cut or kept as one."""

    name: str
    size: int
    producers: tuple[str, ...]
    branch: int | None = None  # the removable branch whose inside this group is
    may_vanish: bool = False  # width 0 is legal: with its branch, or beside other channels of the same tensors
    unit: int = 1  # channels of a layer that one gate stands for: the width of a head, a group of a convolution


@dataclass(frozen=True)
class PinnedGroup:
    """Channels that are never cut, and why."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Slot:
    """One dimension of a parameter or buffer: `index[i]` is the global channel of position i, or KEPT."""

    tensor: str
    dim: int
    index: Ints
    gated: bool  # a consumer's input dimension: multiplying it by a gate equals gating the activation


@dataclass(frozen=True, eq=False)
class Count:
    """An integer attribute of a module that states a number of channels, e.g. `conv1.out_channels`."""

    module: str
    attribute: str
    index: Ints


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer, as the cost formulas see it.

    macs = positions · kernel · n_out · n_in, or positions · kernel · n_out for a depthwise layer (1 MAC = 2 FLOPs).
    """

    name: str
    out_index: Ints
    in_index: Ints  # empty for a depthwise layer
    positions: int  # output elements per channel: H·W
    kernel: float  # k·k; of a transposed convolution times input positions / output positions
    branch: int | None = None
    product: bool = False  # of two activations, as in attention: it costs MACs, but makes no channels


@dataclass(frozen=True, eq=False)
class Tally:
    """Parameters counted as |weight| = unit · Π n over its labelled dimensions."""

    tensor: str
    unit: int  # product of the unlabelled dimensions
    indices: tuple[Ints, ...]
    branch: int | None = None


@dataclass(frozen=True)
class Branch:
    """A residual or dense branch that disappears as a whole when the groups inside it are empty."""

    name: str
    groups: tuple[int, ...]
    stubs: tuple[tuple[str, str], ...]  # (module, kind of stub that replaces it)
    tail: tuple[str, ...] = ()  # affine tensors by which the branch's output is scaled to zero when it is gone
    end: str = ""  # the traced op that hands the branch's output on
    folds: tuple[tuple[str, float], ...] = ()  # weights that take the constant of a branch that scaled, when it is gone


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All that the pruner knows of a network. Global channels are numbered group after group."""

    groups: tuple[ChannelGroup, ...]
    pinned: tuple[PinnedGroup, ...]
    slots: tuple[Slot, ...]
    counts: tuple[Count, ...]
    layers: tuple[Layer, ...]
    tallies: tuple[Tally, ...]
    branches: tuple[Branch, ...]
    input_shape: tuple[int, ...]
    norms: tuple[Slot, ...] = ()  # weights of norms whose statistics are taken of the living channels
    ops: tuple[tuple[str, int], ...] = ()  # what the network calls, by name, and how often

    @cached_property
    def sizes(self) -> Ints:
        """Full width of every group, int64 [G]."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    @cached_property
    def offsets(self) -> Ints:
        """Global number of the first channel of every group, int64 [G + 1]; the last entry is their total."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def channels(self) -> int:
        """Number of gates."""
        return int(self.offsets[-1])

    @cached_property
    def group_of(self) -> Ints:
        """Group of every global channel, int64 [channels]."""
        return np.repeat(np.arange(len(self.groups)), self.sizes)

    @cached_property
    def gated_slots(self) -> tuple[Slot, ...]:
        """The consumers' input dimensions that hold at least one gated channel."""
        return tuple(slot for slot in self.slots if slot.gated and (slot.index != KEPT).any())

    def span(self, group: int) -> slice:
        """The global channels of a group."""
        return slice(int(self.offsets[group]), int(self.offsets[group + 1]))
