"""A trained network as one ONNX file: any batch size, fp32, nothing of this machine in it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import site
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from chipdeploy.copying import copied, in_mode
from chipdeploy.errors import ExportError, UsageError
from chipdeploy.files import atomic, digest
from chipdeploy.quiet import quiet

OPSET = 20
CAUSE_LENGTH = 200  # characters of a foreign error that are shown
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
Inputs = Tensor | tuple[Tensor, ...]  # one tensor, or a forward's positional arguments


@dataclass(frozen=True)
class OnnxFile:
    """An exported network on disk.

    Args:
        path: the file.
        sha256: of its bytes, in hexadecimal.
        bytes: its size.
        ops: nodes of the graph.
        op_types: how many nodes there are of each type.
    """

    path: Path
    sha256: str
    bytes: int
    ops: int
    op_types: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the file's name in place of its path."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "ops": self.ops,
            "op_types": dict(self.op_types),
        }


def export_onnx(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    *,
    max_batch: int = 64,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> OnnxFile:
    """Write `model` in eval mode and float32 to `path`, made for batches of 1 to `max_batch`. The model stays as it is.

    One input is called `images`, several bear the names of forward's parameters. One output is called `logits`,
    several bear the keys of the dictionary that forward returns, else `output_0`, `output_1`, …

    Args:
        example: images [N, C, H, W] of the size that the network will see, or a tuple of all inputs, each [N, ...];
            N does not matter, but is one for all.
        metadata: written into the file beside our version. Local folders in its values are cut off.

    Raises:
        UsageError: `max_batch` below 2.
        ExportError: any step failed, an input or output has no free batch size, or the file would hold a path of this
            machine. Nothing is left behind, and a file that was at `path` before is untouched.
    """
    if max_batch < 2:
        raise UsageError(f"max_batch must be at least 2 for a free batch size, got {max_batch}")
    path = Path(path)
    program, shapes = _traced(model, as_inputs(example), max_batch)
    proto = _converted(program, shapes)
    clean_onnx(proto, metadata)
    return save_onnx(proto, path)


def as_inputs(example: Inputs) -> tuple[Tensor, ...]:
    """All inputs of a network, on the CPU, floats in float32, free of gradients.

    Raises:
        ExportError: no input, one without a batch, or inputs of several batch sizes.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    shapes = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in inputs]
    batches = {shape[0] if isinstance(shape, list) and shape else 0 for shape in shapes}
    if len(batches) != 1 or 0 in batches:
        raise ExportError(
            f"every input must be a tensor [N, ...], of one batch size N of 1 or more, got {shapes}; "
            "numbers and tables belong in the network's buffers"
        )
    values = (value.detach().cpu() for value in inputs)
    return tuple(value.float() if value.is_floating_point() else value for value in values)


def clean_onnx(proto: Any, metadata: Mapping[str, str]) -> None:
    """Leave in an `onnx.ModelProto` what belongs to the network, and `metadata` with our version. Works in place.

    Raises:
        ExportError: an input or output has no free batch size, or it holds a path of this machine.
    """
    with step("clean the ONNX graph"):
        _strip(proto)
        _describe(proto, metadata)
        _check_shapes(proto)
        _check_no_paths(proto)


def save_onnx(proto: Any, path: Path) -> OnnxFile:
    """Check an `onnx.ModelProto` in full, then put it at `path` in one step.

    Raises:
        ExportError: the graph is invalid, or the folder cannot be written; a file that was there before is untouched.
    """
    import onnx

    with step("check the ONNX graph"):
        content: bytes = proto.SerializeToString(deterministic=True)
        onnx.checker.check_model(content, full_check=True)
    with atomic(path, ExportError) as temporary:
        temporary.write_bytes(content)
    return describe_onnx(proto, content, path)


def describe_onnx(proto: Any, content: bytes, path: Path) -> OnnxFile:
    """The record of an `onnx.ModelProto` that stands in `path` as `content`."""
    op_types = dict(sorted(Counter(node.op_type for node in proto.graph.node).items()))
    return OnnxFile(path, hashlib.sha256(content).hexdigest(), len(content), len(proto.graph.node), op_types)


