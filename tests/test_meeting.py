"""What is said of a device that is not as it was when it was profiled."""

import pytest

from chipdeploy.meeting import drift


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
