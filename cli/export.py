"""`chipdeploy export`: ONNX files of the dense and the pruned network, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .output import console, print_json


def export(
    run: options.RunDir = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Largest batch that the files are made for.")] = 64,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Export the dense and the pruned network of a run to ONNX and verify them on real images."""
    from chipdeploy.deploy import export_run
    from chipdeploy.run import Run

    directory = Run.open(run) if run else Run.latest(runs)
    with directory.locked():
        facts = export_run(directory, max_batch=max_batch)
    if json:
        print_json({"run": str(directory.path), **facts})
        return
    print_export(facts, directory.path)
    console().print(f"next: chipdeploy bench --run {directory.path}")


def print_export(facts: dict[str, Any], folder: Path) -> None:
    """One line a file."""
    screen = console()
    for name in ("dense", "pruned"):
        checked = facts["verification"][name]
        screen.print(
            f"{folder / facts[name]['file']}: {facts[name]['bytes'] / 1e6:.2f} MB, {facts[name]['ops']} ops, "
            f"equals PyTorch to {checked['max_relative_error']:.1e} (limit {checked['tolerance']:.0e}), "
            f"top-1 agreement {checked['top1_agreement']:.1%} on {checked['images']} images"
        )
