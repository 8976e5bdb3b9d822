"""The report of a run: one Markdown page and one picture, with the measured speedup on the first line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chipdeploy.errors import RunError
from chipdeploy.files import atomic
from chipdeploy.latency.measure import Comparison, headline
from chipdeploy.report.files import choice_section, engines_section, files_section
from chipdeploy.report.plots import channels_plot
from chipdeploy.report.tables import (
    NOTHING,
    Artifact,
    bytes_text,
    count_text,
    markdown_grid,
    markdown_table,
    percent_text,
    summary_rows,
)

PAGE, PICTURE = "report.md", "channels.svg"
NOT_BENCHMARKED = "not benchmarked yet: run chipdeploy bench"
NOUNS = {"flops": "MACs", "params": "parameters", "volume": "activation volume", "channels": "channels"}
HISTORY_ROWS = 20
HISTORY = (
    ("epoch", "epoch"),
    ("loss", "loss"),
    ("budget_soft", "budget, soft"),
    ("budget_target", "target"),
    ("crisp", "crisp gates"),
    ("val_soft", "validation, soft"),
    ("val_cut", "validation, cut"),
)
SHARES = ("crisp", "val_soft", "val_cut")


def write_report(
    folder: Path,
    result: Artifact,
    export: Artifact | None,
    bench: Sequence[Artifact] | None,
    metrics: Sequence[Artifact],
) -> Path:
    """Write `report.md` and `channels.svg` into `folder` and return the page's path. Each file is replaced in one step.

    Args:
        result: the run's result; export, bench: what was exported and measured, or None; metrics: a dict an epoch.

    Raises:
        RunError: an artifact lacks what the report needs, or the folder cannot be written.
    """
    try:
        comparisons = [Comparison.from_dict(item) for item in bench or ()]
        page = _page(result, export, bench, comparisons, metrics)
        with atomic(folder / PICTURE) as path:
            channels_plot(result["layers"], path)
    except (KeyError, TypeError, IndexError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise RunError(f"an artifact is damaged ({cause}); run the step that wrote it again") from error
    with atomic(folder / PAGE) as path:
        path.write_text(page, encoding="utf-8")
    return folder / PAGE


def first_line(comparisons: Sequence[Comparison]) -> str:
    """The headline that matters: a batch size where pruned is not faster comes before one where it is."""
    if not comparisons:
        return NOT_BENCHMARKED
    return headline(min(comparisons, key=lambda comparison: comparison.faster))


def budget_sentence(budget: Artifact) -> str:
    """`kept 29.9 % of the MACs: 12.2 of 40.8 M, budget 30 %`; says so where the budget is exceeded."""
    dense, achieved, keep = budget["dense"], budget["achieved"], budget["keep"]
    known = budget["kind"] in NOUNS
    noun, unit = (NOUNS[budget["kind"]], "") if known else (budget["kind"], f" {budget['unit']}")
    # A ratio of times is the median over blocks, and not the ratio of two medians.
    kept, whole = count_text(budget.get("kept", achieved * dense)), count_text(dense)
    if kept[-2:] == whole[-2:] and whole[-2] == " ":
        kept = kept[:-2]
    amounts = f"{kept} of {whole}{unit}"
    # A share that is over by less than one part in a million is rounding.
    over = ", OVER the budget" if achieved > keep * (1 + 1e-6) else ""
    return f"kept {percent_text(achieved)} of the {noun}: {amounts}, budget {percent_text(keep)}{over}"


def _page(
    result: Artifact,
    export: Artifact | None,
    bench: Sequence[Artifact] | None,
    comparisons: Sequence[Comparison],
    metrics: Sequence[Artifact],
) -> str:
    """The whole page; a section that has nothing to say is left out."""
    sections = [
        first_line(comparisons),
        f"# {result['model']} on {result['data']}",
        _other_headlines(comparisons),
        markdown_table(summary_rows(result, export, bench)),
        f"{_sentence(budget_sentence(result['budget']))}\n{_memory_sentence(result)}{_accuracy_sentence(result)}",
        f"![channels kept in each layer]({PICTURE})",
        _removed(result["removed_branches"]),
        _measurement(comparisons),
        files_section(export),
        choice_section(export),
        engines_section(export),
        _environment(comparisons),
        _history(metrics),
        _next(export, comparisons),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _other_headlines(comparisons: Sequence[Comparison]) -> str:
    first = first_line(comparisons)
    lines = [line for comparison in comparisons if (line := headline(comparison)) != first]
    return "\n".join(f"- {line}" for line in lines)


def _memory_sentence(result: Artifact) -> str:
    """`Memory at batch 1: 349 kB of at most 350 kB`; empty where none was limited."""
    if not (memory := result.get("memory")):
        return ""
    size, limit = sum(memory["pruned"].values()), 1e6 * memory["limit_mb"]
    over = ", OVER the limit" if size > limit else ""
    return (
        f"Weights and activations at batch {memory['batch']}: {bytes_text(size)} of at most {bytes_text(limit)}{over}, "
        "as planned by the ONNX file.\n"
    )


def _accuracy_sentence(result: Artifact) -> str:
    accuracy, validation = result["accuracy"], result["validation"]
    return (
        f"Test accuracy on {accuracy['test_images']} images, looked at once: {percent_text(accuracy['dense'])} dense, "
        f"{percent_text(accuracy['pruned'])} pruned (seed {result['seed']}). "
        f"Validation accuracy around the cut: {percent_text(validation['soft'])} soft, "
        f"{percent_text(validation['cut'])} cut."
    )


def _removed(branches: Sequence[str]) -> str:
    if not branches:
        return "## Removed branches\n\nNone: every branch keeps some channels."
    return f"## Removed branches\n\n{len(branches)}: {', '.join(f'`{branch}`' for branch in branches)}."


def _measurement(comparisons: Sequence[Comparison]) -> str:
    """How the times were taken, and what the control found."""
    if not comparisons:
        return ""
    method = (
        "Dense and pruned ran interleaved in one process, in blocks of the order dense, pruned, control, control, "
        "pruned, dense, where the control is the dense network once more; every other block has dense and control "
        "swapped. Small networks run once untimed at each place, so the times are those of warm caches. The ratio is "
        "the median over blocks of pruned / dense time, its interval a 95 % bootstrap over blocks. A speedup is "
        "claimed only where the whole interval lies below 1. The control should be 1."
    )
    lines = [
        (
            item.where,
            str(len(item.dense_s)),
            f"{item.ratio:.3f} ({_interval(item.ratio_interval)})",
            f"{item.control_ratio:.3f} ({_interval(item.control_interval)})",
            f"{item.control_spread:.1%}"[:-1] + " %",
            item.noise or "quiet",
        )
        for item in comparisons
    ]
    headers = ("", "blocks", "pruned / dense", "control / dense", "control spread", "noise")
    parts = ("## How it was measured", method, markdown_grid(headers, lines), _percentiles(comparisons))
    return "\n\n".join(parts)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def _percentiles(comparisons: Sequence[Comparison]) -> str:
    lines = [
        (
            f"{network}, {item.where}",
            *(f"{times[p]:.3f}" if p in times else NOTHING for p in ("p50", "p90", "p99")),
        )
        for item in comparisons
        for network in ("dense", "pruned")
        for times in (item.percentiles_ms(network),)
    ]
    note = "Milliseconds an inference of the whole batch; p90 needs 64 inferences, p99 needs 662."
    return f"{markdown_grid(('latency', 'p50 ms', 'p90 ms', 'p99 ms'), lines)}\n\n{note}"


def _environment(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    found = comparisons[0].environment
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    facts = {
        "machine": found.get("machine"),
        "hardware threads": found.get("threads"),
        "frequency": f"{found['frequency_mhz']} MHz" if found.get("frequency_mhz") else None,
        "load before": _load(found.get("load_before")),
        "load after": _load(found.get("load_after")),
        "system": found.get("os"),
        "packages": f"python {found.get('python')}, {versions}" if versions else None,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return "## Environment\n\n" + "\n".join(lines) if lines else ""


def _load(averages: Sequence[float] | None) -> str | None:
    return ", ".join(f"{value:.2f}" for value in averages) + " (1, 5, 15 minutes)" if averages else None


def _history(metrics: Sequence[Artifact]) -> str:
    """The soft-pruning epochs, thinned out evenly; the first and the last stay."""
    epochs = [line for line in metrics if line.get("phase") == "soft"]
    if not epochs:
        return ""
    shown = [epochs[number] for number in _evenly(len(epochs), HISTORY_ROWS)]
    lines = [[_history_cell(key, epoch.get(key)) for key, _ in HISTORY] for epoch in shown]
    note = f"\n\n{len(shown)} of {len(epochs)} epochs." if len(shown) < len(epochs) else ""
    return f"## Soft pruning\n\n{markdown_grid([header for _, header in HISTORY], lines)}{note}"


def _history_cell(key: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if key in SHARES:
        return percent_text(value)
    return f"{value:.4g}" if abs(value) < 1000 else count_text(value)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count - 1, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]


def _next(export: Artifact | None, comparisons: Sequence[Comparison]) -> str:
    return f"## What to run next\n\n{_advice(export, comparisons)}"


def _advice(export: Artifact | None, comparisons: Sequence[Comparison]) -> str:
    if not export:
        return "`chipdeploy export` writes the dense and the pruned network as ONNX files and checks them."
    if not comparisons:
        return "`chipdeploy bench` times the two ONNX files against each other on this machine."
    if any(comparison.noisy for comparison in comparisons):
        return "`chipdeploy bench` again on a quieter machine: the control found these times noisy."
    if not all(comparison.faster for comparison in comparisons):
        return (
            "Fewer MACs alone do not make a network faster: `chipdeploy prune` with a smaller budget, "
            "then `chipdeploy export` and `chipdeploy bench`."
        )
    return "`chipdeploy bench` on the machine that will run the network: a speedup holds only where it was measured."
