#!/usr/bin/env python3
"""What the gates cost: a soft-pruning step against a plain training step of the same network, interleaved.

    gate_cost.py --out results/gate-cost.json

Beside it: seconds of `hard_prune` for torchvision's ResNet-50, and CPU seconds of `chipdeploy --help`. The projections
fall inside the timed steps, as they do in training: the ratio is of sums over all blocks, with a bootstrap interval.
By default there are as many soft steps as `chipdeploy prune` makes on the embedded images, its shortest soft phase.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.chipnet.soft import Budget, ChipNet
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.latency.environment import environment
from chipdeploy.run import write_json
from chipdeploy.training.autocast import autocast
from chipdeploy.training.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=210, help="of four steps each: plain, soft, soft, plain")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {
        "schema": 1,
        "environment": environment() | {"threads": options.threads},
        "step": step_cost(options.model, options.batch, options.blocks),
        "hard_prune_resnet50_s": hard_prune_seconds(),
        "help_cpu_s": help_cpu_seconds(),
    }
    write_json(options.out, facts)
    low, high = facts["step"]["interval"]
    print(f"soft step / plain step, {options.model}, batch {options.batch}: ", end="")
    print(f"{facts['step']['ratio']:.3f} (95 % {low:.3f}-{high:.3f})")
    print(f"hard_prune of torchvision resnet50: {min(facts['hard_prune_resnet50_s']):.2f} s")
    print(f"chipdeploy --help: {min(facts['help_cpu_s']):.2f} s of CPU time")


def step_cost(name: str, batch: int, blocks: int) -> dict[str, Any]:
    """Plain and soft steps in ABBA blocks; the soft phase passes through its whole schedule."""
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    plain = build_model(name, num_classes=10, in_channels=3, image_size=32)
    gated = build_model(name, num_classes=10, in_channels=3, image_size=32)
    chip = ChipNet(gated, images[:2], Budget("flops", 0.3), steps=2 * blocks)
    steps = {"plain": _stepper(plain, images, labels), "soft": _stepper(chip, images, labels)}
    times: dict[str, list[float]] = {"plain": [], "soft": []}
    for step in steps.values():
        step()
    for _ in range(blocks):
        for kind in ("plain", "soft", "soft", "plain"):
            started = time.perf_counter()
            steps[kind]()
            times[kind].append(time.perf_counter() - started)
    pairs = {kind: np.array(values).reshape(-1, 2).sum(axis=1) for kind, values in times.items()}
    generator = np.random.default_rng(0)
    draws = generator.integers(0, blocks, (2000, blocks))
    ratios = pairs["soft"][draws].sum(axis=1) / pairs["plain"][draws].sum(axis=1)
    return {
        "model": name,
        "batch": batch,
        "times_s": times,
        "ratio": float(pairs["soft"].sum() / pairs["plain"].sum()),
        "interval": np.percentile(ratios, [2.5, 97.5]).tolist(),
    }


def _stepper(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    network.train().to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    chip = network if isinstance(network, ChipNet) else None
    model = chip.model if chip is not None else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        with autocast(torch.device("cpu")):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        if chip is not None:
            loss = chip.loss(loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if chip is not None:
            chip.step()

    return step


def hard_prune_seconds() -> list[float]:
    """torchvision's ResNet-50 at 30 % of the MACs, cut five times."""
    model = build_model("torchvision:resnet50", num_classes=1000, in_channels=3, image_size=224)
    graph = trace(model, torch.zeros(2, 3, 224, 224))
    scores = np.random.default_rng(0).random(graph.channels) + 0.1
    plan = PrunePlan.from_mask(graph, Projector(graph, CostModel.of(graph, "macs")).project(scores, 0.3))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        hard_prune(model, graph, plan)
        seconds.append(time.perf_counter() - started)
    return seconds


def help_cpu_seconds() -> list[float]:
    """User and system time of five calls."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "chipdeploy.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds


if __name__ == "__main__":
    main()
