"""Norms under gates of 0 and 1 are the norms of the kept channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chipdeploy.errors import ModelError
from chipdeploy.graph.living import LivingWeight

KEPT = [0, 2, 3]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).double() for size in ((4, 6, 5), (5,), (5,)))
    gates = torch.zeros(5, dtype=torch.float64)
    gates[KEPT] = 1
    return x, weight, bias, gates


def test_layer_norm(tensors):
    x, weight, bias, gates = tensors
    gated = F.layer_norm(x, (5,), LivingWeight(weight, gates), bias, 1e-3)[..., KEPT]
    assert torch.allclose(gated, F.layer_norm(x[..., KEPT], (3,), weight[KEPT], bias[KEPT], 1e-3), atol=1e-12)


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm(tensors, eps):
    x, weight, _, gates = tensors
    gated = F.rms_norm(x, (5,), LivingWeight(weight, gates), eps)[..., KEPT]
    assert torch.allclose(gated, F.rms_norm(x[..., KEPT], (3,), weight[KEPT], eps), atol=1e-12)


def test_group_norm_of_one_group(tensors):
    x, weight, bias, gates = tensors
    x = x.transpose(1, 2)  # [N, C, T]
    gated = F.group_norm(x, 1, LivingWeight(weight, gates), bias)[:, KEPT]
    assert torch.allclose(gated, F.group_norm(x[:, KEPT], 1, weight[KEPT], bias[KEPT]), atol=1e-12)


def test_gates_between_0_and_1_have_gradients_and_nothing_alive_gives_no_nan(tensors):
    x, weight, bias, _ = tensors
    gates = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)
    F.layer_norm(x, (5,), LivingWeight(weight, gates), bias)[..., 0].sum().backward()
    assert gates.grad.abs().min() > 0
    assert F.layer_norm(x, (5,), LivingWeight(weight, torch.zeros(5).double()), bias).isfinite().all()


def test_another_use_of_the_weight_is_refused(tensors):
    _, weight, _, gates = tensors
    with pytest.raises(ModelError, match="read by mul"):
        torch.mul(torch.ones(5), LivingWeight(weight, gates))
