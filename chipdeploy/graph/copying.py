"""Copies of the user's module."""

from __future__ import annotations

import copy

from torch import nn

from chipdeploy.errors import ModelError


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ModelError: something in the model cannot be copied, with the first line of the cause.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # __deepcopy__ and __reduce__ of the user's classes raise what they like
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ModelError(
            f"the model cannot be copied: {first}; keep no activations, locks or files on modules, and no weights that "
            "old-style weight_norm or torch.nn.utils.prune computes (remove them, or use parametrizations)"
        ) from error
