"""The same networks under Torch-Pruning: does the pruned network run, and does it equal the masked one?

30 % of the channels go by weight magnitude, the classifier stays; heads of attentions are declared and their attributes
corrected as in Torch-Pruning's own examples. What it removed is read off its result: random weights differ from each
other, so each tensor tells which positions are left. The masked network is the dense one with those positions zero. A
second chance is given where norms and attention scales see the zeros: the masked network with norms over the living
channels and scales of the pruned width, which is how chipdeploy defines a masked network, too.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_check import EXACT, Row, Save, one_line
from zoo_nets import CLASSES, Net, build, images, parameters

from chipdeploy.graph.loud import randomize

RATIO = 0.3
Kept = dict[str, list[Tensor]]  # of every parameter, the positions that are left along each dimension


def check_peer(net: Net, row: Row, save: Save, *, gain: float) -> None:
    """Fill in `row`: status equal, equal-living, wrong, unpruned, untold or crash."""
    row["step"] = "build"
    save(row)
    try:
        _check(net, row, gain, save)
    except Exception as error:  # every kind of failure is counted alike
        row |= {"status": "crash", "reason": f"{row['step']}: {one_line(error)}"}
    row.pop("step", None)
    save(row)


def _check(net: Net, row: Row, gain: float, save: Save) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    # Heads that only training uses are left out, as in the examples: they are not in the graph that is traced.
    options = {"aux_logits": False} if net.name in ("googlenet", "inception_v3") else {}
    model = build(replace(net, options=net.options | options), replica=bool(net.replica)).double()
    randomize(model, gain)
    inputs = images(net.replica.get("image", net.image), dtype=torch.float64)
    pruned = copy.deepcopy(model)
    row["step"] = "prune"
    save(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _prune(pruned, inputs[:1])
    row["params_left"] = round(parameters(pruned) / parameters(model), 4)
    row["step"] = "run"
    save(row)
    dims: list[int] = []
    with torch.no_grad(), _recorded(dims):
        output = pruned.eval()(inputs)
    if output.shape != (len(inputs), CLASSES):
        raise ValueError(f"the output has the shape {list(output.shape)}")
    row["step"] = "compare"
    save(row)
    kept = _kept(model, pruned)
    if kept is None:
        row |= {"status": "untold", "reason": "its tensors are no parts of the dense ones"}
    elif parameters(pruned) == parameters(model):
        row["status"] = "unpruned"
    else:
        _mask(model, kept)
        _judge(model, inputs, output, row, living=_living(model, kept), dims=dims)


def _judge(
    model: nn.Module, inputs: Tensor, output: Tensor, row: Row, *, living: dict[int, Tensor], dims: list[int]
) -> None:
    with torch.no_grad():
        row["error"] = _difference(model(inputs), output)
        with _over_living(living, dims):
            row["error_living"] = _difference(model(inputs), output)
    equal, renewed = row["error"] <= EXACT, row["error_living"] <= EXACT
    row["status"] = "equal" if equal else "equal-living" if renewed else "wrong"


def _difference(expected: Tensor, got: Tensor) -> float:
    value = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-300))
    return value if math.isfinite(value) else 1e300  # JSON has no infinity


def _prune(model: nn.Module, example: Tensor) -> None:
    """As in Torch-Pruning's examples for torchvision and timm."""
    import torch_pruning as tp

    ignored = [layer for layer in model.modules() if _width(layer) == CLASSES]
    heads = {module.qkv: module.num_heads for module in model.modules() if _has_heads(module)}
    groups = {module: module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        num_heads=heads,
        out_channel_groups=groups,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in model.modules():
        if _has_heads(module):
            _correct(module, pruner.num_heads[module.qkv])
    projection = getattr(model, "conv_proj", None)
    if isinstance(projection, nn.Conv2d):  # torchvision's vision transformer
        model.hidden_dim = projection.out_channels  # type: ignore[assignment]


def _correct(attention: Any, heads: int) -> None:
    """The attributes of a pruned attention that its forward reads."""
    width = attention.qkv.out_features // 3
    attention.num_heads = heads
    if hasattr(attention, "head_dim"):
        attention.head_dim = width // heads
    for name in ("attn_dim", "dim", "all_head_dim"):
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, width)


