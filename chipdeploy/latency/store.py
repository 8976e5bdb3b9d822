"""Where profiles are found: those that are shipped, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from chipdeploy.errors import RunError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.latency.profile import LatencyProfile, graph_digest, short_name
from chipdeploy.latency.rig import Setting

FOLDER = "profiles"  # below the folder of the runs
LONGEST = 60  # characters of a model's name in the name of a file


def shipped() -> dict[str, Path]:
    """Profiles in the package, by name."""
    folder = Path(str(resources.files("chipdeploy.profiles")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def own(folder: Path) -> dict[str, Path]:
    """Profiles in a folder, by name."""
    return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def by_name(name: str, folder: Path) -> LatencyProfile:
    """A profile by its name, or by its path.

    Raises:
        RunError: there is none, or its file is no whole profile.
    """
    known = {**shipped(), **own(folder)}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise RunError(f"there is no profile {name!r}; known: {', '.join(known) or 'none'}; give a name or a file")
    return LatencyProfile.load(path)


def matching(
    graph: ChannelGraph, setting: Setting, here: Mapping[str, Any], folder: Path
) -> tuple[Path, LatencyProfile] | None:
    """The user's own profile of this network in this setting on this machine; None where there is none.

    A finished one comes first. Profiles of other machines, shipped ones above all, are used by name only.
    """
    known = [(path, profile) for path in own(folder).values() if (profile := _fitting(path, graph, setting, here))]
    return max(known, key=lambda one: one[1].finished, default=None)


def place(model: str, graph: ChannelGraph, setting: Setting, here: Mapping[str, Any], folder: Path) -> Path:
    """The file in which a profile of this network in this setting is kept: the one that was begun, or a new one.

    A file of that name that is damaged, or was measured with other versions of the runtime, stays as it is.
    """
    name = Path(file_name(model, graph, setting, str(here["machine"])))
    for number in count(1):
        path = folder / (name.name if number == 1 else f"{name.stem}-{number}.json")
        if not path.exists() or _fitting(path, graph, setting, here):
            return path
    raise AssertionError


def file_name(model: str, graph: ChannelGraph, setting: Setting, machine: str) -> str:
    """`resnet56-3x32x32-ort-cpu-b1-t1-amd-epyc-avx2-1-core-no-gpu-1f0c9a.json`; the last part tells graphs apart."""
    shape, threads = "x".join(map(str, setting.input_shape)), "" if setting.target.on_gpu else f"t{setting.threads}"
    parts = [
        short_name(model)[:LONGEST],
        shape,
        setting.target.name,
        f"b{setting.batch}",
        threads,
        machine,
        graph_digest(graph)[:6],
    ]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-") + ".json"


def _same(profile: LatencyProfile, setting: Setting) -> bool:
    try:
        profile.check_setting(setting)
    except RunError:
        return False
    return True


def _fitting(path: Path, graph: ChannelGraph, setting: Setting, here: Mapping[str, Any]) -> LatencyProfile | None:
    """The profile in a file, if it is of this network in this setting on this machine."""
    try:
        profile = LatencyProfile.load(path)
    except RunError:  # another's mistake is no reason to refuse this one's work; --list says what is wrong
        return None
    same = profile.graph == graph_digest(graph) and not profile.other_ops(graph)
    return profile if same and not profile.foreign(here) and _same(profile, setting) else None
