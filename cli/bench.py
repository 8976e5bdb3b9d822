"""`chipdeploy bench`: dense against pruned, interleaved, with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import console, note, print_outcome, quoted

if TYPE_CHECKING:
    from chipdeploy.latency.measure import Comparison

ENGINES = {"dense": "engine", "pruned": "pruned_engine"}
SLOWEST = 5
LARGEST_BATCH = 65536


def bench(
    run: options.RunDir = None,
    on: Annotated[
        str, typer.Option("--on", help="Targets, with commas between, e.g. ort-cpu,torch-cuda-fp16,trt-fp16.")
    ] = "ort-cpu",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, with commas between.")] = "1,32",
    threads: Annotated[int, typer.Option("--threads", help="Threads of a runtime on the CPU.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long to measure each batch size.")] = 5.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the slowest layers too, from a profile of its own.")
    ] = False,
    trtexec: Annotated[
        str | None, typer.Option("--trtexec", help="Files of trtexec --exportTimes to show beside, commas between.")
    ] = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Time the exported networks against each other on this machine, on one or more targets; earlier times stay."""
    from chipdeploy.bench import BENCH, bench_run
    from chipdeploy.errors import NoisyError
    from chipdeploy.latency.trtexec import read_trtexec
    from chipdeploy.run import Run

    from .progress import steps

    foreign = [read_trtexec(Path(name.strip())).to_dict() for name in trtexec.split(",")] if trtexec else []
    directory = Run.open(run) if run else Run.latest(runs)
    with directory.locked(), steps() as (_, progress):
        results = bench_run(
            directory,
            targets=[part.strip() for part in on.split(",")],
            batches=batch_sizes(batch),
            threads=threads,
            seconds=seconds,
            layers=layers,
            on_block=progress,
            tell=note,
        )
    noise = next((noise for item in results if (noise := comparison(item).noise)), "")
    error = NoisyError(
        f"too noisy to say: {noise}; the times are in {directory.file(BENCH)}, "
        "bench again on a quieter machine or with more --seconds"
    )
    if json:
        facts = {"run": str(directory.path), "comparisons": results, "trtexec": foreign}
        print_outcome(facts, error if noise else None)
        return
    print_bench(results)
    for item in foreign:
        print_trtexec(item)
    if noise:
        raise error
    console().print(f"next: chipdeploy report --run {quoted(directory.path)}")


def batch_sizes(text: str) -> list[int]:
    """`1,32` as numbers. Raises UsageError where it is none."""
    from chipdeploy.errors import UsageError

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if not 1 <= min(sizes) <= max(sizes) <= LARGEST_BATCH:
        raise UsageError(
            f"--batch takes whole numbers from 1 to {LARGEST_BATCH} with commas between, got {text!r}; "
            "e.g. --batch 1,32"
        )
    return sizes


def comparison(item: dict[str, Any]) -> Comparison:
    """The statistics of one stored comparison, computed from its raw times."""
    from chipdeploy.latency.measure import Comparison

    return Comparison.from_dict(item)


def print_bench(results: list[dict[str, Any]]) -> None:
    """A headline a target and batch size; percentiles, throughput, energy; and what the control says."""
    from chipdeploy.latency.measure import headline

    screen = console()
    for item in results:
        measured = comparison(item)
        low, high = measured.control_interval
        screen.print(headline(measured))
        screen.print(
            f"  dense {measured.dense_ms:.3f} ms, pruned {measured.pruned_ms:.3f} ms; "
            f"dense against itself {measured.control_ratio:.3f} (95 % {low:.3f}-{high:.3f})"
        )
        for name, ms in (("dense", measured.dense_ms), ("pruned", measured.pruned_ms)):
            tails = ", ".join(f"{p} {value:.3f}" for p, value in measured.percentiles_ms(name).items())
            joules = measured.environment.get("joules", {}).get(name)
            energy = "" if joules is None else f", {joules / measured.batch * 1e3:.3g} mJ an image"
            size = measured.environment.get(ENGINES[name], {}).get("device_memory_bytes")
            memory = "" if size is None else f", {size / 1e6:.1f} MB on the device"
            screen.print(f"  {name}: {tails} ms, {measured.batch / ms * 1e3:,.0f} images/s{energy}{memory}")
        for name, times in item.get("layers", {}).items():
            print_layers(name, times)
        if dropped := measured.environment.get("throttled_blocks"):
            note(f"note: {dropped} blocks in which the GPU slowed itself down were measured again")


def print_layers(name: str, times: list[dict[str, Any]]) -> None:
    """The layers that take longest, and what they take together."""
    total = sum(layer["ms"] for layer in times)
    slowest = sorted(times, key=lambda layer: -layer["ms"])[:SLOWEST]
    shown = ", ".join(f"{layer['name']} ({layer['kind']}) {layer['ms']:.3f} ms" for layer in slowest)
    console().print(f"  {name}, {len(times)} layers, {total:.3f} ms together: {shown}")


def print_trtexec(item: dict[str, Any]) -> None:
    """One line of what trtexec timed."""
    compute, latency = item["compute_ms"], item["latency_ms"]
    console().print(
        f"trtexec, {item['file']}: on the device p50 {compute['p50']:.3f}, p90 {compute['p90']:.3f}, "
        f"p99 {compute['p99']:.3f} ms; with copies p50 {latency['p50']:.3f} ms; {item['inferences']} inferences"
    )
