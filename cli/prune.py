"""`chipdeploy prune`: a smaller network under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import console, note, print_outcome, quoted

if TYPE_CHECKING:
    from chipdeploy.config import PruneConfig
    from chipdeploy.errors import TargetError

Share = Annotated[str | None, typer.Option(metavar="SHARE")]


def prune(
    model: options.Model = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Share of the FLOPs that stays: 0.3 or 30%.")] = None,
    params: Annotated[str | None, typer.Option("--params", help="Share of the parameters that stays.")] = None,
    channels: Annotated[str | None, typer.Option("--channels", help="Share of the channels that stays.")] = None,
    volume: Annotated[str | None, typer.Option("--volume", help="Share of the activation volume that stays.")] = None,
    latency: options.Latency = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    on: options.On = None,
    bench_batch: options.BenchBatch = None,
    threads: options.Threads = None,
    via: Annotated[
        str | None,
        typer.Option("--via", help="What the soft phase keeps to for a latency: latency (default), or flops."),
    ] = None,
    profile: options.Profile = None,
    minutes: options.Minutes = None,
    max_size_mb: Annotated[
        float | None,
        typer.Option(
            "--max-size-mb",
            help="Memory beside the budget: weights and the peak of the activations, in 10^6 bytes, at --bench-batch.",
        ),
    ] = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Dense weights, .safetensors or .pth; without it they are trained.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            "--align",
            metavar="CHANNELS",
            help="Widths in multiples of this; 1: free; auto: the device's stairs. Default: 16, auto for a latency.",
        ),
    ] = None,
    min_width: Annotated[
        int | None, typer.Option("--min-width", help="Channels of which no layer that stays has fewer. Default: 1.")
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Drop whole branches only: at batch 1 on a GPU only that saves time.")
    ] = False,
    exclude: options.Exclude = None,
    recipe: options.RecipeName = None,
    train_epochs: options.TrainEpochs = None,
    soft_epochs: Annotated[int | None, typer.Option("--soft-epochs", help="Epochs with soft gates.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option("--finetune-epochs", help="Epochs after the cut.")] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            "--distill",
            help="Weight of the dense network's answers in the finetune, 0 to 1. Default: 0.7 for weights that are "
            "given or were trained for 30 epochs or more, 0 for others.",
        ),
    ] = None,
    batch: options.Batch = None,
    lr: options.LearningRate = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.Config = None,
    run: options.NewRun = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Prune a network to a budget: one of --flops, --params, --channels, --volume (what stays), or a latency.

    A latency (--latency, --latency-ms or --fps) is met by measuring on the target (--on): profiled, predicted, cut,
    timed, and corrected until the measured time is within 3 % below it.
    """
    flags: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_root": None if data_root is None else str(data_root),
        "weights": None if weights is None else str(weights),
        "on": on,
        "bench_batch": bench_batch,
        "threads": threads,
        "via": via,
        "profile": profile,
        "minutes": minutes,
        "max_size_mb": max_size_mb,
        "align": align,
        "min_width": min_width,
        "blocks": blocks or None,
        "exclude": exclude or None,
        "recipe": recipe,
        "train_epochs": train_epochs,
        "soft_epochs": soft_epochs,
        "finetune_epochs": finetune_epochs,
        "distill": distill,
        "batch": batch,
        "lr": lr,
        "image_size": image_size,
        "mean": options.numbers(mean, "--mean"),
        "std": options.numbers(std, "--std"),
        "seed": seed,
        "device": device,
    }
    goals = {"latency": latency, "latency_ms": latency_ms, "fps": fps}
    flags |= budget_flags({"flops": flops, "params": params, "channels": channels, "volume": volume}, goals)
    result, folder = prune_run(flags, config, run, runs)
    error = missed(result)
    if json:
        print_outcome({"run": str(folder), **result}, error)
        return
    print_result(result, folder)
    if error:
        raise error


def budget_flags(shares: dict[str, str | None], goals: dict[str, Any] | None = None) -> dict[str, Any]:
    """The one budget or latency that was given, as settings. Raises UsageError for two, or one out of range."""
    from chipdeploy.errors import UsageError

    given = {kind: text for kind, text in shares.items() if text is not None}
    timed = {kind: value for kind, value in (goals or {}).items() if value is not None}
    if len(given) + len(timed) > 1:
        names = " and ".join("--" + kind.replace("_", "-") for kind in (*given, *timed))
        raise UsageError(f"one budget at a time, got {names}; keep one of them")
    if timed:
        kind, value = next(iter(timed.items()))
        return {kind: options.share(value, "--latency") if kind == "latency" else value}
    return {
        key: value
        for kind, text in given.items()
        for key, value in (("kind", kind), ("keep", options.share(text, f"--{kind}")))
    }


