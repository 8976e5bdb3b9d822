"""Models by name: parameter counts by arithmetic, shapes, and refusals."""

from __future__ import annotations

import builtins

import pytest
import torch
import torchvision

from chipdeploy.errors import MissingError, ModelError
from chipdeploy.training.models import PadShortcut, build_model, model_names, register
from chipdeploy.training.models.origin import code_digest

torch.set_num_threads(1)

SMALL = ["resnet20", "resnet20-b", "mobilenetv2", "resnet18", "preresnet164"]


def build(spec, num_classes=10, in_channels=3, image_size=32):
    return build_model(spec, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def parameters(spec, **sizes):
    """Number of parameters; built without memory, since some of these models are large."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(spec, **sizes).parameters())


def conv_bn(before, after, kernel):
    return before * after * kernel * kernel + 2 * after


def cifar_resnet_count(blocks, projected=False):
    count, before = conv_bn(3, 16, 3), 16
    for planes in (16, 32, 64):
        count += conv_bn(before, planes, 3) + (2 * blocks - 1) * conv_bn(planes, planes, 3)
        count += conv_bn(before, planes, 1) if projected and before != planes else 0
        before = planes
    return count + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5), (44, 7), (56, 9), (110, 18)])
def test_cifar_resnets_have_the_parameters_of_the_paper(depth, blocks):
    assert parameters(f"resnet{depth}") == cifar_resnet_count(blocks)
    assert parameters(f"resnet{depth}-b") == cifar_resnet_count(blocks, projected=True)


def test_published_parameter_counts():
    assert parameters("resnet20") == 269_722
    assert parameters("resnet56") == 853_018


def test_resnet20_names_its_state_as_published_checkpoints_do():
    names = {name.rpartition(".")[0] for name in build("resnet20").state_dict()}
    blocks = {
        f"layer{stage}.{index}.{part}"
        for stage in (1, 2, 3)
        for index in range(3)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert names == blocks | {"conv1", "bn1", "linear"}


def test_pad_shortcut_reads_its_attributes_at_every_call():
    shortcut = PadShortcut(stride=2, before=1, after=2)
    x = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5)
    out = shortcut(x)
    assert out.shape == (2, 6, 3, 3)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert out[:, 0].abs().sum() == 0 and out[:, 4:].abs().sum() == 0
    shortcut.stride, shortcut.before, shortcut.after = 1, 0, 1
    assert torch.equal(shortcut(x)[:, :3], x)


@pytest.mark.parametrize(("inputs", "planes"), [(16, 32), (32, 64)])
def test_option_a_pads_a_quarter_on_each_side(inputs, planes):
    stage = {32: "layer2", 64: "layer3"}[planes]
    shortcut = build("resnet20").get_submodule(f"{stage}.0.shortcut")
    assert (shortcut.stride, shortcut.before, shortcut.after) == (2, planes // 4, planes // 4)
    assert shortcut.before + inputs + shortcut.after == planes


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_resnets_differ_from_torchvision_in_the_stem_only(name, size):
    with torch.device("meta"):
        theirs = {name: value.shape for name, value in torchvision.models.get_model(name).state_dict().items()}
        ours = {name: value.shape for name, value in build(name, 1000, 3, size).state_dict().items()}
    assert list(ours) == list(theirs)
    differing = [key for key in theirs if ours[key] != theirs[key]]
    assert differing == ([] if size == 224 else ["conv1.weight"])


def test_resnet18_and_mobilenetv2_compute_what_torchvision_computes():
    for name in ("resnet18", "mobilenetv2"):
        torch.manual_seed(0)
        theirs = torchvision.models.get_model(name.replace("netv2", "net_v2"), num_classes=7).eval()
        ours = build(name, 7, 3, 96).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 96, 96)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "before_pool"), [(32, 4), (64, 4), (128, 4)])
def test_stems_divide_by_one_two_or_four(size, before_pool):
    # Stages divide by 8: 32 / 1 / 8 = 64 / 2 / 8 = 128 / 4 / 8 = 4.
    shapes = []
    model = build("resnet18", image_size=size).eval()
    model.layer4.register_forward_hook(lambda _m, _x, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    assert shapes == [(1, 512, before_pool, before_pool)]


def test_wideresnet_and_preresnet_parameters():
    # Stem, then blocks: norms before convolutions, one projection a stage.
    count, before = 3 * 16 * 9, 16
    for planes in (192, 384, 768):
        count += 2 * before + before * planes * 9 + 2 * planes + planes * planes * 9 + before * planes
        count += 3 * (2 * planes + planes * planes * 9) * 2
        before = planes
    assert parameters("wideresnet26-12") == count + 2 * 768 + 768 * 10 + 10

    count, before = 3 * 16 * 9, 16
    for planes in (16, 32, 64):
        wide = 4 * planes
        inner = 2 * planes + planes * planes * 9 + 2 * planes + planes * wide
        count += 2 * before + before * planes + inner + before * wide
        count += 17 * (2 * wide + wide * planes + inner)
        before = wide
    assert parameters("preresnet164") == count + 2 * 256 + 256 * 10 + 10


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_shapes_and_gradients(name, channels, size):
    model = build(name, 5, channels, size)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_built_in_name_builds():
    expected = {"mobilenetv2", "preresnet164", "resnet101", "resnet18", "resnet50", "wideresnet26-12"}
    depths = (20, 32, 44, 56, 110)
    assert set(model_names()) == expected | {f"resnet{d}" for d in depths} | {f"resnet{d}-b" for d in depths}
    assert model_names() == sorted(model_names())
    for name in model_names():
        assert parameters(name, in_channels=1) > 100_000


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register("resnet20")(lambda **_: torch.nn.Identity())


def test_initialisation_is_kaiming():
    torch.manual_seed(0)
    weight = build("resnet20").layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # 2 / fan-out


def test_torchvision_models_build():
    model = build("torchvision:resnet18", 7)
    assert type(model) is torchvision.models.ResNet and model.fc.out_features == 7


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_models_give_logits_only(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(torchvision.models, "get_model", lambda n, **k: asked.update(k) or torch.nn.Identity())
    build(f"torchvision:{name}")
    assert asked["aux_logits"] is False and asked["weights"] is None


def test_timm_models_build():
    pytest.importorskip("timm")
    model = build("timm:mobilenetv3_small_050", 7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_missing_timm_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingError, match=r"pip install 'chipdeploy\[zoo\]'"):
        build("timm:resnet18")


FILE = """
import torch
from torch import nn
import neighbour

def some(num_classes):
    return nn.Linear(4, num_classes)

def every(**sizes):
    model = nn.Identity()
    model.sizes = sizes
    return model

class Net(nn.Module):
    def __init__(self, in_channels, image_size=1):
        super().__init__()
        self.sizes = (in_channels, image_size)

def number():
    return 3

def broken():
    raise RuntimeError("first line\\nsecond line")

def needs_more(what):
    return nn.Identity()

constant = 4
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("")
    path = tmp_path / "my model.py"
    path.write_text(FILE)
    return path


def test_a_factory_gets_what_its_signature_accepts(file):
    assert build(f"{file}:some", 7).out_features == 7
    assert build(f"{file}:every", 7, 1, 28).sizes == {"num_classes": 7, "in_channels": 1, "image_size": 28}
    assert build(f"{file}:Net", 7, 1, 28).sizes == (1, 28)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "must return a torch.nn.Module"),
        ("broken", "RuntimeError: first line"),
        ("needs_more", "TypeError"),
        ("constant", "has no function 'constant'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_bad_factories(file, name, message):
    assert message in refusal(f"{file}:{name}")


def test_bad_files(tmp_path):
    assert "does not exist" in refusal(f"{tmp_path / 'absent.py'}:f")
    assert "write 'net.py:FUNCTION'" in refusal("net.py")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    assert "SyntaxError" in refusal(f"{tmp_path / 'wrong.py'}:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("restnet20", "did you mean 'resnet20'?"),
        ("zzz", "unknown model 'zzz'; give"),
        ("", "unknown model ''"),
        ("keras:resnet50", "unknown model 'keras:resnet50'"),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("torchvision:fcn_resnet50", "torchvision has no model"),
    ],
)
def test_unknown_names(spec, message):
    assert message in refusal(spec)


def test_unknown_timm_name():
    pytest.importorskip("timm")
    assert "did you mean" in refusal("timm:resnet501")


def test_torchvision_takes_three_channels():
    assert "3 channels, got 1" in refusal("torchvision:resnet18", in_channels=1)


@pytest.mark.parametrize("what", ["num_classes", "in_channels", "image_size"])
def test_sizes_below_one(what):
    assert f"{what} of a model must be at least 1, got 0" in refusal("resnet20", **{what: 0})


def refusal(spec, **sizes):
    """The message of the ModelError, which must be one line."""
    with pytest.raises(ModelError) as caught:
        build(spec, **sizes)
    assert type(caught.value) is ModelError and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_an_init_file_is_a_package_too(tmp_path):
    """For Python's imports, and so for the digest of what a model's file imports."""
    inner = tmp_path / "parts" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "net.py").write_text("from parts.conv import a\nimport empty\nimport parts.nowhere\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "parts" / "conv.py").write_text("from .inner.deep import a\n")
    (inner / "deep.py").write_text("a = 1\n")
    before = code_digest(tmp_path / "net.py")
    assert code_digest(tmp_path / "net.py") == before
    (inner / "deep.py").write_text("a = 2\n")
    assert code_digest(tmp_path / "net.py") != before
