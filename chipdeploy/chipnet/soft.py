"""The soft phase: a user's network with differentiable gates on it, whose budget falls while it trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from chipdeploy.chipnet.costs import BUDGETS, Cost, CostModel
from chipdeploy.chipnet.gates import crisp_share, crispness, half_point, heaviside, logistic, rounding
from chipdeploy.chipnet.project import Projector
from chipdeploy.chipnet.schedule import Schedule
from chipdeploy.copying import copied
from chipdeploy.errors import UsageError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.gating import Gating, gated_call, no_checkpointing
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.proof import Trials
from chipdeploy.graph.trace import Example, trace

LATENCY = "latency"
MARGIN = 3.0  # distance, in logits, of a wholly kept or wholly cut group from its gates' centre


@dataclass(frozen=True)
class Budget:
    """What stays: a share of one cost, e.g. Budget("flops", 0.3), or of the measured time: Budget("latency", 0.5).

    Raises:
        UsageError: an unknown kind, or a share outside (0, 1).
    """

    kind: str
    keep: float

    def __post_init__(self) -> None:
        if self.kind not in (*BUDGETS, LATENCY):
            raise UsageError(f"unknown budget {self.kind!r}; use one of {', '.join((*BUDGETS, LATENCY))}")
        if not _is(Real, self.keep) or not 0.0 < self.keep < 1.0:
            raise UsageError(
                f"the {self.kind} budget is the share that stays, between 0 and 1, got {self.keep!r}; try 0.3"
            )
        object.__setattr__(self, "keep", float(self.keep))

    @property
    def cost(self) -> str:
        """The cost that is limited, a name in COSTS, or `latency`."""
        return BUDGETS.get(self.kind, self.kind)


def _together() -> bool:
    """Whether several processes train one network."""
    return distributed.is_available() and distributed.is_initialized()


def _is(kind: type, value: object) -> bool:
    """NumPy's numbers are numbers, too."""
    return isinstance(value, kind)


