#!/usr/bin/env python3
"""What fp16 and int8 do to pruned networks in ONNX Runtime on the CPU: test accuracy, and time against fp32.

    precision.py --out results/precision.json RUN [RUN ...]

Each RUN is a finished `chipdeploy prune`. Its networks are exported in fp32, fp16 and int8 (calibrated with its own
training images), run on all test images, and timed against fp32, interleaved. A network that the output file holds is
not measured again.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.config import PruneConfig
from chipdeploy.deploy import ExportOptions, export_run, onnx_name
from chipdeploy.engines.base import Engine, open_engine
from chipdeploy.job import Job, prepare
from chipdeploy.latency.environment import environment
from chipdeploy.latency.measure import compare
from chipdeploy.run import Run, write_json

PRECISIONS = ("fp32", "fp16", "int8")
BATCH, SECONDS = 1, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    empty: dict[str, Any] = {"schema": 1, "environment": environment(), "networks": []}
    store = json.loads(options.out.read_text()) if options.out.is_file() else empty
    for run in map(Run.open, options.runs):
        facts = described(run)
        if any(facts.items() <= row.items() for row in store["networks"]):
            continue
        exported = export_run(run, ExportOptions(precisions=PRECISIONS))
        rows = measured(run, prepare(PruneConfig(**run.config | {"device": "cpu"})))
        agreement = {p: exported["precisions"][p]["verification"]["pruned"] for p in PRECISIONS[1:]}
        store["networks"].append(facts | {"precisions": rows, "agreement": agreement})
        write_json(options.out, store)
        print(json.dumps(store["networks"][-1]), flush=True)


def described(run: Run) -> dict[str, Any]:
    config = run.config
    data = Path(config["data"].partition(":")[2] or config["data"]).name
    return {"model": config["model"], "data": data, "kind": config["kind"], "keep": config["keep"]}


def measured(run: Run, job: Job) -> dict[str, Any]:
    """Of the pruned network in each precision: test accuracy, bytes, and time as a share of fp32's."""
    rows: dict[str, Any] = {}
    shape = job.data.shape
    images = np.random.default_rng(0).standard_normal((BATCH, *shape), dtype=np.float32)
    reference, control = (open_engine("ort-cpu", run.file(onnx_name("pruned"))) for _ in range(2))
    for precision in PRECISIONS:
        path = run.file(onnx_name("pruned", precision))
        engine = open_engine("ort-cpu", path)
        rows[precision] = {"test": accuracy(engine, job), "bytes": path.stat().st_size}
        if precision == "fp32":
            continue
        timed = compare(
            partial(reference.run, images),
            partial(engine.run, images),
            control=partial(control.run, images),
            batch=BATCH,
            seconds=SECONDS,
        )
        rows[precision] |= {
            "time_of_fp32": timed.ratio,
            "interval": list(timed.ratio_interval),
            "control": timed.control_ratio,
            "block_ratios": [round(float(value), 4) for value in timed.ratios],
        }
    return rows


def accuracy(engine: Engine, job: Job) -> float:
    """Top-1 on all test images."""
    right = 0
    for images, labels in job.data.test.batches(50):
        right += int((engine.run(np.ascontiguousarray(images.numpy())).argmax(1) == labels.numpy()).sum())
    return right / len(job.data.test)


if __name__ == "__main__":
    main()
