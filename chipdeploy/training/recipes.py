"""Training recipes as values: optimizers, rates and lengths of the dense, soft and finetune phases."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi

from chipdeploy.chipnet.schedule import PAPER, Schedule
from chipdeploy.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. SGD with Nesterov momentum but for the soft phase of `paper`.

    `pace`: of orthogonal steps, see `OrthogonalSGD`; 0 takes plain SGD. `cut_pace`: see `pace_after`.
    `distill`: weight of the dense network's answers in the finetune's loss, at `temperature`.
    `joined`: one learning-rate curve over soft and finetune together, so that time in the soft phase also trains.
    """

    batch: int = 64
    soft_batch: int = 64
    rate: float = 0.05
    pace: float = 0.3
    cut_pace: float = 0.06
    distill: float = 0.7
    temperature: float = 4.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    train_epochs: int = 10
    soft_epochs: int = 3
    finetune_epochs: int = 8
    joined: bool = True
    soft_adam: float = 0.0  # learning rate of AdamW in the soft phase; 0 moves as elsewhere
    halve_every: int = 0  # epochs between two halvings of the rate; 0 takes the cosine
    schedule: Schedule = field(default_factory=Schedule)

    def curve(self, progress: float, epoch: int) -> float:
        """The learning rate as a share of its peak: linear warm-up, then half a cosine to 0; or halvings."""
        if self.halve_every:
            return 0.5 ** (epoch // self.halve_every)
        rise = min(1.0, (progress + 1e-3) / self.warmup) if self.warmup else 1.0
        return rise * 0.5 * (1 + cos(pi * progress))

    def pace_after(self, keep: float) -> float:
        """The pace by which a trained network is cut to a share of its cost, and finetuned.

        What was cut away must be learnt anew, what is left must not be lost: the less stays, the larger the steps, up
        to those of a training from fresh weights.
        """
        return min(self.pace, self.cut_pace / keep)


RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # Section 4 and the published code: AdamW 1e-3 for 20 soft epochs of batch 32; SGD 0.05, halved every 30 epochs.
    "paper": Recipe(
        batch=128,
        soft_batch=32,
        rate=0.05,
        pace=0.0,
        distill=0.0,
        weight_decay=1e-3,
        warmup=0.0,
        train_epochs=200,
        soft_epochs=20,
        finetune_epochs=200,
        joined=False,
        soft_adam=1e-3,
        halve_every=30,
        schedule=PAPER,
    ),
}


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; use one of {', '.join(RECIPES)}")
    return RECIPES[name]
