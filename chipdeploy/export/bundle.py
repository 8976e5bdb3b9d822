"""A deployable bundle: one folder with all that is needed to run a network, and what it is, digest by digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator

from chipdeploy import __version__
from chipdeploy.engines.trt import EngineManifest, manifest_path
from chipdeploy.errors import DataError, ExportError, UsageError
from chipdeploy.export.folders import put, replacing
from chipdeploy.export.onnx import check_digest
from chipdeploy.export.preprocess import Port, check_top_k, network_ports, ports, with_preprocessing
from chipdeploy.export.triton import CONFIG, LABELS, TritonModel, check_name, preferred_batches
from chipdeploy.files import digest

SCHEMA = 1
KIND = "chipdeploy-bundle"
MANIFEST, MODEL, INFER, ENGINES = "manifest.json", "model.onnx", "infer.py", "engines"
TENSORRT = "tensorrt"  # the runtime whose engines Triton loads; those of TensorRT-RTX it does not
CACHE = "__pycache__"  # what importing infer.py leaves beside it

Contents = dict[str, bytes | Path]  # relative path ▶ what it holds, or the file of which it is a copy
Repository = list[tuple[TritonModel, bytes | Path]]  # Triton's models, each with its network


class Description(BaseModel):
    """What data.json says of the images and classes of a network."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # [C, H, W]
    classes: tuple[str, ...] = Field(min_length=1)
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    digest: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Description:
        channels = self.shape[0]
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ValueError(
                f"{channels} channels need {channels} means and as many positive standard deviations, "
                f"got {list(self.mean)} and {list(self.std)}"
            )
        for label in self.classes:
            # Folders that are classes may have names that are no text.
            if label.splitlines() not in ([label], []) or label.encode(errors="replace").decode() != label:
                raise ValueError(f"a class name is one line of text, got {label!r}")
        return self

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Description:
        """Raises DataError where a part is missing or cannot be."""
        try:
            return cls.model_validate(dict(description))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            text = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
            raise DataError(
                f"the description of the data is wrong: {text}; take data.json of a finished run"
            ) from error


@dataclass(frozen=True)
class _Built:
    """An engine that goes into the bundle."""

    path: Path
    manifest: EngineManifest

    @property
    def on_triton(self) -> bool:
        return self.manifest.runtime == TENSORRT


