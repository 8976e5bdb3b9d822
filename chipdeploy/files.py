"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chipdeploy.errors import InputError, RunError

YOUNG_S = 60.0


@contextmanager
def atomic(path: Path, kind: type[InputError] = RunError) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        kind: the folder is missing, read-only or full.
    """
    # The name ends like that of `path`: some writers choose the format by it.
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error, kind) from error
    finally:
        with suppress(OSError):  # where there is no folder, there is nothing to take away
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what `atomic` leaves in a folder when its process is killed. What is young may be another's, at work."""
    for left in folder.glob(".tmp-*"):
        with suppress(OSError):
            if left.is_file() and time.time() - left.stat().st_mtime > YOUNG_S:
                left.unlink()


def unwritable(path: Path, error: OSError, kind: type[InputError] = RunError) -> InputError:
    """One line for a file that the machine would not write."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    return kind(f"cannot write {path}: {reason}; free the folder or choose another")


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
