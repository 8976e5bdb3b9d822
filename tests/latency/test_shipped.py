"""Every profile that is shipped can be read, names its machine, and gives a predictor for its network."""

from functools import cache

import torch

from chipdeploy.graph.trace import trace
from chipdeploy.latency.profile import LatencyProfile
from chipdeploy.latency.store import shipped
from chipdeploy.training.models import build_model


@cache
def graph_of(model, channels, size):
    built = build_model(model, num_classes=10, in_channels=channels, image_size=size).eval()
    return trace(built, torch.randn(2, channels, size, size))


def test_every_shipped_profile_gives_a_predictor():
    found = shipped()
    assert found
    for name, path in found.items():
        profile = LatencyProfile.load(path)
        assert profile.machine != "unknown", name
        channels, size, _ = profile.setting.input_shape
        graph = graph_of(profile.model, channels, size)
        cost = profile.cost(graph)
        assert 0 < cost.spread < 0.5, name
        assert 0.8 < cost.count(graph.sizes) < 1.25, name
        assert profile.align(graph) > 1, name
