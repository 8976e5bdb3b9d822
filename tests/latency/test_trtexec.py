"""Files of trtexec's --exportTimes."""

import json

import pytest

from chipdeploy.errors import InputError
from chipdeploy.latency.trtexec import read_trtexec


def test_percentiles_of_both_clocks(tmp_path):
    path = tmp_path / "times.json"
    rows = [{"startH2dMs": 0.0, "computeMs": i / 100, "latencyMs": i / 100 + 1} for i in range(101)]
    path.write_text(json.dumps(rows))
    facts = read_trtexec(path).to_dict()
    assert facts["inferences"] == 101
    assert facts["compute_ms"] == {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    assert facts["latency_ms"] == {"p50": 1.5, "p90": 1.9, "p99": 1.99}


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"computeMs": 1}]', '[{"computeMs": "x", "latencyMs": 1}]'])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"times\.json holds no trtexec times") as error:
        read_trtexec(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(InputError, match=r"--exportTimes=none\.json"):
        read_trtexec(tmp_path / "none.json")