class ChipNet(nn.Module):
    """A network under soft pruning, for any training loop.

        chip = ChipNet(model, example, Budget("flops", 0.3), steps=2000)
        loss = chip.loss(F.cross_entropy(chip(images), labels)); loss.backward(); optimizer.step(); chip.step()
        small = hard_prune(chip.folded(), chip.graph, chip.plan())

    The user's optimizer trains `model`; the logits ψ are moved by `step`. The model's own tensors stay unscaled.
    Between two calls of `step` there may be several forward and backward passes: their gradients add up. With
    DistributedDataParallel the ChipNet is what is wrapped, not the model.

    Args:
        steps: how often `step` will be called; the gates close over that time.
        cost: makes the cost of a latency budget from the channel graph: `LatencyProfile.load(path).cost`.

    Raises:
        UsageError: a latency budget without `cost`, steps that are no number, or a model that is wrapped for many GPUs.
        ModelError: the model cannot be traced, has nothing to prune, or its cut would not equal its gated self.
        BudgetError: the budget is below the smallest connected network.
    """

    _heard: Tensor
    _shift: Tensor
    _goal: Tensor
    _planned: Tensor
    _group: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        budget: Budget,
        *,
        steps: int = 1000,
        align: int = 16,
        exclude: Sequence[str] = (),
        min_width: int = 1,
        blocks: bool = False,
        schedule: Schedule | None = None,
        cost: Callable[[ChannelGraph], Cost] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(budget, Budget):
            raise UsageError(f'a budget is made by Budget("flops", 0.3), got {budget!r}')
        if budget.kind == LATENCY and cost is None:
            raise UsageError("a latency budget needs a measured profile; give cost=LatencyProfile.load(path).cost")
        if not _is(Integral, steps) or steps < 1:
            raise UsageError(f"steps must be the number of training steps to come, 1 or more, got {steps!r}")
        if isinstance(model, DataParallel | DistributedDataParallel):
            raise UsageError(f"got a model inside {type(model).__name__}; make the ChipNet of the model, and wrap that")
        if halves := {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}:
            raise UsageError(
                f"the model's weights are {halves.pop()}, too coarse for gates; prune model.float(), under autocast if "
                "you like, and convert what is cut from it"
            )
        self.model, self.budget = model, budget
        self.schedule = schedule or Schedule()
        self.graph = trace(model, example, exclude=exclude)
        self.cost: Cost = cost(self.graph) if cost else CostModel.of(self.graph, budget.cost)
        power = self.schedule.value_power
        self.projector = Projector(self.graph, self.cost, align, min_width=min_width, blocks=blocks, power=power)
        self.projector.check(budget.keep)
        self._inputs = example if isinstance(example, tuple) else (example,)
        self._proven: set[bytes] = set()
        device = self._inputs[0].device
        self._gating = Gating(self.graph, device)
        self._soft_cost = self.cost.soft(device)
        self._steps, self._step = int(steps), 0
        count = self.graph.channels
        generator = torch.Generator().manual_seed(0)
        # ψ starts in U[0, 0.01), as published; while the gates listen it is set from what they hear.
        self.logits = nn.Parameter((torch.rand(count, generator=generator) * 0.01).to(device))
        self.register_buffer("_heard", torch.zeros(count, device=device))
        self.register_buffer("_shift", torch.zeros(count, device=device))
        self.register_buffer("_goal", torch.zeros(count, device=device))
        self.register_buffer("_planned", torch.ones(count, dtype=torch.bool, device=device))
        self.register_buffer("_group", torch.from_numpy(self.graph.group_of).to(device))
        # Half of the time that is left after the plan has settled closes 99 % of any distance.
        settled_steps = (1.0 - self.schedule.settle) * self._steps
        self._fade = 1.0 - 0.01 ** (1.0 / max(1.0, settled_steps / 2))
        rate = self.schedule.logit_travel / self._steps
        self.optimizer = torch.optim.AdamW([self.logits], lr=rate, weight_decay=self.schedule.logit_decay)
        self._begun = self._settled = self._checked = False
        self._last: tuple[Tensor, Tensor] | None = None
        self._open: Tensor | None = None  # the gates while they listen: all passes of a step add to their gradient

    @property
    def progress(self) -> float:
        """Share of the soft phase that is done, 0 to 1."""
        return min(1.0, self._step / self._steps)

    @property
    def listening(self) -> bool:
        """Whether all gates are still open."""
        return self.schedule.projected and self.progress < self.schedule.listen

    @property
    def _settling(self) -> bool:
        return self.schedule.projected and self.progress >= self.schedule.settle

    def forward(self, *inputs: Tensor) -> Any:
        """The gated network's output.

        Raises:
            UsageError: the model checkpoints activations, seen in the first training step.
        """
        curve, gates = self._gates()
        if gates.requires_grad:
            gates.retain_grad()
        if torch.is_grad_enabled() or self._last is None:  # a look at images without gradients counts nothing
            self._last = (curve, gates)
        looked_at = self._checked or not (self.model.training and torch.is_grad_enabled())
        with nullcontext() if looked_at else no_checkpointing():
            output = gated_call(self.model, self._gating, gates, *inputs)
        self._checked = self._checked or not looked_at
        return output

    def loss(self, task: Tensor) -> Tensor:
        """task + α1 · crispness + α2 · (V − V0)², of the gates of the last forward pass."""
        curve, gates = self._seen()
        if _together():
            task = task + 0.0 * self.logits.sum()  # else DDP waits in vain for ψ's gradient where it has none
        if self.listening:
            return task
        gap = self._share(gates) - self.target()
        return task + self.schedule.crispness_weight * crispness(curve, gates) + self.schedule.budget_weight * gap**2

    def step(self) -> None:
        """Move ψ and the schedule by one step; call it after the optimizer's own step.

        A gradient that is not finite, as the first ones of a GradScaler may be, moves and teaches nothing.

        Raises:
            UsageError: nothing went backward since the last step.
        """
        self._seen()
        if self.listening:
            self._hear(self._arrived(self._open))
        elif not self._settled:  # after that the gates only become crisp
            self.logits.grad = self._arrived(self.logits)
            self.optimizer.step()
        self._open = None
        self.optimizer.zero_grad(set_to_none=True)
        self._step += 1
        if self.schedule.projected and not self.listening:
            if not self._begun:
                self._begin()
            elif not self._settled and (self._step % self.schedule.renew == 0 or self._settling):
                self._project()
            self._settled = self._settled or self._settling
            self._shift += self._fade * (self._goal - self._shift)

    def target(self) -> float:
        """V0 at this step: the share that the soft network is to keep now."""
        return self.schedule.keep_at(self.progress, self.budget.keep)

    def gates(self) -> Tensor:
        """z of every channel, [channels], detached."""
        with torch.no_grad():
            return self._gates()[1]

    def soft_share(self) -> float:
        """V(z): the share of the budget's cost that the soft network counts."""
        with torch.no_grad():
            return float(self._share(self._gates()[1]))

    def crisp(self) -> float:
        """Share of gates within 0.05 of 0 or 1."""
        return float(crisp_share(self.gates()))

    def plan(self) -> PrunePlan:
        """The best plan under the budget, by ψ; from `settle` on the one that was found last. Never over the budget.

        Raises:
            ModelError: the network cut by this plan would not equal the gated one, which the trials did not show.
        """
        mask = self._planned.cpu().numpy() if self._settled else self._mask(self.budget.keep)
        self._prove(mask)
        return PrunePlan.from_mask(self.graph, mask)

    def folded(self, plan: PrunePlan | None = None, *, early: bool = False) -> nn.Module:
        """A copy of the model with the gates of the channels that the plan keeps multiplied into its weights.

        It is made to be cut by `plan`, by default this network's own: nothing is lost then but what closed gates let
        through. Before the cut the other channels stand in it at full strength. Raises ModelError as `plan` does.

        early: the gates may still be soft, and the cut a look ahead; without it that is warned of.
        """
        if self._step < self._steps and not early:
            warnings.warn(
                f"the gates are still soft after {self._step} of {self._steps} steps, so the cut will cost accuracy; "
                "give ChipNet the length of your loop: steps=…",
                stacklevel=2,
            )
        small = copied(self.model)
        parameters = dict(small.named_parameters())
        with torch.no_grad():
            kept = self._kept(self.plan())
            if plan is not None:
                self._prove(plan.mask(self.graph))
                kept &= self._kept(plan)  # what only another plan keeps has closed gates
            gates = torch.where(kept, self.gates(), 1.0)
            for name, scaled in self._gating.fold(gates, parameters).items():
                parameters[name].copy_(scaled)
        return small

    def get_extra_state(self) -> Tensor:
        """The place in the schedule, int64 [3]: it travels with `state_dict`."""
        return torch.tensor([self._step, self._begun, self._settled])

    def set_extra_state(self, state: Tensor) -> None:
        """Called by `load_state_dict`."""
        step, begun, settled = state.tolist()
        self._step, self._begun, self._settled = step, bool(begun), bool(settled)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChipNet:
        # The gates of the last forward pass belong to its autograd graph and cannot be copied.
        last, self._last = self._last, None
        try:
            twin = self.__class__.__new__(self.__class__)
            memo[id(self)] = twin
            copied(self.model, memo)
            twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        finally:
            self._last = last
        return twin

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Curve and gates of the last forward pass."""
        if self._last is None:
            raise UsageError("no forward pass yet; call the ChipNet on a batch before its loss() and step()")
        return self._last

    def _prove(self, mask: Mask) -> None:
        """No trial sees every plan: code that compares numbers of channels may go another way by this one."""
        if mask.tobytes() not in self._proven:
            Trials(self.model, self._inputs).check(self.graph, mask)
            self._proven.add(mask.tobytes())

    def _kept(self, plan: PrunePlan) -> Tensor:
        mask = plan.mask(self.graph)
        return torch.from_numpy(mask).to(self.logits.device)

    def _gates(self) -> tuple[Tensor, Tensor]:
        if self.listening:
            if not torch.is_grad_enabled():
                return (torch.ones_like(self.logits),) * 2
            if self._open is None:
                self._open = torch.ones_like(self.logits, requires_grad=True)
            return self._open, self._open
        beta, gamma = self.schedule.beta_at(self.progress), self.schedule.gamma_at(self.progress)
        if not self.schedule.projected:
            curve = logistic(self.logits, beta)
            return curve, heaviside(curve, gamma)
        logits = self.logits.detach() if self._settled else self.logits  # ψ rests once the plan has settled
        curve = logistic(logits + self._shift, beta, -half_point(beta, gamma))
        return curve, heaviside(curve, gamma)

    def _share(self, gates: Tensor) -> Tensor:
        kappa = self.schedule.kappa_at(self.progress)
        soft = rounding(gates, kappa)
        if self.schedule.projected:
            # Stretched so that r(0) = 0 and r(1) = 1: crisp gates are counted as they will be deployed.
            rest = 1.0 / (1.0 + exp(kappa / 2))
            soft = (soft - rest) / (1.0 - 2.0 * rest)
        widths = soft.new_zeros(len(self.graph.groups)).index_add(0, self._group, soft)
        return self._soft_cost(widths, self._gating.alive(soft))

    def _arrived(self, leaf: Tensor | None) -> Tensor:
        """The gradient that the passes of this step have left; zeros where a part of it is not finite."""
        if leaf is None or leaf.grad is None:
            raise UsageError("no gradient has reached the gates; call step() after backward() of loss(), once a step")
        # Where, and no if: nothing waits for the device.
        return torch.where(leaf.grad.square().isfinite().all(), leaf.grad, torch.zeros_like(leaf.grad))

    def _hear(self, gradient: Tensor) -> None:
        """Importance of a channel: the mean square of ∂loss/∂z at z = 1 (Molchanov et al., CVPR 2019, eq. 8)."""
        self._heard += gradient.square()

    def _ranks(self) -> Tensor:
        """ψ, [channels]; before it begins what it would begin with now: ½ ln importance, so that e^{2ψ} is what was
        heard."""
        logits = self.logits.detach()
        if self._begun or not self.schedule.projected:
            return logits
        heard = self._heard / self._heard.mean().clamp_min(1e-30)
        return 0.5 * torch.log(heard + 1e-6) + logits

    def _begin(self) -> None:
        """ψ takes up what was heard, by all processes where there are many: each has its own images."""
        if _together():
            distributed.all_reduce(self._heard)
        with torch.no_grad():
            self.logits.copy_(self._ranks())
        self._begun = True
        self._project()
        self._shift.copy_(self._goal)

    def scores(self) -> np.ndarray:
        """Value of every channel for the projection, float64 [channels]; rising in ψ, so ψ alone ranks."""
        logits = self._ranks().double().cpu().numpy()
        values: np.ndarray = np.exp(2.0 * np.clip(logits, -30.0, 30.0))
        return values

    def _mask(self, keep: float, start: Ints | None = None) -> Mask:
        return self.projector.project(self.scores(), keep, start=start)

    def _project(self) -> None:
        """Renew the plan under the falling budget, and where every gate's centre is to go."""
        keep = self.target()
        # On the way the search goes on from the last plan; the one that is cut is searched for from the beginning.
        start = None if self._settling else group_widths(self.graph, self._planned.cpu().numpy())
        mask = np.ones(self.graph.channels, dtype=np.bool_) if keep >= 1.0 else self._mask(keep, start)
        self._planned.copy_(torch.from_numpy(mask))
        self._goal.copy_(torch.from_numpy(self._centres(mask)).to(self._goal))

    def _centres(self, mask: Mask) -> np.ndarray:
        """−threshold of every channel's group, plus a gap that grows with progress and so makes the gates crisp."""
        logits = self.logits.detach().double().cpu().numpy()
        goal = np.empty(self.graph.channels)
        gap = self.progress
        for group in range(len(self.graph.groups)):
            span = self.graph.span(group)
            values, kept = logits[span], mask[span]
            if kept.all():
                threshold = values.min() - MARGIN
            elif not kept.any():
                threshold = values.max() + MARGIN
            else:
                threshold = (values[kept].min() + values[~kept].max()) / 2
            goal[span] = np.where(kept, gap, -gap) - threshold
        return goal
