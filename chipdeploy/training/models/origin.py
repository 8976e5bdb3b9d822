"""Where a model's code comes from, where that is a file of the user's."""

from __future__ import annotations

import hashlib
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from chipdeploy.files import digest

PACKAGE = 5  # modulefinder's word for a folder
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
    finder = _Finder([str(path.parent)], excludes=INSTALLED)
    try:
        finder.run_script(str(path))
    except (SyntaxError, OSError, ValueError, RecursionError):  # then it cannot be built either, and that is said
        return []
    places = (getattr(module, "__file__", None) for module in finder.modules.values())
    files = {Path(place).resolve() for place in places if place}
    return sorted(file for file in files - {path} if file.is_relative_to(path.parent))


class _Finder(ModuleFinder):
    """The library's, for folders without `__init__.py` too: those are packages for an import, but not for it."""

    def find_module(self, name: str, path: Any, parent: Any = None) -> Any:
        try:
            return super().find_module(name, path, parent)
        except AttributeError:
            folders = (Path(place) / name for place in path or self.path)
            return None, str(next(folder for folder in folders if folder.is_dir())), ("", "", PACKAGE)

    def load_package(self, fqname: str, pathname: str) -> Any:
        if (Path(pathname) / "__init__.py").is_file():
            return super().load_package(fqname, pathname)
        package: Any = self.add_module(fqname)
        package.__path__ = [pathname]
        return package
