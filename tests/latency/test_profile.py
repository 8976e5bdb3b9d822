"""A profile as a file: it comes back whole, and every misfit is refused or flagged in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.engines.target import Target
from chipdeploy.errors import RunError
from chipdeploy.graph.trace import trace
from chipdeploy.latency.environment import environment
from chipdeploy.latency.profile import LatencyProfile, Round, Variant, _digest, graph_digest
from chipdeploy.latency.rig import Setting
from chipdeploy.latency.variants import Variants, probes

SETTING = Setting(Target.parse("ort-cpu"), 1, (3, 16, 16))
DENSE_S = 1e-3


def times(seconds):
    return ((seconds, seconds), (seconds * 1.01, seconds * 0.99))


def made(graph, ratio=lambda step: 0.5, seed=0):
    """A profile of probes and 16 other plans; `ratio` tells that of the probe of a step."""
    steps = probes(graph)
    macs = CostModel.of(graph, "macs")
    layers = {layer.name: 1e-4 for layer in graph.layers}

    def variant(widths, share):
        return Variant(tuple(widths.tolist()), times(share * DENSE_S), dict.fromkeys(layers, round(1e-4 * share, 9)))

    first = Round(
        times(DENSE_S), times(DENSE_S), tuple(variant(widths, ratio(step)) for step, widths in steps.items()), layers
    )
    plans = Variants(graph, 8, seed).take(16)
    second = replace(first, variants=tuple(variant(w, 0.1 + 0.9 * macs.count(w) / macs.dense) for w in plans))
    return LatencyProfile(
        "tiny", graph_digest(graph), SETTING, environment(), seed, 12.3, tuple(steps), (first, second)
    )


@pytest.fixture(scope="module")
def graph(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def profile(graph):
    return made(graph)


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "tiny.json"
    profile.save(path)
    return path


def refusal(path):
    with pytest.raises(RunError) as caught:
        LatencyProfile.load(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def test_it_comes_back_as_it_was_saved(profile, saved, graph):
    found = LatencyProfile.load(saved)
    assert found.to_dict() == profile.to_dict()
    assert found.rounds == profile.rounds
    assert found.setting == profile.setting
    assert found.cost(graph).count(graph.sizes) == profile.cost(graph).count(graph.sizes)


def test_statistics_come_from_the_raw_times(profile, graph):
    assert profile.dense_ms == pytest.approx(1.0)
    assert profile.control_spread == pytest.approx(0)
    assert profile.noisy_rounds == 0
    assert [ratio for _, ratio in profile.variants][: len(profile.steps)] == pytest.approx([0.5] * len(profile.steps))
    dense, *cut = profile.samples(graph)
    assert np.array_equal(dense.widths, graph.sizes)
    assert dense.ratio == 1
    assert sum(dense.layers.values()) == pytest.approx(1)
    assert len(cut) == len(profile.variants)
    assert sum(cut[0].layers.values()) == pytest.approx(0.5)


def test_an_edited_number_is_found(saved):
    text = saved.read_text()
    edited = text.replace("0.00101", "0.00102", 1)
    assert edited != text
    saved.write_text(edited)
    assert "was edited after it was measured" in refusal(saved)


@pytest.mark.parametrize("key", ["model", "graph", "seed", "spent_s", "digest"])
def test_every_field_is_under_the_digest(saved, key):
    raw = json.loads(saved.read_text())
    raw[key] = "other"
    saved.write_text(json.dumps(raw))
    assert "was edited" in refusal(saved)


def test_a_new_layout_is_no_edit(saved, profile):
    saved.write_text(json.dumps(json.loads(saved.read_text()), indent=4))
    assert LatencyProfile.load(saved).rounds == profile.rounds


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    assert "is no latency profile or was cut short" in refusal(saved)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"profile", b'{"rounds": [' + b"[" * 100_000], ids=["binary", "text", "deep"]
)
def test_what_is_no_json_is_refused(saved, content):
    saved.write_bytes(content)
    assert "is no latency profile or was cut short" in refusal(saved)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '"schema"'])
def test_other_json_is_refused(saved, content):
    saved.write_text(content)
    assert "is no latency profile; make one" in refusal(saved)


def test_another_schema_is_refused(saved):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"schema": 99}))
    assert "has schema 99; this version reads schema 1" in refusal(saved)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "there is no profile" in refusal(tmp_path / "none.json")
    refusal(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"rounds": 3},
        {"rounds": [{}]},
        {"setting": {}},
        {"setting": None},
        {"steps": ["x"]},
        {"environment": 3},
        {"rounds": []},
        {"setting": {"target": "abacus", "batch": 1, "input_shape": [3, 16, 16], "threads": 1}},
        {"setting": {"target": "ort-cpu", "batch": 0, "input_shape": [3, 16, 16], "threads": 1}},
    ],
)
def test_damage_under_a_right_digest_is_refused(saved, damage):
    raw = json.loads(saved.read_text()) | damage
    del raw["digest"]
    saved.write_text(json.dumps(raw | {"digest": _digest(raw)}))
    refusal(saved)


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), "x", None])
def test_times_that_are_none_are_refused(saved, number):
    raw = json.loads(saved.read_text())
    raw["rounds"][0]["variants"][0]["times_s"] = [[number, number]] * 2
    del raw["digest"]
    saved.write_text(json.dumps(raw | {"digest": _digest(raw)}))
    refusal(saved)


def test_another_network_is_refused(profile):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    other = trace(model, torch.randn(2, 3, 16, 16))
    for use in (profile.samples, profile.cost, profile.check_graph):
        with pytest.raises(RunError, match="for another network, called tiny") as caught:
            use(other)
        assert "\n" not in str(caught.value)


def test_another_image_size_is_another_network(tiny, profile):
    with pytest.raises(RunError, match="for another network"):
        profile.check_graph(trace(tiny[0], torch.randn(2, 3, 24, 24)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 8}, "with the batch 1, wanted 8"),
        ({"threads": 2}, "with the number of threads 1, wanted 2"),
        ({"input_shape": (3, 32, 32)}, r"with the input \(3, 16, 16\), wanted \(3, 32, 32\)"),
        ({"target": Target.parse("torch-cpu")}, "with the target ort-cpu, wanted torch-cpu"),
    ],
)
def test_another_setting_is_refused(profile, change, words):
    profile.check_setting(SETTING)
    with pytest.raises(RunError, match=words) as caught:
        profile.check_setting(replace(SETTING, **change))
    assert "\n" not in str(caught.value)


def test_another_machine_and_another_runtime_are_flagged(profile):
    here = environment()
    assert profile.foreign(here) == ""
    elsewhere = {**here, "machine": "Abacus, 1 core, no GPU"}
    assert profile.foreign(elsewhere) == f"measured on {here['machine']}; this is Abacus, 1 core, no GPU"
    version = here["versions"]["onnxruntime"]
    newer = {**here, "versions": {**here["versions"], "onnxruntime": "99.0"}}
    assert profile.foreign(newer) == f"measured with onnxruntime {version}; here is 99.0"
    without = {**here, "versions": {"torch": here["versions"]["torch"]}}
    assert profile.foreign(without) == f"measured with onnxruntime {version}; here is none"


def test_only_the_runtime_that_was_timed_matters(profile):
    here = environment()
    other_torch = {**here, "versions": {**here["versions"], "torch": "99.0"}}
    assert profile.foreign(other_torch) == ""
    builder = {"tensorrt-rtx-cu13": "0.1"}
    beside = replace(profile, environment={**here, "versions": here["versions"] | builder})
    assert beside.foreign(here) == ""
    eager = replace(profile, setting=replace(SETTING, target=Target.parse("torch-cpu")))
    assert "measured with torch" in eager.foreign(other_torch)
    assert eager.foreign({**here, "versions": {**here["versions"], "onnxruntime": "99.0"}}) == ""


@pytest.mark.parametrize("stair", [1, 4, 8, 16])
def test_the_stairs_are_the_finest_step_that_saves_time(graph, stair):
    """A probe saves the share of its MACs on the stairs, and takes longer than the dense network off them."""
    cost = CostModel.of(graph, "macs")
    plans = probes(graph)

    def ratio(step):
        return cost.count(plans[step]) / cost.dense if step % stair == 0 else 1.2

    assert made(graph, ratio).align(graph) == stair


def test_no_stair_at_all_is_the_widest_step(graph):
    assert made(graph, lambda step: 1.0).align(graph) == 16


def test_a_round_more(profile):
    grown = profile.grown(profile.rounds[0], profile.steps, {"machine": "m"}, 2.0)
    assert len(grown.rounds) == len(profile.rounds) + 1
    assert grown.spent_s == pytest.approx(14.3)
    assert len(profile.rounds) == 2


@pytest.mark.parametrize("wrong", [lambda w: w[:-1], lambda w: (-1, *w[1:]), lambda w: (w[0] + 10**6, *w[1:])])
def test_widths_that_the_network_cannot_have_are_refused(profile, graph, wrong):
    first, *rest = profile.rounds[1].variants
    forged = replace(profile.rounds[1], variants=(replace(first, widths=wrong(first.widths)), *rest))
    with pytest.raises(RunError, match="has widths that the network cannot have"):
        replace(profile, rounds=(profile.rounds[0], forged)).cost(graph)
