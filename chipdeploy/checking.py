"""Whether a model can be trained and tested on images of a data set: said before any time is spent on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chipdeploy.copying import copied, in_mode
from chipdeploy.errors import ChipdeployError, ModelError


def check_model(model: nn.Module, example: Tensor, classes: int) -> None:
    """Run a copy in eval and in train mode.

    Args:
        example: two images [2, C, H, W].

    Raises:
        ModelError: a forward fails, or gives something else than logits [N, classes].
    """
    twin = copied(model)
    on_gpu = [example.device] if example.is_cuda else []
    for training in (False, True):
        mode = "in train mode " if training else ""
        try:
            with torch.no_grad(), torch.random.fork_rng(on_gpu):
                output = in_mode(twin, training=training)(example.clone())
        except ChipdeployError:
            raise
        except Exception as error:  # a forward of the user's may raise what it likes
            first = (str(error).strip() or "no reason given").splitlines()[0]
            if first.startswith("Expected more than 1"):  # two images are few: the batches of a training are larger
                continue
            raise ModelError(
                f"{mode}the model does not run on images {list(example.shape)[1:]}: {type(error).__name__}: {first}"
            ) from error
        _check_logits(output, len(example), classes, mode)


def _check_logits(output: object, count: int, classes: int, mode: str) -> None:
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ModelError(
            f"{mode}the model returns a {kind}; here one tensor [N, {classes}] is needed; see docs/own-model.md"
        )
    if tuple(output.shape) != (count, classes):
        raise ModelError(f"{mode}the model returns {list(output.shape)} for {count} images of {classes} classes")
