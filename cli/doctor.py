"""`chipdeploy doctor`: what works here, and the command for what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from . import options
from .output import console, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chipdeploy.doctor import Check, Readiness


def doctor(json: options.Json = False) -> None:
    """Show what is installed, which targets run and can be built here, and how to get what is missing."""
    from chipdeploy.doctor import examine, lacking, require, targets
    from chipdeploy.errors import MissingError

    checks, ready = examine(), targets()
    failed = lacking(checks)
    step = failed[0].fix if failed else "chipdeploy demo"
    if json:
        found = {"checks": [check.to_dict() for check in checks], "targets": [target.to_dict() for target in ready]}
        print_json({"ready": not failed, **found, "next": step})
        if failed:  # the object above has said so
            raise typer.Exit(MissingError.exit_code)
        return
    _print(checks, ready)
    console().print(f"next: {step}")
    require(checks)


def _print(checks: Sequence[Check], ready: Sequence[Readiness]) -> None:
    """One line a check and a target."""
    screen = console()
    for check in checks:
        screen.print(f"{check.name:<21} {check.status:<8} {_sentence(check.detail, check.fix)}")
    for target in ready:
        builds = "" if target.builds is None else f", {'builds' if target.builds else 'cannot build'}"
        status = f"{'runs' if target.runs else 'cannot run'}{builds}"
        screen.print(f"{target.name:<21} {status}: {_sentence(target.detail, target.fix)}")


def _sentence(detail: str, fix: str) -> str:
    return f"{detail}; fix: {fix}" if fix else detail
