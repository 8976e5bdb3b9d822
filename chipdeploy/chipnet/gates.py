"""ChipNet's gates (Tiwari et al., ICLR 2021): a logistic curve, a continuous Heaviside, and the crispness of both."""

from __future__ import annotations

from math import exp, log

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSED = 1e-7


def logistic(logits: Tensor, beta: float, center: float | Tensor = 0.0) -> Tensor:
    """z̃ = 1 / (1 + e^{−β(ψ − ψ0)}), section 3.1."""
    return torch.sigmoid(beta * (logits - center))


def heaviside(curve: Tensor, gamma: float) -> Tensor:
    """z = 1 − e^{−γ z̃} + z̃ e^{−γ}: the identity at γ = 0, a step for γ ▶ ∞, section 3.1.

    Below CLOSED it is 0: gates that float32 cannot tell from 0 beside 1 make denormal gradients, which slow CPUs down.
    """
    gates = 1.0 - torch.exp(-gamma * curve) + curve * exp(-gamma)
    return F.threshold(gates, CLOSED, 0.0)


def crispness(curve: Tensor, gates: Tensor) -> Tensor:
    """Mean of (z̃ − z)²: zero only where a gate is 0 or 1. The published code takes the mean, not the norm."""
    return (curve - gates).square().mean()


def rounding(gates: Tensor, kappa: float) -> Tensor:
    """Logistic rounding r(z) = σ(κ(z − 0.5)), by which gates are counted inside a budget, section 3.3."""
    return torch.sigmoid(kappa * (gates - 0.5))


def half_point(beta: float, gamma: float) -> float:
    """The logit at which z = 0.5 for ψ0 = 0. It moves from −0.8/β to −5.9/β as γ grows from 2 to 256.

    A growing γ would re-open gates; subtracting this point keeps every gate's middle where it is.
    """
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        if 1.0 - exp(-gamma * middle) + middle * exp(-gamma) < 0.5:
            low = middle
        else:
            high = middle
    return log(middle / (1.0 - middle)) / beta if middle > 0 else 0.0


def crisp_share(gates: Tensor, tolerance: float = 0.05) -> Tensor:
    """Share of gates within `tolerance` of 0 or 1, a scalar tensor."""
    return ((gates < tolerance) | (gates > 1.0 - tolerance)).float().mean()
