"""The report: the measured headline first, numbers a person can read, and files that are whole or not there."""

import io
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from chipdeploy.errors import InputError, RunError
from chipdeploy.latency.measure import Comparison
from chipdeploy.report.page import _evenly, budget_sentence, write_report
from chipdeploy.report.plots import channels_plot
from chipdeploy.report.tables import (
    Row,
    bytes_text,
    count_text,
    markdown_table,
    percent_text,
    render_table,
    summary_rows,
)

RESULT = {
    "schema": 1,
    "model": "resnet20",
    "data": "fashion-mini",
    "budget": {"kind": "flops", "keep": 0.3, "dense": 40.8e6, "limit": 12.24e6, "achieved": 0.2991, "unit": "MACs"},
    "seed": 0,
    "accuracy": {"dense": 0.912, "pruned": 0.905, "test_images": 2000},
    "validation": {"soft": 0.81, "cut": 0.8},
    "costs": {
        "dense": {"macs": 40.6e6, "params": 272474, "channels": 688, "volume": 188000},
        "pruned": {"macs": 12.2e6, "params": 81742, "channels": 402, "volume": 188000},
    },
    "layers": [
        {"name": "conv1", "dense": 16, "kept": 12},
        {"name": "layer1.0.conv1", "dense": 16, "kept": 0},
        {"name": "layer1.0.conv2", "dense": 16, "kept": 16},
    ],
    "removed_branches": ["layer1.0"],
}
CHECK = {"max_relative_error": 2.7e-7, "top1_agreement": 1.0, "batches": [1, 8], "tolerance": 1e-4, "images": 16}
EXPORT = {
    "dense": {"file": "dense.onnx", "sha256": "0" * 64, "bytes": 1_086_918, "ops": 56},
    "pruned": {"file": "pruned.onnx", "sha256": "1" * 64, "bytes": 344_000, "ops": 48},
    "verification": {"dense": CHECK, "pruned": CHECK},
}
ENVIRONMENT = {
    "machine": "Fast CPU, 2 cores, no GPU",
    "threads": 2,
    "frequency_mhz": 2600,
    "load_before": [0.1, 0.2, 0.3],
    "load_after": [1.0, 0.5, 0.4],
    "os": "Linux",
    "python": "3.11.9",
    "versions": {"onnxruntime": "1.32.0"},
}


def bench(pruned_ms, batch=1, control_ms=0.47):
    """A comparison in which the dense network takes 0.47 ms."""
    times = [((ms / 1e3,),) * 40 for ms in (0.47, pruned_ms, control_ms)]
    return Comparison(batch, *times, environment=ENVIRONMENT).to_dict()


def soft(epochs):
    return [
        {
            "phase": "soft",
            "epoch": epoch,
            "loss": 1 / epoch,
            "budget_soft": 0.5,
            "budget_target": 0.3,
            "crisp": 0.25,
            "val_soft": 0.9,
            "val_cut": None,
        }
        for epoch in range(1, epochs + 1)
    ]


def page(folder, *, result=RESULT, export=EXPORT, benches=None, metrics=()):
    return write_report(folder, result, export, benches, metrics).read_text(encoding="utf-8")


def test_rows_read_like_sentences():
    assert summary_rows(RESULT, EXPORT, [bench(0.235), bench(0.47 * 1.1, batch=32)]) == [
        Row("test accuracy", "91.20 %", "90.50 %", "-0.70 points"),
        Row("MACs", "40.6 M", "12.2 M", "-70 %"),
        Row("parameters", "272 k", "81.7 k", "-70 %"),
        Row("activation volume", "188 k", "188 k", "0 %"),
        Row("channels", "688", "402", "-42 %"),
        Row("ONNX size", "1.09 MB", "344 kB", "-68 %"),
        Row("ONNX ops", "56", "48", "-14 %"),
        Row("latency, batch 1", "0.470 ms", "0.235 ms", "0.50x (95 % 0.50-0.50)"),
        Row("latency, batch 32", "0.470 ms", "0.517 ms", "1.10x (95 % 1.10-1.10)"),
    ]