def model_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        return digest(path)
    except OSError as error:
        raise ExportError(f"cannot read {path.name}: {error.strerror}; export the network again") from error


def check_digest(path: Path, sha256: str) -> None:
    """Refuse a file whose bytes are not those that were exported.

    Raises:
        ExportError: the file is missing or was edited.
    """
    got = model_digest(path)
    if got != sha256:
        raise ExportError(
            f"{path.name} was edited since export (sha256 {got[:12]}, expected {sha256[:12]}); export the network again"
        )


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], max_batch: int) -> tuple[ExportedProgram, Any]:
    """The network as an ATen graph without the leftovers of removed branches, and the free dimensions of its inputs."""
    from chipdeploy.graph.simplify import remove_dead_branches

    with step("trace the network"), quiet():
        # Channels last would be traced as arithmetic on shapes.
        network = in_mode(copied(model).cpu().float()).to(memory_format=torch.contiguous_format)
        # A batch of 1 would be taken for a constant.
        pairs = tuple(value[:2].clone() if len(value) > 1 else torch.cat([value, value]) for value in inputs)
        batch = torch.export.Dim(BATCH, min=1, max=max_batch)
        arguments = inspect.signature(network.forward).bind(*pairs).arguments
        shapes = pytree.tree_map(lambda _: {0: batch}, dict(arguments))
        return remove_dead_branches(torch.export.export(network, pairs, dynamic_shapes=shapes)), shapes


def _converted(program: ExportedProgram, shapes: Any) -> Any:
    """The program as an `onnx.ModelProto`, with names that tools can rely on."""
    _refuse_lost(program)
    with step("convert the network to ONNX"), quiet():
        inputs = _input_names(program)
        outputs = _output_names(program, inputs)
        # The exporter does not look whether a value inside has the name already.
        made = {name: f"{index}:{name}" for index, name in enumerate((*inputs, *outputs))}
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=True,  # The TensorRT parser needs the folded graph.
            opset_version=OPSET,
            input_names=[made[name] for name in inputs],
            output_names=[made[name] for name in outputs],
            dynamic_shapes=pytree.tree_map(lambda _: BATCH, shapes),
            external_data=False,
            verbose=False,
        )
        if converted is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        proto = converted.model_proto
        inside = {name: f"{name}_inside" for name in made}
        _rename(proto.graph, inside | {new: name for name, new in made.items()})
        return proto


def _refuse_lost(program: ExportedProgram) -> None:
    """Raises ExportError for what PyTorch's exporter drops without a word."""
    from chipdeploy.graph.rules.base import argument, op_name

    for node in program.graph.nodes:
        if node.op != "call_function" or op_name(node) not in ("avg_pool2d", "avg_pool3d"):
            continue
        if divisor := argument(node, 6, "divisor_override"):
            raise ExportError(
                f"{node.name} divides by divisor_override={divisor}, which PyTorch's exporter drops; "
                "pool without it, and multiply by the constant that is missing"
            )


def _input_names(program: ExportedProgram) -> list[str]:
    """Of one input, `images`; of several, forward's parameters."""
    names = [str(name) for name in program.graph_signature.user_inputs]
    return [INPUT] if len(names) == 1 else names


def _output_names(program: ExportedProgram, inputs: list[str]) -> list[str]:
    """Of one output, `logits`; of several, their keys where these tell them apart, else their numbers.

    Raises:
        ExportError: the network returns something that is no tensor.
    """
    spec = program.call_spec.out_spec
    assert spec is not None  # torch.export always writes it
    returned = program.graph_signature.user_outputs
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(returned))), spec))
    keys = [_key(path) for path, _ in paths]
    for key, value in zip(keys, returned, strict=True):
        if not isinstance(value, str):  # tensors stand there by name, all else as it is
            raise ExportError(f"the network returns {value!r} as {key}, which is no tensor; return tensors only")
    if len(keys) == 1:
        return [OUTPUT]
    names = [f"output_{key}" if key in inputs else key for key in keys]
    return names if len(set(names)) == len(names) else [f"output_{index}" for index in range(len(names))]


