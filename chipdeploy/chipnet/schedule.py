"""Schedules as values: every constant of the soft phase is a function of progress, 0 at its start and 1 at its end."""

from __future__ import annotations

from dataclasses import dataclass

from chipdeploy.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """The soft phase's constants. A run of 3 epochs and one of 60 go through the same curves.

    Ranges are (start, end). `projected`: the gates' centres follow the best plan under the gradually falling budget, so
    that the network that trains is the one that will be cut; otherwise ψ0 = 0 as published and the budget loss alone
    closes gates.
    """

    beta: tuple[float, float] = (3.0, 12.0)
    gamma: tuple[float, float] = (2.0, 32.0)
    kappa: tuple[float, float] = (10.0, 60.0)
    crispness_weight: float = 0.1
    budget_weight: float = 30.0
    logit_travel: float = 1.0  # how far Adam may move ψ in the whole phase, whatever the number of steps
    logit_decay: float = 0.0
    projected: bool = True
    listen: float = 0.1  # share of the phase in which all gates stay open and their importance is measured
    arrive: float = 0.7  # progress at which the falling budget reaches its end
    settle: float = 0.85  # progress from which the plan stays as it is, and the gates only become crisp
    renew: int = 20  # steps between two projections
    value_power: float = 0.5  # of the law by which a group's value falls with its width; see `value_of_widths`

    def __post_init__(self) -> None:
        # The last projection, at `settle`, must see the whole budget; after it the plan is final.
        if not 0.0 <= self.listen < self.arrive <= self.settle <= 1.0:
            raise UsageError(
                f"a schedule needs 0 <= listen < arrive <= settle <= 1, got {self.listen}, {self.arrive}, {self.settle}"
            )
        if not self.value_power > 0.0:
            raise UsageError(f"a schedule needs a value_power above 0, got {self.value_power}; 1 gives the plain sum")

    def beta_at(self, progress: float) -> float:
        """Steepness of the logistic curve."""
        return _linear(self.beta, progress)

    def gamma_at(self, progress: float) -> float:
        """Steepness of the Heaviside, growing by equal factors."""
        start, end = self.gamma
        return float(start * (end / start) ** progress)

    def kappa_at(self, progress: float) -> float:
        """Steepness of the logistic rounding."""
        return _linear(self.kappa, progress)

    def keep_at(self, progress: float, keep: float) -> float:
        """The budget on its way from 1 to `keep`: cubic, steep at first, while there is much to spare."""
        if not self.projected:
            return keep
        way = min(1.0, max(0.0, (progress - self.listen) / (self.arrive - self.listen)))
        return float(keep + (1.0 - keep) * (1.0 - way) ** 3)


def _linear(span: tuple[float, float], progress: float) -> float:
    return span[0] + (span[1] - span[0]) * progress


# The published settings over 20 epochs: β 1 + 0.02 an epoch, γ 2·√2^epoch up to 256, κ 10 + 5 an epoch up to 60.
PAPER = Schedule(
    beta=(1.0, 1.4),
    gamma=(2.0, 256.0),
    kappa=(10.0, 60.0),
    crispness_weight=10.0,
    budget_weight=30.0,
    value_power=1.0,
    logit_travel=28.0,  # learning rate 1e-3 over 20 epochs of 1,406 steps
    projected=False,
    listen=0.0,
    arrive=1.0,
    settle=1.0,
)