def _width(layer: nn.Module) -> int | None:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


def _has_heads(module: nn.Module) -> Any:
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)


def _kept(model: nn.Module, pruned: nn.Module) -> Kept | None:
    """What is left of every parameter, or None where that cannot be told."""
    left: Kept = {}
    others = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        whole, part = parameter.detach(), others[name].detach() if name in others else None
        if part is None or part.dim() != whole.dim() or not part.numel():
            return None
        if part.shape == whole.shape:
            left[name] = [torch.arange(size) for size in whole.shape]
        else:
            left[name] = _lines(whole, part)
        cut = whole
        for dim, keep in enumerate(left[name]):
            cut = cut.index_select(dim, keep)
        if not torch.equal(cut, part):
            return None
    return left


def _lines(whole: Tensor, part: Tensor) -> list[Tensor]:
    """Along each dimension, the positions of `whole` that `part` has, from the lines through its first value."""
    corner = (whole == part.flatten()[0]).nonzero()[0].tolist()
    lines = []
    for dim in range(whole.dim()):
        through = whole[tuple(slice(None) if other == dim else place for other, place in enumerate(corner))]
        line = part[tuple(slice(None) if other == dim else 0 for other in range(part.dim()))]
        lines.append(torch.isin(through, line).nonzero().flatten())
    return lines


def _mask(model: nn.Module, kept: Kept) -> None:
    """Write zeros, in place, to all that was removed: rows of producers, norms, biases, columns of consumers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, keep in enumerate(kept[name]):
                mask = torch.zeros(parameter.shape[dim], dtype=parameter.dtype)
                mask[keep] = 1
                parameter.mul_(mask.view([-1 if other == dim else 1 for other in range(parameter.dim())]))


def _living(model: nn.Module, kept: Kept) -> dict[int, Tensor]:
    """By the identity of a norm's weight: the channels that live, where some do not."""
    parameters = {name: value for name, value in model.named_parameters() if value.dim() == 1}
    return {id(value): kept[name][0] for name, value in parameters.items() if len(kept[name][0]) < len(value)}


@contextmanager
def _recorded(dims: list[int]) -> Iterator[None]:
    """Write down the width of a head in every attention that takes its scale from it."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        dims.append(query.shape[-1])
        return original(query, *args, **options)

    with _replaced("scaled_dot_product_attention", attention):
        yield


@contextmanager
def _over_living(living: dict[int, Tensor], dims: list[int]) -> Iterator[None]:
    """Norms over living channels only, and attention scaled by the widths of heads in `dims`, in order of the calls."""
    norm, rms, attend, widths = F.layer_norm, F.rms_norm, F.scaled_dot_product_attention, iter(dims)

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        keep = living.get(id(weight))
        if keep is None:
            return norm(x, shape, weight, bias, eps)
        some = norm(x[..., keep], [len(keep)], weight[keep], None if bias is None else bias[keep], eps)
        return torch.zeros_like(x).index_copy(-1, keep, some)

    def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        keep = living.get(id(weight))
        if keep is None:
            return rms(x, shape, weight, eps)
        return torch.zeros_like(x).index_copy(-1, keep, rms(x[..., keep], [len(keep)], weight[keep], eps))

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        width = next(widths, query.shape[-1])
        if options.get("scale") is None:
            options["scale"] = width**-0.5
        return attend(query, *args, **options)

    with (
        _replaced("layer_norm", layer_norm),
        _replaced("rms_norm", rms_norm),
        _replaced("scaled_dot_product_attention", attention),
    ):
        yield


@contextmanager
def _replaced(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(F, name)
    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)
