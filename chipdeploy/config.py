"""Settings of the commands that train: checked, complete, and written into the run."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from chipdeploy.errors import UsageError

PREFIX = "CHIPDEPLOY_"
# Environment variables of this prefix that are no settings.
NOT_SETTINGS = frozenset({"DEBUG"})
DEFAULT_ALIGN = 16
LATENCY_GOALS = ("latency", "latency_ms", "fps")
BUDGET_FLAGS = ("flops", "params", "channels", "volume")  # two settings each: the kind, and what stays


class TrainConfig(BaseModel):
    """What a dense training depends on. None takes the recipe's value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "resnet20"
    data: str = "fashion-mini"
    data_root: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    recipe: str = "default"
    train_epochs: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: str = "auto"

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """`0.5,0.5,0.5`, as in the environment."""
        return value.split(",") if isinstance(value, str) else value


class PruneConfig(TrainConfig):
    """What a pruning run depends on."""

    kind: str = "flops"
    keep: float = 0.3
    latency: float | None = Field(default=None, gt=0, lt=1)
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    on: str = "ort-cpu"
    bench_batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    via: Literal["latency", "flops"] = "latency"
    profile: str | None = None
    minutes: float = Field(default=3.0, gt=0, lt=24 * 60)
    max_size_mb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    weights: str | None = None
    align: int | Literal["auto"] = DEFAULT_ALIGN
    min_width: int = Field(default=1, ge=1)
    blocks: bool = False
    exclude: tuple[str, ...] = ()
    soft_epochs: int | None = Field(default=None, ge=1)
    finetune_epochs: int | None = Field(default=None, ge=0)
    distill: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _goal(cls, values: Any) -> Any:
        """A latency goal is a kind of budget, and goes by the device's own stairs if nobody says otherwise."""
        if isinstance(values, dict) and any(values.get(name) is not None for name in LATENCY_GOALS):
            return {"kind": "latency", "align": "auto"} | values
        return values

    @field_validator("align", mode="before")
    @classmethod
    def _channels(cls, value: Any) -> Any:
        whole = str(value).strip()
        if whole != "auto" and not (whole.isdigit() and int(whole) > 0):
            raise ValueError("input should be 1 or more, or auto")
        return value

    @field_validator("exclude", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """`stem,layer4.*`, as in the environment."""
        return value.split(",") if isinstance(value, str) else value

    @field_validator("keep", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """`30%`, as on the command line."""
        return float(value.removesuffix("%")) / 100 if isinstance(value, str) and value.endswith("%") else value


Config = TypeVar("Config", bound=TrainConfig)


def settings(
    schema: type[TrainConfig], flags: Mapping[str, Any], file: Path | None, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Flags over CHIPDEPLOY_* over a TOML file over defaults; flags that are None were not given.

    File and environment are shared by all commands: what only another command takes is left out.

    Raises:
        UsageError: an unknown key or a value out of range, naming the key.
    """
    known = list(PruneConfig.model_fields)
    merged: dict[str, Any] = {}
    for source, values in (("file", _from_file(file)), ("environment", _from_environment(environment))):
        for key, value in values.items():
            if key not in known:
                raise UsageError(f"unknown setting {key!r} in the {source}{_guess(key, known)}")
            if key in schema.model_fields:
                merged[key] = value
    merged |= {key: value for key, value in flags.items() if value is not None}
    return merged


def build(schema: type[Config], values: Mapping[str, Any]) -> Config:
    """A checked configuration. Raises UsageError for the first value out of range."""
    try:
        return schema(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = "--" + str(first["loc"][0]).replace("_", "-")
        words = first["msg"].removeprefix("Value error, ").lower()
        raise UsageError(f"{key}: {words}, got {first['input']!r}") from error


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError as error:
        raise UsageError(f"no settings file {file}; give an existing TOML file with --config") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} is no TOML file: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    names = [name for name in environment if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in NOT_SETTINGS]
    return {name.removeprefix(PREFIX).lower(): environment[name] for name in sorted(names)}


def _guess(key: str, known: list[str]) -> str:
    if key in BUDGET_FLAGS:
        return f"; write kind = {key!r} and keep = 0.3"
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
