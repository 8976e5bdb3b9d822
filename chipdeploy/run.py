"""The run directory: one folder a run, every file written whole or not at all, resumed in place."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chipdeploy.errors import RunError
from chipdeploy.files import atomic, digest, sweep, unwritable

SCHEMA = 1
MANIFEST, CONFIG, METRICS, LOCK = "manifest.json", "config.json", "metrics.jsonl", "lock"


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


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; make the run again")
    return value


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises RunError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror}; choose another folder") from error


class Run:
    """One run directory."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self.root = root or path.parent  # of the pointer to the latest run

    @classmethod
    def create(cls, root: Path, command: str, config: Mapping[str, Any], *, path: Path | None = None) -> Run:
        """A new run in `path`, or in `root`/<time>-<command>-<id>; an unfinished one in `path` is taken up again.

        Raises:
            RunError: `path` or `root` cannot be written, or `path` holds something else, or a run with other settings.
        """
        if path is None:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            path = root / f"{stamp}-{command}-{secrets.token_hex(2)}"
        run = cls(path, root)
        if run.begun(command, config):
            if not run.finished:
                run._check_root()
            return run
        existed = path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / CONFIG, dict(config))
            run._write_manifest(command, "running")
            run._check_root()
        except BaseException as error:
            if not existed:
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise unwritable(path, error) from error
            raise
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
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{pointer} cannot be read: {error}; give --run DIR") from error
        return cls.open(root / name)  # an absolute path where the run lies elsewhere

    def begun(self, command: str, config: Mapping[str, Any]) -> bool:
        """Whether its folder holds a run of these settings; nothing is written.

        Raises:
            RunError: it holds something else, or a run of another command or other settings.
        """
        if (self.path / MANIFEST).is_file():
            self._check_same(command, config)
            return True
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} exists and is no chipdeploy run; choose an empty or new folder with --run")
        return False

    @property
    def manifest(self) -> dict[str, Any]:
        manifest = _read_object(self.path / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            raise RunError(f"{self.path} has schema {manifest.get('schema')}; this version reads schema {SCHEMA}")
        if not isinstance(manifest.get("sha256", {}), dict):
            raise RunError(f"{self.path / MANIFEST} is damaged: its digests are no object; make the run again")
        if missing := [key for key in ("command", "status") if not isinstance(manifest.get(key), str)]:
            raise RunError(f"{self.path / MANIFEST} is damaged: it has no {missing[0]}; make the run again")
        return manifest

    @property
    def config(self) -> dict[str, Any]:
        return _read_object(self.path / CONFIG)

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
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}; delete it, or make the run again") from error
        if not all(isinstance(row, dict) for row in rows):
            raise RunError(f"{path} is damaged: a line of it holds no JSON object; delete it, or make the run again")
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace all metrics: after a resume, epochs that are run again do not stand twice."""
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def seal(self, names: list[str]) -> None:
        """Write down the digests of artifacts that later commands trust."""
        manifest = self.manifest
        manifest["sha256"] = {**manifest.get("sha256", {}), **{n: digest(self.path / n) for n in names}}
        write_json(self.path / MANIFEST, manifest)

    def check(self, name: str, *, maker: str = "prune") -> Path:
        """The path of a sealed artifact of the command `maker`. Raises RunError where it is missing or was changed."""
        path, sealed = self.path / name, self.manifest.get("sha256", {}).get(name)
        again = "" if maker == "prune" else f"run 'chipdeploy {maker} --run {self.path}' again"
        if sealed is None or not path.is_file():
            fix = again or "finish it by its own 'chipdeploy prune' command with --run"
            raise RunError(f"{self.path} has no finished {name}; {fix}")
        if digest(path) != sealed:
            raise RunError(f"{path} was changed after it was written (digest differs); {again or 'make the run again'}")
        return path

    def check_inputs(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Raises RunError where data, model or weights are others than when the run was begun, by their digests."""
        # Older versions did not write down all of them.
        if changed := [name for name, digest_now in now.items() if before.get(name, digest_now) != digest_now]:
            raise RunError(f"the {changed[0]} of {self.path} changed since it was started; choose another --run")

    def finish(self, command: str) -> None:
        """Point to the run as the latest one and mark it as done: in this order, so that a crash between both is
        mended when the run goes on."""
        path, root = self.path.resolve(), self.root.resolve()
        make_folder(root)
        write_text(root / f"latest-{command}", f"{path.name if path.parent == root else path}\n")
        write_json(self.path / MANIFEST, self.manifest | {"status": "done"})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process may write into a run. The system lets go of the lock when its process ends, however it ends.

        The file stays: taking it away would let two processes lock two files of one name.

        Raises:
            RunError: another living process holds it, or the folder cannot be written.
        """
        path = self.path / LOCK
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "another"
                raise RunError(f"{self.path} is in use by process {owner}; wait for it, or choose --run") from error
            except OSError as error:
                raise unwritable(path, error) from error
            self._sign(path)
            sweep(self.path)
            yield

    @staticmethod
    def _sign(path: Path) -> None:
        """Say who holds the lock, for the message of whoever is refused."""
        try:
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error

    def _check_same(self, command: str, config: Mapping[str, Any]) -> None:
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

    def _check_root(self) -> None:
        """The pointer to the latest run is written at the end: what stands in its way is said before time is spent."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise unwritable(self.root, error) from error

    def _write_manifest(self, command: str, status: str) -> None:
        from chipdeploy import __version__

        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.path / MANIFEST,
            {"schema": SCHEMA, "command": command, "status": status, "created": created, "version": __version__},
        )
