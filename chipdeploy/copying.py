"""Copies of the user's module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from chipdeploy.errors import ModelError


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; what a forward keeps on modules, for heat maps and the like, is copied without its history.

    Args:
        memo: of a `__deepcopy__` that this is a part of.

    Raises:
        ModelError: something in the model cannot be copied, with the first line of the cause.
    """
    memo = {} if memo is None else memo
    memo.update((id(tensor), tensor.detach()) for tensor in _activations(model))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # __deepcopy__ and __reduce__ of the user's classes raise what they like
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ModelError(
            f"the model cannot be copied: {first}; keep no activations, locks or files on modules, and no weights that "
            "old-style weight_norm or torch.nn.utils.prune computes: bake them in by remove_weight_norm or prune.remove"
        ) from error


def in_mode(model: nn.Module, *, training: bool = False) -> nn.Module:
    """The model itself, put into eval mode or train mode: a `train` or `eval` of its own may forget to return it."""
    model.train() if training else model.eval()
    return model


def _activations(model: nn.Module) -> Iterator[Tensor]:
    """Attributes that autograd made; not those of hooks, such as weights that old-style weight_norm computes."""
    for module in model.modules():
        if not module._forward_pre_hooks:
            own = [value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")]
            yield from (x for x in pytree.tree_leaves(own) if isinstance(x, Tensor) and x.grad_fn is not None)
