"""docs/own-model.md holds: its programs run as they stand, and what it says of models is so."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from chipdeploy.errors import ModelError
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import group_widths
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

PAGE = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
STEPS = 60  # of the page's 200


def run(name, folder, monkeypatch):
    """The names that a program of the page leaves behind, run in `folder`."""
    block = next(block for block in BLOCKS if block.startswith(f"# {name}\n"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STEPS", str(STEPS))
    names = {"__name__": name}
    exec(compile(block, name, "exec"), names)
    return names


def check_equal(model, chip, inputs):
    """The plan's cut equals its gated network, on every output."""
    plan = chip.plan()
    gates = torch.from_numpy(plan.mask(chip.graph)).to(inputs[0])
    model.eval()
    with torch.no_grad():
        gated = gated_call(model, Gating(chip.graph), gates, *inputs)
        cut = hard_prune(model, chip.graph, plan)(*inputs)
    pairs = list(zip(pytree.tree_leaves(gated), pytree.tree_leaves(cut), strict=True))
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    return len(pairs)


def macs(net, example):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(example[:1])
    return counter.get_total_flops() // 2


def check_budget(names, keep):
    """Counted by PyTorch on the network that was built, and by the plan."""
    chip, example = names["chip"], names["example"]
    built, dense = macs(names["small"], example), macs(names["dense"], example)
    assert chip.cost.dense == dense
    assert chip.cost.count(group_widths(chip.graph, chip.plan().mask(chip.graph))) == built
    assert 0.9 * keep * dense <= built <= keep * dense


def outputs(path):
    return [value.name for value in onnx.load(path).graph.output]


def test_the_detector(tmp_path, monkeypatch, capsys):
    names = run("detector.py", tmp_path, monkeypatch)
    images = names["held_out"][0][:4]
    assert check_equal(names["soft"], names["chip"], (images,)) == 3
    check_budget(names, 0.4)
    assert outputs(tmp_path / "detector.onnx") == ["p3", "p4", "p5"]
    result = verify_onnx(names["small"], tmp_path / "detector.onnx", images, batches=(1, 3))
    assert result.max_relative_error <= 1e-4
    # Seen after 60 steps: F1 0.57, 0.60 of the dense network.
    _, f1, iou = names["small_score"]
    assert f1 >= 0.4 and iou >= 0.3
    assert f1 >= names["longer_score"][1] - 0.2
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == printed("detector.onnx")


def test_the_unet(tmp_path, monkeypatch, capsys):
    names = run("unet.py", tmp_path, monkeypatch)
    images = names["held_out"][0][:4]
    assert check_equal(names["soft"], names["chip"], (images,)) == 1
    check_budget(names, 0.3)
    assert outputs(tmp_path / "unet.onnx") == ["logits"]
    result = verify_onnx(names["small"], tmp_path / "unet.onnx", images, batches=(1, 3))
    assert result.max_relative_error <= 1e-4
    # Seen after 60 steps: IoU 0.77, 0.86 of the dense network.
    assert names["small_score"] >= 0.6
    assert names["small_score"] >= names["longer_score"] - 0.25
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == printed("unet.onnx")


def printed(last):
    """First words of the lines that the page shows as a program's output, up to the one of its ONNX file."""
    lines = PAGE[: PAGE.index(f"    {last}: ")].splitlines()[-4:]
    return [line.split()[0] for line in lines] + [f"{last}:"]


def test_two_inputs(tmp_path, monkeypatch):
    names = run("two_inputs.py", tmp_path, monkeypatch)
    assert check_equal(names["model"], names["chip"], names["example"]) == 2
    assert [group.name for group in names["graph"].pinned] == ["depth", "classes", "mask"]
    assert names["again"].depth.weight.shape[0] == 8
    assert sum(p.numel() for p in names["again"].parameters()) < sum(p.numel() for p in names["model"].parameters())
    with torch.no_grad():
        for key, value in names["small"].eval()(*names["example"]).items():
            assert torch.equal(names["again"].eval()(*names["example"])[key], value)
    graph = onnx.load(tmp_path / "fusion.onnx").graph
    assert [value.name for value in graph.input] == ["image", "depth"]
    assert [value.name for value in graph.output] == ["class", "mask"]


