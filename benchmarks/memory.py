#!/usr/bin/env python3
"""What `--max-size-mb` plans beside what ONNX Runtime takes: memory.py [--out results/memory.json]

The plan is weights and the peak of the activations in the ONNX file. Beside it stands by how much the peak of a fresh
process's resident memory grows from before the session is made until five inferences have run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from chipdeploy.export.memory import footprint
from chipdeploy.export.onnx import export_onnx
from chipdeploy.latency.environment import environment
from chipdeploy.run import write_json
from chipdeploy.training.models import build_model

NETWORKS = {"resnet20": 32, "mobilenetv2": 32, "torchvision:resnet18": 96, "torchvision:resnet50": 128}
BATCHES = (1, 64)
RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "memory.json")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # FILE,BATCH,SIZE: in a process of its own
    options = parser.parse_args()
    if options.run:
        print(_grown(*options.run.split(",")))
        return
    rows = []
    for name, size in NETWORKS.items():
        model = build_model(name, num_classes=10, in_channels=3, image_size=size).eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            export_onnx(model, torch.randn(2, 3, size, size), path, max_batch=max(BATCHES))
            for batch in BATCHES:
                planned = footprint(path, batch)
                done = subprocess.run(
                    [sys.executable, __file__, "--run", f"{path},{batch},{size}"],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                row = {"network": name, "image": size, "batch": batch, "grown_bytes": json.loads(done.stdout)}
                rows.append(row | {"weight_bytes": planned.weights, "activation_bytes": planned.activations})
                print(rows[-1], flush=True)
    write_json(options.out, {"schema": 1, "environment": environment(), "rows": rows})


def _grown(file: str, batch: str, size: str) -> int:
    """Bytes by which the peak of the resident memory grows."""
    import numpy as np
    import onnxruntime as ort

    images = np.random.default_rng(0).standard_normal((int(batch), 3, int(size), int(size)), dtype=np.float32)
    before = _peak()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {session.get_inputs()[0].name: images})
    return _peak() - before


def _peak() -> int:
    """The peak of this process's resident memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
