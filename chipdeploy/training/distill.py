"""Knowledge distillation: a cut network learns the dense one's answers beside the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Teacher:
    """The dense network, and how much its answers count (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531).

    Args:
        network: in evaluation mode, on the device of the training.
        weight: of its answers in the loss, 0 to 1; the rest is the labels'.
        temperature: by which the logits of both networks are divided.
    """

    network: nn.Module
    weight: float
    temperature: float

    def loss(self, logits: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        """(1 − w) · cross entropy + w · T² · KL(teacher ‖ student); logits and told: [N, classes], float32."""
        student, teacher = (F.log_softmax(values / self.temperature, dim=1) for values in (logits, told))
        apart = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        return (1.0 - self.weight) * F.cross_entropy(logits, labels) + self.weight * apart
