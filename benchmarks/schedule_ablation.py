#!/usr/bin/env python3
"""A constant of the soft phase's schedule, judged by images that nothing was trained on or chosen by.

    schedule_ablation.py --data npz:cifar10.npz --out results/schedule.json --vary logit_travel=0.2,1,3,10

Of the training images 40,000 train (a tenth of them validates, as ever) and 10,000 judge; the test images stay
untouched. Every cell is a whole `chipdeploy prune` from one dense network that is trained here; beside them stands the
one-shot cut of the same share of every group with the same total of epochs. A cell that the output file holds already
is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import append, dense_network, finetune, one_shot_uniform

from chipdeploy.chipnet.schedule import Schedule
from chipdeploy.config import PruneConfig
from chipdeploy.dense import train_dense
from chipdeploy.graph.trace import trace
from chipdeploy.job import Job, prepare
from chipdeploy.latency.environment import environment
from chipdeploy.pipeline import prune
from chipdeploy.result import load
from chipdeploy.run import Run, read_json, write_json
from chipdeploy.training.loop import Silent, evaluate, renew_norms

JUDGES = 10_000
SPLIT_SEED = 7
Cell = dict[str, Any]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    base = PruneConfig(
        model=options.model,
        data=f"npz:{_split(Path(options.data.removeprefix('npz:')), options.out.parent)}",
        train_epochs=options.dense_epochs,
        soft_epochs=options.soft,
        finetune_epochs=options.total - options.soft,
        distill=options.distill,
        device=options.device,
    )
    job = prepare(base)
    dense = train_dense(job, options.out.parent / "dense", Silent())
    if not options.out.is_file():
        judged = evaluate(dense_network(job, dense), job.data.test, job.device)
        kept = {key: getattr(options, key) for key in ("model", "dense_epochs", "total", "soft", "distill")}
        head = {"schema": 1, "settings": kept, "environment": environment(), "dense_unseen": judged}
        write_json(options.out, head | {"schedule": asdict(Schedule()), "cells": []})
    for cell in _cells(options):
        if any(cell.items() <= row.items() for row in read_json(options.out)["cells"]):
            continue
        started = time.monotonic()
        config = base.model_copy(update={"keep": cell["keep"], "seed": cell["seed"]})
        run = _uniform if cell["method"] == "uniform" else _chipnet
        row = cell | run(cell, Job(config, job.data, job.recipe, job.device), dense)
        append(options.out, row | {"seconds": round(time.monotonic() - started)})
        print({key: value for key, value in row.items() if key != "layers"}, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="npz:FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vary", required=True, help="NAME=VALUE,VALUE: a constant of the schedule")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--aligns", default="16,1")
    parser.add_argument("--keeps", default="0.3,0.15")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dense-epochs", type=int, default=24)
    parser.add_argument("--total", type=int, default=6, help="epochs of soft pruning and finetune together")
    parser.add_argument("--soft", type=int, default=2)
    parser.add_argument("--distill", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _split(source: Path, folder: Path) -> Path:
    """Training images without the judges, who stand in the place of the test images."""
    path = folder / f"{source.stem}-split.npz"
    if not path.is_file():
        with np.load(source) as data:
            images, labels = data["x_train"], data["y_train"]
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        rest, judges = order[JUDGES:], order[:JUDGES]
        np.savez(path, x_train=images[rest], y_train=labels[rest], x_test=images[judges], y_test=labels[judges])
    return path


def _cells(options: argparse.Namespace) -> list[Cell]:
    name, _, values = options.vary.partition("=")
    keeps, aligns, seeds = (
        [number(text) for text in given.split(",")]
        for given, number in ((options.keeps, float), (options.aligns, int), (options.seeds, int))
    )
    cells: list[Cell] = []
    for keep, seed in product(keeps, seeds):
        cells.append({"method": "uniform", "keep": keep, "seed": seed})
        cells += [
            {"method": "chipnet", "keep": keep, "seed": seed, "align": align, name: value}
            for align, value in product(aligns, map(float, values.split(",")))
        ]
    return cells


def _chipnet(cell: Cell, job: Job, dense: Path) -> Cell:
    assert isinstance(job.config, PruneConfig)
    config = job.config.model_copy(update={"align": cell["align"]})
    varied = {key: value for key, value in cell.items() if key not in ("method", "keep", "seed", "align")}
    rules = replace(job.recipe, schedule=replace(job.recipe.schedule, **varied))
    with tempfile.TemporaryDirectory() as work:
        run = Run.create(Path(work), "prune", config.model_dump())
        result = prune(config, Job(config, job.data, rules, job.device), run, dense, Silent())
        return {"unseen": evaluate(load(run.path), job.data.test, job.device), "layers": result["layers"]}


def _uniform(cell: Cell, job: Job, dense: Path) -> Cell:
    model = dense_network(job, dense)
    graph = trace(model, job.example)
    small = one_shot_uniform(job, model, graph, cell["keep"])
    renew_norms(small, job.data.train, batch=job.batch, device=job.device)
    assert isinstance(job.config, PruneConfig)
    epochs = (job.config.soft_epochs or 0) + (job.config.finetune_epochs or 0)
    finetune(job, small, epochs, job.teacher(dense_network(job, dense)), keep=cell["keep"])
    return {"unseen": evaluate(small, job.data.test, job.device)}


if __name__ == "__main__":
    main()
