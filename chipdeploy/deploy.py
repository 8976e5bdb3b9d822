"""From a finished run to files and figures: ONNX, verified; dense against pruned, measured; a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chipdeploy.config import PruneConfig
from chipdeploy.engines.base import open_engine
from chipdeploy.errors import RunError
from chipdeploy.export.onnx import check_digest, export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.latency.measure import compare
from chipdeploy.pipeline import DATA, PLAN, RESULT, load, prepare
from chipdeploy.report.page import write_report
from chipdeploy.run import CONFIG, Run, make_folder, read_json

NETWORKS = ("dense", "pruned")
EXPORT, BENCH = "export.json", "bench.json"
VERIFY_IMAGES = 64
TARGET = "ort-cpu"


def export_run(run: Run, *, max_batch: int = 64) -> dict[str, Any]:
    """Write dense.onnx and pruned.onnx and check both against PyTorch on real images at batch 1 and 8.

    Raises:
        RunError: the run is not finished, or a file of it was changed.
        ExportError: the network cannot be exported.
        VerificationError: a file disagrees with its network.
    """
    described = read_json(run.check(DATA))
    images = _real_images(run, described["digest"])
    facts: dict[str, Any] = {"schema": 1, "verification": {}}
    # Made and checked aside: a file of a final name was verified, and a failure leaves an older export as it was.
    aside = run.file(".export")
    make_folder(aside)
    try:
        for name in NETWORKS:
            model = load(run.path, dense=name == "dense")
            path = aside / f"{name}.onnx"
            file = export_onnx(model, images[:2], path, max_batch=max_batch, metadata=_metadata(run, described, name))
            facts[name] = file.to_dict()
            facts["verification"][name] = verify_onnx(model, path, images).to_dict()
        for path in aside.iterdir():
            path.replace(run.file(path.name))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    run.file(BENCH).unlink(missing_ok=True)  # it timed files that are gone
    run.write(EXPORT, facts)
    run.seal([EXPORT])
    return facts


def _real_images(run: Run, digest: str) -> torch.Tensor:
    """Validation images of the run's own data, [64, C, H, W]. The test images are not needed here."""
    # Where the images come from matters here, not what the run trained on: a GPU run may be exported on a CPU machine.
    data = prepare(PruneConfig(**read_json(run.check(CONFIG)) | {"device": "cpu"})).data
    if data.digest != digest:
        raise RunError(f"the data of {run.path} changed since it was made; put them back, or make the run again")
    images, _ = next(data.val.batches(VERIFY_IMAGES))
    return images


def _metadata(run: Run, data: dict[str, Any], name: str) -> dict[str, str]:
    plan = read_json(run.check(PLAN))
    digest = read_json(run.check(RESULT))["plan_digest"] if plan else ""
    return {
        "chipdeploy.network": name,
        "chipdeploy.model": Path(run.config["model"]).name,
        "chipdeploy.plan_sha256": digest if name == "pruned" else "",
        "chipdeploy.classes": "\n".join(data["classes"]),
        "chipdeploy.mean": ",".join(f"{value:.8g}" for value in data["mean"]),
        "chipdeploy.std": ",".join(f"{value:.8g}" for value in data["std"]),
    }


def bench_run(
    run: Run,
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    seconds: float = 5.0,
    on_block: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time dense.onnx against pruned.onnx at every batch size; the raw times are kept in bench.json.

    Raises:
        RunError, ExportError: nothing was exported, or a file was edited since.
    """
    exported = read_json(run.check(EXPORT)) if run.file(EXPORT).is_file() else None
    if exported is None:
        raise RunError(f"{run.path} has no ONNX files yet; run 'chipdeploy export --run {run.path}' first")
    for name in NETWORKS:
        check_digest(run.file(f"{name}.onnx"), exported[name]["sha256"])
    shape = read_json(run.check(DATA))["shape"]
    # The control is a second session of the dense file: where a session lies in memory moves its time a little too.
    files = [run.file(f"{name}.onnx") for name in (*NETWORKS, "dense")]
    dense, pruned, control = (open_engine(TARGET, file, threads=threads) for file in files)
    results = []
    for batch in batches:
        images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
        comparison = compare(
            partial(dense.run, images),
            partial(pruned.run, images),
            control=partial(control.run, images),
            batch=batch,
            seconds=seconds,
            on_block=on_block,
        )
        facts = {**comparison.environment, "engine": dense.describe()}
        results.append(replace(comparison, environment=facts).to_dict())
    run.write(BENCH, results)
    return results


def report_run(run: Run) -> Path:
    """Write report.md and its picture from the artifacts that are there; returns the report's path.

    Raises:
        RunError: the run is not finished, an artifact was changed or is damaged, or the folder cannot be written.
    """
    result = read_json(run.check(RESULT))
    exported = read_json(run.check(EXPORT)) if run.file(EXPORT).is_file() else None
    measured = run.read_if(BENCH)
    if measured is not None and not (isinstance(measured, list) and all(isinstance(item, dict) for item in measured)):
        raise RunError(f"{run.file(BENCH)} is damaged; run 'chipdeploy bench --run {run.path}' again")
    return write_report(run.path, result, exported, measured, run.metrics())
