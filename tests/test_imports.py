"""Imports go one way, heavy packages load late, and every package is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    **{path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "chipdeploy").rglob("*.py")},
    **{path: f"chipdeploy.cli.{path.stem}" for path in (ROOT / "cli").glob("*.py")},
}


def imported(path):
    """Absolute names of all that a file imports, wherever in the file; `from a import b` counts as a.b too."""
    module = FILES[path]
    package = module.removesuffix(".__init__") if path.stem == "__init__" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def users(part):
    return [path for path, name in FILES.items() if f"{name}.".startswith(f"chipdeploy.{part}.")]


JOBS = ("job", "dense", "pruning", "result", "pipeline", "deploy", "bench")
LATER = ("chipnet", "latency", "engines", "export", "training", "report", "cli", "run", *JOBS)


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("errors", ("graph", *LATER)),
        ("graph", LATER),
        ("chipnet", ("latency", "engines", "export", "training", "report", "cli", *JOBS)),
        ("engines", ("graph", "chipnet", "latency", "export", "training", "report", "cli", *JOBS)),
        ("training", ("latency", "engines", "export", "report", "cli", *JOBS)),
        ("report", ("graph", "chipnet", "engines", "export", "training", "cli", *JOBS)),
    ],
)
def test_imports_go_one_way(part, forbidden):
    files = users(part)
    assert files
    for path in files:
        for name in imported(path):
            for other in forbidden:
                assert not f"{name}.".startswith(f"chipdeploy.{other}."), f"{FILES[path]} imports {name}"


def test_the_library_never_imports_the_command_line():
    library = [path for path in FILES if path.is_relative_to(ROOT / "chipdeploy")]
    assert len(library) > 20
    for path in library:
        assert not any(f"{name}.".startswith("chipdeploy.cli.") for name in imported(path)), FILES[path]


def test_relative_imports_are_understood():
    assert "chipdeploy.cli.output.note" in imported(ROOT / "cli" / "main.py")


@pytest.mark.parametrize("module", ["chipdeploy", "chipdeploy.errors", "chipdeploy.report.page", "chipdeploy.cli.main"])
def test_importing_it_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_package_on_disk_is_shipped():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "chipdeploy").rglob("__init__.py")}
    for folder in ("cli", "profiles"):
        assert (ROOT / folder / "__init__.py").is_file()
        assert tool["package-dir"][f"chipdeploy.{folder}"] == folder
        on_disk.add(f"chipdeploy.{folder}")
    assert set(tool["packages"]) == on_disk
    holding_code = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "chipdeploy").rglob("*.py")}
    assert holding_code <= on_disk
