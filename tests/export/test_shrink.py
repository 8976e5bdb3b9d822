"""A cut made in the dense ONNX file gives what the cut network gives, in a real ONNX Runtime session."""

from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision.models import mobilenetv3, regnet, resnet

from chipdeploy.engines.base import open_engine
from chipdeploy.errors import ExportError
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.shrink import Shrinker
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.proof import random_mask
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model
from chipdeploy.training.models.preresnet import PreResNet

built = partial(build_model, num_classes=10, in_channels=3)


def squeezing():
    """Three blocks of MobileNetV3: squeeze-excite, hard swish, depthwise convolutions."""
    block = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [block(16, 3, 16, 16, True, "RE", stride=2), block(16, 5, 40, 24, True, "HS", stride=1)]
    return mobilenetv3.MobileNetV3([*blocks, block(24, 5, 64, 24, True, "HS", stride=1)], 32, num_classes=10)


def grouped():
    """Two stages of RegNetY: convolutions of groups of 8 channels, squeeze-excite."""
    params = regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    return regnet.RegNet(params, num_classes=10)


def resnext():
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=4)


# name: (how it is built, size of the images)
NETWORKS = {
    "resnet20": (partial(built, "resnet20", image_size=16), 16),  # shortcuts padded with zeros
    "resnet20-b": (partial(built, "resnet20-b", image_size=16), 16),
    "mobilenetv2": (partial(built, "mobilenetv2", image_size=16), 16),
    "preresnet": (partial(PreResNet, 1, 10, 3), 16),
    "squeezenet": (partial(built, "torchvision:squeezenet1_1", image_size=64), 64),  # concatenations
    "mobilenetv3": (squeezing, 32),
    "regnet": (grouped, 32),
    "resnext": (resnext, 32),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, randomized):
    """A network, its graph, two images and a shrinker of its ONNX file, by name; exported once."""
    made = {}

    def get(name):
        if name not in made:
            build, size = NETWORKS[name]
            torch.manual_seed(0)
            model = randomized(build(), torch.float32)
            images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
            graph = trace(model, images)
            path = tmp_path_factory.mktemp("shrink") / "dense.onnx"
            export_onnx(model, images, path)
            made[name] = model, graph, images, path, Shrinker(path, graph)
        return made[name]

    return get


def output(small, path, images):
    path.write_bytes(small.SerializeToString())
    return open_engine("ort-cpu", path).run(images.numpy())


def gap(model, graph, mask, got, images):
    """Largest difference to the network that is cut in torch, over its largest output."""
    with torch.inference_mode():
        expected = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()(images).numpy()
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_file_gives_what_the_cut_network_gives(dense, name, tmp_path):
    model, graph, images, _, shrinker = dense(name)
    for seed, dead_share in enumerate((0.0, 0.3, 0.6)):
        mask = random_mask(graph, seed, dead_share)
        got = output(shrinker.shrink(mask), tmp_path / "small.onnx", images)
        assert gap(model, graph, mask, got, images) < 1e-5, (seed, dead_share)


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "preresnet", "regnet", "resnext", "mobilenetv3"])
def test_the_smallest_plans_are_cut_too(dense, name, extreme_masks, tmp_path):
    model, graph, images, _, shrinker = dense(name)
    for mask in extreme_masks(graph):
        got = output(shrinker.shrink(mask), tmp_path / "small.onnx", images)
        assert gap(model, graph, mask, got, images) < 1e-5


def test_whatever_vanishes_legally_is_gone_from_the_file(dense, random_mask, tmp_path):
    """A convolution beside a shortcut that is padded with zeros may go, and no branch with it."""
    model, graph, images, _, shrinker = dense("resnet20")
    beside = [number for number, group in enumerate(graph.groups) if group.may_vanish and group.branch is None]
    mask = random_mask(graph, 0, 0.0)
    for group in beside:
        mask[graph.span(group)] = False
    small = shrinker.shrink(mask)
    assert beside
    assert gap(model, graph, mask, output(small, tmp_path / "small.onnx", images), images) < 1e-5


def test_everything_kept_is_the_dense_file(dense, tmp_path):
    _, graph, images, path, shrinker = dense("resnet20")
    small = shrinker.shrink(np.ones(graph.channels, dtype=bool))
    assert operators(small) == operators(onnx.load(path))
    got = output(small, tmp_path / "small.onnx", images)
    assert np.array_equal(got, open_engine("ort-cpu", path).run(images.numpy()))


@pytest.mark.parametrize("dead_share", [0.0, 0.5])
def test_the_operators_are_those_of_a_real_export(dense, dead_share, tmp_path):
    """What runs for the stopwatch must be what is deployed: no operator more, none fewer."""
    model, graph, images, _, shrinker = dense("resnet20")
    mask = random_mask(graph, 3, dead_share)
    exported = tmp_path / "exported.onnx"
    export_onnx(hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval(), images, exported)
    assert operators(shrinker.shrink(mask)) == operators(onnx.load(exported))


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def test_a_cut_leaves_the_next_one_alone(dense):
    _, graph, _, _, shrinker = dense("resnet20")
    mask = random_mask(graph, 0, 0.5)
    before = shrinker.shrink(mask).SerializeToString()
    shrinker.shrink(random_mask(graph, 1, 0.0))
    assert shrinker.shrink(mask).SerializeToString() == before


class Odd(nn.Module):
    """Ends in an operator that no rule knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return torch.sin(self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))))


def test_an_unknown_operator_is_refused_in_one_line(tmp_path):
    model, images = Odd().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, images)
    export_onnx(model, images, tmp_path / "odd.onnx")
    shrinker = Shrinker(tmp_path / "odd.onnx", graph)
    with pytest.raises(ExportError, match="no rule to cut the operator Sin") as caught:
        shrinker.shrink(np.ones(graph.channels, dtype=bool))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_network_is_refused_in_one_line(dense, tmp_path):
    path = tmp_path / "torn.onnx"
    path.write_bytes(dense("resnet20")[3].read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"cannot read torn.onnx: .*; export the network again") as caught:
        Shrinker(path, dense("resnet20")[1])
    assert "\n" not in str(caught.value)
