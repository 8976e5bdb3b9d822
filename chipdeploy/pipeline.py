"""The main job: dense network ▶ soft pruning ▶ cut ▶ finetune ▶ test, as a run that can be interrupted anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chipdeploy import checkpoint
from chipdeploy.chipnet.costs import COSTS, UNITS, CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.chipnet.soft import LATENCY, Budget, ChipNet
from chipdeploy.config import PruneConfig, TrainConfig
from chipdeploy.errors import MissingError, ModelError, RunError
from chipdeploy.files import digest
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.plan import PrunePlan, dead_branches, group_widths
from chipdeploy.graph.proof import evaluating
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.latency.meet import TRIES
from chipdeploy.latency.profiling import OnRound
from chipdeploy.latency.store import FOLDER
from chipdeploy.meeting import MEASURED, PROFILE, Meeting, arrange, keep_profile, latency_facts, step
from chipdeploy.run import CONFIG, Run, make_folder, read_json, write_json
from chipdeploy.sizing import Sizing
from chipdeploy.training.data import ImageData, load_data
from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Watcher, evaluate, renew_norms, train_epoch
from chipdeploy.training.models import build_model
from chipdeploy.training.recipes import Recipe, recipe
from chipdeploy.training.weights import load_weights, save_weights

PRUNED, DENSE, PLAN, RESULT, DATA = (
    "pruned.safetensors",
    "dense.safetensors",
    "plan.json",
    "result.json",
    "data.json",
)
PROFILES = Path("runs") / FOLDER
CRISP_ENOUGH = 0.95
LEARNT_EPOCHS = 30  # a dense network trained for fewer has less to teach than the images have
SHARE_TOLERANCE = 0.02  # |V(z) − V0| of an epoch that may be cut


@dataclass(frozen=True)
class Job:
    """A configuration with its parts loaded."""

    config: TrainConfig
    data: ImageData
    recipe: Recipe
    device: torch.device

    @property
    def example(self) -> Tensor:
        """Two random images [2, C, H, W]: a batch of 1 would let the tracer specialise on it."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.data.shape, generator=generator).to(self.device)

    @property
    def batch(self) -> int:
        return self.config.batch or self.recipe.batch

    @property
    def soft_batch(self) -> int:
        return self.config.batch or self.recipe.soft_batch

    @property
    def steps(self) -> int:
        """Steps in an epoch of the dense training and the finetune."""
        return max(1, len(self.data.train) // self.batch)

    @property
    def soft_steps(self) -> int:
        """Steps in an epoch of soft pruning."""
        return max(1, len(self.data.train) // self.soft_batch)

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what the settings only name: the data, and the file of a model that comes from one."""
        return {"data": self.data.digest, **model_digest(self.config.model)}

    def model(self) -> nn.Module:
        """A fresh network, its initial weights drawn from the seed."""
        torch.manual_seed(self.config.seed)
        model = build_model(
            self.config.model,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            image_size=self.data.image_size,
        )
        return model.to(self.device).to(memory_format=torch.channels_last)

    def rate(self, step: int, total: int) -> float:
        """Learning rate at a step of `total`."""
        return (self.config.lr or self.recipe.rate) * self.recipe.curve(step / total, step // self.steps)

    def soft_rate(self, step: int, total: int) -> float:
        """Learning rate of the weights at a step of the soft phase; constant for AdamW, as published."""
        return self.recipe.soft_adam or self.rate(step, total)

    def teacher(self, dense: nn.Module) -> Teacher | None:
        """The trained dense network as the finetune's teacher; None where its answers count nothing."""
        assert isinstance(self.config, PruneConfig)
        weight = self.config.distill
        if weight is None:
            learnt = self.config.weights or (self.config.train_epochs or self.recipe.train_epochs) >= LEARNT_EPOCHS
            weight = self.recipe.distill if learnt else 0.0
        return Teacher(dense.eval(), weight, self.recipe.temperature) if weight else None


def prepare(config: TrainConfig) -> Job:
    """Load what a configuration names.

    Raises:
        DataError, UsageError, MissingError: data, recipe or device that cannot be had.
    """
    rules = recipe(config.recipe)
    data = load_data(
        config.data,
        root=Path(config.data_root) if config.data_root else None,
        mean=config.mean,
        std=config.std,
        image_size=config.image_size,
    )
    return Job(config, data, rules, pick_device(config.device))


def model_digest(spec: str) -> dict[str, str]:
    """{"model": sha256} for a spec `FILE.py:FUNCTION`, nothing for other specs."""
    path = Path(spec.rpartition(":")[0])
    return {"model": digest(path)} if path.suffix == ".py" and path.is_file() else {}


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises MissingError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a device without memory fails here
    except (RuntimeError, AssertionError) as error:
        raise MissingError(f"no device {name!r} here; use --device cpu or auto") from error
    return device


def check_budget(
    config: PruneConfig,
    job: Job,
    *,
    profiles: Path = PROFILES,
    run: Path | None = None,
    on_round: OnRound | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[str, Meeting | None]:
    """The budget in full, once it is known that the model can be pruned to it and the weights fit.

    Args:
        profiles: where a latency profile is looked for, and kept if one must be measured.
        run: the run's folder, if it is known: a run that was begun goes on by its own profile.
        tell: is told before anything is measured, in one line.

    Raises:
        ModelError, BudgetError, WeightsError: before anything is written.
    """
    model = job.model()
    if config.weights:
        load_weights(model, Path(config.weights))
    graph = trace(model, job.example, exclude=config.exclude)
    _check_output(model, job.example, job.data.num_classes)
    size = _check_size(config, model, graph)
    meeting = arrange(config, model, graph, folder=profiles, run=run, on_round=on_round, tell=tell)
    if meeting and meeting.goal:
        return f"take at most {meeting.text()}{size}", meeting
    budget = Budget(config.kind, config.keep)
    cost = CostModel.of(graph, budget.cost)
    align = step(config, meeting, graph)
    projector = Projector(graph, cost, align, min_width=config.min_width, blocks=config.blocks)
    projector.check(config.keep)
    unit = UNITS[budget.cost]
    text = f"keep at most {config.keep:.4g} of the {unit}: {config.keep * cost.dense:,.0f} of {cost.dense:,.0f}"
    return text + size, meeting


def _check_size(config: PruneConfig, model: nn.Module, graph: ChannelGraph) -> str:
    """The limit of the memory in words; empty where there is none. Raises BudgetError for one out of reach.

    The smallest plan is the same whatever is budgeted, so this needs no profile.
    """
    projector = Projector(
        graph, CostModel.of(graph, "params"), step(config), min_width=config.min_width, blocks=config.blocks
    )
    sizing = Sizing.of(config, model, projector)
    if sizing is None:
        return ""
    with sizing:
        sizing.check()
    return f"; at most {sizing.text()}"


def _check_output(model: nn.Module, example: Tensor, classes: int) -> None:
    """Raises ModelError where the model gives something else than logits [N, classes]."""
    with evaluating(model), torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ModelError(f"the model returns a {kind}; here one tensor [N, {classes}] is needed; see docs/own-model.md")
    if tuple(output.shape) != (len(example), classes):
        raise ModelError(f"the model returns {list(output.shape)} for {len(example)} images of {classes} classes")


def train_dense(job: Job, folder: Path, watcher: Watcher) -> Path:
    """Train the dense network, or find the one trained before with the same settings below `folder`; returns its file.

    The file holds the weights; a JSON file beside it the settings and the accuracies.
    """
    settings = job.config.model_dump(include=set(TrainConfig.model_fields))
    settings |= {f"{name}_digest": value for name, value in job.inputs.items()}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{Path(job.config.model).stem.replace(':', '-')}-{key}.safetensors"
    facts = path.with_suffix(".json")
    if path.is_file() and facts.is_file() and read_json(facts)["sha256"] == digest(path):
        return path
    make_folder(folder)
    model = job.model()
    epochs = job.config.train_epochs or job.recipe.train_epochs
    optimizer = _sgd(model, job)
    rows: list[dict[str, Any]] = []
    saved = path.with_suffix(".partial")
    if saved.is_file():
        tensors, state = checkpoint.load(saved)
        checkpoint.unpack("model", tensors, model)
        checkpoint.unpack("optimizer", tensors, optimizer)
        rows = state["rows"]
    watcher.phase("dense", epochs - len(rows), job.steps)
    for epoch in range(len(rows), epochs):
        before = epoch * job.steps
        rate = partial(_dense_rate, job, before, epochs * job.steps)
        loss = _epoch(job, model, optimizer, epoch, rate, job.batch, watcher)
        rows.append(
            {"phase": "dense", "epoch": epoch + 1, "loss": loss, "val": evaluate(model, job.data.val, job.device)}
        )
        watcher.epoch(rows[-1])
        checkpoint.save(
            saved, checkpoint.pack("model", model) | checkpoint.pack("optimizer", optimizer), {"rows": rows}
        )
    save_weights(model, path)
    write_json(facts, {"settings": settings, "metrics": rows, "sha256": digest(path)})
    saved.unlink(missing_ok=True)
    return path


def _sgd(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    rules = job.recipe
    return torch.optim.SGD(
        model.parameters(), lr=rules.rate, momentum=rules.momentum, weight_decay=rules.weight_decay, nesterov=True
    )


def _dense_rate(job: Job, before: int, total: int, step: int) -> float:
    return job.rate(before + step, total)


def _epoch(
    job: Job,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    rate: Callable[[int], float],
    batch: int,
    watcher: Watcher,
    teacher: Teacher | None = None,
) -> float:
    """One epoch; its seed follows from its number."""
    return train_epoch(
        network,
        job.data.train,
        optimizer,
        rate,
        batch=batch,
        seed=job.config.seed * 100_003 + epoch,
        device=job.device,
        watcher=watcher,
        teacher=teacher,
    )


class Pruning:
    """One pruning run: soft epochs, the cut, finetune epochs; after each the state is on disk."""

    def __init__(
        self, config: PruneConfig, job: Job, run: Run, dense: Path, watcher: Watcher, meeting: Meeting | None = None
    ) -> None:
        self.config, self.job, self.run, self.watcher, self.meeting = config, job, run, watcher, meeting
        self.dense = job.model()
        load_weights(self.dense, dense)
        self._inputs = {**job.inputs, "weights": digest(dense)}
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
        optimizer = self._soft_optimizer(model)
        self._resume("soft", {"chip": chip, "optimizer": optimizer, "logits": chip.optimizer})
        done = sum(row["phase"] == "soft" for row in self.rows)
        self.watcher.phase("soft pruning", self.soft_epochs - done, job.soft_steps)
        for epoch in range(done, self.soft_epochs):
            rate = partial(self._soft_rate, epoch * job.soft_steps)
            loss = _epoch(job, chip, optimizer, epoch, rate, job.soft_batch, self.watcher)
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

    def _budget(self, model: nn.Module) -> tuple[Budget, int]:
        """What the soft phase keeps to, and the channels by which widths go."""
        if not self.meeting:
            return Budget(self.config.kind, self.config.keep), step(self.config)
        graph = trace(model, self.job.example, exclude=self.config.exclude)
        align = step(self.config, self.meeting, graph)
        if self.meeting.goal:
            return self.meeting.budget(graph, align), align
        return Budget(self.config.kind, self.config.keep), align

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
        cut = hard_prune(chip.folded(), chip.graph, plan)
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
        optimizer, teacher = _sgd(small, job), job.teacher(self.dense)
        self._resume("finetune", {"model": small, "optimizer": optimizer})
        done = sum(row["phase"] == "finetune" for row in self.rows)
        self.watcher.phase("finetune", self.finetune_epochs - done, job.steps)
        before = self.soft_epochs * job.soft_steps if job.recipe.joined else 0
        for epoch in range(done, self.finetune_epochs):
            number = self.soft_epochs + epoch
            rate = partial(self._rate, before + epoch * job.steps)
            loss = _epoch(job, small, optimizer, number, rate, job.batch, self.watcher, teacher)
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

    def _soft_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rules = self.job.recipe
        if rules.soft_adam:
            return torch.optim.AdamW(model.parameters(), lr=rules.soft_adam, weight_decay=rules.weight_decay)
        return _sgd(model, self.job)

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
            "inputs": self._inputs,
            "rows": self.rows,
            "best": self.best,
        }
        checkpoint.save(self.run.file(checkpoint.NAME), tensors, facts)

    def _resume(self, phase: str, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
        path = self.run.file(checkpoint.NAME)
        if not path.is_file():
            return
        tensors, facts = checkpoint.load(path)
        if changed := [name for name, digest in self._inputs.items() if facts["inputs"].get(name) != digest]:
            raise RunError(f"the {changed[0]} of {self.run.path} changed since it was started; choose another --run")
        self.rows, self.best = facts["rows"], facts["best"]
        prefix = "best."
        self.best_state = {
            n.removeprefix(prefix): t.to(self.job.device) for n, t in tensors.items() if n.startswith(prefix)
        }
        if facts["phase"] != phase:
            return
        for name, part in parts.items():
            checkpoint.unpack(name, tensors, part)


def prune(
    config: PruneConfig, job: Job, run: Run, dense: Path, watcher: Watcher, meeting: Meeting | None = None
) -> dict[str, Any]:
    """Run or resume a pruning run to its end; returns the result that is also written as result.json.

    Args:
        meeting: of `check_budget`; needed where the configuration asks for a latency, or for the device's own stairs.
    """
    keep_profile(run, meeting)
    pruning = Pruning(config, job, run, dense, watcher, meeting)
    graph, plan, small = pruning.soft()
    small = pruning.finetune(small)
    save_weights(pruning.dense, run.file(DENSE))
    save_weights(small, run.file(PRUNED))
    run.write(PLAN, plan.to_dict())
    run.write(DATA, describe_data(job.data))
    # The test images are looked at here and nowhere else.
    accuracy = {
        "dense": evaluate(pruning.dense, job.data.test, job.device),
        "pruned": evaluate(small, job.data.test, job.device),
        "test_images": len(job.data.test),
    }
    assert pruning.best is not None
    validation = {"soft": pruning.best["val_soft"], "cut": pruning.best["val_cut"], "epoch": pruning.best["epoch"]}
    result = summarise(config, graph, plan, accuracy, meeting, pruning.best.get("met"))
    teacher = job.teacher(pruning.dense)
    result |= {"validation": validation, "inputs": job.inputs, "distill": teacher.weight if teacher else 0.0}
    if "memory" in pruning.best:
        result["memory"] = pruning.best["memory"]
    if "met" in pruning.best:
        run.write(MEASURED, pruning.best["met"])
    run.write(RESULT, result)
    run.seal([CONFIG, DENSE, PRUNED, PLAN, RESULT, DATA, *([PROFILE] if meeting else [])])
    run.finish("prune")
    run.file(checkpoint.NAME).unlink(missing_ok=True)
    return result


def summarise(
    config: PruneConfig,
    graph: ChannelGraph,
    plan: PrunePlan,
    accuracy: dict[str, Any],
    meeting: Meeting | None = None,
    met: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run achieved, as plain values: see report/ for the reader."""
    mask = plan.mask(graph)
    widths = group_widths(graph, mask)
    models = {name: CostModel.of(graph, name) for name in COSTS}
    costs = {
        "dense": {name: int(model.dense) for name, model in models.items()},
        "pruned": {name: int(model.count(widths)) for name, model in models.items()},
    }
    facts: dict[str, Any] = {} if not (meeting and met) else {"latency": latency_facts(meeting, met)}
    return facts | {
        "schema": 1,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "align": step(config, meeting, graph),
        "budget": _latency_budget(met) if met else _cost_budget(config, costs),
        "accuracy": accuracy,
        "costs": costs,
        "layers": layer_widths(graph, plan),
        "removed_branches": [graph.branches[i].name for i in dead_branches(graph, widths)],
        "plan_digest": plan.digest,
    }


def _cost_budget(config: PruneConfig, costs: dict[str, dict[str, int]]) -> dict[str, Any]:
    kind = Budget(config.kind, config.keep).cost
    return {
        "kind": config.kind,
        "keep": config.keep,
        "dense": costs["dense"][kind],
        "limit": config.keep * costs["dense"][kind],
        "achieved": costs["pruned"][kind] / costs["dense"][kind],
        "unit": UNITS[kind],
    }


def _latency_budget(met: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": LATENCY,
        "keep": met["goal"],
        "dense": met["dense_ms"],
        "limit": met["goal"] * met["dense_ms"],
        "achieved": met["ratio"],
        "unit": "ms",
        "kept": met["pruned_ms"],
    }


def layer_widths(graph: ChannelGraph, plan: PrunePlan) -> list[dict[str, Any]]:
    """Output channels of every layer, dense and kept; a layer of a removed branch keeps none."""
    mask = plan.mask(graph)
    gone = set(dead_branches(graph, group_widths(graph, mask)))
    return [
        {
            "name": layer.name,
            "dense": len(layer.out_index),
            "kept": 0 if layer.branch in gone else int(((layer.out_index < 0) | mask[layer.out_index]).sum()),
        }
        for layer in graph.layers
    ]


def describe_data(data: ImageData) -> dict[str, Any]:
    """What a deployed model must know of its data."""
    return {
        "name": data.name,
        "shape": list(data.shape),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "digest": data.digest,
    }


def load(run_dir: str | Path, *, dense: bool = False) -> nn.Module:
    """The pruned network of a finished run (or its dense one), rebuilt from plan and safetensors, in eval mode.

    Raises:
        RunError: no finished run, or a file that was changed after it was written.
        ModelError: the model's own file is gone.
    """
    run = Run.open(Path(run_dir))
    data = read_json(run.check(DATA))
    config = read_json(run.check(CONFIG))
    spec = config["model"]
    channels, size = data["shape"][0], data["shape"][1]
    model = build_model(spec, num_classes=len(data["classes"]), in_channels=channels, image_size=size)
    if read_json(run.check(RESULT))["inputs"].get("model") != model_digest(spec).get("model"):
        raise RunError(f"{spec.rpartition(':')[0]} was changed since {run.path} was made from it; make the run again")
    if not dense:
        example = torch.randn(2, *data["shape"], generator=torch.Generator().manual_seed(0))
        graph = trace(model, example, exclude=config["exclude"])
        model = hard_prune(model, graph, PrunePlan.from_dict(read_json(run.check(PLAN))))
    load_weights(model, run.check(DENSE if dense else PRUNED))
    return model.eval()
