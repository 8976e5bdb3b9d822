"""Random small networks as specs: a few lines of code each, serialisable, and stable when the drawing changes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import graph_blocks
import numpy as np
import torch
import torch.nn.functional as F
from graph_ops import OPS, draw_output
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

LIMIT = 1e3  # of the largest activation while drawing, so that nothing overflows or hides
ELEMENTS = 30_000  # of the largest activation


@dataclass
class Step:
    """One op: statements for __init__, and the expression of its tensor, which may follow statements, a line each."""

    kind: str
    init: list[str]
    call: str


@dataclass
class Spec:
    """A network: inputs x0, x1, ... of these shapes, a step a tensor, and what the forward returns."""

    inputs: list[list[int]]
    steps: list[Step]
    output: str
    init: list[str] = field(default_factory=list)
    seed: int = 0

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, raw):
        return cls(**{**raw, "steps": [Step(**step) for step in raw["steps"]]})

    @property
    def source(self):
        """The network as a class, to read and to paste."""
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for step in self.steps for line in step.init]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {names}):"]
        for number, step in enumerate(self.steps, len(self.inputs)):
            *before, last = step.call.split("\n")
            lines += [f"        {line}" for line in before]
            lines.append(f"        x{number} = {last}")
        return "\n".join([*lines, f"        return {self.output}", ""])


def namespace():
    """What the code of a spec may use: torch, and the blocks."""
    names = {name: value for name, value in vars(graph_blocks).items() if not name.startswith("_")}
    return names | {"torch": torch, "nn": nn, "F": F}


def build(spec):
    """The spec's network in float64 and eval mode, with random O(1) parameters and statistics."""
    space = namespace()
    exec(spec.source, space)
    torch.manual_seed(spec.seed)
    return randomize(space["Net"]().double().eval(), spec.seed)


def example(spec, seed=1, batch=None):
    """Random inputs of the spec's shapes, a tuple."""
    generator = torch.Generator().manual_seed(spec.seed + 1000 * seed)
    shapes = [[batch or shape[0], *shape[1:]] for shape in spec.inputs]
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def randomize(model, seed):
    """Nothing cancels and nothing hides: weights that keep magnitudes, all else around 0.3 with deviation 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            matrix = sum(size > 1 for size in parameter.shape) > 1 and parameter.shape[0] > 1
            fan = math.prod(parameter.shape[1:]) if matrix else 1
            parameter.copy_(values / math.sqrt(fan) if matrix else values * 0.5 + 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


class Seeded:
    """Draws from a seed."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def integer(self, low, high):
        return int(self._rng.integers(low, high + 1))


class _FromHypothesis:
    def __init__(self, draw):
        self._draw = draw

    def integer(self, low, high):
        return self._draw(st.integers(low, high))


class Growing:
    """A network under construction: its tensors are computed as it grows, so that shapes are known."""

    def __init__(self, draw, ruled):
        self.draw = draw
        self.ops = [op for op in OPS if op.ruled or not ruled]
        self.steps = []
        self.inputs = []
        self.values = {}  # expression ▶ tensor, oldest first
        self.used = set()
        self._space = namespace() | {"self": nn.Module()}

    def integer(self, low, high):
        return self.draw.integer(low, high)

    def choice(self, options):
        return options[self.draw.integer(0, len(options) - 1)]

    def chance(self, percent):
        """True with this probability; shrinks to False."""
        return self.draw.integer(0, 99) >= 100 - percent

    @property
    def index(self):
        """Number of the next tensor; attributes of its step end in it."""
        return len(self.inputs) + len(self.steps)

    def pick(self, *ranks, least=1, but=()):
        """The expression of an earlier tensor of one of these ranks, mostly the latest; None where there is none.

        Args:
            least: channels (dimension 1) at least.
            but: expressions not wanted.
        """
        fitting = [
            name
            for name, value in self.values.items()
            if value.dim() in ranks and value.shape[1] >= least and name not in but
        ][::-1]
        if not fitting:
            return None
        place = 0 if self.chance(60) else self.integer(0, len(fitting) - 1)
        return fitting[place]

    def shape(self, name):
        return tuple(self.values[name].shape)

    def input(self, shape):
        """One more input of the network."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(list(shape))
        generator = torch.Generator().manual_seed(len(self.inputs))
        self._space[name] = self.values[name] = torch.randn(shape, dtype=torch.float64, generator=generator)

    def add(self, kind, init, call, reads):
        """Take the step when it runs and its tensors are sound; whether it was taken."""
        step = Step(kind, list(init), call)
        name = f"x{self.index}"
        value = self._run(step, name)
        parts = {name: value} if isinstance(value, torch.Tensor) else {f"{name}[{i}]": v for i, v in enumerate(value)}
        if not parts or not all(_sound(part) for part in parts.values()):
            self._forget()
            return False
        self.steps.append(step)
        self.values.update(parts)
        self.used.update(reads)
        return True

    def _run(self, step, name):
        """The step's tensor, or its tuple of tensors; an empty one where it does not run."""
        *before, last = step.call.split("\n")
        try:
            with torch.no_grad():
                exec("\n".join(step.init), self._space)
                self._space["self"].double().eval()
                exec("\n".join([*before, f"{name} = {last}"]), self._space)
        except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError):
            return ()  # a kernel larger than its image, a shape that does not fit
        return self._space[name]

    def _forget(self):
        """Drop what a step that was not taken has registered."""
        owner = self._space["self"]
        for store in (owner._modules, owner._parameters, owner._buffers):
            for letter in "ab":
                store.pop(f"{letter}{self.index}", None)


