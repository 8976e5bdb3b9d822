"""One epoch of training, evaluation, and renewal of norm statistics: the parts of which every phase is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.chipnet.soft import ChipNet
from chipdeploy.errors import TargetError, UsageError
from chipdeploy.training.autocast import autocast
from chipdeploy.training.distill import Teacher
from chipdeploy.training.replay import Replayed, replayable, set_rate
from chipdeploy.training.seeding import seed_all, seeded
from chipdeploy.training.splits import Split

REPORT_EVERY = 20  # steps between two looks at the loss: reading it waits for the device
EVALUATION_BATCH = 500
EVALUATION_PIXELS = EVALUATION_BATCH * 64 * 64  # in one pass: activations of large images would fill a GPU
RENEWAL_IMAGES = 4096


class Watcher(Protocol):
    """Who looks on while a network trains: a progress bar, a log, nobody."""

    def phase(self, name: str, epochs: int, steps: int) -> None: ...

    def step(self, steps: int, facts: dict[str, float]) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


class Silent:
    """A watcher that does nothing."""

    def phase(self, name: str, epochs: int, steps: int) -> None: ...

    def step(self, steps: int, facts: dict[str, float]) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


def train_epoch(
    network: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    *,
    batch: int,
    seed: int,
    device: torch.device,
    watcher: Watcher,
    teacher: Teacher | None = None,
    replay: bool = False,
) -> float:
    """Train for one epoch; returns the mean loss.

    rate: learning rate of every step of the epoch. A `ChipNet` gets its own losses and its own step. teacher: whose
    answers are learnt beside the labels. replay: launch whole steps where that can be, see `Replayed`; for networks
    whose training draws on nothing but PyTorch.

    Raises:
        TargetError: the loss is no finite number any more.
        UsageError: batch and images are too small for a norm layer.
    """
    seed_all(seed)  # dropout and the like: an epoch is a function of its seed, so a resumed run is the same
    network.train()
    chip = network if isinstance(network, ChipNet) else None
    total = torch.zeros((), device=device)
    done = 0

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = task = _task_loss(network, images, labels, device, teacher)
        if chip is not None:
            loss = chip.loss(task)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if chip is not None:
            chip.step()
        return task.detach()

    whole = replay and chip is None and replayable(optimizer, device)
    launch = Replayed(step, optimizer, device) if whole else step
    for images, labels in split.batches(batch, seed=seed, augment=True, device=device):
        set_rate(optimizer, rate(done))
        total += launch(images, labels)
        done += 1
        if done % REPORT_EVERY == 0:
            watcher.step(REPORT_EVERY, _facts(total / done, chip))
    watcher.step(done % REPORT_EVERY, _facts(total / done, chip))
    mean = float(total / done)
    if not mean < float("inf"):
        raise TargetError(f"training diverged: the loss became {mean}; lower the learning rate with --lr")
    return mean


def _task_loss(
    network: nn.Module, images: Tensor, labels: Tensor, device: torch.device, teacher: Teacher | None
) -> Tensor:
    with _large_enough(images), autocast(device):
        logits = network(images)
    if teacher is None:
        return F.cross_entropy(logits.float(), labels)
    with torch.no_grad(), autocast(device):
        told = teacher.network(images)
    return teacher.loss(logits.float(), labels, told.float())


@contextmanager
def _large_enough(images: Tensor) -> Iterator[None]:
    """Says in one line where a norm layer has a single value to take its statistics from."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1"):
            raise
        count, _, height, width = images.shape
        raise UsageError(
            f"batches of {count} and images of {width}x{height} leave a norm layer one value a channel, which has no "
            "variance; raise --batch, and the training images with it, or --image-size"
        ) from error


def _facts(loss: Tensor, chip: ChipNet | None) -> dict[str, float]:
    facts = {"loss": float(loss)}
    if chip is not None:
        facts |= {"V": chip.soft_share(), "V0": chip.target()}
    return facts


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, device: torch.device) -> float:
    """Top-1 accuracy in [0, 1]; the network is left in the mode in which it came."""
    training = network.training
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    size = min(EVALUATION_BATCH, max(1, EVALUATION_PIXELS // split.pixels))
    for images, labels in split.batches(size, device=device):
        with autocast(device):
            right += (network(images).argmax(1) == labels).sum()
    network.train(training)
    return float(right) / len(split)


@torch.no_grad()
def renew_norms(network: nn.Module, split: Split, *, batch: int, device: torch.device) -> None:
    """Estimate BatchNorm statistics anew on training images: after a cut the old ones belong to another network."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    training = network.training
    network.train()
    seen = 0
    with seeded(0):  # a network may draw: a run that was resumed here ends as one that was not
        for images, _ in split.batches(batch, seed=0, augment=True, device=device):
            with _large_enough(images), autocast(device):
                network(images)
            seen += len(images)
            if seen >= RENEWAL_IMAGES:
                break
    network.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
