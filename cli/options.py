"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else goes to stderr.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs.", show_default=True, envvar="CHIPDEPLOY_RUNS")]
RunDir = Annotated[Path | None, typer.Option("--run", help="Run directory; default: the latest finished run.")]
NewRun = Annotated[Path | None, typer.Option("--run", help="Run directory to make, or to resume.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file of settings; flags and CHIPDEPLOY_* go first.", envvar="CHIPDEPLOY_CONFIG"
    ),
]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Built-in name, torchvision:NAME, timm:NAME or path/to/file.py:factory. Default: resnet20.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="fashion-mini (default), fashion-mnist, cifar10, cifar100, tiny-imagenet, npz:FILE or folder:DIR.",
    ),
]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of a data set in its published form.")]
ImageSize = Annotated[int | None, typer.Option("--image-size", help="Height and width of the images, pixels.")]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Mean of each channel for pixels in [0, 1], e.g. 0.5,0.5,0.5.")
]
Std = Annotated[str | None, typer.Option("--std", help="Standard deviation of each channel, likewise.")]
Latency = Annotated[
    str | None, typer.Option("--latency", metavar="SHARE", help="Share of the dense time that stays: 0.5 or 50%.")
]
LatencyMs = Annotated[
    float | None, typer.Option("--latency-ms", help="Milliseconds that an inference may take on the target.")
]
Fps = Annotated[float | None, typer.Option("--fps", help="Images a second that the target must reach.")]
On = Annotated[str | None, typer.Option("--on", help="Target, e.g. ort-cpu, torch-cuda-fp16. Default: ort-cpu.")]
BenchBatch = Annotated[int | None, typer.Option("--bench-batch", help="Images an inference when timed. Default: 1.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads of a runtime on the CPU. Default: 1.")]
Profile = Annotated[
    str | None,
    typer.Option("--profile", help="Latency profile, by name or file. Default: yours of this machine, or a new one."),
]
Minutes = Annotated[
    float | None, typer.Option("--minutes", help="Minutes for measuring a profile where there is none. Default: 3.")
]
Classes = Annotated[int, typer.Option("--classes", help="Number of classes.")]
Channels = Annotated[int, typer.Option("--channels", help="Channels of an image.")]
Size = Annotated[int, typer.Option("--image-size", help="Height and width of the images, pixels.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Layers that keep their outputs, e.g. 'layer4.*'; repeatable."),
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="default, or paper: the published schedule.")]
TrainEpochs = Annotated[int | None, typer.Option("--train-epochs", help="Epochs of the dense training.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Images in a training batch.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn. Default: 0.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or auto. Default: auto.")]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5` as numbers. Raises UsageError where it is none."""
    if text is None:
        return None
    from chipdeploy.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} takes numbers with commas between, got {text!r}; e.g. {option} 0.5,0.5,0.5"
        ) from error


def share(text: str | None, option: str) -> float | None:
    """`0.3` or `30%` as a share. Raises UsageError where it is none, or not between 0 and 1."""
    if text is None:
        return None
    from chipdeploy.errors import UsageError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise UsageError(
            f"{option} is the share that stays, between 0 and 1, got {text!r}; e.g. {option} 0.3 or {option} 30%"
        )
    return value
