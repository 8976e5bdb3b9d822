"""`chipdeploy bench`: dense against pruned, interleaved, with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .output import console, print_json


def bench(
    run: options.RunDir = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, with commas between.")] = "1,32",
    threads: Annotated[int, typer.Option("--threads", help="Threads of the runtime.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long to measure each batch size.")] = 5.0,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Time the exported networks against each other in ONNX Runtime on this machine."""
    from chipdeploy.deploy import bench_run
    from chipdeploy.errors import NoisyError
    from chipdeploy.run import Run

    directory = Run.open(run) if run else Run.latest(runs)
    with directory.locked():
        results = bench_run(directory, batches=batch_sizes(batch), threads=threads, seconds=seconds)
    noisy = [item for item in results if comparison(item).noisy]
    if json and not noisy:
        print_json({"run": str(directory.path), "comparisons": results})
    elif not json:
        print_bench(results)
    if noisy:
        raise NoisyError(
            f"too noisy to say: {comparison(noisy[0]).noise}; the times are in {directory.path / 'bench.json'}, "
            "bench again on a quieter machine or with more --seconds"
        )
    if not json:
        console().print(f"next: chipdeploy report --run {directory.path}")


def batch_sizes(text: str) -> list[int]:
    """`1,32` as numbers. Raises UsageError where it is none."""
    from chipdeploy.errors import UsageError

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch takes whole numbers from 1 on with commas between, got {text!r}; e.g. --batch 1,32")
    return sizes


def comparison(item: dict[str, Any]) -> Any:
    """The statistics of one stored comparison, computed from its raw times."""
    from chipdeploy.latency.measure import Comparison

    return Comparison.from_dict(item)


def print_bench(results: list[dict[str, Any]]) -> None:
    """A headline a batch size, and what the control says."""
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
