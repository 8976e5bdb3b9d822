"""The run directory: one folder a run, every file written whole or not at all, resumed in place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chipdeploy.errors import RunError

SCHEMA = 1
MANIFEST, CONFIG, METRICS, LOCK = "manifest.json", "config.json", "metrics.jsonl", "lock"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        RunError: the folder is read-only or full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> RunError:
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    return RunError(f"cannot write {path}: {reason}; free the folder or choose another with --run")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically. Raises RunError where the folder cannot be written."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises RunError where the folder cannot be written."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises RunError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} has no {path.name}; is it a chipdeploy run, and did it finish?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}; run the command that wrote it again") from error


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """One run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, command: str, config: Mapping[str, Any], *, path: Path | None = None) -> Run:
        """A new run in `path`, or in `root`/<time>-<command>-<id>; an unfinished one in `path` is taken up again.

        Raises:
            RunError: the folder cannot be written, holds something else, or holds a run with other settings.
        """
        if path is None:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            path = root / f"{stamp}-{command}-{secrets.token_hex(2)}"
        run = cls(path)
        if (path / MANIFEST).is_file():
            run._resume(command, config)
            return run
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} exists and is no chipdeploy run; choose an empty or new folder with --run")
        existed = path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / CONFIG, dict(config))
            run._write_manifest(command, "running")
        except (OSError, RunError) as error:
            if not existed:
                shutil.rmtree(path, ignore_errors=True)
            raise error if isinstance(error, RunError) else _unwritable(path, error) from error
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises RunError where `path` holds none."""
        if not (path / MANIFEST).is_file():
            raise RunError(f"{path} is no run directory (no {MANIFEST}); give one that 'chipdeploy prune' made")
        return cls(path)

    @classmethod
    def latest(cls, root: Path, *, command: str = "prune") -> Run:
        """The newest finished run of `command` below `root`. Raises RunError where there is none."""
        pointer = root / f"latest-{command}"
        if not pointer.is_file():
            raise RunError(
                f"no finished run in {root}/; run 'chipdeploy {command} --flops 0.3' first, or give --run DIR"
            )
        return cls.open(root / pointer.read_text(encoding="utf-8").strip())

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            raise RunError(f"{self.path} has schema {manifest.get('schema')}; this version reads schema {SCHEMA}")
        return manifest

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = read_json(self.path / CONFIG)
        return config

    @property
    def finished(self) -> bool:
        return bool(self.manifest["status"] == "done")

    def file(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, value: Any) -> None:
        """Write a JSON artifact."""
        write_json(self.path / name, value)

    def read(self, name: str) -> Any:
        """Read a JSON artifact. Raises RunError where it is missing."""
        return read_json(self.path / name)

    def read_if(self, name: str) -> Any | None:
        """Read a JSON artifact, None where there is none."""
        return read_json(self.path / name) if (self.path / name).is_file() else None

    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary an epoch, in order."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace all metrics: after a resume, epochs that are run again do not stand twice."""
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def seal(self, names: list[str]) -> None:
        """Write down the digests of artifacts that later commands trust."""
        manifest = self.manifest
        manifest["sha256"] = {**manifest.get("sha256", {}), **{n: file_digest(self.path / n) for n in names}}
        write_json(self.path / MANIFEST, manifest)

    def check(self, name: str) -> Path:
        """The path of a sealed artifact. Raises RunError where it is missing or was changed."""
        path, sealed = self.path / name, self.manifest.get("sha256", {}).get(name)
        if sealed is None or not path.is_file():
            raise RunError(f"{self.path} has no finished {name}; run 'chipdeploy prune --run {self.path}' to its end")
        if file_digest(path) != sealed:
            raise RunError(f"{path} was changed after it was written (digest differs); make the run again")
        return path

    def finish(self, command: str) -> None:
        """Mark the run as done; the pointer to the latest run moves last."""
        manifest = self.manifest
        manifest["status"] = "done"
        write_json(self.path / MANIFEST, manifest)
        write_text(self.path.parent / f"latest-{command}", self.path.name + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process may write into a run. A lock whose process is gone is taken over.

        Raises:
            RunError: another living process holds it.
        """
        path = self.path / LOCK
        self._break_stale(path)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError as error:
            raise RunError(
                f"{self.path} is in use by process {path.read_text().strip()}; wait for it, or choose --run"
            ) from error
        except OSError as error:
            raise _unwritable(path, error) from error
        with os.fdopen(descriptor, "w") as file:
            file.write(str(os.getpid()))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    @staticmethod
    def _break_stale(path: Path) -> None:
        try:
            owner = int(path.read_text())
            os.kill(owner, 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except (OSError, OverflowError):
            return

    def _resume(self, command: str, config: Mapping[str, Any]) -> None:
        manifest, before = self.manifest, self.config
        if manifest["command"] != command:
            raise RunError(f"{self.path} was made by '{manifest['command']}'; choose another folder for '{command}'")
        changed = [key for key in {**before, **config} if before.get(key) != json.loads(json.dumps(config.get(key)))]
        if changed:
            key = changed[0]
            raise RunError(
                f"{self.path} was started with {key}={before.get(key)!r}, now {config.get(key)!r}; "
                "repeat the old settings to resume it, or choose another --run"
            )

    def _write_manifest(self, command: str, status: str) -> None:
        from chipdeploy import __version__

        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.path / MANIFEST,
            {"schema": SCHEMA, "command": command, "status": status, "created": created, "version": __version__},
        )


def save_tensors(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a file that takes its place atomically."""
    with atomic(path) as temporary:
        save(temporary)
