"""Gates on a network that is not cut yet: each consumer's input weights are scaled by the gates of what it reads.

Whatever lies between a channel's producers and its consumers treats channels alone, so z · activation equals
z · weight. A branch whose groups are all closed yields nothing: its last affine is scaled too, or its bias would stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chipdeploy.graph.channels import KEPT, ChannelGraph
from chipdeploy.graph.living import LivingWeight


class Gating:
    """Applies a gate vector [channels] to a network's tensors. The gather over all layers is one op."""

    def __init__(self, graph: ChannelGraph, device: torch.device | str = "cpu") -> None:
        self._slots = graph.gated_slots
        self._norms = graph.norms
        read = (*self._slots, *self._norms)
        self._sizes = [len(slot.index) for slot in read]
        always = graph.channels  # position of the constant 1 behind the gates
        index = np.concatenate([np.zeros(0, np.int64), *(slot.index for slot in read)])
        self._index = torch.from_numpy(np.where(index == KEPT, always, index)).to(device)
        self._tails = [(name, i) for i, branch in enumerate(graph.branches) for name in branch.tail]
        inside = [(c, i) for i, branch in enumerate(graph.branches) for g in branch.groups for c in _channels(graph, g)]
        self._inside = torch.tensor(inside, dtype=torch.int64, device=device).reshape(-1, 2)
        self._branches = len(graph.branches)

    def __call__(self, gates: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | LivingWeight]:
        """What the network is to compute with, by the tensors' names. gates: [channels] in [0, 1]."""
        scaled, factors = self._scaled(gates, tensors)
        living: dict[str, Tensor | LivingWeight] = {}
        for slot, factor in zip(self._norms, factors[len(self._slots) :], strict=True):
            living[slot.tensor] = LivingWeight(scaled.get(slot.tensor, tensors[slot.tensor]), factor)
        return scaled | living

    def fold(self, gates: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scaled tensors by name, to be kept. Norms over channels must be cut to their living ones after that."""
        return self._scaled(gates, tensors)[0]

    def _scaled(self, gates: Tensor, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        scaled: dict[str, Tensor] = {}
        factors = torch.cat([gates, gates.new_ones(1)])[self._index]
        parts = torch.split(factors, self._sizes)
        for slot, factor in zip(self._slots, parts, strict=False):
            tensor = scaled.get(slot.tensor, tensors[slot.tensor])
            view = [1] * tensor.dim()
            view[slot.dim] = -1
            scaled[slot.tensor] = tensor * factor.view(view)
        if self._tails:
            alive = self.alive(gates).unbind()
            for name, branch in self._tails:
                scaled[name] = scaled.get(name, tensors[name]) * alive[branch]
        return scaled, parts

    def alive(self, gates: Tensor) -> Tensor:
        """The widest open gate inside every branch, [branches]."""
        channel, branch = self._inside.unbind(1)
        return gates.new_zeros(self._branches).scatter_reduce(0, branch, gates[channel], "amax")


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor | LivingWeight]) -> Iterator[None]:
    """Inside, `model` computes with `tensors` in place of its parameters of these names; afterwards with its own.

    What `torch.func.functional_call` does, with fewer look-ups: it is paid in every step of the soft phase.
    """
    parameters = dict(model.named_parameters())
    new = {id(parameters[name]): tensor for name, tensor in tensors.items()}
    # By identity, not by name: a parameter that several modules share is swapped in all of them.
    homes = [
        (store, name, parameter)
        for store in (module._parameters for module in model.modules())
        for name, parameter in store.items()
        if id(parameter) in new
    ]
    try:
        for store, name, parameter in homes:
            store[name] = new[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, parameter in homes:
            store[name] = parameter


def gated_call(model: nn.Module, gating: Gating, gates: Tensor, *inputs: Tensor) -> Any:
    """Run `model` with its tensors scaled by `gates`; the model itself stays as it is."""
    with swapped(model, gating(gates, dict(model.named_parameters()))):
        return model(*inputs)


def _channels(graph: ChannelGraph, group: int) -> range:
    span = graph.span(group)
    return range(span.start, span.stop)
