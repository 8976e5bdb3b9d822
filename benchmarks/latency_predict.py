#!/usr/bin/env python3
"""Predictors of latency beside each other, on plans that none of them has seen.

    latency_predict.py --out results/latency [--models resnet56] [--minutes 5] [--held 64]

For every network a profile is measured (`--minutes`), then `--held` other plans such as a latency budget proposes, in a
process of their own, and `--free` more whose widths go by no step. Profiles go to profiles/, from where they are
shipped, the other raw times beside the table; what is there already is not measured again. `latency_table.py` puts the
table into docs/latency.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_isolated import isolated_times
from latency_nets import MODELS, PROFILES, Subject, profile_path, subject

from chipdeploy.chipnet.costs import CostModel, Floats
from chipdeploy.latency.blocks import Times
from chipdeploy.latency.environment import environment
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.laws import Law, fitted_laws, laws_of_layers
from chipdeploy.latency.predict import Sample, fit
from chipdeploy.latency.profile import LatencyProfile, graph_digest
from chipdeploy.latency.profiling import A_ROUND, measure_profile, measured_round
from chipdeploy.latency.rig import Rig
from chipdeploy.latency.shapes import LayerShapes
from chipdeploy.latency.variants import Variants
from chipdeploy.run import read_json, write_json

HELD_SEED = 1000  # no seed of a profile
HELD_S = 12.0  # of a round of held-out plans: the truth must be known better than what is judged by it


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.hold:
        _hold(subject(options.hold, options.on, options.batch, options.threads), options)
        return
    rows, models = [], options.models.split(",")
    for name in models:
        one = subject(name, options.on, options.batch, options.threads)
        profile = _profile(one, options)
        held = _held(one, options)
        rows += _compared(one, profile, held, options.held)
        for row in rows:
            if row["model"] == name:
                print(row, flush=True)
    path = options.out / "predictors.json"
    others = [row for row in read_json(path)["rows"] if row["model"] not in models] if path.is_file() else []
    write_json(path, {"environment": environment(), "rows": [*others, *rows]})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--on", default="ort-cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of the profiles")
    parser.add_argument("--held", type=int, default=64)
    parser.add_argument("--free", type=int, default=16)
    parser.add_argument("--hold", default="", help=argparse.SUPPRESS)  # measure one network's held-out plans
    return parser.parse_args()


def _profile(one: Subject, options: argparse.Namespace) -> LatencyProfile:
    path = profile_path(one, options.profiles)
    return measure_profile(
        one.model,
        one.graph,
        one.setting,
        name=one.name,
        minutes=options.minutes,
        path=path,
        on_round=lambda p, share: print(f"{one.name}: {len(p.variants)} networks, {share:.0%}", flush=True),
    )


def _held_path(one: Subject, options: argparse.Namespace) -> Path:
    return Path(options.out / f"{one.slug}-{options.on}-b{options.batch}-held.json")


def _held(one: Subject, options: argparse.Namespace) -> LatencyProfile:
    """Other plans, measured in another process."""
    path = _held_path(one, options)
    if not path.is_file():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--hold", one.name], check=True)
    found = LatencyProfile.load(path)
    found.check_setting(one.setting)
    if other := found.foreign(environment_of(one.setting.target)):
        raise SystemExit(f"{path} was {other}; give another --out")
    return found


def _hold(one: Subject, options: argparse.Namespace) -> None:
    profile = _profile(one, options)
    draws = Variants(one.graph, profile.align(one.graph), HELD_SEED)
    plans = draws.proposed(options.held) + draws.proposed(options.free, free=True)
    found = LatencyProfile(one.name, graph_digest(one.graph), one.setting, environment(), HELD_SEED)
    with Rig(one.model, one.graph, one.setting) as rig:
        for start in range(0, len(plans), A_ROUND):
            found = found.grown(measured_round(rig, plans[start : start + A_ROUND], HELD_S), (), found.environment, 0.0)
            print(f"{one.name}: {len(found.variants)} held-out plans", flush=True)
    block_means(found).save(_held_path(one, options))


def block_means(profile: LatencyProfile) -> LatencyProfile:
    """The mean of every block in place of its single inferences: ratios are made of these, and the file is small."""

    def means(times: Times) -> Times:
        return tuple((round(float(np.mean(block)), 10),) for block in times)

    rounds = tuple(
        replace(
            one,
            dense_s=means(one.dense_s),
            control_s=means(one.control_s),
            variants=tuple(replace(variant, times_s=means(variant.times_s)) for variant in one.variants),
        )
        for one in profile.rounds
    )
    return replace(profile, rounds=rounds)


def _compared(one: Subject, profile: LatencyProfile, held: LatencyProfile, count: int) -> list[dict[str, Any]]:
    """A row a predictor; the first `count` plans go by the step, the others are free."""
    seen, unseen = profile.samples(one.graph), held.samples(one.graph)[1:]
    step = profile.align(one.graph)
    isolated = isolated_times(one, [sample.widths for sample in (*seen, *unseen)])
    guesses: dict[str, Callable[[list[Sample]], Floats]] = {
        "FLOPs, a line": _line(one, seen),
        "sum of isolated layers": lambda rows: np.array([isolated[row.widths.tobytes()] for row in rows]),
        "laws of layers in place": _in_place(one, seen, step),
        "these, corrected for the whole": _corrected(one, seen, step),
        "gradient boosting": _boosted(one, seen),
        "chipdeploy": _kriged(one, seen, step),
        "chipdeploy, no layer times": _kriged(one, [_blind(sample) for sample in seen], step),
    }
    facts = {"model": one.name, "setting": one.setting.name, "machine": held.machine, "minutes": profile.spent_s / 60}
    facts |= {"networks": len(profile.variants), "align": step}
    facts |= {"control_spread": profile.control_spread, "noisy_rounds": profile.noisy_rounds + held.noisy_rounds}
    return [
        facts
        | {"predictor": name}
        | _score(guess(unseen[:count]), unseen[:count])
        | {"free": _score(guess(unseen[count:]), unseen[count:])}
        for name, guess in guesses.items()
    ]


def _score(guess: Floats, rows: list[Sample]) -> dict[str, Any]:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    ratios = np.array([row.ratio for row in rows])
    errors = np.abs(guess / ratios - 1)
    return {
        "held": len(rows),
        "within_5": float((errors <= 0.05).mean()),
        "within_10": float((errors <= 0.10).mean()),
        "median_error": float(np.median(errors)),
        "bias": float(np.median(guess / ratios)),
        "spearman": float(spearmanr(guess, ratios).statistic),
        "guesses": [round(float(value), 4) for value in guess],
        "ratios": [round(float(value), 4) for value in ratios],
    }


def _blind(sample: Sample) -> Sample:
    return Sample(sample.widths, sample.ratio, {})


def _kriged(one: Subject, seen: list[Sample], step: int) -> Callable[[list[Sample]], Floats]:
    cost = fit(one.graph, seen, step)
    return lambda rows: cost.counts(np.stack([row.widths for row in rows]))


def _line(one: Subject, seen: list[Sample]) -> Callable[[list[Sample]], Floats]:
    """Least squares of the relative error over the share of the MACs."""
    cost = CostModel.of(one.graph, "macs")

    def shares(rows: list[Sample]) -> Floats:
        return cost.counts(np.stack([row.widths for row in rows])) / cost.dense

    ratios = np.array([sample.ratio for sample in seen])
    line = np.polyfit(shares(seen), ratios, 1, w=1 / ratios)
    return lambda rows: np.asarray(np.polyval(line, shares(rows)))


def _in_place(one: Subject, seen: list[Sample], step: int) -> Callable[[list[Sample]], Floats]:
    """The laws of the layers, summed, scaled by one number."""
    shapes = LayerShapes.of(one.graph)
    laws = laws_of_layers(shapes, [row.layers for row in seen], np.stack([row.widths for row in seen]), step)
    plain = _summed(shapes, laws, 0.0)
    scale = float(np.median([sample.ratio for sample in seen] / plain(seen)))
    return lambda rows: scale * plain(rows)


def _corrected(one: Subject, seen: list[Sample], step: int) -> Callable[[list[Sample]], Floats]:
    """Every law scaled to fit the whole networks; what chipdeploy's predictor starts from."""
    shapes, widths = LayerShapes.of(one.graph), np.stack([row.widths for row in seen])
    return _summed(
        shapes, *fitted_laws(shapes, [row.layers for row in seen], widths, np.array([row.ratio for row in seen]), step)
    )


