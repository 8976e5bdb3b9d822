"""Awkward networks: each is cut exactly, in eager mode and as a simplified program, or its odd part is left whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.simplify import remove_dead_branches
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

torch.set_num_threads(1)


def conv(inputs, outputs, kernel=3, stride=1, **options):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def plain(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Net(nn.Module):
    """stem (8 channels) ▶ the structure under test ▶ classifier."""

    def __init__(self, forward, outputs=8, **modules):
        super().__init__()
        self.stem = conv(3, 8)
        for name, module in modules.items():
            setattr(self, name, module)
        self.fc = nn.Linear(outputs, 5)
        self.structure = forward

    def forward(self, x):
        return self.fc(self.structure(self, F.relu(self.stem(x))).mean((2, 3)))


class ByHand(nn.Module):
    """A convolution that holds its own weight."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.weight, self.stride = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * 0.2), stride

    def forward(self, x):
        return F.conv2d(x, self.weight, None, self.stride, 1)


class PadFirst(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Squeeze(nn.Module):
    """Squeeze and excitation as most libraries write it."""

    def __init__(self, channels, inside, gate):
        super().__init__()
        self.less, self.more = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.more(F.relu(self.less(F.adaptive_avg_pool2d(x, 1)))))


class Attention(nn.Module):
    """Heads whose width is computed from that of the input, or is an attribute of its own."""

    def __init__(self, width, heads, *, own):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.own = own
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        count, tokens, channels = x.shape
        width = self.head_dim if self.own else channels // self.num_heads
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        out = self.attn_dim if self.own else channels
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, out))


def tokens_and_back(net, x):
    flat = x.flatten(2).transpose(1, 2)
    flat = flat + net.attention(net.norm(flat))
    return flat.transpose(1, 2).unflatten(2, x.shape[2:])


