"""Target names: what they mean, their shortest form, and what they may not be."""

import pytest

from chipdeploy.engines.target import Target
from chipdeploy.errors import UsageError


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ort-cpu", Target("ort", "cpu")),
        ("ort", Target("ort", "cpu")),
        ("ort-cpu-int8", Target("ort", "cpu", "int8")),
        ("ort-cuda-fp16", Target("ort", "cuda", "fp16")),
        ("trt-fp16", Target("trt", "cuda", "fp16")),
        ("rtx", Target("rtx", "cuda", "fp32")),
        ("torch-cpu", Target("torch", "cpu", "fp32", "eager")),
        ("torch-cuda-fp16", Target("torch", "cuda", "fp16", "graph")),
        ("torch-compile-cuda-bf16", Target("torch", "cuda", "bf16", "compile")),
    ],
)
def test_a_name_is_a_target(text, target):
    assert Target.parse(text) == target
    assert Target.parse(target.name) == target


@pytest.mark.parametrize(
    ("text", "name"), [("ort", "ort-cpu"), ("trt", "trt-fp32"), ("torch-fp16-cuda-graph", "torch-cuda-fp16")]
)
def test_the_shortest_name(text, name):
    assert Target.parse(text).name == name


def test_threads_are_of_the_cpu():
    Target.parse("ort-cpu").check_threads(4)
    Target.parse("trt-fp16").check_threads(1)
    with pytest.raises(UsageError, match=r"trt-fp16 runs on a GPU.*, got 4; leave --threads out"):
        Target.parse("trt-fp16").check_threads(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown target ''; a target begins with ort, torch, trt, rtx"),
        ("tensorflow", "unknown target 'tensorflow'"),
        ("ort-cqu", "'cqu' is unknown; ort has the devices cpu, cuda"),
        ("trt-cpu", "'cpu' is unknown; trt has the devices cuda"),
        ("ort-fp16-int8", "'int8' is one too many"),
        ("ort-eager", "'eager' is unknown"),
        ("torch-cpu-graph", "only a GPU replays graphs"),
        ("torch-int8", "use ort-cpu-int8 or trt-int8"),
    ],
)
def test_what_is_no_target(text, message):
    with pytest.raises(UsageError) as error:
        Target.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
