"""Other precisions: what they keep of the logits, what they leave in float, and that TensorRT takes them."""

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from chipdeploy.engines.base import open_engine
from chipdeploy.engines.target import Target
from chipdeploy.errors import ExportError, InputError, MissingError, UsageError, VerificationError
from chipdeploy.export.onnx import export_onnx, model_digest
from chipdeploy.export.precision import PrecisionOptions, convert
from chipdeploy.export.probe import METHODS, Agreement, logits, tensor_ranges
from chipdeploy.export.sensitivity import keep_worst, sensitivity
from chipdeploy.training.models import build_model


class Net(nn.Module):
    """Two convolutions and a classifier whose weights a test may scale: what one multiplies, a later one divides by."""

    def __init__(self, first=1.0, second=1.0, last=1.0, outlier=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)
        with torch.no_grad():
            for layer, scale in ((self.conv1, first), (self.conv2, second), (self.linear, last)):
                layer.weight *= scale
            self.conv1.bias *= first
            # One channel so loud that int8 has no steps left for the others, and as loud in the logits as before.
            self.conv2.weight[0] *= outlier
            self.linear.weight[:, 0] /= outlier

    def forward(self, x):
        out = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


META = {"chipdeploy.network": "dense", "chipdeploy.classes": "a\nb"}
IMAGES = np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32)


@functools.cache
def exported(**scales):
    """The fp32 file of a Net."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(Net(**scales), torch.from_numpy(IMAGES[:2]), path, metadata=META)
        return path.read_bytes()


@pytest.fixture
def export(tmp_path):
    def write(**scales):
        path = tmp_path / "net.onnx"
        path.write_bytes(exported(**scales))
        return path

    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory, randomized):
    """The fp32 files of two built-in networks; a channel of each has next to no weights, as training leaves them."""
    folder, files = tmp_path_factory.mktemp("models"), {}
    for name in ("resnet20", "mobilenetv2"):
        model = randomized(build_model(name, num_classes=5, in_channels=3, image_size=16), torch.float32)
        with torch.no_grad():
            next(model.parameters())[0] *= 1e-12
        files[name] = export_onnx(model, torch.zeros(2, 3, 16, 16), folder / f"{name}.onnx", metadata=META).path
    return files


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).standard_normal((32, 3, 16, 16), dtype=np.float32)


def sqnr_db(source, target, images):
    """Of what ONNX Runtime makes of the two files as they lie on the disk."""
    found = Agreement.of(logits(onnx.load(source), images), logits(onnx.load(target), images))
    return np.inf if found.sqnr_db is None else found.sqnr_db


def types(proto):
    return {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def ops(proto):
    return [node.op_type for node in proto.graph.node]


def builds(path):
    """Parse and build an engine with TensorRT-RTX, which needs no GPU for that; returns what the parser objects to."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return [parser.get_error(number).desc() for number in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("images", (1, *shape), (8, *shape), (16, *shape))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return ["no engine"] if engine is None else []


CASES = {
    "fp32": ("fp32", PrecisionOptions(), 200),
    "fp16": ("fp16", PrecisionOptions(), 50),
    "fp16-io": ("fp16", PrecisionOptions(keep_io=False), 50),
    "int8": ("int8", PrecisionOptions(), 15),
    "int8-stored": ("int8", PrecisionOptions(store_int8=True), 15),
    "int8-fp16": ("int8", PrecisionOptions(rest="fp16", store_int8=True), 15),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("resnet20", case) for case in CASES), *(("mobilenetv2", case) for case in ("fp16", "int8", "int8-fp16"))],
)
def test_keeps_the_logits_and_builds_in_tensorrt(models, pictures, tmp_path, name, case):
    precision, options, least_db = CASES[case]
    made = convert(models[name], tmp_path / "net.onnx", precision, pictures, options=options)
    assert sqnr_db(models[name], made.file.path, pictures) > least_db
    assert made.precision == precision
    assert made.file.sha256 == model_digest(made.file.path)
    assert made.kept_float == ()
    assert builds(made.file.path) == []


def test_fp32_is_a_copy(models, pictures, tmp_path):
    made = convert(models["resnet20"], tmp_path / "copy.onnx", "fp32", pictures)
    assert made.file.path.read_bytes() == models["resnet20"].read_bytes()
    assert made.agreement == Agreement(top1=1.0, sqnr_db=None)


def test_fp16_is_half_the_size_and_takes_float_images(export, tmp_path):
    source = export()
    made = convert(source, tmp_path / "half.onnx", "fp16", IMAGES)
    proto = onnx.load(made.file.path)
    assert {t for name, t in types(proto).items() if "weight" in name} == {TensorProto.FLOAT16}
    assert ops(proto).count("Cast") == 2  # images and logits
    assert open_engine("ort-cpu", made.file.path).run(IMAGES).dtype == np.float32


