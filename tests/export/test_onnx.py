"""Exported files: every batch size, nothing of this machine, and no trace of a failure."""

import copy
import sys
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from chipdeploy.engines.base import open_engine
from chipdeploy.errors import ExportError, UsageError
from chipdeploy.export.onnx import check_digest, export_onnx, model_digest
from chipdeploy.training.models import build_model

Pair = namedtuple("Pair", ["boxes", "scores"])


class SmallNet(nn.Module):
    """Two convolutions with norms, a residual sum, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(out + self.bn2(self.conv2(out)))
        return self.linear(torch.flatten(nn.functional.adaptive_avg_pool2d(out, 1), 1))


def small_net():
    """A SmallNet whose norms have seen something: fresh ones change next to nothing."""
    torch.manual_seed(0)
    net = SmallNet()
    for norm in (net.bn1, net.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    net = small_net().train()
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    meta = {"model": f"{Path.cwd()}/nets/mine.py:small", "classes": "5"}
    return net, export_onnx(net, torch.randn(1, 3, 8, 8), path, metadata=meta)


def test_the_memory_format_of_the_weights_leaves_no_ops(tmp_path):
    model = build_model("resnet20", num_classes=10, in_channels=3, image_size=8).eval()
    plain = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "plain.onnx")
    last = export_onnx(model.to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8), tmp_path / "last.onnx")
    assert last.op_types == plain.op_types


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_batch_size_runs(exported, batch):
    net, file = exported
    images = torch.randn(batch, 3, 8, 8)
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(images).numpy()
    got = open_engine("ort-cpu", file.path).run(images.numpy())
    assert got.shape == (batch, 5)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_model_stays_as_it_was(exported):
    net, _ = exported
    assert net.training
    for name, value in small_net().state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


def test_tensors_have_stable_names(exported):
    graph = onnx.load(exported[1].path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_record_matches_the_file(exported):
    _, file = exported
    graph = onnx.load(file.path).graph
    assert file.bytes == file.path.stat().st_size
    assert file.sha256 == model_digest(file.path)
    assert file.ops == len(graph.node) == sum(file.op_types.values())
    assert file.op_types["Conv"] == 2
    assert "BatchNormalization" not in file.op_types  # folded into the convolutions
    assert file.to_dict() == {
        "file": "net.onnx",
        "sha256": file.sha256,
        "bytes": file.bytes,
        "ops": file.ops,
        "op_types": file.op_types,
    }


def test_the_file_holds_no_place_of_this_machine(exported):
    _, file = exported
    content = file.path.read_bytes()
    for place in (Path.cwd(), Path.home(), Path(sys.prefix), Path(torch.__file__).parent, file.path.parent):
        assert str(place).encode() not in content or len(place.parts) < 2
    assert b".py" not in content.replace(b"mine.py:small", b"")
    model = onnx.load(file.path)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.graph.metadata_props


def test_the_file_says_what_it_is(exported):
    model = onnx.load(exported[1].path)
    written = {entry.key: entry.value for entry in model.metadata_props}
    assert written.keys() == {"model", "classes", "chipdeploy_version"}
    assert (written["model"], written["classes"]) == ("mine.py:small", "5")


def test_the_same_network_gives_the_same_bytes(exported, tmp_path):
    net, file = exported
    meta = {"model": "mine.py:small", "classes": "5"}
    assert export_onnx(net, torch.randn(4, 3, 8, 8), tmp_path / "b.onnx", metadata=meta).sha256 == file.sha256


def test_says_nothing(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(small_net(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_an_edited_file_is_refused(exported, tmp_path):
    _, file = exported
    check_digest(file.path, file.sha256)
    edited = tmp_path / "net.onnx"
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2] ^= 1
    edited.write_bytes(content)
    with pytest.raises(ExportError, match=r"^net\.onnx was edited since export"):
        check_digest(edited, file.sha256)
    with pytest.raises(ExportError, match=r"cannot read gone\.onnx"):
        check_digest(tmp_path / "gone.onnx", file.sha256)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class OneFixed(nn.Module):
    def forward(self, x):
        return {"all": x + 1, "mean": x.mean(0)}


class SaysHowMany(nn.Module):
    def forward(self, x):
        return x + 1, {"count": 3}


class BatchMean(nn.Module):
    def forward(self, x):
        return x.mean(0)


class NoOnnxOp(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("net", "cause"),
    [
        (FixedBatch(), "could not trace the network: .*specialized"),
        (Branching(), "could not trace the network: .*data-dependent"),
        (OneFixed(), "^the output mean has no free batch size; remove code that fixes the batch"),
        (SaysHowMany(), "the network returns 3 as output_1_count, which is no tensor; return tensors only"),
        (BatchMean(), "the output has no free batch size"),
        (NoOnnxOp(), "could not convert the network to ONNX: .*linalg_eig"),
        (Raises(), "could not trace the network: ValueError: first line second line"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_failure_is_one_line_and_leaves_what_was_there(tmp_path, capfd, net, cause):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match=cause) as error:
        export_onnx(net, torch.randn(2, 3, 8, 8), path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_fails_the_checker_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise onnx.checker.ValidationError("bad graph")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="could not check the ONNX graph: ValidationError: bad graph"):
        export_onnx(small_net(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ExportError, match="No such file or directory; free the folder or choose another"):
        export_onnx(small_net(), torch.randn(2, 3, 8, 8), tmp_path / "gone" / "net.onnx")


def test_refuses_a_fixed_batch():
    with pytest.raises(UsageError, match="max_batch must be at least 2"):
        export_onnx(small_net(), torch.randn(2, 3, 8, 8), Path("net.onnx"), max_batch=1)


class Joined(nn.Module):
    """Two images and any number of vectors; the keys of what it returns are what the exporter calls values inside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depth_conv = nn.Conv2d(1, 4, 3)

    def forward(self, image, depth, *vectors):
        out = torch.relu(self.conv(image)) + self.depth_conv(depth)
        for vector in vectors:
            out = out + vector[:, :, None, None]
        return {"relu": out.mean((2, 3)), "conv2d": [out, out.sigmoid()], "add": out, "depth": depth}


