"""Pooling, reductions and what else mixes within some dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Denied, Flow, Tracing, argument, numbers, rule, shape
from chipdeploy.graph.rules.elementwise import join

POOLS = tuple(
    f"{kind}{dims}d{places}"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for dims in (1, 2, 3)
    for places in ("", "_with_indices")
)
RESIZES = (
    *(
        f"upsample_{kind}{dims}d"
        for kind in ("nearest", "linear", "bilinear", "bicubic", "trilinear")
        for dims in (1, 2, 3)
    ),
    *(f"_upsample_nearest_exact{dims}d" for dims in (1, 2, 3)),
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
OVER_DIMS = ("mean", "sum", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any", "argmax", "argmin")


@rule(*POOLS, *RESIZES)
def pool(tracing: Tracing, node: Node) -> Flow:
    """Spatial windows only: labels pass, to the places of the largest values, too, where they are asked for."""
    source = node.args[0]
    assert isinstance(source, Node)
    spatial = range(2 if len(shape(source)) > 2 else 1, len(shape(source)))
    flow = tracing.mixed(source, spatial, "pools")
    results = node.meta["val"]
    return [flow] * len(results) if isinstance(results, tuple | list) else flow


@rule(*OVER_DIMS, "linalg_vector_norm", "norm")
def reduction(tracing: Tracing, node: Node) -> Ints | None:
    """Dimensions without channels go, or stay with size 1."""
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(shape(source))
    given = argument(node, 2 if "norm" in str(node.target) else 1, "dim")
    dims = [dim % rank for dim in numbers(given)] if given not in (None, []) else list(range(rank))
    try:
        flow = tracing.mixed(source, dims, "reduces")
    except Denied as refusal:
        raise Denied(f"{refusal}; a norm can be cut where it calls layer_norm or rms_norm") from refusal
    if flow is None:
        return None
    return flow if len(shape(node)) == rank else np.squeeze(flow, tuple(dims))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum")
def within(tracing: Tracing, node: Node) -> Ints | None:
    """Along one dimension, which must not be that of the channels."""
    source = node.args[0]
    assert isinstance(source, Node)
    dim = cast(int, argument(node, 1, "dim", -1)) % len(shape(source))
    return tracing.mixed(source, [dim], "mixes")


@rule(
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "linspace",
    "eye",
    "scalar_tensor",
    "tensor",
    "sym_size",
    "_assert_tensor_metadata",
)
def constant(tracing: Tracing, node: Node) -> Ints | None:
    """Made of sizes alone: nothing in it is ever cut, and nothing that it looks at is held."""
    return None


@rule("max", "min", "sort", "topk", "median")
def with_places(tracing: Tracing, node: Node) -> list[Ints | None] | Ints | None:
    """Values and places along one dimension, which must not be that of the channels; or the larger of two tensors."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):
        return join(tracing, node)
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(shape(source))
    several = not hasattr(node.meta["val"], "shape")
    if not several and len(node.args) == 1:
        flow = tracing.mixed(source, range(rank), "reduces")
        return None if flow is None else flow.reshape(())
    place = 2 if "topk" in str(node.target) else 1
    dim = cast(int, argument(node, place, "dim", -1)) % rank
    flow = tracing.mixed(source, [dim], "compares")
    if flow is None:
        return [None, None]
    keeps = len(cast("Sequence[object]", node.meta["val"][0].shape)) == rank
    result = flow if keeps else np.squeeze(flow, dim)
    return [result, result]
