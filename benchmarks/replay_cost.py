#!/usr/bin/env python3
"""What a finetuning step takes on a GPU, launched kernel by kernel and replayed whole: replay_cost.py --out file.json.

Both kinds alternate epoch by epoch, each with a network of its own, a teacher, and random images of 32 pixels; first
steps and capture count. The losses are kept, too: both kinds must learn alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chipdeploy.engines.target import Target
from chipdeploy.latency.gpu import environment_of
from chipdeploy.run import write_json
from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Silent, train_epoch
from chipdeploy.training.models import build_model
from chipdeploy.training.orthogonal import OrthogonalSGD
from chipdeploy.training.recipes import recipe

MODELS, BATCH, PIXELS, CLASSES = "resnet20,resnet56,mobilenetv2", 64, 32, 10
KINDS = {"launched": False, "replayed": True}
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class RandomImages:
    """Batches that lie on the GPU already; a label is the brightest of an image's first ten columns."""

    images: Tensor

    @classmethod
    def drawn(cls, steps: int) -> RandomImages:
        generator = torch.Generator().manual_seed(0)
        return cls(torch.randn(steps, BATCH, 3, PIXELS, PIXELS, generator=generator).to(DEVICE))

    def __len__(self) -> int:
        return len(self.images) * BATCH

    @property
    def pixels(self) -> int:
        return PIXELS * PIXELS

    def batches(
        self, size: int, *, seed: int | None = None, augment: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images in self.images:
            labels = images[:, 0, :, :CLASSES].sum(1).argmax(1)
            yield images.to(memory_format=torch.channels_last), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--steps", type=int, default=300, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each kind, after one that does not count")
    options = parser.parse_args()
    data = RandomImages.drawn(options.steps)
    rows = [_row(name, data, options.rounds) for name in options.models.split(",")]
    facts = {"schema": 1, "environment": environment_of(Target.parse("torch-cuda")), "batch": BATCH, "rows": rows}
    write_json(options.out, facts)


def _row(name: str, data: RandomImages, rounds: int) -> dict[str, Any]:
    networks = {kind: _network(name) for kind in KINDS}
    optimizers = {kind: _optimizer(network) for kind, network in networks.items()}
    teacher = Teacher(_network(name).eval(), recipe("default").distill, recipe("default").temperature)
    row: dict[str, Any] = {"model": name} | {kind: {"ms": [], "losses": []} for kind in KINDS}
    for number in range(rounds + 1):
        for kind, replay in KINDS.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            loss = train_epoch(
                networks[kind],
                data,
                optimizers[kind],
                lambda _: 0.01,
                batch=BATCH,
                seed=number,
                device=DEVICE,
                watcher=Silent(),
                teacher=teacher,
                replay=replay,
            )
            torch.cuda.synchronize()
            row[kind]["ms"] += [(time.perf_counter() - started) / len(data.images) * 1e3] if number else []
            row[kind]["losses"].append(loss)
    print(name, {kind: [round(value, 2) for value in row[kind]["ms"]] for kind in KINDS}, flush=True)
    return row


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, num_classes=CLASSES, in_channels=3, image_size=PIXELS)
    return model.to(DEVICE).to(memory_format=torch.channels_last)


def _optimizer(model: nn.Module) -> OrthogonalSGD:
    rules = recipe("default")
    return OrthogonalSGD(
        model, lr=rules.rate, pace=rules.pace, momentum=rules.momentum, weight_decay=rules.weight_decay
    )


if __name__ == "__main__":
    main()
