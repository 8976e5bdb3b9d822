"""ChipNet's equations against numbers written out."""

from __future__ import annotations

from math import exp

import pytest
import torch

from chipdeploy.chipnet.gates import crisp_share, crispness, half_point, heaviside, logistic, rounding

torch.set_num_threads(1)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_logistic_curve():
    got = logistic(values(-1.0, 0.0, 0.5), 2.0)
    assert got.tolist() == pytest.approx([0.1192029220, 0.5, 0.7310585786])  # 1 / (1 + e^{2}), 1/2, 1 / (1 + e^{-1})
    assert float(logistic(values(3.0), 5.0, 3.0)) == 0.5
    assert float(logistic(values(3.0), 2.0, values(2.5))) == pytest.approx(0.7310585786)


def test_heaviside():
    # γ = 2, z̃ = 0.5: 1 - e^{-1} + 0.5 · e^{-2} = 1 - 0.3678794412 + 0.0676676416
    assert float(heaviside(values(0.5), 2.0)) == pytest.approx(0.6997882004)
    assert heaviside(values(0.0, 0.25, 1.0), 0.0).tolist() == [0.0, 0.25, 1.0]
    for gamma in (2.0, 16.0, 256.0):
        assert heaviside(values(0.0, 1.0), gamma).tolist() == pytest.approx([0.0, 1.0], abs=1e-15)
    assert float(heaviside(values(0.1), 256.0)) == pytest.approx(1.0 - exp(-25.6))


def test_a_gate_that_float32_cannot_tell_from_0_is_closed():
    assert heaviside(values(1e-30, 1e-9), 64.0).tolist() == [0.0, 0.0]
    assert float(heaviside(values(1e-8), 64.0)) == pytest.approx(6.4e-7, rel=1e-3)


@pytest.mark.parametrize("gamma", [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
@pytest.mark.parametrize("beta", [1.0, 3.0, 12.0])
def test_half_point_gives_one_half(gamma, beta):
    point = half_point(beta, gamma)
    assert float(heaviside(logistic(values(point), beta), gamma)) == pytest.approx(0.5, abs=1e-9)


def test_half_point_moves_as_documented():
    assert half_point(1.0, 2.0) == pytest.approx(-0.8, abs=0.05)
    assert half_point(1.0, 256.0) == pytest.approx(-5.9, abs=0.05)
    assert half_point(4.0, 256.0) == pytest.approx(half_point(1.0, 256.0) / 4)


def test_gradients_stay_finite_at_the_steepest_gate():
    logits = torch.linspace(-40, 40, 201, requires_grad=True)
    curve = logistic(logits, 12.0, -half_point(12.0, 256.0))
    gates = heaviside(curve, 256.0)
    (gates.sum() + crispness(curve, gates)).backward()
    assert torch.isfinite(gates).all() and torch.isfinite(logits.grad).all()
    assert logits.grad.abs().max() > 0
    assert gates.min() >= 0 and gates.max() <= 1


def test_crispness_is_a_mean_and_zero_only_for_crisp_gates():
    assert float(crispness(values(0.2, 0.6), values(0.5, 1.0))) == pytest.approx((0.09 + 0.16) / 2)
    ends = values(0.0, 1.0)
    assert float(crispness(ends, heaviside(ends, 8.0))) == pytest.approx(0.0, abs=1e-12)
    for between in (0.01, 0.2, 0.5, 0.9):
        curve = values(0.0, 1.0, between)
        assert float(crispness(curve, heaviside(curve, 8.0))) > 1e-6


def test_rounding():
    # σ(10 · 0.1) = 1 / (1 + e^{-1})
    assert rounding(values(0.5, 0.6), 10.0).tolist() == pytest.approx([0.5, 0.7310585786])
    assert rounding(values(0.0, 1.0), 60.0).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


def test_crisp_share_counts_both_ends():
    assert float(crisp_share(torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0, 0.3]))) == 0.5
