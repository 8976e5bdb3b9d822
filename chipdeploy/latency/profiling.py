"""Measuring a latency profile, round by round: it may be interrupted after each and goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from chipdeploy.errors import RunError, UsageError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.predict import LEAST
from chipdeploy.latency.profile import LatencyProfile, Round, Variant, graph_digest, short_name
from chipdeploy.latency.rig import Rig, Setting
from chipdeploy.latency.variants import Variants, probes

A_ROUND = 8  # variants in the same blocks
BLOCKS, ROUND_S = 16, 2.0  # of a round, at least and about
REPEATS = 2  # of a noisy round
OnRound = Callable[[LatencyProfile, float], None]  # the profile so far, and the share of the time that is spent


def measure_profile(
    model: nn.Module,
    graph: ChannelGraph,
    setting: Setting,
    *,
    name: str,
    minutes: float = 5.0,
    seed: int = 0,
    path: Path | None = None,
    on_round: OnRound | None = None,
) -> LatencyProfile:
    """Measure cut networks until the time is spent: first probes of the stairs, then plans that spread over widths.

    Args:
        name: of the model, for the reader.
        minutes: of measuring in all, export and building included; the last round may go beyond, and no profile has
            fewer than two rounds.
        path: where the profile is kept after every round; one of the same settings that is there already goes on.

    Raises:
        UsageError: `minutes` that are not positive.
        RunError: `path` holds a profile of something else.
        ExportError, MissingError: the network or the target cannot be had.
    """
    check_minutes(minutes)
    profile = _begun(graph, setting, name, seed, path)
    limit, began = 60 * minutes, time.monotonic()
    profile = replace(profile, finished=False)
    with Rig(model, graph, setting) as rig:
        variants: Variants | None = None
        while not _done(profile, limit):
            steps, plans = profile.steps, probes(graph)
            if not profile.rounds:
                steps, widths = tuple(plans), list(plans.values())
            else:
                # Taken up again, the draws begin anew: those that were measured are passed over.
                variants = variants or _passed(graph, profile)
                widths = variants.take(A_ROUND)
            if not widths:
                break  # the network has no more plans
            one = measured_round(rig, widths)
            now = time.monotonic()
            profile = profile.grown(one, steps, rig.describe(), now - began)
            began = now
            if path:
                profile.save(path)
            if on_round:
                on_round(profile, min(1.0, profile.spent_s / limit))
    profile = replace(profile, finished=True)
    if path:
        profile.save(path)
    return profile


def check_minutes(minutes: float) -> None:
    """Raises UsageError for minutes that nobody can measure."""
    if not 0 < minutes < 24 * 60:
        raise UsageError(f"the minutes of measuring must be positive and less than a day, got {minutes:g}; try 5")


def _done(profile: LatencyProfile, limit: float) -> bool:
    """Whether another round would go beyond the time, and there are enough."""
    rounds = len(profile.rounds)
    if sum(len(one.variants) for one in profile.rounds) < LEAST:
        return False
    return profile.spent_s + profile.spent_s / rounds > limit


def _passed(graph: ChannelGraph, profile: LatencyProfile) -> Variants:
    variants = Variants(graph, profile.align(graph), profile.seed)
    for _ in profile.rounds[1:]:
        variants.take(A_ROUND)
    return variants


def measured_round(rig: Rig, widths: Sequence[Ints], seconds: float | None = None) -> Round:
    """One round; a noisy one is repeated, and said to be noisy if it stays so.

    The dense engines are opened anew: where one happens to lie in memory must not lean on a whole profile.
    """
    rig.renew()
    engines = [rig.engine(_top(rig.graph, row)) for row in widths]
    for _ in range(1 + REPEATS):
        dense_layers, layers = rig.layers(rig.dense), [rig.layers(engine) for engine in engines]
        found = rig.time(engines, seconds=seconds or ROUND_S, blocks=BLOCKS)
        noise = next((one.noise for one in found if one.noisy), "")
        if not noise:
            break
    rig.forget()
    variants = tuple(
        Variant(tuple(row.tolist()), one.pruned_s, times) for row, one, times in zip(widths, found, layers, strict=True)
    )
    return Round(found[0].dense_s, found[0].control_s, variants, dense_layers, noise)


def _top(graph: ChannelGraph, widths: Ints) -> Mask:
    """The first channels of every group: which ones stay does not change a latency."""
    mask = np.zeros(graph.channels, dtype=np.bool_)
    for group, width in enumerate(widths.tolist()):
        start = graph.span(group).start
        mask[start : start + width] = True
    return mask


def _begun(graph: ChannelGraph, setting: Setting, name: str, seed: int, path: Path | None) -> LatencyProfile:
    """An empty profile, or the one in `path`, if it is of the same."""
    here = environment_of(setting.target)
    empty = LatencyProfile(short_name(name), graph_digest(graph), setting, here, seed, ops=dict(graph.ops))
    if path is None or not path.is_file():
        return empty
    found = LatencyProfile.load(path)
    found.check_setting(setting)
    found.check_graph(graph)
    if found.seed != seed:
        raise RunError(f"{path} was begun with the seed {found.seed}, now {seed}; give the same, or another file")
    if other := found.foreign(here) or found.other_ops(graph):
        raise RunError(f"{path} was {other}; times of both are not mixed: give another file")
    return found
