"""Weights on disk: read strictly, all or nothing; written as safetensors, atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from chipdeploy.errors import WeightsError
from chipdeploy.files import atomic

# A BatchNorm's count of training steps changes no output, and many published files leave it out.
_OPTIONAL = "num_batches_tracked"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
_SUFFIXES = (".safetensors", ".pth", ".pt")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into `model`, in place; on any error the model is left as it was.

    Reads .safetensors, and .pth or .pt without running code from them. `{"state_dict": …}` and the like are unwrapped,
    and the prefixes `module.` of a DataParallel model and `_orig_mod.` of a compiled one are removed. Names and shapes
    must be the model's own; only `num_batches_tracked` may be absent.

    Raises:
        WeightsError: the file is missing, damaged, no state dict or of another model, or holds NaN or infinity.
    """
    path = Path(path)
    state = _unwrapped(_read(path), path)
    own = model.state_dict()
    for prefix in 2 * _PREFIXES:  # one may stand inside the other
        if not all(name.startswith(prefix) for name in own):
            state = _without_prefix(state, prefix)
    _check_names(state, own, path)
    _check_values(state, own, path)
    model.load_state_dict(state, strict=False)


def save_weights(model_or_state: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors; a file that is already there is replaced whole, or not at all.

    Tensors that share memory (tied weights, views) are written once a name, so that every name can be loaded.

    Raises:
        WeightsError: an entry is not a tensor, or the file cannot be written.
    """
    path = Path(path)
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"cannot save {path}: entry {name!r} is of type {type(value).__name__}; only tensors are saved"
            )
    content = safetensors.torch.save(_unshared(state), {"format": "pt"})
    with atomic(path, WeightsError) as temporary:
        temporary.write_bytes(content)


def _read(path: Path) -> object:
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist; check the path")
    if path.suffix not in _SUFFIXES:
        raise WeightsError(f"weights file {str(path)!r} ends in {path.suffix!r}; give one of {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # An untrusted file can fail anywhere in its reader; it means the same everywhere.
        fix = "get it again"
        if path.suffix != ".safetensors":
            fix += ", or save it with torch.save(model.state_dict(), FILE)"
        raise WeightsError(
            f"weights file {str(path)!r} is damaged or holds more than tensors ({type(error).__name__}); {fix}"
        ) from error


def _unwrapped(found: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a file holds."""
    while isinstance(found, dict):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    tensors = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    if not isinstance(found, dict) or not found or not tensors:
        raise WeightsError(
            f"weights file {str(path)!r} holds no state dict; save it with torch.save(model.state_dict(), FILE)"
        )
    return dict(found)


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _check_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    only_model = [name for name in own if name not in state and not name.endswith(_OPTIONAL)]
    only_file = [name for name in state if name not in own and not name.endswith(_OPTIONAL)]
    if not only_model and not only_file:
        return
    where = f"{only_model[0]!r} is missing from the file" if only_model else f"{only_file[0]!r} is not in the model"
    raise WeightsError(
        f"weights file {str(path)!r} is of another model: {_count(state)} tensors, the model has {_count(own)}; {where}"
    )


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(not name.endswith(_OPTIONAL) for name in state)


def _check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if name not in own:
            continue
        if value.shape != own[name].shape:
            raise WeightsError(
                f"weights file {str(path)!r} is of another model: {name!r} is {tuple(value.shape)} in the file and "
                f"{tuple(own[name].shape)} in the model; build it with the file's widths, classes and channels"
            )
        if not name.endswith(_OPTIONAL) and value.is_floating_point() != own[name].is_floating_point():
            raise WeightsError(
                f"weights file {str(path)!r} is of another model: {name!r} is {value.dtype} in the file and "
                f"{own[name].dtype} in the model"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"weights file {str(path)!r} has NaN or infinity in {name!r}; get it again")


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory (safetensors refuses those that do)."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result
