"""The entry point: commands, exit codes, and one line for every error."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

import typer

from chipdeploy import __version__
from chipdeploy.errors import ChipdeployError

from . import bench, calibrate, demo, doctor, export, inspect, profile, prune, report, train
from .output import failure, note, one_object, print_json

INTERRUPTED = 130
# What an interrupted command keeps; the others begin again, and leave what was there before.
AGAIN = {
    "prune": "give the same command to resume, with --run and the run's folder if that was made",
    "train": "give the same command again: it goes on after the last epoch",
    "demo": "give the same command again: the dense training goes on after its last epoch, the rest begins anew",
    "profile": "give the same command again: it goes on after the last round",
}
# Typer carries its own copy of click from 0.2x on: its base of all usage errors is reached by way of a public one.
TyperUsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(
    name="chipdeploy",
    help="Prune a CNN to a budget, cut it for real, export it, and measure the speedup.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
commands: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "prune": prune.prune,
    "export": export.export,
    "bench": bench.bench,
    "report": report.report,
    "profile": profile.profile,
    "calibrate": calibrate.calibrate,
    "inspect": inspect.inspect,
    "train": train.train,
    "doctor": doctor.doctor,
}
for name, function in commands.items():
    app.command(name)(function)


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Prune a CNN to a budget, cut it for real, export it, and measure the speedup."""
    if version:
        sys.stdout.write(f"chipdeploy {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


class Terminated(BaseException):
    """SIGTERM, as an exception: locks and temporary files are cleaned up on the way out."""


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    if not os.environ.get("CHIPDEPLOY_DEBUG"):
        logging.disable()  # torch logs whole tracebacks of what is then said in one line
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # A full disk or a closed pipe: Python would say so once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _fail(f"cannot write the output: {error.strerror}", "InputError", 3, as_json=False)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """One call of the command line; returns the exit code."""
    as_json = "--json" in arguments
    with one_object() if as_json else contextlib.nullcontext():
        return _run(arguments, as_json)


def _run(arguments: list[str], as_json: bool) -> int:
    try:
        code = app(arguments, prog_name="chipdeploy", standalone_mode=False)
    except typer.Exit as leave:
        code = leave.exit_code
    except TyperUsageError as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        command = f"chipdeploy {arguments[0]}" if arguments and arguments[0] in commands else "chipdeploy"
        return _fail(f"{_one_line(message)}; see '{command} --help'", "UsageError", 2, as_json)
    except ChipdeployError as error:
        return _fail(_one_line(str(error)), type(error).__name__, error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Terminated:
        return _fail(f"terminated; {_again(arguments)}", "Terminated", 143, as_json)
    except Exception as error:
        return _foreign(error, as_json)
    # Some versions of Typer turn Ctrl-C into this code, without a word.
    if code == INTERRUPTED:
        return _fail(f"interrupted; {_again(arguments)}", "Interrupted", INTERRUPTED, as_json)
    return code if isinstance(code, int) else 0


def _again(arguments: list[str]) -> str:
    return AGAIN.get(arguments[0] if arguments else "", "give the same command again: nothing was changed")


def _foreign(error: Exception, as_json: bool) -> int:
    """What the machine refuses in one line; all else is a bug of ours, with a traceback for who asks for it."""
    if os.environ.get("CHIPDEPLOY_DEBUG"):
        traceback.print_exc()
    text = _one_line(str(error))
    if _out_of_memory(error):
        return _fail(
            f"out of memory; use a smaller batch (--batch, --bench-batch) or smaller images ({text})",
            "OutOfMemory",
            4,
            as_json,
        )
    if isinstance(error, OSError):
        what = "the output cannot be written" if error.filename is None else f"cannot use {error.filename}"
        return _fail(f"{what}: {error.strerror}; choose another path", "InputError", 3, as_json)
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package not in ("", "chipdeploy"):
        return _fail(f"the Python package {package!r} is missing; pip install {package}", "MissingError", 4, as_json)
    text = f"{type(error).__name__}: {text}; a bug of chipdeploy, CHIPDEPLOY_DEBUG=1 shows where"
    return _fail(text, "Bug", 1, as_json)


def _out_of_memory(error: Exception) -> bool:
    """numpy raises MemoryError, torch an OutOfMemoryError on a GPU and a plain RuntimeError on the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _fail(message: str, kind: str, code: int, as_json: bool) -> int:
    if as_json:
        with contextlib.suppress(OSError):  # nobody reads it
            print_json(failure(message, kind, code))
            return code
    note(f"error: {message}")
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
