"""One pruning run: soft epochs, the cut, finetune epochs; after each epoch its state is on disk."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chipdeploy import checkpoint
from chipdeploy.chipnet.soft import LATENCY, Budget, ChipNet
from chipdeploy.config import PruneConfig
from chipdeploy.files import digest
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.job import Job
from chipdeploy.latency.meet import TRIES
from chipdeploy.meeting import Meeting, projector_of, step
from chipdeploy.run import Run
from chipdeploy.sizing import Sizing
from chipdeploy.training.loop import Watcher, evaluate, renew_norms
from chipdeploy.training.weights import load_weights

CRISP_ENOUGH = 0.95
SHARE_TOLERANCE = 0.02  # |V(z) − V0| of an epoch that may be cut


class Pruning:
    """One pruning run: soft epochs, the cut, finetune epochs; after each the state is on disk."""

    def __init__(
        self, config: PruneConfig, job: Job, run: Run, dense: Path, watcher: Watcher, meeting: Meeting | None = None
    ) -> None:
        self.config, self.job, self.run, self.watcher, self.meeting = config, job, run, watcher, meeting
        self.dense = job.model()
        load_weights(self.dense, dense)
        self.inputs = {**job.inputs, "weights": digest(dense)}
        rules = job.recipe
        self.soft_epochs = config.soft_epochs or rules.soft_epochs
        self.finetune_epochs = rules.finetune_epochs if config.finetune_epochs is None else config.finetune_epochs
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # facts of the soft epoch that will be cut
        self.best_state: dict[str, Tensor] = {}

    def soft(self) -> tuple[ChannelGraph, PrunePlan, nn.Module]:
        """Soft pruning; returns the graph, the plan of the best epoch, and the network cut by it."""
        job, config = self.job, self.config
        model = job.model()
        model.load_state_dict(self.dense.state_dict())
        budget, align = self._budget(model)
        chip = ChipNet(
            model,
            job.example,
            budget,
            steps=self.soft_epochs * job.soft_steps,
            align=align,
            exclude=config.exclude,
            min_width=config.min_width,
            blocks=config.blocks,
            schedule=job.recipe.schedule,
            cost=self.meeting.profile.cost if self.meeting and budget.kind == LATENCY else None,
        )
        optimizer = job.soft_optimizer(model, self._keep)
        self._resume("soft", {"chip": chip, "optimizer": optimizer, "logits": chip.optimizer})
        done = sum(row["phase"] == "soft" for row in self.rows)
        self.watcher.phase("soft pruning", self.soft_epochs - done, job.soft_steps)
        for epoch in range(done, self.soft_epochs):
            rate = partial(self._soft_rate, epoch * job.soft_steps)
            loss = job.epoch(chip, optimizer, epoch, rate, self.watcher, batch=job.soft_batch)
            self._note(self._look(chip, epoch, loss))
            self._save("soft", {"chip": chip, "optimizer": optimizer, "logits": chip.optimizer})
        assert self.best is not None
        limited = self.config.max_size_mb or (self.meeting and self.meeting.goal)
        if limited and not self.best.get("settled"):
            self._settle(chip)
            self._save("soft", {"chip": chip, "optimizer": optimizer, "logits": chip.optimizer})
        plan = PrunePlan.from_dict(self.best["plan"])
        small = hard_prune(self.dense, chip.graph, plan)
        small.load_state_dict(self.best_state)
        return chip.graph, plan, small

    @property
    def _keep(self) -> float:
        """The share that stays of what the budget counts, or of the time."""
        return self.meeting.share if self.meeting and self.meeting.goal else self.config.keep

    def _budget(self, model: nn.Module) -> tuple[Budget, int]:
        """What the soft phase keeps to, and the channels by which widths go."""
        if not self.meeting:
            return Budget(self.config.kind, self.config.keep), step(self.config)
        graph = trace(model, self.job.example, exclude=self.config.exclude)
        align = step(self.config, self.meeting, graph)
        if not self.meeting.goal:
            return Budget(self.config.kind, self.config.keep), align
        cost = self.meeting.profile.cost(graph)
        projector = projector_of(self.config, graph, cost, self.meeting, self.job.recipe.schedule)
        return self.meeting.budget(projector), align

    def _settle(self, chip: ChipNet) -> None:
        """Replace the plan by one whose measured time meets the goal, and whose engine fits the size.

        The finetune changes neither, so both are looked at before it.
        """
        assert self.best is not None
        sizing = Sizing.of(self.config, chip.model, chip.projector)
        with sizing or nullcontext():
            if self.meeting and self.meeting.goal:
                self.watcher.phase("measuring cuts", 1, TRIES)
                project = sizing.project if sizing else chip.projector.project
                shown = lambda one: self.watcher.step(1, {"of the dense time": one.ratio})  # noqa: E731
                met = self.meeting.settle(chip.model, chip, project, shown)
                self._take(chip, met.mask)
                self.best["met"] = met.to_dict()
            elif sizing and not sizing.fits(self._mask(chip)):
                self._take(chip, sizing.project(chip.scores(), chip.budget.keep))
            if sizing:
                self.best["memory"] = sizing.facts(self._mask(chip))
        self.best["settled"] = True

    def _mask(self, chip: ChipNet) -> Mask:
        """The channels of the plan that will be cut."""
        assert self.best is not None
        return PrunePlan.from_dict(self.best["plan"]).mask(chip.graph)

    def _take(self, chip: ChipNet, mask: Mask) -> None:
        """Cut by another plan than the soft phase's; channels that it adds come back as they were."""
        assert self.best is not None
        plan = PrunePlan.from_mask(chip.graph, mask)
        if plan.to_dict() == self.best["plan"]:
            return
        cut = hard_prune(chip.folded(plan), chip.graph, plan)
        renew_norms(cut, self.job.data.train, batch=self.job.batch, device=self.job.device)
        self.best |= {"plan": plan.to_dict(), "val_cut": evaluate(cut, self.job.data.val, self.job.device)}
        self.best_state = {name: tensor.clone() for name, tensor in cut.state_dict().items()}

    def _look(self, chip: ChipNet, epoch: int, loss: float) -> dict[str, Any]:
        """Soft and cut network on the validation images; the best feasible, crisp, unbroken cut so far is kept."""
        job, plan = self.job, chip.plan()
        cut = hard_prune(chip.folded(early=True), chip.graph, plan)
        renew_norms(cut, job.data.train, batch=job.batch, device=job.device)
        row: dict[str, Any] = {
            "phase": "soft",
            "epoch": epoch + 1,
            "loss": loss,
            "val_soft": evaluate(chip, job.data.val, job.device),
            "val_cut": evaluate(cut, job.data.val, job.device),
            "budget_soft": chip.soft_share(),
            "budget_cut": chip.cost.count(group_widths(chip.graph, plan.mask(chip.graph))) / chip.cost.dense,
            "budget_target": chip.budget.keep,
            "crisp": chip.crisp(),
        }
        ready = row["crisp"] >= CRISP_ENOUGH and row["budget_soft"] <= row["budget_target"] + SHARE_TOLERANCE
        last = epoch + 1 == self.soft_epochs
        better = self.best is None or (ready, row["val_cut"]) > (self.best["ready"], self.best["val_cut"])
        # Without a ready epoch the last one is cut: its gates are the crispest that there are.
        if better or (last and not self.best["ready"]):  # type: ignore[index]
            self.best = {"ready": ready, "epoch": epoch + 1, "val_soft": row["val_soft"], "val_cut": row["val_cut"]}
            self.best["plan"] = plan.to_dict()
            self.best_state = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
        return row

    def finetune(self, small: nn.Module) -> nn.Module:
        """Train the cut network; its weights are those of the best epoch on the validation images."""
        job = self.job
        small = small.to(memory_format=torch.channels_last)
        optimizer, teacher = job.optimizer(small, self._keep), job.teacher(self.dense)
        self._resume("finetune", {"model": small, "optimizer": optimizer})
        done = sum(row["phase"] == "finetune" for row in self.rows)
        self.watcher.phase("finetune", self.finetune_epochs - done, job.steps)
        before = self.soft_epochs * job.soft_steps if job.recipe.joined else 0
        for epoch in range(done, self.finetune_epochs):
            number = self.soft_epochs + epoch
            rate = partial(self._rate, before + epoch * job.steps)
            loss = job.epoch(small, optimizer, number, rate, self.watcher, teacher=teacher)
            accuracy = evaluate(small, job.data.val, job.device)
            assert self.best is not None
            if accuracy >= self.best.get("val", 0.0):
                self.best["val"] = accuracy
                self.best_state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
            self._note({"phase": "finetune", "epoch": epoch + 1, "loss": loss, "val": accuracy})
            self._save("finetune", {"model": small, "optimizer": optimizer})
        small.load_state_dict(self.best_state)
        return small

    def _soft_rate(self, before: int, step: int) -> float:
        total = self.soft_epochs * self.job.soft_steps
        if self.job.recipe.joined:
            total += self.finetune_epochs * self.job.steps
        return self.job.soft_rate(before + step, total)

    def _rate(self, before: int, step: int) -> float:
        total = self.finetune_epochs * self.job.steps
        if self.job.recipe.joined:
            total += self.soft_epochs * self.job.soft_steps
        return self.job.rate(before + step, total)

    def _note(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.run.write_metrics(self.rows)
        self.watcher.epoch(row)

    def _save(self, phase: str, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
        tensors = {f"best.{name}": tensor for name, tensor in self.best_state.items()}
        for name, part in parts.items():
            tensors |= checkpoint.pack(name, part)
        facts = {
            "phase": phase,
            "inputs": self.inputs,
            "rows": self.rows,
            "best": self.best,
        }
        checkpoint.save(self.run.file(checkpoint.NAME), tensors, facts)

    def _resume(self, phase: str, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
        path = self.run.file(checkpoint.NAME)
        if not path.is_file():
            return
        tensors, facts = checkpoint.load(path)
        self.run.check_inputs(facts["inputs"], self.inputs)
        self.rows, self.best = facts["rows"], facts["best"]
        prefix = "best."
        self.best_state = {
            n.removeprefix(prefix): t.to(self.job.device) for n, t in tensors.items() if n.startswith(prefix)
        }
        if facts["phase"] != phase:
            return
        for name, part in parts.items():
            checkpoint.unpack(name, tensors, part)
