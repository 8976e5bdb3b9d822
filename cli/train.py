"""`chipdeploy train`: the dense network that pruning starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options
from .output import console, flags, note, print_json, quoted

if TYPE_CHECKING:
    from chipdeploy.config import TrainConfig


def train(
    model: options.Model = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    recipe: options.RecipeName = None,
    train_epochs: options.TrainEpochs = None,
    batch: options.Batch = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.Config = None,
    runs: options.Runs = Path("runs"),
    json: options.Json = False,
) -> None:
    """Train a dense network and keep it: 'prune' with the same settings starts from it."""
    from chipdeploy.checking import check_model
    from chipdeploy.config import TrainConfig, build, settings
    from chipdeploy.dense import train_dense
    from chipdeploy.job import prepare
    from chipdeploy.run import read_json

    from .progress import watching

    flags = {
        "model": model,
        "data": data,
        "data_root": None if data_root is None else str(data_root),
        "image_size": image_size,
        "mean": options.numbers(mean, "--mean"),
        "std": options.numbers(std, "--std"),
        "recipe": recipe,
        "train_epochs": train_epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "device": device,
    }
    job = prepare(build(TrainConfig, settings(TrainConfig, flags, config)))
    check_model(job.model(), job.example, job.data.num_classes)
    with watching() as watcher:
        path = train_dense(job, runs / "dense", watcher, note)
    facts = read_json(path.with_suffix(".json"))
    val = facts["metrics"][-1]["val"]
    if json:
        print_json({"weights": str(path), "val_accuracy": val, "metrics": facts["metrics"]})
        return
    console().print(f"dense network: {val:.2%} of the validation images, {path}")
    console().print(f"next: chipdeploy prune {quoted(job.config.model)} --flops 0.3{_flags(job.config, runs)}")


def _flags(config: TrainConfig, runs: Path) -> str:
    """The settings by which 'prune' finds this network again, wherever they were given."""
    defaults = type(config)()
    given: dict[str, tuple[Any, Any]] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        numbers = ",".join(map(str, value)) if isinstance(value, tuple) else value
        given["--" + name.replace("_", "-")] = (numbers, getattr(defaults, name))
    del given["--model"]
    return flags(given | {"--runs": (str(runs), "runs")})