def _key(path: tuple[Any, ...]) -> str:
    """`boxes_0` for the first of a list under the key boxes; `output_0` where there is no key."""
    parts = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path]
    named = bool(parts) and isinstance(parts[0], str)
    return "_".join(map(str, parts if named else ["output", *parts]))


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Give the values of an `onnx.GraphProto` other names, in place."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, attribute.g):
                _rename(inner, names)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _strip(message: Any) -> None:
    """Clear doc strings and metadata of a protobuf message and all in it: they hold stack traces and local paths."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for child in _children(message):
        _strip(child)


def _children(message: Any) -> Iterator[Any]:
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            yield from [value] if hasattr(value, "DESCRIPTOR") else value


def _describe(proto: Any, metadata: Mapping[str, str]) -> None:
    """Write what the file is: the caller's own lines, and our version."""
    version = {"chipdeploy_version": _version()}
    for key, value in sorted({**metadata, **version}.items()):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, _without_folders(value)


def _check_shapes(proto: Any) -> None:
    """Inputs and outputs, all with a free batch size of the same name."""
    for what, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            dims = value.type.tensor_type.shape.dim
            if not dims or dims[0].dim_param != BATCH:
                which = what if len(values) == 1 else f"{what} {value.name}"
                raise ExportError(
                    f"the {which} has no free batch size; remove code that fixes the batch in the network"
                )


def _local_paths() -> re.Pattern[str]:
    """Matches a path below a folder of this machine that nobody else should read about, down to its last separator.

    These are the home, working, temporary and Python's own folders; the root of the file system is no name.
    """
    paths = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix), Path(sys.base_prefix)}
    paths |= {Path(folder) for folder in (*sysconfig.get_paths().values(), *site.getsitepackages(), *sys.path)}
    folders = {str(path) for path in paths if path.is_absolute() and len(path.parts) > 1}
    longest_first = sorted(folders, key=lambda folder: (-len(folder), folder))
    return re.compile(rf"(?:{'|'.join(map(re.escape, longest_first))})[/\\](?:[^\s'\":,;]*[/\\])?")


def _without_folders(text: str) -> str:
    """Cut local folders off the paths in a text: `~/nets/mine.py:small`, written out, becomes `mine.py:small`."""
    return _local_paths().sub("", text)


def _check_no_paths(proto: Any) -> None:
    """No string of the graph may hold a path of this machine. Raw weights are not strings and are not searched."""
    pattern = _local_paths()
    for text in _strings(proto):
        if found := pattern.search(text):
            raise ExportError(
                f"the graph holds the local path {found.group()!r}; rename what carries it and export again"
            )


def _strings(message: Any) -> Iterator[str]:
    """Every text in a protobuf message, byte strings but raw tensor data included."""
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_STRING:
            yield from [value] if isinstance(value, str) else value
        elif descriptor.type == descriptor.TYPE_BYTES and descriptor.name != "raw_data":
            for text in [value] if isinstance(value, bytes) else value:
                yield text.decode(errors="replace")
    for child in _children(message):
        yield from _strings(child)


def _version() -> str:
    try:
        return distributions.version("chipdeploy")
    except distributions.PackageNotFoundError:  # Run from a source tree.
        return "unknown"


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Turn whatever torch, onnx or the disk raises into one line that names the step and the cause."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"could not {what}: {_cause(error)}; change the network or report this") from error


def _cause(error: BaseException) -> str:
    """The innermost error in one line: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(list(filter(None, map(str.strip, str(error).splitlines())))[:2])
    short = text if len(text) <= CAUSE_LENGTH else f"{text[:CAUSE_LENGTH]}..."
    return f"{type(error).__name__}: {short}" if text else type(error).__name__
