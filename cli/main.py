"""The entry point: commands, exit codes, and one line for every error."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click
import typer

from chipdeploy import __version__
from chipdeploy.errors import ChipdeployError

from . import bench, demo, export, inspect, prune, report, train
from .output import note, print_json

app = typer.Typer(
    name="chipdeploy",
    help="Prune a CNN to a budget, cut it for real, export it, and measure the speedup.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, function in {
    "demo": demo.demo,
    "prune": prune.prune,
    "export": export.export,
    "bench": bench.bench,
    "report": report.report,
    "inspect": inspect.inspect,
    "train": train.train,
}.items():
    app.command(name)(function)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Prune a CNN to a budget, cut it for real, export it, and measure the speedup."""
    if version:
        sys.stdout.write(f"chipdeploy {__version__}\n")
        raise typer.Exit


class Terminated(BaseException):
    """SIGTERM, as an exception: locks and temporary files are cleaned up on the way out."""


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One call of the command line; returns the exit code."""
    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="chipdeploy", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        return _fail(_one_line(error.format_message()) + "; see 'chipdeploy --help'", "UsageError", 2, as_json)
    except ChipdeployError as error:
        return _fail(_one_line(str(error)), type(error).__name__, error.exit_code, as_json)
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            "interrupted; give the same command with --run and the run's folder to resume", "Interrupted", 130, as_json
        )
    except Terminated:
        return _fail(
            "terminated; give the same command with --run and the run's folder to resume", "Terminated", 143, as_json
        )
    except Exception as error:  # a bug of ours: one line, and the traceback for who asks for it
        if os.environ.get("CHIPDEPLOY_DEBUG"):
            traceback.print_exc()
        text = f"{type(error).__name__}: {_one_line(str(error))}; a bug of chipdeploy, CHIPDEPLOY_DEBUG=1 shows where"
        return _fail(text, "Bug", 1, as_json)


def _fail(message: str, kind: str, code: int, as_json: bool) -> int:
    if as_json:
        facts: dict[str, Any] = {"error": {"kind": kind, "message": message, "exit_code": code}}
        print_json(facts)
    else:
        note(f"error: {message}")
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
