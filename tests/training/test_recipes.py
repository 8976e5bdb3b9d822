"""Learning rates, against numbers written out."""

import pytest

from chipdeploy.errors import UsageError
from chipdeploy.training.recipes import RECIPES, recipe


def test_default_rate_warms_up_and_falls_as_a_cosine():
    rules = recipe("default")
    assert rules.curve(0.5, 0) == pytest.approx(0.5)
    assert rules.curve(1.0, 0) == pytest.approx(0.0)
    assert rules.curve(0.0, 0) < 0.03
    # cos(π/3) = 1/2, so a third of the way leaves (1 + 1/2) / 2 of the rate.
    assert rules.curve(1 / 3, 0) == pytest.approx(0.75)


def test_paper_rate_halves_every_thirty_epochs():
    rules = recipe("paper")
    assert [rules.curve(0.0, epoch) for epoch in (0, 29, 30, 60)] == [1, 1, 0.5, 0.25]
    assert rules.rate == 0.05 and rules.distill == 0
    assert rules.soft_adam == 1e-3
    assert not rules.joined


def test_the_less_is_kept_the_larger_the_steps_up_to_those_of_fresh_weights():
    rules = recipe("default")
    paces = [rules.pace_after(keep) for keep in (0.6, 0.5, 0.3, 0.15, 0.05)]
    assert paces == pytest.approx([0.1, 0.12, 0.2, 0.3, 0.3])
    assert recipe("paper").pace_after(0.3) == 0  # plain SGD


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=", ".join(RECIPES)):
        recipe("fastest")
