"""Names of models: built-in factories, and specs that reach torchvision, timm or the user's own file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from chipdeploy.errors import ChipdeployError, MissingError, ModelError


class Factory(Protocol):
    """Builds a freshly initialised classifier of images [B, in_channels, image_size, image_size]."""

    def __call__(self, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module: ...


_BUILT_IN: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a factory available as the built-in model `name`."""

    def add(factory: Factory) -> Factory:
        if name in _BUILT_IN:
            raise ValueError(f"model {name!r} is registered twice")
        _BUILT_IN[name] = factory
        return factory

    return add


def model_names() -> list[str]:
    """Names of the built-in models, sorted."""
    return sorted(_BUILT_IN)


def build_model(spec: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the model that `spec` names, freshly initialised (no pretrained weights).

    A spec is a built-in name (`resnet20`), `torchvision:NAME`, `timm:NAME` or `path/to/file.py:factory`. A factory in a
    file is called with those of `num_classes`, `in_channels` and `image_size` (pixels) that its signature accepts.

    Raises:
        ModelError: unknown name, a size below 1, or a file or factory that does not give an nn.Module.
        MissingError: timm is asked for and not installed.
    """
    for what, size in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if size < 1:
            raise ModelError(f"{what} of a model must be at least 1, got {size}")
    return _factory(spec)(num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def _factory(spec: str) -> Factory:
    """The factory behind a spec; a spec that names none is refused."""
    source, colon, name = spec.rpartition(":")
    if colon and source in _SOURCES:
        return _SOURCES[source](name)
    if source.endswith(".py"):
        return _from_file(Path(source), name)
    if spec.endswith(".py"):
        raise ModelError(f"model {spec!r} names a file without a function; write '{spec}:FUNCTION'")
    if spec not in _BUILT_IN:
        raise ModelError(
            f"unknown model {spec!r}{did_you_mean(spec, model_names())}; "
            "give a built-in name, torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
        )
    return _BUILT_IN[spec]


def _from_torchvision(name: str) -> Factory:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ModelError(f"torchvision has no model {name!r}{did_you_mean(name, names)}")

    def build(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        if in_channels != 3:
            raise ModelError(
                f"torchvision:{name} takes images of 3 channels, got {in_channels}; use timm:NAME or a built-in model"
            )
        # These two return their auxiliary heads beside the logits in training mode, unless told not to.
        extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        with _described(f"torchvision:{name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return _checked(
                torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra),
                f"torchvision:{name}",
            )

    return build


def _from_timm(name: str) -> Factory:
    try:
        import timm
    except ImportError as error:
        raise MissingError(f"timm:{name} needs timm; run: pip install 'chipdeploy[zoo]'") from error
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")

    def build(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        with _described(f"timm:{name}"):
            model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
            return _checked(model, f"timm:{name}")

    return build


_SOURCES: dict[str, Callable[[str], Factory]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _from_file(path: Path, name: str) -> Factory:
    if not path.is_file():
        raise ModelError(f"model file {str(path)!r} does not exist; give FILE.py:FUNCTION")
    spec = f"{path}:{name}"

    def build(**sizes: int) -> nn.Module:
        with _described(spec), _importable(path.resolve().parent):
            factory = getattr(_load(path.resolve()), name, None)
            if not callable(factory):
                raise ModelError(f"{path} has no function {name!r}; give FILE.py:FUNCTION")
            return _checked(factory(**_accepted(factory, sizes)), spec)

    return build


def _load(path: Path) -> ModuleType:
    """Run a Python file as a module of its own name, so that classes in it can be found again."""
    name = f"chipdeploy_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a model file import its neighbours, as it could when run from its own folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # The file may have changed the path itself.
            sys.path.remove(str(folder))


def _accepted(factory: Callable[..., object], sizes: dict[str, int]) -> dict[str, int]:
    """Those of `sizes` that the factory's signature takes as keyword arguments."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return sizes
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: size for name, size in sizes.items() if name in named}


@contextlib.contextmanager
def _described(spec: str) -> Iterator[None]:
    """Turn whatever a foreign factory raises into one line that names the spec."""
    try:
        yield
    except ChipdeployError:
        raise
    except (Exception, SystemExit) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(f"model {spec!r} could not be built: {type(error).__name__}: {reason}") from error


def _checked(model: object, spec: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r} gave a {type(model).__name__}; its function must return a torch.nn.Module")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(f"model {spec!r} has lazy layers, whose shapes nobody knows yet; run it on an example first")
    return model


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name that is closest to an unknown one; empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