def _summed(shapes: LayerShapes, laws: tuple[Law, ...], constant: float) -> Callable[[list[Sample]], Floats]:
    def total(rows: list[Sample]) -> Floats:
        into, out, alive = shapes.at(np.stack([row.widths for row in rows]))
        times = np.stack([laws[kind].at(into[:, n], out[:, n]) for n, kind in enumerate(shapes.kinds)], axis=1)
        return constant + np.asarray((times * alive).sum(axis=1))

    return total


def _boosted(one: Subject, seen: list[Sample]) -> Callable[[list[Sample]], Floats]:
    """Gradient-boosted trees over widths, MACs and the number of layers."""
    from sklearn.ensemble import GradientBoostingRegressor

    macs, volume = CostModel.of(one.graph, "macs"), CostModel.of(one.graph, "volume")

    def table(rows: list[Sample]) -> Floats:
        widths = np.stack([row.widths for row in rows])
        sums = [np.log(model.counts(widths) / model.dense) for model in (macs, volume)]
        return np.column_stack([widths / one.graph.sizes, *sums, (widths > 0).sum(axis=1)])

    model = GradientBoostingRegressor(n_estimators=500, learning_rate=0.03, max_depth=4, subsample=0.7, random_state=0)
    model.fit(table(seen), np.log([sample.ratio for sample in seen]))
    return lambda rows: np.exp(model.predict(table(rows)))


if __name__ == "__main__":
    main()