def test_rows_without_export_and_bench():
    assert [row.what for row in summary_rows(RESULT, None, None)] == [
        "test accuracy",
        "MACs",
        "parameters",
        "activation volume",
        "channels",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00 k"),
        (12_345, "12.3 k"),
        (999_600, "1.00 M"),
        (40_551_000, "40.6 M"),
        (1.25e9, "1.25 G"),
        (0.47, "0.470"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert count_text(value) == text


def test_sizes_and_shares():
    assert (bytes_text(812), bytes_text(1_086_918)) == ("812 B", "1.09 MB")
    assert (percent_text(0.3), percent_text(0.2991), percent_text(1.0)) == ("30 %", "29.9 %", "100 %")


def test_the_tables_say_the_same():
    rows = summary_rows(RESULT, EXPORT, [bench(0.235)])
    console = Console(file=io.StringIO(), width=120)
    console.print(render_table(rows))
    shown = console.file.getvalue()
    markdown = markdown_table(rows).splitlines()
    assert markdown[:3] == [
        "|  | dense | pruned | change |",
        "| --- | ---: | ---: | ---: |",
        "| test accuracy | 91.20 % | 90.50 % | -0.70 points |",
    ]
    assert all(cell in shown for row in rows for cell in row.cells())


def test_a_bar_in_a_name_does_not_break_the_table():
    assert markdown_table([Row("a|b", "1", "2", "3")]).splitlines()[-1] == "| a\\|b | 1 | 2 | 3 |"


def test_the_first_line_is_the_headline(tmp_path):
    assert page(tmp_path, benches=[bench(0.235)]).startswith(
        "pruned is 2.00x faster (0.50 of the dense time, 95 % 0.50-0.50, batch 1)\n"
    )


def test_not_faster_comes_first(tmp_path):
    lines = page(tmp_path, benches=[bench(0.235), bench(0.47 * 1.1, batch=32)]).splitlines()
    assert lines[0] == "NOT faster: pruned takes 1.10 of the dense time (95 % 1.10-1.10, batch 32)"
    assert "- pruned is 2.00x faster (0.50 of the dense time, 95 % 0.50-0.50, batch 1)" in lines
    assert "Fewer MACs alone do not make a network faster" in lines[-1]


def test_what_was_not_measured_is_not_claimed(tmp_path):
    text = page(tmp_path)
    assert text.startswith("not benchmarked yet: run chipdeploy bench\n")
    assert "How it was measured" not in text
    assert "faster" not in text
    assert text.splitlines()[-1].startswith("`chipdeploy bench` times the two ONNX files")
    assert page(tmp_path, export=None).splitlines()[-1].startswith("`chipdeploy export`")


def test_a_noisy_measurement_says_so(tmp_path):
    lines = page(tmp_path, benches=[bench(0.235, control_ms=0.47 * 1.2)]).splitlines()
    assert lines[0].endswith("; noisy: the dense network against itself took 1.20 of its time")
    assert lines[-1].startswith("`chipdeploy bench` again on a quieter machine")


def test_the_page_tells_the_whole_story(tmp_path):
    text = page(tmp_path, benches=[bench(0.235)], metrics=soft(3))
    for part in (
        "# resnet20 on fashion-mini",
        "Kept 29.9 % of the MACs: 12.2 of 40.8 M, budget 30 %.",
        "on 2000 images, looked at once: 91.2 % dense, 90.5 % pruned (seed 0).",
        "Validation accuracy around the cut: 81 % soft, 80 % cut.",
        "![channels kept in each layer](channels.svg)",
        "1: `layer1.0`.",
        "| batch 1 | 40 | 0.500 (0.500-0.500) | 1.000 (1.000-1.000) | 0.0 % | quiet |",
        "| dense, batch 1 | 0.470 | - | - |",  # 40 inferences: no p90, no p99
        "| 2.7e-07 | 1e-04 | 100 % | 1, 8 | - |",
        "- machine: Fast CPU, 2 cores, no GPU",
        "- load after: 1.00, 0.50, 0.40 (1, 5, 15 minutes)",
        "- packages: python 3.11.9, onnxruntime 1.32.0",
        "| 2 | 0.5 | 0.5 | 0.3 | 25 % | 90 % | - |",
    ):
        assert part in text, part


def test_a_long_history_is_thinned_evenly(tmp_path):
    metrics = [*soft(100), {"phase": "finetune", "epoch": 777, "loss": 1.0}]
    text = page(tmp_path, metrics=metrics)
    assert "20 of 100 epochs." in text
    assert "| 1 | 1 |" in text and "| 100 | 0.01 |" in text
    assert "777" not in text


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 39, 1000])
def test_evenly_keeps_the_ends(count):
    chosen = _evenly(count, 20)
    assert len(chosen) == len(set(chosen)) == min(count, 20)
    assert chosen[:1] == list(range(count))[:1] and chosen[-1:] == list(range(count))[-1:]
    steps = {after - before for before, after in itertools.pairwise(chosen)}
    assert not steps or max(steps) - min(steps) <= 1


