"""Learning rates, against numbers written out."""

import pytest

from chipdeploy.errors import UsageError
from chipdeploy.training.recipes import RECIPES, recipe


def test_default_rate_warms_up_and_falls_as_a_cosine():
    rules = recipe("default")
    assert rules.rate_at(0.5, 0) == pytest.approx(rules.rate * 0.5)
    assert rules.rate_at(1.0, 0) == pytest.approx(0.0)
    assert rules.rate_at(0.0, 0) < 0.03 * rules.rate
    # cos(π/3) = 1/2, so a third of the way leaves (1 + 1/2) / 2 of the rate.
    assert rules.rate_at(1 / 3, 0) == pytest.approx(rules.rate * 0.75)


def test_paper_rate_halves_every_thirty_epochs():
    rules = recipe("paper")
    assert [rules.rate_at(0.0, epoch) for epoch in (0, 29, 30, 60)] == [0.05, 0.05, 0.025, 0.0125]
    assert rules.soft_adam == 1e-3
    assert not rules.joined


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=", ".join(RECIPES)):
        recipe("fastest")
