#!/usr/bin/env python3
"""Accuracy at equal measured latency: chipdeploy by latency and by FLOPs against Torch-Pruning.

    latency_accuracy.py --data npz:cifar10.npz --model resnet56 --weights net.safetensors --out results/accuracy.json

Methods: latency and flops (`--via`), tp-1, tp-8, tp-16 (Torch-Pruning's global group-L2 with `round_to`; of all its
cuts the one with the most MACs whose measured time is within the goal, or where none is the fastest, which then stands
for harder goals of the same `--pace`, too). All start from the same dense network, and train for the same number of
epochs by the same recipe. What each network takes is measured once more at the end, in a process of its own. A cell
that the output file holds already is not run again. Beside other jobs it times on a core of its own (`--quiet` of
side_by_side.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from compare import (
    PLAIN,
    add_options,
    append,
    dense_network,
    export,
    finetune,
    machine,
    macs,
    missing,
    start,
    torch_pruning_cut,
    torch_pruning_cuts,
)
from latency_nets import PROFILES
from quiet import quiet_core, quietly
from torch import nn

from chipdeploy.config import PruneConfig
from chipdeploy.engines.base import open_engine
from chipdeploy.engines.target import Target
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.trace import trace
from chipdeploy.job import Job
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.meet import BLOCKS, CONFIRM_S, FIRST_S, TOLERANCE
from chipdeploy.latency.profiling import measure_profile
from chipdeploy.latency.rig import Rig, Setting
from chipdeploy.latency.store import file_name
from chipdeploy.meeting import arrange, setting_of
from chipdeploy.pipeline import prune
from chipdeploy.result import load
from chipdeploy.run import Run, read_json, write_json
from chipdeploy.training.loop import Silent, evaluate, renew_norms

METHODS = "latency,flops,tp-1,tp-8,tp-16"
LOOK_S = 1.0  # seconds for a first look at a peer's cut


def main() -> None:
    options = _options()
    # The search for the plan times inside the package; a process that it starts has the core of the one that waits.
    Rig.time = quietly(Rig.time)  # type: ignore[method-assign]
    Rig.time_anew = quietly(Rig.time_anew)  # type: ignore[method-assign]
    options.profiles.mkdir(parents=True, exist_ok=True)
    base, job, dense = start(options)
    base = base.model_copy(update={"on": options.on})
    with tempfile.TemporaryDirectory() as work:
        for goal in map(float, options.goals.split(",")):
            for cell in missing(options, {"goal": goal}, job.recipe, goal):
                via = cell["method"] if cell["method"] in ("latency", "flops") else "latency"
                values = base.model_dump() | {"kind": "latency", "align": "auto", "via": via, "latency": goal}
                config = PruneConfig(**values | {"seed": cell["seed"]})
                here = replace(job, config=config)
                row = _missed(options.out, cell) or _run(cell["method"], here, dense, options, Path(work))
                row = row | cell
                append(options.out, row)
                print({key: row[key] for key in (*cell, "test", "time", "macs", "seconds")}, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, model="resnet56", methods=METHODS, dense_epochs=30, threads=1)
    parser.add_argument("--on", default="ort-cpu")
    parser.add_argument("--goals", default="0.5,0.35")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the profile, where there is none")
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    return parser.parse_args()


def _missed(path: Path, cell: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a peer that missed an easier goal already: its fastest cut is the same, and need not train again."""
    for row in read_json(path)["cells"]:
        same = all((PLAIN | row)[key] == value for key, value in cell.items() if key != "goal")
        if same and cell["method"].startswith("tp-") and not row["met"] and row["goal"] > cell["goal"]:
            return dict(row)
    return None


