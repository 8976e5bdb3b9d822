"""The picture of a pruned network: how many channels each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chipdeploy.errors import InputError
from chipdeploy.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by lightness and, the mark, by shape: also in grey and with any colour vision.
DENSE, PRUNED, REMOVED = "#c6d9ec", "#08519c", "#d55e00"
LAYERS_A_ROW = 60  # More, and the names of the layers run into each other.
FEWEST_PLACES = 10  # Fewer, and the bars become blocks.
WIDTH_IN, ROW_IN = 11.0, 2.6
SETTINGS = {
    "svg.hashsalt": "chipdeploy",  # The same layers give the same bytes.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def channels_plot(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the channels of each layer, dense behind pruned, to `path` (.svg, or .png for a look).

    Args:
        layers: `{"name": ..., "dense": channels, "kept": channels}` in the order of the network. Many layers are
            broken into rows, each with its own scale.

    Raises:
        InputError: there is no layer.
    """
    if not layers:
        raise InputError("there are no layers to draw; give a result with at least one layer")
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(layers) / LAYERS_A_ROW)
    in_row = math.ceil(len(layers) / rows)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH_IN, ROW_IN * rows + 1.0), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        for number, axis in enumerate(axes):
            _draw(axis, layers[number * in_row : (number + 1) * in_row], in_row)
        figure.align_ylabels(axes)
        figure.legend(handles=_legend(), loc="outside upper center", ncols=3, frameon=False)
        # Without these two, the file would change with the day and with matplotlib's version.
        unstamped = {"Date": None, "Creator": None} if path.suffix == ".svg" else {}
        figure.savefig(path, format=path.suffix[1:], metadata=unstamped, dpi=110)


def latency_plot(curves: Mapping[str, Mapping[str, Sequence[float]]], share: float, path: Path) -> None:
    """Draw time over the dense one's against every budget's share, with the 95 % band and the goal, to `path` (.svg).

    Args:
        curves: `{"flops": {"keep": [...], "ratio": [...], "low": [...], "high": [...]}, ...}`.
        share: the goal, of the dense time.

    Raises:
        InputError: there is no curve.
    """
    if not curves:
        raise InputError("there are no curves to draw; give at least one")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS), atomic(path) as temporary:
        figure = Figure(figsize=(WIDTH_IN, ROW_IN + 0.6), layout="constrained")
        for number, (axis, (kind, curve)) in enumerate(
            zip(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True)
        ):
            axis.fill_between(curve["keep"], curve["low"], curve["high"], color=DENSE, label="95 % interval")
            axis.plot(curve["keep"], curve["ratio"], color=PRUNED, marker="o", markersize=3, label="predicted")
            axis.axhline(share, color=REMOVED, linestyle="--", label="goal")
            axis.set(xlabel=f"{kind} kept", ylabel="" if number else "of the dense time", xlim=(0, 1), ylim=(0, None))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None, "Creator": None})


def _draw(axis: Axes, layers: Sequence[Mapping[str, Any]], places: int) -> None:
    """One row of bars; `places` are the bars of a full row, so that all rows have equally wide ones."""
    from matplotlib.ticker import MaxNLocator

    dense, kept = [layer["dense"] for layer in layers], [layer["kept"] for layer in layers]
    at = range(len(layers))
    axis.bar(at, dense, width=0.8, color=DENSE, linewidth=0)
    axis.bar(at, kept, width=0.8, color=PRUNED, linewidth=0)
    gone = [place for place in at if kept[place] == 0]
    axis.plot(gone, [0.05 * max(*dense, 1)] * len(gone), "x", color=REMOVED, markersize=5, markeredgewidth=1.6)
    axis.set_xlim(-0.7, max(places, FEWEST_PLACES) - 0.3)
    axis.set_xticks(at, [layer["name"] for layer in layers], rotation=90, fontsize=9 if places <= 30 else 6.5)
    axis.tick_params(axis="x", length=2, pad=2)
    axis.set_ylim(0, 1.06 * max(*dense, 1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_ylabel("channels")
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mark = Line2D([], [], color=REMOVED, marker="x", linestyle="", markersize=6, markeredgewidth=1.6)
    mark.set_label("layer removed")
    return [Patch(color=DENSE, label="dense"), Patch(color=PRUNED, label="kept"), mark]
