"""A latency profile: cut networks of one model, measured on one target, with all raw times and the machine's record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.engines.target import Target
from chipdeploy.errors import ChipdeployError, RunError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.blocks import Times
from chipdeploy.latency.measure import Comparison
from chipdeploy.latency.predict import LatencyCost, Sample, fit
from chipdeploy.latency.rig import Setting
from chipdeploy.latency.variants import probes
from chipdeploy.run import write_text

SCHEMA = 1
WORTH_A_STEP = 0.5  # share of the saved MACs that must be saved in time where a step is one of the device's stairs

# Whose versions a time depends on, by runtime.
PACKAGES = {
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "trt": ("tensorrt",),
    "rtx": ("tensorrt-rtx-cu13",),
    "torch": ("torch",),
}


@dataclass(frozen=True)
class Variant:
    """One cut network: widths of the groups, seconds of every timed inference by block, seconds of its layers."""

    widths: tuple[int, ...]
    times_s: Times
    layers_s: Mapping[str, float]


@dataclass(frozen=True)
class Round:
    """Variants that were timed in the same blocks as the dense network and its control.

    Args:
        dense_layers_s: seconds of the dense network's layers, taken at about the same time as the variants'.
    """

    dense_s: Times
    control_s: Times
    variants: tuple[Variant, ...]
    dense_layers_s: Mapping[str, float] = field(default_factory=dict)
    noise: str = ""  # why these times are doubtful; empty where they are not

    def comparison(self, variant: Variant) -> Comparison:
        """A variant against the dense network."""
        return Comparison(1, self.dense_s, variant.times_s, self.control_s, {})

    def ratio(self, variant: Variant) -> float:
        """Its time over the dense one's: the median over blocks, against both copies of the dense network."""
        blocks = zip(variant.times_s, self.dense_s, self.control_s, strict=True)
        return float(np.median([2 * np.mean(a) / (np.mean(b) + np.mean(c)) for a, b, c in blocks]))

    @property
    def dense_ms(self) -> float:
        """Median milliseconds of the dense network."""
        return self.comparison(self.variants[0]).dense_ms


