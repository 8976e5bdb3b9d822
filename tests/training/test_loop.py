"""Epochs, evaluation and renewed norms on a network small enough to check by hand."""

import pytest
import torch
from torch import nn

from chipdeploy.errors import TargetError, UsageError
from chipdeploy.training.loop import Silent, evaluate, renew_norms, train_epoch
from chipdeploy.training.splits import MemorySplit

CPU = torch.device("cpu")


def split(count=64):
    """Images of one grey value: dark ones are class 0, bright ones class 1."""
    labels = torch.arange(count) % 2
    images = (labels * 200 + 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 1).contiguous()
    return MemorySplit(images, labels, (0.5,), (0.5,))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def train(model, rate, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return train_epoch(model, split(), optimizer, lambda _: rate, batch=16, seed=seed, device=CPU, watcher=Silent())


def test_training_lowers_the_loss_and_learns_the_classes():
    model = network()
    first = train(model, 0.1)
    for _ in range(5):
        last = train(model, 0.1)
    assert last < first / 2
    assert evaluate(model, split(), CPU) == 1.0
    assert model.training


def test_an_epoch_is_a_function_of_its_seed():
    one, two, three = network(), network(), network()
    assert train(one, 0.1, seed=7) == train(two, 0.1, seed=7) != train(three, 0.1, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_divergence_is_said_in_one_line():
    with pytest.raises(TargetError, match="training diverged") as caught:
        for _ in range(20):
            train(network(), 1e30)
    assert "\n" not in str(caught.value)


def test_a_norm_layer_with_one_value_is_one_line():
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))  # 8x8 to 1x1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"batch": 1, "device": CPU}
    message = r"batches of 1 and images of 8x8 .* raise --batch, .* or --image-size"
    with pytest.raises(UsageError, match=message) as caught:
        train_epoch(model, split(), optimizer, lambda _: 0.1, seed=0, watcher=Silent(), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=message):
        renew_norms(model, split(), **options)


def test_other_errors_of_a_network_are_left_as_they_are():
    class Broken(nn.Linear):
        def forward(self, x):
            raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        train(Broken(1, 1), 0.1)


def test_evaluation_counts_right_answers():
    class Bright(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), torch.ones(len(x))], dim=1)

    assert evaluate(Bright(), split(), CPU) == 0.5  # every second image is of class 1


def test_large_images_are_evaluated_a_few_at_a_time(monkeypatch):
    seen = []

    class Noted(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], dim=1)

    monkeypatch.setattr("chipdeploy.training.loop.EVALUATION_PIXELS", 20 * 8 * 8)
    assert evaluate(Noted(), split(), CPU) == 1.0
    assert seen == [20, 20, 20, 4]


def test_renewed_norms_hold_the_statistics_of_the_images_they_saw():
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(99.0)
    renew_norms(model, split(), batch=64, device=CPU)
    # With a crop out of black borders the mean of normalised pixels lies between black (-1) and the mean of the images.
    assert -1.0 < float(model[0].running_mean) < 0.0
    assert model[0].momentum == 0.1


def test_renewed_norms_do_not_depend_on_what_was_drawn_before():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1))
        renew_norms(model, split(), batch=64, device=CPU)
        found.append(float(model[1].running_mean))
    assert found[0] == found[1]