def test_fp16_io_needs_no_cast(export, tmp_path):
    made = convert(export(), tmp_path / "half.onnx", "fp16", IMAGES, options=PrecisionOptions(keep_io=False))
    proto = onnx.load(made.file.path)
    assert "Cast" not in ops(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT16
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("keep_io", [True, False])
def test_what_overflows_stays_in_fp32(export, tmp_path, keep_io):
    source = export(first=1e6, second=1e-6)
    proto = onnx.load(source)
    conv1, relu, conv2 = (node.name for node in proto.graph.node[:3])
    assert np.abs(tensor_ranges(proto, IMAGES)[proto.graph.node[0].output[0]].range_value).max() > 65504
    made = convert(source, tmp_path / "half.onnx", "fp16", IMAGES, options=PrecisionOptions(keep_io=keep_io))
    assert made.kept_float == (conv1, relu, conv2)
    assert any(note.startswith(f"{proto.graph.node[0].output[0]}: reaches ") for note in made.notes)
    assert sqnr_db(source, made.file.path, IMAGES) > 50
    assert builds(made.file.path) == []


def test_what_overflows_stays_in_fp32_beside_int8(export, tmp_path):
    source = export(first=1e6, second=1e-6)
    made = convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=PrecisionOptions(rest="fp16"))
    assert made.kept_float == tuple(node.name for node in onnx.load(source).graph.node[:3])
    assert sqnr_db(source, made.file.path, IMAGES) > 25
    assert builds(made.file.path) == []


@pytest.mark.parametrize(
    ("scales", "note"),
    [({"second": 1e7, "last": 1e-3}, "beyond fp16's"), ({"second": 1e-10, "last": 1e4}, "all zero in")],
)
def test_weights_that_fp16_cannot_hold_stay_in_fp32(export, tmp_path, scales, note):
    source = export(first=1e-5 if scales["second"] > 1 else 1.0, **scales)
    made = convert(source, tmp_path / "half.onnx", "fp16", IMAGES)
    conv2 = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"][1].name
    assert conv2 in made.kept_float
    assert [line.split(":")[0] for line in made.notes if note in line] == ["conv2.weight"]
    assert sqnr_db(source, made.file.path, IMAGES) > 50


def test_int8_beside_fp16_runs_in_an_engine_as_it_was_verified(models, pictures, tmp_path):
    """A plain session is off by a fifth of the largest logit."""
    target, options = tmp_path / "int8.onnx", PrecisionOptions(rest="fp16")
    convert(models["resnet20"], target, "int8", pictures, options=options)
    got = open_engine(Target.parse("ort-cpu-int8"), target).run(pictures)
    assert np.array_equal(got, logits(onnx.load(target), pictures))


def test_a_layer_of_tiny_weights_stays_in_fp32_beside_int8(export, tmp_path):
    source = export(second=1e-6, last=1e4)
    made = convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=PrecisionOptions(rest="fp16"))
    assert made.kept_float == (onnx.load(source).graph.node[2].name,)
    assert [note.split(":")[0] for note in made.notes if "too fine for fp16" in note] == ["conv2.weight_scale"]
    assert sqnr_db(source, made.file.path, IMAGES) > 25
    assert builds(made.file.path) == []


def test_logits_beyond_fp16(export, tmp_path):
    source = export(first=1e3, last=1e3)
    target = tmp_path / "half.onnx"
    last = onnx.load(source).graph.node[-1].name
    made = convert(source, target, "fp16", IMAGES)
    assert last in made.kept_float
    assert sqnr_db(source, target, IMAGES) > 50
    target.write_bytes(b"earlier")
    with pytest.raises(VerificationError, match=rf"net\.onnx in fp16 gives logits that .* first at node {last}"):
        convert(source, target, "fp16", IMAGES, options=PrecisionOptions(keep_io=False))
    assert target.read_bytes() == b"earlier"


def test_a_node_is_kept_on_request(export, tmp_path):
    source = export()
    first, last = (onnx.load(source).graph.node[position].name for position in (0, -1))
    options = PrecisionOptions(keep_float=(last, first))
    made = convert(source, tmp_path / "half.onnx", "fp16", IMAGES, options=options)
    assert made.kept_float == (first, last)
    assert types(onnx.load(made.file.path))["conv1.weight_fp32"] == TensorProto.FLOAT
    made = convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=options)
    assert made.kept_float == (first, last)
    assert ops(onnx.load(made.file.path)).count("QuantizeLinear") == 2  # the input and the weight of what is left


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates(export, tmp_path, method):
    source = export()
    made = convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=PrecisionOptions(method=method))
    assert sqnr_db(source, made.file.path, IMAGES) > 20
    assert made.agreement.sqnr_db == pytest.approx(sqnr_db(source, made.file.path, IMAGES))


