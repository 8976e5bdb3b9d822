"""The invariant, checked on the user's own network before any time is spent on it: gated by 0/1 equals cut."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from chipdeploy.errors import ModelError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.gating import Gating, gated_call
from chipdeploy.graph.plan import PrunePlan
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import evaluating

TOLERANCE = 1e-3  # of the largest logit, in float32; a wrong cut is off by tens of percent


def prove(model: nn.Module, graph: ChannelGraph, example: Tensor) -> None:
    """Cut the model by two random plans and compare with the gated model on `example` [N, C, H, W], in eval mode.

    Rules decide what may be cut; this looks at what they cannot see, such as numbers written into the forward pass.

    Raises:
        ModelError: the two disagree, the cut network does not run, or the output is not one tensor.
    """
    gating = Gating(graph, example.device)
    for seed, dead_share in ((0, 0.0), (1, 0.5)):
        mask = random_mask(graph, seed, dead_share)
        gates = torch.from_numpy(mask).to(example)
        with torch.no_grad(), evaluating(model):
            expected: object = gated_call(model, gating, gates, example)
            if not isinstance(expected, Tensor):
                kind = type(expected).__name__
                raise ModelError(f"the model returns a {kind}; give one whose forward returns one tensor [N, classes]")
            error = _difference(expected, _cut_output(model, graph, mask, example))
        if not error <= TOLERANCE:
            raise ModelError(
                f"the cut network differs from the gated one by {error:.1e} of its largest output; the forward holds "
                "numbers of channels, or is random, and chipdeploy cannot follow: take numbers from the tensors' shapes"
            )


def random_mask(graph: ChannelGraph, seed: int, dead_share: float) -> Mask:
    """A legal cut: each branch is dead with probability `dead_share`, every other width is uniform from 1 on."""
    draw = np.random.default_rng(seed)
    dead = draw.random(len(graph.branches)) < dead_share
    mask = np.zeros(graph.channels, dtype=np.bool_)
    for number, group in enumerate(graph.groups):
        width = 0 if group.branch is not None and dead[group.branch] else int(draw.integers(1, group.size + 1))
        mask[graph.span(number).start + draw.permutation(group.size)[:width]] = True
    return mask


def _cut_output(model: nn.Module, graph: ChannelGraph, mask: Mask, example: Tensor) -> Tensor:
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask)).eval()
    try:
        output: Tensor = small(example)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the cut network does not run: {first}; the model's forward holds numbers of channels that chipdeploy "
            "cannot follow: take them from the tensors' shapes"
        ) from error
    return output


def _difference(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-12))
