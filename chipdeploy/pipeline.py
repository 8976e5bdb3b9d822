"""The main job: dense network ▶ soft pruning ▶ cut ▶ finetune ▶ test, as a run that can be interrupted anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from chipdeploy import checkpoint
from chipdeploy.checking import check_model
from chipdeploy.chipnet.costs import UNITS, CostModel
from chipdeploy.chipnet.soft import Budget
from chipdeploy.config import PruneConfig
from chipdeploy.copying import copied
from chipdeploy.errors import UsageError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.loud import randomize
from chipdeploy.graph.trace import trace
from chipdeploy.job import Job
from chipdeploy.latency.profiling import OnRound
from chipdeploy.latency.store import FOLDER
from chipdeploy.meeting import MEASURED, PROFILE, Meeting, arrange, keep_profile, projector_of
from chipdeploy.pruning import Pruning
from chipdeploy.result import DATA, DENSE, PLAN, PRUNED, RESULT, answers, describe_data, summarise
from chipdeploy.run import CONFIG, Run
from chipdeploy.sizing import Sizing
from chipdeploy.training.loop import Watcher, evaluate
from chipdeploy.training.weights import load_weights, save_weights

PROFILES = Path("runs") / FOLDER


def check_budget(
    config: PruneConfig,
    job: Job,
    *,
    profiles: Path = PROFILES,
    run: Path | None = None,
    on_round: OnRound | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[str, Meeting | None]:
    """The budget in full, once it is known that the model can be pruned to it and the weights fit.

    Args:
        profiles: where a latency profile is looked for, and kept if one must be measured.
        run: the run's folder, if it is known: a run that was begun goes on by its own profile.
        tell: is told before anything is measured, in one line.

    Raises:
        ModelError, BudgetError, WeightsError: before anything is written.
    """
    model = job.model()
    if config.weights:
        load_weights(model, Path(config.weights))
    graph = trace(model, job.example, exclude=config.exclude)
    check_model(model, job.example, job.data.num_classes)
    size = _check_size(config, model, graph)
    meeting = arrange(config, model, graph, folder=profiles, run=run, on_round=on_round, tell=tell)
    if meeting and meeting.goal:
        _check_clock(meeting, run)
        return f"take at most {meeting.text()}{size}", meeting
    budget = Budget(config.kind, config.keep)
    cost = CostModel.of(graph, budget.cost)
    projector_of(config, graph, cost, meeting).check(config.keep)
    unit = UNITS[budget.cost]
    text = f"keep at most {config.keep:.4g} of the {unit}: {config.keep * cost.dense:,.0f} of {cost.dense:,.0f}"
    return text + size, meeting


def _check_clock(meeting: Meeting, run: Path | None) -> None:
    """Raises UsageError where milliseconds are asked for, and another machine's are all that is known.

    A run that was begun has its plan's budget already, and meets the goal by what is measured where it ends.
    """
    begun = run is not None and (run / PROFILE).is_file()
    if meeting.ms and meeting.foreign and not begun:
        raise UsageError(
            f"--latency-ms and --fps need a profile of this machine as it is, got another ({meeting.foreign}); leave "
            "--profile out to measure here, or give a share by --latency"
        )


def _check_size(config: PruneConfig, model: nn.Module, graph: ChannelGraph) -> str:
    """The limit of the memory in words; empty where there is none. Raises BudgetError for one out of reach.

    The smallest plan is the same whatever is budgeted, so this needs no profile.
    """
    projector = projector_of(config, graph, CostModel.of(graph, "params"))
    # A file holds equal tensors once, and those of a fresh network are equal: trained ones take more.
    sizing = Sizing.of(config, randomize(copied(model)), projector)
    if sizing is None:
        return ""
    with sizing:
        sizing.check()
    return f"; at most {sizing.text()}"


def prune(
    config: PruneConfig, job: Job, run: Run, dense: Path, watcher: Watcher, meeting: Meeting | None = None
) -> dict[str, Any]:
    """Run or resume a pruning run to its end; returns the result that is also written as result.json.

    Args:
        meeting: of `check_budget`; needed where the configuration asks for a latency, or for the device's own stairs.
    """
    keep_profile(run, meeting)
    pruning = Pruning(config, job, run, dense, watcher, meeting)
    graph, plan, small = pruning.soft()
    small = pruning.finetune(small)
    save_weights(pruning.dense, run.file(DENSE))
    save_weights(small, run.file(PRUNED))
    run.write(PLAN, plan.to_dict())
    run.write(DATA, describe_data(job.data))
    # The test images are looked at here and nowhere else.
    accuracy = {
        "dense": evaluate(pruning.dense, job.data.test, job.device),
        "pruned": evaluate(small, job.data.test, job.device),
        "test_images": len(job.data.test),
    }
    assert pruning.best is not None
    validation = {"soft": pruning.best["val_soft"], "cut": pruning.best["val_cut"], "epoch": pruning.best["epoch"]}
    result = summarise(config, graph, plan, accuracy, meeting, pruning.best.get("met"))
    teacher = job.teacher(pruning.dense)
    result |= {"validation": validation, "inputs": pruning.inputs, "distill": teacher.weight if teacher else 0.0}
    networks = {"dense": pruning.dense, "pruned": small}
    result["answers"] = {name: answers(network, job.example) for name, network in networks.items()}
    if "memory" in pruning.best:
        result["memory"] = pruning.best["memory"]
    if "met" in pruning.best:
        run.write(MEASURED, pruning.best["met"])
    run.write(RESULT, result)
    run.seal([CONFIG, DENSE, PRUNED, PLAN, RESULT, DATA, *([PROFILE] if meeting else [])])
    run.finish("prune")
    run.file(checkpoint.NAME).unlink(missing_ok=True)
    return result