def test_the_three_lines():
    names = {}
    exec(BLOCKS[0], names)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    small = names["prune"](model, batches, optimizer, batches[0][0], 12)
    assert type(small) is nn.Sequential
    assert macs(small, batches[0][0]) <= 0.3 * macs(model, batches[0][0])


def test_what_inspect_shows(tmp_path, monkeypatch):
    names = run("my_net.py", tmp_path, monkeypatch)
    graph = trace(names["Net"](), torch.zeros(2, 3, 32, 32))
    for group in graph.groups:
        way = "no" if group.branch is None else graph.branches[group.branch].name
        members = ", ".join(group.producers)
        assert re.search(rf"^    {group.name} +{group.size} +{way} +{members}$", PAGE, re.MULTILINE)
    for pinned in graph.pinned:
        assert f"    pinned: {pinned.name} ({pinned.size} channels): {pinned.reason}\n" in PAGE
    (tmp_path / "my_net.py").write_text(next(block for block in BLOCKS if block.startswith("# my_net.py\n")))
    command = [sys.executable, "-m", "chipdeploy.cli", "inspect", "my_net.py:Net"]
    said = subprocess.run(command, cwd=tmp_path, check=True, text=True, capture_output=True).stdout
    shares = [line for line in said.splitlines() if "of the FLOPs" in line]
    assert len(shares) == 2
    for line in shares:
        assert f"    {line}\n" in PAGE


class Net(nn.Module):
    """A network whose middle is the page's example."""

    def __init__(self, middle=lambda net, x: x):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)
        self.width = 16
        self.middle = middle
        self.scale = torch.rand(1, 16, 1, 1) + 1
        self.bias = nn.Parameter(torch.rand(1, 16, 1, 1))
        self.register_buffer("table", torch.rand(1, 16, 1, 1) + 1)

    def forward(self, x):
        return self.head(self.middle(self, F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))


def by_shape(net, x):
    n, c, h, w = x.shape
    return x.view(n, c, h * w).view(n, c, h, w)


MIDDLES = {
    "number": (lambda net, x: x.view(2, 16, 16).view(2, 16, 4, 4), "holds numbers of channels"),
    "shape": (by_shape, None),
    "attribute": (lambda net, x: x.view(2, net.width, 16).view(2, net.width, 4, 4), None),
    "slice": (lambda net, x: torch.cat([x[:, :8] * 2, x[:, 8:]], 1), "holds numbers of channels"),
    "split": (lambda net, x: operator.sub(*x.split(8, 1)).repeat(1, 2, 1, 1), "holds numbers of channels"),
    "chunk": (lambda net, x: torch.cat([part * 2 for part in x.chunk(2, 1)], 1), None),
    "tensor": (lambda net, x: x * net.scale, "a tensor of fixed channels"),
    "parameter": (lambda net, x: x + net.bias, None),
    "buffer": (lambda net, x: x * net.table, None),
    "softmax": (lambda net, x: x.softmax(1), "mixes the channels"),
    "sort": (lambda net, x: x.sort(1).values, "compares the channels"),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_how_to_write_models(name):
    middle, reason = MIDDLES[name]
    graph = trace(Net(middle), torch.randn(2, 3, 8, 8))
    pinned = {group.name: group.reason for group in graph.pinned}
    assert "a" not in pinned
    assert pinned.get("b") is None if reason is None else reason in pinned["b"]


def test_frozen_layers_are_pinned():
    net = Net()
    net.a.weight.requires_grad_(False)
    pinned = {group.name: group.reason for group in trace(net, torch.randn(2, 3, 8, 8)).pinned}
    assert "frozen" in pinned["a"] and "b" not in pinned


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda net, x: x if x.sum() > 0 else -x, "cannot be traced"),
        (lambda net, x: x + torch.randn_like(x), "is random"),
    ],
)
def test_refused(middle, reason):
    with pytest.raises(ModelError, match=reason) as error:
        trace(Net(middle), torch.randn(2, 3, 8, 8))
    assert "\n" not in str(error.value)
