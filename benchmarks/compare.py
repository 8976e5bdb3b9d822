#!/usr/bin/env python3
"""ChipNet against its peers: same dense start, same total of epochs, same finetune recipe, same budget counter.

    compare.py --data npz:cifar10.npz --weights resnet20.safetensors --out results/cifar10-resnet20.json

Methods: chipnet (aligned widths and whole branches), chipnet-free (--align 1), global (one-shot cut by BatchNorm scale,
ranked over the whole network), uniform (the same share of every group, BatchNorm scale inside), torch-pruning (its
global group-L2 importance), scratch (the uniform network trained from fresh weights for dense + prune epochs together).
A cell that the output file holds already is not run again, so the script can be stopped and started at will. Where
many cells train at once, nothing can be timed: `--untimed` keeps their ONNX files, and `--time` times them elsewhere:

    compare.py --data npz:cifar10.npz --weights net.safetensors --out results/c.json --device cuda --untimed files
    compare.py --data npz:cifar10.npz --out results/c.json --time files
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chipdeploy import checkpoint
from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.config import PruneConfig
from chipdeploy.dense import train_dense
from chipdeploy.engines.base import open_engine
from chipdeploy.engines.target import Target
from chipdeploy.export.onnx import export_onnx
from chipdeploy.files import atomic, digest
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.job import Job, prepare
from chipdeploy.latency.environment import environment
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.measure import compare
from chipdeploy.pipeline import prune
from chipdeploy.result import load
from chipdeploy.run import Run, write_json
from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Silent, evaluate, renew_norms
from chipdeploy.training.recipes import Recipe, recipe
from chipdeploy.training.weights import load_weights

TP_RATIOS = [float(ratio) for ratio in np.linspace(0.02, 0.98, 49)]
KEEPS, METHODS = "0.3,0.15,0.5", "chipnet,global,uniform,torch-pruning"
# What older cells do not say: there were no orthogonal steps, and no choice.
PLAIN = {"pace": 0.0, "lr": None, "distill": None}
Method = Callable[[Job, nn.Module, ChannelGraph, float], nn.Module]


def main() -> None:
    options = _options()
    if options.time:
        time_cells(options.out, options.time)
        return
    base, job, dense = start(options)
    with tempfile.TemporaryDirectory() as work:
        for keep in map(float, options.keeps.split(",")):
            for cell in missing(options, {"keep": keep}, job.recipe, keep):
                config = base.model_copy(update={"keep": keep, "seed": cell["seed"]})
                one = Job(config, job.data, job.recipe, job.device)
                files = options.untimed or Path(work)
                files.mkdir(parents=True, exist_ok=True)
                row = cell | _run(cell, one, dense, files, options)
                append(options.out, row)
                print({key: row[key] for key in (*cell, "test", "macs", "params", "seconds")}, flush=True)


def start(options: argparse.Namespace) -> tuple[PruneConfig, Job, Path]:
    """What all cells begin with: settings, data, and the dense weights; a results file that holds no cells yet."""
    torch.set_num_threads(options.threads)
    base = PruneConfig(
        model=options.model,
        data=options.data,
        mean=options.mean,
        std=options.std,
        weights=options.weights,
        soft_epochs=options.soft,
        finetune_epochs=options.total - options.soft,
        train_epochs=options.dense_epochs,
        lr=options.lr,
        distill=options.distill,
        device=options.device,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    job = prepare(base)
    if options.pace is not None:
        job = replace(job, recipe=of_one_pace(job.recipe, options.pace))
    dense = Path(base.weights) if base.weights else train_dense(job, options.out.parent / "dense", Silent())
    wanted = header(options)
    if not options.out.is_file():
        accuracy = evaluate(dense_network(job, dense), job.data.test, job.device)
        write_json(options.out, wanted | {"dense_test": accuracy})
    before = json.loads(options.out.read_text())["settings"]
    # Files of older versions do not say all of it.
    if other := [key for key, value in wanted["settings"].items() if before.get(key, value) != value]:
        got = f"{other[0]}={before[other[0]]}, now {wanted['settings'][other[0]]}"
        raise SystemExit(f"{options.out} is of other settings: {got}; give another --out")
    return base, job, dense


def of_one_pace(rules: Recipe, pace: float) -> Recipe:
    """The recipe with one pace for fresh weights and for any cut."""
    return replace(rules, pace=pace, cut_pace=float("inf"))


def missing(
    options: argparse.Namespace, goal: dict[str, float], rules: Recipe, keep: float
) -> Iterator[dict[str, Any]]:
    """The cells of one goal that the results file does not hold; it is looked at before each."""
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            pace = rules.pace if method == "scratch" else rules.pace_after(keep)
            cell = {"method": method, **goal, "seed": seed, "lr": options.lr, "distill": options.distill, "pace": pace}
            rows = json.loads(options.out.read_text())["cells"]
            if not any(cell.items() <= (PLAIN | row).items() for row in rows):
                yield cell


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a cell."""
    with changing(path) as cells:
        cells.append(row)


