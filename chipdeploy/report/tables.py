"""Dense against pruned as a table: for the terminal and for Markdown, from the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chipdeploy.latency.measure import Comparison, ratio_texts

if TYPE_CHECKING:
    from rich.table import Table

Artifact = Mapping[str, Any]

HEADERS = ("", "dense", "pruned", "change")
NOTHING = "-"
COSTS = (("macs", "MACs"), ("params", "parameters"), ("volume", "activation volume"), ("channels", "channels"))


@dataclass(frozen=True)
class Row:
    """One line of the summary, ready to print: what, the dense value, the pruned value, what became of it."""

    what: str
    dense: str
    pruned: str
    change: str

    def cells(self) -> tuple[str, str, str, str]:
        """In the order of `HEADERS`."""
        return self.what, self.dense, self.pruned, self.change


def summary_rows(result: Artifact, export: Artifact | None, bench: Sequence[Artifact] | None) -> list[Row]:
    """The summary of a run: accuracy, costs, the ONNX files where exported, the latency at each batch where measured.

    Args:
        result: the `result.json` of a run.
        export: its `export.json`, or None.
        bench: a `Comparison.to_dict` for each batch size, or None.

    Raises:
        RunError: a damaged comparison.
    """
    rows = [_accuracy_row(result["accuracy"])]
    dense, pruned = result["costs"]["dense"], result["costs"]["pruned"]
    rows += [_row(what, dense[key], pruned[key], _count(key)) for key, what in COSTS if key in dense and key in pruned]
    if memory := result.get("memory"):
        one, other = (memory[side]["weights"] + memory[side]["activations"] for side in ("dense", "pruned"))
        rows.append(_row(f"memory, batch {memory['batch']}", one, other, bytes_text))
    if export:
        rows.append(_row("ONNX size", export["dense"]["bytes"], export["pruned"]["bytes"], bytes_text))
        rows.append(_row("ONNX ops", export["dense"]["ops"], export["pruned"]["ops"], str))
    return rows + [_latency_row(Comparison.from_dict(item)) for item in bench or ()]


def render_table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table."""
    from rich.table import Table

    table = Table()
    for number, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row.cells())
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without a newline at its end."""
    return markdown_grid(HEADERS, [row.cells() for row in rows])


def markdown_grid(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Any table in Markdown: the first column to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(map(_escaped, cells))} |" for cells in (headers, rule, *lines))


def count_text(value: float) -> str:
    """A count in three digits: 950, 40.6 M, 1.25 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        # From 999.5 on, three digits would read 1000.
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else _three_digits(value)


def bytes_text(value: float) -> str:
    """A size in decimal units: 812 B, 1.09 MB."""
    text = count_text(value)
    return f"{text}B" if " " in text else f"{text} B"


def percent_text(share: float) -> str:
    """A share in per cent with at most one digit: 30 %, 29.9 %."""
    return f"{round(share * 100, 1):g} %"


def _accuracy_row(accuracy: Artifact) -> Row:
    points = round((accuracy["pruned"] - accuracy["dense"]) * 100, 2)
    change = f"{points:+.2f} points" if points else "0 points"
    return Row("test accuracy", f"{accuracy['dense']:.2%}"[:-1] + " %", f"{accuracy['pruned']:.2%}"[:-1] + " %", change)


def _latency_row(comparison: Comparison) -> Row:
    ratio, low, high = ratio_texts(comparison)
    return Row(
        f"latency, {comparison.where}",
        f"{_three_digits(comparison.dense_ms)} ms",
        f"{_three_digits(comparison.pruned_ms)} ms",
        f"{ratio}x (95 % {low}-{high})",
    )


def _row(what: str, dense: float, pruned: float, text: Callable[[float], str]) -> Row:
    return Row(what, text(dense), text(pruned), _change(dense, pruned))


def _count(key: str) -> Callable[[float], str]:
    """Channels are few enough to be written out."""
    return str if key == "channels" else count_text


def _change(dense: float, pruned: float) -> str:
    if not dense:
        return NOTHING
    percent = round((pruned / dense - 1) * 100)
    return f"{percent:+d} %" if percent else "0 %"


def _three_digits(value: float) -> str:
    """0.470, 4.70, 47.0, 470: no exponent for the values that are measured here."""
    size = abs(value)
    digits = 3 if size < 0.9995 else 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{digits}f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
