"""config.pbtxt, read by Triton's own schema."""

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest
from google.protobuf import text_format

from chipdeploy.errors import UsageError
from chipdeploy.export.preprocess import Port
from chipdeploy.export.triton import TritonModel, check_name, preferred_batches

IMAGES, LOGITS = Port("images", "float32", ("batch", 3, 32, 48)), Port("logits", "float32", ("batch", 10))
BYTES = Port("images_uint8", "uint8", ("batch", 32, 48, 3))
BEST = [Port("probabilities", "float32", ("batch", 5)), Port("classes", "int64", ("batch", 5))]


@pytest.fixture(scope="session")
def schema():
    """Triton's messages. The file is loaded by itself: its package would import a gRPC client."""
    path = metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(schema):
    """The message that a text holds; a field that Triton does not know is an error."""

    def read(text):
        return text_format.Parse(text, schema.ModelConfig())

    return read


def test_a_network_of_onnx_runtime(schema, parse):
    model = TritonModel("ship-it.v2", "onnxruntime", [IMAGES], [LOGITS], 64, (32, 64), False, "logits")
    config = parse(model.config())
    assert (config.name, config.platform, config.backend) == ("ship-it.v2", "onnxruntime_onnx", "onnxruntime")
    assert model.file == "1/model.onnx"
    assert config.max_batch_size == 64
    (images,), (logits,) = config.input, config.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", schema.TYPE_FP32, [3, 32, 48])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", schema.TYPE_FP32, [10])
    assert logits.label_filename == "labels.txt"
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, schema.ModelInstanceGroup.KIND_CPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [32, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 100


def test_a_network_that_takes_bytes_and_ranks_classes(schema, parse):
    config = parse(TritonModel("m", "onnxruntime", [BYTES], BEST, 8, (4, 8), True).config())
    (images,) = config.input
    assert (images.name, images.data_type, list(images.dims)) == ("images_uint8", schema.TYPE_UINT8, [32, 48, 3])
    found = [(output.name, output.data_type, list(output.dims)) for output in config.output]
    assert found == [("probabilities", schema.TYPE_FP32, [5]), ("classes", schema.TYPE_INT64, [5])]
    # The third best is not class 2: names would be wrong.
    assert not any(output.label_filename for output in config.output)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_an_engine(schema, parse):
    half = [Port(port.name, "float16", port.shape) for port in (IMAGES, LOGITS)]
    model = TritonModel("m_trt", "tensorrt", half[:1], half[1:], 32, (8, 32), True, "logits")
    config = parse(model.config())
    assert (config.platform, config.backend, model.file) == ("tensorrt_plan", "tensorrt", "1/model.plan")
    assert config.input[0].data_type == config.output[0].data_type == schema.TYPE_FP16
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_one_image_at_a_time_is_not_batched(parse):
    config = parse(TritonModel("m", "onnxruntime", [IMAGES], [LOGITS], 1, (1,), False).config())
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")


def test_odd_names_of_tensors_are_quoted(parse):
    odd = Port('a "b"\\c\né', "float32", ("batch", 2))
    assert parse(TritonModel("m", "onnxruntime", [IMAGES], [odd], 4, (4,), False).config()).output[0].name == odd.name


@pytest.mark.parametrize(("largest", "expected"), [(1, (1,)), (2, (1, 2)), (7, (3, 7)), (64, (32, 64))])
def test_preferred_batches(largest, expected):
    assert preferred_batches(largest) == expected


@pytest.mark.parametrize("name", ["m", "resnet20", "Resnet-20_fp16.v1", "0", "x" * 100])
def test_names_that_triton_serves(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "-m", ".m", "a/b", "a\\b", "a b", "é", "m\n", 'm"', "x" * 101])
def test_names_that_triton_does_not_serve(name):
    with pytest.raises(UsageError, match=r"^a model's name is up to 100 letters") as error:
        check_name(name)
    assert "\n" not in str(error.value)
