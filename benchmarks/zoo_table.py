"""docs/zoo.md from the results of the zoo: nothing in it is typed by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from zoo_nets import SOURCES

from chipdeploy.run import read_json, write_text

Row = dict[str, Any]
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
HEADS = (
    "model",
    "px",
    "params, M",
    "MACs, G",
    "result",
    "MACs that can go",
    "params that can go",
    "groups",
    "branches",
    "trace, s",
    "cut, s",
    "float64",
    "float32",
    "ONNX",
    "ops, dense ▶ no branches",
    "of them layers",
    "Torch-Pruning",
)
PEER = {
    "equal": "equal",
    "equal-living": "equal¹",
    "wrong": "**wrong**",
    "unpruned": "nothing cut",
    "untold": "runs",
    "crash": "fails",
    "timeout": "no end",
}
INTRODUCTION = """\
Written by `benchmarks/zoo.py --table` from `benchmarks/results/zoo.json`, which `benchmarks/zoo.py` makes.

Every network has 10 classes and random weights in which no norm, bias, gain or layer scale is zero. It is traced as its
library builds it, then cut by up to six plans: all channels, random widths, random widths with a third and with all of
the removable branches gone, one channel a group, and the smallest cut that is legal. Each cut network is compared with
the gated one in float64; the error is the largest difference over the largest output, and *pass* means at most 1e-9
for all plans (or ten times what one rounding after every layer does to the output, where that is more: listed below).
A test that could not fail says nothing, so the gates of every group must be heard in the output. Networks are traced
with two images and compared with three. Giants are cut and run by shapes alone, and computed on a narrow replica with
all of their blocks. For ONNX, half of each group is kept, every second branch goes, and ONNX Runtime is compared with
PyTorch. *Can go* is the share that the smallest legal cut saves: how much is in reach, not how much is wise. Seconds
are of one thread.

