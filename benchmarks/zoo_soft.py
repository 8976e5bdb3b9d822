#!/usr/bin/env python3
"""Twenty steps of soft pruning on networks of different kinds, down to a verified ONNX file under the budget.

    zoo_soft.py --out results/zoo-soft.json [--models timm:vit_tiny_patch16_224,...] [--keep 0.5]

Fresh weights, images of fashion-mini in three channels. What the cut network costs is counted by PyTorch's own FLOP
counter, not by ours. A model that the output file holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chipdeploy.chipnet.soft import Budget, ChipNet
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.latency.environment import environment
from chipdeploy.run import write_json
from chipdeploy.training.data import load_data
from chipdeploy.training.models import build_model

STEPS, BATCH = 20, 8
MODELS = {
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:densenet121": 64,
    "torchvision:regnet_y_400mf": 64,
    "timm:convnext_atto": 64,
    "torchvision:mobilenet_v3_small": 64,
    "timm:ghostnet_050": 64,
    "torchvision:inception_v3": 96,
    "timm:vit_tiny_patch16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:hrnet_w18_small": 64,
    "timm:repvgg_a0": 64,
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text())["models"] if options.out.is_file() else []
    for name in options.models.split(","):
        if any(row["model"] == name for row in rows):
            continue
        torch.manual_seed(0)
        rows.append({"model": name, "image": MODELS.get(name, 64)} | _prune(name, MODELS.get(name, 64), options.keep))
        write_json(options.out, {"steps": STEPS, "environment": environment(), "models": rows})
        print(rows[-1], flush=True)


def _prune(name: str, size: int, keep: float) -> dict[str, Any]:
    """Soft-prune, cut, count and export one network."""
    images, labels = _batch(size)
    model = build_model(name, num_classes=10, in_channels=3, image_size=size)
    dense = _macs(model, images[:1])
    started = time.perf_counter()
    chip = ChipNet(model, images[:2], Budget("flops", keep), steps=STEPS)
    traced = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(STEPS):
        chip.train()
        output = chip(images)
        # Inception's second head comes as a tuple in training mode.
        logits = output if isinstance(output, Tensor) else output[0]
        loss = chip.loss(F.cross_entropy(logits, labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        chip.step()
    small = hard_prune(chip.folded(), chip.graph, chip.plan()).eval()
    with tempfile.TemporaryDirectory() as folder:
        whole = export_onnx(model, images, Path(folder) / "dense.onnx")
        cut = export_onnx(small, images, Path(folder) / "small.onnx")
        error = verify_onnx(small, cut.path, images, batches=(1, 2)).max_relative_error
    return {
        "keep": keep,
        "macs": dense,
        "macs_kept": _macs(small, images[:1]) / dense,
        "share_by_our_count": chip.cost.count(_widths(chip)) / chip.cost.dense,
        "params_kept": _params(small) / _params(model),
        "bytes_kept": cut.bytes / whole.bytes,
        "ops_dense": whole.ops,
        "ops_cut": cut.ops,
        "onnx_error": error,
        "trace_s": traced - started,
        "seconds": time.perf_counter() - started,
    }


def _widths(chip: ChipNet) -> Any:
    from chipdeploy.graph.plan import group_widths

    return group_widths(chip.graph, chip.plan().mask(chip.graph))


def _batch(size: int) -> tuple[Tensor, Tensor]:
    """Images [BATCH, 3, size, size] and their labels."""
    train = load_data("fashion-mini", image_size=size).train
    images, labels = next(iter(train.batches(BATCH)))
    return images.expand(-1, 3, -1, -1).contiguous(), labels


def _macs(model: nn.Module, image: Tensor) -> int:
    """By PyTorch's counter: 2 FLOPs are one MAC."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return int(counter.get_total_flops()) // 2


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