def write_bundle(
    folder: Path,
    onnx: Path,
    description: Mapping[str, Any],
    *,
    sha256: str | None = None,
    name: str = "model",
    engines: Sequence[Path] = (),
    preprocess: bool = False,
    top_k: int | None = None,
    max_batch: int = 64,
    on_gpu: bool = False,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a bundle to `folder`, in one step; a bundle that was there is replaced. Returns its manifest.

    Args:
        onnx: takes normalised images [batch, C, H, W], gives logits [batch, classes].
        description: data.json of the run: name, shape [C, H, W], classes, mean, std, digest.
        sha256: of the ONNX file when it was exported; None takes the file as it is.
        name: of the model on a Triton server.
        engines: engine files with their manifests beside them.
        preprocess: the network of the bundle takes uint8 [batch, H, W, C].
        top_k: it gives probabilities and numbers of the K best classes; only with `preprocess`.
        max_batch: largest batch that the ONNX file was made for.
        on_gpu: Triton runs the ONNX file on a GPU. Engines run there anyway.
        facts: of the run, as JSON values; they become "run" of the manifest.

    Raises:
        UsageError: a name that Triton does not serve, `max_batch` below 1, or a `top_k` that cannot be.
        DataError: the description lacks something.
        ExportError: a file is missing, was edited or belongs to another network, or the folder holds something else or
            cannot be written. Nothing is left behind then, and what was there before is untouched.
    """
    data = Description.read(description)
    _check_options(name, max_batch, preprocess, top_k, data)
    content, proto = _read_network(onnx, sha256)
    network = _network(onnx, proto, data)
    built = _read_engines(engines, data)
    onnx_sha256 = hashlib.sha256(content).hexdigest()
    if preprocess:
        proto = with_preprocessing(proto, data.mean, data.std, top_k=top_k)
        content = proto.SerializeToString(deterministic=True)
    inputs, outputs = ports(proto)
    labels_of = None if top_k else network[1].name
    served = TritonModel(
        name, "onnxruntime", inputs, outputs, max_batch, preferred_batches(max_batch), on_gpu, labels_of
    )
    repository: Repository = [(served, content), *_served_engines(name, built, network)]
    manifest = {
        "schema": SCHEMA,
        "kind": KIND,
        "chipdeploy_version": __version__,
        "name": name,
        "run": dict(facts),
        **_described(data, inputs[0], outputs),
        "preprocess": preprocess,
        "top_k": top_k,
        "max_batch": max_batch,
        "onnx_sha256": onnx_sha256,  # as exported, before anything was added to the graph
        "engines": [{"file": f"{ENGINES}/{item.path.name}", **item.manifest.to_dict()} for item in built],
        "triton": [model.name for model, _ in repository],
    }
    with replacing(folder, _check_replaceable) as aside:
        manifest["files"] = _write(aside, _contents(content, data, built, repository))
        put(aside / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
    return manifest


def check_request(folder: Path, classes: int, *, preprocess: bool, top_k: int | None) -> None:
    """Raise what `write_bundle` would raise whatever the network: before a long export, not after it.

    Raises:
        UsageError, ExportError: as `write_bundle`.
    """
    check_top_k(top_k, classes)
    if top_k is not None and not preprocess:
        raise UsageError(f"top-k {top_k} is worked out in the graph; ask for preprocessing in the graph as well")
    _check_replaceable(folder)


def _check_options(name: str, max_batch: int, preprocess: bool, top_k: int | None, data: Description) -> None:
    check_name(name)
    if max_batch < 1:
        raise UsageError(f"max_batch must be at least 1, got {max_batch}")
    if top_k is not None and not preprocess:
        raise UsageError(f"top-k {top_k} is worked out in the graph; ask for preprocessing in the graph as well")
    check_top_k(top_k, len(data.classes))


def _read_network(path: Path, sha256: str | None) -> tuple[bytes, Any]:
    """The bytes of an ONNX file, and the `onnx.ModelProto` in them."""
    import onnx

    if sha256 is not None:
        check_digest(path, sha256)
    try:
        content = path.read_bytes()
        proto = onnx.load_model_from_string(content)
        onnx.checker.check_model(content, full_check=True)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}; export the network again") from error
    except Exception as error:  # protobuf's own, and those of the checker
        raise ExportError(f"{path.name} is no valid ONNX file; export the network again") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ExportError(f"{path.name} keeps its weights in another file; export it as one file")
    return content, proto


def _network(path: Path, proto: Any, data: Description) -> tuple[Port, Port]:
    """Images and logits of a network that fits its data."""
    images, logits = network_ports(proto)
    if images.shape[1:] != data.shape:
        got, wanted = (" x ".join(map(str, shape)) for shape in (images.shape[1:], data.shape))
        raise ExportError(f"{path.name} takes images of {got}, the data are {wanted}; export the run of these data")
    if logits.shape[1] != len(data.classes):
        raise ExportError(
            f"{path.name} has {logits.shape[1]} outputs, the data {len(data.classes)} classes; "
            "give the labels of the network's own data"
        )
    return images, logits


def _described(data: Description, taken: Port, outputs: Sequence[Port]) -> dict[str, Any]:
    """What whoever calls the network starts from, what the graph takes, and what comes out."""
    channels, height, width = data.shape
    raw = {"dtype": "uint8", "layout": "NHWC", "shape": [taken.shape[0], height, width, channels]}
    return {
        "data": {"name": data.name, "digest": data.digest},
        "images": raw | {"mean": list(data.mean), "std": list(data.std)},
        "input": taken.to_dict() | {"layout": "NHWC" if taken.dtype == "uint8" else "NCHW"},
        "outputs": [port.to_dict() for port in outputs],
        "classes": len(data.classes),
    }


def _read_engines(paths: Sequence[Path], data: Description) -> list[_Built]:
    """Engines whose digests agree with their manifests and that fit the data."""
    built = [_Built(path, EngineManifest.read(path)) for path in paths]
    for item in built:
        if item.manifest.input_shape != data.shape:
            raise ExportError(
                f"{item.path.name} takes images of {list(item.manifest.input_shape)}, the data are {list(data.shape)}; "
                "build the engine of this network"
            )
        if item.on_triton and item.manifest.batches[0] > 1:
            raise ExportError(
                f"{item.path.name} takes batches of {item.manifest.batches[0]} or more, Triton sends single images "
                "too; build it with a smallest batch of 1"
            )
    _refuse_twice([item.path.name for item in built], "file name")
    _refuse_twice([item.manifest.precision for item in built if item.on_triton], "precision for TensorRT")
    return built


def _refuse_twice(values: list[str], what: str) -> None:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UsageError(f"two engines have the {what} {twice[0]!r}; give one of them")


def _served_engines(name: str, built: list[_Built], network: tuple[Port, Port]) -> Iterator[tuple[TritonModel, Path]]:
    """Triton models of the TensorRT engines: `<name>_trt`, or `<name>_trt_<precision>` where there are several."""
    engines = [item for item in built if item.on_triton]
    for item in engines:
        manifest = item.manifest
        images, logits = (replace(port, dtype=manifest.io_type) for port in network)
        _, usual, largest = manifest.batches
        called = f"{name}_trt" if len(engines) == 1 else f"{name}_trt_{manifest.precision}"
        preferred = tuple(sorted({usual, largest}))
        yield TritonModel(called, TENSORRT, [images], [logits], largest, preferred, True, logits.name), item.path


def _contents(model: bytes, data: Description, built: list[_Built], repository: Repository) -> Contents:
    """All files but the manifest."""
    labels = "".join(f"{label}\n" for label in data.classes).encode()
    script = resources.files("chipdeploy.export").joinpath("infer_template.py").read_bytes()
    contents: Contents = {MODEL: model, LABELS: labels, INFER: script}
    for item in built:
        contents[f"{ENGINES}/{item.path.name}"] = item.path
        contents[f"{ENGINES}/{manifest_path(item.path).name}"] = manifest_path(item.path)
    for triton, network in repository:
        folder = f"triton/{triton.name}"
        contents[f"{folder}/{CONFIG}"] = triton.config().encode()
        contents[f"{folder}/{triton.file}"] = network
        if triton.labels_of:
            contents[f"{folder}/{LABELS}"] = labels
    return contents


def _write(folder: Path, contents: Contents) -> dict[str, dict[str, Any]]:
    """Write all files; returns the digest and size of each as it lies there."""
    written = {}
    for relative, content in sorted(contents.items()):
        path = folder / relative
        put(path, content)
        written[relative] = {"sha256": digest(path), "bytes": path.stat().st_size}
    return written


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but a bundle: its files would be lost; and one inside of another bundle."""
    for parent in folder.resolve().parents:
        if _files_of(parent / MANIFEST) is not None:
            raise ExportError(f"{folder} lies in the bundle {parent}; choose a folder outside of it")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file; choose an empty or new folder for the bundle")
    if not any(folder.iterdir()):
        return
    known = _files_of(folder / MANIFEST)
    if known is None:
        raise ExportError(f"{folder} exists and is no bundle of chipdeploy; choose an empty or new folder")
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink())
    if foreign := [path.as_posix() for path in found if path.as_posix() not in known and CACHE not in path.parts]:
        raise ExportError(f"{folder} holds {foreign[0]}, which is not of the bundle there; move it, or choose another")


def _files_of(manifest: Path) -> set[str] | None:
    """Relative paths of all files of a bundle, by its manifest; None where it is not one of ours."""
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        return {MANIFEST, *facts["files"]} if facts["kind"] == KIND else None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
