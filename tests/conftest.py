"""What tests of several folders share: networks where nothing cancels, random cuts, and how far two outputs differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Engines are warmed up for a tenth of the time: no test judges how long something takes."""
    monkeypatch.setattr("chipdeploy.latency.blocks.WARM_UP_S", 0.02)


@pytest.fixture(scope="session")
def randomized():
    """Gives a model random statistics, affines and biases, in place, and returns it in eval mode."""

    def randomize(model, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        model = model.to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.3)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
                if name.endswith("running_var"):
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        return model

    return randomize


@pytest.fixture(scope="session")
def random_mask():
    """A legal cut of a graph: branches are dead with a given probability, all other widths are uniform."""

    def draw(graph, seed, dead_share=0.3):
        rng = np.random.default_rng(seed)
        mask = np.zeros(graph.channels, dtype=bool)
        dead = rng.random(len(graph.branches)) < dead_share
        for number, group in enumerate(graph.groups):
            if group.branch is not None:
                width = 0 if dead[group.branch] else rng.integers(1, group.size + 1)
            else:
                width = rng.integers(0 if group.may_vanish else 1, group.size + 1)
            mask[graph.span(number).start + rng.permutation(group.size)[:width]] = True
        return mask

    return draw


@pytest.fixture(scope="session")
def extreme_masks():
    """The smallest legal cut, and one channel in every group."""

    def build(graph):
        bare = np.zeros(graph.channels, dtype=bool)
        single = np.zeros(graph.channels, dtype=bool)
        for number, group in enumerate(graph.groups):
            single[graph.span(number).start] = True
            bare[graph.span(number).start] = not group.may_vanish
        return bare, single

    return build


@pytest.fixture(scope="session")
def disagreement():
    """Largest difference between the gated and the cut network's outputs, over the largest output."""

    def measure(model, graph, mask, images):
        gates = torch.from_numpy(mask).to(images)
        with torch.no_grad():
            gated = gated_call(model, Gating(graph), gates, images)
            small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask))
            cut = small(images)
        assert gated.shape == cut.shape
        assert gated.abs().max() > 0
        return float((gated - cut).abs().max() / gated.abs().max())

    return measure
