"""An exported file is believed only after it gave the network's own outputs."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from chipdeploy.engines.base import open_engine
from chipdeploy.errors import InputError, UsageError, VerificationError
from chipdeploy.export import verify
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.verify import verify_engine, verify_onnx


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
    sizes = []

    def echo(inputs):
        sizes.append(tuple(map(len, inputs)))
        return [inputs[1], inputs[0]]

    inputs = np.arange(5, dtype=np.float32), np.arange(10).reshape(5, 2)
    for batch in (3, 8):
        first, second = verify._run(echo, inputs, batch)
        assert first.tolist() == inputs[1].tolist() and second.tolist() == [0, 1, 2, 3, 4]
    assert sizes == [(3, 3), (3, 3), (8, 8)]


def test_refuses_images_of_another_size(exported):
    with pytest.raises(InputError, match=r"takes images of batch x 1 x 8 x 8, got 1 x 3 x 8 x 8"):
        verify_onnx(*exported, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"takes images of batch x 1 x 8 x 8, got 1 x 8 x 8"):
        verify_onnx(*exported, torch.zeros(1, 8, 8))


def test_refuses_no_images(exported):
    with pytest.raises(InputError, match=r"every input must be a tensor \[N, ...\]"):
        verify_onnx(*exported, torch.zeros(0, 1, 8, 8))
    net, path = exported
    with pytest.raises(InputError, match=r"needs images \[N, C, H, W\]"):
        verify_engine(net, open_engine("ort-cpu", path), path.name, torch.zeros(1, 8, 8))


class Segments(nn.Module):
    """Two inputs; logits of pixels, classes of pixels, and a table of another size."""

    def __init__(self):
        super().__init__()
        self.image, self.depth = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.table = nn.Linear(4, 2)

    def forward(self, image, depth):
        out = torch.relu(self.image(image) + self.depth(depth))
        return {"out": out, "classes": out.argmax(1), "table": [self.table(out.mean((2, 3)))]}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    torch.manual_seed(0)
    net = Segments()
    inputs = torch.randn(5, 3, 8, 8), torch.randn(5, 1, 8, 8)
    path = tmp_path_factory.mktemp("several") / "net.onnx"
    export_onnx(net, inputs, path)
    return net, path, inputs


def test_all_outputs_of_all_inputs_agree(several):
    net, path, inputs = several
    result = verify_onnx(net, path, inputs, batches=(1, 3))
    assert result.max_relative_error < 1e-5
    assert (result.top1_agreement, result.images) == (1, 5)


@pytest.mark.parametrize("name", ["table.weight", "image.weight"])
def test_one_wrong_output_is_enough(several, tmp_path, name):
    net, path, inputs = several
    model = onnx.load(path)
    weight = next(item for item in model.graph.initializer if item.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, name))
    edited = tmp_path / "edited.onnx"
    onnx.save(model, edited)
    with pytest.raises(VerificationError, match=r"^edited\.onnx differs from its network by .* value of an output"):
        verify_onnx(net, edited, inputs)


def test_a_missing_output_is_found(several, tmp_path):
    net, path, inputs = several
    model = onnx.load(path)
    del model.graph.output[1]
    onnx.save(model, tmp_path / "edited.onnx")
    with pytest.raises(VerificationError, match="by inf"):
        verify_onnx(net, tmp_path / "edited.onnx", inputs)


def test_refuses_other_inputs(several):
    net, path, inputs = several
    with pytest.raises(InputError, match=r"net\.onnx takes 2 inputs, image, depth; got 1"):
        verify_onnx(net, path, inputs[0])
    with pytest.raises(InputError, match=r"net\.onnx as depth takes images of batch x 1 x 8 x 8, got 1 x 3 x 8 x 8"):
        verify_onnx(net, path, (inputs[0], inputs[0]))
    with pytest.raises(InputError, match="of one batch size"):
        verify_onnx(net, path, (inputs[0], inputs[1][:2]))


def test_an_engine_of_one_output_is_not_taken_for_several(tmp_path):
    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, x + 1

    images = torch.randn(2, 1, 4, 4)
    file = export_onnx(Pair(), images, tmp_path / "pair.onnx")
    assert verify_onnx(Pair(), file.path, images).max_relative_error < 1e-6
    one = export_onnx(nn.Identity(), images, tmp_path / "one.onnx")
    with pytest.raises(InputError, match=r"^one\.onnx gives one output, its network 2; "):
        verify_engine(Pair(), open_engine("ort-cpu", one.path), one.path.name, images)


@pytest.mark.parametrize(
    ("expected", "got", "share"),
    [
        ([[[1.0, 2.0], [2.0, 1.0]]], [[[1.0, 2.0], [2.0, 3.0]]], 0.5),  # two places with two classes
        ([1.0, 2.0], [3.0, 1.0], 1.0),  # no classes
    ],
)
def test_agreement_is_by_class(expected, got, share):
    assert verify._agreement([np.array(expected)], [np.array(got)]) == share


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"tolerance": 0.0}, {"tolerance": math.nan}])
def test_refuses_bad_settings(exported, wrong):
    with pytest.raises(UsageError, match="must be positive"):
        verify_onnx(*exported, torch.zeros(1, 1, 8, 8), **wrong)
