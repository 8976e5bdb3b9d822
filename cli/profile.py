"""`chipdeploy profile`: latencies of cut networks, measured on a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import console, flags, note, print_json, quoted

if TYPE_CHECKING:
    from chipdeploy.latency.profile import LatencyProfile


def profile(
    model: options.Model = None,
    on: options.On = None,
    bench_batch: options.BenchBatch = None,
    threads: options.Threads = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Minutes of measuring in all.")] = 5.0,
    classes: options.Classes = 10,
    channels: options.Channels = 3,
    image_size: options.Size = 32,
    exclude: options.Exclude = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the plans that are measured.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="File of the profile; one that is there and unfinished goes on.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the profiles that are shipped, and yours.")] = False,
    show: Annotated[str | None, typer.Option("--show", metavar="NAME", help="What a profile holds.")] = None,
    check: Annotated[
        str | None, typer.Option("--check", metavar="NAME", help="Whether a profile is whole, and fits this machine.")
    ] = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Measure whole cut networks of a model on a target, for 'calibrate' and 'prune --latency'; or look at profiles."""
    from chipdeploy.errors import UsageError
    from chipdeploy.latency.store import FOLDER

    folder = runs / FOLDER
    if len(asked := [name for name, value in (("--list", listed), ("--show", show), ("--check", check)) if value]) > 1:
        raise UsageError(f"{' and '.join(asked)} are answered one at a time; leave {asked[1]} for a call of its own")
    if listed:
        _list(folder, json)
    elif show or check:
        _look(show or check or "", runs, bool(check), json)
    else:
        _measure(
            model or "resnet20",
            (on or "ort-cpu", 1 if bench_batch is None else bench_batch, 1 if threads is None else threads),
            (classes, channels, image_size, tuple(exclude or ())),
            (minutes, seed, out, folder),
            json,
        )


def _measure(
    spec: str,
    where: tuple[str, int, int],
    what: tuple[int, int, int, tuple[str, ...]],
    how: tuple[float, int, Path | None, Path],
    json: bool,
) -> None:
    import torch

    from chipdeploy.engines.target import Target
    from chipdeploy.graph.trace import trace
    from chipdeploy.latency.gpu import environment_of
    from chipdeploy.latency.profiling import check_minutes, measure_profile
    from chipdeploy.latency.rig import Setting
    from chipdeploy.latency.store import place
    from chipdeploy.run import make_folder
    from chipdeploy.training.models import build_model

    from .progress import rounds

    (on, batch, threads), (classes, channels, size, exclude), (minutes, seed, out, folder) = where, what, how
    check_minutes(minutes)
    setting = Setting(Target.parse(on), batch, (channels, size, size), threads)
    network = build_model(spec, num_classes=classes, in_channels=channels, image_size=size)
    example = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    graph = trace(network, example, exclude=exclude)
    path = out or place(spec, graph, setting, environment_of(setting.target), folder)
    make_folder(path.parent)
    note(f"measuring {spec} on {setting.name}: about {minutes:g} minutes, kept in {path}")
    with rounds() as on_round:
        found = measure_profile(
            network, graph, setting, name=spec, minutes=minutes, seed=seed, path=path, on_round=on_round
        )
    facts = {"file": str(path)} | _facts(found) | {"align": found.align(graph), "spread": found.cost(graph).spread}
    if json:
        print_json(facts)
        return
    _print(facts)
    more = flags(
        {
            **_setting_flags(found),
            "--classes": (classes, 10),
            "--exclude": (exclude, ()),
            "--profile": (str(path), None),
        }
    )
    console().print(f"next: chipdeploy calibrate {quoted(spec)} --latency 0.5{more}")


