"""Real TensorRT-RTX builds, which need no GPU: manifests, refusals, interruption, and nothing left behind."""

import json
import signal
import threading

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from chipdeploy.engines.base import open_engine
from chipdeploy.engines.build import BuildOptions, build_engine, buildable_gpus
from chipdeploy.engines.target import Target
from chipdeploy.engines.trt import EngineManifest, manifest_path
from chipdeploy.engines.turing import linear_as_convolution
from chipdeploy.errors import ExportError, InputError, MissingError, UsageError
from chipdeploy.files import digest

RTX = Target.parse("rtx-fp32")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def write(path, nodes, weights=(), *, name="images", shape=("batch", 3, 8, 8), out=("batch", 4)):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(out))],
        list(weights),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def network(tmp_path):
    """conv 3x3, ReLU, mean, linear."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((16, 3, 3, 3)).astype(np.float32), "weight")
    matrix = numpy_helper.from_array(rng.standard_normal((4, 16)).astype(np.float32), "matrix")
    bias = numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), "bias")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "matrix", "bias"], ["logits"], name="linear", transB=1),
    ]
    return write(tmp_path / "net.onnx", nodes, [weight, matrix, bias])


def test_an_engine_has_a_manifest(network, tmp_path):
    path = tmp_path / "net.engine"
    steps = []
    options = BuildOptions(batches=(1, 4, 16), gpus=("sm86", "sm120"))
    built = build_engine(network, path, RTX, options, on_progress=lambda *step: steps.append(step))
    assert built == EngineManifest.read(path)
    assert built.runtime == "tensorrt_rtx"
    assert built.gpus == ("sm86", "sm120")
    assert built.batches == (1, 4, 16)
    assert built.input_shape == (3, 8, 8)
    assert built.onnx_sha256 == digest(network)
    assert built.bytes == path.stat().st_size > 10_000
    assert steps
    assert all(1 <= done <= size for _, done, size in steps)


@pytest.mark.parametrize("gpu", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"])
def test_builds_for_every_gpu_that_it_names(network, tmp_path, gpu):
    assert gpu in buildable_gpus()
    assert build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=(gpu,))).gpus == (gpu,)


def test_an_edited_engine_or_manifest_is_refused(network, tmp_path):
    path = tmp_path / "x.engine"
    build_engine(network, path, RTX, BuildOptions(gpus=("sm86",)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"x.engine was edited since it was built"):
        open_engine("rtx-fp32", path)
    manifest_path(path).write_text(json.dumps({"schema": 1, "runtime": "x"}))
    with pytest.raises(ExportError, match=r"x.engine.json is damaged"):
        open_engine("rtx-fp32", path)
    manifest_path(path).unlink()
    with pytest.raises(ExportError, match=r"no x.engine.json"):
        open_engine("rtx-fp32", path)


def test_a_manifest_says_what_the_engine_does_not_take(network, tmp_path):
    manifest = build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(batches=(2, 4, 8), gpus=("sm86", "sm89")))
    manifest.check_batch(8, "x")
    manifest.check_gpu("sm89", "x")
    for batch in (1, 9):
        with pytest.raises(InputError, match=f"x takes batches of 2 to 8, got {batch}"):
            manifest.check_batch(batch, "x")
    with pytest.raises(ExportError, match="x was built for sm86, sm89, this GPU is sm90; build it here"):
        manifest.check_gpu("sm90", "x")


def test_an_engine_of_another_precision_is_refused(network, tmp_path):
    build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)))
    with pytest.raises(ExportError, match="is a tensorrt_rtx engine in fp32, asked for tensorrt_rtx in fp16"):
        open_engine("rtx-fp16", tmp_path / "x.engine")


@NO_GPU
def test_running_without_a_gpu_is_refused(network, tmp_path):
    build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)))
    with pytest.raises(MissingError, match="rtx-fp32 runs on an NVIDIA GPU and none is here"):
        open_engine("rtx-fp32", tmp_path / "x.engine")


@NO_GPU
def test_building_for_this_gpu_without_one_is_refused(network, tmp_path):
    with pytest.raises(MissingError, match="no GPU is here to build rtx-fp32 on; name the GPUs with --gpu"):
        build_engine(network, tmp_path / "x.engine", RTX)


def test_an_unknown_gpu_names_the_known_ones(network, tmp_path):
    with pytest.raises(UsageError, match=r"does not build for sm90; known: sm75, .*sm121"):
        build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm90",)))


@pytest.mark.parametrize("bad", [{"batches": (0, 1, 1)}, {"batches": (4, 2, 8)}, {"level": 6}, {"workspace_mb": 0}])
def test_options_out_of_range(bad):
    with pytest.raises(UsageError):
        BuildOptions(**bad)


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        ([helper.make_node("StringNormalizer", ["images"], ["logits"], name="odd")], (), "StringNormalizer 'odd'"),
        ([helper.make_node("Conv", ["images", "w"], ["logits"], name="wide", pads=[1, 1, 1, 1])], "w", "Conv 'wide'"),
    ],
)
def test_a_graph_that_the_parser_refuses_names_the_node(tmp_path, nodes, weights, message):
    wrong = [numpy_helper.from_array(np.ones((4, 5, 3, 3), np.float32), "w")] if weights else []
    path = write(tmp_path / "odd.onnx", nodes, wrong)
    with pytest.raises(ExportError) as error:
        build_engine(path, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)))
    assert "tensorrt_rtx does not take odd.onnx" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.onnx"]


def test_a_file_that_is_no_network(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a network")
    with pytest.raises(ExportError, match=r"x.onnx"):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)))


def test_another_input_name_is_refused(tmp_path):
    path = write(tmp_path / "n.onnx", [helper.make_node("Relu", ["pixels"], ["logits"])], name="pixels")
    with pytest.raises(ExportError, match=r"needs one input 'images'.*got pixels"):
        build_engine(path, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)))


def test_a_full_disk_leaves_the_old_engine(network, tmp_path):
    path = tmp_path / "x.engine"
    build_engine(network, path, RTX, BuildOptions(gpus=("sm86",)))
    before = path.read_bytes()
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot write"):
            build_engine(network, path, RTX, BuildOptions(gpus=("sm89",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert EngineManifest.read(path).gpus == ("sm86",)


def test_ctrl_c_ends_a_build(network, tmp_path):
    import _thread

    fired = threading.Event()

    def interrupt(*_):
        if not fired.is_set():
            fired.set()
            _thread.interrupt_main()

    # Where the tests were started in the background, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",)), on_progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    # the process is as good as new
    assert build_engine(network, tmp_path / "x.engine", RTX, BuildOptions(gpus=("sm86",))).bytes > 0


def test_a_linear_layer_as_a_convolution_has_the_same_numbers(network, tmp_path):
    (tmp_path / "c.onnx").write_bytes(linear_as_convolution(network))
    ops = [node.op_type for node in onnx.load(tmp_path / "c.onnx").graph.node]
    assert "Gemm" not in ops
    assert ops.count("Conv") == 2
    images = np.random.default_rng(1).standard_normal((3, 3, 8, 8), dtype=np.float32)
    one, other = (open_engine("ort-cpu", path).run(images) for path in (network, tmp_path / "c.onnx"))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_tensorrt_missing_names_the_pip_line(network, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    if __import__("importlib.util", fromlist=["util"]).find_spec("tensorrt"):
        pytest.skip("TensorRT is here")
    with pytest.raises(MissingError, match=r"tensorrt is not installed; run: pip install 'chipdeploy\[trt\]'"):
        build_engine(network, tmp_path / "x.engine", Target.parse("trt-fp16"))
