"""A configuration with its parts loaded: data, recipe and device, and what every phase of training takes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chipdeploy.config import PruneConfig, TrainConfig
from chipdeploy.copying import in_mode
from chipdeploy.errors import MissingError
from chipdeploy.files import digest
from chipdeploy.training.data import ImageData, load_data
from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Watcher, train_epoch
from chipdeploy.training.models import build_model
from chipdeploy.training.models.origin import code_digest, own_file
from chipdeploy.training.orthogonal import OrthogonalSGD
from chipdeploy.training.recipes import Recipe, recipe
from chipdeploy.training.seeding import seed_all

LEARNT_EPOCHS = 30  # a dense network trained for fewer has less to teach than the images have


@dataclass(frozen=True)
class Job:
    """A configuration with its parts loaded."""

    config: TrainConfig
    data: ImageData
    recipe: Recipe
    device: torch.device

    @property
    def example(self) -> Tensor:
        """Two random images [2, C, H, W]: a batch of 1 would let the tracer specialise on it."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.data.shape, generator=generator).to(self.device)

    @property
    def batch(self) -> int:
        return self.config.batch or self.recipe.batch

    @property
    def soft_batch(self) -> int:
        return self.config.batch or self.recipe.soft_batch

    @property
    def steps(self) -> int:
        """Steps in an epoch of the dense training and the finetune."""
        return max(1, len(self.data.train) // self.batch)

    @property
    def soft_steps(self) -> int:
        """Steps in an epoch of soft pruning."""
        return max(1, len(self.data.train) // self.soft_batch)

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what the settings only name: data, their images, and the code of a model of the user's own."""
        data = {"data": self.data.digest, "images": self.data.images_digest}
        return data | model_digest(self.config.model)

    @property
    def given_weights(self) -> dict[str, str]:
        """{"weights": sha256} where dense weights are given, nothing where they are trained."""
        given = self.config.weights if isinstance(self.config, PruneConfig) else None
        return {"weights": digest(Path(given))} if given else {}

    def model(self) -> nn.Module:
        """A fresh network, its initial weights drawn from the seed."""
        seed_all(self.config.seed)
        model = build_model(
            self.config.model,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            image_size=self.data.image_size,
        )
        return model.to(self.device).to(memory_format=torch.channels_last)

    def rate(self, step: int, total: int) -> float:
        """Learning rate at a step of `total`."""
        return (self.config.lr or self.recipe.rate) * self.recipe.curve(step / total, step // self.steps)

    def soft_rate(self, step: int, total: int) -> float:
        """Learning rate of the weights at a step of the soft phase; constant for AdamW, as published."""
        return self.recipe.soft_adam or self.rate(step, total)

    def teacher(self, dense: nn.Module) -> Teacher | None:
        """The trained dense network as the finetune's teacher; None where its answers count nothing."""
        assert isinstance(self.config, PruneConfig)
        weight = self.config.distill
        if weight is None:
            learnt = self.config.weights or (self.config.train_epochs or self.recipe.train_epochs) >= LEARNT_EPOCHS
            weight = self.recipe.distill if learnt else 0.0
        return Teacher(in_mode(dense), weight, self.recipe.temperature) if weight else None

    def optimizer(self, model: nn.Module, keep: float | None = None) -> torch.optim.Optimizer:
        """SGD, with orthogonal steps where the recipe has a pace for them.

        keep: share of its cost to which a trained network is cut; None if the weights are fresh.
        """
        rules = self.recipe
        pace = rules.pace if keep is None else rules.pace_after(keep)
        if not pace:
            return torch.optim.SGD(
                model.parameters(),
                lr=rules.rate,
                momentum=rules.momentum,
                weight_decay=rules.weight_decay,
                nesterov=True,
            )
        return OrthogonalSGD(model, lr=rules.rate, pace=pace, momentum=rules.momentum, weight_decay=rules.weight_decay)

    def soft_optimizer(self, model: nn.Module, keep: float) -> torch.optim.Optimizer:
        """For the weights in the soft phase: the same as in the finetune, or AdamW as published."""
        rules = self.recipe
        if not rules.soft_adam:
            return self.optimizer(model, keep)
        return torch.optim.AdamW(model.parameters(), lr=rules.soft_adam, weight_decay=rules.weight_decay)

    def epoch(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        number: int,
        rate: Callable[[int], float],
        watcher: Watcher,
        *,
        batch: int | None = None,
        teacher: Teacher | None = None,
    ) -> float:
        """Train for one epoch, its seed drawn from its number; returns the mean loss.

        Args:
            rate: learning rate of every step of the epoch.
            batch: images in a step, where it is not the job's.
        """
        return train_epoch(
            network,
            self.data.train,
            optimizer,
            rate,
            batch=batch or self.batch,
            seed=self.config.seed * 100_003 + number,
            device=self.device,
            watcher=watcher,
            teacher=teacher,
            # A network of the user's own may count its steps, or draw from Python's random numbers.
            replay=own_file(self.config.model) is None,
        )


def prepare(config: TrainConfig) -> Job:
    """Load what a configuration names.

    Raises:
        DataError, UsageError, MissingError: data, recipe or device that cannot be had.
    """
    rules = recipe(config.recipe)
    data = load_data(
        config.data,
        root=Path(config.data_root) if config.data_root else None,
        mean=config.mean,
        std=config.std,
        image_size=config.image_size,
    )
    return Job(config, data, rules, pick_device(config.device))


def model_digest(spec: str) -> dict[str, str]:
    """{"model": sha256} for a spec `FILE.py:FUNCTION`, nothing for other specs."""
    path = own_file(spec)
    return {"model": code_digest(path)} if path else {}


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. A GPU by number becomes the current one: not all of PyTorch asks which.

    Raises:
        MissingError: the device is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a device without memory fails here
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MissingError(f"no device {name!r} here; use --device cpu or auto") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
