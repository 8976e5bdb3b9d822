"""Networks whose Python asks for shapes, holds on to its original, or hides what it computes: cut right, or refused."""

import threading
import types
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import chipdeploy as cd
from chipdeploy.chipnet.costs import CostModel
from chipdeploy.errors import InputError, ModelError, UsageError
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph import proof
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.loud import randomize
from chipdeploy.graph.plan import PrunePlan, check_mask
from chipdeploy.graph.proof import difference
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


class Base(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.a, self.b, self.h = conv(3, 16), conv(16, 16), nn.Linear(16, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def features(self, x):
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x):
        return self.h(self.features(x).mean((2, 3)))


def worst(model, graph, random_mask, example=EXAMPLE):
    """The largest difference of gated and cut network, over plans at random and of equal widths, in float64."""
    model, images = randomize(model.eval()).double(), example.double()
    masks = [random_mask(graph, seed) for seed in range(12)]
    for width in (1, 2, 3, 5, 8, 12, 16, 24):
        mask = masks[0].copy()
        for group in range(len(graph.groups)):
            span = graph.span(group)
            mask[span] = np.arange(span.stop - span.start) < width
        masks.append(mask)
    gaps = []
    with torch.no_grad():
        for mask in masks:
            gates = torch.from_numpy(mask).double()
            cut = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
            gaps.append(difference(gated_call(model, Gating(graph), gates, images), cut(images)))
    return max(gaps)


class Inverted(nn.Module):
    """Adds its input where the shapes agree: a cut may make them agree, or part them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        hidden = 2 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        out = self.body(x)
        return out + x if out.shape == x.shape else out


class Inverteds(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU6())
        self.blocks = nn.Sequential(*map(Inverted, widths, widths[1:]))
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("widths", [(16, 24, 20), (16, 12, 32), (16, 20, 20, 20), (8, 24, 24, 16)])
def test_a_skip_where_shapes_agree(widths, random_mask):
    model = Inverteds(widths)
    graph = trace(model, EXAMPLE)
    assert worst(model, graph, random_mask) < 1e-9
    assert any("cut on trial" in pinned.reason for pinned in graph.pinned)
    assert {f"blocks.{number}.body.0" for number in range(len(widths) - 1)} <= {group.name for group in graph.groups}


class Sides(nn.Module):
    """Two convolutions side by side; adds its input where that is as wide as both together."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.one, self.two = conv(inputs, outputs), conv(inputs, outputs)

    def forward(self, x):
        y = F.relu(torch.cat([self.one(x), self.two(x)], 1))
        return y + x if y.shape == x.shape else y


class HalfWay(Sides):
    """The same of one half that passes by and another that is convolved."""

    def forward(self, x):
        left, right = self.one(x).chunk(2, 1)
        y = F.relu(torch.cat([left, self.two(right)], 1))
        return y + x if y.shape == x.shape else y


class HalfWays(HalfWay):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.two = conv(outputs // 2, outputs // 2)


class Grown(nn.Module):
    """A transition that is skipped where it would not change the width of all that was gathered before it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.end = conv(16, 8), conv(24, 8), conv(32, 24)

    def forward(self, x):
        x = torch.cat([x, self.one(x)], 1)
        x = torch.cat([x, self.two(x)], 1)
        return x if self.end[0].in_channels == self.end[0].out_channels else self.end(x)


JOINED = {
    "as wide as the stem": (lambda: Sides(16, 16), 32),
    "wider than the stem": (lambda: Sides(16, 12), 24),
    "half passes by": (lambda: HalfWays(16, 24), 24),
    "gathered": (Grown, 24),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_concatenation_that_becomes_as_wide_as_its_input(name):
    torch.manual_seed(0)
    make, width = JOINED[name]
    model = randomize(Base(b=make(), h=nn.Linear(width, 5)).eval()).double()
    graph, images = trace(model, EXAMPLE.double()), EXAMPLE.double()
    place = np.arange(graph.channels) - np.repeat(graph.offsets[:-1], graph.sizes)
    with torch.no_grad():
        for kept in product(range(0, 25, 4), repeat=len(graph.groups)):
            mask = place < np.repeat(kept, graph.sizes)
            try:
                check_mask(graph, mask)
            except InputError:
                continue
            gates = torch.from_numpy(mask).double()
            cut = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
            assert difference(gated_call(model, Gating(graph), gates, images), cut(images)) < 1e-9


def test_a_plan_that_no_trial_foresaw_is_refused_with_a_group_to_keep(monkeypatch):
    monkeypatch.setattr(proof, "_joined", lambda graph: ())
    torch.manual_seed(0)
    chip = cd.ChipNet(Base(b=Sides(16, 16), h=nn.Linear(32, 5)), EXAMPLE, cd.Budget("flops", 0.5))
    plan = PrunePlan({"b.one.0": tuple(range(8)), "b.two.0": tuple(range(8, 16))})
    with pytest.raises(ModelError, match=r"cannot be cut: .* keep 'b.two.0' whole by --exclude"):
        chip.folded(plan, early=True)
    chip.folded(PrunePlan({"b.one.0": (1, 2, 3), "b.two.0": (4,)}), early=True)


class Projected(Base):
    def forward(self, x):
        y = F.relu(self.a(x))
        z = self.b(y)
        if z.shape[1] != y.shape[1]:
            y = self.project(y)
        return self.h(F.relu(z + y).mean((2, 3)))


class Images(Base):
    """Turns what has three channels around, as a helper does that other images go through, too."""

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.h(F.relu(self.b(y[:, [2, 1, 0]] * 2 if y.shape[1] == 3 else y)).mean((2, 3)))


class Squeezed(Base):
    def forward(self, x):
        return self.h(F.adaptive_avg_pool2d(self.features(x), 1).squeeze())


class MaxPooled(Base):
    def forward(self, x):
        return self.h(F.adaptive_max_pool2d(self.features(x), 1).flatten(1))


class NonLocal(Base):
    """Attention that is scaled by a count of channels, which moves the output a little."""

    def __init__(self):
        super().__init__(q=nn.Conv2d(16, 4, 1), k=nn.Conv2d(16, 4, 1), v=nn.Conv2d(16, 6, 1), o=nn.Conv2d(6, 16, 1))

    def forward(self, x):
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        weights = torch.softmax(self.q(y).flatten(2).mT @ self.k(y).flatten(2) / c**0.5, -1)
        y = y + self.o((self.v(y).flatten(2) @ weights.mT).reshape(n, -1, h, w))
        return self.h(F.relu(self.b(y)).mean((2, 3)))


class Fading(Base):
    """A branch behind a factor that is zero at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(0.0))

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y) + self.alpha * y.mean((2, 3), keepdim=True) * y.shape[1] ** 0.3
        return self.h(F.relu(y).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.p, self.h = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        self.b = nn.TransformerEncoderLayer(24, heads, 48, batch_first=True)

    def forward(self, x):
        return self.h(self.b(self.p(x).flatten(2).mT).mean(1))


class ReadOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 3, 3))

    @property
    def out_channels(self):
        return self.weight.shape[0]

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Named(Base):
    """A name that looks like the tracer's own for a second call."""

    def __init__(self):
        super().__init__(d=nn.ModuleDict({"p@2": nn.Conv2d(16, 16, 1)}))

    def forward(self, x):
        return self.h(F.relu(self.d["p@2"](self.features(x))).mean((2, 3)))


