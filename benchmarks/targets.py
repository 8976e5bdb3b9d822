#!/usr/bin/env python3
"""Dense against pruned on every target at hand: torch eager, CUDA graphs and inductor, ONNX Runtime, TensorRT.

    targets.py --out results/targets-cpu.json                                  what a machine without a GPU can run
    targets.py --out results/targets-h200.json --targets torch-cuda-fp32,torch-cuda-fp16,torch-cuda-bf16,\\
        torch-cuda-fp16-compile,ort-cuda,rtx-fp16,trt-fp16 --batches 1,32,256

Weights are random: a latency does not depend on them. Networks are cut to 0.5 and 0.3 of the MACs, and to 0.5 of the
dense time on the target itself, found by measuring. A cell that the output file holds is not run again; a target that
this machine lacks is written down with its reason.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.engines.base import Engine, open_engine
from chipdeploy.engines.build import BuildOptions, build_engine
from chipdeploy.engines.target import Target
from chipdeploy.errors import ChipdeployError, VerificationError
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import convert
from chipdeploy.export.verify import TOLERANCES
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.latency.environment import environment
from chipdeploy.latency.gpu import GpuWatch
from chipdeploy.latency.measure import Comparison, compare
from chipdeploy.run import write_json
from chipdeploy.training.models import build_model

MODELS = {"resnet56": 32, "mobilenetv2": 32, "torchvision:resnet50": 224}  # and the size of their images
CPU_TARGETS = "ort-cpu,torch-cpu"
KEEPS = (0.5, 0.3)
CHECKED = 8  # images of a batch whose logits are compared with torch's
LATENCY, TOLERANCE, TRIES = 0.5, 0.03, 6


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    store = json.loads(options.out.read_text()) if options.out.is_file() else _header()
    for name in options.models.split(","):
        model = build_model(name, num_classes=10, in_channels=3, image_size=MODELS[name]).eval()
        example = torch.randn(2, 3, MODELS[name], MODELS[name], generator=torch.Generator().manual_seed(0))
        subject = Subject(name, model, example, trace(model, example))
        for target in map(Target.parse, options.targets.split(",")):
            for batch in map(int, options.batches.split(",")):
                _cells(store, subject, target, batch, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=CPU_TARGETS)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    return parser.parse_args()


def _header() -> dict[str, Any]:
    watch = GpuWatch.open()
    facts = environment()
    if watch:
        gpu = watch.facts()
        facts |= {"gpu": gpu, "machine": f"{gpu['name']}, {facts['cpu']}"}
    return {"schema": 1, "environment": facts, "targets": []}


class Subject:
    """A dense network and the cuts of it."""

    def __init__(self, name: str, model: nn.Module, example: torch.Tensor, graph: ChannelGraph) -> None:
        self.name, self.model, self.example, self.graph = name, model, example, graph
        self._cost = CostModel.of(graph, "macs")
        self._projector = Projector(graph, self._cost, 16)

    def cut(self, keep: float) -> tuple[nn.Module, float]:
        """The network whose plan keeps at most `keep` of the MACs, all channels of equal value; and what it keeps."""
        mask = self._projector.project(np.ones(self.graph.channels), keep)
        small = hard_prune(self.model, self.graph, PrunePlan.from_mask(self.graph, mask))
        return small.eval(), self._cost.count(group_widths(self.graph, mask)) / self._cost.dense

    @property
    def smallest(self) -> float:
        return self._projector.smallest


def _cells(store: dict[str, Any], subject: Subject, target: Target, batch: int, options: argparse.Namespace) -> None:
    """All cuts of one network on one target at one batch size."""
    for wanted in (*[f"flops {keep:g}" for keep in KEEPS], f"latency {LATENCY:g}"):
        key = {"model": subject.name, "target": target.name, "batch": batch, "wanted": wanted}
        if any(key.items() <= cell.items() for cell in store["targets"]):
            continue
        try:
            facts = _cell(subject, target, batch, wanted, options.seconds, options.threads)
        except ChipdeployError as error:
            facts = {"refused": str(error)}
        store["targets"].append(key | facts)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, store)
        print(key, facts.get("ratio", facts.get("refused")), flush=True)


def _cell(subject: Subject, target: Target, batch: int, wanted: str, seconds: float, threads: int) -> dict[str, Any]:
    kind, value = wanted.split()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(subject, target, batch, threads, Path(folder))
        if kind == "flops":
            small, kept = subject.cut(float(value))
            return {"macs": kept} | bench.measure(small, seconds)
        return _by_latency(subject, bench, float(value), seconds)


def _by_latency(subject: Subject, bench: Bench, goal: float, seconds: float) -> dict[str, Any]:
    """Bisect the share of the MACs until the measured time is at most `goal` of the dense one, and 97 % of that."""
    low, high = subject.smallest, 1.0
    keep, best = goal, dict[str, Any]()
    for _ in range(TRIES):
        small, kept = subject.cut(max(low, min(keep, 0.99)))
        facts = {"macs": kept} | bench.measure(small, seconds)
        if facts["ratio"] <= goal:
            low = keep
            if not best or facts["ratio"] > best["ratio"]:
                best = facts
            if facts["ratio"] >= goal * (1 - TOLERANCE):
                break
        else:
            high = keep
        keep = (low + high) / 2
    return (best or facts) | {"goal": goal, "met": bool(best)}


class Bench:
    """Engines of one dense network on one target, and whatever is compared with it."""

    def __init__(self, subject: Subject, target: Target, batch: int, threads: int, folder: Path) -> None:
        self._subject, self._target, self._batch, self._folder = subject, target, batch, folder
        self._options = {} if target.on_gpu else {"threads": threads}
        self._images = np.random.default_rng(0).standard_normal((batch, *subject.example.shape[1:]), dtype=np.float32)
        self._dense, self._control = (self._engine(subject.model, name) for name in ("dense", "control"))

    def measure(self, small: nn.Module, seconds: float) -> dict[str, Any]:
        """From host to host, and on the device where it has a clock; raw ratios of the blocks are kept."""
        engines = self._dense, self._engine(small, "small"), self._control
        watch = GpuWatch.open() if self._target.on_gpu else None
        calls: dict[str, Any] = {"end to end": [partial(engine.run, self._images) for engine in engines]}
        watches = [engine.stopwatch(self._images) for engine in engines]
        if all(watches):
            calls["device"] = watches
        found: dict[str, Any] = {"engine": self._dense.describe(), "error": self._error(small, engines[1])}
        for clock, (dense, pruned, control) in calls.items():
            measured = compare(
                dense,
                pruned,
                control=control,
                batch=self._batch,
                seconds=seconds,
                timed=clock == "device",
                throttled=watch.throttled if watch else None,
            )
            found[clock] = _facts(measured)
        # The device's own time is what pruning changes; host to host is what a caller sees.
        return found | {"ratio": found["device" if "device" in found else "end to end"]["ratio"]}

    def _error(self, small: nn.Module, engine: Engine) -> float:
        """Largest difference of a logit from torch in fp32 on the CPU, over the largest logit."""
        with torch.inference_mode():
            expected = small.cpu()(torch.from_numpy(self._images[:CHECKED])).numpy()
        got = engine.run(self._images)[:CHECKED]
        error = float(np.abs(expected - got).max() / np.abs(expected).max())
        if not error <= max(1e-3, TOLERANCES[self._target.precision]):
            raise VerificationError(
                f"{self._target.name} is off by {error:.2g} of the largest logit; look at the engine"
            )
        return error

    def _engine(self, model: nn.Module, name: str) -> Engine:
        if self._target.runtime == "torch":
            return open_engine(self._target, model, **self._options)
        path = self._folder / f"{name}.onnx"
        export_onnx(model, self._subject.example, path, max_batch=max(2, self._batch))
        if self._target.precision != "fp32":
            other = self._folder / f"{name}-{self._target.precision}.onnx"
            convert(path, other, self._target.precision, self._images[:64])
            path = other
        if self._target.builds:
            engine = self._folder / f"{name}.engine"
            batches = (1, self._batch, self._batch)
            build_engine(path, engine, self._target, BuildOptions(batches=batches))
            path = engine
        return open_engine(self._target, path, **self._options)


def _facts(measured: Comparison) -> dict[str, Any]:
    return {
        "ratio": measured.ratio,
        "interval": list(measured.ratio_interval),
        "dense_ms": measured.dense_ms,
        "pruned_ms": measured.pruned_ms,
        "control": measured.control_ratio,
        "noise": measured.noise,
        "block_ratios": [round(float(value), 4) for value in measured.ratios],
        "throttled_blocks": measured.environment["throttled_blocks"],
    }


if __name__ == "__main__":
    main()
