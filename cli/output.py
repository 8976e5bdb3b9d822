"""What commands print: text for people on stdout, or one JSON object; progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from chipdeploy.errors import ChipdeployError

SCHEMA = 1
_answer: TextIO | None = None  # where the object of --json goes while nothing else may go there


def console(*, stderr: bool = False) -> Console:
    """A rich console; colours only on a terminal, NO_COLOR honoured."""
    from rich.console import Console

    # No markup: a path may hold brackets.
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


def quoted(path: Path | str) -> str:
    """A path as a shell takes it, for commands that people paste."""
    return shlex.quote(str(path))


def flags(given: dict[str, tuple[Any, Any]]) -> str:
    """Flags for a command that people paste, those with another value than the default: ` --threads 2 --exclude 'a.*'`.

    Args:
        given: by flag its value and its default; a tuple gives the flag once for each.
    """
    found = []
    for name, (value, default) in given.items():
        if value is not None and value != default:
            found += [f" {name} {quoted(str(one))}" for one in (value if isinstance(value, tuple) else (value,))]
    return "".join(found)


def own_images(channels: int, image_size: int) -> tuple[str | None, str]:
    """What stands for the data in a command that people complete, and a word on it; nothing for the embedded images."""
    if (channels, image_size) == (1, 28):
        return None, ""
    return "DATA", f"   (DATA: your images, {channels}x{image_size}x{image_size})"


@contextlib.contextmanager
def one_object() -> Iterator[None]:
    """Inside, stdout is kept for `print_json`: what a model of the user's own prints goes to stderr."""
    global _answer
    _answer = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _answer = None


def print_json(facts: dict[str, Any]) -> None:
    """The one object of `--json`."""
    (_answer or sys.stdout).write(json.dumps({"schema": SCHEMA, **facts}) + "\n")


def print_outcome(facts: dict[str, Any], error: ChipdeployError | None) -> None:
    """The one object of `--json` where the result may fall short: then the error stands in it, and its code is raised.

    Raises:
        Exit: the error's code.
    """
    if error is None:
        print_json(facts)
        return
    print_json(facts | failure(str(error), type(error).__name__, error.exit_code))
    raise typer.Exit(error.exit_code)


def failure(message: str, kind: str, code: int) -> dict[str, Any]:
    """What `--json` says of an error."""
    return {"error": {"kind": kind, "message": message, "exit_code": code}}


def note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
