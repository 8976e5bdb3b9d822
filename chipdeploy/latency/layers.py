"""From the names in a runtime's profile back to the network's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from chipdeploy.engines.base import LayerTime

NCHWC = "_nchwc"  # ONNX Runtime calls a convolution in blocked layout by its output and this
FUSED = {"Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Tanh"}
REACH = 4  # operators that a runtime may put into one kernel with a layer
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def layer_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Names under which a runtime may show a layer ▶ the layers that may be meant, the likeliest first.

    A fused kernel bears the name of its layer, or of the last value that it makes, e.g. of the Relu after the layer.
    """
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        layer = node.input[1].removesuffix(".weight")
        for name in (node.name, *_made_by(node, readers)):
            found[name] = (*found.get(name, ()), layer)
    return found


def _made_by(node: object, readers: Mapping[str, Sequence[object]]) -> list[str]:
    """Names of the values that a kernel which begins with `node` may end with."""
    names: list[str] = []
    front = [node]
    for _ in range(REACH):
        made = [output for one in front for output in one.output]  # type: ignore[attr-defined]
        names += [name + suffix for name in made for suffix in ("", NCHWC)]
        front = [reader for name in made for reader in readers.get(name, ()) if reader.op_type in FUSED]  # type: ignore[attr-defined]
    return names


def layer_seconds(times: Sequence[LayerTime], names: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Seconds by layer; the time of everything else, and of what cannot be told, under ""."""
    seconds: dict[str, float] = {"": 0.0}
    doubtful = []
    for time in times:
        # TensorRT joins the names of what it fuses: "node_conv2d + node_relu".
        layers = tuple(layer for name in time.name.split(" + ") for layer in names.get(name, ()))
        if len(layers) == 1 and layers[0] not in seconds:
            seconds[layers[0]] = time.ms / 1e3
        elif layers:
            doubtful.append((time, layers))
        else:
            seconds[""] += time.ms / 1e3
    for time, layers in doubtful:
        left = [layer for layer in layers if layer not in seconds]
        seconds[left[0] if left else ""] = time.ms / 1e3 + (0.0 if left else seconds[""])
    return seconds
