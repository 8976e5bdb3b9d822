"""Profiles of a tiny network, really measured: they grow by rounds, go on where they were, and refuse to be mixed."""

from dataclasses import replace

import pytest

from chipdeploy.engines.target import Target
from chipdeploy.errors import RunError, UsageError
from chipdeploy.latency import profiling
from chipdeploy.latency.predict import LEAST
from chipdeploy.latency.profile import LatencyProfile
from chipdeploy.latency.profiling import measure_profile
from chipdeploy.latency.rig import Setting

ORT = Setting(Target.parse("ort-cpu"), 1, (3, 16, 16))
A_MOMENT = 0.001  # minutes: two rounds and no more


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(profiling, "ROUND_S", 0.1)
    monkeypatch.setattr(profiling, "BLOCKS", 2)
    monkeypatch.setattr(profiling, "REPEATS", 0)


def widths(profile):
    return [variant.widths for variant, _ in profile.variants]


def test_it_grows_round_by_round_and_goes_on_where_it_was(tiny, tmp_path):
    model, graph = tiny
    whole, halves = tmp_path / "whole.json", tmp_path / "halves.json"
    rounds = []
    found = measure_profile(
        model, graph, ORT, name="tiny", minutes=A_MOMENT, path=whole, on_round=lambda p, _: rounds.append(len(p.rounds))
    )
    assert rounds == list(range(1, len(found.rounds) + 1))
    assert len(found.variants) >= LEAST
    assert LatencyProfile.load(whole).to_dict() == found.to_dict()
    assert all(variant.layers_s and one.dense_layers_s for one in found.rounds for variant in one.variants)
    assert found.environment["quick_cuts"]
    assert found.cost(graph).spread > 0

    replace(found, rounds=found.rounds[:1]).save(halves)  # as if it had been interrupted
    again = measure_profile(model, graph, ORT, name="tiny", minutes=A_MOMENT, path=halves)
    assert widths(again)[: len(found.rounds[0].variants)] == widths(found)[: len(found.rounds[0].variants)]
    assert again.to_dict()["rounds"][0] == found.to_dict()["rounds"][0]
    # The stairs that noisy probes show may differ; the draws are the same where they do not.
    if again.align(graph) == found.align(graph):
        assert widths(again) == widths(found)


def test_times_of_two_settings_are_not_mixed(tiny, tmp_path):
    model, graph = tiny
    path = tmp_path / "one.json"
    measure_profile(model, graph, ORT, name="tiny", minutes=A_MOMENT, path=path)
    before = path.read_bytes()
    with pytest.raises(RunError, match="batch 1, wanted 2"):
        measure_profile(model, graph, replace(ORT, batch=2), name="tiny", minutes=A_MOMENT, path=path)
    with pytest.raises(RunError, match="seed 0, now 1"):
        measure_profile(model, graph, ORT, name="tiny", minutes=A_MOMENT, path=path, seed=1)
    assert path.read_bytes() == before


def test_a_runtime_that_tells_no_layers_is_enough(tiny):
    model, graph = tiny
    setting = replace(ORT, target=Target.parse("torch-cpu"))
    found = measure_profile(model, graph, setting, name="tiny", minutes=A_MOMENT)
    assert not any(variant.layers_s for variant, _ in found.variants)
    assert found.cost(graph).count(graph.sizes) > 0


def test_minutes_are_positive(tiny):
    with pytest.raises(UsageError, match="minutes"):
        measure_profile(*tiny, ORT, name="tiny", minutes=0)
