"""Plans under a budget whose engines fit a memory."""

import numpy as np
import pytest
import torch

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.config import PruneConfig
from chipdeploy.errors import BudgetError
from chipdeploy.export.memory import footprint
from chipdeploy.export.onnx import export_onnx
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.sizing import Sizing
from chipdeploy.training.models import build_model

KEEP = 0.5


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, in_channels=3, image_size=32).eval()
    return model, trace(model, torch.randn(2, 3, 32, 32))


@pytest.fixture(scope="module")
def projector(net):
    return Projector(net[1], CostModel.of(net[1], "macs"), 8)


@pytest.fixture(scope="module")
def scores(net):
    return np.random.default_rng(0).lognormal(0, 1, net[1].channels)


@pytest.fixture(scope="module")
def sizing(net, projector):
    """One for all limits: what it knows of the file does not depend on them."""
    with Sizing(net[0], projector, 2.0) as found:
        yield found


def test_a_plan_that_fits_is_left_alone(sizing, projector, scores):
    sizing.limit_mb = 2.0
    assert (sizing.project(scores, KEEP) == projector.project(scores, KEEP)).all()
    assert sizing.dense.weights > 4 * 260_000


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_plan_that_is_too_large_gives_way_to_one_that_fits_and_uses_what_there_is(
    net, sizing, projector, scores, share
):
    limit = sizing.limit_mb = sizing.footprint(projector.project(scores, KEEP)).mb * share
    chosen = sizing.project(scores, KEEP)
    assert 0.85 * limit < sizing.footprint(chosen).mb <= limit
    cost = projector.cost.count(group_widths(net[1], chosen)) / projector.cost.dense
    assert 0.5 * share * KEEP < cost <= KEEP
    # The size alone would be met by less of everything; what is wanted keeps more of what the budget pays for.
    tighter = next(
        mask
        for keep in np.arange(KEEP, 0.02, -0.02)
        if sizing.footprint(mask := projector.project(scores, float(keep))).mb <= limit
    )
    assert scores[chosen].sum() >= scores[tighter].sum()


def test_the_size_is_that_of_the_file_that_is_deployed(net, projector, scores, tmp_path):
    """Cuts are planned on a file that was cut; what is deployed is an export of the cut network."""
    model, graph = net
    mask = projector.project(scores, 0.3)
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
    export_onnx(small, torch.randn(2, 3, 32, 32), tmp_path / "small.onnx")
    with Sizing(model, projector, 1.0, batch=4) as sizing:
        assert footprint(tmp_path / "small.onnx", 4) == sizing.footprint(mask)


def test_half_precision_halves_it(net, sizing, projector):
    with Sizing(net[0], projector, 1.0, precision="fp16") as half:
        assert half.dense.mb == pytest.approx(sizing.dense.mb / 2)


def test_what_no_network_fits_is_refused_with_the_least(net, projector):
    match = r"0.001 MB is out of reach: even at the smallest widths .* at batch 8"
    with Sizing(net[0], projector, 1e-3, batch=8) as sizing, pytest.raises(BudgetError, match=match):
        sizing.check()


def test_only_a_configuration_that_asks_for_it_gets_one(net, projector):
    assert Sizing.of(PruneConfig(keep=0.5), net[0], projector) is None
    sizing = Sizing.of(PruneConfig(keep=0.5, max_size_mb=0.5, on="trt-fp16", bench_batch=4), net[0], projector)
    with sizing:
        assert (sizing.batch, sizing.precision, sizing.limit_mb) == (4, "fp16", 0.5)
        assert sizing.text().startswith("0.5 MB of weights and activations (dense: ")
