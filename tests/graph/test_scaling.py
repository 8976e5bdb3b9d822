"""One node of autograd for many scaled tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from chipdeploy.graph.scaling import Shape, scaled

SHAPES: list[Shape] = [(1, 3, 1, 1), (4,), (1, 1), (), (1,)]  # a consumer's inputs, a norm, whole tensors


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 2, 2), (4,), (2, 3), (), (5,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def _factors() -> Tensor:
    return torch.linspace(0.1, 2.0, 10, dtype=torch.float64, requires_grad=True)


def test_it_is_the_product_of_every_tensor_and_its_part() -> None:
    tensors, factors = _tensors(), _factors()
    parts = [part.view(shape) for part, shape in zip(factors.split([3, 4, 1, 1, 1]), SHAPES, strict=True)]
    for output, tensor, part in zip(scaled(tensors, factors, SHAPES), tensors, parts, strict=True):
        assert output.shape == tensor.shape
        assert torch.equal(output, tensor * part)


def test_gradients_of_first_and_second_order() -> None:
    def sums(factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return scaled(tensors, factors, SHAPES)

    assert gradcheck(sums, (_factors(), *_tensors()))
    assert gradgradcheck(sums, (_factors(), *_tensors()))


def test_frozen_tensors_and_constant_factors_pass_what_the_others_need() -> None:
    frozen, factors = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    scaled([frozen], factors, [(1, 3)])[0].sum().backward()
    assert factors.grad is not None and factors.grad.tolist() == [2, 2, 2]
    weight = torch.ones(2, 3, requires_grad=True)
    scaled([weight], torch.full((3,), 0.5), [(1, 3)])[0].sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((2, 3), 0.5))


def test_an_output_that_nothing_reads_has_no_part_in_the_gradient() -> None:
    tensors, factors = _tensors(), _factors()
    scaled(tensors, factors, SHAPES)[1].sum().backward()
    assert factors.grad is not None
    assert factors.grad[:3].abs().sum() == 0 and factors.grad[7:].abs().sum() == 0
    assert torch.equal(factors.grad[3:7], tensors[1].detach())


def test_half_weights_keep_their_type_in_the_gradient() -> None:
    weight = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    scaled([weight], torch.full((3,), 0.5, requires_grad=True), [(1, 3)])[0].sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
