"""The proof that runs before every pruning, on networks that lie about their channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.errors import ModelError
from chipdeploy.graph.plan import check_mask
from chipdeploy.graph.proof import difference, prove, random_mask
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class PretendingPad(nn.Module):
    """Pads by a number in the code, beside attributes of the same value that it does not read."""

    def __init__(self):
        super().__init__()
        self.before = self.after = 4

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 4, 4))


class Pretender(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.pad, self.head = PretendingPad(), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.head(F.relu(self.second(x) + self.pad(x)).mean((2, 3)))


def test_numbers_in_the_code_are_found_and_refused_in_one_line():
    model = Pretender()
    with pytest.raises(ModelError, match="take them from the tensors' shapes") as caught:
        prove(model, trace(model, EXAMPLE), EXAMPLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet20", "resnet20-b", "mobilenetv2"])
def test_sound_networks_pass_and_stay_as_they_are(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, in_channels=3, image_size=16).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prove(model, trace(model, EXAMPLE), EXAMPLE)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_random_cuts_are_legal():
    graph = trace(build_model("resnet20", num_classes=4, in_channels=3, image_size=16), EXAMPLE)
    for seed in range(50):
        mask = random_mask(graph, seed, seed / 50)
        check_mask(graph, mask)
        assert not mask.all()


def test_every_output_is_compared():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.second(F.relu(self.first(x)))
            return x, x.mean()

    model = Two()
    graph = trace(model, EXAMPLE)
    assert [(group.name, group.size) for group in graph.groups] == [("first", 8)]
    prove(model, graph, EXAMPLE)


def test_a_nan_in_one_output_is_a_difference():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert difference((one, one), (one, one)) == 0.0
    assert difference((nan, one), (nan, one)) == float("inf")
    assert difference((one, one), [one, one]) == float("inf")
    assert difference({"a": one}, {"a": one + 0.5}) == 0.5
