"""The vocabulary of random networks: each op looks for tensors that fit and adds a step to the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

ACTIVATIONS = (
    "F.relu({x})",
    "F.gelu({x})",
    "F.silu({x})",
    "torch.sigmoid({x})",
    "F.hardswish({x})",
    "F.hardsigmoid({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.elu({x})",
    "F.softplus({x})",
    "{x}.tanh()",
    "F.relu6({x})",
    "F.mish({x})",
    "torch.exp(-{x}.abs())",
    "torch.abs({x})",
    "{x}.square()",
    "{x}.clamp(-1, 2)",
    "F.hardtanh({x}, 0.2, 2.0)",
    "F.dropout({x}, 0.0)",
    "{x} * 0.5",
    "1 - {x}",
    "-{x}",
    "torch.sqrt({x}.abs() + 1)",
    "F.relu({x} + 0.1, inplace=True)",
    "{x}.cos()",
    "{x}.erf()",
)


@dataclass(frozen=True)
class Op:
    """A kind of step; `ruled` where the pruner has a rule and should take the network."""

    kind: str
    grow: Callable
    weight: int
    ruled: bool

    def add(self, net):
        """Add such a step where one fits; whether it did."""
        return bool(self.grow(net))


OPS = []


def op(weight=2, *, ruled=True):
    """Register a function that adds a step of the kind of its name."""

    def register(function):
        OPS.append(Op(function.__name__, function, weight, ruled))
        return function

    return register


def divisors(*numbers):
    """Common divisors, ascending."""
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]


def unary(net, kind, call, *ranks, init=(), least=1):
    """A step on one tensor of these ranks; `{x}` in `call` and `init` is the tensor, `{i}` the step's number."""
    x = net.pick(*ranks, least=least)
    return x is not None and fill(net, kind, call, [x], init, x=x)


def fill(net, kind, call, reads, init=(), **names):
    """Add a step, its templates filled."""
    names["i"] = net.index
    return net.add(kind, [line.format(**names) for line in init], call.format(**names), reads)


# --- layers


@op(9)
def act(net):
    return unary(net, "act", net.choice(ACTIVATIONS), 2, 3, 4)