class Fp32Norm(nn.LayerNorm):
    def forward(self, x):
        assert self.weight.shape == x.shape[-1:] and self.weight.device == x.device and self.weight.numel()
        return super().forward(x)


class Normed(Base):
    def __init__(self):
        super().__init__(n=Fp32Norm(16))

    def forward(self, x):
        return self.h(self.n(self.features(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Constant(Base):
    """Four is the root of its sixteen channels, and no more than a number."""

    def forward(self, x):
        return self.h(torch.sigmoid(self.features(x) * 4.0).mean((2, 3)))


class Masked(Base):
    """A sum over those images that the values choose: its shape is not known before."""

    def forward(self, x):
        y = self.features(x).mean((2, 3))
        return self.h(y) + y[y.mean(1) > 0].sum()


FOLLOWED = {
    "masked by values": Masked,
    "a projection where widths differ": lambda: Projected(project=nn.Conv2d(16, 16, 1)),
    "other ways for three channels": Images,
    "squeezed": Squeezed,
    "largest values": MaxPooled,
    "scaled by the width": NonLocal,
    "scaled by a constant": Constant,
    "transformer, three heads": lambda: Transformer(3),
    "transformer, six heads": lambda: Transformer(6),
    "read-only width": lambda: Base(a=ReadOnly()),
    "a name with @": Named,
    "a norm that looks at its weight": Normed,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_it_is_cut_right_or_keeps_its_channels(name, random_mask):
    torch.manual_seed(0)
    model = FOLLOWED[name]()
    graph = trace(model, EXAMPLE)
    assert worst(model, graph, random_mask) < 1e-9


def test_a_number_may_come_before_the_images():
    class Timed(Base):
        def forward(self, time, x):
            return super().forward(x + time)

    graph = trace(Timed(), (torch.tensor(0.5), EXAMPLE))
    assert graph.input_shape == (2, 3, 16, 16)
    assert graph.layers[0].positions == 16 * 16


def test_a_constant_that_looks_like_a_count_pins_nothing():
    assert {group.name for group in trace(Constant(), EXAMPLE).groups} == {"a.0", "b.0"}


def test_heads_go_from_a_transformer():
    graph = trace(Transformer(6), EXAMPLE)
    assert {group.name: group.size for group in graph.groups}["b.self_attn.in_proj_weight"] == 6


class Closure(Base):
    def __init__(self):
        super().__init__()
        self.run = lambda x: self.h(self.features(x).mean((2, 3)))

    def forward(self, x):
        return self.run(x)


def patched():
    model = Base()
    model.forward = lambda x: model.h(model.features(x).amax((2, 3)))
    return model


def locked():
    return Base(lock=threading.Lock())


def weight_normed():
    model = Base()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.a[0])
    return model


class Routed(Base):
    def forward(self, x):
        y = self.features(x).mean((2, 3))
        return self.h(y) + self.h(y[y.mean(1) > 0]).sum(0)


class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class TwoWays(Base):
    """Layers in a graph that an op takes as an argument."""

    def forward(self, x):
        y = F.relu(self.a(x))
        y = torch.cond(x.sum() > 0, lambda y: self.b(y), lambda y: self.b[0](y), (y,))
        return self.h(y.mean((2, 3)))


class Classes(Base):
    """Only what is largest comes out: of three images a difference is none, or all."""

    def forward(self, x):
        return super().forward(x).argmax(1)


class OneClass(Base):
    def forward(self, x):
        return super().forward(x)[:, :1].softmax(1)


REFUSED = {
    "closure": (Closure, EXAMPLE, "lambda or closure"),
    "patched forward": (patched, EXAMPLE, "lambda or closure"),
    "lock": (locked, EXAMPLE, "cannot be copied"),
    "weight norm": (weight_normed, EXAMPLE, "cannot be copied"),
    "fading in": (Fading, EXAMPLE, "differs from the gated one"),
    "routed": (Routed, EXAMPLE, "depends on what the images show"),
    "no gradients": (NoGrad, EXAMPLE, "nothing to prune.*runs without gradients"),
    "hidden layers": (TwoWays, EXAMPLE, "the layers inside cannot be counted"),
    "classes": (Classes, EXAMPLE, "no real numbers by which a cut could be compared; return logits"),
    "constant output": (OneClass, EXAMPLE, "nothing in the network changes its output"),
    "no images": (Base, EXAMPLE[:0], r"a batch of images, e.g. 2; got \[\[0, 3, 16, 16\]\]"),
    "class of models": (lambda: Base, EXAMPLE, "got the class Base; give an instance"),
    "name of a model": (lambda: "resnet20", EXAMPLE, "got a str; give an instance"),
    "no batch": (Base, EXAMPLE[0], "no batch dimension|cannot be traced"),
    "list": (Base, [EXAMPLE], "got a list"),
    "nothing": (Base, (EXAMPLE, None), "got a NoneType"),
    "number": (Base, torch.tensor(0.5), "got a single number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name):
    make, example, message = REFUSED[name]
    with pytest.raises((ModelError, UsageError), match=message) as caught:
        trace(make(), example)
    assert "\n" not in str(caught.value)


class Darkened(Base):
    """Part of it learns nothing, and part of it is under autocast."""

    def __init__(self):
        super().__init__(c=conv(16, 16), d=conv(16, 16))

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = F.relu(self.a(x))
        y = F.relu(self.b(y))
        with torch.autocast("cpu", enabled=False):
            y = self.d(F.relu(self.c(y.float())))
        return self.h(y.mean((2, 3)))


def test_layers_without_gradients_or_under_autocast_are_counted():
    model = Darkened()
    graph = trace(model, EXAMPLE)
    assert {group.name for group in graph.groups} == {"b.0", "c.0", "d.0"}
    assert "without gradients" in next(pinned.reason for pinned in graph.pinned if pinned.name == "a.0")
    with FlopCounterMode(display=False) as counter:
        model(EXAMPLE[:1])
    assert CostModel.of(graph, "macs").dense == counter.get_total_flops() / 2


class Counting(nn.Module):
    """Its output is a count, never below zero; the width of the stem is used as a number."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.last = conv(3, 8), conv(8, 8), conv(8, 8)
        self.head = nn.Linear(8, 1)
        nn.init.constant_(self.head.bias, 1.0)

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = F.relu(self.mid(y)) + 0.05 * y.shape[1]
        return F.relu(self.head(F.relu(self.last(y)).mean((2, 3))))


class Fused(Base):
    """Three inputs weighted by what a ReLU leaves; one of them uses its width as a number."""

    def __init__(self):
        super().__init__(c=conv(16, 16), d=conv(16, 16), last=conv(16, 16))
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        y, w = F.relu(self.a(x)), F.relu(self.w)
        y = w[0] * self.b(y) + w[1] * self.c(y) + w[2] * (self.d(y) + 0.1 * y.shape[1])
        return self.h(F.relu(self.last(y)).mean((2, 3)))


@pytest.mark.parametrize("make", [Counting, Fused])
def test_faults_behind_a_closed_relu_are_found(make):
    torch.manual_seed(0)
    model = make()
    first = "stem.0" if make is Counting else "a.0"
    assert first in {pinned.name for pinned in trace(model, EXAMPLE).pinned}


class SecondNames(Base):
    """Ops by the names that NumPy has for them, and rare ones that look at every channel alone."""

    def forward(self, x):
        y = torch.clip(torch.multiply(self.a(x), 2.0), -3, 6)
        y = torch.subtract(torch.negative(+y), torch.absolute(torch.divide(y, 3.0))) + torch.true_divide(y, 7.0)
        y = torch.where(torch.greater(y, 0) & torch.not_equal(y, 1), y, torch.less_equal(y, -1).to(y))
        y = torch.moveaxis(torch.moveaxis(self.b(y), 1, -1), -1, 1)
        y = torch.nan_to_num(torch.atan(y)) + torch.asinh(y) + torch.fmax(y, torch.hypot(y, y)) + torch.trunc(y)
        return self.h(y.mean((2, 3)))


def test_second_names_of_ops_and_rare_ones_pin_nothing():
    graph = trace(SecondNames(), EXAMPLE)
    assert [(group.name, group.size) for group in graph.groups] == [("a.0", 16), ("b.0", 16)]


class Typed(Base):
    """Weights in the type of what they meet, as diffusion models have it."""

    class Conv(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 10)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return F.conv2d(x, self.weight.to(x.dtype), self.bias.type_as(x), padding=1)

    class Norm(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float()).to(x.dtype)

    def __init__(self):
        super().__init__(c=self.Conv(16, 16), norm=self.Norm(16))

    def features(self, x):
        x = self.norm(F.relu(self.a(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.b(F.relu(self.c(x))))


def test_weights_may_be_read_in_another_type():
    assert {group.name for group in trace(Typed(), EXAMPLE).groups} == {"a.0", "b.0", "c"}


class Looking(Base):
    """A norm of the user's own that looks at its weight."""

    class Norm(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.normalized_shape = (channels,)

        def forward(self, x):
            assert self.weight.dim() == 1 and len(self.weight) == self.weight.nelement()
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)

    def __init__(self):
        super().__init__(norm=self.Norm(16))

    def features(self, x):
        return self.b(self.norm(F.relu(self.a(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_a_norm_may_look_at_its_weight():
    assert {group.name for group in trace(Looking(), EXAMPLE).groups} == {"a.0", "b.0"}


def test_a_layer_that_is_called_again_is_pinned_once():
    class Thrice(Base):
        def forward(self, x):
            return torch.cat([super(Thrice, self).forward(x.roll(n, 2)) for n in range(3)], 1)

    assert [(pinned.name, pinned.size) for pinned in trace(Thrice(), EXAMPLE).pinned] == [("h", 5)]


class Forgetful(Base):
    """Its norms stay in eval mode, as in many detectors; nothing is returned."""

    def train(self, mode=True):
        super().train(mode)
        self.a[1].eval()

    def eval(self):
        super().eval()


def test_a_model_whose_mode_switch_returns_nothing_is_cut_and_exported(tmp_path):
    model = Forgetful()
    model.train()
    graph = trace(model, EXAMPLE)
    assert model.training and not model.a[1].training
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, proof.random_mask(graph, 0, 0.0)))
    file = cd.export_onnx(small, EXAMPLE, tmp_path / "small.onnx")
    assert verify_onnx(small, file.path, EXAMPLE).max_relative_error <= 1e-4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_gates_are_not_put_on_half_a_model(kind):
    with pytest.raises(UsageError, match=rf"weights are {kind}, too coarse for gates; prune model\.float\(\)"):
        cd.ChipNet(Base().to(kind), EXAMPLE.to(kind), cd.Budget("flops", 0.5))


def test_a_compiled_model_is_refused():
    with pytest.raises(UsageError, match="the model is compiled"):
        trace(torch.compile(Base()), EXAMPLE)


def test_classes_are_compared():
    one, other = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    assert difference(one, other) == 0.25
    assert difference(one.bool(), one.bool()) == 0.0
    assert difference(torch.tensor([2 + 2j]), torch.tensor([2 + 1j])) == pytest.approx(1 / 8**0.5)


def test_a_constant_of_the_forward_is_no_image(random_mask):
    """What may go must leave a way from the image to the output, not from a constant that looks like an input."""

    class Constant(Base):
        def __init__(self):
            super().__init__()
            self.const = torch.randn(1, 16, 1, 1)

        def forward(self, x):
            return self.h((self.const + self.b(F.relu(self.a(x)))).mean((2, 3)))

    model = Constant()
    graph = trace(model, EXAMPLE)
    assert not graph.branches


def test_a_graph_of_another_model_is_refused():
    graph = trace(Base(), EXAMPLE)
    plan = PrunePlan({group.name: (0,) for group in graph.groups})
    with pytest.raises(InputError, match="the graph is of another model"):
        hard_prune(nn.Linear(3, 4), graph, plan)
    with pytest.raises(InputError, match="the graph is of another model"):
        hard_prune(Base(b=conv(12, 16)), graph, plan)


def test_what_is_no_budget_is_said():
    with pytest.raises(UsageError, match="a budget is made by Budget"):
        cd.ChipNet(Base(), EXAMPLE, 0.3)
    with pytest.raises(UsageError, match="no branch of this network can"):
        cd.ChipNet(Base(), EXAMPLE, cd.Budget("flops", 0.5), blocks=True)


def test_one_pattern_may_stand_alone():
    graph = trace(Base(), EXAMPLE, exclude="a.*")
    assert [group.name for group in graph.groups] == ["b.0"]


def test_the_model_is_handed_back_as_it_was():
    model = Base().train()
    model.forward = types.MethodType(Base.forward, model)  # a method of its own is no closure
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
