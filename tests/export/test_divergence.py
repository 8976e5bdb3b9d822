"""The first layer in which two files of one network differ."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from chipdeploy.export.divergence import first_divergence, first_divergence_from_torch
from chipdeploy.export.onnx import export_onnx

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    path = tmp_path / "net.onnx"
    export_onnx(nn.Sequential(*layers, nn.Linear(8, 4)), torch.from_numpy(IMAGES), path)
    return path


def edited(path, name):
    """A copy in which the weight `name` is another."""
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, name))
    other = path.with_name("other.onnx")
    onnx.save(proto, other)
    reader = next(node for node in proto.graph.node if name in node.input)
    return other, reader


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "6.weight"])
def test_names_the_layer_whose_weight_was_edited(network, name):
    other, reader = edited(network, name)
    sentence = first_divergence(network, other, IMAGES, 1e-3)
    assert f"the first layer that differs is {reader.name}, by " in sentence
    assert sentence.endswith("of its largest value")


def test_equal_files_have_none(network):
    assert first_divergence(network, network, IMAGES, 1e-6).startswith("no single layer differs")


def test_names_the_layer_that_left_the_module(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval()
    path = tmp_path / "net.onnx"
    export_onnx(model, torch.from_numpy(IMAGES), path)
    assert first_divergence_from_torch(model, path, IMAGES, 1e-4).startswith("no single layer differs")
    other, reader = edited(path, "2.weight")
    sentence = first_divergence_from_torch(model, other, IMAGES, 1e-3)
    assert f"the first layer that differs is {reader.name}, by " in sentence
