"""`chipdeploy report`: one page with the table, the picture and how it was measured."""

from __future__ import annotations

from pathlib import Path

from . import options
from .output import console, print_json, quoted


def report(run: options.RunDir = None, runs: options.Runs = Path("runs"), json: options.Json = False) -> None:
    """Write report.md and its picture from what a run has so far."""
    from chipdeploy.bench import BENCH, EXPORT
    from chipdeploy.reporting import report_run
    from chipdeploy.run import Run

    directory = Run.open(run) if run else Run.latest(runs)
    page = report_run(directory)
    if json:
        print_json({"run": str(directory.path), "report": str(page)})
        return
    console().print(page.read_text(encoding="utf-8").splitlines()[0])
    console().print(f"report: {page}")
    if not directory.read_if(EXPORT):
        console().print(f"next: chipdeploy export --run {quoted(directory.path)}")
    elif not directory.read_if(BENCH):
        console().print(f"next: chipdeploy bench --run {quoted(directory.path)}")
    else:
        console().print("next: chipdeploy prune --help, for another model, data or budget")
