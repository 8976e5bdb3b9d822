"""`chipdeploy calibrate`: the budgets that give a latency, from a measured profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .output import console, flags, note, own_images, print_json, quoted


def calibrate(
    model: options.Model = None,
    latency: options.Latency = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    on: options.On = None,
    bench_batch: options.BenchBatch = None,
    threads: options.Threads = None,
    profile: options.Profile = None,
    minutes: options.Minutes = None,
    classes: options.Classes = 10,
    channels: options.Channels = 3,
    image_size: options.Size = 32,
    exclude: options.Exclude = None,
    align: Annotated[
        str, typer.Option("--align", metavar="CHANNELS", help="Widths in multiples of this; auto: the device's stairs.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for calibration.json and calibration.svg.")] = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Say which FLOPs, params, channels and volume budget gives a latency, how sure that is, what is out of reach."""
    from chipdeploy.calibration import calibrate_model
    from chipdeploy.config import PruneConfig, build
    from chipdeploy.latency.store import FOLDER

    from .progress import rounds, steps

    goal = {"latency": options.share(latency, "--latency"), "latency_ms": latency_ms, "fps": fps}
    where = {"on": on, "bench_batch": bench_batch, "threads": threads, "profile": profile, "minutes": minutes}
    what = {"align": align, "model": model, "exclude": tuple(exclude) if exclude else None}
    given = {key: value for key, value in (goal | where | what).items() if value is not None}
    with rounds() as on_round, steps() as (_, progress):
        facts = calibrate_model(
            build(PruneConfig, given),
            classes=classes,
            channels=channels,
            image_size=image_size,
            profiles=runs / FOLDER,
            out=out,
            on_round=on_round,
            on_point=lambda done, size: progress("latency against budget", done, size),
            tell=note,
        )
    if facts["foreign"]:
        note(f"note: the profile was {facts['foreign']}")
    if json:
        print_json(facts)
    else:
        data, what_data = own_images(channels, image_size)
        more = flags(
            {
                "--bench-batch": (bench_batch, 1),
                "--threads": (threads, 1),
                "--exclude": (tuple(exclude or ()), ()),
                "--align": (align, "auto"),
                "--profile": (profile, None),
                "--data": (data, None),
                "--runs": (str(runs), "runs"),
            }
        )
        _print(facts, out, more + what_data)


def _print(facts: dict[str, Any], out: Path | None, more: str) -> None:
    from rich.table import Table

    screen = console()
    screen.print(f"{facts['model']}: {facts['goal']}; these budgets give it with --align {facts['align']}")
    table = Table("budget", "keep", "95 % interval", box=None, pad_edge=False)
    for kind, found in facts["budgets"].items():
        if found["keep"] is None:
            table.add_row(f"--{kind}", "out of reach", f"at least {found['least_ratio']:.2g} of the dense time")
            continue
        table.add_row(f"--{kind}", f"{found['keep']:.3f}", f"{found['interval'][0]:.3f} to {found['interval'][1]:.3f}")
    screen.print(table)
    screen.print(
        f"out of reach: less than {facts['smallest']['ms']:.3g} ms, {facts['smallest']['ratio']:.2g} of the dense, "
        "which the smallest widths take"
    )
    if out:
        screen.print(f"curves: {out / 'calibration.json'}, {out / 'calibration.svg'}")
    screen.print(f"next: chipdeploy prune {quoted(facts['model'])} {facts['flags']}{more}")
