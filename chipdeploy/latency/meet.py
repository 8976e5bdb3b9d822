"""The target met on the device: cut, build, measure, correct, and cut again; the ranking of the channels stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from chipdeploy.graph.channels import Mask
from chipdeploy.graph.plan import group_widths
from chipdeploy.latency.measure import Comparison, joined
from chipdeploy.latency.predict import LatencyCost
from chipdeploy.latency.rig import Rig

TOLERANCE = 0.03  # of the target, below it
SURE = 2 / 3  # of the tolerance: the next process measures up to a percent beside this one
TRIES = 10
PATIENCE = 4  # tries, after which the whole tolerance is enough
BISECTIONS = 12
CLOSE = 0.003  # of the aim: no nearer plan is searched for
FIRST_S, CONFIRM_S = 2.5, 6.0  # seconds of a measurement
OPENINGS = 3  # of a confirmation, and of all tries after one has failed: each in a process of its own
BLOCKS = 30

Propose = Callable[[float], Mask]  # a budget's share ▶ the best plan under it, [channels]
OnTry = Callable[["Try"], None]


@dataclass(frozen=True)
class Try:
    """One plan that was cut, built and measured."""

    share: float  # of the budget
    predicted: float  # ratio to the dense time, before any correction
    ratio: float
    over: float  # time over the time that is asked for
    interval: tuple[float, float]
    mask: Mask = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "predicted": self.predicted,
            "ratio": self.ratio,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Met:
    """The plan that was chosen.

    Args:
        goal: as a share of the dense time, as it was when the plan was confirmed.
        ms: the goal, where it was asked for in milliseconds.
        met: the measured time is at most the goal; `near`: and at least 97 % of it.
        comparison: of the confirming measurement, with engines of its own.
        confirmations: all that were made, those that did not hold among them.
    """

    mask: Mask
    goal: float
    ms: float | None
    met: bool
    near: bool
    comparison: Comparison
    tries: tuple[Try, ...]
    confirmations: tuple[Try, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the raw times of the confirmation among them."""
        return {
            "goal": self.goal,
            "goal_ms": self.ms,
            "met": self.met,
            "near": self.near,
            "ratio": self.comparison.ratio,
            "interval": list(self.comparison.ratio_interval),
            "dense_ms": self.comparison.dense_ms,
            "pruned_ms": self.comparison.pruned_ms,
            "noise": self.comparison.noise,
            "tries": [one.to_dict() for one in self.tries],
            "confirmations": [one.to_dict() for one in self.confirmations],
            "confirmation": self.comparison.to_dict(),
        }


@dataclass(frozen=True)
class Asked:
    """The time that is asked for.

    Args:
        share: of the dense time, by the dense time of the profile if `ms` is given.
        ms: milliseconds of an inference of the whole batch. The device may be slower or faster than it was when it was
            profiled, so then milliseconds are what is judged.
    """

    share: float
    ms: float | None = None
    tolerance: float = TOLERANCE

    def over(self, found: Comparison) -> float:
        """A measured time over what is asked for."""
        return found.pruned_ms / self.ms if self.ms else found.ratio / self.share

    def fits(self, over: float, tolerance: float | None = None) -> bool:
        return 1 - (tolerance or self.tolerance) <= over <= 1


def meet(
    rig: Rig,
    cost: LatencyCost,
    propose: Propose,
    goal: float,
    *,
    ms: float | None = None,
    tolerance: float = TOLERANCE,
    tries: int = TRIES,
    on_try: OnTry | None = None,
) -> Met:
    """Search the budget's share at which the measured time lies in [(1 − tolerance) · goal, goal].

    After each measurement the predictor is scaled to meet it. A plan that passes is measured once more in processes
    of its own; only what passes twice ends the search, at first only if it is not near the lower end. Where nothing
    does, the slowest plan within the goal is taken, and where there is none, the fastest. No plan is confirmed twice:
    one that did not hold would be measured until it does.

    Args:
        goal: share of the dense time, in (0, 1).
        ms: the goal in milliseconds, where that was asked for; see `Asked`.
    """
    asked = Asked(goal, ms, tolerance)
    middle = goal * (1 - tolerance * SURE / 2)
    aim, factor, openings = middle, 1.0, 1
    seen: dict[bytes, Try] = {}
    last: dict[bytes, float] = {}  # measurement of each plan, over what is asked for
    confirmed: list[tuple[Try, Comparison]] = []
    for turn in range(tries):
        share, mask = _inverse(propose, partial(_predicted, rig, cost.scaled(factor)), aim, aim / factor)
        if mask.tobytes() in seen:
            # No other plan is predicted there: look a little beside it, where the last one missed.
            aim *= (1 + tolerance / 2) if last[mask.tobytes()] * goal < middle else (1 - tolerance / 2)
            continue
        found = _measured(rig, cost, asked, share, mask, FIRST_S, openings)
        seen[mask.tobytes()] = found[0]
        if on_try:
            on_try(found[0])
        if asked.fits(found[0].over):
            found = _confirmed(rig, cost, asked, share, mask)
            confirmed.append(found)
            openings = OPENINGS  # one opening tells too little of this network
        last[mask.tobytes()] = found[0].over
        enough = tolerance if turn + 1 >= PATIENCE else tolerance * SURE
        if any(asked.fits(one.over, enough) for one, _ in confirmed):
            break
        factor = found[0].over * goal / max(found[0].predicted, 1e-9)
        aim = middle
    return _chosen(rig, cost, asked, tuple(seen.values()), confirmed)


