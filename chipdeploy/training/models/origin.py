"""Where a model's code comes from, where that is a file of the user's."""

from __future__ import annotations

import hashlib
from modulefinder import ModuleFinder
from pathlib import Path

from chipdeploy.files import digest

INSTALLED = ("torch", "torchvision", "timm", "numpy", "PIL", "chipdeploy")


def own_file(spec: str) -> Path | None:
    """The file of a spec `FILE.py:FUNCTION`; None for other specs."""
    path = Path(spec.rpartition(":")[0])
    return path if path.suffix == ".py" and path.is_file() else None


def code_digest(path: Path) -> str:
    """sha256 of a model's file and of the files beside it that it imports."""
    beside = _imported(path.resolve())
    if not beside:
        return digest(path)
    parts = [digest(path), *(f"{file.relative_to(path.resolve().parent)} {digest(file)}" for file in beside)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _imported(path: Path) -> list[Path]:
    """Files below the model's folder that it, or what it imports, imports; found by reading, nothing is run."""
    finder = ModuleFinder([str(path.parent)], excludes=INSTALLED)
    try:
        finder.run_script(str(path))
    except (SyntaxError, OSError, ValueError, RecursionError):  # then it cannot be built either, and that is said
        return []
    places = (getattr(module, "__file__", None) for module in finder.modules.values())
    files = {Path(place).resolve() for place in places if place}
    return sorted(file for file in files - {path} if file.is_relative_to(path.parent))
