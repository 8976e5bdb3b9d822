"""Latency against budgets for one model, as facts and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chipdeploy.config import PruneConfig
from chipdeploy.errors import UsageError
from chipdeploy.graph.trace import trace
from chipdeploy.latency.calibrate import Curve, curves
from chipdeploy.latency.profiling import OnRound
from chipdeploy.meeting import arrange, projector_of, step, wanted_goal
from chipdeploy.report.plots import latency_plot
from chipdeploy.run import make_folder, write_json
from chipdeploy.training.models import build_model

JSON, PICTURE = "calibration.json", "calibration.svg"


def calibrate_model(
    config: PruneConfig,
    *,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    profiles: Path,
    out: Path | None = None,
    on_round: OnRound | None = None,
    on_point: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The budgets that give the latency of a configuration, each with its interval, and the whole curves.

    Args:
        config: model, goal, target, profile.
        profiles: where a profile is looked for, and kept if one must be measured.
        out: a folder for the facts and the picture; both are written whole or not at all.

    Raises:
        UsageError: no goal, or one that is met already. BudgetError: one out of reach.
        RunError: a profile that is damaged, or of something else.
    """
    if wanted_goal(config) is None:
        raise UsageError("no latency: give one of --latency, --latency-ms, --fps, e.g. --latency 0.5")
    model = build_model(config.model, num_classes=classes, in_channels=channels, image_size=image_size)
    example = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    graph = trace(model, example, exclude=config.exclude)
    meeting = arrange(config, model, graph, folder=profiles, on_round=on_round, tell=tell)
    assert meeting and meeting.goal
    profile = meeting.profile
    cost = profile.cost(graph)
    projector = projector_of(config, graph, cost, meeting)
    found = curves(projector, cost, on_point=on_point)
    least = cost.count(projector.smallest_widths)
    goal = meeting.goal
    flag = {"ratio": "--latency", "ms": "--latency-ms", "fps": "--fps"}[goal.kind]
    facts: dict[str, Any] = {
        "model": config.model,
        "goal": meeting.text(),
        "share": meeting.share,
        "dense_ms": profile.dense_ms,
        "align": step(config, meeting, graph),
        "spread": cost.spread,
        "machine": profile.machine,
        "foreign": meeting.foreign,
        "smallest": {"ratio": least, "ms": least * profile.dense_ms},
        "budgets": {curve.kind: _budget(curve, meeting.share) for curve in found},
        "curves": {curve.kind: curve.to_dict() for curve in found},
        "flags": f"{flag} {goal.value:g} --on {config.on}",
    }
    if out:
        make_folder(out)
        latency_plot(facts["curves"], meeting.share, out / PICTURE)
        write_json(out / JSON, facts)
    return facts


def _budget(curve: Curve, share: float) -> dict[str, Any]:
    """What is to be kept of one budget; null where it does not reach the latency, however little is kept."""
    at = curve.at(share)
    least = {"least_ratio": float(curve.ratio[0])}
    return {"keep": at and at[0], "interval": at and [at[1], at[2]]} | least
