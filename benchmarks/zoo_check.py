"""One network of the zoo: what of it can be pruned, whether cuts equal its gated self, and what its files hold."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo_nets import GAINS, Net, build, build_on_meta, images, parameters

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.errors import ChipdeployError, ExportError, ModelError, VerificationError
from chipdeploy.export.onnx import OnnxFile, export_onnx
from chipdeploy.export.verify import verify_onnx
from chipdeploy.graph.channels import KEPT, ChannelGraph, Layer, Mask
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.loud import randomize
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.proof import random_mask
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace

Row = dict[str, Any]
Save = Callable[[Row], None]
EXACT, SINGLE = 1e-9, 1e-5  # largest difference over the largest output, in float64 and in float32
HEARD = 1e-6  # what the gates of every group must move the output by, over the largest output, or a test says nothing
EPSILON = 2.0**-53
FAULT = 1e-6  # no rounding excuses more
LOUD = 1e-4  # where no other weights are tried
COUNT = 3  # images of a comparison: another batch than the one that is traced, or code that takes it apart would pass
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def check(net: Net, row: Row, save: Save, *, files: bool = True) -> None:
    """Fill in `row`, and `save` it after every step: the process may be stopped at any moment."""
    try:
        _check(net, row, save, files)
    except ModelError as refusal:
        row |= {"status": "refused", "reason": str(refusal)}
    except Exception as error:  # whatever a network makes of its cut is a finding
        row |= {"status": "crash", "reason": f"{row['step']}: {one_line(error)}"}
    row.pop("step", None)
    save(row)


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _check(net: Net, row: Row, save: Save, files: bool) -> None:
    def step(name: str) -> None:
        row["step"] = name
        save(row)

    row["images"] = COUNT
    if net.replica:
        step("shapes of the whole network")
        whole = build_on_meta(net)
        graph = _traced(whole, images(net.image).to("meta"), row)
        _shapes_only(whole, graph, images(net.image, COUNT).to("meta"))
        row["replica"] = net.replica
    step("trace")
    model = build(net, replica=bool(net.replica))
    size = net.replica.get("image", net.image)
    graph = _traced(model, images(size), {} if net.replica else row)
    inputs = images(size, COUNT, torch.float64)
    step("weights")
    model.double()
    _settle_weights(model, graph, inputs, row)
    step("cuts in float64")
    _cuts(model, graph, inputs, row, step)
    if row["float64_error"] > max(EXACT, 10 * row["rounding"]):
        row |= {"status": "wrong", "reason": f"{row['float64_error']:.1e} off: {row['worst_plan']}"}
        return
    if row["quietest"] < HEARD or row["input_effect"] < HEARD:
        row |= {"status": "insensitive", "reason": "the output does not hear every group of channels"}
        return
    row["status"] = "pass"
    step("cut in float32")
    model.float()
    row["float32_error"] = _error(model, graph, random_mask(graph, 7, 0.3), inputs.float())[0]
    if files:
        _files(model, graph, inputs.float(), row, step)


def _traced(model: nn.Module, example: Tensor, row: Row) -> ChannelGraph:
    """The graph, with what it says of the network in `row`. Seconds are of one thread's own time."""
    row["params"] = parameters(model)
    started = time.process_time()
    graph = trace(model, example)
    row["trace_s"] = round(time.process_time() - started, 2)
    macs, params = CostModel.of(graph, "macs"), CostModel.of(graph, "params")
    least = group_widths(graph, smallest(graph))
    row |= {
        "macs": int(macs.dense),
        "groups": len(graph.groups),
        "channels": graph.channels,
        "branches": len(graph.branches),
        "prunable_macs": round(1 - macs.count(least) / macs.dense, 4),
        "prunable_params": round(1 - params.count(least) / params.dense, 4),
        "free_macs": round(_free_macs(graph), 4),
        "pins": _pins(graph),
    }
    return graph


def _free_macs(graph: ChannelGraph) -> float:
    """Share of the MACs in layers of which a dimension can be cut, or that go with a branch."""
    costs = [_layer_macs(layer) for layer in graph.layers]
    free = [
        layer.branch is not None or (layer.out_index != KEPT).any() or (layer.in_index != KEPT).any()
        for layer in graph.layers
    ]
    return float(np.dot(costs, free) / max(sum(costs), 1))


