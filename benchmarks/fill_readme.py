#!/usr/bin/env python3
"""Write the README's tour and results, the tables of docs/engines.md, and what the programs of docs/own-model.md print,
from what was really printed and measured.

fill_readme.py               the results, from benchmarks/results/*.json
fill_readme.py --tour        the tour too: runs the demo and takes its output
fill_readme.py --programs    what the programs of docs/own-model.md print, too: runs them, a minute or two each
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from compare import PLAIN

from chipdeploy.latency.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "chipnet": "**chipdeploy** (widths in steps of 16, whole blocks)",
    "chipnet-free": "chipdeploy `--align 1` (free widths)",
    "global": "one-shot, BatchNorm scale over the whole network",
    "uniform": "one-shot, the same share of every group",
    "torch-pruning": "Torch-Pruning, global group-L2",
    "scratch": "uniformly narrower, from scratch for the dense and these epochs together",
}

PROGRAMS = "detector", "unet"

FILES = {
    "precision": "precision.json",
    "rtx": "rtx-builds.json",
    "targets": "targets-cpu.json",
    "targets-gpu": "targets-h100.json",
    "bundle": "bundle-check.json",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tour", action="store_true")
    parser.add_argument("--programs", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if options.tour:
        text = replace(text, "tour", tour())
    text = replace(text, "results", "\n\n".join(results()))
    readme.write_text(text, encoding="utf-8")
    engines = ROOT / "docs" / "engines.md"
    text = engines.read_text(encoding="utf-8")
    for name, fill in FILLS.items():
        if (path := RESULTS / FILES[name]).is_file():
            text = replace(text, name, fill(json.loads(path.read_text(encoding="utf-8")), path))
    engines.write_text(text, encoding="utf-8")
    if options.programs:
        own_model = ROOT / "docs" / "own-model.md"
        text = own_model.read_text(encoding="utf-8")
        for name in PROGRAMS:
            text = replace(text, name, program(text, name))
        own_model.write_text(text, encoding="utf-8")


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
    machine = environment()["machine"]
    return f"What `make demo` prints ({machine}):\n\n{lines}"


def program(page: str, name: str) -> str:
    """What the page's program of that name prints, in a folder of its own."""
    code = re.search(rf"^```python\n(# {name}\.py\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert code, name
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code[1]],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            text=True,
            capture_output=True,
        )
    lines = "\n".join("    " + line.rstrip() for line in done.stdout.splitlines())
    return f"What it prints ({environment()['machine']}, one thread):\n\n{lines}"


def results() -> list[str]:
    """A section a results file."""
    return [
        section(path) for path in sorted(RESULTS.glob("*.json")) if "dense_test" in json.loads(path.read_text())
    ] + costs()


def environment_line(environment: dict[str, Any]) -> str:
    return str(environment["machine"])


