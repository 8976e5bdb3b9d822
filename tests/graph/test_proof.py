"""The proof that runs before every pruning, on networks that lie about their channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.errors import ModelError
from chipdeploy.graph.plan import PrunePlan, check_mask
from chipdeploy.graph.proof import Trials, difference, prove, random_mask
from chipdeploy.graph.surgery import hard_prune
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


def test_numbers_in_the_code_keep_their_channels_with_the_reason_in_one_line():
    model = Pretender()
    graph = trace(model, EXAMPLE)
    prove(model, graph, EXAMPLE)
    assert [(group.name, group.size) for group in graph.groups] == [("first", 8)]
    reasons = {pinned.name: pinned.reason for pinned in graph.pinned}
    assert "take them from the tensors' shapes" in reasons["second"]
    assert "\n" not in reasons["second"]


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


class Net(nn.Module):
    """Two convolutions of 8 channels, `body` between them, and a classifier of the mean."""

    def __init__(self, body, **parts):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x):
        return self.head(F.relu(self.second(self.body(self, F.relu(self.first(x))))).mean((2, 3)))


def free(graph):
    return {group.name for group in graph.groups}


def test_a_fault_that_fresh_weights_hide_is_found():
    """A factor that the code takes from the number of channels, behind a fresh layer scale."""

    def scaled(net, x):
        return x + net.scale * x * (1 + 0.1 * x.shape[1])

    graph = trace(Net(scaled, scale=nn.Parameter(torch.full((1,), 1e-7))), EXAMPLE)
    assert free(graph) == {"second"}
    assert any("differs from the gated one" in pinned.reason for pinned in graph.pinned)


class Mixer(nn.Module):
    """Returns a pair, as attention modules do."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        heads = self.down(x)
        return self.up(heads.view(*heads.shape[:2], 2, -1).softmax(1).flatten(2)), None


def test_cuts_are_tried_with_another_number_of_images():
    """What stands in for a module that returns a pair is taken apart by luck when there are two images."""

    def mixed(net, x):
        tokens = x.flatten(2).transpose(1, 2)
        y, _ = net.mixer(tokens)
        return (tokens + y).transpose(1, 2).unflatten(2, x.shape[2:])

    model = Net(mixed, mixer=Mixer()).eval()
    graph = trace(model, EXAMPLE)
    for seed in range(4):
        small = hard_prune(model, graph, PrunePlan.from_mask(graph, random_mask(graph, seed, 1.0)))
        assert small(torch.randn(5, 3, 16, 16)).shape == (5, 4)


def test_deep_networks_are_repaired_all_blocks_of_a_kind_at_once():
    def mixed(net, x):
        tokens = x.flatten(2).transpose(1, 2)
        for mixer in net.mixers:
            y, _ = mixer(tokens)
            tokens = tokens + y
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    blocks = 30
    graph = trace(Net(mixed, mixers=nn.ModuleList(Mixer() for _ in range(blocks))), EXAMPLE)
    assert {f"mixers.{number}.down" for number in range(blocks)} <= free(graph)
    assert not graph.branches


def test_a_network_of_one_batch_size_is_tried_at_that():
    taken = Trials(Net(lambda _, x: x), (EXAMPLE,))
    fixed = Net(lambda _, x: x.reshape(2, -1, 196).relu().reshape(2, -1, 14, 14))
    assert (len(taken.larger[0]), len(Trials(fixed, (EXAMPLE,)).larger[0])) == (3, 2)
    assert free(trace(fixed, EXAMPLE)) == {"first", "second"}


def test_loud_weights_that_overflow_are_not_used():
    model = Net(lambda _, x: torch.exp(30 * x))
    with torch.no_grad():
        model.first.weight.mul_(0.1)
    assert free(trace(model, EXAMPLE)) == {"first", "second"}


def test_rounding_is_no_fault():
    """In float32 the sine of large numbers is noise."""

    def noisy(net, x):
        return torch.sin(1e5 * net.norm(x.movedim(1, 3)).movedim(3, 1))

    assert free(trace(Net(noisy, norm=nn.LayerNorm(8)), EXAMPLE)) == {"first", "second"}


def test_a_network_that_is_never_finite_is_refused():
    with pytest.raises(ModelError, match="output is not finite"):
        trace(Net(lambda _, x: torch.log(-1 - x)), EXAMPLE)


def trained(net, x):
    """An auxiliary head that eval mode leaves out."""
    if net.training:
        net.loss = net.aux(x).square().mean()
    return x


def test_what_only_training_runs_follows_the_cut(disagreement):
    model = Net(trained, aux=nn.Conv2d(8, 5, 1))
    graph = trace(model.double(), EXAMPLE.double())
    assert free(graph) == {"first", "second"} and not hasattr(model, "loss")
    mask = random_mask(graph, 0, 0.0)
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).train()
    small(EXAMPLE.double())
    small.loss.backward()
    assert small.aux.weight.grad.shape == (5, mask[graph.span(0)].sum(), 1, 1)
    assert disagreement(model.eval(), graph, mask, EXAMPLE.double()) <= 1e-9


def test_what_is_only_kept_follows_the_cut(disagreement):
    def watched(net, x):
        net.seen = net.one(x) + net.other(x)
        return x

    model = Net(watched, one=nn.Conv2d(8, 5, 1), other=nn.Conv2d(8, 5, 1)).double()
    graph = trace(model, EXAMPLE.double())
    assert free(graph) == {"first", "second", "one"}
    assert disagreement(model.eval(), graph, random_mask(graph, 0, 0.0), EXAMPLE.double()) <= 1e-9


def test_numbers_in_code_for_training_hold_the_channels():
    def shaped(net, x):
        return x.view(len(x), 8, 14, 14) if net.training else x

    assert free(trace(Net(shaped), EXAMPLE)) == {"second"}


def test_training_that_cannot_be_followed_is_refused_in_one_line():
    def driven(net, x):
        return net.aux(x) if net.training and x.mean() > 0 else x

    with pytest.raises(ModelError, match="in train mode") as caught:
        trace(Net(driven, aux=nn.Conv2d(8, 8, 1)), EXAMPLE)
    assert "\n" not in str(caught.value)
