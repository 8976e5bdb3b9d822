"""Checkpoints: what goes in comes out, bit by bit, and a failure leaves what was there."""

import struct

import pytest
import torch
from torch import nn

from chipdeploy import checkpoint
from chipdeploy.errors import RunError
from chipdeploy.training.orthogonal import OrthogonalSGD


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


OPTIMIZERS = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "orthogonal": lambda model: OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=1e-3),
}


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, name):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    checkpoint.save(tmp_path / "c.safetensors", checkpoint.pack("m", model) | checkpoint.pack("o", optimizer), {"n": 3})
    other = network()
    again = OPTIMIZERS[name](other)
    tensors, facts = checkpoint.load(tmp_path / "c.safetensors")
    checkpoint.unpack("m", tensors, other)
    checkpoint.unpack("o", tensors, again)
    assert facts == {"n": 3}
    train(model, optimizer, 2)
    train(other, again, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_the_state_of_another_optimizer_is_refused():
    model = network()
    sgd = OPTIMIZERS["momentum"](model)
    train(model, sgd, 1)
    with pytest.raises(RunError, match="another optimizer"):
        checkpoint.unpack("o", checkpoint.pack("o", sgd), OPTIMIZERS["orthogonal"](model))


def test_one_prefix_is_not_taken_for_another(tmp_path):
    model, longer = nn.Linear(2, 2), nn.Linear(2, 2)
    tensors = checkpoint.pack("chip", model) | checkpoint.pack("chip2", longer)
    target = nn.Linear(2, 2)
    checkpoint.unpack("chip", tensors, target)
    assert torch.equal(target.weight, model.weight)


def test_tensors_that_share_memory_and_facts_of_any_depth(tmp_path):
    whole = torch.arange(6.0)
    facts = {"rows": [{"loss": 0.1, "phase": "soft"}], "best": None}
    checkpoint.save(tmp_path / "c.safetensors", {"a": whole, "b": whole, "part": whole[::2]}, facts)
    tensors, got = checkpoint.load(tmp_path / "c.safetensors")
    assert got == facts
    assert tensors["part"].tolist() == [0, 2, 4] and torch.equal(tensors["a"], tensors["b"])


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing like it",
        header(b"{}"),
        header(b'{"__metadata__":{"facts":"{"}}'),
        header(b'{"__metadata__":{"other":"1"}}'),
        struct.pack("<Q", 2**60),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        checkpoint.load(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.zeros(3)}, {})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match="is damaged"):
            checkpoint.load(path)


def test_facts_that_are_no_json_leave_the_checkpoint_before(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.zeros(1)}, {"epoch": 1})
    with pytest.raises(TypeError):
        checkpoint.save(path, {"a": torch.ones(1)}, {"epoch": object()})
    assert checkpoint.load(path)[1] == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "c.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(RunError, match="cannot write"):
        checkpoint.save(tmp_path / "gone" / "c.safetensors", {"a": torch.zeros(1)}, {})