def section(path: Path) -> str:
    """Accuracy and measured time of every method, mean over seeds."""
    store = json.loads(path.read_text(encoding="utf-8"))
    settings = store["settings"]
    start = "the given checkpoint" if settings["given_weights"] else f"{settings['dense_epochs']} epochs of training"
    # Cells may come from several machines; the ratios of a cell are of one.
    here = environment_line(store["environment"])
    cells_of = newest(store["cells"])
    shown = [cell for cells in cells_of.values() for cell in cells]
    trained = "; ".join(sorted({cell.get("machine", here) for cell in shown}))
    timed = "; ".join(sorted({cell.get("timed_on", cell.get("machine", here)) for cell in shown}))
    paces = {one["pace"] for cells in cells_of.values() for one in cells}
    lines = [
        f"{settings['model']} on {settings['data']}, dense {store['dense_test']:.2%}, from {start}; "
        f"{settings['total']} epochs in all for every method, {settings['soft']} of them soft in chipdeploy; "
        f"finetuned by {'orthogonal steps' if any(paces) else 'plain SGD, the default before orthogonal steps'}; "
        f"one run each where no number is given, the highest accuracy in bold; {ending(cells_of)}. "
        f"Time: ONNX Runtime, one thread, as a share of the dense network's ({timed}). Trained on: {trained}. "
        f"Raw data: `{path.relative_to(ROOT)}`.",
        "",
        "| FLOPs kept | method | test accuracy | time, batch 1 | time, batch 32 | params |",
        "|---|---|---|---|---|---|",
    ]
    order = list(NAMES)
    best = {keep: max(tested(cells) for (at, _), cells in cells_of.items() if at == keep) for keep, _ in cells_of}
    for (keep, method), cells in sorted(cells_of.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        kept = mean(cell["macs"] for cell in cells)
        name = NAMES[method] + (f"; reaches {kept:.2f} only" if kept > -keep else "")
        name += f"; its nearest cut keeps {kept:.2f}" if kept < 0.95 * -keep else ""
        name += "; plain SGD" if any(paces) and not cells[0]["pace"] else ""
        right = accuracy(cells, bold=tested(cells) == best[keep])
        lines.append(f"| {-keep:g} | {name} | {right} | {times(cells)} | {share(cells, 'params')} |")
    return "\n".join([*lines, "", by_time(cells_of)])


def ending(cells_of: dict[tuple[float, str], list[dict[str, Any]]]) -> str:
    """Which epoch's weights the networks have; older cells of the others do not say, and have the last's."""
    others = [cell for (_, method), cells in cells_of.items() if not method.startswith("chipnet") for cell in cells]
    last = [cell for cell in others if "best_epoch" not in cell]
    if len(last) == len(others):
        return "ours end with their best epoch by validation images, the others with their last"
    but = f", but for {len(last)} of the others, which end with their last" if last else ""
    return f"all end with their best epoch by validation images{but}"


def by_time(cells_of: dict[tuple[float, str], list[dict[str, Any]]]) -> str:
    """What the others reach in the time that our networks take."""
    others = [cells for (_, method), cells in cells_of.items() if not method.startswith("chipnet")]
    said = []
    for (keep, method), cells in sorted(cells_of.items()):
        if method != "chipnet":
            continue
        rivals = [tested(other) for other in others if took(other) <= took(cells)]
        best = f"the best of the others that is as fast reaches {percent(max(rivals))}" if rivals else "none is as fast"
        said.append(f"where steps of 16 keep {-keep:g} and take {took(cells):.2f} ({percent(tested(cells))}), {best}")
    fastest = min(others, key=took)
    last = f"the fastest of the others takes {took(fastest):.2f} ({percent(tested(fastest))})"
    return f"By time instead of FLOPs, at batch 1: {'; '.join([*said, last])}."


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def took(cells: list[dict[str, Any]]) -> float:
    """Mean share of the dense time at batch 1."""
    return float(mean(cell["time_batch1"]["ratio"] for cell in cells))


def newest(cells: list[dict[str, Any]]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Cells by -keep and method: of a method those with orthogonal steps, where there are any."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if (PLAIN | cell)["lr"] is None and (PLAIN | cell)["distill"] is None:  # the others are trials
            found.setdefault((-cell["keep"], cell["method"]), []).append(PLAIN | cell)
    for alike in found.values():
        alike[:] = [one for one in alike if one["pace"] == max(other["pace"] for other in alike)]
    return found


def tested(cells: list[dict[str, Any]]) -> float:
    return float(mean(cell["test"] for cell in cells))


def accuracy(cells: list[dict[str, Any]], *, bold: bool) -> str:
    values = [100 * cell["test"] for cell in cells]
    text = f"**{percent(tested(cells))}**" if bold else percent(tested(cells))
    return text if len(values) == 1 else f"{text} ({len(values)} runs, {min(values):.2f}-{max(values):.2f})"


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


def source(store: dict[str, Any], path: Path) -> str:
    return f"({environment_line(store['environment'])}; raw data: `{path.relative_to(ROOT)}`)"


def precisions(store: dict[str, Any], path: Path) -> str:
    """Accuracy and time of every pruned network in every precision."""
    lines = [
        f"Pruned networks in ONNX Runtime on the CPU, batch 1, all test images {source(store, path)}:",
        "",
        "| network | FLOPs kept | precision | test accuracy | time of fp32 | file |",
        "|---|---|---|---|---|---|",
    ]
    for network in store["networks"]:
        for precision, row in network["precisions"].items():
            low, high = row.get("interval", (1.0, 1.0))
            time = "1" if precision == "fp32" else f"{row['time_of_fp32']:.2f} (95 % {low:.2f}-{high:.2f})"
            lines.append(
                f"| {network['model']}, {network['data']} | {network['keep']:g} | {precision} | {row['test']:.2%} "
                f"| {time} | {row['bytes'] / 1e6:.2f} MB |"
            )
    return "\n".join(lines)


def rtx_builds(store: dict[str, Any], path: Path) -> str:
    """Seconds and sizes of the engines of every network."""
    gpus = ", ".join(store["gpus"])
    cells = [f"{name} {precision}" for name in ("dense", "pruned") for precision in ("fp32", "fp16", "int8")]
    lines = [
        f"One engine for {gpus}, batches 1 to 8, built without a GPU {source(store, path)}. "
        "Seconds of the build and MB of the engine; cut to half of the MACs where the network allows that:",
        "",
        f"| network | pixels | {' | '.join(cells)} |",
        f"|---|---|{'---|' * len(cells)}",
    ]
    for row in store["networks"]:
        shown = [engine_cell(row.get(name, {}).get(precision)) for name, precision in map(str.split, cells)]
        lines.append(f"| {row['model']} | {row['image_size']} | {' | '.join(shown)} |")
    refused = [f"- {row['model']}: {row['refused']}" for row in store["networks"] if "refused" in row]
    refused += [
        f"- {row['model']}, {name}, {precision}: {row[name][precision]['refused']}"
        for row in store["networks"]
        for name in ("dense", "pruned")
        for precision in ("fp32", "fp16", "int8")
        if "refused" in row.get(name, {}).get(precision, {})
    ]
    if any("not_for" in cell for row in store["networks"] for cell in _cells(row)):
        lines += [
            "",
            "\\* not for sm75: TensorRT-RTX has no fp32 matrix product there, and this network's is no linear layer.",
        ]
    return "\n".join([*lines, *(["", "Refused:", "", *refused] if refused else [])])


def _cells(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for name in ("dense", "pruned") for cell in row.get(name, {}).values() if isinstance(cell, dict)]


def engine_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "refused" in row:
        return "refused"
    star = " *" if "not_for" in row else ""
    return f"{row['seconds']:.1f} s, {row['bytes'] / 1e6:.1f} MB{star}"


def targets(store: dict[str, Any], path: Path) -> str:
    """Time of the pruned networks as a share of the dense ones', on every target."""
    lines = [
        f"Pruned over dense, random weights {source(store, path)}:",
        "",
        "| network | target | batch | asked for | MACs kept | time of dense | dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in store["targets"]:
        key = f"| {cell['model']} | {cell['target']} | {cell['batch']} | {cell['wanted']}"
        if "refused" in cell:
            lines.append(f"{key} | | {cell['refused']} | |")
            continue
        facts = cell.get("device", cell["end to end"])
        low, high = facts["interval"]
        lines.append(
            f"{key} | {cell['macs']:.2f} | {facts['ratio']:.2f} (95 % {low:.2f}-{high:.2f}) "
            f"| {facts['dense_ms']:.3g} ms |"
        )
    return "\n".join(lines)


def bundle(store: dict[str, Any], path: Path) -> str:
    """Whether the bundle's own script agrees with torch."""
    return (
        f"In a clean environment of {', '.join(store['packages'])}, infer.py gives the same class as PyTorch on "
        f"{store['same_top1']['program']} of {store['images']} test images {source(store, path)}."
    )


FILLS = {
    "precision": precisions,
    "rtx": rtx_builds,
    "targets": targets,
    "targets-gpu": targets,
    "bundle": bundle,
}

if __name__ == "__main__":
    main()
