"""Networks with several inputs and outputs, and those of torchvision for segmentation and detection."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from chipdeploy.chipnet.soft import Budget, ChipNet
from chipdeploy.errors import ModelError
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

Pair = namedtuple("Pair", ["fine", "coarse"])


def conv(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Added(nn.Module):
    """An image and its depth meet in a sum."""

    def __init__(self):
        super().__init__()
        self.image, self.depth = conv(3, 8), conv(1, 8)
        self.body, self.head = conv(8, 10), nn.Linear(10, 4)

    def forward(self, image, depth):
        out = self.body(self.image(image) + self.depth(depth))
        return self.head(out.mean((2, 3)))


class Concatenated(Added):
    """The same with a concatenation, and a vector of facts beside the pooled features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv(16, 10), nn.Linear(13, 4)

    def forward(self, image, depth, facts):
        out = self.body(torch.cat([self.image(image), self.depth(depth)], 1))
        return self.head(torch.cat([out.mean((2, 3)), facts], 1))


class Heads(nn.Module):
    """A stem and two heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 8), conv(8, 12, 2)
        self.classes, self.mask = nn.Linear(12, 5), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        stem = self.stem(x)
        return {"classes": self.classes(self.body(stem).mean((2, 3))), "mask": self.mask(stem)}


class Pyramid(nn.Module):
    """Feature maps as they are: what goes out keeps its channels, what lies before is free."""

    def __init__(self, shape=list):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(nn.Sequential(conv(a, 6), conv(6, b, 2)) for a, b in ((3, 8), (8, 12)))

    def forward(self, x):
        maps = []
        for block in self.blocks:
            maps.append(block(maps[-1] if maps else x))
        return Pair(*maps) if self.shape is Pair else self.shape(maps)


def drawn(*shapes, dtype=torch.float64, count=2):
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, *shape, dtype=dtype, generator=draw) for shape in shapes)


def check(model, graph, mask, inputs):
    """Every output of the cut network equals that of the gated one."""
    gates = torch.from_numpy(mask).to(inputs[0])
    with torch.no_grad():
        gated = gated_call(model, Gating(graph), gates, *inputs)
        cut = hard_prune(model, graph, PrunePlan.from_mask(graph, mask))(*inputs)
    (ones, shape), (others, other_shape) = pytree.tree_flatten(gated), pytree.tree_flatten(cut)
    assert shape == other_shape
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all() and one.abs().max() > 0
        assert (one - other).abs().max() <= 1e-9 * one.abs().max()


def check_all(model, graph, inputs, random_mask, extreme_masks, seeds=(1, 2)):
    for mask in (*extreme_masks(graph), *(random_mask(graph, seed) for seed in seeds)):
        check(model, graph, mask, inputs)


SMALL = {
    "added": (Added, ((3, 8, 8), (1, 8, 8)), {"head"}),
    "concatenated": (Concatenated, ((3, 8, 8), (1, 8, 8), (3,)), {"head"}),
    "dictionary": (Heads, ((3, 8, 8),), {"classes", "mask"}),
    "list": (Pyramid, ((3, 8, 8),), {"blocks.0.1.0", "blocks.1.1.0"}),
    "tuple": (lambda: Pyramid(tuple), ((3, 8, 8),), {"blocks.0.1.0", "blocks.1.1.0"}),
    "named tuple": (lambda: Pyramid(Pair), ((3, 8, 8),), {"blocks.0.1.0", "blocks.1.1.0"}),
    "ordered": (
        lambda: Pyramid(lambda maps: OrderedDict(a=maps[0], b=maps[1:])),
        ((3, 8, 8),),
        {"blocks.0.1.0", "blocks.1.1.0"},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_only_what_goes_out_is_pinned(name, randomized, random_mask, extreme_masks, tmp_path):
    build, shapes, pinned = SMALL[name]
    torch.manual_seed(0)
    model = randomized(build())
    inputs = drawn(*shapes)
    graph = trace(model, inputs)
    assert {group.name for group in graph.pinned} == pinned
    assert {group.reason for group in graph.pinned} == {"feeds the model's output"}
    free = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)} - pinned
    assert {producer for group in graph.groups for producer in group.producers} == free
    check_all(model, graph, inputs, random_mask, extreme_masks)

    small = hard_prune(model, graph, PrunePlan.from_mask(graph, random_mask(graph, 3)))
    inputs = tuple(value.float() for value in inputs)
    file = export_onnx(small, inputs, tmp_path / "small.onnx")
    assert verify_onnx(small, file.path, inputs, batches=(1, 3)).max_relative_error <= 1e-4


def test_summed_inputs_share_their_gates():
    graph = trace(Added(), drawn((3, 8, 8), (1, 8, 8), dtype=torch.float32))
    shared = next(group for group in graph.groups if "image.0" in group.producers)
    assert shared.producers == ("image.0", "depth.0")
    graph = trace(Concatenated(), drawn((3, 8, 8), (1, 8, 8), (3,), dtype=torch.float32))
    shared = next(group for group in graph.groups if "image.0" in group.producers)
    assert shared.producers == ("image.0",)


def test_soft_pruning_with_two_inputs():
    torch.manual_seed(0)
    model, inputs = Concatenated(), drawn((3, 8, 8), (1, 8, 8), (3,), dtype=torch.float32, count=8)
    chip = ChipNet(model, inputs, Budget("flops", 0.5), steps=20, align=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(20):
        loss = chip.loss(F.cross_entropy(chip(*inputs), torch.arange(8) % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        chip.step()
    small = hard_prune(chip.folded(), chip.graph, chip.plan())
    widths = chip.plan().mask(chip.graph)
    assert 0 < widths.sum() < chip.graph.channels
    assert small(*inputs).shape == (8, 4)
    kept = np.bincount(chip.graph.group_of, weights=widths, minlength=len(chip.graph.groups)).astype(np.int64)
    assert chip.cost.count(kept) <= 0.5 * chip.cost.dense


def fcn():
    return segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


def deeplab():
    return segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


class WithHead(nn.Module):
    """A detector up to its raw maps: what follows, anchors and suppression, depends on the data."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


