"""From a finished run to files: networks in every precision, verified; engines, built."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chipdeploy.bench import EXPORT, NETWORKS, all_digests, digests, drop_times
from chipdeploy.config import PruneConfig
from chipdeploy.engines.base import Engine, Images, open_engine
from chipdeploy.engines.build import BuildOptions, Progress, build_engine, check_buildable
from chipdeploy.engines.target import TENSORRT, Target
from chipdeploy.engines.trt import CACHE
from chipdeploy.errors import DataError, InputError, RunError, UsageError, VerificationError
from chipdeploy.export.choose import choose
from chipdeploy.export.divergence import first_divergence, first_divergence_from_torch
from chipdeploy.export.modelopt import check_installed
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import PRECISIONS, PrecisionOptions, check_options, convert
from chipdeploy.export.sensitivity import sensitivity
from chipdeploy.export.verify import TOLERANCES, verify_engine
from chipdeploy.files import digest
from chipdeploy.job import prepare
from chipdeploy.result import DATA, PLAN, RESULT, load
from chipdeploy.run import CONFIG, Run, make_folder, read_json
from chipdeploy.training.data import ImageData, load_data

if TYPE_CHECKING:
    from torch import Tensor

    from chipdeploy.training.splits import Split

_KIND = f"({'|'.join(PRECISIONS)})"
EXPORTED = re.compile(  # what an export may have made; other files of such names are the user's own
    rf"(dense|pruned)(-{_KIND})?\.onnx|(dense|pruned)-(trt|rtx)-{_KIND}\.engine(\.json|{re.escape(CACHE)})?"
)
VERIFY_IMAGES = 64
CALIBRATION_IMAGES = 512
SENSITIVITY_IMAGES = 128  # one run over them a layer
ACCURACY_IMAGES = 5000  # drawn from the validation images: more move the estimate by less than a point
ACCURACY_BATCH = 50
MAX_DROP = 0.5  # points of accuracy that the fastest precision may lose against fp32
CANDIDATES = ("fp32", "fp16", "int8")  # of `best`
MAX_BATCH = 64


@dataclass(frozen=True)
class ExportOptions:
    """What an export writes.

    Args:
        max_batch: largest batch that the ONNX files are made for; None takes that of the last export, else `MAX_BATCH`.
        precisions: of the networks, that of the bundle first; fp32 is always made, and the others are made from it.
            Where none is given, and not `best` either, the bundle stays with that of the last export, at first fp32.
        best: make `CANDIDATES`, time them, and name the fastest that loses at most `max_drop` points.
        runtimes: `trt`, `rtx`: an engine of every network in the precisions that are asked for; fp32 where none is.
        build: of the engines.
        data, data_root: where the run's own data lie now; None takes what the run was made with.
        calibration: data whose training images int8 is calibrated with, as in --data; None takes the run's own.
        precision: of the conversions.
        keep_worst: so many layers, those that int8 hurts most, stay in float.

    Raises:
        UsageError: an unknown precision or runtime, engines for larger batches than networks, a number out of range.
    """

    max_batch: int | None = None
    precisions: tuple[str, ...] = ()
    best: bool = False
    max_drop: float = MAX_DROP
    runtimes: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)
    data: str | None = None
    data_root: Path | None = None
    calibration: str | None = None
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    keep_worst: int = 0

    def __post_init__(self) -> None:
        for what, values, known in (
            ("precision", self.precisions, PRECISIONS),
            ("runtime", self.runtimes, TENSORRT),
        ):
            if unknown := [value for value in values if value not in known]:
                raise UsageError(f"unknown {what} {unknown[0]!r}; use {', '.join(known)}")
        if self.max_batch is not None and self.max_batch < 2:
            raise UsageError(
                f"max_batch must be at least 2 for a free batch size, got {self.max_batch}; e.g. {MAX_BATCH}"
            )
        if self.runtimes and self.max_batch and self.build.batches[-1] > self.max_batch:
            raise UsageError(
                f"engines for batches up to {self.build.batches[-1]} need networks for as many, "
                f"got {self.max_batch}; raise --max-batch or lower --batch"
            )
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"the drop is a number of points from 0 to 100, got {self.max_drop}")
        if self.keep_worst < 0:
            raise UsageError(f"the layers that stay in float are counted from 0 on, got {self.keep_worst}")
        check_options(self.precision)

    @property
    def all_precisions(self) -> tuple[str, ...]:
        """Of the networks: fp32 first, each once."""
        return tuple(dict.fromkeys(("fp32", *self.precisions, *(CANDIDATES if self.best else ()))))

    @property
    def engine_precisions(self) -> tuple[str, ...]:
        """Of the engines, each once: nobody waits for an fp32 engine that was not asked for."""
        asked = (*self.precisions, *(CANDIDATES if self.best else ()))
        return tuple(dict.fromkeys(asked or ("fp32",)))

    @property
    def all_runtimes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.runtimes))


@dataclass(frozen=True)
class Notes:
    """Whom an export tells what it does: a step begins, an engine is so far, something earlier is lost."""

    step: Callable[[str], None] = lambda _: None
    build: Progress | None = None
    lost: Callable[[str], None] = lambda _: None


def export_run(run: Run, options: ExportOptions | None = None, notes: Notes | None = None) -> dict[str, Any]:
    """Write dense and pruned network in all precisions, check each against PyTorch on real images, build the engines.

    Exports add up: precisions and engines of an earlier one stay where the fp32 networks are still the same, whatever
    the largest batch is now: an engine has its own.

    Raises:
        RunError: the run is not finished, or a file of it was changed.
        ExportError: a network cannot be exported, converted or built.
        MissingError: a package or a device that a precision or a runtime needs is not here.
        VerificationError: a file disagrees with its network. Nothing is left behind in any case, and an older export
            stays as it was.
    """
    options, notes = options or ExportOptions(), notes or Notes()
    for precision in options.all_precisions:
        check_installed(precision)
    before = _earlier(run)
    if not before and run.file(EXPORT).is_file():
        notes.lost(f"dropping what was exported before: {EXPORT} was edited, or is of another version")
    options = replace(options, max_batch=options.max_batch or (before["max_batch"] if before else MAX_BATCH))
    for runtime in options.all_runtimes:
        check_buildable(runtime, options.build.gpus)
    described = read_json(run.check(DATA))
    data = _data(run, described["digest"], options)
    job = _Export(run, options, notes, described, data)
    with _aside(run) as (folder, keep):
        facts = job.write(folder)
        if before:
            facts = _with_earlier(run, before, facts, notes)
            if not (options.precisions or options.best) and before["asked"] in facts["precisions"]:
                facts["asked"] = before["asked"]
        keep |= set(all_digests(facts))
    drop_times(run, facts, notes.lost)
    run.write(EXPORT, facts)
    run.seal([EXPORT])
    return facts


@contextmanager
def _aside(run: Run) -> Iterator[tuple[Path, set[str]]]:
    """Files are made and checked aside: one of a final name was verified, and a failure leaves an older export.

    Yields the folder, and a set to fill with the names of all files that belong to the run from now on.
    """
    keep: set[str] = set()
    folder = run.file(".export")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    make_folder(folder)
    try:
        yield folder, keep
        for path in folder.iterdir():
            path.replace(run.file(path.name))
        # What an earlier export made, and no record names any more.
        for path in run.path.iterdir():
            if EXPORTED.fullmatch(path.name) and path.name.removesuffix(".json").removesuffix(CACHE) not in keep:
                path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _earlier(run: Run) -> dict[str, Any] | None:
    """The record of the export before this one; None where there was none, or not one of this version."""
    try:
        before = read_json(run.check(EXPORT, maker="export"))
        all_digests(before)
        return dict(before) if before["max_batch"] >= 2 and before["asked"] in PRECISIONS else None
    except (RunError, KeyError, TypeError, AttributeError):
        return None


def _with_earlier(run: Run, before: dict[str, Any], facts: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """The record of an export, with what an earlier one made of the same networks and nobody touched since."""
    merged = dict(facts)
    for kind in ("precisions", "engines"):
        kept = {}
        for name, entry in before[kind].items():
            if name in facts[kind]:
                continue
            if flaw := _flaw(run, before, facts, entry):
                notes.lost(f"dropping {name}: {flaw}")
            else:
                kept[name] = entry
        merged[kind] = kept | facts[kind]
    timed, now = (digests(*map(record["precisions"].get, CANDIDATES)) for record in (before, merged))
    if "best" in before and timed == now:
        merged.setdefault("best", before["best"])
    return merged


def _flaw(run: Run, before: dict[str, Any], facts: dict[str, Any], entry: dict[str, Any]) -> str:
    """Why an earlier entry does not belong to the networks of a new record; empty where it does."""
    if digests(before) != digests(facts):
        return "the fp32 networks are others now"
    for file, sha256 in digests(entry).items():
        path = run.file(file)
        if not path.is_file() or digest(path) != sha256:
            return f"{file} is missing or was edited"
    made = facts["precisions"].get(entry["pruned"]["precision"])  # in this export
    if made and any(entry[name].get("onnx_sha256", made[name]["sha256"]) != made[name]["sha256"] for name in NETWORKS):
        return f"the {entry['pruned']['precision']} networks are others now"
    return ""


class _Export:
    """One export: its parts share the run, the images and the networks."""

    def __init__(
        self, run: Run, options: ExportOptions, notes: Notes, described: dict[str, Any], data: ImageData
    ) -> None:
        self._run, self._options, self._notes, self._described, self._data = run, options, notes, described, data
        self._images, _ = next(_drawn(data.val, VERIFY_IMAGES, VERIFY_IMAGES))
        self._models = {name: load(run.path, dense=name == "dense") for name in NETWORKS}
        lossy = [precision for precision in options.all_precisions if precision != "fp32"]
        root = options.data_root or run.config.get("data_root")
        self._calibration = _calibration(options.calibration, data, root) if lossy else None
        self._accurate = bool(lossy)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write everything into `folder`; returns what export.json holds."""
        facts: dict[str, Any] = {
            "schema": 1,
            "max_batch": self._options.max_batch,
            "asked": (*self._options.precisions, "fp32")[0],
            "precisions": {},
            "engines": {},
        }
        for precision in self._options.all_precisions:
            entry = self._networks(folder, precision)
            if precision == "fp32":
                facts |= entry
            else:
                facts["precisions"][precision] = entry
        for runtime in self._options.all_runtimes:
            for precision in self._options.engine_precisions:
                target = Target.parse(f"{runtime}-{precision}")
                facts["engines"][target.name] = self._engines(folder, target)
        if self._options.best:
            self._notes.step("timing the precisions")
            facts["best"] = self._choose(folder, facts)
            facts["asked"] = facts["best"]["precision"]
        return facts

    def _networks(self, folder: Path, precision: str) -> dict[str, Any]:
        """Both networks in one precision: what was written, how well it agrees, how well it classifies."""
        entry: dict[str, Any] = {"verification": {}}
        for name in NETWORKS:
            self._notes.step(f"{name} network in {precision}")
            path = folder / onnx_name(name, precision)
            if precision == "fp32":
                entry[name] = self._exported(name, path).to_dict()
            else:
                assert self._calibration is not None
                source = folder / onnx_name(name)
                options = self._precision_options(source, precision)
                facts = convert(source, path, precision, self._calibration, options=options).to_dict()
                entry[name] = facts.pop("file") | facts
                if facts["agreement"] is None:  # nothing here can run it
                    continue
            engine = open_engine(Target("ort", "cpu", precision), path)
            entry["verification"][name] = self._verified(folder, name, precision, path, engine)
            if self._accurate:
                entry[name]["accuracy"] = accuracy(engine, self._data, ACCURACY_IMAGES)
        return entry

    def _precision_options(self, source: Path, precision: str) -> PrecisionOptions:
        """The options, with the layers of this network that int8 hurts most kept in float where that is wanted."""
        options, count = self._options.precision, self._options.keep_worst
        if precision != "int8" or not count:
            return options
        assert self._calibration is not None
        self._notes.step("looking for the layers that int8 hurts most")
        ranked = sensitivity(source, self._calibration[:SENSITIVITY_IMAGES], options=options)
        worst = tuple(layer.name for layer in ranked[:count])
        return replace(options, keep_float=options.keep_float + worst)

    def _exported(self, name: str, path: Path) -> Any:
        metadata = _metadata(self._run, self._described, name)
        assert self._options.max_batch
        return export_onnx(
            self._models[name], self._images[:2], path, max_batch=self._options.max_batch, metadata=metadata
        )

    def _verified(self, folder: Path, name: str, precision: str, path: Path, engine: Engine) -> dict[str, Any]:
        """Agreement with PyTorch; where there is none, the first layer that differs is named."""
        try:
            checked = verify_engine(
                self._models[name], engine, path.name, self._images, tolerance=TOLERANCES[precision]
            )
        except VerificationError as error:
            images: Images = self._images[:8].numpy()
            if precision == "fp32":
                where = first_divergence_from_torch(self._models[name], path, images, TOLERANCES[precision])
            else:
                where = first_divergence(folder / onnx_name(name), path, images, TOLERANCES[precision])
            raise VerificationError(f"{error}; {where}") from error
        return checked.to_dict()

    def _engines(self, folder: Path, target: Target) -> dict[str, Any]:
        """Both networks as engines of one target; run and verified where a GPU is here."""
        entry: dict[str, Any] = {}
        for name in NETWORKS:
            self._notes.step(f"{name} engine for {target.name}")
            path = folder / f"{name}-{target.name}.engine"
            manifest = build_engine(
                folder / onnx_name(name, target.precision),
                path,
                target,
                self._options.build,
                on_progress=self._notes.build,
            )
            entry[name] = {"file": path.name, **manifest.to_dict()}
            if torch.cuda.is_available() and not self._options.build.gpus:
                checked = verify_engine(
                    self._models[name],
                    open_engine(target, path),
                    path.name,
                    self._images,
                    batches=sorted(set(self._options.build.batches)),
                    tolerance=max(TOLERANCES[target.precision], 1e-3),
                )
                entry[name]["verification"] = checked.to_dict()
        return entry

    def _choose(self, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
        build = self._options.build
        # An engine for other GPUs cannot be timed here.
        runtime = next((r for r in self._options.all_runtimes if torch.cuda.is_available() and not build.gpus), "ort")
        files = {}
        for precision in CANDIDATES:
            target = Target.parse(f"{runtime}-{precision}")
            name = f"pruned-{target.name}.engine" if target.builds else onnx_name("pruned", precision)
            files[target] = folder / name
        accuracies = {"fp32": facts["pruned"]["accuracy"]["top1"]}
        accuracies |= {p: facts["precisions"][p]["pruned"]["accuracy"]["top1"] for p in CANDIDATES if p != "fp32"}
        shape = tuple(self._described["shape"])
        batch = 1 if runtime == "ort" else build.batches[0]
        return choose(files, accuracies, shape, max_drop=self._options.max_drop, batch=batch)


def onnx_name(network: str, precision: str = "fp32") -> str:
    """`pruned.onnx`, `pruned-int8.onnx`."""
    return f"{network}.onnx" if precision == "fp32" else f"{network}-{precision}.onnx"


def _drawn(split: Split, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose first `count` images are of all classes: a folder has its images sorted by class."""
    return split.batches(batch, seed=0 if len(split) > count else None)


def accuracy(engine: Engine, data: ImageData, limit: int) -> dict[str, Any]:
    """Top-1 of an engine on validation images, at most about `limit` of them."""
    right = seen = 0
    for images, labels in _drawn(data.val, ACCURACY_BATCH, limit):
        pixels: Images = images.numpy()
        right += int((engine.run(np.ascontiguousarray(pixels)).argmax(1) == labels.numpy()).sum())
        seen += len(labels)
        if seen >= limit:
            break
    return {"top1": right / seen, "images": seen, "split": "validation"}


def _data(run: Run, sha256: str, options: ExportOptions) -> ImageData:
    """The run's own data, wherever they lie now. The test images are not touched here."""
    given = {"data": options.data, "data_root": options.data_root and str(options.data_root)}
    moved = {key: value for key, value in given.items() if value is not None}
    # Where the images come from matters here, not what the run trained on: a GPU run may be exported on a CPU machine.
    config = PruneConfig(**read_json(run.check(CONFIG)) | moved | {"device": "cpu"})
    try:
        data = prepare(config).data
    except DataError as error:
        raise DataError(
            f"{error}; where the run's data lie elsewhere now, say so with --data or --data-root"
        ) from error
    images = read_json(run.check(RESULT))["inputs"].get("images", data.images_digest)  # older runs do not tell
    if (data.digest, data.images_digest) != (sha256, images):
        fix = "give those that it was made with" if moved else "put them back, or say with --data where they are now"
        raise RunError(f"the data of {run.path} changed since it was made: {config.data} has others; {fix}")
    return data


def _calibration(spec: str | None, data: ImageData, root: Path | str | None) -> Images:
    """Training images as the network sees them, float32 [N, C, H, W]: never validation or test images.

    Raises:
        DataError: the data cannot be had. InputError: they are of another shape.
    """
    source = data
    if spec is not None:
        try:
            source = load_data(
                spec, root=Path(root) if root else None, mean=data.mean, std=data.std, image_size=data.image_size
            )
        except UsageError as error:  # the network's own normalisation has another number of channels
            raise InputError(f"the calibration data {spec} do not fit the network: {error}") from error
        if source.shape != data.shape:
            raise InputError(f"calibration images are {list(source.shape)}, the network takes {list(data.shape)}")
    batches = source.train.batches(ACCURACY_BATCH, seed=0)
    parts = [images for images, _ in _first(batches, math.ceil(CALIBRATION_IMAGES / ACCURACY_BATCH))]
    images: Images = torch.cat(parts)[:CALIBRATION_IMAGES].contiguous().numpy()
    return images


def _first(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _metadata(run: Run, data: dict[str, Any], name: str) -> dict[str, str]:
    plan = read_json(run.check(PLAN))
    plan_sha256 = read_json(run.check(RESULT))["plan_digest"] if plan else ""
    return {
        "chipdeploy.network": name,
        "chipdeploy.model": Path(run.config["model"]).name,
        "chipdeploy.plan_sha256": plan_sha256 if name == "pruned" else "",
        "chipdeploy.classes": "\n".join(data["classes"]),
        "chipdeploy.mean": ",".join(f"{value:.8g}" for value in data["mean"]),
        "chipdeploy.std": ",".join(f"{value:.8g}" for value in data["std"]),
    }
