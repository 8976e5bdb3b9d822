"""What the channel graph says of a network, and what is pinned and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.errors import ModelError, UsageError
from chipdeploy.graph.channels import KEPT
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

torch.set_num_threads(1)


class Net(nn.Module):
    """stem ▶ an operation under test ▶ head ▶ classifier."""

    def __init__(self, operation, channels=8, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(channels, 4, 1)
        self.fc = nn.Linear(4, 5)
        for name, module in modules.items():
            setattr(self, name, module)
        self.operation = operation

    def forward(self, x):
        return self.fc(self.head(self.operation(self, self.stem(x))).mean((2, 3)))


def graph_of(operation, **arguments):
    return trace(Net(operation, **arguments), torch.zeros(2, 3, 8, 8))


def reasons(graph):
    return {pinned.name: pinned.reason for pinned in graph.pinned}


def test_resnet20_groups():
    model = build_model("resnet20", num_classes=10, in_channels=3, image_size=32)
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    assert [group.size for group in graph.groups] == [16, 16, 16, 16, 32, 16, 32, 32, 64, 32, 64, 64]
    # Inside the nine blocks, then 16 stream channels from the stem, 16 more by padding, and 32 more.
    inside = [group for group in graph.groups if group.branch is not None]
    assert sorted(group.size for group in inside) == [16] * 3 + [32] * 3 + [64] * 3
    assert all(group.may_vanish for group in inside)
    streams = [group for group in graph.groups if group.branch is None]
    assert [(group.size, group.may_vanish) for group in streams] == [(16, False), (16, True), (32, True)]
    assert streams[0].producers[0] == "conv1"
    assert len(streams[0].producers) == 1 + 9  # the stem and the second convolution of each block
    assert [len(branch.groups) for branch in graph.branches] == [1] * 9
    assert graph.channels == 3 * (16 + 32 + 64) + 64
    assert reasons(graph) == {"linear": "feeds the model's output"}
    assert graph.branches[0].name == "layer1.0"
    assert graph.branches[0].tail == ("layer1.0.bn2.weight", "layer1.0.bn2.bias")


def test_the_classifier_is_pinned_with_a_reason():
    graph = graph_of(lambda net, x: x.relu())
    assert [(group.name, group.size, group.may_vanish) for group in graph.groups] == [
        ("stem", 8, False),
        ("head", 4, False),
    ]
    assert [(pinned.name, pinned.size, pinned.reason) for pinned in graph.pinned] == [
        ("fc", 5, "feeds the model's output")
    ]
    image = next(slot for slot in graph.slots if (slot.tensor, slot.dim) == ("stem.weight", 1))
    assert image.index.tolist() == [KEPT] * 3


class Functional(nn.Module):
    """A convolution whose groups are written in the code."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1, groups=8)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight)


DENIED = {
    "sort": (lambda net, x: torch.sort(x, dim=1).values, {}, "sort"),
    "softmax": (lambda net, x: torch.softmax(x, dim=1), {}, "softmax"),
    "computed weight": (
        lambda net, x: F.conv2d(x, net.inner.weight * 2),
        {"inner": nn.Conv2d(8, 8, 1)},
        "weight is computed",
    ),
    "groups in the code": (lambda net, x: net.inner(x), {"inner": Functional()}, "groups written in the code"),
    "weight in a buffer": (lambda net, x: net.inner(x), {"inner": Buffered()}, "its weight is a buffer"),
    "fixed slice": (lambda net, x: x[:, :4], {"channels": 4}, "holds numbers of channels that cannot follow a cut"),
    "attention map": (lambda net, x: x * x.mean(1, keepdim=True), {}, "reduces the channels"),
    "padded by numbers in the code": (
        lambda net, x: F.pad(x, (0, 0, 0, 0, 2, 2)),
        {"channels": 12},
        "pads channels by numbers written in the code",
    ),
    "view by numbers in the code": (
        lambda net, x: x.view(x.shape[0], 8, 8, 8),
        {},
        "holds numbers of channels that cannot follow a cut",
    ),
    "scaled by the number of channels": (lambda net, x: x / x.shape[1], {}, "count of its 8 channels"),
}