Torch-Pruning removes 30 % of the channels of the same network with random weights of the same kind, as its own examples
do it; the result is compared with the dense network in which all that it removed is zero. ¹ equal only where layer
norms, RMS norms and attention scales of the masked network see the living channels alone, as ours do. *Wrong* may also
mean that the network's own code takes statistics over channels, of which there are fewer now.
*No end*: not after 100 s."""
RUNS = ("equal", "equal-living", "wrong", "unpruned", "untold")


def write_table(store: Row) -> None:
    """Write docs/zoo.md."""
    rows = list(store["networks"].values())
    parts = [
        "# The zoo",
        INTRODUCTION,
        "## In short",
        *(_summary(source, [row for row in rows if row["source"] == source]) for source in SOURCES),
        _seconds(rows),
        "## What is not cut, and why",
        _refusals(rows),
        _pins(rows),
        *_others(),
        *(_table(source, [row for row in rows if row["source"] == source]) for source in SOURCES),
        _environment(store["environment"]),
    ]
    write_text(PAGE, "\n\n".join(part for part in parts if part) + "\n")


def _summary(source: str, rows: list[Row]) -> str:
    ours = [row["chipdeploy"] for row in rows if "chipdeploy" in row]
    counts = Counter(row["status"] for row in ours)
    passed = [row for row in ours if row["status"] == "pass"]
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [f"**{source}**, {len(ours)} networks: {found}"]
    older = sum(row.get("images", 2) == 2 for row in ours)
    if older:
        lines.append(f"- **{older} of these rows are older: compared with two images, not with three**")
    if passed:
        lines.append(
            f"- worst error of those that pass: {max(row['float64_error'] for row in passed):.1e} in float64, "
            f"{max(row['float32_error'] for row in passed):.1e} in float32"
        )
        lines.append(
            f"- MACs that can go: {_percent(median(row['prunable_macs'] for row in passed))} in the median, "
            f"below 50 % in {sum(row['prunable_macs'] < 0.5 for row in passed)}"
        )
    exported = [row for row in passed if "onnx_error" in row]
    if exported:
        fewer = [row for row in exported if "bare_ops" in row and row["bare_ops"][0] < row["dense_ops"][0]]
        branched = [row for row in exported if "bare_ops" in row]
        tried, refused = (sum(key in row for row in passed) for key in ("onnx_s", "onnx_refused"))
        lines.append(
            f"- ONNX, tried with {tried} of those that pass: {len(exported)} files run in ONNX Runtime, worst error "
            f"{max(row['onnx_error'] for row in exported):.1e}; {refused} not exported; "
            f"without branches {len(fewer)} of {len(branched)} files have fewer ops"
        )
    peers = [row["torch-pruning"] for row in rows if "torch-pruning" in row]
    if peers:
        ends = Counter(row["status"] for row in peers)
        lines.append(
            f"- Torch-Pruning, {len(peers)} networks: {sum(ends[status] for status in RUNS)} run, of them "
            f"{ends['equal']} equal, {ends['equal-living']} equal¹, {ends['wrong']} wrong, "
            f"{ends['unpruned']} with nothing cut; {ends['crash'] + ends['timeout']} fail"
        )
    return "\n".join(lines)


def _seconds(rows: list[Row]) -> str:
    timed = [(row["chipdeploy"], row["name"]) for row in rows if "prune_s" in row.get("chipdeploy", {})]
    if not timed:
        return ""
    slowest = max(timed, key=lambda item: item[0]["trace_s"] + item[0]["prune_s"])
    both = [row["trace_s"] + row["prune_s"] for row, _ in timed]
    return (
        f"Trace and cut together take {median(both):.1f} seconds of one thread in the median, and {max(both):.1f} "
        f"for the slowest, {slowest[1]}."
    )


def _refusals(rows: list[Row]) -> str:
    kept = [(row, row["chipdeploy"]) for row in rows if row.get("chipdeploy", {}).get("status", "pass") != "pass"]
    lines = [f"- `{row['source']}:{row['name']}`, {ours['status']}: {ours['reason']}" for row, ours in kept]
    for row in rows:
        ours = row.get("chipdeploy", {})
        if ours.get("status") == "pass" and ours.get("rounding"):
            lines.append(
                f"- `{row['source']}:{row['name']}`, pass: {ours['float64_error']:.1e} off ({ours['worst_plan']}), "
                f"where rounding alone moves the output by {ours['rounding']:.1e}"
            )
    return "\n".join(lines)


def _pins(rows: list[Row]) -> str:
    channels: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in rows:
        reasons: dict[str, int] = {}
        for reason, count in row.get("chipdeploy", {}).get("pins", []):
            kind = _kind(reason)
            reasons[kind] = reasons.get(kind, 0) + count
        channels.update(reasons)
        networks.update(reasons.keys())
    if not channels:
        return ""
    body = [[reason, str(networks[reason]), str(count)] for reason, count in channels.most_common(12)]
    return "Of the three most frequent reasons of each network:\n\n" + _grid(("reason", "networks", "channels"), body)


def _kind(reason: str) -> str:
    """A reason without the names of modules and tensors."""
    reason = re.sub(r" in [\w.*]+(?=:)", "", reason)
    return re.sub(r"[\w*]+(\.[\w*]+)+", "…", reason)


def _others() -> Iterator[str]:
    """What other scripts found of the same invariant, where their results are there."""
    results = Path(__file__).with_name("results")
    if (path := results / "random-graphs.json").is_file():
        yield _random_graphs(read_json(path))
    if (path := results / "zoo-soft.json").is_file():
        yield _soft(read_json(path))


def _random_graphs(found: Row) -> str:
    kinds = (found["ruled"], found["any"])
    graphs, accepted, refused, wrong, crashed = (
        sum(kind[key] for kind in kinds) for key in ("graphs", "accepted", "refused", "wrong", "crashed")
    )
    worst = max(kind["worst_error"] for kind in kinds)
    return (
        "## Random networks\n\n"
        f"Of {graphs:,} small networks, drawn at random from the ops that the rules know and from others "
        f"(`benchmarks/random_graphs.py`), {accepted:,} were accepted, {refused:,} refused, {wrong} were wrong and "
        f"{crashed} crashed. The worst error of those accepted is {worst:.1e}."
    )


def _soft(found: Row) -> str:
    heads = ("model", "px", "MACs kept", "params kept", "ops, dense ▶ cut", "ONNX", "s")
    lines = [
        [
            row["model"],
            str(row["image"]),
            _percent(row["macs_kept"]),
            _percent(row["params_kept"]),
            f"{row['ops_dense']} ▶ {row['ops_cut']}",
            f"{row['onnx_error']:.0e}",
            f"{row['seconds']:.0f}",
        ]
        for row in found["models"]
    ]
    return (
        f"## {found['steps']} steps of soft pruning to half of the MACs\n\n"
        "By `benchmarks/zoo_soft.py`: traced, pruned softly on real images, cut, exported, compared in ONNX Runtime."
        "\n\n" + _grid(heads, lines)
    )


def _table(source: str, rows: list[Row]) -> str:
    return f"## {source}\n\n" + _grid(HEADS, [list(_cells(row)) for row in rows])


def _cells(row: Row) -> Iterator[str]:
    ours, peer = row.get("chipdeploy", {}), row.get("torch-pruning", {})
    yield f"{row['name']}{' (replica)' if row['replica'] else ''}"
    yield str(row["image"])
    yield _number(ours.get("params"), 1e6)
    yield _number(ours.get("macs"), 1e9)
    yield ours.get("status", "")
    yield _percent(ours.get("prunable_macs"))
    yield _percent(ours.get("prunable_params"))
    yield str(ours.get("groups", ""))
    yield str(ours.get("branches", ""))
    yield _plain(ours.get("trace_s"))
    yield _plain(ours.get("prune_s"))
    for name in ("float64_error", "float32_error", "onnx_error"):
        yield f"{ours[name]:.0e}" if name in ours else ""
    dense, bare = ours.get("dense_ops"), ours.get("bare_ops")
    for place in (0, 1):
        yield "" if dense is None else f"{dense[place]}" if bare is None else f"{dense[place]} ▶ {bare[place]}"
    off = f" ({peer['error']:.0e})" if peer.get("status") == "wrong" else ""
    yield PEER.get(peer.get("status", ""), "") + off


def _grid(heads: Iterable[str], body: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [list(heads)]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    lines += [[cell.replace("|", "\\|") for cell in cells] for cells in body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}".replace("%", " %")


def _environment(found: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"Made on {found['machine']}; Python {found['python']}, {versions}."