@dataclass(frozen=True)
class LatencyProfile:
    """See the module.

    Args:
        model: as it was named, e.g. `resnet56`.
        graph: digest of the channel graph; widths mean nothing for another.
        setting: target, batch, input shape and threads.
        environment: the machine, as `environment` and the engine say.
        spent_s: seconds that measuring took, export and building included.
        steps: channels that the first variants lack, see `probes`.
        finished: all the time that was asked for was spent; an interrupted measuring goes on.
        ops: what the network calls, and how often; empty in profiles of older versions.
    """

    model: str
    graph: str
    setting: Setting
    environment: Mapping[str, Any]
    seed: int = 0
    spent_s: float = 0.0
    steps: tuple[int, ...] = ()
    rounds: tuple[Round, ...] = ()
    finished: bool = True
    ops: Mapping[str, int] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """What it was measured on, e.g. `AMD EPYC, AVX2, 1 core, no GPU`."""
        return str(self.environment.get("machine", "unknown"))

    @property
    def dense_ms(self) -> float:
        """Median milliseconds of an inference of the dense network, of the whole batch."""
        return float(np.median([one.dense_ms for one in self.rounds]))

    @property
    def control_spread(self) -> float:
        """Median over rounds of how far apart two equal blocks are, as a share."""
        return float(np.median([one.comparison(one.variants[0]).control_spread for one in self.rounds]))

    @property
    def variants(self) -> list[tuple[Variant, float]]:
        """Every variant and its time over the dense one's."""
        return [(variant, one.ratio(variant)) for one in self.rounds for variant in one.variants]

    @property
    def noisy_rounds(self) -> int:
        return sum(bool(one.noise) for one in self.rounds)

    def samples(self, graph: ChannelGraph) -> list[Sample]:
        """What a predictor learns from; the dense network is among them.

        Raises:
            RunError: the profile was measured for another network, or holds widths that the network cannot have.
        """
        self.check_graph(graph)
        for variant in (variant for one in self.rounds for variant in one.variants):
            if len(variant.widths) != len(graph.sizes) or not np.all(
                (widths_of(variant) >= 0) & (widths_of(variant) <= graph.sizes)
            ):
                raise RunError(
                    f"the profile of {self.model} has widths that the network cannot have; delete it and measure again"
                )
        dense = Sample(graph.sizes, 1.0, _shares(self.rounds[0].dense_layers_s, self.rounds[0]))
        return [dense, *(sample for one in self.rounds for sample in _samples(one))]

    def align(self, graph: ChannelGraph) -> int:
        """Channels from stair to stair, from the probes: the finest step whose taking away saves time.

        A step counts as a stair where the network without it saves at least half the share of the MACs that it lacks.
        """
        cost = CostModel.of(graph, "macs")
        ratios = {step: ratio for step, (_, ratio) in zip(self.steps, self.variants, strict=False)}
        for step, widths in probes(graph).items():
            saved = 1 - cost.count(widths) / cost.dense
            if step in ratios and 1 - ratios[step] >= WORTH_A_STEP * saved:
                return step
        return max(ratios, default=1)

    def cost(self, graph: ChannelGraph) -> LatencyCost:
        """The predictor that this profile gives.

        Raises:
            RunError: another network, or too few variants.
        """
        return fit(graph, self.samples(graph), self.align(graph))

    def check_graph(self, graph: ChannelGraph) -> None:
        """Raises RunError where the profile was measured for another network."""
        if self.graph != graph_digest(graph):
            raise RunError(
                f"the profile was measured for another network, called {self.model}; its widths mean nothing here: "
                "measure one with 'chipdeploy profile'"
            )

    def other_ops(self, graph: ChannelGraph) -> str:
        """Why the profile is of a network that calls something else, such as another activation; empty where not.

        Widths mean the same there, times do not.
        """
        now = dict(graph.ops)
        changed = [name for name in sorted({*self.ops, *now}) if self.ops.get(name, 0) != now.get(name, 0)]
        if not changed or not self.ops or not now:
            return ""
        name = changed[0]
        return (
            f"measured for a network that calls {name} {self.ops.get(name, 0)} times; this one {now.get(name, 0)} times"
        )

    def check_setting(self, setting: Setting) -> None:
        """Raises RunError where the profile was measured in another setting."""
        for what, got, wanted in (
            ("target", self.setting.target.name, setting.target.name),
            ("batch", self.setting.batch, setting.batch),
            ("input", self.setting.input_shape, setting.input_shape),
            ("number of threads", self.setting.threads, setting.threads),
        ):
            if got != wanted and not (what.startswith("number") and setting.target.on_gpu):
                raise RunError(
                    f"the profile was measured with the {what} {got}, wanted {wanted}; "
                    "measure one with 'chipdeploy profile'"
                )

    def foreign(self, here: Mapping[str, Any]) -> str:
        """Why the profile is of another machine or other software than `here`; empty where it is of this one."""
        if self.machine != here["machine"]:
            return f"measured on {self.machine}; this is {here['machine']}"
        before, now = (facts.get("versions", {}) for facts in (self.environment, here))
        for name in PACKAGES[self.setting.target.runtime]:
            if name in before and before[name] != now.get(name):
                return f"measured with {name} {before[name]}; here is {now.get(name, 'none')}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with a digest over all the others."""
        setting = asdict(self.setting) | {
            "target": self.setting.target.name,
            "input_shape": list(self.setting.input_shape),
        }
        raw: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "graph": self.graph,
            "setting": setting,
            "environment": dict(self.environment),
            "seed": self.seed,
            "spent_s": round(self.spent_s, 1),
            "finished": self.finished,
            "ops": dict(self.ops),
            "steps": list(self.steps),
            "rounds": [
                {
                    "noise": one.noise,
                    "dense_layers_s": _rounded(one.dense_layers_s),
                    "dense_s": [list(times) for times in one.dense_s],
                    "control_s": [list(times) for times in one.control_s],
                    "variants": [
                        {
                            "widths": list(variant.widths),
                            "times_s": [list(times) for times in variant.times_s],
                            "layers_s": _rounded(variant.layers_s),
                        }
                        for variant in one.variants
                    ],
                }
                for one in self.rounds
            ],
        }
        return raw | {"digest": _digest(raw)}

    @classmethod
    def from_dict(cls, raw: Any, what: str = "this") -> LatencyProfile:
        """Read what `to_dict` gave.

        Raises:
            RunError: no profile, another schema, an edited one, or times that are none.
        """
        if not isinstance(raw, dict) or "schema" not in raw:
            raise RunError(f"{what} is no latency profile; make one with 'chipdeploy profile'")
        if raw["schema"] != SCHEMA:
            raise RunError(
                f"{what} has schema {raw['schema']}; this version reads schema {SCHEMA}: delete it and measure again"
            )
        if raw.get("digest") != _digest({key: value for key, value in raw.items() if key != "digest"}):
            raise RunError(f"{what} was edited after it was measured (digest differs); delete it and measure again")
        try:
            setting = raw["setting"]
            found = cls(
                str(raw["model"]),
                str(raw["graph"]),
                Setting(
                    Target.parse(setting["target"]),
                    int(setting["batch"]),
                    tuple(map(int, setting["input_shape"])),
                    int(setting["threads"]),
                ),
                dict(raw["environment"]),
                int(raw["seed"]),
                float(raw["spent_s"]),
                tuple(map(int, raw["steps"])),
                tuple(_round(one) for one in raw["rounds"]),
                bool(raw.get("finished", True)),
                {str(name): int(count) for name, count in raw.get("ops", {}).items()},
            )
            if not found.rounds:
                raise ValueError("no rounds")
            for one in found.rounds:
                for variant in one.variants:
                    one.comparison(variant)  # refuses times that are none
        except (KeyError, TypeError, ValueError, AttributeError, ChipdeployError) as error:
            raise RunError(
                f"{what} is damaged ({type(error).__name__}: {error}); delete it and measure again"
            ) from error
        return found

    def save(self, path: Path) -> None:
        """Write it whole or not at all. Raises RunError where the folder cannot be written."""
        # Without line breaks: a hundred thousand times are not read by people.
        write_text(path, json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> LatencyProfile:
        """Raises RunError for a file that is missing, truncated, edited or no profile."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"there is no profile {path}; see 'chipdeploy profile --list', or measure one") from error
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{path} is no latency profile or was cut short ({error}); delete it and measure again"
            ) from error
        return cls.from_dict(raw, str(path))

    def grown(
        self, one: Round, steps: tuple[int, ...], environment: Mapping[str, Any], spent_s: float
    ) -> LatencyProfile:
        """One round more."""
        return replace(
            self, rounds=(*self.rounds, one), steps=steps, environment=environment, spent_s=self.spent_s + spent_s
        )


def short_name(model: str) -> str:
    """`my_net.py:build` of `/home/me/nets/my_net.py:build`: profiles are sent to others. Other names stay."""
    return Path(model).name if ".py:" in model else model


def graph_digest(graph: ChannelGraph) -> str:
    """sha256 of what widths mean and what layers they make: groups, layers, branches, the size of an image."""
    facts = [
        list(graph.input_shape[1:]),
        [[group.name, group.size, group.unit, group.branch] for group in graph.groups],
        [
            [layer.name, layer.positions, float(layer.kernel), len(layer.out_index), len(layer.in_index)]
            for layer in graph.layers
        ],
        [list(branch.groups) for branch in graph.branches],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def widths_of(variant: Variant) -> Ints:
    """Widths as the cost models take them, int64 [G]."""
    return np.array(variant.widths, dtype=np.int64)


def _samples(one: Round) -> list[Sample]:
    return [Sample(widths_of(variant), one.ratio(variant), _shares(variant.layers_s, one)) for variant in one.variants]


def _shares(layers_s: Mapping[str, float], one: Round) -> dict[str, float]:
    """Times over what the dense network's layers took in the same round: clocks and neighbours fall out."""
    whole = sum(one.dense_layers_s.values())
    return {name: seconds / whole for name, seconds in layers_s.items()} if whole else {}


def _digest(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 9) for name, value in seconds.items()}


def _round(raw: Mapping[str, Any]) -> Round:
    variants = tuple(
        Variant(tuple(map(int, one["widths"])), _times(one["times_s"]), _layers(one["layers_s"]))
        for one in raw["variants"]
    )
    if not variants:
        raise ValueError("a round without variants")
    layers = _layers(raw["dense_layers_s"])
    return Round(_times(raw["dense_s"]), _times(raw["control_s"]), variants, layers, str(raw["noise"]))


def _layers(raw: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _positive(value) for name, value in raw.items()}


def _times(raw: Any) -> Times:
    return tuple(tuple(float(value) for value in block) for block in raw)


def _positive(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"a time of {value}")
    return number
