"""`chipdeploy export`: ONNX files of the dense and the pruned network, checked; engines, built; a bundle, packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import console, note, print_json, quoted

if TYPE_CHECKING:
    from chipdeploy.deploy import ExportOptions


def export(
    run: options.RunDir = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="fp32, fp16, int8, bf16, fp8, with commas between, that of the bundle first; best: make fp32, fp16 "
            "and int8 and time them. [fp32; the bundle: that of the last export]",
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Points of accuracy that the best precision may lose. [0.5]")
    ] = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="Build TensorRT engines in --precision, on this GPU and for it.")
    ] = False,
    rtx: Annotated[
        bool, typer.Option("--rtx", help="Build TensorRT-RTX engines in --precision, with --gpu ahead of time.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Compute capabilities for --rtx, e.g. sm86,sm89; needs no GPU here.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Smallest:usual:largest batch of the engines. [1:8:32]", metavar="MIN:OPT:MAX"),
    ] = None,
    level: Annotated[int | None, typer.Option("--level", help="Effort of the build, 0 to 5.")] = None,
    workspace_mb: Annotated[int | None, typer.Option("--workspace-mb", help="Scratch memory of the engines.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Where the run's own data lie now, as in prune's --data. Default: where they lay."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="Folder of data sets in their published form. Default: that of the run."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="Data to calibrate int8 with, as in --data. Default: the run's own."),
    ] = None,
    keep_float: Annotated[
        int | None,
        typer.Option("--keep-float", help="So many layers, those whose int8 moves the logits most, stay in float."),
    ] = None,
    rest: Annotated[
        str | None, typer.Option("--int8-rest", help="What is not int8 in an int8 network: fp32 (default) or fp16.")
    ] = None,
    method: Annotated[str | None, typer.Option("--calibration-method", help="minmax, entropy or percentile.")] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", help="Largest batch that the ONNX files are made for. [that of the last export, else 64]"
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Folder to hand over: network, engines, labels, infer.py, Triton.")
    ] = None,
    with_preprocess: Annotated[
        bool, typer.Option("--with-preprocess", help="The bundle's network takes uint8 images [N, H, W, C].")
    ] = False,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="The bundle's network gives the K best classes; with --with-preprocess."),
    ] = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Export both networks of a run to ONNX, verify them on real images, and build engines where that is asked for."""
    from chipdeploy.bundling import bundle_run, check_bundle
    from chipdeploy.deploy import Notes, export_run
    from chipdeploy.run import Run

    from .progress import steps

    wanted = _wanted(
        precision=precision,
        max_drop=max_drop,
        runtimes=[name for name, asked in (("trt", trt), ("rtx", rtx)) if asked],
        build={"--batch": batch, "--gpu": gpu, "--level": level, "--workspace-mb": workspace_mb},
        int8={
            "--calibration": calibration,
            "--calibration-method": method,
            "--int8-rest": rest,
            "--keep-float": keep_float,
        },
        max_batch=max_batch,
        data=data,
        data_root=data_root,
    )
    if (with_preprocess or top_k is not None) and bundle is None:
        _refuse("--with-preprocess and --top-k say what a bundle holds; add --bundle DIR")
    directory = Run.open(run) if run else Run.latest(runs)
    if bundle:
        check_bundle(directory, bundle, preprocess=with_preprocess, top_k=top_k)
    with directory.locked(), steps() as (step, progress):
        facts = export_run(directory, wanted, Notes(step, progress, note))
        if bundle:
            step("packing the bundle")
            facts["bundle"] = bundle_run(directory, bundle, preprocess=with_preprocess, top_k=top_k)
    if json:
        print_json({"run": str(directory.path), **facts})
        return
    print_export(facts, directory.path)
    if wanted.best:
        print_choice(facts["best"])
    if bundle:
        run_it = f"python {quoted(bundle / 'infer.py')} IMAGES.npy"
        console().print(f"bundle: {bundle}, in {facts['asked']}; run it with {run_it}")
    targets = _targets(facts)
    on = f"--on {','.join(targets)} " if len(targets) > 1 else ""
    console().print(f"next: chipdeploy bench {on}--run {quoted(directory.path)}")


def _targets(facts: dict[str, Any]) -> list[str]:
    """What can be timed of an export: its precisions in ONNX Runtime, and engines that were built on this GPU."""
    engines = [name for name, entry in facts["engines"].items() if entry["pruned"]["gpu_name"]]
    runs = [precision for precision, entry in facts["precisions"].items() if entry["verification"]]
    return ["ort-cpu", *(f"ort-cpu-{precision}" for precision in runs), *engines]


def _refuse(message: str) -> None:
    from chipdeploy.errors import UsageError

    raise UsageError(message)