def inputs(count):
    draw = torch.Generator().manual_seed(count)
    shapes = ((3, 8, 8), (1, 8, 8), (4,), (4,))
    return tuple(torch.randn(count, *shape, generator=draw) for shape in shapes)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    torch.manual_seed(0)
    net = Joined()
    return net, export_onnx(net, inputs(1), tmp_path_factory.mktemp("joined") / "net.onnx")


def test_inputs_bear_the_parameters_names_and_outputs_the_keys(joined):
    graph = onnx.load(joined[1].path).graph
    assert [value.name for value in graph.input] == ["image", "depth", "vectors_0", "vectors_1"]
    # `depth` is taken: it is an input.
    assert [value.name for value in graph.output] == ["relu", "conv2d_0", "conv2d_1", "add", "output_depth"]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("batch", [1, 3])
def test_every_output_is_the_network_s_own(joined, batch):
    net, file = joined
    session = onnxruntime.InferenceSession(file.path)
    values = inputs(batch)
    names = [value.name for value in session.get_inputs()]
    got = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
    with torch.no_grad():
        expected = net(*values)
    wanted = [expected["relu"], *expected["conv2d"], expected["add"], expected["depth"]]
    assert len(got) == len(wanted)
    for a, b in zip(wanted, got, strict=True):
        assert np.abs(a.numpy() - b).max() <= 1e-5 * a.abs().max()


