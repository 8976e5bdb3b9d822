"""Memory that an ONNX file needs to run: its weights, and the most that is alive between its operators at one time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from chipdeploy.errors import ExportError

# Their output is their input under another shape.
VIEWS = {"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
# Their output may be written over an input of its size that nobody reads any more; runtimes do.
IN_PLACE = {
    "Add",
    "BatchNormalization",
    "Clip",
    "Div",
    "Elu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mul",
    "Relu",
    "Sigmoid",
    "Softmax",
    "Sub",
    "Tanh",
}


SHAPE_TYPES = {"int64", "int32", "bool"}
FROM_VALUES = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}  # what they give is as large as the data say
SMALL = (2, 3)  # batches whose values all fit into the memory

# Of a value, in the precisions of the targets. int8 and fp8 files hold what layers give, and sums, in fp32: where a
# runtime keeps less of it, the network is smaller than was promised, not larger.
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
ACTIVATION_BYTES = WEIGHT_BYTES | {"int8": 4, "fp8": 4}


@dataclass(frozen=True)
class Footprint:
    """Bytes that an engine holds while it runs.

    Args:
        activations: at their peak.
    """

    weights: int
    activations: int

    @property
    def mb(self) -> float:
        """Both, in 10^6 bytes."""
        return (self.weights + self.activations) / 1e6

    def at(self, precision: str) -> Footprint:
        """Of the same network in another precision than fp32."""
        weights, activations = (table[precision] / table["fp32"] for table in (WEIGHT_BYTES, ACTIVATION_BYTES))
        return Footprint(round(self.weights * weights), round(self.activations * activations))


def footprint(path: Path, batch: int) -> Footprint:
    """What the network of an ONNX file holds, in the order of its nodes.

    An activation is alive from the node that makes it to the last that reads it; views share their input's memory, and
    an element-wise operator writes over an input that is not read again. What kernels take for themselves is not in it.

    Args:
        batch: images at a time; it replaces every free dimension.

    Raises:
        ExportError: the file cannot be read, or a size in it cannot be told.
    """
    import onnx
    from onnx import numpy_helper

    try:
        proto = onnx.load(path)
        if open_ops := FROM_VALUES & {node.op_type for node in proto.graph.node}:
            raise ValueError(f"what {min(open_ops)} gives is as large as the images say")
        known = onnx.shape_inference.infer_shapes(_with_batch(proto, batch), data_prop=True).graph
        sizes = {value.name: _bytes(value) for value in (*known.input, *known.value_info, *known.output)}
        if any(sizes.get(name) is None for node in proto.graph.node for name in node.output if name):
            sizes |= _measured_sizes(proto, batch)
    except Exception as error:  # protobuf, onnx and ONNX Runtime raise what they like
        raise ExportError(
            f"cannot tell the sizes in {path.name}: {_line(error)}; export it again, or drop the limit"
        ) from error
    constants = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    # Shapes and axes are no weights: what is left of them depends on how the network was exported.
    weights = sum(int(values.nbytes) for values in constants.values() if values.dtype.name not in SHAPE_TYPES)
    return Footprint(weights, _peak(proto.graph, sizes, set(constants), path))


def _with_batch(proto: Any, batch: int) -> Any:
    """A copy of the network for one batch size; shapes that were written for others go."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    del copied.graph.value_info[:]
    for value in (*copied.graph.input, *copied.graph.output):
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and place == 0:
                dim.dim_value = batch
    return copied


def _measured_sizes(proto: Any, batch: int) -> dict[str, int | None]:
    """Sizes of all values, by running the network on two small batches: they are linear in the batch."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    told = onnx.ModelProto()
    told.CopyFrom(proto)
    del told.graph.output[:]
    names = [name for node in told.graph.node for name in node.output if name]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    found = []
    for images in SMALL:
        ready = _with_batch(told, images)
        session = ort.InferenceSession(ready.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {
            one.name: np.zeros([dim if isinstance(dim, int) else images for dim in one.shape], _numpy_type(one.type))
            for one in session.get_inputs()
        }
        found.append([int(value.nbytes) for value in session.run(names, feeds)])
    few, more = SMALL
    return {
        name: one + (two - one) * (batch - few) // (more - few) for name, one, two in zip(names, *found, strict=True)
    }


def _numpy_type(text: str) -> str:
    """`tensor(float)` ▶ `float32`."""
    return {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}.get(text, "int64")


def _bytes(value: Any) -> int | None:
    """Of a tensor; None where a dimension is not known."""
    import onnx

    kind = value.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return int(prod(dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)


def _peak(graph: Any, sizes: dict[str, int | None], constants: set[str], path: Path) -> int:
    """The largest sum of buffers alive at one node."""
    owner: dict[str, str] = {}  # value ▶ the value in whose buffer it lies
    last: dict[str, int] = {}  # value ▶ number of the last node that reads it
    for number, node in enumerate(graph.node):
        last.update(dict.fromkeys(node.input, number))
    last.update({value.name: len(graph.node) for value in graph.output})
    for value in graph.input:
        owner[value.name] = value.name
    until = {value.name: last.get(value.name, -1) for value in graph.input}  # buffer ▶ last node that needs it
    buffers = {value.name: _known(sizes, value.name, path) for value in graph.input}
    peak = sum(buffers.values())
    for number, node in enumerate(graph.node):
        if all(name in constants for name in node.input if name):
            constants.update(node.output)  # a constant, or computed from constants alone: folded before it runs
            continue
        for name in filter(None, node.output):
            size = _known(sizes, name, path)
            held = _reused(node, owner, until, buffers, number, size, graph.output)
            if held is None:
                held = name
                buffers[held] = size
                until[held] = number
            owner[name] = held
            until[held] = max(until[held], last.get(name, number))
        peak = max(peak, sum(buffers.values()))
        for held in [held for held, end in until.items() if end <= number and held in buffers]:
            del buffers[held]
    return peak


def _reused(
    node: Any,
    owner: dict[str, str],
    until: dict[str, int],
    buffers: dict[str, int],
    number: int,
    size: int,
    outputs: Any,
) -> str | None:
    """The buffer of an input that a node's output takes over; None where it gets its own."""
    for name in node.input:
        held = owner.get(name)
        if held is None or held not in buffers:
            continue
        if node.op_type in VIEWS:
            return held
        if node.op_type in IN_PLACE and until[held] <= number and buffers[held] == size:
            return held
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _known(sizes: dict[str, int | None], name: str, path: Path) -> int:
    found = sizes.get(name)
    if found is None:
        raise ExportError(f"the size of {name!r} in {path.name} is not known before it runs, so its memory is not")
    return found
