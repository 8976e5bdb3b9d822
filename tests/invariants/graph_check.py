"""The invariant on any network: refused in one line, or every legal cut equals the gated network."""

from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils import _pytree as pytree

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.errors import BudgetError, ChipdeployError, InputError, ModelError
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan, check_mask, group_widths
from chipdeploy.graph.proof import prove, random_mask
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

TOLERANCE = 1e-9  # of the largest output, in float64


class Wrong(Exception):
    """The cut network differs from the gated one, or the original was touched."""


@dataclass
class Verdict:
    """What became of a network: accepted, refused, wrong or crashed."""

    status: str
    reason: str = ""
    prunable: float = 0.0  # share of the MACs that the smallest legal cut takes away
    error: float = 0.0  # largest relative difference seen
    pins: Counter = field(default_factory=Counter)  # reason, numbers left out ▶ channels
    proof: str = ""  # of a wrong or crashed one: what `prove` says about it

    @property
    def failed(self):
        return self.status in ("wrong", "crashed")


def check(model, inputs, *, again=None, plans=3, retrace=True):
    """The verdict on `model` in float64 and eval mode.

    Args:
        inputs: a tuple of tensors, to trace with and to compare on.
        again: inputs of another batch size, compared on where the dense network takes them.
        plans: random plans beside the smallest cut, one channel a group, and the plan of a budget.
        retrace: whether the cut network is traced again, which takes as long as all the rest.
    """
    given = inputs[0] if len(inputs) == 1 else inputs
    try:
        graph = trace(model, given)
    except ModelError as error:
        return Verdict("refused", _one_line(error))
    except Exception as error:
        return Verdict("crashed", f"trace: {type(error).__name__}: {error}")
    verdict = Verdict("accepted", pins=_pins(graph))
    before = _state(model)
    try:
        verdict.prunable = prunable_share(graph)
        for number, mask in enumerate(masks(graph, plans)):
            small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask))
            _counts(graph, mask, small)
            batches = [inputs, *([again] if again is not None and number == 1 and _runs(model, again) else [])]
            for batch in batches:
                verdict.error = max(verdict.error, difference(model, graph, mask, small, batch))
            if number == 1:
                trains(model, small, inputs)
                if retrace:
                    _traces_again(small, given)
        _unchanged(before, _state(model))
    except Wrong as error:
        verdict.status, verdict.reason = "wrong", str(error)
    except Exception as error:
        verdict.status, verdict.reason = "crashed", f"{type(error).__name__}: {error}"
    if verdict.failed:
        verdict.proof = _proof(model, graph, given)
    return verdict


def masks(graph, plans):
    """The smallest legal cut, random plans, one channel in every group where that is legal, and a budget's plan."""
    smallest = np.zeros(graph.channels, dtype=bool)
    single = np.zeros(graph.channels, dtype=bool)
    for number, group in enumerate(graph.groups):
        single[graph.span(number).start] = True
        smallest[graph.span(number).start] = not group.may_vanish
    check_mask(graph, smallest)
    yield smallest
    yield from (random_mask(graph, seed, (0.5, 0.0, 1.0)[seed % 3]) for seed in range(plans))
    with suppress(InputError):
        check_mask(graph, single)
        yield single
    search = Projector(graph, CostModel.of(graph, "macs"), align=1)
    with suppress(BudgetError):
        yield search.project(np.random.default_rng(0).random(graph.channels) + 0.1, (1 + search.smallest) / 2)


def _counts(graph, mask, small):
    """Raises Wrong where the cost model counts other parameters than the cut network has."""
    counted = float(CostModel.of(graph, "params").count(group_widths(graph, mask)))
    built = sum(parameter.numel() for parameter in small.parameters())
    if counted != built:
        raise Wrong(f"{counted:.0f} parameters are counted, the cut network has {built}")


