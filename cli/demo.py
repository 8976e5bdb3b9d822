"""`chipdeploy demo`: the main job from end to end on embedded data."""

from __future__ import annotations

from pathlib import Path

from . import options
from .output import console, note, print_json

# Short, so that the whole job ends in a few minutes on two cores; a run of its own takes the recipe's lengths.
SETTINGS = {
    "model": "resnet20",
    "data": "fashion-mini",
    "kind": "flops",
    "keep": 0.3,
    "soft_epochs": 3,
    "finetune_epochs": 4,
}


def demo(
    runs: options.Runs = Path("runs"),
    seed: options.Seed = None,
    json: options.Json = False,
) -> None:
    """Train, prune to 30 % of the FLOPs, export, verify, time and report, on 10,000 embedded images."""
    from chipdeploy.bench import BENCH, EXPORT, bench_run
    from chipdeploy.deploy import export_run
    from chipdeploy.report.page import first_line
    from chipdeploy.report.tables import render_table, summary_rows
    from chipdeploy.reporting import report_run
    from chipdeploy.run import Run

    from .bench import comparison
    from .prune import prune_run

    result, folder = prune_run(SETTINGS | {"seed": seed}, None, None, runs)
    run = Run.open(folder)
    with run.locked():
        note("exporting and verifying")
        exported = export_run(run)
        note("timing dense against pruned")
        measured = bench_run(run)
        page = report_run(run)
    if json:
        print_json({"run": str(folder), "report": str(page), **result, EXPORT: exported, BENCH: measured})
        return
    screen = console()
    screen.print(first_line([comparison(item) for item in measured]))
    screen.print(render_table(summary_rows(result, exported, measured)))
    screen.print(f"report: {page}")
    screen.print("next: chipdeploy prune --help, for your own model, data and budget")