def _wanted(
    *,
    precision: str | None,
    max_drop: float | None,
    runtimes: list[str],
    build: dict[str, Any],
    int8: dict[str, Any],
    max_batch: int | None,
    data: str | None,
    data_root: Path | None,
) -> ExportOptions:
    """The options as the library takes them. Raises UsageError for those that do not go together."""
    from chipdeploy.deploy import MAX_DROP, ExportOptions
    from chipdeploy.engines.build import BuildOptions, timing_cache
    from chipdeploy.export.precision import PrecisionOptions

    parts = [] if precision is None else [part.strip() for part in precision.split(",")]
    best = parts == ["best"]
    if "best" in parts and not best:
        _refuse("--precision best makes fp32, fp16 and int8 itself; give it alone")
    if max_drop is not None and not best:
        _refuse("--max-drop says what --precision best may lose; add --precision best, or leave it out")
    gpus = build.pop("--gpu")
    if gpus is not None and "rtx" not in runtimes:
        _refuse("--gpu names the GPUs that --rtx builds for; add --rtx, or leave it out")
    _refuse_idle(build, bool(runtimes), "an engine", "--trt or --rtx")
    _refuse_idle(int8, best or "int8" in parts, "an int8 network", "--precision int8")
    return ExportOptions(
        max_batch=max_batch,
        precisions=() if best else tuple(parts),
        best=best,
        max_drop=MAX_DROP if max_drop is None else max_drop,
        runtimes=tuple(runtimes),
        build=BuildOptions(
            batches=batch_range(build["--batch"] or "1:8:32"),
            gpus=() if gpus is None else tuple(dict.fromkeys(part.strip().lower() for part in gpus.split(","))),
            level=build["--level"],
            workspace_mb=build["--workspace-mb"],
            timing_cache=timing_cache() if "trt" in runtimes else None,
        ),
        data=data,
        data_root=data_root,
        calibration=int8["--calibration"],
        precision=PrecisionOptions(
            rest=int8["--int8-rest"] or "fp32", method=int8["--calibration-method"] or PrecisionOptions().method
        ),
        keep_worst=int8["--keep-float"] or 0,
    )


def _refuse_idle(given: dict[str, Any], used: bool, what: str, fix: str) -> None:
    """Raises UsageError for an option that would do nothing."""
    if not used and (idle := [name for name, value in given.items() if value is not None]):
        _refuse(f"{idle[0]} is about {what} and none is made; add {fix}, or leave it out")


def batch_range(text: str) -> tuple[int, int, int]:
    """`1:8:32`, or `8` for `8:8:8`. Raises UsageError where it is neither."""
    parts = text.split(":")
    try:
        sizes = [int(part) for part in (parts * 3 if len(parts) == 1 else parts)]
    except ValueError:
        sizes = []
    if len(sizes) != 3:
        _refuse(f"--batch takes smallest:usual:largest, or one number, got {text!r}; e.g. --batch 1:8:32")
    return sizes[0], sizes[1], sizes[2]


def print_export(facts: dict[str, Any], folder: Path) -> None:
    """One line a file."""
    screen = console()
    for entry in (facts, *facts["precisions"].values()):
        for name in ("dense", "pruned"):
            screen.print(file_line(folder, entry[name], entry["verification"].get(name)))
            for warning in entry[name].get("notes", ()):
                note(f"note: {entry[name]['file']}: {warning}")
    for engines in facts["engines"].values():
        for name in ("dense", "pruned"):
            engine = engines[name]
            screen.print(
                f"{folder / engine['file']}: {engine['bytes'] / 1e6:.2f} MB, batches {engine['batches']}, "
                f"for {engine['gpu_name'] or ', '.join(engine['gpus'])}, built in {engine['seconds']:.1f} s"
            )


def file_line(folder: Path, file: dict[str, Any], checked: dict[str, Any] | None) -> str:
    """Size, ops, and how well it agrees; what nothing here can run was not compared, and the file's notes say so."""
    line = f"{folder / file['file']}: {file['bytes'] / 1e6:.2f} MB, {file['ops']} ops, "
    if checked is None:
        return f"{line}not compared with PyTorch"
    line += (
        f"equals PyTorch to {checked['max_relative_error']:.1e} (limit {checked['tolerance']:.0e}), "
        f"top-1 agreement {checked['top1_agreement']:.1%} on {checked['images']} images"
    )
    if "accuracy" in file:
        line += f", {file['accuracy']['top1']:.2%} of {file['accuracy']['images']} validation images right"
    return line


def print_choice(best: dict[str, Any]) -> None:
    """The table of `--precision best`, and what was taken."""
    from rich.table import Table

    from chipdeploy.report.files import choice_text

    table = Table("precision", "accuracy", "drop", "size", "time", box=None, pad_edge=False)
    for row in best["table"]:
        low, high = row["ratio_interval"]
        table.add_row(
            row["precision"] + (" *" if row["precision"] == best["precision"] else ""),
            f"{row['accuracy']:.2%}",
            f"{row['drop_points']:+.2f} points" + ("" if row["holds"] else ", too much"),
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['ratio']:.2f}x of fp32 (95 % {low:.2f}-{high:.2f})"
            + (f", noisy: {row['noise']}" if row.get("noise") else ""),
        )
    console().print(table)
    console().print(f"best: {choice_text(best)}")
