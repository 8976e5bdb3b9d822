"""From an exported run to a folder that the device takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chipdeploy.bench import EXPORT
from chipdeploy.errors import UsageError
from chipdeploy.export.bundle import check_request, write_bundle
from chipdeploy.result import DATA, RESULT
from chipdeploy.run import Run, read_json


def bundle_run(run: Run, folder: Path, *, preprocess: bool = False, top_k: int | None = None) -> dict[str, Any]:
    """Pack the pruned network of an exported run, in the precision that was asked for last, with its engines.

    Returns the bundle's manifest.

    Raises:
        RunError: nothing was exported yet. ExportError: a file was edited since, or the folder cannot be used.
        UsageError: `top_k` without `preprocess`, or out of range.
    """
    exported = read_json(run.check(EXPORT, maker="export"))
    precision = exported["asked"]
    facts = exported if precision == "fp32" else exported["precisions"][precision]
    engines = [run.file(entry["pruned"]["file"]) for entry in exported["engines"].values()]
    return write_bundle(
        folder,
        run.file(facts["pruned"]["file"]),
        read_json(run.check(DATA)),
        engines=engines,
        preprocess=preprocess,
        top_k=top_k,
        max_batch=exported["max_batch"],
        sha256=facts["pruned"]["sha256"],
        facts={"precision": precision, "model": Path(run.config["model"]).name, **_result_facts(run)},
    )


def check_bundle(run: Run, folder: Path, *, preprocess: bool = False, top_k: int | None = None) -> None:
    """Raise what `bundle_run` would raise for any network: before an export, not after it.

    Raises:
        UsageError, ExportError: as `bundle_run`.
    """
    place = folder.resolve()
    if place.is_relative_to(run.path.resolve()):
        raise UsageError(f"{folder} lies in the run {run.path}; choose a folder of its own for the bundle")
    check_request(folder, len(read_json(run.check(DATA))["classes"]), preprocess=preprocess, top_k=top_k)


def _result_facts(run: Run) -> dict[str, Any]:
    result = read_json(run.check(RESULT))
    return {"budget": result["budget"], "accuracy": result["accuracy"], "plan_sha256": result["plan_digest"]}