@contextmanager
def changing(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The cells of a results file, to be changed; other processes may work on other cells of the same file."""
    with _locked(path):
        store = json.loads(path.read_text())
        yield store["cells"]
        write_json(path, store)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The file that bears the name now: another process may have put a new one there while this one waited."""
    while True:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield
                return


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--keeps", default=KEEPS)
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--untimed", type=Path, help="time nothing, keep the cells' ONNX files in this folder")
    files.add_argument("--time", type=Path, help="only time the cells that have no times yet, from this folder")
    parser.add_argument("--scratch-epochs", type=int, default=0, help="of the scratch row; 0: dense + total")
    return parser.parse_args()


def add_options(
    parser: argparse.ArgumentParser,
    *,
    model: str = "resnet20",
    methods: str = METHODS,
    dense_epochs: int = 10,
    threads: int = 2,
) -> None:
    """Options of every comparison of methods, with their defaults."""
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default=model)
    parser.add_argument("--weights")
    parser.add_argument("--own", action="store_true", help="--weights are of --dense-epochs of training elsewhere")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=methods)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--total", type=int, default=15, help="epochs of soft pruning and finetune together")
    parser.add_argument("--soft", type=int, default=3, help="of them with soft gates; one-shot only finetunes")
    parser.add_argument("--dense-epochs", type=int, default=dense_epochs, help="of the dense start, if trained here")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--lr", type=float, help="peak learning rate, where it is not the recipe's")
    parser.add_argument("--distill", type=float, help="weight of the teacher, likewise")
    parser.add_argument("--pace", type=float, help="of orthogonal steps, if not the recipe's; 0 takes plain SGD")
    parser.add_argument("--device", default="cpu")
    numbers = lambda text: tuple(map(float, text.split(",")))  # noqa: E731
    parser.add_argument("--mean", type=numbers)
    parser.add_argument("--std", type=numbers)


def header(options: argparse.Namespace) -> dict[str, Any]:
    kept = ("model", "total", "soft", "dense_epochs", "scratch_epochs", "on", "threads")
    data = Path(options.data.partition(":")[2] or options.data).name
    settings = {key: getattr(options, key) for key in kept if hasattr(options, key)}
    if options.weights:
        settings["weights_sha256"] = digest(Path(options.weights))
    settings |= {"data": data, "given_weights": bool(options.weights) and not options.own}
    settings["batch"] = recipe("default").batch
    return {"schema": 1, "settings": settings, "environment": environment(), "cells": []}


def dense_network(job: Job, path: Path) -> nn.Module:
    model = job.model()
    load_weights(model, path)
    return model


