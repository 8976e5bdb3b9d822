"""An exported file is believed only after it gave the network's own logits."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from chipdeploy.errors import InputError, UsageError, VerificationError
from chipdeploy.export import verify
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_onnx


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    net[1].running_mean.normal_(0, 0.2)
    net[1].running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("verify") / "net.onnx"
    export_onnx(net.train(), torch.randn(2, 1, 8, 8), path)
    return net, path


def test_an_honest_file_agrees(exported):
    net, path = exported
    result = verify_onnx(net, path, torch.randn(5, 1, 8, 8), batches=(1, 3, 8))
    assert result.max_relative_error < 1e-5
    assert result.top1_agreement == 1
    assert (result.batches, result.tolerance, result.images) == ((1, 3, 8), 1e-4, 5)
    assert net.training
    assert json.loads(json.dumps(result.to_dict()))["batches"] == [1, 3, 8]


def test_other_weights_are_found(exported, tmp_path):
    net, path = exported
    model = onnx.load(path)
    weight = next(item for item in model.graph.initializer if list(item.dims) == [4, 6])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    edited = tmp_path / "edited.onnx"
    onnx.save(model, edited)
    images = torch.randn(4, 1, 8, 8)
    with pytest.raises(
        VerificationError, match=r"^edited\.onnx differs from its network by .*allowed 0\.0001"
    ) as error:
        verify_onnx(net, edited, images)
    assert "\n" not in str(error.value)
    assert verify_onnx(net, edited, images, tolerance=0.05).max_relative_error > 1e-4


def test_a_network_that_is_not_finite_fails(exported):
    net, path = exported
    with pytest.raises(VerificationError, match="by inf"):
        verify_onnx(net, path, torch.full((1, 1, 8, 8), math.nan))


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        ([[2.0, -4.0]], [[2.5, -4.0]], 0.5 / 4),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[0.0, 0.0]], [[0.0, 0.1]], math.inf),
        ([[1.0, 2.0]], [[1.0]], math.inf),
        ([[1.0, math.nan]], [[1.0, math.nan]], math.inf),
    ],
)
def test_the_error_is_relative_to_the_largest_logit(expected, got, error):
    assert verify._relative_error(np.array(expected), np.array(got)) == error


def test_every_image_is_run_at_exactly_the_batch_size():
    class Echo:
        sizes = ()

        def run(self, images):
            self.sizes += (len(images),)
            return images

    engine, pixels = Echo(), np.arange(5, dtype=np.float32)
    assert verify._run(engine, pixels, 3).tolist() == [0, 1, 2, 3, 4]
    assert verify._run(engine, pixels, 8).tolist() == [0, 1, 2, 3, 4]
    assert engine.sizes == (3, 3, 8)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 8, 8)])
def test_refuses_no_images(exported, shape):
    with pytest.raises(InputError, match=r"needs images \[N, C, H, W\]"):
        verify_onnx(*exported, torch.zeros(shape))


def test_refuses_images_of_another_size(exported):
    with pytest.raises(InputError, match="takes images of batch x 1 x 8 x 8, got 1 x 3 x 8 x 8"):
        verify_onnx(*exported, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"tolerance": 0.0}, {"tolerance": math.nan}])
def test_refuses_bad_settings(exported, wrong):
    with pytest.raises(UsageError, match="must be positive"):
        verify_onnx(*exported, torch.zeros(1, 1, 8, 8), **wrong)