def test_a_percentile_clips_what_is_rare(export):
    images = IMAGES.copy()
    images[0, 0, 0, 0] = 1000
    proto = onnx.load(export())
    highest = {}
    for method in ("minmax", "percentile"):
        found = tensor_ranges(proto, images, method, op_types=("Conv",), percentile=99.9)["images"]
        highest[method] = np.max(found.range_value)
    assert highest["minmax"] == 1000
    assert highest["percentile"] < 10


def test_quantised_are_inputs_and_weights_by_symmetric_int8(export, tmp_path):
    made = convert(export(), tmp_path / "int8.onnx", "int8", IMAGES)
    graph = onnx.load(made.file.path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == 6  # two for each of three layers
    for node in quantised:
        zero = tensors[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    assert [tensors[node.input[1]].shape for node in quantised if node.input[0] == "conv1.weight"] == [(8,)]
    makers = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert [makers.get(name) for name in node.input] == ["DequantizeLinear", "DequantizeLinear", None]
            assert not any(node.output[0] in other.input for other in quantised)


def test_stored_weights_are_the_same_numbers_in_a_smaller_file(models, pictures, tmp_path):
    for rest in ("fp32", "fp16"):
        pairs, stored = (
            convert(
                models["resnet20"],
                tmp_path / f"{store}.onnx",
                "int8",
                pictures,
                options=PrecisionOptions(rest=rest, store_int8=store),
            )
            for store in (False, True)
        )
        assert np.array_equal(*(logits(onnx.load(made.file.path), pictures) for made in (pairs, stored)))
        assert stored.file.bytes < 0.6 * pairs.file.bytes


def test_scales_in_fp16_are_never_zero(models, pictures, tmp_path):
    options = PrecisionOptions(rest="fp16")
    made = convert(models["resnet20"], tmp_path / "int8.onnx", "int8", pictures, options=options)
    graph = onnx.load(made.file.path).graph
    names = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    scales = [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in names]
    assert {scale.dtype for scale in scales} == {np.dtype(np.float16)}
    assert min(scale.min() for scale in scales) == np.float16(2**-20)  # the dead channel's


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_file_still_says_what_it_is(export, tmp_path, precision):
    made = convert(export(), tmp_path / "other.onnx", precision, IMAGES)
    proto = onnx.load(made.file.path)
    written = {entry.key: entry.value for entry in proto.metadata_props}
    assert written.keys() == {*META, "chipdeploy.precision", "chipdeploy_version"}
    assert {key: written[key] for key in META} == META
    assert written["chipdeploy.precision"] == precision
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert made.to_dict() == {
        "file": made.file.to_dict(),
        "precision": precision,
        "kept_float": [],
        "notes": [],
        "agreement": made.agreement.to_dict(),
    }


def test_the_same_network_gives_the_same_bytes_in_another_process(export, tmp_path):
    source = export()
    np.save(tmp_path / "images.npy", IMAGES)
    options = PrecisionOptions(method="percentile", rest="fp16")
    made = convert(source, tmp_path / "here.onnx", "int8", IMAGES, options=options)
    code = (
        "import sys, numpy; from pathlib import Path; from chipdeploy.export.precision import *;"
        "convert(Path('net.onnx'), Path('there.onnx'), 'int8', numpy.load('images.npy'),"
        " options=PrecisionOptions(method='percentile', rest='fp16'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert model_digest(tmp_path / "there.onnx") == made.file.sha256


@pytest.mark.parametrize("options", [PrecisionOptions(), PrecisionOptions(method="percentile", rest="fp16")])
def test_says_nothing_and_leaves_nothing_else(export, tmp_path, monkeypatch, capfd, options):
    source = export()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=options)
    assert caught == []
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.rglob("*")} == {"net.onnx", "int8.onnx", "work"}


def test_the_layer_with_the_outlier_is_the_most_sensitive(export):
    source = export(outlier=2000.0)
    found = sensitivity(source, IMAGES)
    layers = [node.name for node in onnx.load(source).graph.node if node.op_type in ("Conv", "Gemm")]
    assert sorted(layer.name for layer in found) == sorted(layers)
    assert found[0].name == layers[-1]
    assert [layer.sqnr_db for layer in found] == sorted(layer.sqnr_db for layer in found)
    assert found[0].sqnr_db < found[1].sqnr_db - 10


def test_the_worst_layers_stay_in_float_until_it_agrees(export, tmp_path):
    source = export(outlier=2000.0)
    last = onnx.load(source).graph.node[-1].name
    kept = keep_worst(source, IMAGES, min_sqnr_db=25)
    assert (kept.keep_float, kept.met) == ((last,), True)
    made = convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=kept.options(PrecisionOptions()))
    assert made.kept_float == (last,)
    assert made.agreement == kept.agreement


