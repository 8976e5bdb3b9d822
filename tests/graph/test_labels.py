"""The union-find over channel labels."""

from __future__ import annotations

import numpy as np
import pytest

from chipdeploy.graph.labels import Labels


def test_new_labels_are_classes_of_their_own():
    labels = Labels()
    first, second = labels.new(3), labels.new(2)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4]
    assert labels.roots(second).tolist() == [3, 4]
    assert labels.new(0).tolist() == []


def test_unite_joins_element_by_element_and_through_chains():
    labels = Labels()
    a, b, c = labels.new(2), labels.new(2), labels.new(2)
    assert labels.unite(b, c).tolist() == [2, 3]
    assert labels.unite(a, c).tolist() == [0, 1]
    assert labels.roots(np.concatenate([a, b, c])).tolist() == [0, 1, 0, 1, 0, 1]


def test_unite_may_close_a_cycle():
    labels = Labels()
    a = labels.new(3)
    labels.unite(a, np.roll(a, 1))
    assert labels.roots(a).tolist() == [0, 0, 0]


def test_unite_refuses_different_lengths():
    labels = Labels()
    with pytest.raises(ValueError, match="broadcast"):
        labels.unite(labels.new(2), labels.new(3))


def test_unite_broadcasts_and_reduced_drops_what_does_not_differ():
    labels = Labels()
    table, row = labels.new(3, 2), labels.new(2)
    labels.unite(table, row)
    assert labels.roots(table).tolist() == [[0, 1]] * 3
    assert labels.reduced(table).shape == (1, 2)
    assert labels.merge(table, 1).tolist() == [[0]] * 3


def test_many_partners_of_one_label_end_in_one_class():
    labels = Labels()
    a, b = labels.new(1), labels.new(5)
    labels.pin(b[3:4], "third")
    labels.unite(b[::-1], a)
    assert labels.roots(b).tolist() == [0] * 5
    assert labels.reason(0) == "third"


def test_a_pin_outlives_a_union_and_the_first_reason_stays():
    labels = Labels()
    a, b = labels.new(2), labels.new(2)
    labels.pin(b[:1], "late")
    labels.unite(a, b)
    assert labels.reason(0) == "late"
    assert labels.reason(1) is None
    labels.pin(a, "later")
    assert (labels.reason(0), labels.reason(1)) == ("late", "later")
