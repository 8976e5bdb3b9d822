"""Gates on a network that is not cut yet: each consumer's input weights are scaled by the gates of what it reads.

Whatever lies between a channel's producers and its consumers treats channels alone, so z · activation equals
z · weight. A branch whose groups are all closed yields nothing: its last affine is scaled too, or its bias would stay.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from chipdeploy.errors import UsageError
from chipdeploy.graph.channels import KEPT, ChannelGraph, Slot
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.living import LivingWeight
from chipdeploy.graph.scaling import Shape, scaled


class _Factor(NamedTuple):
    """What scales a tensor along one dimension: `places` in the vector of gates, 1 and branches; one place for all."""

    tensor: str
    dim: int
    places: Ints


class _Round:
    """Factors of different tensors, applied at once."""

    def __init__(self, factors: Sequence[_Factor], device: torch.device | str) -> None:
        self.names = [factor.tensor for factor in factors]
        self.index = torch.from_numpy(np.concatenate([factor.places for factor in factors])).to(device)
        self._along = [(factor.dim, len(factor.places)) for factor in factors]

    def shapes(self, tensors: Sequence[Tensor]) -> list[Shape]:
        """Of the factors, so that each stands along its dimension of its tensor."""
        return [
            ((1,) * dim + (size,) + (1,) * (tensor.dim() - dim - 1))[: tensor.dim()]
            for tensor, (dim, size) in zip(tensors, self._along, strict=True)
        ]


class Gating:
    """Applies a gate vector [channels] to a network's tensors. The gather over all layers is one op."""

    def __init__(self, graph: ChannelGraph, device: torch.device | str = "cpu") -> None:
        factors = [_Factor(slot.tensor, slot.dim, _places(graph, slot)) for slot in graph.gated_slots]
        for number, branch in enumerate(graph.branches, start=graph.channels + 1):
            factors += [_Factor(name, 0, np.array([number])) for name in branch.tail]
        self._rounds = [_Round(factors, device) for factors in _rounds(factors)]
        self._norms = [(slot.tensor, torch.from_numpy(_places(graph, slot)).to(device)) for slot in graph.norms]
        inside = [(c, i) for i, branch in enumerate(graph.branches) for g in branch.groups for c in _channels(graph, g)]
        self._inside = torch.tensor(inside, dtype=torch.int64, device=device).reshape(-1, 2)
        self._branches = len(graph.branches)

    def __call__(self, gates: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | LivingWeight]:
        """What the network is to compute with, by the tensors' names. gates: [channels] in [0, 1]."""
        values = self._values(gates)
        found = self._scaled(values, tensors)
        living = {
            name: LivingWeight(found.get(name, tensors[name]), values.index_select(0, places))
            for name, places in self._norms
        }
        return found | living

    def fold(self, gates: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scaled tensors by name, to be kept. Norms over channels must be cut to their living ones after that."""
        return self._scaled(self._values(gates), tensors)

    def _values(self, gates: Tensor) -> Tensor:
        """All that tensors are scaled by: the gates, the constant 1, the branches."""
        return torch.cat([gates, gates.new_ones(1), self.alive(gates)])

    def _scaled(self, values: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for step in self._rounds:
            own = [found.get(name, tensors[name]) for name in step.names]
            found.update(
                zip(step.names, scaled(own, values.index_select(0, step.index), step.shapes(own)), strict=True)
            )
        return found

    def alive(self, gates: Tensor) -> Tensor:
        """The widest open gate inside every branch, [branches]."""
        channel, branch = self._inside.unbind(1)
        return gates.new_zeros(self._branches).scatter_reduce(0, branch, gates[channel], "amax")


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[Tensor, Tensor | LivingWeight]) -> Iterator[None]:
    """Inside, `model` computes with `tensors` in place of its parameters, their keys; afterwards with its own.

    What `torch.func.functional_call` does, with fewer look-ups: it is paid in every step of the soft phase.
    """
    # By identity, not by name: a parameter that several modules share is swapped in all of them.
    homes = [
        (store, name, parameter)
        for store in (module._parameters for module in model.modules())
        for name, parameter in store.items()
        if parameter in tensors
    ]
    try:
        for store, name, parameter in homes:
            store[name] = tensors[parameter]  # type: ignore[assignment,index]
        yield
    finally:
        for store, name, parameter in homes:
            store[name] = parameter


def gated_call(model: nn.Module, gating: Gating, gates: Tensor, *inputs: Tensor) -> Any:
    """Run `model` with its tensors scaled by `gates`; the model itself stays as it is."""
    own = dict(model.named_parameters())
    with swapped(model, {own[name]: tensor for name, tensor in gating(gates, own).items()}):
        return model(*inputs)


@contextmanager
def no_checkpointing() -> Iterator[None]:
    """Raises UsageError where a layer of a gated network runs in `torch.utils.checkpoint`: the backward pass would run
    it once more, without its gates, and the gradients would be another network's."""

    def look(*_: object) -> None:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code.co_filename == checkpoint.__file__:
                raise UsageError(
                    "the model checkpoints activations, which runs layers again without their gates; switch it off "
                    "for soft pruning, the finetune may use it"
                )

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _places(graph: ChannelGraph, slot: Slot) -> Ints:
    """Where the factors of a slot stand: its channels' gates, and the 1 behind all gates for what is kept."""
    return np.where(slot.index == KEPT, graph.channels, slot.index)


def _rounds(factors: Sequence[_Factor]) -> list[list[_Factor]]:
    """The first factor of every tensor, then the second, and so on."""
    rounds: list[list[_Factor]] = []
    seen: Counter[str] = Counter()
    for factor in factors:
        if seen[factor.tensor] == len(rounds):
            rounds.append([])
        rounds[seen[factor.tensor]].append(factor)
        seen[factor.tensor] += 1
    return rounds


def _channels(graph: ChannelGraph, group: int) -> range:
    span = graph.span(group)
    return range(span.start, span.stop)
