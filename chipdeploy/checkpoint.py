"""Checkpoints between epochs: one safetensors file with tensors and, in its header, the rest as JSON. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from chipdeploy.errors import RunError
from chipdeploy.files import atomic

NAME = "checkpoint.safetensors"
# What a damaged file raises; the last of them where it cannot be mapped into memory.
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError)


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write atomically: a crash leaves the checkpoint before it.

    Raises:
        RunError: the folder is read-only or full.
    """
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with atomic(path) as temporary:
            save_file(whole, temporary, metadata={"facts": json.dumps(dict(facts))})
    except SafetensorError as error:
        raise RunError(f"cannot write {path}: {error}; free the folder or choose another with --run") from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises RunError where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except UNREADABLE as error:
        raise RunError(f"{path} is damaged: {error}; delete it to start the run over") from error


def pack(prefix: str, source: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a module or optimizer, under `prefix`."""
    if isinstance(source, nn.Module):
        return {f"{prefix}.{name}": tensor for name, tensor in source.state_dict().items()}
    state = source.state_dict()["state"]
    return {
        f"{prefix}.{index}.{key}": value
        for index, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def unpack(prefix: str, tensors: Mapping[str, Tensor], target: nn.Module | torch.optim.Optimizer) -> None:
    """Put back what `pack` took. Raises RunError where the state is another optimizer's."""
    mine = {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
    if isinstance(target, nn.Module):
        target.load_state_dict(mine)
        return
    whole = target.state_dict()
    parameters = [parameter for group in target.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in mine.items():
        index, _, key = name.partition(".")
        # Of a version that trained otherwise; counters have no dimension.
        if tensor.ndim and tensor.shape != parameters[int(index)].shape:
            raise RunError("the checkpoint is of another optimizer, by another version; start over in another --run")
        state.setdefault(int(index), {})[key] = tensor
    whole["state"] = state
    target.load_state_dict(whole)
