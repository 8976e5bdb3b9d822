"""Models of a Triton Inference Server repository: config.pbtxt, and where the files belong.

Fields: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from chipdeploy.errors import UsageError
from chipdeploy.export.preprocess import Port

LABELS = "labels.txt"
CONFIG = "config.pbtxt"
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
FILES = {"onnxruntime": "1/model.onnx", "tensorrt": "1/model.plan"}
TYPES = {"uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
# A model's name is a folder of the repository and a part of the server's addresses.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
QUEUE_DELAY_US = 100  # how long a request may wait for others to join its batch


@dataclass(frozen=True)
class TritonModel:
    """One model of the repository.

    Args:
        name: of its folder.
        backend: `onnxruntime` or `tensorrt`.
        inputs, outputs: of the graph or engine, batch first.
        max_batch: the largest batch that the server may send.
        preferred: batches that are sent as soon as they are full.
        on_gpu: where its instance runs.
        labels_of: the output whose values are scores of the classes: the classification extension names them.
    """

    name: str
    backend: str
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    max_batch: int
    preferred: tuple[int, ...]
    on_gpu: bool
    labels_of: str | None = None

    @property
    def file(self) -> str:
        """Where the network belongs, relative to the model's folder."""
        return FILES[self.backend]

    def config(self) -> str:
        """The text of config.pbtxt."""
        lines = [
            f"name: {_quoted(self.name)}",
            f"platform: {_quoted(PLATFORMS[self.backend])}",
            f"backend: {_quoted(self.backend)}",
            f"max_batch_size: {self.max_batch}",
            *(_block("input", self._tensor(port)) for port in self.inputs),
            *(_block("output", self._tensor(port)) for port in self.outputs),
            _block("instance_group", ["count: 1", f"kind: {'KIND_GPU' if self.on_gpu else 'KIND_CPU'}"]),
        ]
        if self.max_batch > 1:
            preferred = f"preferred_batch_size: [ {', '.join(map(str, self.preferred))} ]"
            delay = f"max_queue_delay_microseconds: {QUEUE_DELAY_US}"
            lines.append(f"dynamic_batching {{\n  {preferred}\n  {delay}\n}}")
        return "\n".join(lines) + "\n"

    def _tensor(self, port: Port) -> list[str]:
        # The batch is not among the dims: Triton adds it.
        dims = ", ".join(str(size) for size in port.shape[1:])
        lines = [f"name: {_quoted(port.name)}", f"data_type: {TYPES[port.dtype]}", f"dims: [ {dims} ]"]
        if port.name == self.labels_of:
            lines.append(f"label_filename: {_quoted(LABELS)}")
        return lines


def check_name(name: str) -> None:
    """Raises UsageError where Triton could not serve a model of that name."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"a model's name is up to 100 letters, digits, '_', '-' and '.', a letter or digit first, got {name!r}"
        )


def preferred_batches(max_batch: int) -> tuple[int, ...]:
    """Half and all of the largest batch."""
    return tuple(sorted({max(1, max_batch // 2), max_batch}))


def _block(name: str, lines: list[str]) -> str:
    inside = "\n".join(f"    {line}" for line in lines)
    return f"{name} [\n  {{\n{inside}\n  }}\n]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
