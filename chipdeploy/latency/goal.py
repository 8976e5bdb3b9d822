"""What latency is asked for: a share of the dense time, milliseconds, or images a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chipdeploy.errors import UsageError

WORDS = {"ratio": "--latency", "ms": "--latency-ms", "fps": "--fps"}
EXAMPLES = {"ratio": "0.5 (of the dense time)", "ms": "1.8", "fps": "500"}


@dataclass(frozen=True)
class Goal:
    """Exactly one of three ways to say it.

    Args:
        kind: `ratio` (of the dense time, between 0 and 1), `ms` (of an inference of the whole batch) or `fps` (images a
            second).
        value: positive.

    Raises:
        UsageError: an unknown kind, or a value outside its range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in WORDS:
            raise UsageError(f"unknown goal {self.kind!r}; use one of {', '.join(WORDS)}")
        limit = 1.0 if self.kind == "ratio" else math.inf
        if not 0 < self.value < limit:
            raise UsageError(f"{WORDS[self.kind]} takes a number such as {EXAMPLES[self.kind]}, got {self.value:g}")

    @classmethod
    def of(cls, ratio: float | None, ms: float | None, fps: float | None) -> Goal | None:
        """The one that is given; None where none is. Raises UsageError for two."""
        given = {kind: value for kind, value in (("ratio", ratio), ("ms", ms), ("fps", fps)) if value is not None}
        if len(given) > 1:
            raise UsageError(f"one goal at a time, got {' and '.join(WORDS[kind] for kind in given)}; keep one of them")
        return cls(*next(iter(given.items()))) if given else None

    def ms(self, batch: int) -> float | None:
        """Milliseconds of an inference of `batch` images; None for a share of the dense time, which they depend on."""
        return {"ratio": None, "ms": self.value, "fps": batch * 1e3 / self.value}[self.kind]

    def share(self, dense_ms: float, batch: int) -> float:
        """The goal as a share of the dense time.

        Args:
            dense_ms: milliseconds of an inference of `batch` images.

        Raises:
            UsageError: the dense network is fast enough already.
        """
        ms = self.ms(batch) or self.value * dense_ms
        share = ms / dense_ms
        if share >= 1:
            raise UsageError(
                f"the dense network takes {dense_ms:.3g} ms already, {ms:.3g} ms are asked for; nothing is to be pruned"
            )
        return share

    def text(self, dense_ms: float, batch: int) -> str:
        """`1.80 ms, 0.42 of the dense 4.29 ms`."""
        share = self.share(dense_ms, batch)
        return f"{share * dense_ms:.3g} ms, {share:.3g} of the dense {dense_ms:.3g} ms"