def prune_run(flags: dict[str, Any], config: Path | None, run: Path | None, runs: Path) -> tuple[dict[str, Any], Path]:
    """Make or resume a run; returns its result and folder."""
    from chipdeploy.config import LATENCY_GOALS, PruneConfig, build, settings
    from chipdeploy.errors import UsageError

    values = settings(PruneConfig, flags, config)
    if not any(name in values for name in ("keep", *LATENCY_GOALS)):
        raise UsageError("no budget: give one of --flops, --params, --channels, --volume, --latency, e.g. --flops 0.3")
    checked = build(PruneConfig, values)
    note_idle(flags, checked)

    from chipdeploy.dense import train_dense
    from chipdeploy.job import prepare
    from chipdeploy.latency.store import FOLDER
    from chipdeploy.pipeline import check_budget
    from chipdeploy.pipeline import prune as prune_network
    from chipdeploy.result import RESULT
    from chipdeploy.run import Run, read_json

    from .progress import rounds, watching

    if run:  # said before anything is traced, proved or measured
        Run(run).begun("prune", checked.model_dump())
    job = prepare(checked)
    with rounds() as on_round:
        text, meeting = check_budget(checked, job, profiles=runs / FOLDER, run=run, on_round=on_round, tell=note)
    note(text)
    if meeting and meeting.foreign:
        note(f"note: the profile was {meeting.foreign}; what is predicted is corrected by what is measured here")
    directory = Run.create(runs, "prune", checked.model_dump(), path=run)
    with directory.locked():
        if directory.finished:
            result = read_json(directory.check(RESULT))
            directory.check_inputs(result["inputs"], job.inputs | job.given_weights)
            note(f"{directory.path} is finished already: nothing to do")
            return result, directory.path
        note(f"run: {directory.path}")
        with watching() as watcher:
            dense = Path(checked.weights) if checked.weights else train_dense(job, runs / "dense", watcher, note)
            return prune_network(checked, job, directory, dense, watcher, meeting), directory.path


def note_idle(flags: dict[str, Any], config: PruneConfig) -> None:
    """Say which flags were given that change nothing in this run."""
    timed = config.kind == "latency" or config.align == "auto"
    idle = {
        "there is no latency goal": () if timed else ("threads", "via", "profile", "minutes"),
        "there is no latency goal and no --max-size-mb": () if timed or config.max_size_mb else ("on", "bench_batch"),
        "the weights are given": ("train_epochs",) if config.weights else (),
    }
    for reason, names in idle.items():
        if given := ["--" + name.replace("_", "-") for name in names if flags.get(name) is not None]:
            note(f"note: {reason}, so nothing comes of {', '.join(given)}")


def missed(result: dict[str, Any]) -> TargetError | None:
    """The error where the measured time is over the goal; a note where it is far below."""
    from chipdeploy.errors import TargetError
    from chipdeploy.meeting import drift

    facts = result.get("latency")
    if not facts:
        return None
    if changed := drift(facts):
        note(f"note: {changed}")
    if facts.get("noise"):
        note(f"note: the last measurement is noisy: {facts['noise']}; when it is quiet, use 'chipdeploy bench'")
    if facts.get("goal_ms"):
        wanted, got = (f"{facts[key]:.3g} ms" for key in ("goal_ms", "pruned_ms"))
    else:
        wanted, got = f"{facts['goal']:.3g} of the dense time", f"{facts['ratio']:.3g}"
    if not facts["met"]:
        return TargetError(
            f"the latency was missed: {wanted} was asked for, {got} was measured; the nearest plan was kept, "
            "try a finer --align, or a smaller network"
        )
    if not facts["near"]:
        note(f"note: {wanted} was asked for, {got} was measured; no nearer plan held when it was measured again")
    return None


def print_result(result: dict[str, Any], folder: Path) -> None:
    """The table of a run, and what to do next."""
    from chipdeploy.report.tables import render_table, summary_rows

    screen = console()
    screen.print(render_table(summary_rows(result, None, None)))
    if facts := result.get("latency"):
        low, high = facts["interval"]
        goal = f"{facts['goal_ms']:.3g} ms" if facts.get("goal_ms") else f"{facts['goal']:.3g}"
        screen.print(
            f"measured: {facts['ratio']:.3f} of the dense time (95 % {low:.3f}-{high:.3f}; goal {goal}), "
            f"{facts['pruned_ms']:.3g} of {facts['dense_ms']:.3g} ms, {facts['target']}, batch {facts['batch']}"
        )
    screen.print(f"run: {folder}")
    screen.print(f"next: chipdeploy export --run {quoted(folder)}")
