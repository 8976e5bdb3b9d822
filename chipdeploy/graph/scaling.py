"""Many tensors, each scaled by its part of one vector, as a single node of autograd.

Gates scale every layer's weight in every step of the soft phase, and one node for all of them costs less than one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


def scaled(tensors: Sequence[Tensor], factors: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """tensors[i] · f_i, where f_i is the next part of `factors`, viewed as shapes[i].

    Args:
        factors: [sum of the shapes' elements].
        shapes: of the rank of their tensors; each size is the tensor's, or 1.
    """
    outputs: tuple[Tensor, ...] = _Scale.apply(factors, tuple(shapes), *tensors)
    return outputs


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor, shapes: tuple[Shape, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(factors, *tensors)
        ctx.shapes = shapes
        return tuple(torch._foreach_mul(tensors, _parts(factors, shapes)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, *tensors = ctx.saved_tensors
        of_tensors = torch._foreach_mul(grads, _parts(factors, ctx.shapes))
        of_factors = None
        if ctx.needs_input_grad[0]:
            products = torch._foreach_mul(grads, tensors)
            of_factors = torch.cat(
                [p.sum_to_size(shape).reshape(-1) for p, shape in zip(products, ctx.shapes, strict=True)]
            )
        return of_factors, None, *of_tensors


def _parts(factors: Tensor, shapes: tuple[Shape, ...]) -> list[Tensor]:
    parts = torch.split(factors, [prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
