#!/usr/bin/env python3
"""The tables of docs/latency.md, from the JSON of the latency and memory benchmarks: latency_table.py [--results D]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from chipdeploy.report.tables import bytes_text, markdown_grid
from chipdeploy.run import write_text

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "latency.md", ROOT / "benchmarks" / "results" / "latency"
SIDES = ("ratio", "control")
HEADERS = {
    "predictors": (
        "network",
        "predictor",
        "measured networks",
        "within 5 %",
        "within 10 %",
        "bias",
        "Spearman",
        "free widths",
    ),
    "memory": ("network", "batch", "weights", "activations", "ONNX Runtime's process grows by", "of the plan"),
    "targets": ("network", "goal", "found", "in 5 processes", "least-most", "dense / dense", "over the goal", "tries"),
}
HEADERS["accuracy"] = ("network", "goal", "method", "time of dense", "MACs kept", "test accuracy", "seeds")
HEADERS["targets-h100"] = tuple("in 2 processes" if text == "in 5 processes" else text for text in HEADERS["targets"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    page = PAGE.read_text(encoding="utf-8")
    stores = {name: _read(folder, f"{name}.json") for name in ("predictors", "targets", "targets-h100")}
    stores["memory"] = _read(folder.parent, "memory.json")
    makers = {"predictors": _predictors, "targets": _targets, "targets-h100": _targets, "memory": _memory}
    page = _filled(page, "accuracy", _accuracy(folder))
    for name, make in makers.items():
        where = f"Machine: {stores[name]['environment']['machine']}"
        if name != "memory":
            setting = stores[name]["rows" if name == "predictors" else "cells"][0]["setting"]
            where += "; " + ", ".join(part for part in setting.split(", ") if "x" not in part)  # all but the shape
        page = _filled(page, name, f"{markdown_grid(HEADERS[name], make(stores[name]))}\n\n{where}.")
    write_text(PAGE, page)


def _filled(page: str, name: str, text: str) -> str:
    """The page with new text between the marks of a table."""
    start, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, rest = page.split(start)
    return f"{before}{start}{text}\n{end}{rest.split(end)[1]}"


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _predictors(store: Any) -> list[tuple[str, ...]]:
    return [
        (
            row["model"],
            row["predictor"],
            str(row["networks"]),
            f"{row['within_5']:.0%}",
            f"{row['within_10']:.0%}",
            f"{row['bias']:.2f}",
            f"{row['spearman']:.3f}",
            f"{row['free']['within_5']:.0%} / {row['free']['within_10']:.0%}",
        )
        for row in store["rows"]
    ]


def _accuracy(folder: Path) -> str:
    """Accuracy at equal measured time, of all networks; seeds that end at the same goal share a row."""
    rows, machines = [], list[str]()
    for path in sorted(folder.glob("accuracy-*.json"), reverse=True):
        store, groups = json.loads(path.read_text(encoding="utf-8")), dict[tuple[float, str, Any], list[Any]]()
        for cell in store["cells"]:
            groups.setdefault((cell["goal"], cell["method"], cell.get("pace")), []).append(cell)
            machines.append(cell["timed_on"])
        name = f"{store['settings']['model']}, dense {store['dense_test']:.2%}"
        rows += [(name, f"{goal:g}", method, *_mean_cell(cells)) for (goal, method, _), cells in groups.items()]
    places = list(dict.fromkeys(machines))
    where = "Timed on: " + "; ".join([places[0], *(f"{place} (marked *)" for place in places[1:])])
    marked = [(*row[:3], row[3] + ("" if row[7] == places[0] else " *"), *row[4:7]) for row in rows]
    return f"{markdown_grid(HEADERS['accuracy'], marked)}\n\n{where}; ort-cpu, batch 1, 1 thread."


def _mean_cell(cells: list[Any]) -> tuple[str, ...]:
    """Times and MACs, the mean accuracy and those of the seeds, and where the times are of."""
    times, macs, tests = ([cell[key] for cell in cells] for key in ("time", "macs", "test"))
    missed = "" if all(cell["met"] for cell in cells) else ", missed"
    spread = f"{min(times):.3f}-{max(times):.3f}" if len(times) > 1 else f"{times[0]:.3f}"
    seeds = ", ".join(f"{test:.2%}" for test in tests)
    mean = f"{sum(tests) / len(tests):.2%}"
    return spread + missed, f"{sum(macs) / len(macs):.2f}", mean, seeds, cells[0]["timed_on"]


def _memory(store: Any) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['network']}, {row['image']} px",
            str(row["batch"]),
            *(bytes_text(row[key]) for key in ("weight_bytes", "activation_bytes", "grown_bytes")),
            f"{row['grown_bytes'] / (row['weight_bytes'] + row['activation_bytes']):.1f}x",
        )
        for row in store["rows"]
    ]


def _targets(store: Any) -> list[tuple[str, ...]]:
    return [
        (
            cell["model"],
            f"{cell['goal']:g}",
            f"{cell['ratio']:.3f}",
            f"{cell['fresh_ratio']:.3f}",
            *("{:.3f}-{:.3f}".format(*(end(one[key] for one in cell["fresh"]) for end in (min, max))) for key in SIDES),
            f"{cell['over']:+.1%}",
            str(len(cell["tries"])),
        )
        for cell in store["cells"]
    ]


if __name__ == "__main__":
    main()
