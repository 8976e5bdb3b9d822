"""A finished run: the files that it leaves, what `result.json` says, and the networks loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chipdeploy.chipnet.costs import COSTS, UNITS, CostModel
from chipdeploy.chipnet.soft import LATENCY, Budget
from chipdeploy.config import PruneConfig
from chipdeploy.errors import RunError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.plan import PrunePlan, dead_branches, group_widths
from chipdeploy.graph.proof import evaluating
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.job import model_digest
from chipdeploy.meeting import Meeting, latency_facts, step
from chipdeploy.run import CONFIG, Run, read_json
from chipdeploy.training.data import ImageData
from chipdeploy.training.models import build_model
from chipdeploy.training.seeding import seeded
from chipdeploy.training.weights import load_weights

PRUNED, DENSE, PLAN, RESULT, DATA = (
    "pruned.safetensors",
    "dense.safetensors",
    "plan.json",
    "result.json",
    "data.json",
)


KNOWN_BY = 8  # numbers
SAME = 1e-2  # of the largest of them: another device rounds otherwise, another network is further off


def summarise(
    config: PruneConfig,
    graph: ChannelGraph,
    plan: PrunePlan,
    accuracy: dict[str, Any],
    meeting: Meeting | None = None,
    met: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run achieved, as plain values: see report/ for the reader."""
    mask = plan.mask(graph)
    widths = group_widths(graph, mask)
    models = {name: CostModel.of(graph, name) for name in COSTS}
    costs = {
        "dense": {name: int(model.dense) for name, model in models.items()},
        "pruned": {name: int(model.count(widths)) for name, model in models.items()},
    }
    facts: dict[str, Any] = {} if not (meeting and met) else {"latency": latency_facts(meeting, met)}
    return facts | {
        "schema": 1,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "align": step(config, meeting, graph),
        "budget": _latency_budget(met) if met else _cost_budget(config, costs),
        "accuracy": accuracy,
        "costs": costs,
        "layers": layer_widths(graph, plan),
        "removed_branches": [graph.branches[i].name for i in dead_branches(graph, widths)],
        "plan_digest": plan.digest,
    }


def _cost_budget(config: PruneConfig, costs: dict[str, dict[str, int]]) -> dict[str, Any]:
    kind = Budget(config.kind, config.keep).cost
    return {
        "kind": config.kind,
        "keep": config.keep,
        "dense": costs["dense"][kind],
        "limit": config.keep * costs["dense"][kind],
        "achieved": costs["pruned"][kind] / costs["dense"][kind],
        "unit": UNITS[kind],
    }


def _latency_budget(met: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": LATENCY,
        "keep": met["goal"],
        "dense": met["dense_ms"],
        "limit": met["goal"] * met["dense_ms"],
        # Milliseconds are judged by medians, shares by the blocks' ratios; the two differ by some per cent.
        "achieved": met["pruned_ms"] / met["dense_ms"] if met.get("goal_ms") else met["ratio"],
        "unit": "ms",
        "kept": met["pruned_ms"],
    }


def layer_widths(graph: ChannelGraph, plan: PrunePlan) -> list[dict[str, Any]]:
    """Output channels of every layer, dense and kept; a layer of a removed branch keeps none."""
    mask = plan.mask(graph)
    gone = set(dead_branches(graph, group_widths(graph, mask)))
    return [
        {
            "name": layer.name,
            "dense": len(layer.out_index),
            "kept": 0 if layer.branch in gone else int(((layer.out_index < 0) | mask[layer.out_index]).sum()),
        }
        for layer in graph.layers
    ]


def describe_data(data: ImageData) -> dict[str, Any]:
    """What a deployed model must know of its data."""
    return {
        "name": data.name,
        "shape": list(data.shape),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "digest": data.digest,
    }


def load(run_dir: str | Path, *, dense: bool = False) -> nn.Module:
    """The pruned network of a finished run (or its dense one), rebuilt from plan and safetensors, in eval mode.

    Raises:
        RunError: no finished run, a file that was changed after it was written, or code that builds another network
            now.
        ModelError: the model's own file is gone.
    """
    run = Run.open(Path(run_dir))
    data = read_json(run.check(DATA))
    config = read_json(run.check(CONFIG))
    spec = config["model"]
    channels, size = data["shape"][0], data["shape"][1]
    with seeded(config["seed"]):  # what is drawn in __init__, and kept in no state dict, is as it was
        model = build_model(spec, num_classes=len(data["classes"]), in_channels=channels, image_size=size)
    result = read_json(run.check(RESULT))
    if result["inputs"].get("model") != model_digest(spec).get("model"):
        raise RunError(
            f"{spec.rpartition(':')[0]}, or a file that it imports, was changed since {run.path} was made from it; "
            "make the run again"
        )
    example = torch.randn(2, *data["shape"], generator=torch.Generator().manual_seed(0))
    if not dense:
        graph = trace(model, example, exclude=config["exclude"])
        model = hard_prune(model, graph, PrunePlan.from_dict(read_json(run.check(PLAN))))
    load_weights(model, run.check(DENSE if dense else PRUNED))
    model.eval()
    known = result.get("answers", {}).get("dense" if dense else "pruned")  # older runs have none
    if known and not np.allclose(answers(model, example), known, rtol=0, atol=SAME * max(map(abs, known))):
        raise RunError(
            f"the network of {run.path} answers otherwise than when it was made: something has changed that its "
            "weights do not hold, such as an installed package; make the run again"
        )
    return model


def answers(model: nn.Module, example: Tensor) -> list[float]:
    """The first logits of a network for the example: enough to know it by."""
    with evaluating(model), torch.no_grad():
        return [float(value) for value in model(example).flatten()[:KNOWN_BY].float()]
