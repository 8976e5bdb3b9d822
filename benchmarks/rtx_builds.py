#!/usr/bin/env python3
"""Networks through the whole path without a GPU: cut, ONNX, precision, a TensorRT-RTX engine for every GPU it knows.

    rtx_builds.py --out results/rtx-builds.json [--only resnet20,timm:ghostnet_100]

Weights are random. Each network is built dense and cut to half of its MACs (where something of it can be cut), in fp32,
fp16 and int8 (calibrated with noise: only the graph matters here), for batches of 1 to 8, one engine for all GPUs. What
is refused is written down with its reason. A network that the output file holds already is not built again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.engines.build import BuildOptions, build_engine, buildable_gpus
from chipdeploy.engines.target import Target
from chipdeploy.engines.turing import TURING
from chipdeploy.errors import ChipdeployError, ExportError
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import convert
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.latency.environment import environment
from chipdeploy.run import write_json
from chipdeploy.training.models import build_model

BUILT_IN = ("resnet20", "resnet56", "resnet20-b", "preresnet164", "wideresnet26-12", "mobilenetv2", "resnet50")
ZOO = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:resnext50_32x4d",
    "torchvision:vgg11_bn",
    "torchvision:densenet121",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:squeezenet1_1",
    "torchvision:mnasnet1_0",
    "torchvision:googlenet",
    "torchvision:convnext_tiny",
    "timm:resnet10t",
    "timm:repvgg_a0",
    "timm:ghostnet_100",
    "timm:convnext_atto",
    "timm:hrnet_w18_small",
    "timm:tf_efficientnet_lite0",
    "timm:mobileone_s0",
    "timm:regnetx_002",
    "timm:vit_tiny_patch16_224",
)
PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 4, 8)
KEEP = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join((*BUILT_IN, *ZOO)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out.is_file():
        store = json.loads(options.out.read_text())
    else:
        store = {"schema": 1, "environment": environment(), "gpus": list(buildable_gpus()), "networks": []}
    for name in options.only.split(","):
        if any(row["model"] == name for row in store["networks"]):
            continue
        store["networks"].append({"model": name} | network(name))
        write_json(options.out, store)
        print(json.dumps(store["networks"][-1]), flush=True)


def network(name: str) -> dict[str, Any]:
    """Dense and cut, in every precision."""
    size = 32 if name in BUILT_IN else 224
    try:
        model = build_model(name, num_classes=10, in_channels=3, image_size=size).eval()
        example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        found: dict[str, Any] = {"image_size": size, "dense": builds(model, example)}
        small, found["macs"] = cut(model, example)
        found["pruned"] = builds(small, example)
    except ChipdeployError as error:
        return {"image_size": size, "refused": str(error)} | (found if "found" in locals() else {})
    return found


def cut(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, float]:
    """The network cut to at most KEEP of the MACs, or to the least that can be kept; all channels count alike."""
    graph = trace(model, example)
    cost = CostModel.of(graph, "macs")
    projector = Projector(graph, cost, 16)
    keep = max(KEEP, projector.smallest * 1.05)
    mask = projector.project(np.ones(graph.channels), min(keep, 0.99))
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
    return small, keep


def builds(model: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Seconds and sizes of the engine of one network in each precision, or why there is none."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        started = time.monotonic()
        export_onnx(model, example, path, max_batch=BATCHES[-1])
        rows["export_s"] = round(time.monotonic() - started, 2)
        images = np.random.default_rng(0).standard_normal((4, *example.shape[1:]), dtype=np.float32)
        for precision in PRECISIONS:
            other, engine = Path(folder) / f"{precision}.onnx", Path(folder) / f"{precision}.engine"
            try:
                convert(path, other, precision, images)
                rows[precision] = engine_of(other, engine, precision)
            except ChipdeployError as error:
                rows[precision] = {"refused": str(error)}
    return rows


def engine_of(path: Path, engine: Path, precision: str) -> dict[str, Any]:
    """The engine for all GPUs; where Turing's compiler lacks an op, the one for all others, and the reason."""
    target, gpus = Target.parse(f"rtx-{precision}"), buildable_gpus()
    without: dict[str, Any] = {}
    try:
        built = build_engine(path, engine, target, BuildOptions(batches=BATCHES, gpus=gpus))
    except ExportError as error:
        if "Turing" not in str(error):
            raise
        without = {"not_for": TURING, "because": str(error)}
        others = tuple(gpu for gpu in gpus if gpu != TURING)
        built = build_engine(path, engine, target, BuildOptions(batches=BATCHES, gpus=others))
    return {"seconds": built.seconds, "bytes": built.bytes, "runtime": built.runtime_version} | without


if __name__ == "__main__":
    main()
