"""Steps launched at once: the learning rate as a tensor, and on a GPU the same losses as by single launches."""

import copy

import pytest
import torch
from torch import nn

from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Silent, train_epoch
from chipdeploy.training.orthogonal import OrthogonalSGD
from chipdeploy.training.replay import Replayed, replayable, set_rate


class Noise:
    """Batches of random images whose label is where their brightest column is."""

    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        return 8 * self.steps

    def batches(self, size, *, seed=None, augment=False, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            images = torch.randn(8, 3, 8, 8, generator=generator)
            labels = images[:, 0, :, :4].sum(1).argmax(1)
            yield images.to(device), labels.to(device)


def network(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)).to(device)


def optimizer_of(model):
    return OrthogonalSGD(model, lr=0.5, pace=0.3, momentum=0.9, weight_decay=0.01)


def train(model, optimizer, device, *, epochs=2, **options):
    rate = lambda step: 0.002 * (step + 1)  # noqa: E731
    return [
        train_epoch(model, Noise(9), optimizer, rate, batch=8, seed=n, device=device, watcher=Silent(), **options)
        for n in range(epochs)
    ]


def test_a_rate_that_is_a_tensor_moves_the_weights_alike():
    model = network()
    other = copy.deepcopy(model)
    optimizer, optimizer_of_other = optimizer_of(model), optimizer_of(other)
    for group in optimizer_of_other.param_groups:
        group["lr"] = torch.tensor(0.5)
    for one in (optimizer, optimizer_of_other):
        set_rate(one, 0.01)
    images = torch.randn(8, 3, 8, 8)
    for one, its in ((model, optimizer), (other, optimizer_of_other)):
        one.eval()(images).square().mean().backward()
        its.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer_of_other.param_groups)


def test_on_the_cpu_nothing_is_replayed():
    model = network()
    assert not replayable(optimizer_of(model), torch.device("cpu"))
    assert not replayable(torch.optim.SGD(model.parameters()), torch.device("cuda"))
    device = torch.device("cpu")
    plain, asked = network(), network()
    assert train(plain, optimizer_of(plain), device) == train(asked, optimizer_of(asked), device, replay=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("taught", [False, True])
def test_replayed_epochs_have_the_losses_of_launched_ones(taught, monkeypatch):
    device = torch.device("cuda")
    captured = []
    capture = Replayed._try
    monkeypatch.setattr(
        Replayed, "_try", lambda self, *batch: (capture(self, *batch), captured.append(self._graph is not None))
    )
    losses = []
    for replay in (False, True):
        model = network(device)
        model[3].p = 0.0  # the random numbers of a graph are others
        teacher = Teacher(network(device).eval(), 0.5, 4.0) if taught else None
        losses.append(train(model, optimizer_of(model), device, teacher=teacher, replay=replay))
    assert captured == [True, True]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_step_that_waits_for_the_device_goes_on_without_a_graph():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, images):
            assert float(images.sum()) < 1e6
            return self.body(images)

    device = torch.device("cuda")
    model, plain = Asking().to(device), Asking().to(device)
    for one in (model, plain):
        one.body[3].p = 0.0
    asked = train(model, optimizer_of(model), device, replay=True)
    assert asked == pytest.approx(train(plain, optimizer_of(plain), device), rel=0.02)
