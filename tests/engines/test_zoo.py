"""Networks through the whole path without a GPU: cut, ONNX, precision, RTX engine for SM75 to SM120, batches 1 to 4."""

import numpy as np
import pytest
import torch

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.engines.build import BuildOptions, build_engine
from chipdeploy.engines.target import Target
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import convert
from chipdeploy.files import digest
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

PRECISIONS = ("fp32", "fp16", "int8")
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120")
BUILT_IN = (
    "resnet20",
    "resnet20-b",
    "mobilenetv2",
    "resnet18",
    "resnet56",
    "resnet50",
    "preresnet164",
    "wideresnet26-12",
)
# A dozen of the thirty that benchmarks/rtx_builds.py builds.
ZOO = (
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "timm:repvgg_a0",
    "timm:ghostnet_050",
    "timm:convnext_atto",
    "timm:mobileone_s0",
    "timm:regnetx_002",
    "timm:lcnet_050",
)


def made(name, size):
    model = build_model(name, num_classes=10, in_channels=3, image_size=size).eval()
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def cut(model, example):
    """At most half of the MACs, or as few as it can do with."""
    graph = trace(model, example)
    cost = CostModel.of(graph, "macs")
    projector = Projector(graph, cost, 16)
    mask = projector.project(np.ones(graph.channels), min(0.99, max(0.5, 1.05 * projector.smallest)))
    return hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()


def builds(model, example, folder):
    """Bytes of the engine in each precision."""
    path = folder / "net.onnx"
    export_onnx(model, example, path, max_batch=4)
    images = np.random.default_rng(0).standard_normal((2, *example.shape[1:]), dtype=np.float32)
    sizes = {}
    for precision in PRECISIONS:
        typed = folder / f"{precision}.onnx"
        convert(path, typed, precision, images)
        options = BuildOptions(batches=(1, 2, 4), gpus=GPUS)
        manifest = build_engine(typed, folder / "x.engine", Target.parse(f"rtx-{precision}"), options)
        assert manifest.onnx_sha256 == digest(typed)
        sizes[precision] = manifest.bytes
    return sizes


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_networks_dense_and_cut(name, tmp_path):
    model, example = made(name, 32)
    dense, small = builds(model, example, tmp_path), builds(cut(model, example), example, tmp_path)
    assert all(small[precision] < dense[precision] for precision in PRECISIONS)
    assert dense["fp16"] < dense["fp32"]


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, tmp_path):
    model, example = made(name, 64)
    assert min(builds(cut(model, example), example, tmp_path).values()) > 0
