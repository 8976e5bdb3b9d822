"""Shapes of layers at given widths, counted by hand and against the cut network."""

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.proof import random_mask
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.latency.shapes import LayerShapes
from chipdeploy.training.models import build_model


@pytest.fixture(scope="module", params=["resnet20", "mobilenetv2"])
def network(request):
    torch.manual_seed(0)
    model = build_model(request.param, num_classes=10, in_channels=3, image_size=16)
    return model, trace(model, torch.randn(2, 3, 16, 16))


def test_shapes_are_those_of_the_cut_network(network):
    """Of every layer that is left, the channels that PyTorch's own modules have."""
    model, graph = network
    shapes = LayerShapes.of(graph)
    for seed in range(3):
        mask = random_mask(graph, seed, 0.4)
        small = dict(hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).named_modules())
        into, out, alive = (table[0] for table in shapes.at(group_widths(graph, mask)[None]))
        assert 0 < alive.sum() < len(alive)
        for number, name in enumerate(shapes.names):
            left = small.get(name)
            assert isinstance(left, nn.Conv2d | nn.Linear) == alive[number], name
            if isinstance(left, nn.Conv2d):
                assert out[number] == left.out_channels
                assert shapes.depthwise[number] or into[number] == left.in_channels
            elif alive[number]:
                assert (into[number], out[number]) == (left.in_features, left.out_features)


def test_the_work_of_all_layers_is_the_count_of_macs(network):
    _, graph = network
    shapes, macs = LayerShapes.of(graph), CostModel.of(graph, "macs")
    for seed in range(3):
        widths = group_widths(graph, random_mask(graph, seed, 0.4))
        into, out, alive = (table[0] for table in shapes.at(widths[None]))
        work = shapes.work * out * np.where(shapes.depthwise, 1, into) * alive
        assert work.sum() == pytest.approx(macs.count(widths))


def test_some_layers_are_a_part_of_all(network):
    _, graph = network
    shapes = LayerShapes.of(graph)
    widths = group_widths(graph, random_mask(graph, 0, 0.4))[None]
    some = np.array([0, 3, len(shapes.names) - 1])
    for whole, part in zip(shapes.at(widths), shapes.at(widths, some), strict=True):
        assert np.array_equal(whole[:, some], part)


def test_equal_layers_are_of_one_kind(tiny):
    _, graph = tiny
    shapes = LayerShapes.of(graph)
    kinds = dict(zip(shapes.names, shapes.kinds, strict=True))
    assert kinds["one.first.0"] == kinds["one.second.0"]
    assert kinds["two.first.0"] == kinds["two.second.0"]
    assert len(set(kinds.values())) == 5  # the stem, two kinds of blocks, the stride, the classifier
    positions = dict(zip(shapes.names, shapes.positions, strict=True))
    assert (positions["stem.0"], positions["down.0"], positions["head"]) == (16 * 16, 8 * 8, 1)
    assert dict(zip(shapes.names, shapes.work, strict=True))["one.first.0"] == 16 * 16 * 9


def test_a_group_touches_the_layers_beside_it_and_its_branch(tiny):
    _, graph = tiny
    shapes = LayerShapes.of(graph)
    stem = next(number for number, group in enumerate(graph.groups) if "stem.0" in group.producers)
    inside = next(number for number, group in enumerate(graph.groups) if "two.first.0" in group.producers)
    touched = [{name for name, hit in zip(shapes.names, row, strict=True) if hit} for row in shapes.touched]
    assert touched[stem] == {"stem.0", "one.first.0", "one.second.0", "down.0"}
    assert touched[inside] == {"two.first.0", "two.second.0"}
