"""Dense against pruned on every target that is asked for: the files that were exported, interleaved, raw times kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chipdeploy.engines.base import Engine, Images, open_engine
from chipdeploy.engines.target import Target
from chipdeploy.engines.trt import EngineManifest
from chipdeploy.errors import ExportError, InputError, RunError, UsageError
from chipdeploy.export.onnx import check_digest
from chipdeploy.latency.gpu import GpuWatch
from chipdeploy.latency.measure import Comparison, compare
from chipdeploy.result import DATA, load
from chipdeploy.run import Run, read_json

if TYPE_CHECKING:
    from torch import nn

BENCH, EXPORT = "bench.json", "export.json"
NETWORKS = ("dense", "pruned")
DEFAULT_TARGETS = ("ort-cpu",)
LAYER_RUNS = 20
OnBlock = Callable[[str, int, int], None]  # what is measured, blocks done, blocks in all


def bench_run(
    run: Run,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    seconds: float = 5.0,
    layers: bool = False,
    on_block: OnBlock | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the dense against the pruned network on every target at every batch size; all is kept in bench.json.

    Times add up: those of other targets, batch sizes and numbers of threads stay there while their files, the CPU and
    the GPU are the same; `tell` is told of the others, a line each.

    On a GPU each batch size is timed twice: from host to host, and on the device by its own clock. `layers` adds the
    times of both networks' layers, from runs of their own.

    Raises:
        UsageError: an unknown target, `layers` of one that does not tell them, or `threads` for GPUs alone.
        RunError, ExportError: nothing was exported for a target, or a file was edited since.
        MissingError: a target's package or device is not here.
    """
    wanted = list(dict.fromkeys(Target.parse(text) for text in targets))
    batches = tuple(dict.fromkeys(batches))
    if all(target.on_gpu for target in wanted):
        wanted[0].check_threads(threads)
    if layers and (silent := [target.name for target in wanted if target.runtime == "torch"]):
        raise UsageError(
            f"{silent[0]} does not tell the times of layers; leave --layers out, or use an ort or trt target"
        )
    exported = read_json(run.check(EXPORT, maker="export")) if run.file(EXPORT).is_file() else None
    if exported is None:
        raise RunError(f"{run.path} has no ONNX files yet; run 'chipdeploy export --run {run.path}' first")
    shape = tuple(read_json(run.check(DATA))["shape"])
    for target in wanted:
        _check_batches(run, exported, target, batches)
    # All are opened before anything is timed: a target that is missing is said at once.
    opened = [(target, *_open(run, exported, target, threads)) for target in wanted]
    results: list[dict[str, Any]] = []
    for target, dense, pruned, control in opened:
        for batch in batches:
            images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
            shown = partial(on_block, f"{target.name}, batch {batch}") if on_block else None
            measured = _measure(target, (dense, pruned, control), images, seconds, shown)
            if layers:
                measured[0]["layers"] = {
                    name: [asdict(layer) for layer in engine.layer_times(images, LAYER_RUNS)]
                    for name, engine in zip(NETWORKS, (dense, pruned), strict=True)
                }
            files = digests(_entry(run, exported, target))
            results += [row | {"files": files} for row in measured]
    now = {_what(row) for row in results}
    held, gone = _earlier_times(run, exported)
    others = [row for row in held if _what(row) not in now]
    elsewhere = [row for row in others if not all(_same_machine(row, result) for result in results)]
    gone += [f"the times of {Comparison.from_dict(row).where}: they are of {_machine(row)}" for row in elsewhere]
    if tell:
        for what in gone:
            tell(f"dropping {what}")
    run.write(BENCH, [row for row in others if row not in elsewhere] + results)
    return results


