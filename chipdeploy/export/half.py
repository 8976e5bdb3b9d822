"""A float network in fp16, but for what fp16 cannot hold.

The converter is onnxconverter_common's. Around it: what overflows on real images stays in fp32, weights that both sides
share are copied, and casts to fp16 and back are taken out, since a value that needs fp32 would not survive them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chipdeploy.engines.base import Images
from chipdeploy.errors import MissingError
from chipdeploy.export.onnx import INPUT, OUTPUT, step
from chipdeploy.export.probe import tensor_ranges
from chipdeploy.quiet import quiet

LARGEST = 65504.0  # of fp16
HEADROOM = 2.0  # Images that were not seen reach higher than those that were.
SMALLEST_SCALE = 2.0**-20  # fp16 below it is too coarse for a scale, and zero below 2**-25: TensorRT refuses that
QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Half:
    """A converted network.

    Args:
        proto: the `onnx.ModelProto`.
        kept_float: names of the nodes that stay in fp32, in the order of the graph.
        notes: why, a line a tensor.
    """

    proto: Any
    kept_float: tuple[str, ...]
    notes: tuple[str, ...]


def to_half(proto: Any, images: Images, *, keep_io: bool = True, keep_float: Sequence[str] = ()) -> Half:
    """The network in fp16, quantised nodes and their scales included.

    Args:
        proto: an `onnx.ModelProto` in fp32; it stays as it is.
        images: [N, C, H, W] float32, to see which tensors overflow.
        keep_io: images and logits stay float32.
        keep_float: names of nodes that stay in fp32 in any case.

    Raises:
        MissingError: onnxconverter-common or ONNX Runtime is not installed.
        ExportError: the network cannot be converted.
    """
    float16 = _converter()
    unfit = {**_overflowing(proto, images), **_unfit_weights(proto)}
    kept = _kept(proto, unfit, set(keep_float), set(float16.DEFAULT_OP_BLOCK_LIST))
    with step("convert the network to fp16"), quiet():
        proto = copy.deepcopy(proto)
        _split_weights(proto.graph, kept)
        _raise_scales(proto.graph, kept)
        half = float16.convert_float_to_float16(
            proto,
            # Its defaults move weights: below 1e-7 up, above 1e4 down. Plain rounding is closer.
            min_positive_val=0.0,
            max_finite_val=LARGEST,
            # Where the last node stays in fp32, its own casts would leave the output in fp16.
            keep_io_types=False,
            op_block_list=[],
            node_block_list=kept,
        )
        if keep_io:
            _float_io(half.graph)
        _join_casts(half.graph)
        del half.graph.value_info[:]  # of types and names that are gone
    shown = {node.name for node in proto.graph.node if node.op_type not in (*QDQ, "Cast")}
    return Half(half, tuple(name for name in kept if name in shown), tuple(f"{k}: {v}" for k, v in unfit.items()))


def _converter() -> Any:
    try:
        from onnxconverter_common import float16
    except ImportError as error:
        raise MissingError("onnxconverter-common is not installed; run: pip install onnxconverter-common") from error
    return float16


def _overflowing(proto: Any, images: Images) -> dict[str, str]:
    """Tensors that come too near to the end of fp16 on the images, and what to say about them."""
    ranges = tensor_ranges(proto, images)
    found = {}
    for name in _tensors(proto.graph):
        if name in ranges:
            peak = max(float(np.abs(bound).max()) for bound in ranges[name].range_value)
            if not peak * HEADROOM <= LARGEST:
                found[name] = f"reaches {peak:.3g}, too near to fp16's {LARGEST:.0f}; kept in fp32"
    return found


def _unfit_weights(proto: Any) -> dict[str, str]:
    """Initializers that fp16 cannot hold, and what to say about them."""
    found = {}
    scales = _scales(proto.graph.node)
    for tensor, values in _floats(proto.graph):
        peak = float(np.abs(values).max(initial=0))
        if tensor.name in scales:
            if peak < SMALLEST_SCALE:  # A single channel below it is as good as dead; here all are.
                found[tensor.name] = f"has steps of at most {peak:.3g}, too fine for fp16; kept in fp32"
        elif not peak <= LARGEST:
            found[tensor.name] = f"holds {peak:.3g}, beyond fp16's {LARGEST:.0f}; kept in fp32"
        elif peak > 0 and not values.astype(np.float16).any():
            found[tensor.name] = f"holds nothing above {peak:.3g}, all zero in fp16; kept in fp32"
    return found


def _tensors(graph: Any) -> list[str]:
    """Names of the input and of what the nodes give, in the order of the graph."""
    return [value.name for value in graph.input] + [name for node in graph.node for name in node.output]


def _floats(graph: Any) -> Iterator[tuple[Any, Any]]:
    """The fp32 initializers, each with its values."""
    from onnx import TensorProto, numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            yield tensor, numpy_helper.to_array(tensor)


def _scales(nodes: Iterable[Any]) -> set[str]:
    """Names of the scales of nodes that quantise."""
    return {node.input[1] for node in nodes if node.op_type in QDQ}


def _kept(proto: Any, unfit: dict[str, str], names: set[str], op_types: set[str]) -> list[str]:
    """Nodes that stay in fp32: asked for, beside an unfit tensor, or not to be converted at all."""
    nodes = list(proto.graph.node)
    kept = names | {node.name for node in nodes if any(name in unfit for name in (*node.input, *node.output))}
    # The converter leaves the type that a Cast casts to as it is.
    kept |= {node.name for node in nodes if node.op_type in op_types or node.op_type == "Cast"}
    _add_quantised(nodes, kept)
    return [node.name for node in nodes if node.name in kept]


def _add_quantised(nodes: list[Any], kept: set[str]) -> None:
    """Quantised inputs go with the node that takes them: between a DequantizeLinear and its node, no cast may stand."""
    makers = {name: node for node in nodes for name in node.output}
    pairs = [
        (makers[name].name, node.name)
        for node in nodes
        for name in node.input
        if name in makers
        and (makers[name].op_type == "DequantizeLinear" or (node.op_type, makers[name].op_type) == QDQ[::-1])
    ]
    grown = -1
    while grown != len(kept):
        grown = len(kept)
        for pair in pairs:
            if not kept.isdisjoint(pair):
                kept.update(pair)


def _raise_scales(graph: Any, kept: Sequence[str]) -> None:
    """Scales that fp16 holds: rounded up, so that nothing is clipped; not zero, as those of dead channels become."""
    from onnx import TensorProto, numpy_helper

    names = _scales(node for node in graph.node if node.name not in kept)
    for tensor in graph.initializer:
        if tensor.name in names and tensor.data_type == TensorProto.FLOAT:
            scale = np.clip(numpy_helper.to_array(tensor), SMALLEST_SCALE, LARGEST)
            half = scale.astype(np.float16)
            half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(half, dtype=np.float32), tensor.name))


def _split_weights(graph: Any, kept: Sequence[str]) -> None:
    """A copy of its own for every fp32 node of what it shares with others: the converter gives a tensor one type."""
    from onnx import TensorProto

    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    copies: dict[str, Any] = {}
    for node in graph.node:
        if node.name in kept:
            for position, name in enumerate(node.input):
                if name in weights:
                    node.input[position] = f"{name}_fp32"
                    copies[name] = copy.deepcopy(weights[name])
                    copies[name].name = f"{name}_fp32"
    used = {name for node in graph.node for name in node.input}
    rest = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*rest, *copies.values()])


def _float_io(graph: Any) -> None:
    """Images and logits in float32 again."""
    from onnx import TensorProto, helper

    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    _rename(graph, INPUT, f"{INPUT}_fp16")
    graph.node.insert(
        0, helper.make_node("Cast", [INPUT], [f"{INPUT}_fp16"], name=f"{INPUT}_cast", to=TensorProto.FLOAT16)
    )
    last = next(node for node in graph.node if OUTPUT in node.output)
    if _casts_to(last, TensorProto.FLOAT16):  # What it casts is fp32 already.
        graph.node.remove(last)
        _rename(graph, last.input[0], OUTPUT)
    else:
        _rename(graph, OUTPUT, f"{OUTPUT}_fp16")
        graph.node.append(
            helper.make_node("Cast", [f"{OUTPUT}_fp16"], [OUTPUT], name=f"{OUTPUT}_cast", to=TensorProto.FLOAT)
        )


def _join_casts(graph: Any) -> None:
    """Take out casts to fp16 and back, and casts that nobody reads."""
    from onnx import TensorProto

    sources = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)}
    for node in [node for node in graph.node if _casts_to(node, TensorProto.FLOAT) and node.input[0] in sources]:
        if node.output[0] != OUTPUT:
            graph.node.remove(node)
            _rename(graph, node.output[0], sources[node.input[0]])
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in used]:
        graph.node.remove(node)


def _casts_to(node: Any, data_type: int) -> bool:
    return bool(node.op_type == "Cast" and node.attribute[0].i == data_type)


def _rename(graph: Any, old: str, new: str) -> None:
    """Another name for a tensor, wherever a node takes or gives it."""
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