def test_the_budget_sentence():
    assert budget_sentence(RESULT["budget"]) == "kept 29.9 % of the MACs: 12.2 of 40.8 M, budget 30 %"
    latency = {"kind": "latency", "keep": 0.5, "dense": 0.47, "limit": 0.235, "achieved": 0.6, "unit": "ms"}
    assert budget_sentence(latency) == (
        "kept 60 % of the latency: 0.282 of 0.470 ms, budget 50 %, OVER the budget"  # 0.6 · 0.47 = 0.282
    )
    small = {"kind": "params", "keep": 0.5, "dense": 1.2e6, "limit": 6e5, "achieved": 0.5, "unit": "params"}
    assert budget_sentence(small) == "kept 50 % of the parameters: 600 k of 1.20 M, budget 50 %"


def test_only_whole_files_are_left(tmp_path):
    page(tmp_path, benches=[bench(0.2)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["channels.svg", "report.md"]
    before = (tmp_path / "report.md").read_bytes()
    with pytest.raises(RunError, match="an artifact is damaged"):
        page(tmp_path, result={**RESULT, "layers": [{"name": "conv1"}]})
    with pytest.raises(RunError, match="bench again"):
        page(tmp_path, benches=[{"schema": 9}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["channels.svg", "report.md"]
    assert (tmp_path / "report.md").read_bytes() == before


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        page(tmp_path / "gone")


def layers(count):
    return [{"name": f"stage{n // 10}.{n}.conv", "dense": 16 + n, "kept": n % 5} for n in range(count)]


@pytest.mark.parametrize("count", [1, 20, 170])
def test_the_picture_names_every_layer(tmp_path, count):
    path = tmp_path / "channels.svg"
    channels_plot(layers(count), path)
    texts = ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("text")]
    assert {f"stage{n // 10}.{n}.conv" for n in range(count)} <= set(texts)
    assert {"dense", "kept", "layer removed", "channels"} <= set(texts)


def test_the_picture_is_the_same_every_time(tmp_path):
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    channels_plot(layers(20), one)
    channels_plot(layers(20), two)
    assert one.read_bytes() == two.read_bytes()
    assert b"<dc:date>" not in one.read_bytes()


def test_no_layers_no_picture(tmp_path):
    with pytest.raises(InputError, match="no layers to draw"):
        channels_plot([], tmp_path / "channels.svg")


def test_reports_without_torch_and_onnx():
    code = (
        "import sys; import chipdeploy.report.page, chipdeploy.report.tables, chipdeploy.report.plots; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