def _layer_macs(layer: Layer) -> float:
    return float(layer.positions * layer.kernel * len(layer.out_index) * max(len(layer.in_index), 1))


def _pins(graph: ChannelGraph) -> list[list[Any]]:
    """The three reasons that hold most channels, module numbers left out: [reason, channels]."""
    held: Counter[str] = Counter()
    for group in graph.pinned:
        held[re.sub(r"\.\d+\b", ".*", group.reason)] += group.size
    return [[reason, channels] for reason, channels in held.most_common(3)]


def smallest(graph: ChannelGraph) -> Mask:
    """The smallest legal cut: width 0 wherever it is allowed, else one channel."""
    mask = np.zeros(graph.channels, dtype=np.bool_)
    for number, group in enumerate(graph.groups):
        mask[graph.span(number).start] = not group.may_vanish
    return mask


def _single(graph: ChannelGraph) -> Mask:
    """One channel, the last, of every group."""
    mask = np.zeros(graph.channels, dtype=np.bool_)
    mask[graph.offsets[1:] - 1] = True
    return mask


def _half(graph: ChannelGraph) -> Mask:
    """Half of every group; every second branch goes."""
    mask = np.ones(graph.channels, dtype=np.bool_)
    for number, group in enumerate(graph.groups):
        span = graph.span(number)
        mask[span.start : span.start + group.size // 2] = False
        if group.branch is not None and group.branch % 2:
            mask[span] = False
    return mask


def _without_branches(graph: ChannelGraph) -> Mask:
    """All of every group outside branches, nothing inside."""
    inside = np.array([group.branch is not None for group in graph.groups], dtype=np.bool_)
    return np.asarray(~inside[graph.group_of], dtype=np.bool_)


def _plans(graph: ChannelGraph) -> Iterator[tuple[str, Mask]]:
    yield "all channels", np.ones(graph.channels, dtype=np.bool_)
    yield "random widths", random_mask(graph, 1, 0.0)
    if graph.branches:
        yield "random widths, a third of the branches gone", random_mask(graph, 2, 0.3)
        yield "random widths, all branches gone", random_mask(graph, 3, 1.0)
    yield "one channel a group", _single(graph)
    yield "the smallest legal cut", smallest(graph)


def _shapes_only(model: nn.Module, graph: ChannelGraph, example: Tensor) -> None:
    """Cut and run without data: only that the shapes fit."""
    for _, mask in _plans(graph):
        started = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
        with torch.no_grad():
            if started(example).shape != model(example).shape:
                raise ModelError("the cut network's output has another shape")


def _settle_weights(model: nn.Module, graph: ChannelGraph, inputs: Tensor, row: Row) -> None:
    """The gain of the weights at which the output hears most of its quietest group of channels."""
    found: list[tuple[float, float, float]] = []
    for gain in GAINS:
        randomize(model, gain)
        with torch.no_grad():
            output = model(inputs)
        if not output.isfinite().all():
            continue
        effect = float((output[0] - output[1]).abs().max() / output.abs().max())
        found.append((min(_quietest(model, graph, inputs), effect), effect, gain))
        if found[-1][0] >= LOUD:
            break
    if not found:
        raise ArithmeticError("the dense network's output is not finite with any weights that were tried")
    quietest, effect, gain = max(found)
    randomize(model, gain)
    row |= {"quietest": quietest, "input_effect": effect, "gain": gain}


def _quietest(model: nn.Module, graph: ChannelGraph, inputs: Tensor) -> float:
    """The least that any group's loudest gate moves the output by, over the largest output."""
    gates = torch.ones(graph.channels, dtype=inputs.dtype, requires_grad=True)
    with torch.enable_grad():
        output = gated_call(model, Gating(graph), gates, inputs)
        mix = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
        (slopes,) = torch.autograd.grad((output * mix).sum(), gates)
    loudest = np.maximum.reduceat(slopes.abs().numpy(), graph.offsets[:-1])
    return float(loudest.min() / output.detach().abs().max())


def _cuts(model: nn.Module, graph: ChannelGraph, inputs: Tensor, row: Row, step: Callable[[str], None]) -> None:
    """The largest error of all plans, and the seconds of the slowest cut."""
    params = CostModel.of(graph, "params")
    row |= {"float64_error": 0.0, "worst_plan": "", "rounding": 0.0, "prune_s": 0.0, "params_off": 0}
    for name, mask in _plans(graph):
        step(f"cut to {name}")
        error, seconds, small = _error(model, graph, mask, inputs)
        if name == "all channels":
            with torch.no_grad():
                dense = model(inputs)
                opened = gated_call(model, Gating(graph), torch.ones(graph.channels, dtype=inputs.dtype), inputs)
            error = max(error, _difference(dense, opened))
        off = abs(parameters(small) - int(params.count(group_widths(graph, mask))))
        row["params_off"] = max(row["params_off"], off)
        row["prune_s"] = max(row["prune_s"], round(seconds, 2))
        if not error <= row["float64_error"]:
            row |= {"float64_error": error, "worst_plan": name}
            if error > EXACT:
                row["rounding"] = _rounding(small, inputs)


def _error(model: nn.Module, graph: ChannelGraph, mask: Mask, inputs: Tensor) -> tuple[float, float, nn.Module]:
    """Of one cut: its error, seconds of one thread, and the network."""
    started = time.process_time()
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
    seconds = time.process_time() - started
    with torch.no_grad():
        gated = gated_call(model, Gating(graph), torch.from_numpy(mask).to(inputs), inputs)
        return _difference(gated, small(inputs)), seconds, small


def _rounding(model: nn.Module, inputs: Tensor) -> float:
    """How far the output moves when every layer's output is off by the rounding of a float64, at random.

    Norms over one channel or over equal values divide rounding by rounding: there two equal networks differ by more.
    """
    draw = torch.Generator().manual_seed(3)

    def noise(_: nn.Module, __: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        return output * (1 + EPSILON * torch.randn(output.shape, dtype=output.dtype, generator=draw))

    with torch.no_grad():
        clean = model(inputs)
        hooks = [layer.register_forward_hook(noise) for layer in model.modules() if not list(layer.children())]
        noisy = model(inputs)
        for hook in hooks:
            hook.remove()
    found = _difference(clean, noisy)
    return found if found < FAULT else 0.0


def _difference(expected: Tensor, got: Tensor) -> float:
    """max |a - b| / max |a|; infinite where a shape differs or a value is not finite."""
    if expected.shape != got.shape or not (expected.isfinite().all() and got.isfinite().all()):
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-300))


