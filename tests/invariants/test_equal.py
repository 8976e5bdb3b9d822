"""The invariant: a network with 0/1 gates equals the network that was cut, in eager mode and in ONNX Runtime.

Dense costs are counted beside it, as PyTorch counts them: the networks are the same.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.stubs import NoChannels, Zeros
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model, model_names

torch.set_num_threads(1)

TORCHVISION = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121")
GIANTS = ("wideresnet26-12", "resnet101", "resnet110", "resnet110-b", "preresnet164", "tv:densenet121")
NAMES = (*model_names(), *(f"tv:{name}" for name in TORCHVISION))


def build(name):
    torch.manual_seed(0)
    if name == "tv:vgg11_bn":  # with a classifier of 128 in place of 4096, or the test would copy a gigabyte a plan
        model = torchvision.models.vgg11_bn(weights=None, num_classes=10)
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 128), nn.Linear(128, 128)
        model.classifier[6] = nn.Linear(128, 10)
        return model
    if name.startswith("tv:"):
        return getattr(torchvision.models, name.removeprefix("tv:"))(weights=None, num_classes=10)
    return build_model(name, num_classes=10, in_channels=3, image_size=32)


def images(name, dtype=torch.float64, count=2):
    size = 64 if name.startswith("tv:") else 16
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


@cache
def graph_of(name):
    """Holds names and numbers only, so that all are kept."""
    return trace(build(name), images(name, torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_gated_equals_cut(name, randomized, random_mask, extreme_masks, disagreement):
    model, graph = build(name), graph_of(name)
    inputs = images(name)

    def check(mask):
        assert disagreement(model, graph, mask, inputs) <= 1e-9

    randomized(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs[:1])
    assert CostModel.of(graph, "macs").dense == counter.get_total_flops() / 2
    assert CostModel.of(graph, "params").dense == sum(parameter.numel() for parameter in model.parameters())
    for mask in extreme_masks(graph):
        check(mask)

    @settings(max_examples=1 if name in GIANTS else 4, deadline=None, derandomize=True, database=None)
    @given(seed=st.integers(0, 2**32 - 1), dead_share=st.sampled_from([0.3, 0.0, 0.7]))
    def any_plan(seed, dead_share):
        check(random_mask(graph, seed, dead_share))

    any_plan()
    randomized(model, torch.float32)
    assert disagreement(model, graph, random_mask(graph, 7), inputs.float()) <= 1e-5


def without_branches(graph, every):
    """Drops every `every`-th branch, and the upper half of each group that is left."""
    mask = np.ones(graph.channels, dtype=bool)
    for number, group in enumerate(graph.groups):
        span = graph.span(number)
        mask[span.start + max(1, group.size // 2) : span.stop] = False
        if group.branch is not None and group.branch % every == 0:
            mask[span] = False
    return mask


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet56", "mobilenetv2", "preresnet164", "tv:resnet18", "tv:densenet121"]
)
def test_onnx_equals_cut_and_dead_branches_leave_no_op(name, randomized, tmp_path):
    model, graph = build(name), graph_of(name)
    randomized(model, torch.float32)
    inputs = images(name, torch.float32, count=3)
    # Deep ones lose most of their branches, so that exporting them takes seconds.
    every = 1 if name in ("preresnet164", "resnet56", "tv:densenet121") else 2
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, without_branches(graph, every)))
    file = export_onnx(small, inputs, tmp_path / "small.onnx")
    assert verify_onnx(small, file.path, inputs, batches=(1, 2)).max_relative_error <= 1e-4

    stubs = Counter(type(module) for module in small.modules())
    convs = sum(isinstance(module, nn.Conv2d) for module in small.modules())
    assert stubs[NoChannels] > 0
    assert file.op_types["Conv"] == convs < sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert not {"ConstantOfShape", "Expand"} & set(file.op_types)  # no zeros are made
    if name in ("resnet20", "mobilenetv2"):
        whole = export_onnx(model, inputs, tmp_path / "whole.onnx")
        assert file.ops < whole.ops
        # Each dead branch takes its sum along.
        assert whole.op_types["Add"] - file.op_types.get("Add", 0) == stubs[Zeros]


def test_resnet20_without_five_branches_keeps_nine_convolutions(tmp_path):
    model, graph = build("resnet20").eval(), graph_of("resnet20")
    mask = without_branches(graph, 2)  # branches 0, 2, 4, 6 and 8 of nine go, with two convolutions each
    file = export_onnx(
        hard_prune(model, graph, PrunePlan.from_mask(graph, mask)), images("resnet20").float(), tmp_path / "a.onnx"
    )
    assert file.op_types["Conv"] == 19 - 2 * 5
    assert file.op_types["Add"] == 9 - 5
    weights = {weight.name for weight in onnx.load(file.path).graph.initializer}
    assert not any("layer1.0." in weight for weight in weights)


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "tv:resnet18"])
def test_the_cut_network_is_an_ordinary_module(name, random_mask):
    model, graph = build(name), graph_of(name)
    before = copy.deepcopy(model.state_dict())
    plan = PrunePlan.from_mask(graph, random_mask(graph, 3))
    small = hard_prune(model, graph, plan)

    assert type(small) is type(model)
    assert set(small.state_dict()) <= set(before)
    gone = {path for path, module in small.named_modules() if isinstance(module, NoChannels | Zeros)}
    assert gone
    for path, module in small.named_modules():
        if module.state_dict():
            assert type(module) is type(model.get_submodule(path))
    for key in set(before) - set(small.state_dict()):
        owner = key.rpartition(".")[0]
        assert not small.get_submodule(owner).state_dict()

    for mode in (True, False):
        small.train(mode)
        optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
        start = copy.deepcopy(small.state_dict())
        loss = F.cross_entropy(small(images(name, torch.float32, count=4)), torch.arange(4))
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        first = next(iter(dict(small.named_parameters())))
        assert not torch.equal(start[first], small.state_dict()[first])

    twin = copy.deepcopy(small)
    fresh = hard_prune(build(name), graph, plan)
    fresh.load_state_dict(small.state_dict())
    inputs = images(name, torch.float32)
    with torch.no_grad():
        outputs = [network.eval()(inputs) for network in (small, twin, fresh)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
