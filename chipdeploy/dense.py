"""The dense training: once for a set of settings, found again afterwards, and resumed where it was interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from chipdeploy import checkpoint
from chipdeploy.config import TrainConfig
from chipdeploy.errors import RunError
from chipdeploy.files import digest, unwritable
from chipdeploy.job import Job
from chipdeploy.run import make_folder, read_json, write_json
from chipdeploy.training.loop import Watcher, evaluate
from chipdeploy.training.weights import save_weights

PLACES = ("data", "data_root", "device")  # settings that say where, not what: digests say what the data are


def train_dense(job: Job, folder: Path, watcher: Watcher, tell: Callable[[str], None] | None = None) -> Path:
    """Train the dense network, or find the one trained before with the same settings below `folder`; returns its file.

    The file holds the weights; a JSON file beside it the settings and the accuracies. Where the data lie does not
    matter, nor where they are trained on. Of several processes one trains, and the others wait for it.

    Args:
        tell: is told where another process is waited for.

    Raises:
        RunError: the JSON file of an earlier training is damaged, or the folder cannot be written.
    """
    settings = job.config.model_dump(include=set(TrainConfig.model_fields))
    settings |= {f"{name}_digest": value for name, value in job.inputs.items()}
    # The same pixels under two names may be normalised in two ways.
    counts = {name: value for name, value in settings.items() if name not in PLACES}
    counts |= {"mean": job.data.mean, "std": job.data.std, "pace": job.recipe.pace}
    key = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{Path(job.config.model).stem.replace(':', '-')}-{key}.safetensors"
    if _trained(path):
        return path
    make_folder(folder)
    with _alone(path, tell):
        if not _trained(path):
            _train(job, path, settings, watcher)
    return path


@contextmanager
def _alone(path: Path, tell: Callable[[str], None] | None) -> Iterator[None]:
    """Wait until no other process trains the network of `path`."""
    lock = path.with_suffix(".lock")
    with ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(lock.open("a", encoding="utf-8"))
            except OSError as error:
                raise unwritable(lock, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if tell:
                    tell(f"another process trains {path}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who had it takes the file away: a lock on a file without a name keeps nobody out.
            if _bears(lock, file.fileno()):
                break
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _bears(path: Path, number: int) -> bool:
    """Whether the open file of a descriptor is the one that bears the name."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _trained(path: Path) -> bool:
    """Whether the weights are there, and as they were written."""
    facts = path.with_suffix(".json")
    return path.is_file() and facts.is_file() and _sealed(facts) == digest(path)


def _train(job: Job, path: Path, settings: dict[str, Any], watcher: Watcher) -> None:
    model = job.model()
    epochs = job.config.train_epochs or job.recipe.train_epochs
    optimizer = job.optimizer(model)
    rows: list[dict[str, Any]] = []
    saved = path.with_suffix(".partial")
    if saved.is_file():
        tensors, state = checkpoint.load(saved)
        checkpoint.unpack("model", tensors, model)
        checkpoint.unpack("optimizer", tensors, optimizer)
        rows = state["rows"]
    watcher.phase("dense", epochs - len(rows), job.steps)
    for epoch in range(len(rows), epochs):
        before = epoch * job.steps
        rate = partial(_dense_rate, job, before, epochs * job.steps)
        loss = job.epoch(model, optimizer, epoch, rate, watcher)
        rows.append(
            {"phase": "dense", "epoch": epoch + 1, "loss": loss, "val": evaluate(model, job.data.val, job.device)}
        )
        watcher.epoch(rows[-1])
        checkpoint.save(
            saved, checkpoint.pack("model", model) | checkpoint.pack("optimizer", optimizer), {"rows": rows}
        )
    save_weights(model, path)
    write_json(path.with_suffix(".json"), {"settings": settings, "metrics": rows, "sha256": digest(path)})
    saved.unlink(missing_ok=True)


def _sealed(facts: Path) -> object:
    """The digest of the weights that were written. Raises RunError for a file that does not say."""
    try:
        return read_json(facts)["sha256"]
    except (RunError, LookupError, TypeError) as error:
        raise RunError(f"{facts} is damaged; delete it, and the dense network is trained again") from error


def _dense_rate(job: Job, before: int, total: int, step: int) -> float:
    return job.rate(before + step, total)
