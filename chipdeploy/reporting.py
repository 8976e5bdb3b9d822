"""From the artifacts of a run to its report."""

from __future__ import annotations

from pathlib import Path

from chipdeploy.bench import BENCH, EXPORT
from chipdeploy.errors import RunError
from chipdeploy.report.page import write_report
from chipdeploy.result import RESULT
from chipdeploy.run import Run, read_json


def report_run(run: Run) -> Path:
    """Write report.md and its picture from the artifacts that are there; returns the report's path.

    Raises:
        RunError: the run is not finished, an artifact was changed or is damaged, or the folder cannot be written.
    """
    result = read_json(run.check(RESULT))
    exported = read_json(run.check(EXPORT, maker="export")) if run.file(EXPORT).is_file() else None
    measured = run.read_if(BENCH)
    if measured is not None and not (isinstance(measured, list) and all(isinstance(item, dict) for item in measured)):
        raise RunError(f"{run.file(BENCH)} is damaged; run 'chipdeploy bench --run {run.path}' again")
    return write_report(run.path, result, exported, measured, run.metrics())
