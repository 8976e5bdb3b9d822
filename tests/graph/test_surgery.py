"""The cut, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chipdeploy.errors import InputError
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.stubs import NoChannels, Zeros
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.ModuleDict(
            {
                "wide": nn.Conv2d(4, 6, 1, bias=False),
                "each": nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
                "norm": nn.BatchNorm2d(6),
                "back": nn.Conv2d(6, 4, 1),
                "last": nn.BatchNorm2d(4),
            }
        )
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(4 * 4, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.block["norm"](self.block["each"](self.block["wide"](x))).relu()
        return self.fc((self.pool(x) + self.block["last"](self.block["back"](y))).flatten(1))


@pytest.fixture(scope="module")
def model(request):
    torch.manual_seed(0)
    net = request.getfixturevalue("randomized")(Net())
    net.fc.bias.requires_grad_(False)
    return net


@pytest.fixture(scope="module")
def graph(model):
    return trace(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))


def test_each_tensor_keeps_the_right_rows_and_columns(model, graph):
    assert [(group.name, group.size) for group in graph.groups] == [("stem", 4), ("block.wide", 6)]
    small = hard_prune(model, graph, PrunePlan({"stem": (1, 3), "block.wide": (0, 4, 5)}))
    old, new = model.state_dict(), small.state_dict()
    s, w = [1, 3], [0, 4, 5]
    pixels = [4, 5, 6, 7, 12, 13, 14, 15]  # of channels 1 and 3, four a channel
    expected = {
        "stem.weight": old["stem.weight"][s],
        "stem.bias": old["stem.bias"][s],
        "block.wide.weight": old["block.wide.weight"][w][:, s],
        "block.each.weight": old["block.each.weight"][w],
        "block.each.bias": old["block.each.bias"][w],
        "block.back.weight": old["block.back.weight"][s][:, w],
        "block.back.bias": old["block.back.bias"][s],
        "fc.weight": old["fc.weight"][:, pixels],
        "fc.bias": old["fc.bias"],
    }
    for norm, kept in (("norm", s), ("block.norm", w), ("block.last", s)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{norm}.{name}"] = old[f"{norm}.{name}"][kept]
        expected[f"{norm}.num_batches_tracked"] = old[f"{norm}.num_batches_tracked"]
    assert set(new) == set(expected) == set(old)
    for name, tensor in expected.items():
        assert torch.equal(new[name], tensor), name


def test_modules_state_their_new_sizes(model, graph):
    small = hard_prune(model, graph, PrunePlan({"stem": (1, 3), "block.wide": (0, 4, 5)}))
    each = small.block["each"]
    assert (each.in_channels, each.out_channels, each.groups) == (3, 3, 3)
    assert (small.stem.in_channels, small.stem.out_channels) == (3, 2)
    assert (small.fc.in_features, small.fc.out_features) == (8, 5)
    assert small.block["norm"].num_features == 3
    assert not small.fc.bias.requires_grad and small.block["wide"].weight.requires_grad
    assert (model.stem.out_channels, model.fc.in_features, model.block["each"].groups) == (4, 16, 6)


def test_stubs_stand_in_for_a_dead_branch(model, graph):
    small = hard_prune(model, graph, PrunePlan({"block.wide": ()}))
    kinds = {name: type(module) for name, module in small.block.items()}
    assert kinds == {"wide": NoChannels, "each": NoChannels, "norm": nn.Identity, "back": Zeros, "last": nn.Identity}
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        without = model.fc(model.pool(model.norm(model.stem(images)).relu()).flatten(1))
        assert torch.equal(small(images), without)
    inside = small.block["each"](torch.zeros(2, 0, 5, 7))
    assert inside.shape == (
        2,
        1,
        3,
        4,
    )  # one channel, on which pools and views work; (5 + 2 - 3) // 2 + 1, (7 + 2 - 3) // 2 + 1
    assert torch.equal(small.block["back"](inside), torch.zeros(2, 4, 3, 4))


def test_the_original_stays_as_it_is(model, graph):
    before = copy.deepcopy(model.state_dict())
    small = hard_prune(model, graph, PrunePlan({"stem": (0,), "block.wide": ()}))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_whole_plan_changes_nothing(model, graph):
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    same = hard_prune(model, graph, PrunePlan({}))
    with torch.no_grad():
        assert torch.equal(same(images), model(images))


def test_a_plan_for_another_network_is_refused(model, graph):
    with pytest.raises(InputError, match="names the group 'layer1'"):
        hard_prune(model, graph, PrunePlan({"layer1": (0,)}))


class Encoder(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.head = nn.Linear(12, 4)
        self.need_weights = False

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        mixed, _ = self.attention(y, y, y, need_weights=self.need_weights)
        return self.head((x + mixed).mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention_loses_heads_and_stream(batch_first, randomized):
    torch.manual_seed(0)
    model = randomized(Encoder(batch_first))
    tokens = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = trace(model, tokens)
    assert {group.name: (group.size, group.unit) for group in graph.groups} == {
        "embed": (12, 1),
        "attention.in_proj_weight": (3, 12),  # queries, keys and values of 4 channels each
    }
    plan = PrunePlan({"embed": (0, 2, 3, 7, 11), "attention.in_proj_weight": (0, 2)})
    small = hard_prune(model, graph, plan)
    attention = small.attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (2, 5, 4)
    assert attention.in_proj_weight.shape == (24, 5)
    assert set(small.state_dict()) == set(model.state_dict())
    gates = torch.from_numpy(plan.mask(graph)).double()
    with torch.no_grad():
        expected = gated_call(model, Gating(graph), gates, tokens)
        assert torch.allclose(small(tokens), expected, rtol=1e-12, atol=1e-12)
        small.need_weights = True
        assert torch.allclose(small(tokens), expected, rtol=1e-12, atol=1e-12)
    small.need_weights = False
    gone = hard_prune(model, graph, PrunePlan({"attention.in_proj_weight": ()}))
    for count in (1, 2, 3):  # two would be unpacked by chance
        without = model.head(model.embed(tokens[:1].repeat(count, 1, 1)).mean(1))
        assert torch.equal(gone(tokens[:1].repeat(count, 1, 1)), without)
    again = trace(small, tokens)
    assert again.sizes.tolist() == [5, 2]
    attention = hard_prune(small, again, PrunePlan({"attention.in_proj_weight": (1,)})).attention
    assert (attention.num_heads, attention.embed_dim) == (1, 5)
    with pytest.raises(NotImplementedError, match="key_padding_mask"):
        attention(tokens, tokens, tokens, key_padding_mask=torch.zeros(2, 7))


def test_attention_whose_weights_nobody_reads_loses_heads_with_a_mask_too(randomized):
    class Masked(Encoder):
        def forward(self, x):
            x = self.embed(x)
            y = self.norm(x)
            causal = torch.ones(7, 7, dtype=torch.bool, device=x.device).triu(1)
            return self.head((x + self.attention(y, y, y, attn_mask=causal, need_weights=self.need_weights)[0]).mean(1))

    torch.manual_seed(0)
    model, tokens = randomized(Masked()), torch.randn(2, 7, 5, dtype=torch.float64)
    graph = trace(model, tokens)
    plan = PrunePlan({"attention.in_proj_weight": (0, 2)})
    small, gates = hard_prune(model, graph, plan), torch.from_numpy(plan.mask(graph)).double()
    with torch.no_grad():
        expected = gated_call(model, Gating(graph), gates, tokens)
        for small.need_weights in (False, True):
            assert torch.allclose(small(tokens), expected, rtol=1e-12, atol=1e-12)
    plain = Encoder()
    plain.need_weights = True
    assert {group.name for group in trace(plain, tokens.float()).groups} == {"embed", "attention.in_proj_weight"}


def test_a_norm_over_the_stream_takes_the_living_channels(randomized):
    model = randomized(Encoder())
    graph = trace(model, torch.randn(2, 7, 5, dtype=torch.float64))
    assert [norm.tensor for norm in graph.norms] == ["norm.weight"]
    small = hard_prune(model, graph, PrunePlan({"embed": (1, 4)}))
    assert small.norm.normalized_shape == (2,)
    assert small.norm.weight.shape == (2,)
