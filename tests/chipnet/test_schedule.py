"""The schedules, against the published values and the promises of the default."""

import pytest

from chipdeploy.chipnet.schedule import PAPER, Schedule
from chipdeploy.errors import UsageError


def test_paper_schedule_follows_the_published_code():
    # β grows by 0.02 an epoch from 1 over 20 epochs; γ starts at 2 and ends at 256; κ goes from 10 to 60.
    assert PAPER.beta_at(0.5) == pytest.approx(1 + 0.02 * 10)
    assert PAPER.gamma_at(0.0) == 2.0
    assert PAPER.gamma_at(1.0) == pytest.approx(256.0)
    # 7 doublings in all: after one seventh of the way γ has doubled once.
    assert PAPER.gamma_at(1 / 7) == pytest.approx(4.0)
    assert (PAPER.kappa_at(0.0), PAPER.kappa_at(1.0)) == (10.0, 60.0)
    assert (PAPER.crispness_weight, PAPER.budget_weight) == (10.0, 30.0)
    # Without projection the budget is the target from the first step on.
    assert PAPER.keep_at(0.0, 0.3) == 0.3


def test_default_budget_falls_from_one_and_arrives_before_the_plan_settles():
    schedule = Schedule()
    assert schedule.keep_at(0.0, 0.3) == 1.0
    assert schedule.keep_at(schedule.listen, 0.3) == 1.0
    assert schedule.keep_at(schedule.arrive, 0.3) == 0.3
    assert schedule.keep_at(1.0, 0.3) == 0.3
    halfway = (schedule.listen + schedule.arrive) / 2
    assert schedule.keep_at(halfway, 0.3) == pytest.approx(0.3 + 0.7 * 0.5**3)
    path = [schedule.keep_at(step / 100, 0.3) for step in range(101)]
    assert path == sorted(path, reverse=True)


@pytest.mark.parametrize("wrong", [{"arrive": 0.05}, {"arrive": 0.9, "settle": 0.8}, {"settle": 1.1}, {"listen": -0.1}])
def test_a_plan_cannot_settle_before_the_budget_arrives(wrong):
    with pytest.raises(UsageError, match="listen < arrive <= settle"):
        Schedule(**wrong)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_a_power_of_the_value_that_is_no_power_is_refused(power):
    with pytest.raises(UsageError, match="value_power above 0"):
        Schedule(value_power=power)