def difference(model, graph, mask, small, inputs):
    """Largest difference between the gated and the cut network's outputs, over the largest output.

    Raises:
        Wrong: it is above the tolerance, or the outputs are not of the same shapes, or not finite.
    """
    with torch.no_grad():
        dense = pytree.tree_leaves(model(*copy.deepcopy(inputs)))
        gates = torch.from_numpy(mask).to(inputs[0])
        gated, form = pytree.tree_flatten(gated_call(model, Gating(graph), gates, *copy.deepcopy(inputs)))
        cut, other = pytree.tree_flatten(small(*copy.deepcopy(inputs)))
    if form != other or [tensor.shape for tensor in gated] != [tensor.shape for tensor in cut]:
        raise Wrong(f"outputs {[tuple(t.shape) for t in gated]} became {[tuple(t.shape) for t in cut]}")
    worst, widths = 0.0, {group.name: int(mask[graph.span(i)].sum()) for i, group in enumerate(graph.groups)}
    for whole, expected, got in zip(dense, gated, cut, strict=True):
        for name, output in (("gated", expected), ("cut", got)):
            if torch.isfinite(whole).all() and not torch.isfinite(output).all():
                raise Wrong(f"the {name} network's output is not finite with the widths {widths}")
        # A branch that is gone may leave nothing: rounding of the dense network's size is no difference then.
        scale = max(float(expected.abs().max()), 1e-4 * float(whole.abs().max()))
        worst = max(worst, float((expected - got).abs().max()) / scale)
    if worst > TOLERANCE:
        raise Wrong(f"differs by {worst:.1e} with the widths {widths}")
    return worst


def trains(model, small, inputs):
    """One step of SGD on the cut network, as far as the dense network makes one.

    Raises:
        Wrong: the loss or a gradient is not finite, or nothing moves.
    """
    if not _steps(copy.deepcopy(model), inputs):
        return
    if not _steps(copy.deepcopy(small), inputs) and any(p.requires_grad and p.numel() for p in small.parameters()):
        raise Wrong("the cut network does not train")


def _steps(network, inputs):
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    try:
        leaves = pytree.tree_leaves(network(*copy.deepcopy(inputs)))
        loss = torch.stack([leaf.square().mean() for leaf in leaves]).sum()
        if not parameters or not loss.requires_grad:
            return False
        loss.backward()
    except (RuntimeError, ValueError):  # an instance norm of one pixel, an in-place write that autograd needs
        return False
    torch.optim.SGD(parameters, lr=1e-3).step()
    return all(torch.isfinite(p).all() for p in parameters)


def _traces_again(small, given):
    try:
        trace(small, given)
    except ModelError as error:
        _one_line(error)


def prunable_share(graph):
    """1 - MACs of the smallest legal cut / MACs."""
    cost = CostModel.of(graph, "macs")
    widths = np.array([0 if group.may_vanish else 1 for group in graph.groups])
    return 1 - float(cost.count(widths)) / float(cost.dense) if cost.dense else 0.0


def blank(reason):
    """A reason without its numbers and names of layers, to count it."""
    reason = re.sub(r"\b[abcx]\d+(\.\w+)*\b", "L", reason)
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason)[:100]


def _pins(graph):
    pins = Counter()
    for group in graph.pinned:
        pins[blank(group.reason)] += group.size
    return pins


def _one_line(error):
    """The message of a refusal, which must be one line."""
    text = str(error)
    assert text and "\n" not in text, f"a refusal of several lines: {text!r}"
    return text


def _runs(model, inputs):
    try:
        with torch.no_grad():
            model(*copy.deepcopy(inputs))
    except RuntimeError:  # the batch size is written in the code
        return False
    return True


def _state(model):
    """All that surgery could touch: tensors, and the plain attributes of every module."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    plain = (int, float, str, tuple, list)
    attributes = {
        (path, name): copy.copy(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain)
    }
    return tensors, flags, attributes, repr(model)


def _unchanged(before, after):
    same = before[1:] == after[1:] and list(before[0]) == list(after[0])
    if not same or not all(torch.equal(before[0][name], after[0][name]) for name in before[0]):
        raise Wrong("the original was changed")


def _proof(model, graph, given):
    try:
        prove(model, graph, given)
    except ChipdeployError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"
