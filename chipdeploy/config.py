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
# Environment variables of this prefix that are no settings: the program's own, and those that stand for an option.
NOT_SETTINGS = frozenset({"DEBUG", "RUNS", "CONFIG"})
DEFAULT_ALIGN = 16
LATENCY_GOALS = ("latency", "latency_ms", "fps")
BUDGET_FLAGS = ("flops", "params", "channels", "volume")  # two settings each: the kind, and what stays
# What a run may be asked for: one of these, whatever the settings are called.
GOALS = (("kind", "keep"), *((name,) for name in LATENCY_GOALS))


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
    latency: float | None = None
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

    @field_validator("kind")
    @classmethod
    def _budget(cls, value: str) -> str:
        if value not in (*BUDGET_FLAGS, "latency"):
            raise ValueError(f"input should be one of {', '.join(BUDGET_FLAGS)}")
        return value

    @field_validator("exclude", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """`stem, layer4.*`, as in the environment."""
        if not isinstance(value, str):
            return value
        return [pattern.strip() for pattern in value.split(",") if pattern.strip()]

    @field_validator("keep", "latency", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """`30%`, as on the command line."""
        return float(value.removesuffix("%")) / 100 if isinstance(value, str) and value.endswith("%") else value

    @field_validator("keep", "latency")
    @classmethod
    def _between(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("input should be a share between 0 and 1")
        return value


Config = TypeVar("Config", bound=TrainConfig)


def settings(
    schema: type[TrainConfig], flags: Mapping[str, Any], file: Path | None, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Flags over CHIPDEPLOY_* over a TOML file over defaults; flags that are None were not given.

    A goal takes the place of every other goal from below: a run has one.
    File and environment are shared by all commands: what only another command takes is left out.

    Raises:
        UsageError: an unknown key, two goals in one place, or a value of file or environment that is out of range.
    """
    below: dict[str, Any] = {}
    names: dict[str, str] = {}  # what errors call the settings below the flags
    for place, values in (("file", _from_file(file)), ("environment", _from_environment(environment))):
        taken = _taken(schema, values, place)
        below = _over(below, taken, place)
        names |= {key: f"{key} in {file}" if place == "file" else PREFIX + key.upper() for key in taken}
    given = {key: value for key, value in flags.items() if value is not None}
    merged = _over(below, given, "flags")
    for key in [key for key in merged if key not in given]:
        build(schema, {key: merged[key]}, names[key])
    return merged


def build(schema: type[Config], values: Mapping[str, Any], name: str = "") -> Config:
    """A checked configuration. Raises UsageError for the first value out of range, by the flag or by `name`."""
    try:
        return schema(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = name or "--" + str(first["loc"][0]).replace("_", "-")
        words = first["msg"].removeprefix("Value error, ").lower()
        raise UsageError(f"{key}: {words}, got {first['input']!r}") from error


def _taken(schema: type[TrainConfig], values: dict[str, Any], place: str) -> dict[str, Any]:
    """What a command takes of the settings in one place. Raises UsageError for one that no command takes."""
    known = list(PruneConfig.model_fields)
    for key in values:
        if key not in known:
            raise UsageError(f"unknown setting {key!r} in the {place}{_guess(key, known)}")
    return {key: value for key, value in values.items() if key in schema.model_fields}


def _over(below: dict[str, Any], values: dict[str, Any], place: str) -> dict[str, Any]:
    """Settings of one place over those below it; its goal, if it has one, replaces theirs."""
    goals = [keys for keys in GOALS if any(key in values for key in keys)]
    if len(goals) > 1:
        names = " and ".join(next(key for key in keys if key in values) for keys in goals)
        raise UsageError(f"one goal at a time, got {names} in the {place}; leave all but one out")
    if values.get("kind") == "latency":
        raise UsageError(f"kind = 'latency' in the {place} lacks a number; give latency, e.g. 0.5, without kind")
    replaced = [key for keys in GOALS if goals and keys not in goals for key in keys]
    return {key: value for key, value in below.items() if key not in replaced} | values


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