class Returns(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return self.shape(x * 2, x + 1)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (lambda a, b: (a, b), ["output_0", "output_1"]),
        (lambda a, b: [a, {"mask": b}], ["output_0", "output_1_mask"]),
        (lambda a, b: OrderedDict(boxes=a, scores=b), ["boxes", "scores"]),
        (lambda a, b: Pair(boxes=a, scores=b), ["boxes", "scores"]),
        (lambda a, b: {"a": [a, b], "a_1": a}, ["output_0", "output_1", "output_2"]),  # the keys alone are ambiguous
        (lambda a, b: {"out": a - b}, ["logits"]),
    ],
)
def test_names_of_outputs(tmp_path, shape, names):
    file = export_onnx(Returns(shape), torch.randn(2, 3), tmp_path / "net.onnx")
    graph = onnx.load(file.path).graph
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == names


def test_whole_numbers_stay_whole(tmp_path):
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, x, kind):
            return x + self.table(kind)

    file = export_onnx(Embedded(), (torch.randn(2, 3).double(), torch.tensor([1, 4])), tmp_path / "net.onnx")
    graph = onnx.load(file.path).graph
    types = [value.type.tensor_type.elem_type for value in graph.input]
    assert types == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize(
    ("example", "got"),
    [
        ((torch.zeros(2, 3), torch.zeros(1, 3)), r"got \[\[2, 3\], \[1, 3\]\]"),
        ((torch.zeros(2, 3), torch.tensor(1.0)), r"got \[\[2, 3\], \[\]\]"),
        ((torch.zeros(2, 3), 5), r"got \[\[2, 3\], 'int'\]"),
        (torch.zeros(0, 3), r"got \[\[0, 3\]\]"),
        ((), r"got \[\]"),
    ],
)
def test_refuses_inputs_without_one_batch_size(tmp_path, example, got):
    with pytest.raises(
        ExportError, match=f"every input must be a tensor \\[N, ...\\], of one batch size .*{got}"
    ) as error:
        export_onnx(Joined(), example, tmp_path / "net.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_removed_branch_leaves_no_op(tmp_path):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x) + torch.zeros_like(self.net(x))

    dead = export_onnx(Dead(), torch.randn(2, 3, 8, 8), tmp_path / "dead.onnx")
    alive = export_onnx(small_net(), torch.randn(2, 3, 8, 8), tmp_path / "alive.onnx")
    assert dead.op_types == alive.op_types


def test_a_removed_branch_may_end_in_an_output(tmp_path):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            out = self.conv(x)
            return {"sum": out + torch.zeros_like(out), "cat": torch.cat([out[:, :0], out], 1), "out": out * 2}

    torch.manual_seed(0)
    net = Dead()
    file = export_onnx(net, torch.randn(2, 3, 8, 8), tmp_path / "dead.onnx")
    assert not {"Add", "Concat", "Expand", "ConstantOfShape"} & set(file.op_types)
    images = torch.randn(3, 3, 8, 8)
    got = onnxruntime.InferenceSession(file.path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        for a, b in zip(net(images).values(), got, strict=True):
            assert np.abs(a.numpy() - b).max() <= 1e-5 * a.abs().max()


class Taken(SmallNet):
    """Its own parameters have the names of the file's input and output."""

    def __init__(self):
        super().__init__()
        self.images, self.logits = nn.Parameter(torch.rand(3, 1, 1)), nn.Parameter(torch.rand(5))

    def forward(self, x):
        return super().forward(x * self.images) * self.logits


def test_parameters_may_be_called_images_and_logits(tmp_path):
    net, images = Taken().eval(), torch.randn(3, 3, 8, 8)
    session = onnxruntime.InferenceSession(export_onnx(net, images, tmp_path / "net.onnx").path)
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    (got,) = session.run(None, {"images": images.numpy()})
    assert np.allclose(got, net(images).detach().numpy(), atol=1e-5)


def test_a_pooling_that_the_exporter_would_change_is_refused(tmp_path):
    class Pooled(SmallNet):
        def forward(self, x):
            return super().forward(nn.functional.avg_pool2d(x, 2, divisor_override=3))

    with pytest.raises(ExportError, match="divisor_override=3"):
        export_onnx(Pooled(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