def _run(cell: dict[str, Any], job: Job, dense: Path, files: Path, options: argparse.Namespace) -> dict[str, Any]:
    started, method = time.monotonic(), cell["method"]
    model = dense_network(job, dense)
    graph = trace(model, job.example)
    if method.startswith("chipnet"):
        small, facts = _chipnet(job, dense, align=1 if method.endswith("free") else 16)
    else:
        config = job.config
        assert isinstance(config, PruneConfig)
        start = job.model() if method == "scratch" else model
        small, facts = METHOD[method](job, start, graph, config.keep), {}
        if method != "scratch":
            renew_norms(small, job.data.train, batch=job.batch, device=job.device)
        epochs = options.total
        if method == "scratch":
            epochs = options.scratch_epochs or options.dense_epochs + options.total
        teacher = None if method == "scratch" else job.teacher(dense_network(job, dense))
        saved = files / f"{_file_name(cell)}.partial" if method == "scratch" else None
        kept = None if method == "scratch" else config.keep
        best = finetune(job, small, epochs, teacher, keep=kept, saved=saved)
        facts |= {"epochs": epochs, "best_epoch": best}
    seconds = time.monotonic() - started
    facts |= _count(model, small, job) | {"seconds": round(seconds), "machine": machine(job)}
    for name, network in (("dense", model), (_file_name(cell), small)):
        export(job, network, files / f"{name}.onnx")
    return facts if options.untimed else facts | times(files, cell)


def machine(job: Job) -> str:
    """Where a cell is trained."""
    target = Target.parse("torch-cuda" if job.device.type == "cuda" else "torch-cpu")
    return str(environment_of(target)["machine"])