def _predicted(rig: Rig, cost: LatencyCost, mask: Mask) -> float:
    return cost.count(group_widths(rig.graph, mask))


def _measured(
    rig: Rig, cost: LatencyCost, asked: Asked, share: float, mask: Mask, seconds: float, openings: int
) -> tuple[Try, Comparison]:
    """Times of a cut; with several openings each is a measurement of its own."""
    if openings > 1:
        parts = rig.time_anew(mask, openings, seconds=seconds / openings, blocks=BLOCKS)
    else:
        parts = rig.time([rig.engine(mask)], seconds=seconds, blocks=BLOCKS)
        rig.forget()
    whole = joined(parts)
    predicted, over = _predicted(rig, cost, mask), asked.over(whole)
    return Try(share, predicted, whole.ratio, over, whole.ratio_interval, mask), whole


def _confirmed(rig: Rig, cost: LatencyCost, asked: Asked, share: float, mask: Mask) -> tuple[Try, Comparison]:
    return _measured(rig, cost, asked, share, mask, CONFIRM_S, OPENINGS)


def _inverse(propose: Propose, predicted: Callable[[Mask], float], aim: float, start: float) -> tuple[float, Mask]:
    """The largest share whose plan is predicted to take at most `aim`, by rule of three and bisection; the last plan
    that was tried where none is."""
    low, high, share = 0.0, 1.0, start
    best: tuple[float, float, Mask] | None = None
    for _ in range(BISECTIONS):
        mask = propose(share)
        ratio = predicted(mask)
        if ratio <= aim:
            low = share
            if best is None or ratio >= best[0]:
                best = ratio, share, mask
            if ratio >= aim * (1 - CLOSE):
                break
        else:
            high = share
        if high - low < CLOSE * aim:
            break
        near = share * aim / max(ratio, 1e-9)
        share = near if low < near < high else (low + high) / 2
    return (best[1], best[2]) if best else (share, mask)


def _chosen(
    rig: Rig,
    cost: LatencyCost,
    asked: Asked,
    tries: tuple[Try, ...],
    confirmed: list[tuple[Try, Comparison]],
) -> Met:
    again = {one.mask.tobytes(): (one, comparison) for one, comparison in confirmed}
    passed = [found for found in confirmed if asked.fits(found[0].over)]
    if passed:
        return _met(max(passed, key=lambda found: found[0].over), asked, tries, again)
    under = sorted((one for one in tries if one.over <= 1), key=lambda one: -one.over)
    for candidate in (*under, min(tries, key=lambda one: one.over)):  # the slowest that holds, or the fastest
        key = candidate.mask.tobytes()
        if key not in again:
            again[key] = _confirmed(rig, cost, asked, candidate.share, candidate.mask)
        if again[key][0].over <= 1:
            break
    return _met(again[key], asked, tries, again)


def _met(
    found: tuple[Try, Comparison], asked: Asked, tries: tuple[Try, ...], again: Mapping[bytes, tuple[Try, Comparison]]
) -> Met:
    one, comparison = found
    goal = asked.ms / comparison.dense_ms if asked.ms else asked.share
    all_again = tuple(each for each, _ in again.values())
    return Met(one.mask, goal, asked.ms, one.over <= 1, asked.fits(one.over), comparison, tries, all_again)