def drop_times(run: Run, exported: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Take the times of files that are not those of `exported` any more out of bench.json, and tell which."""
    held, gone = _earlier_times(run, exported)
    for what in gone:
        tell(f"dropping {what}")
    if held:
        run.write(BENCH, held)
    else:
        run.file(BENCH).unlink(missing_ok=True)


def digests(*entries: Mapping[str, Any] | None) -> dict[str, str]:
    """sha256 of the dense and the pruned file of entries of export.json, by name; none for a target without files."""
    files = (entry[name] for entry in entries if entry for name in NETWORKS)
    return {file["file"]: file["engine_sha256" if "engine_sha256" in file else "sha256"] for file in files}


def all_digests(exported: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of every ONNX and engine file of export.json, by name."""
    return digests(exported, *exported["precisions"].values(), *exported["engines"].values())


def _earlier_times(run: Run, exported: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of bench.json that are of files that are still exported; and what the others are of, and why they go."""
    known = set(all_digests(exported).items())
    held: list[dict[str, Any]] = []
    gone: list[str] = []
    unreadable = f"times that cannot be read: {BENCH} is damaged, or of another version"
    try:
        rows = list(run.read_if(BENCH) or [])
    except (RunError, TypeError):
        return [], [unreadable]
    for row in rows:
        try:
            where = Comparison.from_dict(row).where
            if known.issuperset(row["files"].items()):
                held.append(row)
            else:
                gone.append(f"the times of {where}: the files are others now")
        except (RunError, KeyError, TypeError, AttributeError):
            gone.append(unreadable)
    return held, gone


def _same_machine(row: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether two rows can stand on one page: one CPU, and one GPU where both have used one."""
    here, there = row["environment"], result["environment"]
    if any(here.get(key) != there.get(key) for key in ("cpu", "vectors", "cores")):
        return False
    return len({here.get("gpu_name"), there.get("gpu_name")} - {None}) <= 1


def _machine(row: Mapping[str, Any]) -> str:
    facts = row["environment"]
    return str(facts.get("machine") or facts.get("cpu"))


def _what(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a later measurement takes the place of."""
    return row["target"], row["batch"], Comparison.from_dict(row).threads


def _check_batches(run: Run, exported: Mapping[str, Any], target: Target, batches: Sequence[int]) -> None:
    """Raises InputError for a batch that the files were not made for."""
    if target.runtime == "ort" and (largest := [batch for batch in batches if batch > exported["max_batch"]]):
        raise InputError(
            f"the files of {run.path} are made for batches up to {exported['max_batch']}, got {largest[0]}; "
            f"run 'chipdeploy export --max-batch {largest[0]} --run {run.path}' first"
        )
    if not target.builds:
        return
    for network in NETWORKS:
        path = artifact(run, exported, target, network)
        assert isinstance(path, Path)
        manifest = EngineManifest.read(path)
        for batch in batches:
            manifest.check_batch(batch, path.name)


def artifact(run: Run, exported: Mapping[str, Any], target: Target, network: str) -> Path | nn.Module:
    """What a target runs of the `dense` or the `pruned` network: a module, an ONNX file, or an engine file.

    Raises:
        RunError: it was not exported. ExportError: it was edited since.
    """
    if target.runtime == "torch":
        return load(run.path, dense=network == "dense")
    facts = _entry(run, exported, target)
    path = run.file(facts[network]["file"])
    if not target.builds:
        check_digest(path, facts[network]["sha256"])
    elif EngineManifest.read(path).engine_sha256 != facts[network]["engine_sha256"]:
        raise ExportError(f"{path.name} is not the engine of the last whole export; export it again")
    return path


def _entry(run: Run, exported: Mapping[str, Any], target: Target) -> Mapping[str, Any]:
    """What export.json says of the files that a target runs; nothing where it runs modules.

    Raises:
        RunError: they were not exported.
    """
    if target.runtime == "torch":
        return {}
    if target.builds:
        found, what = exported["engines"].get(target.name), f"{target.name} engine"
        flags = f"--{target.runtime} --precision {target.precision}"
    else:
        fp32 = target.precision == "fp32"
        found = exported if fp32 else exported["precisions"].get(target.precision)
        what, flags = f"{target.precision} network", f"--precision {target.precision}"
    if not found:
        raise RunError(f"{run.path} has no {what}; run 'chipdeploy export {flags} --run {run.path}'")
    return dict(found)


def _open(run: Run, exported: Mapping[str, Any], target: Target, threads: int) -> tuple[Engine, Engine, Engine]:
    """Dense, pruned and control. The control is a second engine of the dense network: where an engine lies in memory
    moves its time a little too."""
    options = {} if target.on_gpu else {"threads": threads}
    dense, pruned, control = (
        open_engine(target, artifact(run, exported, target, network), **options) for network in (*NETWORKS, "dense")
    )
    return dense, pruned, control


def _measure(
    target: Target,
    engines: tuple[Engine, Engine, Engine],
    images: Images,
    seconds: float,
    on_block: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """From host to host; then on the device, where it has a clock of its own."""
    watch = GpuWatch.open() if target.on_gpu else None
    calls = {False: [partial(engine.run, images) for engine in engines]}
    watches = [engine.stopwatch(images) for engine in engines]
    if all(watches):
        calls[True] = watches  # type: ignore[assignment]
    results = []
    for on_device, (dense, pruned, control) in calls.items():
        gpu_before = watch.facts() if watch else None
        comparison = compare(
            dense,
            pruned,
            control=control,
            batch=len(images),
            seconds=seconds,
            on_block=on_block,
            timed=on_device,
            throttled=watch.throttled if watch else None,
        )
        facts = {**comparison.environment, "engine": engines[0].describe(), "pruned_engine": engines[1].describe()}
        if watch:
            facts["gpu"] = {"before": gpu_before, "after": watch.facts()}
            facts["joules"] = {"dense": watch.joules(dense), "pruned": watch.joules(pruned)}
            facts["gpu_name"] = gpu_before["name"]  # type: ignore[index]
            facts["machine"] = f"{gpu_before['name']}, {comparison.environment['cpu']}"  # type: ignore[index]
        labelled: Comparison = replace(comparison, environment=facts, target=target.name, on_device=on_device)
        results.append(labelled.to_dict())
    return results
