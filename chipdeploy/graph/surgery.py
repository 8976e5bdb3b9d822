"""The cut: a smaller copy of the user's own module, with the same class and the same state-dict names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from chipdeploy.copying import copied
from chipdeploy.errors import InputError
from chipdeploy.graph.channels import KEPT, ChannelGraph, Mask
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.multihead import follow_cut
from chipdeploy.graph.plan import PrunePlan, dead_branches, group_widths
from chipdeploy.graph.stubs import NoChannels, Still, Zeros


def hard_prune(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> nn.Module:
    """A copy of `model` without the channels and branches that `plan` drops; `model` stays as it is.

    Raises:
        InputError: the plan does not fit the graph, or would cut the network in two.
    """
    mask = plan.mask(graph)
    small = copied(model)
    _slice_tensors(small, graph, mask)
    for count in graph.counts:
        module = small.get_submodule(count.module)
        width = int(_alive(count.index, mask).sum())
        if isinstance(getattr(type(module), count.attribute, None), property):
            continue  # it is computed from what was cut
        stated = getattr(module, count.attribute)
        setattr(module, count.attribute, (width,) if isinstance(stated, tuple) else width)
    follow_cut(small)
    for number in dead_branches(graph, group_widths(graph, mask)):
        for name, factor in graph.branches[number].folds:
            with torch.no_grad():
                small.get_parameter(name).mul_(factor)
        for path, kind in graph.branches[number].stubs:
            small.set_submodule(path, _stub(small.get_submodule(path), kind))
    return small


def _alive(index: Ints, mask: Mask) -> Mask:
    return np.asarray((index == KEPT) | mask[index], dtype=np.bool_)


def _slice_tensors(model: nn.Module, graph: ChannelGraph, mask: Mask) -> None:
    """Drop the dead positions of every parameter and buffer; gradients' flags and sharing stay."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    smaller: dict[str, Tensor] = {}
    for slot in graph.slots:
        if slot.tensor not in tensors or tensors[slot.tensor].shape[slot.dim : slot.dim + 1] != (len(slot.index),):
            raise InputError(f"the graph is of another model: {slot.tensor} is not what was traced; trace this one")
        alive = _alive(slot.index, mask)
        if not alive.all():
            keep = torch.from_numpy(np.flatnonzero(alive))
            whole = smaller.get(slot.tensor, tensors[slot.tensor].detach())
            smaller[slot.tensor] = whole.index_select(slot.dim, keep.to(whole.device))
    replaced = {id(tensors[name]): _like(tensors[name], cut) for name, cut in smaller.items()}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if id(tensor) in replaced:
                    store[name] = replaced[id(tensor)]  # type: ignore[assignment]


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _stub(module: nn.Module, kind: str) -> nn.Module:
    if kind == "pass":
        return nn.Identity()
    if kind == "still":
        return Still(module)
    if kind in ("none", "one"):
        return NoChannels(module, 0 if kind == "none" else 1)
    channels = getattr(module, "out_channels", None)
    return Zeros(module, int(channels if channels is not None else module.out_features))  # type: ignore[arg-type]
