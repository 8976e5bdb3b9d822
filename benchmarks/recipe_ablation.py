#!/usr/bin/env python3
"""Optimizer, learning rate, distillation, soft epochs and value law of a prune, after long and brief dense trainings.

    recipe_ablation.py --out results/recipe.json

The embedded images train (9,000 of Fashion-MNIST). Judged by are the 50,000 training images of the full set that are
not among them, so the test images stay untouched. Every cell is a whole `chipdeploy prune`; a cell that the output file
holds already is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from compare import append, of_one_pace
from make_fashion_mini import TRAIN_PER_CLASS, first_of_each_class

from chipdeploy.chipnet.schedule import Schedule
from chipdeploy.config import PruneConfig
from chipdeploy.dense import train_dense
from chipdeploy.job import Job, prepare
from chipdeploy.latency.environment import environment
from chipdeploy.pipeline import prune
from chipdeploy.result import load
from chipdeploy.run import Run, read_json, write_json
from chipdeploy.training.loop import Silent, evaluate
from chipdeploy.training.recipes import Recipe, recipe
from chipdeploy.training.sources import read_fashion_mnist
from chipdeploy.training.splits import MemorySplit
from chipdeploy.training.weights import load_weights

EPOCHS, RATES, WEIGHTS = "10,40", "0.05,0.02", "0,0.7"


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    epochs, dense_paces, paces, rates, weights, softs, powers, seeds = (
        [float(value) for value in text.split(",")]
        for text in (
            options.dense_epochs,
            options.dense_paces,
            options.paces or str(Recipe().pace_after(options.keep)),
            options.rates,
            options.weights,
            options.softs,
            options.powers,
            options.seeds,
        )
    )
    if not options.out.is_file():
        write_json(options.out, {"schema": 1, "environment": environment(), "cells": []})
    for dense_epochs, dense_pace in product(map(int, epochs), dense_paces):
        job = prepare(PruneConfig(device="cpu", keep=options.keep, train_epochs=dense_epochs))
        job = replace(job, recipe=of_one_pace(job.recipe, dense_pace))
        unseen = _unseen(job, options.data_root)
        dense = train_dense(job, options.out.parent / "dense", Silent())
        model = job.model()
        load_weights(model, dense)
        of_dense = {"dense_epochs": dense_epochs, "dense_pace": dense_pace}
        of_dense |= {"dense_unseen": evaluate(model, unseen, job.device)}
        for seed, pace, rate, weight, soft, power in product(seeds, paces, rates, weights, softs, powers):
            cell = {**of_dense, "pace": pace, "keep": options.keep, "align": options.align, "seed": int(seed)}
            cell |= {"lr": rate, "distill": weight, "soft": int(soft), "total": options.total, "value_power": power}
            if any(cell.items() <= row.items() for row in read_json(options.out)["cells"]):
                continue
            row = cell | _pruned(job, cell, dense, unseen)
            append(options.out, row)
            print(row, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--align", type=int, default=16)
    parser.add_argument("--softs", default=str(recipe("default").soft_epochs), help="epochs with soft gates")
    parser.add_argument("--powers", default=str(Schedule.value_power), help="of the value's law")
    parser.add_argument("--total", type=int, default=11, help="epochs of soft pruning and finetune together")
    parser.add_argument("--dense-epochs", default=EPOCHS)
    parser.add_argument("--dense-paces", default=str(Recipe.pace), help="of orthogonal steps; 0 takes plain SGD")
    parser.add_argument("--paces", help="likewise, after the cut, if not the recipe's")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--weights", default=WEIGHTS, help="of the teacher")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-root", type=Path, help="folder of the full Fashion-MNIST; Debian's is found by itself")
    return parser.parse_args()


def _unseen(job: Job, root: Path | None) -> MemorySplit:
    """The training images of the full set that are not embedded."""
    full = read_fashion_mnist(root)
    chosen = np.ones(len(full.y_train), dtype=np.bool_)
    chosen[first_of_each_class(full.y_train, TRAIN_PER_CLASS)] = False
    images = torch.from_numpy(full.x_train.reshape(-1, 28, 28, 1)[chosen].copy())
    labels = torch.from_numpy(full.y_train[chosen].astype(np.int64))
    return MemorySplit(images, labels, job.data.mean, job.data.std)


def _pruned(job: Job, cell: dict[str, float], dense: Path, unseen: MemorySplit) -> dict[str, float]:
    started = time.monotonic()
    assert isinstance(job.config, PruneConfig)
    same = {key: cell[key] for key in ("align", "seed", "lr", "distill")}
    lengths = {"soft_epochs": cell["soft"], "finetune_epochs": cell["total"] - cell["soft"]}
    config = job.config.model_copy(update=same | lengths)
    schedule = replace(job.recipe.schedule, value_power=cell["value_power"])
    rules = replace(of_one_pace(job.recipe, cell["pace"]), schedule=schedule)
    one = Job(config, job.data, rules, job.device)
    with tempfile.TemporaryDirectory() as work:
        run = Run.create(Path(work), "prune", config.model_dump())
        prune(config, one, run, dense, Silent())
        accuracy = evaluate(load(run.path), unseen, job.device)
    return {"unseen": accuracy, "seconds": round(time.monotonic() - started)}


if __name__ == "__main__":
    main()
