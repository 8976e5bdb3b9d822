"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chipdeploy.errors import ExportError
from chipdeploy.files import unwritable


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    Args:
        check: raises where `folder` holds what must not be lost.

    Raises:
        ExportError: `folder` cannot be written.
    """
    target = Path(os.path.realpath(folder))  # a link stays, and shows the new folder
    mark = secrets.token_hex(4)
    aside, before = (target.with_name(f".tmp-{mark}-{part}") for part in ("new", "old"))
    missing: list[Path] = []
    try:
        check(folder)
        missing = [parent for parent in target.parents if not parent.exists()]  # the deepest first
        aside.mkdir(parents=True)
        yield aside
        _swap(aside, target, before)
        missing = []
    except OSError as error:
        raise unwritable(folder, error, ExportError) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def _swap(aside: Path, target: Path, before: Path) -> None:
    """Put `aside` at `target`; what was there goes to `before` for that moment, and comes back if it fails."""
    try:
        if target.exists():
            target.rename(before)
        aside.rename(target)
    except BaseException:
        if before.exists():
            before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def put(path: Path, content: bytes | Path) -> None:
    """Write or copy a file, down to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
