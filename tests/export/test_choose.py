"""The fastest precision that holds its accuracy."""

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.engines.target import Target
from chipdeploy.export.choose import choose
from chipdeploy.export.onnx import export_onnx
from chipdeploy.latency.measure import Comparison


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A large network in the place of fp32 and a small one in that of int8: the small one is faster by far."""
    folder, example = tmp_path_factory.mktemp("files"), torch.zeros(2, 3, 32, 32)
    made = {}
    for precision, width in (("fp32", 96), ("fp16", 96), ("int8", 2)):
        layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        path = folder / f"{precision}.onnx"
        export_onnx(nn.Sequential(*layers, nn.Linear(width, 4)), example, path)
        made[Target("ort", "cpu", precision)] = path
    return made


@pytest.mark.parametrize(
    ("int8", "max_drop", "chosen"), [(0.895, 0.5, "int8"), (0.8, 0.5, "fp32"), (0.8, 10.0, "int8")]
)
def test_takes_the_fastest_that_holds(files, int8, max_drop, chosen, monkeypatch):
    monkeypatch.setattr(Comparison, "noise", "")  # whatever else this machine does
    accuracies = {"fp32": 0.9, "fp16": 0.5, "int8": int8}
    best = choose(files, accuracies, (3, 32, 32), max_drop=max_drop, seconds=0.2)
    assert best["precision"] == chosen
    assert best["target"] == Target("ort", "cpu", chosen).name
    rows = {row["precision"]: row for row in best["table"]}
    assert rows["int8"]["ratio"] < 0.5
    assert rows["int8"]["drop_points"] == pytest.approx((0.9 - int8) * 100)
    assert not rows["fp16"]["holds"]
    assert np.isfinite(rows["fp16"]["ratio"])


def test_a_noisy_measurement_is_no_certain_speedup(files, monkeypatch):
    monkeypatch.setattr(Comparison, "noise", "equal blocks lie apart")
    best = choose(files, {"fp32": 0.9, "fp16": 0.9, "int8": 0.9}, (3, 32, 32), max_drop=0.5, seconds=0.2)
    assert best["precision"] == "fp32"
    assert [row.get("noise") for row in best["table"]] == [None, "equal blocks lie apart", "equal blocks lie apart"]