class AddsItsInput(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


def ab(**other):
    return {"a": conv(8, 12), "b": plain(12, 8), **other}


def abc():
    return {name: nn.Sequential(*conv(8, 6), nn.ReLU(inplace=True), *conv(6, 8)) for name in "abc"}


def inner(net, x):
    return net.b(F.relu(net.a(x)))


def twice(net, x):
    x = x + inner(net, x)
    return x + inner(net, x)


def relu_on_a_norm(net, x):
    x = net.norm(x)
    return inner(net, F.relu_(x)) + x


def relu_on_a_view(net, x):
    x = net.norm(x)
    part = x[:, :, 1:]
    part.relu_()
    return inner(net, x) + x


def nested(net, x):
    y = F.relu(net.a(x))
    y = F.relu(y + net.d(F.relu(net.c(y))))
    return x + net.b(y)


def sums_in_place(net, x):
    y = net.a(x)
    y += x
    return F.relu_(y.add_(net.b(y)))


def end_read_twice(net, x):
    y = inner(net, x)
    return torch.cat([x + y, y], 1)


def sum_written_to(net, x):
    y = net.norm(x)
    return F.relu_(inner(net, y) + y) + y


def tie(net, tensors):
    for (one, name), other in tensors:
        setattr(net.get_submodule(other), name, getattr(net.get_submodule(one), name))
    return net


def tied_last_norm():
    net = Net(
        lambda net, x: (lambda y: y + net.d(F.relu(net.c(y))))(x + inner(net, x)),
        a=conv(8, 7),
        b=conv(7, 8),
        c=conv(8, 6),
        d=conv(6, 8),
    )
    return tie(net, [(("b.1", "weight"), "d.1"), (("b.1", "bias"), "d.1")])


def tied_weights():
    net = Net(inner, a=plain(8, 8), b=plain(8, 8))
    return tie(net, [(("a", "weight"), "b")])


class Gated(nn.Module):
    """A gated MLP, whose first layer is taken apart in two."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x):
        one, other = self.first(x).chunk(2, -1)
        return self.last(one * F.silu(other))


def gated_beside_a_norm_by_hand(net, x):
    x = x / (x.square().mean(1, keepdim=True) + 1).sqrt()
    return x + net.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shaped_like_another(net, x):
    return x + net.b(net.a(x).view_as(net.c(x)).type_as(x).clamp(net.low, net.low + 1).reshape_as(net.c(x)))


# name: (network, its removable branches)
CASES = {
    "a gated MLP on a stream that stays": (lambda: Net(gated_beside_a_norm_by_hand, mlp=Gated()), 1),
    "shapes, types and limits from tensors": (
        lambda: Net(shaped_like_another, low=nn.Parameter(torch.tensor(0.1), requires_grad=False), **abc()),
        0,
    ),
    "one convolution twice in a branch": (
        lambda: Net(lambda net, x: x + net.b(F.relu(net.a(F.relu(net.a(x))))), a=conv(8, 8), b=conv(8, 8)),
        0,
    ),
    "one branch twice": (lambda: Net(twice, a=conv(8, 6), b=conv(6, 8)), 0),
    "tied last norms": (tied_last_norm, 0),
    "tied weights": (tied_weights, 0),
    "bias and no norm at the end": (lambda: Net(lambda net, x: x + inner(net, x), **ab()), 1),
    "relu at the end": (lambda: Net(lambda net, x: x + F.relu(inner(net, x)), **ab()), 1),
    "sigmoid at the end": (lambda: Net(lambda net, x: x + torch.sigmoid(inner(net, x)), **ab()), 0),
    "hardtanh above zero at the end": (lambda: Net(lambda net, x: x + F.hardtanh(inner(net, x), 0.5, 2), **ab()), 0),
    "dropout": (lambda: Net(lambda net, x: x + net.drop(inner(net, net.drop(x))), **ab(drop=nn.Dropout())), 1),
    "norm without affine at the end": (
        lambda: Net(lambda net, x: x + net.n(inner(net, x)), **ab(n=nn.BatchNorm2d(8, affine=False))),
        0,
    ),
    "average pooling inside": (
        lambda: Net(lambda net, x: F.avg_pool2d(x, 2) + net.b(F.avg_pool2d(F.relu(net.a(x)), 2)), **ab()),
        1,
    ),
    "upsampling inside": (
        lambda: Net(
            lambda net, x: F.interpolate(x, scale_factor=2) + net.b(F.interpolate(net.a(x), scale_factor=2)), **ab()
        ),
        1,
    ),
    "mirrored padding inside": (
        lambda: Net(
            lambda net, x: x + net.b(net.p(net.a(x))), a=conv(8, 6), p=nn.ReflectionPad2d(1), b=nn.Conv2d(6, 8, 3)
        ),
        1,
    ),
    "zero padding inside": (
        lambda: Net(lambda net, x: x + net.b(net.p(net.a(x))), a=conv(8, 6), p=nn.ZeroPad2d(1), b=nn.Conv2d(6, 8, 3)),
        1,
    ),
    "mirrored padding of a layer": (
        lambda: Net(
            lambda net, x: x + inner(net, x),
            a=plain(8, 6, padding_mode="reflect"),
            b=plain(6, 8, padding_mode="reflect"),
        ),
        1,
    ),
    "in-place relu of a norm at the start": (lambda: Net(relu_on_a_norm, **ab(norm=nn.BatchNorm2d(8))), 1),
    "in-place relu of a view": (lambda: Net(relu_on_a_view, **ab(norm=nn.BatchNorm2d(8))), 1),
    "a sum that is written to": (lambda: Net(sum_written_to, **ab(norm=nn.BatchNorm2d(8))), 1),
    "sums in place": (lambda: Net(sums_in_place, **abc()), 2),
    "layer scale first, in another shape": (
        lambda: Net(
            lambda net, x: x + net.scale[:, None, None] * net.b(F.relu(net.a(x))),
            a=conv(8, 12),
            b=conv(12, 8),
            scale=nn.Parameter(torch.rand(8)),
        ),
        1,
    ),
    "half of a branch": (lambda: Net(lambda net, x: x + net.b(F.relu(net.a(x))) / 2, a=conv(8, 12), b=conv(12, 8)), 1),
    "a group norm at the end": (
        lambda: Net(lambda net, x: x + net.n(net.b(net.a(x))), a=conv(8, 12), b=plain(12, 8), n=nn.GroupNorm(2, 8)),
        1,
    ),
    "nested branches": (lambda: Net(nested, a=conv(8, 12), b=conv(12, 8), c=conv(12, 6), d=conv(6, 12)), 1),
    "three branches and the input": (lambda: Net(lambda net, x: x + net.a(x) + net.b(x) + net.c(x), **abc()), 3),
    "three branches alone": (lambda: Net(lambda net, x: net.a(x) + net.b(x) + net.c(x), **abc()), 2),
    "concatenated residual branches": (
        lambda: Net(lambda net, x: torch.cat([x + net.a(x), x + net.b(x), net.c(x)], 1), outputs=24, **abc()),
        3,
    ),
    "scaled sums": (
        lambda: Net(lambda net, x: torch.add(net.a(x), x, alpha=2) + torch.add(x, net.b(x), alpha=3), **abc()),
        2,
    ),
    "a branch's end read twice": (lambda: Net(end_read_twice, outputs=16, a=conv(8, 4), b=conv(4, 8)), 1),
    "layers by hand": (
        lambda: Net(lambda net, x: net.d(x) + inner(net, x), a=ByHand(8, 6, 2), b=ByHand(6, 8), d=conv(8, 8, 1, 2)),
        0,
    ),
    "a layer that pads by hand": (
        lambda: Net(lambda net, x: x + inner(net, x), a=PadFirst(8, 6, 3), b=PadFirst(6, 8, 3)),
        0,
    ),
    "a layer with a skip of its own": (
        lambda: Net(lambda net, x: x + net.b(net.m(net.a(x))), a=conv(8, 6), m=AddsItsInput(6, 6, 1), b=conv(6, 8)),
        0,
    ),
    "squeeze and excite": (
        lambda: Net(
            lambda net, x: net.c(x) * torch.sigmoid(net.b(F.relu(net.a(x.mean((2, 3), keepdim=True))))),
            a=nn.Conv2d(8, 4, 1),
            b=nn.Conv2d(4, 8, 1),
            c=conv(8, 8),
        ),
        0,
    ),
    "squeeze and excite in a module": (
        lambda: Net(lambda net, x: net.c(net.s(x)), s=Squeeze(8, 4, nn.Sigmoid()), c=plain(8, 8)),
        1,
    ),
    "squeeze and excite read by two layers": (
        lambda: Net(
            lambda net, x: (lambda y: net.c(y) * net.d(y))(net.s(x)),
            s=Squeeze(8, 4, nn.Hardsigmoid()),
            c=plain(8, 8),
            d=plain(8, 8),
        ),
        1,
    ),
    "squeeze and excite read by a norm": (
        lambda: Net(lambda net, x: net.n(net.s(x)), s=Squeeze(8, 4, nn.Sigmoid()), n=nn.BatchNorm2d(8)),
        0,
    ),
    "squeeze and excite that gives zero": (
        lambda: Net(lambda net, x: net.c(net.s(x)) + x, s=Squeeze(8, 4, nn.Tanh()), c=plain(8, 8)),
        0,
    ),
    "an empty gate beside living values": (
        lambda: Net(
            lambda net, x: x + net.p(net.w(torch.sigmoid(net.a(x))) * net.v(x) + net.v(x) * 0.5),
            a=plain(8, 4),
            w=plain(4, 8),
            v=plain(8, 8),
            p=plain(8, 8),
        ),
        1,
    ),
    "heads of a width of their own": (
        lambda: Net(tokens_and_back, norm=nn.LayerNorm(8), attention=Attention(8, 4, own=True)),
        1,
    ),
    "heads of a width computed from the input": (
        lambda: Net(
            lambda net, x: tokens_and_back(net, F.relu(net.b(F.relu(net.a(x))))),
            norm=nn.LayerNorm(8),
            attention=Attention(8, 4, own=False),
            a=conv(8, 6),
            b=conv(6, 8),
        ),
        0,
    ),
    "inverted residual": (
        lambda: Net(
            lambda net, x: x + net.b(F.relu6(net.d(F.relu6(net.a(x))))),
            a=conv(8, 24, 1),
            d=conv(24, 24, groups=24),
            b=conv(24, 8, 1),
        ),
        1,
    ),
    "normed first, in a Sequential": (
        lambda: Net(
            lambda net, x: x + net.a(x),
            a=nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.ReLU(), plain(4, 8)),
        ),
        1,
    ),
    "one tensor twice in a concatenation": (
        lambda: Net(lambda net, x: torch.cat([net.a(x)] * 2, 1) + torch.cat([x, x], 1), outputs=16, a=conv(8, 8)),
        0,
    ),
    "concatenated along the height": (
        lambda: Net(lambda net, x: torch.cat([net.a(x), net.b(x)], 2), a=conv(8, 8), b=conv(8, 8)),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_awkward_structures_are_cut_exactly(case, randomized, random_mask, extreme_masks, disagreement):
    build, branches = CASES[case]
    torch.manual_seed(0)
    model = randomized(build())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model(images.clone())
    graph = trace(model, images)
    assert graph.groups and len(graph.branches) == branches
    for number, mask in enumerate([*extreme_masks(graph), *(random_mask(graph, seed) for seed in range(4))]):
        assert disagreement(model, graph, mask, images) <= 1e-9
        if number < 2:
            small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask))
            program = remove_dead_branches(torch.export.export(small, (images,)))
            with torch.no_grad():
                expected = small(images)
                assert (program.module()(images) - expected).abs().max() <= 1e-9 * expected.abs().max()
    with torch.no_grad():
        assert torch.equal(model(images.clone()), before)


class Steered(nn.Module):
    """Its attribute `dim` states a width that the forward takes from the shape, and decides which way it goes."""

    def __init__(self, width):
        super().__init__()
        self.dim = self.dim_out = width
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        count, channels, height, width = x.shape
        flat = x.reshape(count, channels, height * width).transpose(1, 2)
        flat = flat if self.dim == self.dim_out else -flat
        return self.mix(flat).transpose(1, 2).unflatten(2, (height, width))


def test_an_attribute_that_steers_the_forward_stays(randomized, random_mask, disagreement):
    torch.manual_seed(0)
    model = randomized(Net(lambda net, x: net.s(x), s=Steered(8)))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = trace(model, images)
    assert [(group.name, group.size) for group in graph.groups] == [("stem.0", 8), ("s.mix", 8)]
    mask = random_mask(graph, 1)
    assert disagreement(model, graph, mask, images) <= 1e-9
    assert hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).s.dim == 8
