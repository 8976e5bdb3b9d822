"""`chipdeploy prune`: a smaller network under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .output import console, note, print_json, quoted

Share = Annotated[str | None, typer.Option(metavar="SHARE")]


def prune(
    model: options.Model = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Share of the FLOPs that stays: 0.3 or 30%.")] = None,
    params: Annotated[str | None, typer.Option("--params", help="Share of the parameters that stays.")] = None,
    channels: Annotated[str | None, typer.Option("--channels", help="Share of the channels that stays.")] = None,
    volume: Annotated[str | None, typer.Option("--volume", help="Share of the activation volume that stays.")] = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Dense weights, .safetensors or .pth; without it they are trained.")
    ] = None,
    align: Annotated[
        int | None,
        typer.Option("--align", help="Widths in multiples of this, where the group allows; 1: free. Default: 16."),
    ] = None,
    min_width: Annotated[
        int | None, typer.Option("--min-width", help="Channels of which no layer that stays has fewer. Default: 1.")
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Drop whole branches only: at batch 1 on a GPU only that saves time.")
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", metavar="PATTERN", help="Layers that keep their outputs, e.g. 'layer4.*'; repeatable."
        ),
    ] = None,
    recipe: options.RecipeName = None,
    train_epochs: options.TrainEpochs = None,
    soft_epochs: Annotated[int | None, typer.Option("--soft-epochs", help="Epochs with soft gates.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option("--finetune-epochs", help="Epochs after the cut.")] = None,
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
    """Prune a network to a budget: exactly one of --flops, --params, --channels, --volume (what stays)."""
    flags: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_root": None if data_root is None else str(data_root),
        "weights": None if weights is None else str(weights),
        "align": align,
        "min_width": min_width,
        "blocks": blocks or None,
        "exclude": exclude or None,
        "recipe": recipe,
        "train_epochs": train_epochs,
        "soft_epochs": soft_epochs,
        "finetune_epochs": finetune_epochs,
        "batch": batch,
        "lr": lr,
        "image_size": image_size,
        "mean": options.numbers(mean, "--mean"),
        "std": options.numbers(std, "--std"),
        "seed": seed,
        "device": device,
    }
    flags |= budget_flags({"flops": flops, "params": params, "channels": channels, "volume": volume})
    result, folder = prune_run(flags, config, run, runs)
    if json:
        print_json({"run": str(folder), **result})
    else:
        print_result(result, folder)


def budget_flags(shares: dict[str, str | None]) -> dict[str, Any]:
    """The one budget that was given, as settings. Raises UsageError for two, or one out of range."""
    from chipdeploy.errors import UsageError

    given = {kind: text for kind, text in shares.items() if text is not None}
    if len(given) > 1:
        raise UsageError(f"one budget at a time, got {' and '.join('--' + kind for kind in given)}; keep one of them")
    return {
        key: value
        for kind, text in given.items()
        for key, value in (("kind", kind), ("keep", options.share(text, f"--{kind}")))
    }


def prune_run(flags: dict[str, Any], config: Path | None, run: Path | None, runs: Path) -> tuple[dict[str, Any], Path]:
    """Make or resume a run; returns its result and folder."""
    from chipdeploy.config import PruneConfig, build, settings
    from chipdeploy.errors import UsageError

    values = settings(PruneConfig, flags, config)
    if "keep" not in values:
        raise UsageError("no budget: give one of --flops, --params, --channels, --volume, e.g. --flops 0.3")
    checked = build(PruneConfig, values)

    from chipdeploy.pipeline import RESULT, check_budget, prepare, train_dense
    from chipdeploy.pipeline import prune as prune_network
    from chipdeploy.run import Run

    from .progress import watching

    job = prepare(checked)
    note(check_budget(checked, job))
    directory = Run.create(runs, "prune", checked.model_dump(), path=run)
    with directory.locked():
        if directory.finished:
            note(f"{directory.path} is finished already: nothing to do")
            return directory.read(RESULT), directory.path
        note(f"run: {directory.path}")
        with watching() as watcher:
            dense = Path(checked.weights) if checked.weights else train_dense(job, runs / "dense", watcher)
            return prune_network(checked, job, directory, dense, watcher), directory.path


def print_result(result: dict[str, Any], folder: Path) -> None:
    """The table of a run, and what to do next."""
    from chipdeploy.report.tables import render_table, summary_rows

    screen = console()
    screen.print(render_table(summary_rows(result, None, None)))
    screen.print(f"run: {folder}")
    screen.print(f"next: chipdeploy export --run {quoted(folder)}")
