"""int8 by QuantizeLinear and DequantizeLinear nodes, in the form that TensorRT's parsers take.

Inputs and weights of weighted layers are quantised, their outputs are not: what follows them (a sum, an activation) is
fused into the layer and keeps its resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chipdeploy.errors import ExportError
from chipdeploy.export.onnx import step
from chipdeploy.quiet import quiet

WEIGHTED = ("Conv", "Gemm", "MatMul")
SETTINGS: dict[str, Any] = {
    # TensorRT knows zero points of 0 only, no int32 bias, and wants a pair of nodes for every edge.
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "QuantizeBias": False,
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
}


def quantisable(proto: Any) -> list[str]:
    """Names of the layers that int8 takes, in the order of the graph: those of WEIGHTED with constant weights."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    return [node.name for node in proto.graph.node if node.op_type in WEIGHTED and node.input[1] in weights]


def quantize(proto: Any, ranges: Any, layers: Sequence[str]) -> Any:
    """The network with `layers` in int8, everything else in fp32, as a new `onnx.ModelProto`.

    Args:
        proto: an `onnx.ModelProto` in fp32; it stays as it is.
        ranges: of its tensors, an onnxruntime `TensorsData`.
        layers: names of `quantisable` layers.

    Raises:
        ExportError: no layer, or the network cannot be quantised.
    """
    if not layers:
        raise ExportError("no layer is left to quantise; keep fewer layers in float, or use fp16")
    with step("quantise the network"), quiet():
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        inferred = onnx.shape_inference.infer_shapes(proto)
        onnx.helper.set_model_props(inferred, {"onnx.infer": "onnxruntime.quant"})  # or it would do it again, on disk
        quantizer = QDQQuantizer(
            inferred,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=list(layers),
            nodes_to_exclude=[],
            op_types_to_quantize=list(WEIGHTED),
            extra_options=SETTINGS,
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model


def store_int8(proto: Any) -> None:
    """Store quantised weights as int8, without the QuantizeLinear that makes them: a quarter of the file. In place."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in tensors]:
        weight, scale = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input[:2])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [-1 if position == axis % weight.ndim else 1 for position in range(weight.ndim)] if scale.ndim else []
        values = np.rint(weight / scale.reshape(shape)).clip(-128, 127).astype(np.int8)
        proto.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        proto.graph.node.remove(node)
    used = {name for node in proto.graph.node for name in node.input}
    rest = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(rest)
