"""A pruning run with a latency for its goal: the profile it goes by, the budget that follows, the plan that holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from chipdeploy.chipnet.costs import Cost, Floats
from chipdeploy.chipnet.project import Projector
from chipdeploy.chipnet.schedule import Schedule
from chipdeploy.chipnet.soft import LATENCY, Budget, ChipNet
from chipdeploy.config import DEFAULT_ALIGN, PruneConfig
from chipdeploy.engines.target import Target
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.latency.calibrate import check_reach, curves
from chipdeploy.latency.goal import Goal
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.meet import Met, OnTry, meet
from chipdeploy.latency.profile import LatencyProfile
from chipdeploy.latency.profiling import OnRound, measure_profile
from chipdeploy.latency.rig import Rig, Setting
from chipdeploy.latency.store import by_name, matching, place
from chipdeploy.run import Run, make_folder
from chipdeploy.training.recipes import recipe

PROFILE, MEASURED = "profile.json", "latency.json"
Project = Callable[[Floats, float], Mask]
VIA_FLOPS = "flops"
DRIFT = 0.1  # of the dense time: on a quiet machine it differs by some per cent from one day to the next


@dataclass(frozen=True)
class Meeting:
    """What a run knows of its device.

    Args:
        goal: None where the profile is only asked for its stairs.
        profile: measured, or found.
        foreign: why the profile is not of this machine or network; empty where it is.
    """

    goal: Goal | None
    profile: LatencyProfile
    via: str
    foreign: str = ""

    @property
    def share(self) -> float:
        """The goal over the dense time."""
        assert self.goal
        return self.goal.share(self.profile.dense_ms, self.profile.setting.batch)

    @property
    def ms(self) -> float | None:
        """The goal, where it is in milliseconds or images a second."""
        return self.goal.ms(self.profile.setting.batch) if self.goal else None

    def budget(self, projector: Projector) -> Budget:
        """What the soft phase keeps to: the latency itself, or the FLOPs that are predicted to give it."""
        if self.via != VIA_FLOPS:
            # A goal a little below what the smallest network is predicted to take is tried, see `check_reach`.
            return Budget(LATENCY, max(self.share, projector.smallest))
        curve = curves(projector, self.profile.cost(projector.graph), kinds=(VIA_FLOPS,))[0]
        at = curve.at(self.share)
        return Budget(VIA_FLOPS, min(0.99, at[0] if at else float(curve.keep[0])))

    def settle(self, model: nn.Module, chip: ChipNet, project: Project, on_try: OnTry | None = None) -> Met:
        """The plan whose measured time meets the goal, by the ranking that `chip` has learnt.

        Args:
            project: the best plan under a share of the budget, by scores.
        """
        cost = self.profile.cost(chip.graph)
        scores, smallest = chip.scores(), chip.projector.smallest

        def propose(keep: float) -> Mask:
            return project(scores, min(0.9999, max(keep, smallest)))

        with Rig(model, chip.graph, self.profile.setting) as rig:
            return meet(rig, cost, propose, self.share, ms=self.ms, on_try=on_try)

    def text(self) -> str:
        """One line: the goal, in ms and as a share, and where."""
        assert self.goal
        return f"{self.goal.text(self.profile.dense_ms, self.profile.setting.batch)} ({self.profile.setting.name})"


def wanted_goal(config: PruneConfig) -> Goal | None:
    """The latency that a configuration asks for. Raises UsageError for two."""
    return Goal.of(config.latency, config.latency_ms, config.fps)


def arrange(
    config: PruneConfig,
    model: nn.Module,
    graph: ChannelGraph,
    *,
    folder: Path,
    run: Path | None = None,
    on_round: OnRound | None = None,
    tell: Callable[[str], None] | None = None,
) -> Meeting | None:
    """Find or measure the profile that a configuration needs; None where it needs none.

    A run that was begun goes on by its own profile; otherwise the one that is named, then the user's own of this
    machine, and where there is none, one is measured and kept in `folder`. One that was interrupted goes on.

    Args:
        tell: is told before anything is measured, and of a profile that is mostly noise, each in one line.

    Raises:
        UsageError: two goals, or one that is met already. BudgetError: one out of reach.
        RunError: a profile that is damaged, or of something else.
    """
    goal = wanted_goal(config)
    if goal is None and config.align != "auto":
        return None
    setting = setting_of(config, graph)
    here = environment_of(setting.target)
    profile = _named(config, folder, run)
    if profile is None:
        path, profile = matching(graph, setting, here, folder) or (None, None)
        if profile is None or not profile.finished:
            path = path or place(config.model, graph, setting, here, folder)
            make_folder(folder)
            if tell:
                tell(f"measuring {config.model} on {setting.name}: about {config.minutes:g} minutes, kept in {path}")
            seed = profile.seed if profile else 0  # of one that was begun
            profile = measure_profile(
                model,
                graph,
                setting,
                name=config.model,
                minutes=config.minutes,
                seed=seed,
                path=path,
                on_round=on_round,
            )
    profile.check_setting(setting)
    profile.check_graph(graph)
    if tell and 2 * profile.noisy_rounds > len(profile.rounds):
        tell(
            f"note: {profile.noisy_rounds} of the profile's {len(profile.rounds)} rounds are noisy; "
            "for a better prediction profile again while the machine is quiet, with 'chipdeploy profile --out'"
        )
    meeting = Meeting(goal, profile, config.via, profile.foreign(here) or profile.other_ops(graph))
    if goal:
        cost = profile.cost(graph)
        check_reach(projector_of(config, graph, cost, meeting), cost, meeting.share, profile.dense_ms)
    return meeting


def setting_of(config: PruneConfig, graph: ChannelGraph) -> Setting:
    """Where a configuration wants its network to run."""
    return Setting(Target.parse(config.on), config.bench_batch, tuple(graph.input_shape[1:]), config.threads)


def step(config: PruneConfig, meeting: Meeting | None = None, graph: ChannelGraph | None = None) -> int:
    """Channels by which widths go: what was asked for, or the stairs that the profile shows."""
    if isinstance(config.align, int):
        return config.align
    return meeting.profile.align(graph) if meeting and graph else DEFAULT_ALIGN


def projector_of(
    config: PruneConfig,
    graph: ChannelGraph,
    cost: Cost,
    meeting: Meeting | None = None,
    schedule: Schedule | None = None,
) -> Projector:
    """The search among the plans that a configuration allows.

    schedule: that of the run, where it is not the one of the recipe that the configuration names.
    """
    schedule = schedule or recipe(config.recipe).schedule
    return Projector(
        graph,
        cost,
        step(config, meeting, graph),
        min_width=config.min_width,
        blocks=config.blocks,
        power=schedule.value_power,
    )


def _named(config: PruneConfig, folder: Path, run: Path | None) -> LatencyProfile | None:
    """The profile of a run that was begun, or the one that the configuration names."""
    if run and (run / PROFILE).is_file():
        return LatencyProfile.load(run / PROFILE)
    if config.profile:
        return by_name(config.profile, folder)
    return None


def keep_profile(run: Run, meeting: Meeting | None) -> None:
    """The run's own copy: resumed years later, it goes by the same figures."""
    if meeting and not run.file(PROFILE).is_file():
        meeting.profile.save(run.file(PROFILE))


def latency_facts(meeting: Meeting, met: dict[str, Any]) -> dict[str, Any]:
    """What a result says of the latency: no raw times, these are in `latency.json`."""
    profile = meeting.profile
    facts = {key: value for key, value in met.items() if key != "confirmation"}
    return facts | {
        "target": profile.setting.target.name,
        "batch": profile.setting.batch,
        "threads": profile.setting.threads,
        "via": meeting.via,
        "profile_machine": profile.machine,
        "profile_dense_ms": profile.dense_ms,
        "foreign": meeting.foreign,
    }


def drift(facts: dict[str, Any]) -> str:
    """How the dense time differs from the profile's of this very machine, in one line; empty where it does not.

    facts: a result's `latency`.
    """
    before, now = facts.get("profile_dense_ms"), facts["dense_ms"]
    if not before or facts["foreign"] or abs(now / before - 1) <= DRIFT:
        return ""
    return (
        f"the dense network took {before:.3g} ms when it was profiled and takes {now:.3g} ms now: other work or "
        "another clock changes times, and shares of them; when it is quiet, time both networks with 'chipdeploy bench'"
    )