def _files(model: nn.Module, graph: ChannelGraph, inputs: Tensor, row: Row, step: Callable[[str], None]) -> None:
    """ONNX files: one of a cut, run in ONNX Runtime; one without branches, its ops counted against the dense one's."""
    step("ONNX")
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        try:
            small = hard_prune(model, graph, PrunePlan.from_mask(graph, _half(graph))).eval()
            export_onnx(small, inputs, path)
            found = verify_onnx(small, path, inputs, batches=(1, 2), tolerance=float("inf"))
            row["onnx_error"] = found.max_relative_error
            if "dense_ops" not in row:
                row["dense_ops"] = _ops(export_onnx(model, inputs, path))
            if graph.branches:
                step("ONNX without branches")
                bare = hard_prune(model, graph, PrunePlan.from_mask(graph, _without_branches(graph))).eval()
                row["bare_ops"] = _ops(export_onnx(bare, inputs, path))
        except (ExportError, VerificationError) as refusal:
            row["onnx_refused"] = str(refusal)
        except ChipdeployError as refusal:
            row |= {"status": "crash", "reason": f"{row['step']}: {refusal}"}
    row["onnx_s"] = round(time.process_time() - started, 1)


def _ops(file: OnnxFile) -> list[int]:
    """[all ops, convolutions and matrix products]."""
    return [file.ops, sum(file.op_types.get(kind, 0) for kind in PRODUCTS)]
