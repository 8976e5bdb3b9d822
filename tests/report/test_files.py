"""The report's sections on precisions and engines, from an export as it is written."""

import copy

import pytest

from chipdeploy.report.files import choice_section, engines_section, files_section


def entry(suffix="", **facts):
    checks = {"max_relative_error": 2e-7, "tolerance": 1e-4, "top1_agreement": 0.984, "batches": [1, 8]}
    files = {name: {"file": f"{name}{suffix}.onnx", "bytes": 1_090_000, **facts} for name in ("dense", "pruned")}
    return files | {"verification": {"dense": checks, "pruned": checks}}


EXPORT = entry() | {
    "precisions": {"int8": entry("-int8", accuracy={"top1": 0.779, "images": 1000}, kept_float=["node_Conv_3"])},
    "engines": {
        "rtx-int8": {
            name: {
                "file": f"{name}-rtx-int8.engine",
                "bytes": 2_100_000,
                "gpu_name": "",
                "gpus": ["sm86", "sm120"],
                "batches": [1, 8, 32],
                "runtime": "tensorrt_rtx",
                "runtime_version": "1.7.1",
            }
            for name in ("dense", "pruned")
        }
    },
    "best": {
        "precision": "fp32",
        "target": "ort-cpu",
        "max_drop_points": 0.5,
        "table": [
            {
                "precision": "fp32",
                "accuracy": 0.78,
                "drop_points": 0.0,
                "ratio": 1,
                "ratio_interval": [1, 1],
                "holds": True,
            },
            {
                "precision": "int8",
                "accuracy": 0.7,
                "drop_points": 8.0,
                "ratio": 2.0,
                "ratio_interval": [1.9, 2.1],
                "holds": False,
            },
        ],
    },
}


def test_every_file_has_a_line():
    lines = files_section(EXPORT).splitlines()
    assert "| dense.onnx | 1.09 MB | 2.0e-07 | 1e-04 | 98.4 % | 1, 8 | - |" in lines
    assert "| pruned-int8.onnx | 1.09 MB | 2.0e-07 | 1e-04 | 98.4 % | 1, 8 | 77.9 % of 1000 |" in lines
    assert "- `pruned-int8.onnx` keeps in a higher precision: node_Conv_3" in lines


def test_the_choice_says_what_was_lost_and_gained():
    text = choice_section(EXPORT)
    assert "| int8 | 70 % | +8.00 points, too much | 2.00 (1.90-2.10) |" in text
    assert "Taken: fp32 on ort-cpu, since nothing else loses at most 0.5 points and is faster than fp32 for" in text
    noisy = copy.deepcopy(EXPORT)
    noisy["best"]["table"][1] |= {"noise": "equal blocks lie apart"}
    assert "2.00 (1.90-2.10), noisy: equal blocks lie apart |" in choice_section(noisy)
    other = EXPORT | {"best": EXPORT["best"] | {"precision": "int8"}}
    assert "Taken: int8 on ort-cpu, the fastest that loses at most 0.5 points and is faster" in choice_section(other)


def test_engines_name_their_gpus():
    assert "| pruned-rtx-int8.engine | 2.10 MB | sm86, sm120 | 1, 8, 32 | tensorrt_rtx 1.7.1 |" in engines_section(
        EXPORT
    )


@pytest.mark.parametrize("section", [files_section, choice_section, engines_section])
def test_what_was_not_made_takes_no_room(section):
    assert section(None) == ""
    assert section({}) == ""
