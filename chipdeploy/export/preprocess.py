"""Pre- and post-processing inside the ONNX graph: bytes in, the best classes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chipdeploy.errors import ExportError, UsageError

RAW_INPUT = "images_uint8"
PROBABILITIES, CLASSES = "probabilities", "classes"
FLOATS = ("float32", "float16")
IMAGE_DIMS, LOGIT_DIMS = 4, 2


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Args:
        name: of the tensor.
        dtype: as numpy calls it.
        shape: a number is a fixed size, a string a free one.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def ports(proto: Any) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an `onnx.ModelProto`."""
    return [_port(value) for value in proto.graph.input], [_port(value) for value in proto.graph.output]


def network_ports(proto: Any) -> tuple[Port, Port]:
    """The images [batch, C, H, W] that a network takes, and the logits [batch, classes] that it gives.

    Raises:
        ExportError: more or other tensors than these, types other than float32 and float16, or no free batch size.
    """
    found = ports(proto)
    for what, values, dims in (("input", found[0], IMAGE_DIMS), ("output", found[1], LOGIT_DIMS)):
        fits = [len(v.shape) == dims and v.dtype in FLOATS and _only_batch_is_free(v) for v in values]
        if fits != [True]:
            got = ", ".join(f"{v.name} {v.dtype} [{', '.join(map(str, v.shape))}]" for v in values) or "none"
            raise ExportError(
                f"the network needs one {what} of floats with {dims} dimensions and a free batch, got {got}; "
                "give a file that 'chipdeploy export' wrote"
            )
    return found[0][0], found[1][0]


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(x / 255 - mean) / std as x * scale + shift: the numbers [C] that training uses, computed in float64."""
    deviation = np.asarray(std, dtype=np.float64)
    scale, shift = 1 / (255 * deviation), -np.asarray(mean, dtype=np.float64) / deviation
    return scale.astype(np.float32), shift.astype(np.float32)


def with_preprocessing(proto: Any, mean: Sequence[float], std: Sequence[float], *, top_k: int | None = None) -> Any:
    """A new `onnx.ModelProto` that takes `images_uint8` [batch, H, W, C] and normalises them itself.

    Args:
        proto: takes normalised images [batch, C, H, W], gives logits [batch, classes]; it stays as it is.
        mean: of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
        top_k: in place of logits, give `probabilities` float32 [batch, K] and `classes` int64 [batch, K], the best
            first.

    Raises:
        UsageError: `top_k` outside 1 to the number of classes.
        ExportError: a network of another form, mean and std of another length, or a graph that fails ONNX's checker.
    """
    import onnx

    images, logits = network_ports(proto)
    channels, classes = images.shape[1], logits.shape[1]
    if not len(mean) == len(std) == channels:
        raise ExportError(
            f"the network takes {channels} channels, got {len(mean)} means and {len(std)} standard deviations; "
            "give one of each a channel"
        )
    check_top_k(top_k, int(classes))
    front, back = _front(images, mean, std), ([], [], []) if top_k is None else _back(logits, top_k)
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.ClearField("node")
    model.graph.node.extend([*front[0], *proto.graph.node, *back[0]])
    model.graph.initializer.extend([*front[1], *back[1]])
    model.graph.ClearField("input")
    model.graph.input.append(front[2])
    if top_k is not None:
        model.graph.ClearField("output")
        model.graph.output.extend(back[2])
    model.metadata_props.add(key="chipdeploy.preprocessing", value="in the graph: uint8 [batch, H, W, C]")
    try:
        onnx.checker.check_model(model.SerializeToString(), full_check=True)
    except Exception as error:  # ONNX's own errors, and protobuf's for a graph above 2 GB
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"the network takes no preprocessing ({reason}); make the bundle without it") from error
    return model


def check_top_k(top_k: int | None, classes: int) -> None:
    """Raises UsageError where there are not that many classes."""
    if top_k is not None and not 1 <= top_k <= classes:
        raise UsageError(f"top-k must lie in 1 to {classes}, the number of classes, got {top_k}")


def _port(value: Any) -> Port:
    import onnx

    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "untyped"
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim]
    return Port(value.name, dtype, tuple(dims))


def _only_batch_is_free(port: Port) -> bool:
    return isinstance(port.shape[0], str) and all(isinstance(size, int) for size in port.shape[1:])


def _front(images: Port, mean: Sequence[float], std: Sequence[float]) -> tuple[list[Any], list[Any], Any]:
    """Nodes from the new input to the tensor `images`, their constants, and that input."""
    from onnx import TensorProto, helper, numpy_helper

    batch, channels, height, width = images.shape
    scale, shift = (values.reshape(1, -1, 1, 1) for values in affine(mean, std))
    half = images.dtype == "float16"
    normalised = "preprocess.normalised" if half else images.name
    nodes = [
        # The cast stands first: TensorRT takes bytes as an input and nowhere else.
        _node("Cast", [RAW_INPUT], ["preprocess.floats"], to=TensorProto.FLOAT),
        _node("Transpose", ["preprocess.floats"], ["preprocess.planes"], perm=[0, 3, 1, 2]),
        _node("Mul", ["preprocess.planes", "preprocess.scale"], ["preprocess.scaled"]),
        _node("Add", ["preprocess.scaled", "preprocess.shift"], [normalised]),
    ]
    if half:
        nodes.append(_node("Cast", [normalised], [images.name], to=TensorProto.FLOAT16))
    constants = [
        numpy_helper.from_array(scale, "preprocess.scale"),
        numpy_helper.from_array(shift, "preprocess.shift"),
    ]
    shape = [batch, height, width, channels]
    return nodes, constants, helper.make_tensor_value_info(RAW_INPUT, TensorProto.UINT8, shape)


def _back(logits: Port, top_k: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Nodes from the logits to the best classes, their constants, and the new outputs."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, floats = [], logits.name
    if logits.dtype == "float16":
        floats = "postprocess.floats"
        nodes.append(_node("Cast", [logits.name], [floats], to=TensorProto.FLOAT))
    nodes += [
        # Ranked by the logits: two that differ may have the same probability once rounded.
        _node("TopK", [floats, "postprocess.k"], ["postprocess.best", CLASSES], axis=1),
        _node("Softmax", [floats], ["postprocess.all"], axis=1),
        _node("GatherElements", ["postprocess.all", CLASSES], [PROBABILITIES], axis=1),
    ]
    shape = [logits.shape[0], top_k]
    outputs = [
        helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(CLASSES, TensorProto.INT64, shape),
    ]
    return nodes, [numpy_helper.from_array(np.array([top_k], dtype=np.int64), "postprocess.k")], outputs


def _node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    from onnx import helper

    # Named by the last output: it is the one that nothing else has.
    return helper.make_node(kind, inputs, outputs, name=f"{kind}.{outputs[-1]}", **attributes)
