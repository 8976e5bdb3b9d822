"""What latency is asked for, as a share of the dense time."""

import pytest

from chipdeploy.errors import UsageError
from chipdeploy.latency.goal import Goal


@pytest.mark.parametrize(
    ("kind", "value", "share"),
    [("ratio", 0.5, 0.5), ("ms", 1.0, 0.25), ("fps", 4000.0, 0.5)],  # 8 images in 2 ms of 4
)
def test_every_goal_is_a_share(kind, value, share):
    assert Goal(kind, value).share(dense_ms=4.0, batch=8) == pytest.approx(share)


def test_in_words():
    assert Goal("ms", 1.8).text(4.29, 1) == "1.8 ms, 0.42 of the dense 4.29 ms"


@pytest.mark.parametrize(
    ("kind", "value"),
    [("ratio", 0), ("ratio", 1), ("ratio", 1.5), ("ms", -1), ("ms", float("nan")), ("ms", float("inf")), ("fps", 0)],
)
def test_values_out_of_range_are_refused(kind, value):
    with pytest.raises(UsageError, match=r"takes a number such as") as caught:
        Goal(kind, value)
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="unknown goal 'watts'; use one of ratio, ms, fps"):
        Goal("watts", 1)


def test_what_the_dense_network_does_already_is_refused():
    for goal in (Goal("ms", 5.0), Goal("fps", 200.0)):
        with pytest.raises(UsageError, match="takes 4 ms already, 5 ms are asked for; nothing is to be pruned"):
            goal.share(4.0, 1)


def test_one_goal_at_a_time():
    assert Goal.of(None, None, None) is None
    assert Goal.of(None, None, 30.0) == Goal("fps", 30.0)
    with pytest.raises(UsageError, match="one goal at a time, got --latency and --fps"):
        Goal.of(0.5, None, 30.0)
