"""Norms over channels under gates: statistics of the living channels, as the cut network will take them.

mean = Σ z·x / Σ z, var = Σ z·(x − mean)² / Σ z; with gates of 0 and 1 this is the norm of the kept channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chipdeploy.errors import ModelError

COPIES = frozenset(["clone", "contiguous", "double", "float", "to", "type_as"])
FACTS = frozenset(
    ["device", "dim", "dtype", "is_cuda", "ndim", "nelement", "numel", "requires_grad", "shape", "size", "stride"]
)


class LivingWeight:
    """Stands in for a norm's weight [C] during a gated call, and takes the norm's call over."""

    def __init__(self, weight: Tensor, gates: Tensor) -> None:
        self.weight, self.gates = weight, gates

    def __getattr__(self, name: str) -> Any:
        """What code may look at in its weight, and copies of it."""
        if name in FACTS:
            return getattr(self.weight, name)
        if name in COPIES:
            return lambda *args, **kwargs: LivingWeight(getattr(self.weight, name)(*args, **kwargs), self.gates)
        raise AttributeError(f"a norm's weight is asked for {name!r}, which cannot be gated")

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        norm = NORMS.get(func)
        if norm is None:
            raise ModelError(f"a norm's weight is read by {getattr(func, '__name__', func)}, which cannot be gated")
        return norm(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor, shape: list[int], weight: LivingWeight, bias: Tensor | None = None, eps: float = 1e-5, *_: bool
) -> Tensor:
    """Over the last dimension, [..., C]."""
    return _normalised(x, weight, bias, eps, [x.dim() - 1], x.dim() - 1, centred=True)


def _rms_norm(x: Tensor, shape: list[int], weight: LivingWeight, eps: float | None = None) -> Tensor:
    """Over the last dimension, [..., C]."""
    small = torch.finfo(x.dtype).eps if eps is None else eps
    return _normalised(x, weight, None, small, [x.dim() - 1], x.dim() - 1, centred=False)


def _group_norm(
    x: Tensor, num_groups: int, weight: LivingWeight, bias: Tensor | None = None, eps: float = 1e-5, *_: bool
) -> Tensor:
    """One group: over channels and positions, [N, C, ...]."""
    return _normalised(x, weight, bias, eps, list(range(1, x.dim())), 1, centred=True)


def _normalised(
    x: Tensor, living: LivingWeight, bias: Tensor | None, eps: float, dims: list[int], axis: int, *, centred: bool
) -> Tensor:
    view = [-1 if dim == axis else 1 for dim in range(x.dim())]
    gates = living.gates.view(view)
    # Of a branch that is gone nothing lives; its norm must not make NaN of what the branch's last layer closes.
    living_sum = living.gates.sum().clamp_min(torch.finfo(x.dtype).tiny)
    count = living_sum * (x[0].numel() // x.shape[1] if axis == 1 and len(dims) > 1 else 1)
    if centred:
        x = x - (x * gates).sum(dims, keepdim=True) / count
    variance = (x.square() * gates).sum(dims, keepdim=True) / count
    x = x * torch.rsqrt(variance + eps) * living.weight.view(view)
    return x if bias is None else x + bias.view(view)


NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