def _facts(found: LatencyProfile) -> dict[str, Any]:
    """What a profile holds, without its raw times."""
    ratios = [ratio for _, ratio in found.variants]
    return {
        "model": found.model,
        "target": found.setting.target.name,
        "batch": found.setting.batch,
        "threads": found.setting.threads,
        "input_shape": list(found.setting.input_shape),
        "machine": found.machine,
        "finished": found.finished,
        "networks": len(ratios),
        "noisy_rounds": found.noisy_rounds,
        "control_spread": found.control_spread,
        "dense_ms": found.dense_ms,
        "fastest": min(ratios),
        "slowest": max(ratios),
        "spent_s": found.spent_s,
        "steps": {str(step): ratio for step, ratio in zip(found.steps, ratios, strict=False)},
    }


def _setting_flags(found: LatencyProfile) -> dict[str, tuple[Any, Any]]:
    """What another command must be told to ask for the setting of a profile."""
    setting = found.setting
    return {
        "--on": (setting.target.name, "ort-cpu"),
        "--bench-batch": (setting.batch, 1),
        "--threads": (setting.threads, 1),
        "--channels": (setting.input_shape[0], 3),
        "--image-size": (setting.input_shape[1], 32),
    }


def _print(facts: dict[str, Any]) -> None:
    screen = console()
    screen.print(
        f"{facts['model']}, {facts['target']}, batch {facts['batch']}, threads {facts['threads']}, {facts['machine']}"
    )
    screen.print(
        f"  {facts['networks']} cut networks in {facts['spent_s'] / 60:.1f} minutes, {facts['fastest']:.2f} to "
        f"{facts['slowest']:.2f} of the dense {facts['dense_ms']:.3g} ms; "
        f"equal blocks {facts['control_spread']:.1%} apart, {facts['noisy_rounds']} noisy rounds"
    )
    if not facts["finished"]:
        screen.print("  not finished: the command that began it goes on")
    stairs = ", ".join(f"{step}: {ratio:.2f}" for step, ratio in facts["steps"].items())
    screen.print(f"  a channel less in steps of: {stairs} of the dense time")
    if "align" in facts:
        screen.print(f"  the stairs of this device: {facts['align']} channels")
        screen.print(f"  a prediction is within {facts['spread']:.1%} for 95 of 100 plans (each by all the others)")


def _list(folder: Path, json: bool) -> None:
    from chipdeploy.latency.store import own, shipped

    rows = [
        {"name": name, "shipped": ours} | _facts_of(path)
        for ours, known in ((True, shipped()), (False, own(folder)))
        for name, path in known.items()
    ]
    if json:
        print_json({"profiles": rows})
        return
    for row in rows:
        console().print(f"{row['name']}  ({'shipped' if row['shipped'] else 'yours'})")
        if "damaged" in row:
            console().print(f"  {row['damaged']}")
        else:
            _print(row)
    if not rows:
        console().print(f"no profiles: none is shipped, none in {folder}")
    console().print("next: chipdeploy profile MODEL --on ort-cpu, to measure one of your own")


def _facts_of(path: Path) -> dict[str, Any]:
    """What the profile in a file holds, or what is wrong with it."""
    from chipdeploy.errors import RunError
    from chipdeploy.latency.profile import LatencyProfile

    try:
        return _facts(LatencyProfile.load(path))
    except RunError as error:
        return {"damaged": str(error)}


def _look(name: str, runs: Path, check: bool, json: bool) -> None:
    from chipdeploy.latency.gpu import environment_of
    from chipdeploy.latency.store import FOLDER, by_name

    found = by_name(name, runs / FOLDER)
    facts = _facts(found) | {"foreign": found.foreign(environment_of(found.setting.target))}
    if json:
        print_json(facts)
        return
    _print(facts)
    if check:
        fits = f"not of this machine: {facts['foreign']}" if facts["foreign"] else "fits this machine"
        console().print(f"whole, digest right; {fits}")
    more = flags({**_setting_flags(found), "--profile": (name, None), "--runs": (str(runs), "runs")})
    console().print(f"next: chipdeploy calibrate {quoted(found.model)} --latency 0.5{more}")
