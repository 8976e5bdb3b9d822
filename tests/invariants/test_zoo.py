"""Networks of torchvision and timm, a few of each kind: gated equals cut in float64, and most of each can be pruned.

The whole zoo is `benchmarks/zoo.py`; its table is docs/zoo.md.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.proof import random_mask
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

# name: (image size, share of the MACs that can go, removable blocks and the squeeze-excite modules outside of them)
ZOO = {
    "torchvision:shufflenet_v2_x0_5": (64, 0.97, 0),
    "torchvision:mobilenet_v3_small": (64, 0.98, 10),
    "torchvision:efficientnet_b0": (64, 0.99, 16),
    "torchvision:regnet_y_400mf": (64, 0.99, 16),
    "torchvision:resnext50_32x4d": (64, 0.99, 16),
    "torchvision:convnext_tiny": (64, 0.99, 18),
    "torchvision:squeezenet1_1": (64, 0.99, 8),
    "torchvision:googlenet": (64, 0.99, 27),
    "torchvision:swin_t": (64, 0.25, 12),
    "torchvision:mnasnet0_5": (64, 0.99, 10),
    "timm:vit_tiny_patch16_224": (224, 0.99, 24),
    "timm:convnext_atto": (64, 0.99, 12),
    "timm:ghostnet_050": (64, 0.95, 7),
    "timm:repvgg_a0": (64, 0.99, 0),
    "timm:cs3darknet_focus_s": (64, 0.95, 9),
    "timm:dla46_c": (64, 0.98, 12),
    "timm:efficientformer_l1": (224, 0.95, 15),
    "timm:lcnet_050": (64, 0.98, 2),
    "timm:resnet10t": (64, 0.99, 4),
    "timm:mobileone_s0": (64, 0.95, 0),
}
TRAINED = (
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:regnet_y_400mf",
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
)
EXPORTED = ("torchvision:shufflenet_v2_x0_5", "torchvision:regnet_y_400mf", "timm:convnext_atto")


def made(name, size):
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, in_channels=3, image_size=size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:  # layer scales that would hide what their branch does
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def images(size, dtype):
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def prunable(graph, kind):
    """Share of a cost that the smallest legal cut saves."""
    cost = CostModel.of(graph, kind)
    smallest = np.array([0 if group.may_vanish else 1 for group in graph.groups])
    return 1 - cost.count(smallest) / cost.dense


@pytest.mark.parametrize("name", ZOO)
def test_gated_equals_cut(name, randomized, disagreement):
    size, share, branches = ZOO[name]
    model = randomized(made(name, size))
    inputs = images(size, torch.float64)
    graph = trace(model, inputs)
    for seed, dead_share in ((1, 0.0), (2, 0.5)):
        assert disagreement(model, graph, random_mask(graph, seed, dead_share), inputs) <= 1e-9
    assert prunable(graph, "macs") >= share
    assert len(graph.branches) == branches


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_equals_cut_and_dead_branches_leave_no_op(name, randomized, tmp_path):
    size = ZOO[name][0]
    model = randomized(made(name, size), torch.float32)
    inputs = images(size, torch.float32)
    graph = trace(model, inputs)
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, random_mask(graph, 3, 1.0))).eval()
    file = export_onnx(small, inputs, tmp_path / "small.onnx")
    assert verify_onnx(small, file.path, inputs, batches=(1, 2)).max_relative_error <= 1e-4
    whole = export_onnx(model, inputs, tmp_path / "whole.onnx")
    assert file.bytes < whole.bytes
    if graph.branches:
        assert file.ops < whole.ops
        assert not {"ConstantOfShape", "Expand"} & set(file.op_types)  # no zeros are made


@pytest.mark.parametrize("name", TRAINED)
def test_the_cut_network_trains_copies_traces_and_loads_again(name, disagreement):
    size = ZOO[name][0]
    model, inputs = made(name, size), images(size, torch.float32)
    graph = trace(model, inputs)
    plan = PrunePlan.from_mask(graph, random_mask(graph, 4, 0.3))
    small = hard_prune(model, graph, plan)
    assert type(small) is type(model)
    assert set(small.state_dict()) <= set(model.state_dict())

    small.train()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    F.cross_entropy(small(inputs), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert any(not torch.equal(value, before[key]) for key, value in small.state_dict().items())

    fresh = hard_prune(made(name, size), graph, plan)
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        outputs = [network.eval()(inputs) for network in (small, copy.deepcopy(small), fresh)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    again = trace(small, inputs)
    assert disagreement(small, again, random_mask(again, 5, 0.5), inputs) <= 1e-4


def test_the_cut_googlenet_trains_with_its_auxiliary_heads():
    """Eval mode leaves the heads out; they read channels that are cut."""
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False)
    inputs = images(64, torch.float32)
    graph = trace(model, inputs)
    assert prunable(graph, "macs") >= 0.99
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, random_mask(graph, 4, 0.3))).train()
    outputs = small(inputs)
    assert [output.shape for output in outputs] == 3 * [(2, 10)]
    sum(F.cross_entropy(output, torch.tensor([1, 2])) for output in outputs).backward()
    assert small.aux1.conv.conv.weight.grad.abs().max() > 0
