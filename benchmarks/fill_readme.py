#!/usr/bin/env python3
"""Write the README's tour and results from what was really printed and measured.

fill_readme.py            the results, from benchmarks/results/*.json
fill_readme.py --tour     the tour too: runs the demo and takes its output
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "chipnet": "**chipdeploy** (widths in steps of 16, whole blocks)",
    "chipnet-free": "chipdeploy `--align 1` (free widths)",
    "global": "one-shot, BatchNorm scale over the whole network",
    "uniform": "one-shot, the same share of every group",
    "torch-pruning": "Torch-Pruning, global group-L2",
    "scratch": "uniformly narrower, from scratch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tour", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if options.tour:
        text = replace(text, "tour", tour())
    text = replace(text, "results", "\n\n".join(results()))
    readme.write_text(text, encoding="utf-8")


def replace(text: str, name: str, content: str) -> str:
    """The text with what stands between the two marks of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def tour() -> str:
    """The demo's own words, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "chipdeploy.cli", "demo"]
        done = subprocess.run(command, cwd=folder, check=True, text=True, capture_output=True)
    lines = "\n".join("    " + line.rstrip() for line in (done.stderr + done.stdout).splitlines())
    machine = environment_line(json.loads((RESULTS / "gate-cost.json").read_text())["environment"])
    return f"What `make demo` prints ({machine}):\n\n{lines}"


def results() -> list[str]:
    """A section a results file."""
    return [
        section(path) for path in sorted(RESULTS.glob("*.json")) if "cells" in json.loads(path.read_text())
    ] + costs()


def environment_line(environment: dict[str, Any]) -> str:
    return str(environment["machine"])


def section(path: Path) -> str:
    """Accuracy and measured time of every method, mean over seeds."""
    store = json.loads(path.read_text(encoding="utf-8"))
    settings = store["settings"]
    start = "the given checkpoint" if settings["given_weights"] else f"{settings['dense_epochs']} epochs of training"
    machine = environment_line(store["environment"])
    lines = [
        f"{settings['model']} on {settings['data']}, dense {store['dense_test']:.2%}, from {start}; "
        f"{settings['total']} epochs in all for every method, {settings['soft']} of them soft in chipdeploy. "
        f"Time: ONNX Runtime, one thread, as a share of the dense network's ({machine}). "
        f"Raw data: `{path.relative_to(ROOT)}`.",
        "",
        "| FLOPs kept | method | test accuracy | time, batch 1 | time, batch 32 | params |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for cell in store["cells"]:
        groups.setdefault((-cell["keep"], cell["method"]), []).append(cell)
    order = list(NAMES)
    for (keep, method), cells in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        lines.append(f"| {-keep:g} | {NAMES[method]} | {accuracy(cells)} | {times(cells)} | {share(cells, 'params')} |")
    return "\n".join(lines)


def accuracy(cells: list[dict[str, Any]]) -> str:
    values = [100 * cell["test"] for cell in cells]
    text = f"{mean(values):.2f} %"
    return text if len(values) == 1 else f"{text} ({len(values)} seeds, {min(values):.2f}-{max(values):.2f})"


def times(cells: list[dict[str, Any]]) -> str:
    return " | ".join(f"{mean(cell[f'time_batch{batch}']['ratio'] for cell in cells):.2f}" for batch in (1, 32))


def share(cells: list[dict[str, Any]], key: str) -> str:
    return f"{mean(cell[key] for cell in cells):.2f}"


def costs() -> list[str]:
    """What the gates cost."""
    path = RESULTS / "gate-cost.json"
    if not path.is_file():
        return []
    facts = json.loads(path.read_text(encoding="utf-8"))
    low, high = facts["step"]["interval"]
    return [
        f"A soft-pruning step takes {facts['step']['ratio']:.3f} of a plain training step (95 % {low:.3f}-{high:.3f}, "
        f"{facts['step']['model']}, batch {facts['step']['batch']}); cutting torchvision's ResNet-50 takes "
        f"{min(facts['hard_prune_resnet50_s']):.2f} s ({environment_line(facts['environment'])})."
    ]


if __name__ == "__main__":
    main()