def test_keeping_layers_ends_at_the_limit(export):
    source = export()
    kept = keep_worst(source, IMAGES, min_sqnr_db=200, limit=1)
    assert (kept.keep_float, kept.met) == ((sensitivity(source, IMAGES)[0].name,), False)
    assert len(keep_worst(source, IMAGES, min_sqnr_db=200, limit=9).keep_float) == 2  # of three: one is left in int8
    assert keep_worst(source, IMAGES, min_sqnr_db=10) == keep_worst(source, IMAGES, min_sqnr_db=10, limit=0)


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="nvidia-modelopt is installed")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_modelopt_is_asked_for(export, tmp_path, precision):
    with pytest.raises(MissingError, match=rf"^{precision} needs .* pip install 'nvidia-modelopt\[onnx\]'$"):
        convert(export(), tmp_path / "other.onnx", precision, IMAGES)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "int4"}, UsageError, "unknown precision 'int4'; known: fp32, fp16, bf16, int8, fp8"),
        ({"method": "mse"}, UsageError, "unknown calibration method 'mse'; known: minmax, entropy, percentile"),
        ({"percentile": 50}, UsageError, "percentile must be above 50 and at most 100, got 50"),
        ({"rest": "bf16"}, UsageError, "the rest of an int8 network is fp32 or fp16, got 'bf16'"),
        ({"keep_float": ("conv9",)}, UsageError, "the network has no node 'conv9' to keep in float"),
        ({"images": IMAGES[:0]}, InputError, "calibration needs images, got 0"),
        ({"images": IMAGES[:, :1]}, InputError, "net.onnx takes images of batch x 3 x 8 x 8, got 40 x 1 x 8 x 8"),
        ({"images": IMAGES.astype(np.float64)}, InputError, "net.onnx takes float32 images, got float64"),
        ({"images": np.where(IMAGES > 3, np.nan, IMAGES)}, InputError, "calibration images hold NaN or infinity"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(export, tmp_path, change, error, message):
    source = export()
    change = dict(change)
    images, precision = change.pop("images", IMAGES), change.pop("precision", "int8")
    with pytest.raises(error) as raised:
        convert(source, tmp_path / "other.onnx", precision, images, options=PrecisionOptions(**change))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_nothing_to_meet():
    with pytest.raises(UsageError, match=r"min_top1 must be 0 to 1, .* got 0.0, 0.0 and 3"):
        keep_worst(Path("net.onnx"), IMAGES)


def test_nothing_left_to_quantise(export, tmp_path):
    source = export()
    names = tuple(node.name for node in onnx.load(source).graph.node)
    with pytest.raises(ExportError, match="no layer is left to quantise; keep fewer layers in float"):
        convert(source, tmp_path / "int8.onnx", "int8", IMAGES, options=PrecisionOptions(keep_float=names))


def test_a_file_that_cannot_be_converted(export, tmp_path):
    source, other = export(), tmp_path / "other.onnx"
    with pytest.raises(ExportError, match=r"cannot read gone\.onnx: No such file"):
        convert(tmp_path / "gone.onnx", other, "fp16", IMAGES)
    (tmp_path / "damaged.onnx").write_bytes(source.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"damaged\.onnx is damaged or no ONNX file"):
        convert(tmp_path / "damaged.onnx", other, "fp16", IMAGES)
    for number, precision in enumerate(("int8", "fp16")):
        done = tmp_path / f"{number}.onnx"
        convert(source, done, precision, IMAGES, options=PrecisionOptions(keep_io=False))
        with pytest.raises(ExportError, match=rf"{number}\.onnx is not in fp32"):
            convert(done, other, "fp16", IMAGES)
    with pytest.raises(ExportError, match="No such file or directory; free the folder or choose another"):
        convert(source, tmp_path / "gone" / "other.onnx", "fp16", IMAGES)
    assert not other.exists()


def test_a_network_that_is_not_finite_in_fp32(export, tmp_path):
    source = export(first=1e30, second=1e30)
    with pytest.raises(VerificationError, match=r"^net\.onnx gives logits that are not finite, first at node "):
        convert(source, tmp_path / "half.onnx", "fp16", IMAGES)