def _sound(value):
    return 0 < value.numel() <= ELEMENTS and bool(torch.isfinite(value).all()) and float(value.abs().max()) < LIMIT


def draw_spec(draw, *, ruled=False):
    """A random network of 3 to 12 ops.

    Args:
        draw: has `integer(low, high)`; the lowest is the simplest.
        ruled: only of ops for which there are rules.
    """
    net = Growing(draw, ruled)
    seed = net.integer(0, 1000)
    _stem(net)
    for _ in range(30):
        if len(net.steps) >= 12 or (len(net.steps) >= 3 and net.integer(0, 9) == 0):
            break
        _weighted(net).add(net)
    init = _rewire(net)
    output = draw_output(net)
    return Spec(net.inputs, net.steps, output, init, seed)


def _stem(net):
    """The inputs and the first layer, without which all channels are those of the input."""
    if net.chance(15):
        net.input((2, net.integer(3, 9), net.integer(3, 10)))
        net.add("linear", [f"self.a1 = nn.Linear({net.shape('x0')[2]}, {net.integer(4, 12)})"], "self.a1(x0)", ["x0"])
        return
    size = (2, 3, net.integer(8, 12), net.integer(8, 12))
    net.input(size)
    if net.chance(8):
        net.input(size)
    outputs = net.choice([8, 4, 6, 12])
    for source in list(net.values):
        i = net.index
        net.add("conv", [f"self.a{i} = nn.Conv2d(3, {outputs}, 3, padding=1)"], f"self.a{i}({source})", [source])


def _weighted(net):
    place = net.integer(0, sum(op.weight for op in net.ops) - 1)
    for op in net.ops:
        place -= op.weight
        if place < 0:
            return op
    raise AssertionError


def _rewire(net):
    """Ties two parameters of one shape, or freezes some, now and then."""
    init = []
    parameters = dict(net._space["self"].named_parameters())
    if len(parameters) > 1 and net.chance(6):
        one = net.choice(list(parameters))
        same = [name for name, other in parameters.items() if name != one and other.shape == parameters[one].shape]
        if same:
            init.append(f"{_path(net.choice(same))} = {_path(one)}")
    if parameters and net.chance(6):
        name = net.choice(list(parameters))
        init.append(f"{_path(name)}.requires_grad_(False)")
    return init


def _path(name):
    """`a1.0.weight` ▶ `self.a1[0].weight`."""
    return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))


@st.composite
def specs(draw, ruled=False):
    """Random networks that shrink to few, simple ops."""
    return draw_spec(_FromHypothesis(draw), ruled=ruled)


def sensitive(spec):
    """Whether the network runs, is finite, and its output depends on its input: otherwise a wrong cut could hide."""
    model = build(spec)
    with torch.no_grad():
        one, other = (pytree.tree_leaves(model(*example(spec, seed))) for seed in (1, 2))
    for a, b in zip(one, other, strict=True):
        scale = float(a.abs().max())
        if not torch.isfinite(a).all() or not 1e-6 < scale < 1e9 or float((a - b).abs().max()) < 1e-6 * scale:
            return False
    return True
