"""The torch engine on the CPU: the module's own numbers, the caller's module and settings untouched."""

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.engines.base import open_engine
from chipdeploy.errors import InputError, MissingError, UsageError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


IMAGES = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)


def expected(network):
    with torch.no_grad():
        return network.eval()(torch.from_numpy(IMAGES)).numpy()


@pytest.mark.parametrize(("target", "tolerance"), [("torch-cpu", 1e-6), ("torch-cpu-bf16", 2e-2)])
def test_runs_the_module_in_eval_mode(network, target, tolerance):
    network.train()
    engine = open_engine(target, network)
    got = engine.run(IMAGES)
    assert network.training
    assert next(network.parameters()).dtype == torch.float32
    assert got.dtype == np.float32
    assert np.abs(got - expected(network)).max() <= tolerance * np.abs(got).max()
    assert engine.name == target
    assert engine.stopwatch(IMAGES) is None


def test_compiled_equals_eager(network):
    got = open_engine("torch-cpu-compile", network).run(IMAGES)
    assert np.abs(got - expected(network)).max() <= 1e-5 * np.abs(got).max()


def test_threads_are_its_own(network):
    before = torch.get_num_threads()
    engine = open_engine("torch-cpu", network, threads=2)
    engine.run(IMAGES)
    assert torch.get_num_threads() == before
    assert engine.describe()["threads"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said(network):
    with pytest.raises(MissingError, match="torch-cuda-fp16 runs on an NVIDIA GPU and none is here"):
        open_engine("torch-cuda-fp16", network)


def test_refusals(network, tmp_path):
    with pytest.raises(UsageError, match=r"torch-cpu runs a torch module, got the file x.onnx"):
        open_engine("torch-cpu", tmp_path / "x.onnx")
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        open_engine("torch-cpu", network, threads=0)
    with pytest.raises(UsageError, match="torch-cpu has no option graph; known: threads"):
        open_engine("torch-cpu", network, graph=1)
    with pytest.raises(InputError, match="takes float32 images, got float64"):
        open_engine("torch-cpu", network).run(IMAGES.astype(np.float64))
    with pytest.raises(UsageError, match="does not tell the times of layers"):
        open_engine("torch-cpu", network).layer_times(IMAGES, 1)
