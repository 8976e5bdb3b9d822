"""Networks through the whole path without a GPU: cut, ONNX, precision, RTX engine for SM75 to SM120, batches 1 to 4."""

from functools import partial

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
from chipdeploy.training.models.preresnet import PreResNet
from chipdeploy.training.models.wideresnet import WideResNet

NAMES = ("resnet20", "resnet20-b", "mobilenetv2", "resnet18", "resnet50")
PRECISIONS = ("fp32", "fp16", "int8")
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120")
# Every kind of block that is built in; the deepest and the widest with few of them, since each is built thirty times.
BUILT_IN = {
    **{name: partial(build_model, name, num_classes=10, in_channels=3, image_size=32) for name in NAMES},
    "preresnet": partial(PreResNet, 2, 10, 3),
    "wideresnet": partial(WideResNet, 1, 4, 10, 3),
}
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


def with_images(model, size):
    return model.eval(), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


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
    model, example = with_images(BUILT_IN[name](), 32)
    dense, small = builds(model, example, tmp_path), builds(cut(model, example), example, tmp_path)
    assert all(small[precision] < dense[precision] for precision in PRECISIONS)
    assert dense["fp16"] < dense["fp32"]


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, tmp_path):
    model, example = with_images(build_model(name, num_classes=10, in_channels=3, image_size=64), 64)
    assert builds(cut(model, example), example, tmp_path).keys() == set(PRECISIONS)