def ssdlite():
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def retinanet():
    return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)


LARGE = {  # the least share of channels that is free; outputs in the file, where one is made: that takes seconds
    "fcn_resnet50": (fcn, 0.99, ["out", "aux"]),
    "deeplabv3_mobilenet_v3_large": (deeplab, 0.99, ["out", "aux"]),
    "ssdlite320 backbone": (lambda: ssdlite().backbone, 0.6, ["0", "1", "2", "3", "4", "5"]),
    "ssdlite320 with heads": (lambda: WithHead(ssdlite()), 0.6, None),
    "retinanet backbone": (lambda: retinanet().backbone, 0.9, ["0", "1", "2", "p6", "p7"]),
    "retinanet with heads": (lambda: WithHead(retinanet()), 0.9, None),
    "frozen norms": (
        lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5),
        0.7,
        None,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_torchvision(name, randomized, random_mask, extreme_masks, tmp_path):
    build, share, outputs = LARGE[name]
    torch.manual_seed(0)
    model = build().eval()
    inputs = drawn((3, 64, 64) if "deeplab" in name or "ssd" in name else (3, 32, 32))
    graph = trace(model.double(), inputs)
    assert {group.reason for group in graph.pinned} == {"feeds the model's output"}
    held = sum(group.size for group in graph.pinned)
    free = sum(group.size * len(group.producers) for group in graph.groups)
    assert free / (free + held) >= share
    randomized(model)
    bare, _ = extreme_masks(graph)
    for mask in (bare, random_mask(graph, 1)):
        check(model, graph, mask, inputs)

    if outputs is None:
        return
    narrow = np.zeros(graph.channels, dtype=bool)
    for number, group in enumerate(graph.groups):
        narrow[graph.span(number).start :][: max(1, group.size // 8)] = group.branch is None or group.branch % 4 == 0
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, narrow)).float()
    images = inputs[0].float()
    file = export_onnx(small, images, tmp_path / "small.onnx", max_batch=4)
    assert [value.name for value in onnx.load(file.path).graph.output] == outputs
    assert verify_onnx(small, file.path, images, batches=(1, 3)).max_relative_error <= 1e-4


def test_a_whole_detector_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"cannot be traced for images \[3, 64, 64\]: .*data-dependent") as error:
        trace(retinanet(), torch.zeros(1, 3, 64, 64))
    assert "\n" not in str(error.value)
