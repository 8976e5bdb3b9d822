"""The ONNX Runtime engine: the right numbers from a real session, and one line for everything that can be wrong."""

from importlib import metadata

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from chipdeploy.engines import ort
from chipdeploy.engines.base import engine, open_engine
from chipdeploy.errors import ExportError, InputError, MissingError, UsageError


@pytest.fixture
def conv_file(tmp_path):
    """A 1x1 convolution of 2 channels into 1: 2 a + 3 b + 1, averaged over the picture."""
    weight = numpy_helper.from_array(np.array([2, 3], np.float32).reshape(1, 2, 1, 1), "weight")
    bias = numpy_helper.from_array(np.array([1], np.float32), "bias")
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [weight, bias],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_network_of_several_outputs_is_refused(conv_file):
    proto = onnx.load(conv_file)
    proto.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 1, 1, 1]))
    onnx.save(proto, conv_file)
    with pytest.raises(ExportError, match=r"net.onnx gives 2 outputs; an engine runs networks that give one"):
        open_engine("ort-cpu", conv_file)


def test_runs_the_network(conv_file):
    images = np.ones((3, 2, 4, 4), np.float32)
    images[1, 0], images[2, 1] = 5, -1
    logits = open_engine("ort-cpu", conv_file).run(images)
    # 2·1 + 3·1 + 1, 2·5 + 3·1 + 1, 2·1 - 3·1 + 1
    assert logits.tolist() == [[6], [14], [0]]


def test_is_set_up_for_timing(conv_file, monkeypatch):
    import onnxruntime

    options = []
    session = onnxruntime.InferenceSession

    def spy(*args, **kwargs):
        options.append(kwargs["sess_options"])
        return session(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    described = open_engine("ort-cpu", conv_file, threads=2).describe()
    assert described["threads"] == options[0].intra_op_num_threads == 2
    assert options[0].inter_op_num_threads == 1
    assert options[0].execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options[0].get_session_config_entry("session.inter_op.allow_spinning") == "0"
    assert described["providers"] == ["CPUExecutionProvider"]
    assert described["input"] == ["batch", 2, 4, 4]
    assert described["onnxruntime"] == metadata.version("onnxruntime")


def test_one_thread_unless_told_otherwise(conv_file):
    assert open_engine("ort-cpu", conv_file).describe()["threads"] == 1


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 2, 4, 5), (2, 4, 4), (1, 1, 2, 4, 4), (0, 2, 4, 4)])
def test_refuses_other_shapes(conv_file, shape):
    with pytest.raises(InputError) as error:
        open_engine("ort-cpu", conv_file).run(np.zeros(shape, np.float32))
    assert "takes images of batch x 2 x 4 x 4, got " + " x ".join(map(str, shape)) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_other_types(conv_file):
    with pytest.raises(InputError, match=r"takes float32 images, got float64; use images.astype\('float32'\)"):
        open_engine("ort-cpu", conv_file).run(np.zeros((1, 2, 4, 4)))


@pytest.mark.parametrize("content", [b"", b"not a network", b"\x08\x07"])
def test_refuses_a_damaged_file(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"^broken\.onnx is not a network that ONNX Runtime can load") as error:
        open_engine("ort-cpu", path)
    assert "\n" not in str(error.value)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ExportError, match=r"no ONNX file 'none\.onnx'"):
        open_engine("ort-cpu", tmp_path / "none.onnx")


def test_refuses_bad_options(conv_file):
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        open_engine("ort-cpu", conv_file, threads=0)
    with pytest.raises(UsageError, match="ort-cpu has no option streams; known: threads"):
        open_engine("ort-cpu", conv_file, streams=2)


def test_a_runtime_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        engine("ort")(ort.open_ort)


def test_runs_files_and_nothing_else():
    with pytest.raises(UsageError, match="ort-cpu runs an ONNX file, got a Flatten; export it first"):
        open_engine("ort-cpu", torch.nn.Flatten())


def test_has_no_stopwatch_where_host_and_device_are_one(conv_file):
    assert open_engine("ort-cpu", conv_file).stopwatch(np.ones((1, 2, 4, 4), np.float32)) is None


def test_cuda_is_never_replaced_by_the_cpu(conv_file):
    with pytest.raises(MissingError, match=r"no CUDAExecutionProvider; run: .*chipdeploy.gpu"):
        open_engine("ort-cuda", conv_file)


def test_layer_times_come_from_the_runtime(conv_file):
    times = open_engine("ort-cpu", conv_file).layer_times(np.ones((4, 2, 4, 4), np.float32), runs=5)
    # ONNX Runtime may put changes of layout between them, which cost time and are told, too.
    assert {"Conv", "GlobalAveragePool", "Flatten"} <= {layer.kind for layer in times}
    assert all(layer.ms >= 0 for layer in times)
    assert sum(layer.ms for layer in times) > 0
    assert list(conv_file.parent.iterdir()) == [conv_file]


def test_a_missing_package_names_the_pip_line(conv_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"pip install 'chipdeploy\[cpu\]'"):
        open_engine("ort-cpu", conv_file)


def test_refuses_both_distributions(conv_file, monkeypatch):
    monkeypatch.setattr(ort.metadata, "version", lambda name: "1.32.0")
    with pytest.raises(MissingError, match="onnxruntime and onnxruntime-gpu are both installed"):
        open_engine("ort-cpu", conv_file)


def test_refuses_another_provider(conv_file, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda self: ["AzureExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(MissingError, match="asked ONNX Runtime for CPUExecutionProvider, got AzureExecutionProvider"):
        open_engine("ort-cpu", conv_file)
