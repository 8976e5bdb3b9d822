"""A pruning run whose engine must fit a memory: plans that stay under the budget and under the size."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
from torch import nn

from chipdeploy.chipnet.blend import Blend
from chipdeploy.chipnet.costs import Cost, CostModel, Floats
from chipdeploy.chipnet.project import Projector
from chipdeploy.config import PruneConfig
from chipdeploy.engines.target import Target
from chipdeploy.errors import BudgetError
from chipdeploy.export.memory import Footprint
from chipdeploy.graph.channels import Mask
from chipdeploy.graph.plan import group_widths
from chipdeploy.latency.rig import Rig, Setting

BISECTIONS = 7
TIGHTER = 0.93  # by which both limits are multiplied where no blend of them gives a plan that fits both


class Sizing:
    """Finds plans under a budget whose engines fit `--max-size-mb`. A context: its files vanish at the end.

    A plan that is too large is searched for again under a blend of the budget and of what the size is made of (weights
    and activation volume); the blend that leaves the most value while both limits hold is found by bisection. Every
    plan's size is that of its own ONNX file.

    Args:
        model: the dense network.
        projector: of the budget.
        limit_mb: in 10^6 bytes.
        precision: in which the engine holds its values.
    """

    def __init__(
        self, model: nn.Module, projector: Projector, limit_mb: float, *, batch: int = 1, precision: str = "fp32"
    ) -> None:
        self._projector, self._graph, self.limit_mb = projector, projector.graph, limit_mb
        self.batch, self.precision = batch, precision
        self._known: dict[bytes, Footprint] = {}
        # The file is planned, not run, so ONNX Runtime on the CPU stands in for every target.
        setting = Setting(Target.parse("ort-cpu"), batch, tuple(self._graph.input_shape[1:]))
        self._rig = Rig(model, self._graph, setting)
        self.dense = self.footprint(np.ones(self._graph.channels, dtype=np.bool_))
        parts: tuple[Cost, Cost] = (CostModel.of(self._graph, "params"), CostModel.of(self._graph, "volume"))
        whole = self.dense.weights + self.dense.activations
        self._bytes = Blend.of(self._graph, parts, (self.dense.weights / whole, self.dense.activations / whole))

    @classmethod
    def of(cls, config: PruneConfig, model: nn.Module, projector: Projector) -> Sizing | None:
        """For a configuration; None where it limits no size."""
        if config.max_size_mb is None:
            return None
        precision = Target.parse(config.on).precision
        return cls(model, projector, config.max_size_mb, batch=config.bench_batch, precision=precision)

    def __enter__(self) -> Sizing:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._rig.__exit__(*error)

    def check(self) -> None:
        """Raises BudgetError where even the smallest network is too large."""
        ones = np.ones(self._graph.channels)
        least = self.footprint(self._projector.top(ones, self._projector.smallest_widths))
        if least.mb > self.limit_mb:
            raise BudgetError(
                f"{self.limit_mb:g} MB is out of reach: even at the smallest widths weights and activations take "
                f"{least.mb:.3g} MB at batch {self.batch}; ask for {least.mb * 1.02:.3g} or more"
            )

    def footprint(self, mask: Mask) -> Footprint:
        """Of the network cut by a mask [channels], in the precision of the target."""
        key = mask.tobytes()
        if key not in self._known:
            self._known[key] = self._rig.footprint(mask).at(self.precision)
        return self._known[key]

    def fits(self, mask: Mask) -> bool:
        """Whether the network cut by a mask [channels] is within the limit."""
        return self.footprint(mask).mb <= self.limit_mb

    def text(self) -> str:
        """`1.5 MB of weights and activations (dense: 2.7), batch 1`."""
        return f"{self.limit_mb:g} MB of weights and activations (dense: {self.dense.mb:.3g}), batch {self.batch}"

    def facts(self, mask: Mask) -> dict[str, Any]:
        """What a result says of the memory, dense and pruned, in bytes."""
        sides = {"dense": self.dense, "pruned": self.footprint(mask)}
        return {"limit_mb": self.limit_mb, "batch": self.batch, "precision": self.precision} | {
            name: {"weights": one.weights, "activations": one.activations} for name, one in sides.items()
        }

    def project(self, scores: Floats, keep: float) -> Mask:
        """The plan of the highest value under keep · the dense cost that also fits the size.

        Raises:
            BudgetError: not even the smallest connected network is that cheap.
        """
        mask = self._projector.project(scores, keep)
        size = self.footprint(mask).mb
        if size <= self.limit_mb:
            return mask
        share = self._bytes.count(group_widths(self._graph, mask)) * self.limit_mb / size
        tightness = 1.0
        while tightness > 0.05:
            found = self._blended(scores, keep, share, tightness)
            if found is not None:
                return found
            tightness *= TIGHTER
        return self._projector.top(scores, self._projector.smallest_widths)

    def _blended(self, scores: Floats, keep: float, share: float, tightness: float) -> Mask | None:
        """The best plan that fits both limits, among those under blends of the two costs."""
        cost = self._projector.cost
        low, high = 0.0, 1.0
        best: tuple[float, Mask] | None = None
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            blend = Blend.of(self._graph, (cost, self._bytes), ((1 - weight) / keep, weight / share))
            projector = self._projector.under(blend)
            if projector.smallest > tightness:
                return None if best is None else best[1]
            mask = projector.project(scores, tightness)
            widths, fits = group_widths(self._graph, mask), self.fits(mask)
            cheap = cost.count(widths) <= keep * cost.dense
            value = self._projector.value(scores, widths)
            if cheap and fits and (best is None or value > best[0]):
                best = value, mask
            # Where both hold, less weight on the size leaves more of what the budget pays for.
            low, high = (low, weight) if fits else (weight, high)
        return None if best is None else best[1]
