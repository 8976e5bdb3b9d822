#!/usr/bin/env python3
"""Is the target met? Cuts found by `meet`, then measured once more in a process of their own.

    latency_targets.py --out results/latency [--models resnet56] [--goals 0.7,0.5,0.35,0.25]

The cut that is found is measured again in several fresh processes, one after the other. Takes the profiles of
`latency_predict.py`, or measures them. The ranking of the channels is random: what is looked at is the time. A cell
that is in the JSON already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_nets import MODELS, PROFILES, Subject, profile_path, scores, subject

from chipdeploy.chipnet.project import Projector
from chipdeploy.engines.target import Target
from chipdeploy.graph.channels import Mask
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.meet import BLOCKS, TOLERANCE, Met, meet
from chipdeploy.latency.profiling import measure_profile
from chipdeploy.latency.rig import Rig
from chipdeploy.run import write_json

SCORES_SEED = 5
FRESH_S = 4.0  # seconds in each process


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.fresh:
        _fresh(options)
        return
    file = options.out / "targets.json"
    store: dict[str, Any] = (
        json.loads(file.read_text())
        if file.is_file()
        else {"environment": environment_of(Target.parse(options.on)), "cells": []}
    )
    for name in options.models.split(","):
        one = subject(name, options.on, options.batch, options.threads)
        for goal in map(float, options.goals.split(",")):
            key = {"model": name, "setting": one.setting.name, "goal": goal}
            if any(key.items() <= cell.items() for cell in store["cells"]):
                continue
            store["cells"].append(key | _cell(one, goal, options))
            write_json(file, store)
            shown = {k: v for k, v in store["cells"][-1].items() if k in ("met", "near", "ratio", "fresh_ratio")}
            print(key, shown, len(store["cells"][-1]["tries"]), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--goals", default="0.7,0.5,0.35,0.25")
    parser.add_argument("--on", default="ort-cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=5, help="fresh ones that measure each cut again")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of the profiles")
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)  # a plan to be measured in this process
    return parser.parse_args()


def _cell(one: Subject, goal: float, options: argparse.Namespace) -> dict[str, Any]:
    met = _meet(one, goal, options)
    facts = {key: value for key, value in met.to_dict().items() if key not in ("goal", "confirmation")}
    with tempfile.TemporaryDirectory() as folder:
        plan, answer = Path(folder) / "plan.json", Path(folder) / "answer.json"
        write_json(plan, {"model": one.name, "plan": PrunePlan.from_mask(one.graph, met.mask).to_dict()})
        arguments = ["--out", str(answer), "--fresh", str(plan), "--on", options.on]
        arguments += ["--batch", str(options.batch), "--threads", str(options.threads)]
        fresh = []
        for _ in range(options.processes):
            subprocess.run([sys.executable, __file__, *arguments], check=True)
            fresh.append(json.loads(answer.read_text()))
    ratios = [row["ratio"] for row in fresh]
    ratio = float(np.median(ratios))
    spread = max(ratios) / min(ratios) - 1
    within = {"over": ratio / goal - 1, "within": abs(ratio / goal - 1) <= TOLERANCE}
    return facts | {"fresh": fresh, "fresh_ratio": ratio, "fresh_spread": spread} | within


def _meet(one: Subject, goal: float, options: argparse.Namespace) -> Met:
    path = profile_path(one, options.profiles)
    profile = measure_profile(one.model, one.graph, one.setting, name=one.name, minutes=options.minutes, path=path)
    cost, values = profile.cost(one.graph), scores(one.graph, SCORES_SEED)
    projector = Projector(one.graph, cost, profile.align(one.graph))

    def propose(keep: float) -> Mask:
        return projector.project(values, min(0.9999, max(keep, projector.smallest)))

    with Rig(one.model, one.graph, one.setting) as rig:
        return meet(rig, cost, propose, goal)


def _fresh(options: argparse.Namespace) -> None:
    """Measure a plan as a stranger would: nothing is known but the network and the plan."""
    raw = json.loads(options.fresh.read_text())
    one = subject(raw["model"], options.on, options.batch, options.threads)
    mask = PrunePlan.from_dict(raw["plan"]).mask(one.graph)
    with Rig(one.model, one.graph, one.setting) as rig:
        found = rig.time([rig.engine(mask)], seconds=FRESH_S, blocks=BLOCKS)[0]
    facts = {
        "ratio": found.ratio,
        "interval": list(found.ratio_interval),
        "control": found.control_ratio,
        "control_spread": found.control_spread,
        "block_ratios": [round(float(value), 4) for value in found.ratios],
    }
    write_json(options.out, facts)


if __name__ == "__main__":
    main()