# What used to stop a cut and now follows it: the operation, its modules, and the groups that are found.
FOLLOWED = {
    "flip": (lambda net, x: x.flip(1), {}, {"stem": 8, "head": 4}),
    "group norm in whole groups": (lambda net, x: net.norm(x), {"norm": nn.GroupNorm(2, 8)}, {"stem": 2, "head": 4}),
    "one slope a channel": (lambda net, x: net.act(x), {"act": nn.PReLU(8)}, {"stem": 8, "head": 4}),
    "many groups are cut whole": (
        lambda net, x: net.inner(x),
        {"inner": nn.Conv2d(8, 8, 1, groups=4)},
        {"stem": 4, "head": 4},
    ),
    "few groups are cut inside": (
        lambda net, x: net.inner(x),
        {"inner": nn.Conv2d(8, 8, 1, groups=2)},
        {"stem": 4, "inner": 4, "head": 4},
    ),
    "limits of a channel each": (
        lambda net, x: torch.clamp(x, min=net.inner.weight.view(1, -1, 1, 1)),
        {"inner": nn.BatchNorm2d(8)},
        {"stem": 8, "head": 4},
    ),
    "the larger of two": (
        lambda net, x: torch.max(x, net.inner(x)),
        {"inner": nn.Conv2d(8, 8, 1)},
        {"stem": 8, "head": 4},
    ),
    "a half gates the other": (
        lambda net, x: F.glu(net.inner(x), dim=1),
        {"inner": nn.Conv2d(8, 16, 1)},
        {"stem": 8, "inner": 8, "head": 4},
    ),
    "powers": (lambda net, x: 2**x + x**2, {}, {"stem": 8, "head": 4}),
    "largest of all places": (
        lambda net, x: x * torch.sigmoid(F.adaptive_max_pool2d(x, 1)),
        {},
        {"stem": 8, "head": 4},
    ),
    "attention by a convolution": (
        lambda net, x: x * torch.sigmoid(net.inner(x)),
        {"inner": nn.Conv2d(8, 1, 1)},
        {"stem": 8, "head": 4},
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_rules_that_carry_channels(case):
    operation, arguments, groups = FOLLOWED[case]
    graph = graph_of(operation, **arguments)
    assert {group.name: group.size for group in graph.groups} == groups


def test_one_channel_that_is_broadcast_over_many_is_pinned():
    graph = graph_of(lambda net, x: x * torch.sigmoid(net.inner(x)), inner=nn.Conv2d(8, 1, 1))
    assert "broadcast over many" in reasons(graph)["inner"]


def test_frozen_layers_are_pinned_by_name():
    net = Net(lambda net, x: net.inner(x), inner=nn.Conv2d(8, 8, 1))
    net.inner.weight.requires_grad_(False)
    graph = trace(net, torch.zeros(2, 3, 8, 8))
    assert [group.name for group in graph.groups] == ["head"]
    assert reasons(graph)["inner"] == "inner.weight is frozen (requires_grad is False)"
    assert reasons(graph)["stem"] == "inner.weight is frozen (requires_grad is False)"


def test_excluded_layers_keep_their_outputs():
    net = Net(lambda net, x: net.inner(x), inner=nn.Conv2d(8, 8, 1))
    graph = trace(net, torch.zeros(2, 3, 8, 8), exclude=["in*"])
    assert [group.name for group in graph.groups] == ["stem", "head"]
    assert reasons(graph)["inner"] == "excluded by in*"
    with pytest.raises(UsageError, match="--exclude body matches no layer"):
        trace(net, torch.zeros(2, 3, 8, 8), exclude=["body"])


@pytest.mark.parametrize("case", DENIED)
def test_default_deny_names_what_stood_in_the_way(case):
    operation, arguments, reason = DENIED[case]
    graph = graph_of(operation, **arguments)
    assert [group.name for group in graph.groups] == ["head"]
    assert reason in reasons(graph)["stem"]


def test_a_weight_that_is_also_read_by_an_unknown_operation_stays_whole():
    graph = graph_of(lambda net, x: F.conv2d(net.inner(x).relu(), -net.inner.weight), inner=nn.Conv2d(8, 8, 1))
    assert [group.name for group in graph.groups] == ["head"]
    assert "inner.weight is read as a weight and element by element" in reasons(graph)["stem"]


def branching(net, x):
    return x.relu() if x.sum() > 0 else x


def test_data_dependent_control_flow_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"cannot be traced for images \[3, 8, 8\]") as caught:
        graph_of(branching)
    assert "\n" not in str(caught.value)


def test_an_image_of_the_wrong_size_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"cannot be traced for images \[4, 8, 8\]") as caught:
        trace(Net(lambda net, x: x), torch.zeros(1, 4, 8, 8))
    assert "\n" not in str(caught.value)


def test_nothing_to_prune_is_refused():
    with pytest.raises(ModelError, match="nothing to prune"):
        trace(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), torch.zeros(1, 3, 8, 8))


def test_a_layer_under_two_names_is_one_layer(randomized, random_mask, disagreement):
    inner = nn.Conv2d(8, 8, 1)
    net = randomized(Net(lambda net, x: net.again(net.inner(x)), inner=inner, again=inner))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = trace(net, images)
    assert [(group.name, group.size) for group in graph.groups] == [("stem", 8), ("head", 4)]
    mask = random_mask(graph, 0)
    assert disagreement(net, graph, mask, images) <= 1e-12
    small = hard_prune(net, graph, PrunePlan.from_mask(graph, mask))
    assert small.again is small.inner and small.inner.weight.shape == (small.stem.out_channels,) * 2 + (1, 1)


@pytest.mark.parametrize("succeeds", [True, False])
def test_every_module_keeps_its_own_mode(succeeds):
    model = Net(lambda net, x: net.norm(x) if succeeds else branching(net, x), norm=nn.BatchNorm2d(8))
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    statistics = model.norm.running_mean.clone()
    if succeeds:
        trace(model, torch.randn(2, 3, 8, 8))
    else:
        with pytest.raises(ModelError):
            trace(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, statistics)
