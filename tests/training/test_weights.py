"""Weights files: what is saved is loaded again, and nothing else is."""

from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch
from torch import nn

from chipdeploy.errors import WeightsError
from chipdeploy.training.weights import load_weights, save_weights

torch.set_num_threads(1)


def network(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    torch.manual_seed(1)
    model = network()
    save_weights(model, path)
    return model, path


def same(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def refusal(model, path):
    """The message of the WeightsError, which must be one line and leave the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_round_trip(saved):
    model, path = saved
    other = network()
    assert not same(model, other)
    load_weights(other, path)
    assert same(model, other)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_torch_files_are_unwrapped(saved, tmp_path, suffix, wrap, prefix):
    model, _ = saved
    path = tmp_path / f"net{suffix}"
    torch.save(wrap({prefix + name: value for name, value in model.state_dict().items()}), path)
    other = network()
    load_weights(other, path)
    assert same(model, other)


def test_a_data_parallel_model_keeps_its_prefix(saved, tmp_path):
    model, _ = saved
    wrapped, other = nn.Sequential(), nn.Sequential()
    wrapped.add_module("module", model)
    other.add_module("module", network())
    save_weights(wrapped, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert same(wrapped, other)


def test_the_count_of_training_steps_may_be_absent(saved, tmp_path):
    model, _ = saved
    state = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    save_weights(state, tmp_path / "w.safetensors")
    other = network()
    load_weights(other, tmp_path / "w.safetensors")
    assert same(model, other)


def test_tied_and_strided_tensors(tmp_path):
    table = torch.arange(12.0).view(3, 4)
    state = {"a": table, "b": table, "turned": table.t(), "row": table[1]}
    save_weights(state, tmp_path / "w.safetensors")
    found = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert list(found) == sorted(state) and all(torch.equal(found[name], state[name]) for name in state)

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    save_weights(model, tmp_path / "tied.safetensors")
    load_weights(model, tmp_path / "tied.safetensors")
    assert model[0].weight is model[1].weight


def test_names_of_another_model(saved):
    _, path = saved
    longer = nn.Sequential(*network(), nn.Linear(2, 2))
    message = refusal(longer, path)
    # Convolution 2, norm 4, linear 2; the longer model has one linear more.
    assert "8 tensors, the model has 10" in message and "'4.weight' is missing from the file" in message
    shorter = nn.Sequential(nn.Conv2d(3, 4, 3))
    message = refusal(shorter, path)
    assert "8 tensors, the model has 2" in message and "'1.bias' is not in the model" in message


def test_shapes_and_types_of_another_model(saved, tmp_path):
    model, path = saved
    assert "'0.bias' is (4,) in the file and (5,) in the model" in refusal(network(5), path)
    save_weights(
        {name: value.to(torch.int32) for name, value in model.state_dict().items()}, tmp_path / "i.safetensors"
    )
    assert "torch.int32 in the file" in refusal(network(), tmp_path / "i.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved, bad):
    model, path = saved
    state = model.state_dict()
    state["1.running_var"][2] = bad
    save_weights(state, path)
    assert "NaN or infinity in '1.running_var'" in refusal(network(), path)


def test_missing_files_and_other_suffixes(tmp_path):
    assert "does not exist" in refusal(network(), tmp_path / "absent.safetensors")
    assert "does not exist" in refusal(network(), tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"x")
    assert "ends in '.onnx'" in refusal(network(), tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_files(saved, tmp_path, suffix, keep):
    model, path = saved
    if suffix == ".pth":
        path = tmp_path / "net.pth"
        torch.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    assert "damaged" in refusal(network(), path)


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(1)], torch.zeros(1), {"state_dict": {}}, {"a": 1}, {1: torch.zeros(1)}]
)
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "holds no state dict" in refusal(network(), tmp_path / "x.pt")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "x.pth")
    assert "holds more than tensors" in refusal(network(), tmp_path / "x.pth")
    assert not (tmp_path / "evil-was-here").exists()


def test_a_failed_save_leaves_the_file_that_was_there(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="the disk is full"):
        save_weights(network(), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    assert model is not None


def test_saving_what_is_no_tensor(tmp_path):
    with pytest.raises(WeightsError, match="entry 'a' is of type int"):
        save_weights({"a": 1}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="cannot write"):
        save_weights({"a": torch.zeros(1)}, tmp_path / "absent" / "x.safetensors")
    assert not list(tmp_path.iterdir())