def _run(method: str, job: Job, dense: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    started = time.monotonic()
    model = dense_network(job, dense)
    graph = trace(model, job.example)
    if method.startswith("tp-"):
        assert isinstance(job.config, PruneConfig)
        small, facts = _torch_pruning(job, model, graph, int(method[3:]), options, work)
        renew_norms(small, job.data.train, batch=job.batch, device=job.device)
        teacher = job.teacher(dense_network(job, dense))
        finetune(job, small, options.total, teacher, keep=job.config.latency)
    else:
        small, facts = _chipnet(job, dense, graph, options, work)
    facts |= {"test": evaluate(small, job.data.test, job.device), "macs": macs(small, job) / macs(model, job)}
    facts |= _fresh(job, model, small, work)
    facts |= {"machine": machine(job), "timed_on": environment_of(Target.parse(options.on))["machine"]}
    return facts | {"seconds": round(time.monotonic() - started)}


def _chipnet(
    job: Job, dense: Path, graph: ChannelGraph, options: argparse.Namespace, work: Path
) -> tuple[nn.Module, dict[str, Any]]:
    assert isinstance(job.config, PruneConfig)
    setting = setting_of(job.config, graph)
    path = options.profiles / file_name(
        job.config.model, graph, setting, str(environment_of(setting.target)["machine"])
    )
    measure_profile(job.model(), graph, setting, name=job.config.model, minutes=options.minutes, path=path)
    config = job.config.model_copy(update={"profile": str(path)})
    meeting = arrange(config, job.model(), graph, folder=options.profiles)
    run = Run.create(work, "prune", config.model_dump())
    result = prune(config, replace(job, config=config), run, dense, Silent(), meeting)
    facts = {key: result["latency"][key] for key in ("ratio", "met", "near", "tries")}
    return load(run.path).to(job.device), facts | {"layers": result["layers"]}


def _torch_pruning(
    job: Job, model: nn.Module, graph: ChannelGraph, round_to: int, options: argparse.Namespace, work: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Of its cuts the one with the most MACs whose time, measured once more, is within the goal; where none is, the
    fastest. All are looked at: a cut with fewer MACs may take longer."""
    config = job.config
    assert isinstance(config, PruneConfig) and config.latency
    with Rig(model, graph, setting_of(config, graph)) as rig:
        take = partial(_time, job, model, graph, round_to, rig, work / "tried.onnx")
        cuts = _cuts(job, model, graph, round_to, options.out, take, rig.setting)
        chosen, tries, met = min(cuts, key=lambda cut: cut["time"]), list[dict[str, float]](), False
        for cut in sorted(cuts, key=lambda cut: -cut["macs"]):
            if cut["time"] <= config.latency * (1 + TOLERANCE):
                tries.append(cut | {"time": take(cut["ratio"], FIRST_S)})
                if tries[-1]["time"] <= config.latency:
                    chosen, met = cut, True
                    break
    return torch_pruning_cut(job, model, graph, chosen["ratio"], round_to), {"tries": tries, "met": met}


def _time(
    job: Job, model: nn.Module, graph: ChannelGraph, round_to: int, rig: Rig, path: Path, ratio: float, seconds: float
) -> float:
    """Measured time of a cut, as a share of the dense network's."""
    export(job, torch_pruning_cut(job, model, graph, ratio, round_to), path)
    engine = open_engine(rig.setting.target, path, threads=rig.setting.threads)
    return rig.time([engine], seconds=seconds, blocks=BLOCKS)[0].ratio


def _cuts(
    job: Job,
    model: nn.Module,
    graph: ChannelGraph,
    round_to: int,
    out: Path,
    take: Callable[[float, float], float],
    setting: Setting,
) -> list[dict[str, float]]:
    """All of Torch-Pruning's cuts and their times; no goal and no seed changes them, so they are kept."""
    path = out.with_name(f"{job.config.model}-tp-{round_to}.json")
    where = environment_of(setting.target)["machine"]
    of = {"setting": setting.name, "machine": where, "weights": state_digest(model)}
    if not path.is_file() or read_json(path).get("of") != of:
        cuts = torch_pruning_cuts(job, model, graph, round_to)
        rows = [{"macs": share, "ratio": ratio, "time": take(ratio, LOOK_S)} for share, ratio in cuts]
        write_json(path, {"of": of, "cuts": rows})
    found: list[dict[str, float]] = read_json(path)["cuts"]
    return found


def state_digest(model: nn.Module) -> str:
    """sha256 of a network's weights and buffers."""
    tensors = [tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def _fresh(job: Job, model: nn.Module, small: nn.Module, work: Path) -> dict[str, Any]:
    """Both networks timed in a process that knows nothing else."""
    config = job.config
    assert isinstance(config, PruneConfig)
    paths = [export(job, network, work / f"{name}.onnx") for name, network in (("dense", model), ("small", small))]
    shape = ",".join(map(str, (config.bench_batch, *job.data.shape)))
    arguments = [*map(str, paths), config.on, str(config.threads), shape, str(CONFIRM_S)]
    code = "import latency_accuracy as own, sys; own.timed(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(dense: str, small: str, on: str, threads: str, shape: str, seconds: str) -> None:
    """Print the ratio of two files' times, as JSON."""
    from chipdeploy.latency.measure import compare

    sizes = tuple(map(int, shape.split(",")))
    images = np.random.default_rng(0).standard_normal(sizes, dtype=np.float32)
    engines = [open_engine(on, Path(path), threads=int(threads)) for path in (dense, small, dense)]
    one, other, control = (partial(engine.run, images) for engine in engines)
    with quiet_core():
        found = compare(one, other, control=control, batch=sizes[0], min_blocks=BLOCKS, seconds=float(seconds))
    facts = {"time": found.ratio, "interval": list(found.ratio_interval), "control": found.control_ratio}
    print(json.dumps(facts | {"block_ratios": [round(float(value), 4) for value in found.ratios]}))


if __name__ == "__main__":
    main()
