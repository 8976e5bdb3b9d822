"""A progress bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .output import console, note

if TYPE_CHECKING:
    from chipdeploy.latency.profile import LatencyProfile


class ProgressWatcher:
    """Shows phases, the loss, V against V0 and the time left. Implements `training.loop.Watcher`."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._name = ""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase of `epochs` epochs of `steps` steps begins."""
        self._name = name
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=epochs * steps, facts="")

    def step(self, steps: int, facts: dict[str, float]) -> None:
        """`steps` more steps are done."""
        if self._progress is not None and self._task is not None:
            text = "  ".join(f"{key} {value:.3f}" for key, value in facts.items())
            self._progress.update(self._task, advance=steps, facts=text)

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done: one line that stays."""
        text = epoch_line(row)
        if self._progress is not None:
            self._progress.console.print(text)
        else:
            note(text)


def epoch_line(row: dict[str, Any]) -> str:
    """One epoch's figures in words."""
    parts = [f"{row['phase']} epoch {row['epoch']}", f"loss {row['loss']:.3f}"]
    if row["phase"] == "soft":
        parts += [
            f"V(z) {row['budget_soft']:.3f} (budget {row['budget_target']:g}, cut {row['budget_cut']:.3f})",
            f"crisp {row['crisp']:.0%}",
            f"val soft {row['val_soft']:.2%}, cut {row['val_cut']:.2%}",
        ]
    else:
        parts.append(f"val {row['val']:.2%}")
    return "  ".join(parts)


@contextmanager
def watching() -> Iterator[ProgressWatcher]:
    """A watcher for the length of a command."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield ProgressWatcher(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        yield ProgressWatcher(progress)


@contextmanager
def rounds() -> Iterator[Callable[[LatencyProfile, float], None]]:
    """A function that says how far the measuring of a profile is: a bar, or a line a round."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda profile, share: note(round_line(profile))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("measuring a profile", total=1.0, facts="", visible=False)

        def advance(profile: LatencyProfile, share: float) -> None:
            progress.update(task, completed=share, facts=round_line(profile), visible=True)

        yield advance


def round_line(profile: LatencyProfile) -> str:
    """`round 4: 32 networks, dense 1.13 ms, equal blocks 2 % apart`."""
    last = profile.rounds[-1]
    spread = last.comparison(last.variants[0]).control_spread
    noisy = f"; NOISY: {last.noise}" if last.noise else ""
    return (
        f"round {len(profile.rounds)}: {len(profile.variants)} networks, dense {last.dense_ms:.3g} ms, "
        f"equal blocks {spread:.0%} apart{noisy}"
    )


@contextmanager
def steps() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """Two functions for work in named steps: one begins a step, one says how far something in it is."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield note, lambda name, done, size: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=None, facts="")

        def step(name: str) -> None:
            progress.update(task, description=name, completed=0, total=None, facts="")

        def advance(name: str, done: int, size: int) -> None:
            progress.update(task, completed=done, total=size, facts=name)

        yield step, advance
