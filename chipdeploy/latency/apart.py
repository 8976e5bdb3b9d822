"""Engines timed in a process of their own, as a deployed one runs: where many were opened, ratios come out higher."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from chipdeploy.engines.base import Images, open_engine
from chipdeploy.engines.cuda import current_gpu, use_gpu
from chipdeploy.engines.target import Target
from chipdeploy.errors import RunError
from chipdeploy.latency.measure import Comparison
from chipdeploy.latency.timing import time_engines
from chipdeploy.run import read_json, write_json


def time_apart(
    target: Target, dense: Path, pruned: Path, images: Images, *, threads: int, seconds: float, blocks: int
) -> Comparison:
    """Time `pruned` against `dense`, files that engines are opened from, in a new process.

    Raises:
        RunError: that process failed.
    """
    with tempfile.TemporaryDirectory(prefix="chipdeploy-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        np.save(Path(folder) / "images.npy", images)
        asked = {"target": target.name, "dense": str(dense.resolve()), "pruned": str(pruned.resolve())}
        write_json(request, asked | {"gpu": current_gpu(), "threads": threads, "seconds": seconds, "blocks": blocks})
        # -P: what lies in the working directory is no module of ours.
        command = [sys.executable, "-P", "-m", __name__, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not answer.is_file():
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RunError(f"timing {target.name} in a process of its own failed: {why}")
        return Comparison.from_dict(read_json(answer))


def main(folder: Path) -> None:
    """What the new process does: open, time, and leave the answer beside the request."""
    asked = read_json(folder / "request.json")
    images, target = np.load(folder / "images.npy"), Target.parse(asked["target"])
    options = {} if target.on_gpu else {"threads": int(asked["threads"])}
    if target.on_gpu:
        use_gpu(int(asked["gpu"]))
    paths = (asked["dense"], asked["dense"], asked["pruned"])
    dense, control, pruned = (open_engine(target, Path(path), **options) for path in paths)
    seconds, blocks = float(asked["seconds"]), int(asked["blocks"])
    found = time_engines(target, dense, control, [pruned], images, seconds=seconds, blocks=blocks)[0]
    write_json(folder / "answer.json", found.to_dict())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