def export(job: Job, network: nn.Module, path: Path) -> Path:
    """A network's ONNX file; whole or not there, since other processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        export_onnx(network.cpu().eval().to(memory_format=torch.contiguous_format), job.example.cpu(), temporary)
    return path


def finetune(
    job: Job, model: nn.Module, epochs: int, teacher: Teacher | None, *, keep: float | None, saved: Path | None = None
) -> int:
    """The default recipe's own finetune; its weights are those of the best epoch on the validation images, as in
    chipdeploy itself. Returns that epoch's number, 1 for the first.

    keep: share of the cost that was kept; None if the weights are fresh.
    saved: a checkpoint, written after every epoch and found again: for a training of hours.
    """
    optimizer, total, first = job.optimizer(model, keep), epochs * job.steps, 0
    best, val, number = copy.deepcopy(model), 0.0, 0
    if saved and saved.is_file():
        tensors, facts = checkpoint.load(saved)
        if facts["total"] != epochs:
            raise SystemExit(f"{saved} is of {facts['total']} epochs, not {epochs}; delete it or give these again")
        checkpoint.unpack("model", tensors, model)
        checkpoint.unpack("optimizer", tensors, optimizer)
        checkpoint.unpack("best", tensors, best)
        first, val, number = facts["done"], facts["val"], facts["best"]
    for epoch in range(first, epochs):
        rate = lambda step, before=epoch * job.steps: job.rate(before + step, total)  # noqa: E731
        job.epoch(model, optimizer, epoch, rate, Silent(), teacher=teacher)
        if (found := evaluate(model, job.data.val, job.device)) >= val:
            val, number = found, epoch + 1
            best.load_state_dict(model.state_dict())
        if saved:
            parts: dict[str, nn.Module | torch.optim.Optimizer]
            parts = {"model": model, "optimizer": optimizer, "best": best}
            tensors = {name: tensor for part in parts for name, tensor in checkpoint.pack(part, parts[part]).items()}
            checkpoint.save(saved, tensors, {"done": epoch + 1, "total": epochs, "val": val, "best": number})
    model.load_state_dict(best.state_dict())
    if saved:
        saved.unlink(missing_ok=True)
    return number


def _chipnet(job: Job, dense: Path, *, align: int) -> tuple[nn.Module, dict[str, Any]]:
    assert isinstance(job.config, PruneConfig)
    config = job.config.model_copy(update={"align": align})
    with tempfile.TemporaryDirectory() as work:
        run = Run.create(Path(work), "prune", config.model_dump())
        result = prune(config, Job(config, job.data, job.recipe, job.device), run, dense, Silent())
        metrics, small = run.metrics(), load(run.path)
    return small.to(job.device), {
        "epochs": len(metrics),
        "layers": result["layers"],
        "soft": [row for row in metrics if row["phase"] == "soft"],
    }


def norm_scales(model: nn.Module, graph: ChannelGraph) -> np.ndarray:
    """|scale| of every channel's BatchNorms, averaged where a stream has many."""
    scales = {
        name + ".weight": module.weight.detach().abs().double().cpu().numpy()
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    total, count = np.zeros(graph.channels), np.zeros(graph.channels)
    for slot in graph.slots:
        if slot.tensor in scales:
            inside = slot.index >= 0
            np.add.at(total, slot.index[inside], scales[slot.tensor][inside])
            np.add.at(count, slot.index[inside], 1)
    return total / np.maximum(count, 1)


def one_shot_global(job: Job, model: nn.Module, graph: ChannelGraph, keep: float) -> nn.Module:
    """Network Slimming's ranking (Liu et al., ICCV 2017): the largest threshold on |scale| that meets the budget."""
    scores, cost = norm_scales(model, graph), CostModel.of(graph, "macs")
    best_of_group = [graph.span(g).start + int(scores[graph.span(g)].argmax()) for g in range(len(graph.groups))]
    order = np.argsort(-scores, kind="stable")

    def mask(count: int) -> np.ndarray:
        kept = np.zeros(graph.channels, dtype=bool)
        kept[order[:count]] = kept[best_of_group] = True
        return kept

    fits = [n for n in range(graph.channels) if cost.count(group_widths(graph, mask(n))) <= keep * cost.dense]
    return hard_prune(model, graph, PrunePlan.from_mask(graph, mask(max(fits))))


def one_shot_uniform(job: Job, model: nn.Module, graph: ChannelGraph, keep: float) -> nn.Module:
    """The same share of every group, the best |scale| inside; single channels are added until the budget is full."""
    cost, sizes = CostModel.of(graph, "macs"), graph.sizes
    plans = [np.maximum(1, np.floor(sizes * share)).astype(np.int64) for share in np.linspace(0.05, 1, 2000)]
    widths = [plan for plan in plans if cost.count(plan) <= keep * cost.dense][-1]
    for group in np.argsort(widths / sizes, kind="stable"):
        wider = widths.copy()
        wider[group] = min(sizes[group], widths[group] + 1)
        if cost.count(wider) <= keep * cost.dense:
            widths = wider
    mask = Projector(graph, cost, 1).top(norm_scales(model, graph), widths)
    return hard_prune(model, graph, PrunePlan.from_mask(graph, mask))


def torch_pruning(job: Job, model: nn.Module, graph: ChannelGraph, keep: float) -> nn.Module:
    """Torch-Pruning's global group-L2: of its cuts the largest within the budget; the smallest where none is."""
    cuts = torch_pruning_cuts(job, model, graph)
    fits = [ratio for share, ratio in cuts if share <= keep]
    high = fits[-1] if fits else cuts[0][1]
    low = high - (TP_RATIOS[1] - TP_RATIOS[0] if fits else 0.0)
    for _ in range(6):
        middle = (low + high) / 2
        small = torch_pruning_cut(job, model, graph, middle)
        low, high = (low, middle) if macs(small, job) <= keep * macs(model, job) else (middle, high)
    return torch_pruning_cut(job, model, graph, high)


def torch_pruning_cuts(
    job: Job, model: nn.Module, graph: ChannelGraph, round_to: int | None = None
) -> list[tuple[float, float]]:
    """Shares of the MACs that its ratios keep, and the ratios, the smallest share first.

    A search by halves would not do: it leaves a layer whole of which nothing would stay, so beyond some ratio the
    networks grow again.
    """
    dense, shares = CostModel.of(graph, "macs").dense, {}
    for ratio in TP_RATIOS:
        shares[macs(torch_pruning_cut(job, model, graph, ratio, round_to), job) / dense] = ratio
    return sorted(shares.items())


def torch_pruning_cut(
    job: Job, model: nn.Module, graph: ChannelGraph, ratio: float, round_to: int | None = None
) -> nn.Module:
    """A copy of the model cut by one of Torch-Pruning's ratios.

    It does not know option-A shortcuts (their pads are constants to it): there the streams are given to it as ignored.
    """
    import copy

    import torch_pruning as tp

    streams = {name for group in graph.groups if group.branch is None for name in group.producers}
    pads = any(hasattr(module, "before") for module in model.modules())
    small = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    modules = dict(small.named_modules())
    classifier = [m for m in small.modules() if isinstance(m, nn.Linear) and m.out_features == job.data.num_classes]
    ignored = classifier + ([modules[name] for name in sorted(streams)] if pads else [])
    tp.pruner.BasePruner(
        small,
        job.example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=1.0 if pads else 0.95,
        ignored_layers=ignored,
        round_to=round_to,
    ).step()
    return small


def narrower_from_scratch(job: Job, model: nn.Module, graph: ChannelGraph, keep: float) -> nn.Module:
    """The uniform network with the fresh weights of `model`."""
    return one_shot_uniform(job, model, graph, keep)


METHOD: dict[str, Method] = {
    "global": one_shot_global,
    "uniform": one_shot_uniform,
    "torch-pruning": torch_pruning,
    "scratch": narrower_from_scratch,
}


def macs(model: nn.Module, job: Job) -> float:
    """Counted by PyTorch's own counter on the network that was built."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(job.example[:1])
    return int(counter.get_total_flops()) / 2


def _count(model: nn.Module, small: nn.Module, job: Job) -> dict[str, Any]:
    params = [sum(tensor.numel() for tensor in network.parameters()) for network in (small, model)]
    return {
        "val": evaluate(small, job.data.val, job.device),
        "test": evaluate(small, job.data.test, job.device),
        "macs": macs(small, job) / macs(model, job),
        "params": params[0] / params[1],
    }


def _file_name(cell: dict[str, Any]) -> str:
    special = [f"-{key}{cell[key]:g}" for key in ("lr", "distill") if cell.get(key) is not None]
    pace = f"-{cell['pace']:g}" if cell.get("pace") else ""
    return "".join([f"{cell['method']}-{cell['keep']:g}-{cell['seed']}{pace}", *special])


def times(files: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Time in ONNX Runtime on one CPU thread, as a share of the dense time; raw block ratios are kept."""
    paths = [files / f"{name}.onnx" for name in ("dense", _file_name(cell), "dense")]
    engines = [open_engine("ort-cpu", path, threads=1) for path in paths]
    shape = engines[0].describe()["input"][1:]
    shares: dict[str, Any] = {"timed_on": environment()["machine"]}
    for batch in (1, 32):
        images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
        dense, pruned, control = (partial(engine.run, images) for engine in engines)
        measured = compare(dense, pruned, control=control, batch=batch, seconds=3.0)
        shares[f"time_batch{batch}"] = {
            "ratio": measured.ratio,
            "interval": list(measured.ratio_interval),
            "block_ratios": [round(float(value), 4) for value in measured.ratios],
            "load": os.getloadavg()[0],
        }
    return shares


def time_cells(path: Path, files: Path) -> None:
    """Fill in the times that a results file lacks, one cell after the other."""
    for cell in json.loads(path.read_text())["cells"]:
        if "time_batch1" not in cell:
            measured = times(files, cell)
            with changing(path) as cells:
                cells[cells.index(cell)].update(measured)
            print(_file_name(cell), *(measured[f"time_batch{batch}"]["ratio"] for batch in (1, 32)), flush=True)


if __name__ == "__main__":
    main()
