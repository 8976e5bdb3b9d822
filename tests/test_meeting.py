"""What is said of a latency: the device as it is now, and the budget as it was judged."""

import pytest

from chipdeploy.meeting import drift
from chipdeploy.report.page import budget_sentence
from chipdeploy.result import _latency_budget


@pytest.mark.parametrize("now", [1.63, 1.1])
def test_another_dense_time_is_said_in_one_line(now):
    said = drift({"profile_dense_ms": 1.34, "dense_ms": now, "foreign": ""})
    assert "took 1.34 ms" in said and f"takes {now:.3g} ms now" in said and "chipdeploy bench" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "facts",
    [
        {"profile_dense_ms": 1.34, "dense_ms": 1.4, "foreign": ""},
        {"profile_dense_ms": 1.34, "dense_ms": 9.0, "foreign": "measured on another machine"},
        {"dense_ms": 9.0, "foreign": ""},  # of a run by an older version
    ],
)
def test_nothing_is_said_of_a_quiet_machine_another_machine_or_an_old_run(facts):
    assert drift(facts) == ""


@pytest.mark.parametrize(("pruned_ms", "ratio", "over"), [(9.98, 0.505, False), (10.3, 0.495, True)])
def test_milliseconds_are_over_the_budget_where_they_are_missed(pruned_ms, ratio, over):
    """Between two medians and the median of ratios lie some per cent; the exit code goes by the first."""
    met = {"goal": 0.5, "goal_ms": 10.0, "dense_ms": 20.0, "pruned_ms": pruned_ms, "ratio": ratio}
    assert ("OVER" in budget_sentence(_latency_budget(met))) == over


def test_a_share_is_judged_by_the_ratio():
    met = {"goal": 0.5, "goal_ms": None, "dense_ms": 20.0, "pruned_ms": 9.98, "ratio": 0.505}
    assert "OVER" in budget_sentence(_latency_budget(met))
