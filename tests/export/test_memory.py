"""The memory that an ONNX file plans, against sums made by hand."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from chipdeploy.errors import ExportError
from chipdeploy.export.memory import Footprint, footprint
from chipdeploy.export.onnx import export_onnx

SIDE = 8


class Branches(nn.Module):
    """A stream of 8 channels is alive beside a branch of 16."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1, bias=False)
        self.back, self.head = nn.Conv2d(16, 8, 1, bias=False), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.back(torch.relu(self.wide(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "net.onnx"
    export_onnx(Branches().eval(), torch.randn(2, 3, SIDE, SIDE), path)
    return path


def saved(nodes, ends, path, weights=()):
    made = [
        helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.tobytes(), raw=True)
        for name, values in weights
    ]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in one] for one in ends)
    graph = helper.make_graph(nodes, "net", inputs, outputs, made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", [1, 4])
def test_the_peak_is_where_the_stream_waits_for_its_branch(file, batch):
    found = footprint(file, batch)
    assert found.weights == 4 * sum(p.numel() for p in Branches().parameters())
    # relu(wide) is written over wide; then back is made while the stream is still needed.
    assert found.activations == batch * 4 * SIDE * SIDE * (8 + 16 + 8)


def test_a_view_takes_nothing_and_what_is_read_again_is_not_written_over(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["positive"]),  # x's buffer may go
        helper.make_node("Sigmoid", ["positive"], ["gate"]),  # positive is read below
        helper.make_node("Mul", ["positive", "gate"], ["y"]),
    ]
    path = saved(nodes, ([("x", (2, 3, 4))], [("y", (2, 12))]), tmp_path / "views.onnx")
    assert footprint(path, 2) == Footprint(0, 2 * 24 * 4)


def test_an_input_that_is_read_last_of_all_stays(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["y"]),
    ]
    weight = np.zeros((6, 6), np.float32)
    path = saved(nodes, ([("x", ("n", 6))], [("y", ("n", 6))]), tmp_path / "late.onnx", [("w", weight)])
    assert footprint(path, 3) == Footprint(36 * 4, 3 * 3 * 6 * 4)


def test_other_precisions_are_shares(file):
    whole = footprint(file, 1)
    assert whole.at("fp16") == Footprint(whole.weights // 2, whole.activations // 2)
    # int8 is of what goes into a layer; what comes out is not.
    assert whole.at("int8") == Footprint(whole.weights // 4, whole.activations)
    assert whole.mb == (whole.weights + whole.activations) / 1e6


def test_sizes_that_depend_on_what_is_seen_are_refused(tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["places"])]
    path = saved(nodes, ([("x", ("n", 6))], [("places", None)]), tmp_path / "open.onnx")
    with pytest.raises(ExportError, match=r"sizes in open.onnx: what NonZero gives is as large as the images say"):
        footprint(path, 1)


def test_sizes_that_no_inference_of_shapes_tells_are_measured(tmp_path):
    """A shape that is computed: [n, 2, 12] from [n, 24]; what computes it is no activation to speak of."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["wanted"], axis=0),
        helper.make_node("Expand", ["one", "wanted"], ["ones"]),
        helper.make_node("Reshape", ["a", "wanted"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    weights = [
        ("w", np.zeros((6, 24), np.float32)),
        ("v", np.zeros((12, 3), np.float32)),
        ("one", np.ones((1, 1, 1), np.float32)),
    ]
    path = saved(nodes, ([("x", ("n", 6))], [("y", None), ("ones", None)]), tmp_path / "computed.onnx", weights)
    proto = onnx.load(path)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(values, np.int64), name)
        for name, values in (("zero", [0]), ("rest", [2, 12]))
    )
    onnx.save(proto, path)
    found = {batch: footprint(path, batch) for batch in (1, 5, 50)}
    assert all(one.weights == 4 * (6 * 24 + 12 * 3 + 1) for one in found.values())
    # a, which is b, beside ones and y.
    assert found[50].activations - found[5].activations == 45 * 4 * (24 + 24 + 6)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "none.onnx"
    path.write_bytes(b"no file of ONNX")
    with pytest.raises(ExportError, match=r"cannot tell the sizes in none.onnx.*export it again") as caught:
        footprint(path, 1)
    assert "\n" not in str(caught.value)
