"""The Dockerfile is clean by hadolint, and all that it names is in the repository. No image is built here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from chipdeploy.cli import main

from chipdeploy.doctor import PYTHONS

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = ("cpu", "gpu")


def instructions():
    """(instruction, its text) in order; lines that go on are joined, comments are left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages():
    """Name of a stage ▶ what it stands on, and its instructions."""
    found = {}
    for word, text in instructions():
        if word == "FROM":
            base, name = text.split(" AS ")
            found[name] = base, []
        else:
            found[name][1].append((word, text))
    return found


def history(name):
    """All instructions of a stage and of those that it stands on, the oldest first."""
    known = stages()
    lines = []
    while name in known:
        name, own = known[name]
        lines = own + lines
    return lines


def last(name, word):
    """The text of the instruction that holds in a stage."""
    return [text for instruction, text in history(name) if instruction == word][-1]


def sources():
    """What is copied from the repository."""
    texts = [text.split() for word, text in instructions() if word == "COPY" and not text.startswith("--from")]
    return {source for text in texts for source in text[:-1]}


def hadolint(text):
    return subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say():
    done = hadolint(DOCKERFILE.read_text(encoding="utf-8"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hadolint_does_find_faults():
    done = hadolint(DOCKERFILE.read_text(encoding="utf-8").replace(":3.11.14-slim-bookworm", ""))
    assert done.returncode == 1
    assert "DL3006" in done.stdout  # no tag


def test_stages_stand_on_each_other_and_on_one_pinned_python():
    known = stages()
    outside = {base for base, _ in known.values() if base not in known}
    (image,) = outside
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", image)
    assert version
    assert PYTHONS[0] <= tuple(map(int, version.groups())) < PYTHONS[1]
    copied = re.findall(r"--from=(\S+)", DOCKERFILE.read_text(encoding="utf-8"))
    assert sorted(copied) == ["cpu-packages", "gpu-packages"]
    assert set(copied) < set(known)
    assert list(known)[-1] == "cpu"  # what is built without --target


def test_what_is_copied_is_there_and_is_all_that_the_wheel_needs():
    found = sources()
    assert all((ROOT / source).exists() for source in found)
    project, tool = PROJECT["project"], PROJECT["tool"]["setuptools"]
    files = {"pyproject.toml", project["readme"], *project["license-files"]}
    folders = {tool["package-dir"].get(package, package).split(".")[0] for package in tool["packages"]}
    needed = {path.split("/")[0] for path in files} | folders
    assert needed - found == set()
    assert found - needed == {"constraints.txt"}


def test_what_is_sent_to_the_builder_is_what_is_copied():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources()
    shipped = [name for names in PROJECT["tool"]["setuptools"]["package-data"].values() for name in names]
    ignored = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    assert shipped
    assert not [name for name in shipped for rule in ignored if fnmatch(name, rule)]


@pytest.mark.parametrize(("name", "runtime"), [("cpu", "cpu"), ("gpu", "gpu")])
def test_extras_exist_and_bring_one_onnx_runtime(name, runtime):
    (command,) = [text for word, text in stages()[f"{name}-packages"][1] if word == "RUN"]
    (names,) = re.findall(r"\.whl\)\[([\w,]+)\]", command)
    extras = set(names.split(","))
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert extras & {"cpu", "gpu"} == {runtime}
    assert "--constraint constraints.txt" in command


@pytest.mark.parametrize("name", TARGETS)
def test_images_run_the_command_as_an_ordinary_user(name):
    (entry,) = json.loads(last(name, "ENTRYPOINT"))
    assert entry in PROJECT["project"]["scripts"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(name, "USER"))
    program, command = json.loads(last(name, "HEALTHCHECK").split("CMD")[1])
    assert program == entry
    assert command in main.commands
    assert last(name, "WORKDIR") == last(name, "VOLUME") == "/work"


@pytest.mark.parametrize("name", TARGETS)
def test_images_hold_no_build_tools_and_say_what_they_are(name):
    assert not [text for word, text in history(name) if word == "RUN" and re.search(r"apt|pip|gcc|make", text)]
    labels = last(name, "LABEL")
    project = PROJECT["project"]
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in labels
    assert f'description="{project["description"]}"' in labels
    assert f'licenses="{project["license"]}"' in labels
    assert f"VERSION={project['version']}" in [text for word, text in history(name) if word == "ARG"]
