"""Every layer of a network is found in a real profile of ONNX Runtime, whatever was fused with it."""

import numpy as np
import torch

from chipdeploy.engines.base import LayerTime, open_engine
from chipdeploy.export.onnx import export_onnx
from chipdeploy.graph.trace import trace
from chipdeploy.latency.layers import layer_names, layer_seconds
from chipdeploy.training.models import build_model


def test_every_layer_of_resnet20_has_a_time(tmp_path):
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, in_channels=3, image_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    graph = trace(model, images)
    export_onnx(model, images, tmp_path / "net.onnx")
    times = open_engine("ort-cpu", tmp_path / "net.onnx").layer_times(images[:1].numpy(), 3)
    found = layer_seconds(times, layer_names(tmp_path / "net.onnx"))
    assert {layer.name for layer in graph.layers} == found.keys() - {""}
    assert all(seconds > 0 for name, seconds in found.items() if name)
    assert np.isclose(sum(found.values()), sum(time.ms for time in times) / 1e3)


def test_names_that_two_layers_may_bear_go_to_the_one_that_is_left():
    names = {"a": ("one",), "sum": ("one", "two")}
    times = [LayerTime("sum", "Conv", 2.0), LayerTime("a", "Conv", 1.0), LayerTime("pool", "MaxPool", 4.0)]
    assert layer_seconds(times, names) == {"": 4e-3, "one": 1e-3, "two": 2e-3}


def test_fused_kernels_that_bear_the_names_of_all_their_operators():
    times = [LayerTime("conv + relu", "Conv", 2.0), LayerTime("reformat + pool", "MaxPool", 1.0)]
    assert layer_seconds(times, {"conv": ("one",)}) == {"": 1e-3, "one": 2e-3}