@op(12)
def conv(net):
    """Any kernel, stride, dilation, groups; with a norm and an activation half of the times."""
    x = net.pick(4)
    if x is None:
        return False
    channels, outputs = net.shape(x)[1], net.integer(2, 12)
    groups, kernel = 1, net.choice([3, 1])
    if net.chance(35):
        groups = net.choice(divisors(channels))
        outputs = groups * net.integer(1, max(1, 12 // groups))
    options = f"{channels}, {outputs}, {kernel}, padding={kernel // 2}"
    options += f", groups={groups}" if groups > 1 else ""
    options += ", bias=False" if net.chance(40) else ""
    options += ", stride=2" if net.chance(15) else ""
    options += ", dilation=2" if kernel == 3 and net.chance(10) else ""
    options += ", padding_mode='reflect'" if kernel == 3 and net.chance(5) else ""
    init = [f"self.a{{i}} = nn.Conv2d({options})"]
    if net.chance(50):
        init = [f"self.a{{i}} = nn.Sequential(nn.Conv2d({options}), nn.BatchNorm2d({outputs}), nn.ReLU(inplace=True))"]
    return fill(net, "conv", "self.a{i}({x})", [x], init, x=x)


@op(2)
def conv_by_hand(net):
    """A weight of the network's own, in a functional call."""
    x = net.pick(4)
    if x is None:
        return False
    channels, outputs = net.shape(x)[1], net.integer(2, 8)
    init = [f"self.a{{i}} = nn.Parameter(torch.randn({outputs}, {channels}, 3, 3) / 8)"]
    return fill(net, "conv_by_hand", "F.conv2d({x}, self.a{i}, padding=1)", [x], init, x=x)


@op(3)
def conv1d(net):
    x = net.pick(3)
    if x is None:
        return False
    channels = net.shape(x)[1]
    groups = net.choice(divisors(channels)) if net.chance(40) else 1
    outputs = groups * net.integer(1, max(1, 12 // groups))
    init = [f"self.a{{i}} = nn.Conv1d({channels}, {outputs}, 3, padding=1, groups={groups})"]
    return fill(net, "conv1d", "self.a{i}({x})", [x], init, x=x)


@op(3)
def conv_transpose(net):
    x = net.pick(4, 3)
    if x is None:
        return False
    channels, rank = net.shape(x)[1], len(net.shape(x)) - 2
    groups = net.choice(divisors(channels)) if net.chance(40) else 1
    outputs = groups * net.integer(1, max(1, 8 // groups))
    bias = not net.chance(40)
    init = [f"self.a{{i}} = nn.ConvTranspose{rank}d({channels}, {outputs}, 2, 1, groups={groups}, bias={bias})"]
    return fill(net, "conv_transpose", "self.a{i}({x})", [x], init, x=x)


@op(7)
def linear(net):
    x = net.pick(2, 3, 4, 5)
    if x is None:
        return False
    inputs, outputs, bias = net.shape(x)[-1], net.integer(2, 12), not net.chance(30)
    init = [f"self.a{{i}} = nn.Linear({inputs}, {outputs}, bias={bias})"]
    return fill(net, "linear", "self.a{i}({x})", [x], init, x=x)


@op(3)
def product_with_parameter(net):
    """matmul and einsum with a weight."""
    x = net.pick(2, 3, 4)
    if x is None:
        return False
    sizes, outputs = net.shape(x), net.integer(2, 8)
    forms = {
        2: ["{x} @ self.a{i}", "torch.einsum('nc,cd->nd', {x}, self.a{i})"],
        3: ["torch.matmul({x}, self.a{i})", "torch.einsum('ntc,cd->ntd', {x}, self.a{i})"],
        4: ["{x} @ self.a{i}", "torch.einsum('nchw,cd->ndhw', {x}, self.a{i})"],
    }[len(sizes)]
    call = net.choice(forms)
    inputs = sizes[1] if "nchw" in call else sizes[-1]
    init = [f"self.a{{i}} = nn.Parameter(torch.randn({inputs}, {outputs}) / 3)"]
    return fill(net, "product_with_parameter", call, [x], init, x=x)


# --- norms


@op(6)
def norm(net):
    """Batch, group and instance norms of channels along dimension 1."""
    x = net.pick(4, 3, 2)
    if x is None:
        return False
    channels, rank = net.shape(x)[1], len(net.shape(x))
    kinds = [f"nn.BatchNorm{min(rank, 3) - 1 if rank < 4 else 2}d({channels})"]
    if rank == 2:
        kinds = [f"nn.BatchNorm1d({channels})"]
    if rank > 2:
        kinds += [f"nn.GroupNorm({groups}, {channels})" for groups in sorted({1, *divisors(channels)[1:2], channels})]
        kinds += [f"nn.InstanceNorm{rank - 2}d({channels}, affine={affine})" for affine in (True, False)]
        kinds.append(f"nn.BatchNorm{rank - 2}d({channels}, affine=False)")
    return fill(net, "norm", "self.a{i}({x})", [x], [f"self.a{{i}} = {net.choice(kinds)}"], x=x)


@op(4)
def layer_norm(net):
    x = net.pick(3, 2, 4)
    if x is None:
        return False
    width = net.shape(x)[-1]
    kind = net.choice([f"nn.LayerNorm({width})", f"RMSNorm({width})", f"nn.RMSNorm({width})"])
    return fill(net, "layer_norm", "self.a{i}({x})", [x], [f"self.a{{i}} = {kind}"], x=x)


@op(4)
def layer_norm_2d(net):
    """Over the channels of images: by permute, written out, or GRN."""
    x = net.pick(4)
    if x is None:
        return False
    kind = net.choice(["LayerNorm2d", "WrittenNorm2d", "ResponseNorm"])
    return fill(net, "layer_norm_2d", "self.a{i}({x})", [x], [f"self.a{{i}} = {kind}({net.shape(x)[1]})"], x=x)


@op(1, ruled=False)
def layer_norm_whole(net):
    """Over channels and space."""
    x = net.pick(4, 3)
    if x is None:
        return False
    init = [f"self.a{{i}} = nn.LayerNorm({list(net.shape(x)[1:])})"]
    return fill(net, "layer_norm_whole", "self.a{i}({x})", [x], init, x=x)


@op(2)
def prelu(net):
    x = net.pick(4)
    if x is None:
        return False
    init = [f"self.a{{i}} = nn.PReLU({net.choice([net.shape(x)[1], 1])})"]
    return fill(net, "prelu", "self.a{i}({x})", [x], init, x=x)


# --- pooling and reductions


@op(3)
def pool(net):
    calls = ["F.max_pool2d({x}, 2)", "F.avg_pool2d({x}, 2)", "F.max_pool2d({x}, 3, 1, 1)", "F.avg_pool2d({x}, 3, 1, 1)"]
    calls += ["F.adaptive_avg_pool2d({x}, 1)", "F.adaptive_avg_pool2d({x}, 2)", "F.adaptive_max_pool2d({x}, 2)"]
    return unary(net, "pool", net.choice(calls), 4)


@op(3)
def mean_of_space(net):
    calls = ["{x}.mean((2, 3))", "{x}.mean((2, 3), keepdim=True)", "{x}.amax((2, 3))", "{x}.sum(-1)", "{x}.std((2, 3))"]
    calls += ["{x}.mean(2)", "{x}.flatten(2).mean(-1)", "{x}.var(dim=(2, 3), keepdim=True)", "{x}.norm(dim=-1)"]
    return unary(net, "mean_of_space", net.choice(calls), 4)


@op(2)
def mean_of_tokens(net):
    calls = ["{x}.mean(1)", "{x}.amax(1)", "{x}.mean(-1)", "{x}[:, 0]", "{x}[:, 1:]", "{x}.mean(1, keepdim=True)"]
    return unary(net, "mean_of_tokens", net.choice(calls), 3)


@op(2)
def reduce_channels(net):
    calls = ["{x}.mean(1, keepdim=True)", "{x}.amax(1, keepdim=True)", "{x}.sum(1, keepdim=True)", "{x}.mean(1)"]
    calls += ["{x} - {x}.mean(1, keepdim=True)", "{x} * {x}.amax(1, keepdim=True)", "{x} / {x}.shape[1]"]
    return unary(net, "reduce_channels", net.choice(calls), 4, 3)


@op(2, ruled=False)
def across_channels(net):
    """Ops that mix channels, or see their order."""
    calls = ["{x}.softmax(1)", "{x}.cumsum(1)", "{x}.sort(1).values", "F.normalize({x}, dim=1)", "{x}.flip(1)"]
    calls += ["torch.roll({x}, 1, 1)", "{x}.logsumexp(1, keepdim=True)", "torch.diff({x}, dim=1)", "{x}.topk(2, 1)[0]"]
    calls += ["F.local_response_norm({x}, 3)", "{x}[:, torch.arange({x}.shape[1]).flip(0)]"]
    return unary(net, "across_channels", net.choice(calls), 4, 3, least=2)


@op(2)
def across_space(net):
    """The same along the last dimension, where images have their width and tokens their channels."""
    calls = ["{x}.softmax(-1)", "{x}.cumsum(-1)", "F.normalize({x}, dim=-1)", "{x}.flip(-1)", "torch.roll({x}, 1, -1)"]
    calls += ["{x}.flip((2, 3))", "torch.roll({x}, (1, 1), (2, 3))", "{x}.sort(-1).values"]
    return unary(net, "across_space", net.choice(calls), 4, 3)


# --- two tensors


@op(7)
def binary(net):
    """Two earlier tensors of one shape, or of shapes that broadcast."""
    x = net.pick(2, 3, 4)
    if x is None:
        return False
    sizes = net.shape(x)
    partners = [name for name in net.values if name != x and _broadcasts(net.shape(name), sizes)][::-1]
    if not partners:
        return False
    y = net.choice(partners)
    calls = ["{x} + {y}", "{x} * {y}", "{x} - {y}", "{x} / ({y}.abs() + 1)", "torch.maximum({x}, {y})"]
    calls += ["torch.add({x}, {y}, alpha=2)", "{x} * torch.sigmoid({y})", "{y} + {x}", "torch.lerp({x}, {y}, 0.3)"]
    calls += ["torch.where({x} > 0, {x}, {y})", "{x}.clone().add_({y})"]
    return fill(net, "binary", net.choice(calls), [x, y], x=x, y=y)


def _broadcasts(one, other):
    return len(one) == len(other) and all(a == b or a == 1 for a, b in zip(one, other, strict=True))


@op(5)
def residual(net):
    """x + layer(x)."""
    x = net.pick(4, 3)
    if x is None:
        return False
    sizes = net.shape(x)
    kinds = [f"nn.Linear({sizes[-1]}, {sizes[-1]})"]
    if len(sizes) == 4:
        c, h = sizes[1], net.integer(2, 8)
        kinds = [
            f"nn.Sequential(nn.Conv2d({c}, {h}, 1), nn.ReLU(), nn.Conv2d({h}, {c}, 3, padding=1))",
            f"nn.Sequential(ConvAct({c}, {h}), nn.Conv2d({h}, {c}, 1, bias=False), nn.BatchNorm2d({c}))",
            f"nn.Sequential(nn.BatchNorm2d({c}), nn.ReLU(), nn.Conv2d({c}, {c}, 3, padding=1))",
            f"nn.Sequential(nn.Conv2d({c}, {h}, 1), nn.GroupNorm(1, {h}), nn.GELU(), nn.Conv2d({h}, {c}, 1), "
            f"Scale({c}, 1, 4))",
            f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})",
        ]
    calls = ["{x} + self.a{i}({x})", "self.a{i}({x}) + {x}", "F.relu(self.a{i}({x}) + {x})", "{x} - self.a{i}({x})"]
    init = [f"self.a{{i}} = {net.choice(kinds)}"]
    return fill(net, "residual", net.choice(calls), [x], init, x=x)


@op(3)
def parallel(net):
    """Two layers of one input, added, multiplied or concatenated."""
    x = net.pick(4)
    if x is None:
        return False
    inputs, outputs = net.shape(x)[1], net.integer(2, 8)
    init = [
        f"self.a{{i}} = nn.Conv2d({inputs}, {outputs}, 3, padding=1)",
        f"self.b{{i}} = ConvAct({inputs}, {outputs}, 1)",
    ]
    calls = ["self.a{i}({x}) + self.b{i}({x})", "self.a{i}({x}) * self.b{i}({x})"]
    calls.append("torch.cat([self.a{i}({x}), self.b{i}({x})], 1)")
    return fill(net, "parallel", net.choice(calls), [x], init, x=x)


@op(5)
def cat(net):
    """Along channels, tokens or space."""
    x = net.pick(4, 3, 2)
    if x is None:
        return False
    sizes = net.shape(x)
    axis = net.integer(1, len(sizes) - 1)
    fitting = [name for name in net.values if _joins(net.shape(name), sizes, axis)][::-1]
    others = [net.choice(fitting) for _ in range(net.integer(1, 2))]
    joined = ", ".join([x, *others])
    return fill(net, "cat", f"torch.cat([{joined}], {axis})", [x, *others])


def _joins(one, other, axis):
    return len(one) == len(other) and all(
        a == b or dim == axis for dim, (a, b) in enumerate(zip(one, other, strict=True))
    )


@op(3)
def stack(net):
    """Two tensors of one shape, stacked, and taken apart or flattened again."""
    x = net.pick(4, 3)
    if x is None:
        return False
    partners = [name for name in net.values if net.shape(name) == net.shape(x)][::-1]
    y = net.choice(partners)
    calls = ["torch.stack([{x}, {y}], 1).sum(1)", "torch.stack([{x}, {y}], 1).flatten(1, 2)"]
    calls += ["torch.stack([{x}, {y}], 2).flatten(1, 2)", "torch.stack([{x}, {y}], dim=2).amax(2)"]
    calls += ["torch.stack([{x}, {y}]).mean(0)", "torch.stack([{x}, {y}], -1).unbind(-1)"]
    return fill(net, "stack", net.choice(calls), [x, y], x=x, y=y)


@op(2)
def product_of_activations(net):
    x = net.pick(3, 4)
    if x is None:
        return False
    y = net.choice([name for name in net.values if net.shape(name) == net.shape(x)][::-1])
    calls = ["{x} @ {y}.transpose(-2, -1)", "({x}.transpose(-2, -1) @ {y}) / 4", "{x}.softmax(-1) * {y}"]
    if len(net.shape(x)) == 4:
        calls += ["torch.einsum('nchw,nchw->nhw', {x}, {y})", "torch.einsum('nchw,ndhw->ncd', {x}, {y}) / 8"]
        calls += [
            "torch.einsum('nchw,nc->nchw', {x}, {y}.mean((2, 3)))",
            "F.scaled_dot_product_attention({x}, {y}, {x})",
        ]
    else:
        calls += ["torch.einsum('ntc,nsc->nts', {x}, {y})", "F.scaled_dot_product_attention({x}, {y}, {y})"]
        calls += ["torch.bmm({x}, {y}.transpose(1, 2)).softmax(-1) @ {y}"]
    return fill(net, "product_of_activations", net.choice(calls), [x, y], x=x, y=y)


# --- products with parameters and buffers


@op(4)
def scaled(net):
    """Layer scales, learned positions, scalars, biases by hand, buffers."""
    x = net.pick(4, 3, 2)
    if x is None:
        return False
    sizes = net.shape(x)
    kinds = [f"Scale({sizes[1]}, 1, {len(sizes)})", f"Scale({sizes[-1]}, {len(sizes) - 1}, {len(sizes)})"]
    if net.chance(40):
        return fill(net, "scaled", "self.a{i}({x})", [x], [f"self.a{{i}} = {net.choice(kinds)}"], x=x)
    ones = ", ".join("1" for _ in sizes[2:])
    forms = [
        (f"nn.Parameter(torch.zeros({[1, *sizes[1:]]}))", "{x} + self.a{i}"),
        ("nn.Parameter(torch.ones(()))", "{x} * self.a{i}"),
        ("nn.Parameter(torch.ones(1))", "{x} + self.a{i}"),
        (f"nn.Parameter(torch.ones({sizes[1]}))", f"{{x}} * self.a{{i}}.view(1, -1, {ones})"),
        (f"nn.Parameter(torch.ones({sizes[-1]}))", "{x} * self.a{i}"),
        (f"nn.Parameter(torch.ones({[1, sizes[1], *([1] * len(sizes[2:]))]}))", "{x} * self.a{i}.exp()"),
        (f"nn.Parameter(torch.ones({sizes[-1]}))", "{x} / (1 + self.a{i} ** 2)"),
    ]
    if len(sizes) == 4:
        forms.append((f"nn.Parameter(torch.ones({sizes[1]}))", "{x} * self.a{i}[:, None, None]"))
        forms.append((f"nn.Parameter(torch.ones(1, 1, {sizes[2]}, {sizes[3]}))", "{x} + self.a{i}"))
    make, call = net.choice(forms)
    return fill(net, "scaled", call, [x], [f"self.a{{i}} = {make}"], x=x)


@op(2)
def buffered(net):
    """A constant a channel, or a mask over channels."""
    x = net.pick(4, 3)
    if x is None:
        return False
    channels, rank = net.shape(x)[1], len(net.shape(x))
    view = ", ".join(["1", "-1", *["1"] * (rank - 2)])
    make = net.choice([f"torch.linspace(0.5, 2, {channels})", f"(torch.arange({channels}) % 3 > 0).double()"])
    init = [f"self.register_buffer('a{{i}}', {make}.view({view}))"]
    return fill(net, "buffered", net.choice(["{x} * self.a{i}", "{x} + self.a{i}"]), [x], init, x=x)


@op(2)
def gate(net):
    x = net.pick(4, least=2)
    if x is None:
        return False
    c = net.shape(x)[1]
    kinds = [f"SqueezeExcite({c}, 3)", f"SqueezeExcite({c}, 4, linear=True)", "SpatialGate()", f"PixelGate({c})"]
    return fill(net, "gate", "self.a{i}({x})", [x], [f"self.a{{i}} = {net.choice(kinds)}"], x=x)


# --- slices


@op(4)
def split(net):
    """chunk, split, unbind, and slices that take every channel once."""
    x = net.pick(4, 3, least=2)
    if x is None:
        return False
    channels = net.shape(x)[1]
    first = net.integer(1, channels - 1)
    calls = ["{x}.chunk(2, 1)", f"{{x}}.split([{first}, {channels - first}], 1)", "{x}.chunk(2, dim=-1)"]
    calls += [f"torch.split({{x}}, {first}, 1)", f"({{x}}[:, :{first}], {{x}}[:, {first}:])"]
    calls += ["{x}.tensor_split(2, 1)", "{x}[:, : {x}.shape[1] // 2]", "{x}.unflatten(1, (2, -1)).unbind(1)"]
    return fill(net, "split", net.choice(calls), [x], x=x)


@op(3)
def part(net):
    """A part of the channels by numbers in the code."""
    x = net.pick(4, 3, least=2)
    if x is None:
        return False
    channels = net.shape(x)[1]
    first = net.integer(1, channels - 1)
    calls = ["{x}[:, ::2]", f"{{x}}[:, :{first}]", f"{{x}}[:, {first}:]", f"{{x}}.narrow(1, 0, {first})", "{x}[:, 1:]"]
    calls += [f"{{x}}[:, [{channels - 1}, 0]]", "{x}.select(1, 0)", "{x}[:, -1:]", "{x}[:, 1::2] + 0", "{x}[..., :2]"]
    calls += ["{x}[:, :, ::2]", f"{{x}}.index_select(1, torch.tensor([0, {channels - 1}, 0]))", "{x}.narrow(2, 0, 1)"]
    return fill(net, "part", net.choice(calls), [x], x=x)


@op(1)
def selected(net):
    """A permutation of the channels, in a buffer."""
    x = net.pick(4, 3, least=2)
    if x is None:
        return False
    channels = net.shape(x)[1]
    init = [f"self.register_buffer('a{{i}}', torch.arange({channels}).roll(2))"]
    call = net.choice(["{x}.index_select(1, self.a{i})", "{x}[:, self.a{i}]"])
    return fill(net, "selected", call, [x], init, x=x)


@op(1, ruled=False)
def overwritten(net):
    x = net.pick(4, 3, least=2)
    calls = ["written_to({x}, slice(0, 1), 0.5)", "written_to({x}, slice(None, None, 2), 0.0)"]
    calls += ["written_to({x}, slice(1, None), {x}[:, :1])", "{x}.clone().mul_({x})"]
    return x is not None and fill(net, "overwritten", net.choice(calls), [x], x=x)


# --- reshapes


@op(4)
def reshaped(net):
    """[N, C, H, W] ▶ tokens, vectors, groups of channels; sizes from shapes, attributes and in the code."""
    x = net.pick(4)
    if x is None:
        return False
    n, c, h, w = net.shape(x)
    groups = net.choice(divisors(c))
    calls = [
        "{x}.flatten(2)",
        "{x}.flatten(2).transpose(1, 2)",
        "{x}.flatten(1)",
        f"{{x}}.view({n}, {c}, {h * w})",
        "{x}.view({x}.shape[0], {x}.shape[1], -1)",
        "{x}.reshape({x}.size(0), self.c{i}, -1)",
        "{x}.reshape({x}.shape[0], -1)",
        f"{{x}}.unflatten(1, ({groups}, {c // groups}))",
        f"{{x}}.view({n}, {groups}, {c // groups}, {h}, {w})",
        f"{{x}}.view({{x}}.shape[0], -1, {groups}, *{{x}}.shape[2:]).mean(2)",
        f"{{x}}.view({{x}}.shape[0], {groups}, self.c{{i}} // {groups}, {h}, {w}).amax(1)",
        "{x}.reshape({x}.shape[0] * {x}.shape[1], 1, *{x}.shape[2:])",
        "{x}.permute(0, 2, 3, 1).reshape({x}.shape[0], -1, {x}.shape[1])",
        "{x}.permute(0, 2, 3, 1).flatten(0, 2)",
    ]
    return fill(net, "reshaped", net.choice(calls), [x], [f"self.c{{i}} = {c}"], x=x)


@op(3)
def merged(net):
    """Rank 5 and 3 back to images."""
    x = net.pick(5, 3)
    if x is None:
        return False
    sizes = net.shape(x)
    if len(sizes) == 5:
        calls = [
            "{x}.flatten(1, 2)",
            "{x}.transpose(1, 2).flatten(1, 2)",
            "{x}.sum(2)",
            "{x}.mean(1)",
            "{x}.flatten(2)",
        ]
        calls += [f"{{x}}.reshape({sizes[0]}, {sizes[1] * sizes[2]}, {sizes[3]}, {sizes[4]})", "{x}.softmax(1).sum(1)"]
        return fill(net, "merged", net.choice(calls), [x], x=x)
    rows = net.choice(divisors(sizes[2])[::-1])
    calls = [f"{{x}}.unflatten(2, ({rows}, -1))", "{x}.transpose(1, 2).unsqueeze(3)", "{x}.unsqueeze(-1)"]
    calls.append(f"{{x}}.view({sizes[0]}, {sizes[1]}, {rows}, {sizes[2] // rows})")
    calls.append(f"{{x}}.reshape({{x}}.shape[0], -1, {rows}, {sizes[2] // rows})")
    return fill(net, "merged", net.choice(calls), [x], x=x)


@op(1, ruled=False)
def muddled(net):
    """Views that mix channels with space."""
    x = net.pick(4)
    if x is None:
        return False
    n, c, h, w = net.shape(x)
    calls = [
        f"{{x}}.reshape({n}, {h}, {c}, {w})",
        f"{{x}}.reshape({n}, {c * h}, {w}, 1)",
        f"{{x}}.reshape({n}, {w}, -1)",
    ]
    calls += [
        "{x}.flatten(1).unsqueeze(-1)",
        "{x}.transpose(1, 2).reshape({x}.shape)",
        f"{{x}}.flatten(1).view({n}, {c}, -1)",
    ]
    return fill(net, "muddled", net.choice(calls), [x], x=x)


@op(3)
def moved(net):
    """permute and transpose."""
    x = net.pick(4, 3)
    if x is None:
        return False
    calls = ["{x}.transpose(1, 2)"]
    if len(net.shape(x)) == 4:
        calls = ["{x}.permute(0, 2, 3, 1)", "{x}.permute(0, 3, 1, 2)", "{x}.transpose(2, 3)", "{x}.movedim(1, -1)"]
        calls += ["{x}.transpose(1, 3)", "{x}.transpose(0, 1)"]
    return fill(net, "moved", net.choice(calls), [x], x=x)


@op(2)
def shuffled(net):
    x = net.pick(4, least=2)
    if x is None:
        return False
    n, c, h, w = net.shape(x)
    g = net.choice(divisors(c)[1:])
    forms = [
        f"ChannelShuffle({g})",
        f"ChannelShuffle({g}, {c})",
        f"nn.ChannelShuffle({g})",
    ]
    init = [f"self.a{{i}} = {net.choice(forms)}"]
    if net.chance(30):
        call = f"{{x}}.view({n}, {g}, {c // g}, {h}, {w}).transpose(1, 2).reshape({n}, {c}, {h}, {w})"
        return fill(net, "shuffled", call, [x], x=x)
    return fill(net, "shuffled", "self.a{i}({x})", [x], init, x=x)


@op(2)
def pixels_shuffled(net):
    calls = ["F.pixel_unshuffle({x}, 2)", "F.pixel_shuffle({x}, 2)"]
    return unary(net, "pixels_shuffled", net.choice(calls), 4)


@op(2)
def padded(net):
    calls = ["F.pad({x}, (1, 1, 1, 1))", "F.pad({x}, (0, 0, 0, 0, 1, 2))", "F.pad({x}, (1, 0, 1, 0), mode='reflect')"]
    calls += [
        "F.pad({x}, (1, 1, 0, 0), mode='replicate')",
        "F.pad({x}, (1, 1), value=0.5)",
        "F.pad({x}, (-1, 0, 0, 0))",
    ]
    return unary(net, "padded", net.choice(calls), 4)


@op(2)
def interpolated(net):
    calls = ["F.interpolate({x}, scale_factor=2)", "F.interpolate({x}, size=(6, 6), mode='bilinear')"]
    calls.append("F.interpolate({x}, scale_factor=2, mode='bilinear', align_corners=False)")
    return unary(net, "interpolated", net.choice(calls), 4)


# --- whole blocks


@op(6)
def block(net):
    """A known network's block for images."""
    x = net.pick(4, least=2)
    if x is None:
        return False
    c, h, heads = net.shape(x)[1], net.integer(2, 8), net.choice(divisors(net.shape(x)[1]))
    kinds = [
        f"BasicBlock({c}, {h})",
        f"BasicBlock({c}, {h}, pre=True)",
        f"Inverted({c}, {h})",
        f"Inverted({c}, {h}, excite=True)",
        f"ConvNeXt({c}, {h})",
        f"ConvNeXt({c}, {h}, last=False)",
        f"Dense({c}, {net.integer(1, 4)})",
        f"ShuffleUnit({c})",
        f"Ghost({c}, {net.integer(2, 9)})",
        f"SplitStage({c}, {h})",
        f"OptionA({c}, {net.integer(1, 3)}, '{net.choice(['attribute', 'shape'])}')",
        f"SelectiveKernel({c}, 3)",
        f"ConvAttention({c}, {heads})",
        f"WindowAttention({c}, {heads}, 2, {net.integer(0, 1)})",
    ]
    return fill(net, "block", "self.a{i}({x})", [x], [f"self.a{{i}} = {net.choice(kinds)}"], x=x)


@op(1)
def embedded(net):
    x = net.pick(4)
    if x is None:
        return False
    _, c, h, w = net.shape(x)
    init = [f"self.a{{i}} = Embedding({c}, {2 * net.integer(2, 6)}, {h * w})"]
    return fill(net, "embedded", "self.a{i}({x})", [x], init, x=x)


@op(4)
def token_block(net):
    """A transformer's block for [N, T, C]."""
    x = net.pick(3, least=2)
    if x is None:
        return False
    _, t, c = net.shape(x)
    heads, h = net.choice(divisors(c)), net.integer(2, 8)
    kinds = [
        f"Mlp({c}, {h})",
        f"Mlp({c}, {h}, gated=True)",
        f"Attention({c}, {heads})",
        f"Attention({c}, {heads}, fused=False)",
        f"Attention({c}, {heads}, head_dim={net.integer(1, 3)})",
        f"PlainAttention({c}, {heads})",
        f"PlainAttention({c}, {heads}, scaled=False, separate=False)",
        f"PlainAttention({c}, {heads}, separate=False)",
        f"LinearAttention({c}, {heads})",
        f"Encoder({c}, {heads}, {h})",
        f"MixerLayer({t}, {c}, {h})",
    ]
    return fill(net, "token_block", "self.a{i}({x})", [x], [f"self.a{{i}} = {net.choice(kinds)}"], x=x)


@op(2)
def called_again(net):
    """A module of an earlier step once more: shared weights."""
    earlier = [number for number, step in enumerate(net.steps, len(net.inputs)) if f"self.a{number}(" in step.call]
    x = net.pick(4, 3, 2)
    if not earlier or x is None:
        return False
    return fill(net, "called_again", f"self.a{net.choice(earlier[::-1])}({{x}})", [x], x=x)


@op(1)
def called_twice(net):
    x = net.pick(4)
    if x is None:
        return False
    c = net.shape(x)[1]
    init = [f"self.a{{i}} = nn.Conv2d({c}, {c}, 3, padding=1)"]
    call = net.choice(["self.a{i}(F.relu(self.a{i}({x})))", "self.a{i}({x}) + self.a{i}({x}.flip(3))"])
    return fill(net, "called_twice", call, [x], init, x=x)


@op(1, ruled=False)
def computed_weight(net):
    """Weights made in the forward pass."""
    x = net.pick(4)
    if x is None:
        return False
    c, o = net.shape(x)[1], net.integer(2, 6)
    init = [f"self.a{{i}} = nn.Parameter(torch.randn({o}, {c}, 3, 3) / 8)", f"self.b{{i}} = nn.Linear({c}, {c})"]
    calls = [
        "F.conv2d({x}, self.a{i} - self.a{i}.mean((1, 2, 3), keepdim=True), padding=1)",
        f"F.conv2d({{x}}.flatten(0, 1)[None], self.b{{i}}({{x}}.mean((2, 3))).view(-1, 1, 1, 1), groups=2 * {c})",
        "F.conv2d({x}, F.normalize(self.a{i}, dim=1), padding=1)",
    ]
    return fill(net, "computed_weight", net.choice(calls), [x], init, x=x)


# --- the end


def draw_output(net):
    """Classifies the tensors that nobody read: the sum of their logits, mostly, or a tuple or dict; or returns them."""
    leaves = [name for name in net.values if name not in net.used] or list(net.values)
    leaves = leaves[::-1][: 1 + net.integer(0, 2)]
    if net.chance(10):
        return leaves[0] if len(leaves) == 1 else f"({', '.join(leaves)})"
    logits = [name for name in map(partial(_classified, net), leaves) if name]
    if not logits:
        return leaves[0]
    if len(logits) > 1 and net.chance(40):
        return f"({', '.join(logits)})" if net.chance(50) else "{" + ", ".join(f"'{n}': {n}" for n in logits) + "}"
    return " + ".join(logits)


def _classified(net, x):
    """Adds a linear layer to 3 logits; the expression of them, or None where it does not fit."""
    sizes = net.shape(x)
    if len(sizes) == 4:
        pooled, width = net.choice([(f"{x}.mean((2, 3))", sizes[1]), (f"{x}.mean((1, 2))", sizes[3])])
        if net.chance(20) and sizes[1] * sizes[2] * sizes[3] < 1500:
            pooled, width = f"{x}.flatten(1)", sizes[1] * sizes[2] * sizes[3]
    elif len(sizes) == 3:
        pooled, width = net.choice([(f"{x}.mean(1)", sizes[2]), (f"{x}.mean(2)", sizes[1]), (f"{x}[:, 0]", sizes[2])])
    elif len(sizes) == 2:
        pooled, width = x, sizes[1]
    else:
        pooled, width = f"{x}.flatten(2).mean(2)", sizes[1]
    i = net.index
    taken = sizes[0] == 2 and net.add("classifier", [f"self.a{i} = nn.Linear({width}, 3)"], f"self.a{i}({pooled})", [x])
    return f"x{i}" if taken else None
