"""Convolutions and linear layers timed one by one, each alone in a file: what lookup tables of layers are made of."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_nets import Subject

from chipdeploy.engines.ort import open_session
from chipdeploy.export.onnx import export_onnx
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.shapes import LayerShapes

RUNS, WARM_UP = 30, 5


def isolated_times(one: Subject, plans: list[Ints]) -> dict[bytes, float]:
    """Time of every plan over the dense network's, as the sum over its layers; by the bytes of its widths."""
    import onnx
    import torch

    shapes = LayerShapes.of(one.graph)
    known: dict[tuple[int, int, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        size = one.setting.input_shape
        export_onnx(one.model, torch.randn(2, *size), path, max_batch=max(2, one.setting.batch))
        proto = onnx.shape_inference.infer_shapes(onnx.load(path))
        nodes = {node.input[1].removesuffix(".weight"): node for node in proto.graph.node if len(node.input) > 1}
        places = {info.name: info.type.tensor_type for info in (*proto.graph.value_info, *proto.graph.input)}

        def total(widths: Ints) -> float:
            into, out, alive = shapes.at(widths[None])
            seconds = 0.0
            for layer in np.flatnonzero(alive[0]).tolist():
                key = shapes.kinds[layer], int(into[0, layer]), int(out[0, layer])
                if key not in known:
                    node = nodes[shapes.names[layer]]
                    known[key] = _alone(node, places[node.input[0]], key[1:], one, Path(folder))
                seconds += known[key]
            return seconds

        dense = total(one.graph.sizes)
        return {plan.tobytes(): total(plan) / dense for plan in (*plans, one.graph.sizes)}


def _alone(node: Any, place: Any, channels: tuple[int, int], one: Subject, folder: Path) -> float:
    """Median seconds of one layer with these channels, in a session of its own."""
    from onnx import TensorProto, helper, save

    into, out = channels
    sides = [dim.dim_value for dim in place.shape.dim][2:]
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    deep = groups > 1
    shape = (one.setting.batch, out if deep else into, *sides)
    kernel = next(([*a.ints] for a in node.attribute if a.name == "kernel_shape"), [])
    weight = np.random.default_rng(0).standard_normal((out, 1 if deep else into, *kernel)).astype(np.float32)
    fields = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if deep:
        fields["group"] = out
    made = helper.make_node(node.op_type, ["x", "w"], ["y"], **fields)
    values = [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", shape), ("y", None))]
    graph = helper.make_graph([made], "layer", [ends[0]], [ends[1]], values)
    path = folder / "layer.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session = open_session(path, one.setting.threads, "CPUExecutionProvider")
    images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    times = []
    for _ in range(WARM_UP + RUNS):
        before = time.perf_counter()
        session.run(["y"], {"x": images})
        times.append(time.perf_counter() - before)
    return float(np.median(times[WARM_UP:]))
