"""A graph that takes bytes says what the network says of normalised images."""

import copy
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxconverter_common import float16
from torch import nn

from chipdeploy.errors import ExportError, UsageError
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.preprocess import Port, affine, network_ports, ports, with_preprocessing
from chipdeploy.training.splits import Normaliser

MEAN, STD = {1: (0.29,), 3: (0.485, 0.456, 0.406)}, {1: (0.35,), 3: (0.229, 0.224, 0.225)}
CLASSES = 7


def small_net(channels):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def network(request, tmp_path_factory):
    """Channels, a network, and its graph. Height and width differ, so that swapping them shows."""
    net = small_net(request.param).eval()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(net, torch.zeros(2, request.param, 8, 12), path, metadata={"chipdeploy.network": "pruned"})
    return request.param, net, onnx.load(path)


def run(proto, images):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def pixels(count, channels):
    return np.random.default_rng(count).integers(0, 256, (count, 8, 12, channels), dtype=np.uint8)


def normalised(images):
    """What training makes of bytes."""
    channels = images.shape[-1]
    return Normaliser(MEAN[channels], STD[channels])(torch.from_numpy(images)).contiguous().numpy()


def halved(proto, keep_io):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that become smaller than fp16 can tell
        return float16.convert_float_to_float16(copy.deepcopy(proto), keep_io_types=keep_io)


@pytest.mark.parametrize("batch", [1, 5])
def test_bytes_give_the_logits_of_normalised_images(network, batch):
    channels, net, proto = network
    images = pixels(batch, channels)
    with torch.no_grad():
        expected = net(torch.from_numpy(normalised(images))).numpy()
    (got,) = run(with_preprocessing(proto, MEAN[channels], STD[channels]), images)
    assert got.shape == (batch, CLASSES)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_affine_is_the_formula():
    images = np.arange(256, dtype=np.uint8)[:, None]
    scale, shift = affine(MEAN[3], STD[3])
    expected = (images / 255 - np.array(MEAN[3])) / np.array(STD[3])
    assert scale.dtype == shift.dtype == np.float32
    assert np.abs(images * scale + shift - expected).max() <= 1e-6


# Around a rounding to fp16 ONNX Runtime leaves out casts that lose nothing else: one such step is allowed for.
@pytest.mark.parametrize(("keep_io", "tolerance"), [(True, 1e-5), (False, 1e-3)])
def test_a_half_network_is_given_what_it_takes(network, keep_io, tolerance):
    channels, _, proto = network
    half, images = halved(proto, keep_io), pixels(4, channels)
    kind = "float32" if keep_io else "float16"
    assert network_ports(half)[0].dtype == kind
    (expected,) = run(half, normalised(images).astype(kind))
    (got,) = run(with_preprocessing(half, MEAN[channels], STD[channels]), images)
    assert got.dtype == kind
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    shares, classes = run(with_preprocessing(half, MEAN[channels], STD[channels], top_k=2), images)
    assert (shares.dtype, classes.dtype) == (np.float32, np.int64)
    assert np.array_equal(classes[:, 0], expected.argmax(1))


def test_the_best_classes_and_their_probabilities(network):
    channels, net, proto = network
    images = pixels(6, channels)
    shares, classes = run(with_preprocessing(proto, MEAN[channels], STD[channels], top_k=3), images)
    with torch.no_grad():
        best = net(torch.from_numpy(normalised(images))).softmax(1).topk(3)
    assert np.array_equal(classes, best.indices.numpy())
    assert np.abs(shares - best.values.numpy()).max() <= 1e-6


def test_classes_are_ranked_by_logits_where_probabilities_vanish():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>'
        "pixels (float[batch,1,1,4] images) => (float[batch,4] logits) { logits = Flatten(images) }"
    )
    model = with_preprocessing(proto, (0,), (1 / 255,), top_k=4)
    shares, classes = run(model, np.array([[[[0], [100], [250], [1]]]], dtype=np.uint8))
    assert shares.tolist() == [[1, 0, 0, 0]]  # exp(-150) is no float32
    assert classes.tolist() == [[2, 1, 3, 0]]


def test_the_graph_stays_valid_and_says_what_it_takes(network):
    channels, _, proto = network
    before = proto.SerializeToString()
    model = with_preprocessing(proto, MEAN[channels], STD[channels], top_k=2)
    assert proto.SerializeToString() == before
    onnx.checker.check_model(model, full_check=True)
    assert ports(model) == (
        [Port("images_uint8", "uint8", ("batch", 8, 12, channels))],
        [Port("probabilities", "float32", ("batch", 2)), Port("classes", "int64", ("batch", 2))],
    )
    written = {entry.key: entry.value for entry in model.metadata_props}
    assert written.pop("chipdeploy.preprocessing").startswith("in the graph")
    assert written == {entry.key: entry.value for entry in proto.metadata_props}
    assert (model.ir_version, model.opset_import) == (proto.ir_version, proto.opset_import)


@pytest.mark.parametrize("top_k", [0, -1, CLASSES + 1])
def test_more_classes_than_there_are(network, top_k):
    channels, _, proto = network
    with pytest.raises(UsageError, match=rf"top-k must lie in 1 to {CLASSES}, the number of classes, got {top_k}$"):
        with_preprocessing(proto, MEAN[channels], STD[channels], top_k=top_k)


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 4, (0.5,) * 4), ((), ()), ((0.5,), (0.5, 0.5, 0.5))])
def test_numbers_for_other_channels(network, mean, std):
    channels, _, proto = network
    with pytest.raises(ExportError, match=f"takes {channels} channels, got {len(mean)} means and {len(std)}"):
        with_preprocessing(proto, mean, std)


def test_a_graph_is_not_preprocessed_twice(network):
    channels, _, proto = network
    once = with_preprocessing(proto, MEAN[channels], STD[channels])
    with pytest.raises(ExportError, match=r"needs one input of floats .* got images_uint8 uint8 \[batch, 8, 12, "):
        with_preprocessing(once, MEAN[channels], STD[channels])


@pytest.mark.parametrize(
    ("signature", "cause"),
    [
        ("(float[batch,3,4,4] a, float[batch,3,4,4] b) => (float[batch,48] c) { c = Flatten(a) }", "one input"),
        ("(float[2,3,4,4] a) => (float[2,48] c) { c = Flatten(a) }", "one input"),
        ("(float[batch,3,h,4] a) => (float[batch,n] c) { c = Flatten(a) }", "one input"),
        ("(float[batch,48] a) => (float[batch,48] c) { c = Flatten(a) }", "one input"),
        ("(float[batch,3,4,4] a) => (float[batch,3,4,4] c) { c = Relu(a) }", "one output"),
        ("(float[batch,3,4,4] a) => () { c = Relu(a) }", "one output .* got none"),
    ],
)
def test_graphs_that_are_no_classifier(signature, cause):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> net {signature}')
    with pytest.raises(ExportError, match=cause) as error:
        network_ports(proto)
    assert "\n" not in str(error.value)


def test_a_graph_with_our_names_is_refused():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> net (float[batch,1,2,2] images) => (float[batch,4] logits)'
        "{ images_uint8 = Relu(images) logits = Flatten(images_uint8) }"
    )
    with pytest.raises(ExportError, match="the network takes no preprocessing") as error:
        with_preprocessing(proto, (0.5,), (0.5,))
    assert "\n" not in str(error.value)
