#!/usr/bin/env python3
"""The tables of docs/latency.md, from the JSON files of the latency benchmarks: latency_table.py [--results DIR]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from chipdeploy.report.tables import markdown_grid
from chipdeploy.run import write_text

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "latency.md", ROOT / "benchmarks" / "results" / "latency"
HEADERS = {
    "predictors": ("network", "predictor", "measured networks", "within 5 %", "within 10 %", "bias", "Spearman"),
    "targets": ("network", "goal", "found", "in a fresh process", "95 %", "over the goal", "cuts measured"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    page = PAGE.read_text(encoding="utf-8")
    for name, rows in (("predictors", _predictors(folder)), ("targets", _targets(folder))):
        store = _read(folder, f"{name}.json")
        where = f"{store['environment']['machine']}; {store['rows' if name == 'predictors' else 'cells'][0]['setting']}"
        start, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = page.split(start)
        page = f"{before}{start}{markdown_grid(HEADERS[name], rows)}\n\nMachine: {where}.\n{end}{rest.split(end)[1]}"
    write_text(PAGE, page)


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _predictors(folder: Path) -> list[tuple[str, ...]]:
    rows = []
    for row in _read(folder, "predictors.json")["rows"]:
        guesses = zip(row["guesses"], row["ratios"], row["on_stairs"], strict=True)
        stairs = [abs(guess / ratio - 1) for guess, ratio, on in guesses if on]
        on = f"{sum(error <= 0.05 for error in stairs) / len(stairs):.0%}"
        rows.append(
            (
                row["model"],
                row["predictor"],
                str(row["networks"]),
                f"{row['within_5']:.0%} ({on} on the stairs)",
                f"{row['within_10']:.0%}",
                f"{row['bias']:.2f}",
                f"{row['spearman']:.3f}",
            )
        )
    return rows


def _targets(folder: Path) -> list[tuple[str, ...]]:
    return [
        (
            cell["model"],
            f"{cell['goal']:g}",
            f"{cell['ratio']:.3f}",
            f"{cell['fresh_ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*cell["fresh_interval"]),
            f"{cell['over']:+.1%}",
            str(len(cell["tries"])),
        )
        for cell in _read(folder, "targets.json")["cells"]
    ]


if __name__ == "__main__":
    main()
