#!/usr/bin/env python3
"""The zoo: all classifiers of torchvision and one of every kind of timm's, cut at random, against their gated selves.

    zoo.py [--only PATTERN] [--source torchvision|timm] [--status wrong,crash] [--again] [--skip-peer] [--jobs 1]
    zoo.py --table     # writes docs/zoo.md from the results

Each network runs in a process of its own, with a limit of time and memory. A network that results/zoo.json holds is not
run again, unless --again says so; its Torch-Pruning column and the ops of its dense file, which do not depend on
chipdeploy, stay (--again-peer makes the former anew). The list is zoo_models.json; zoo_nets.py makes it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from zoo_check import check
from zoo_nets import SOURCES, Net, read_list
from zoo_table import write_table

from chipdeploy.files import atomic
from chipdeploy.latency.environment import environment
from chipdeploy.run import write_json

RESULTS = Path(__file__).with_name("results") / "zoo.json"
GAIN = 1.4  # of random weights, for Torch-Pruning where no other was found
PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "numpy")
Row = dict[str, Any]
Work = Callable[[Net, Row, Callable[[Row], None]], None]


def main() -> None:
    options = _options()
    if options.table:
        write_table(json.loads(options.out.read_text()))
        return
    torch.set_num_threads(1)
    _load_everything()
    store = _opened(options.out)
    todo = [net for net in read_list() if _wanted(net, options)]
    tasks = [task for net in todo for task in _tasks(net, store, options)]
    running: list[_Job] = []
    while tasks or running:
        while tasks and len(running) < options.jobs:
            running.append(tasks.pop(0)())
        time.sleep(0.2)
        for job in [job for job in running if job.ended(options)]:
            running.remove(job)
            store = _opened(options.out)  # another process may have written other rows
            _keep(store, job)
            write_json(options.out, store)
            print(job.line(), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="*", help="networks whose names match, e.g. 'resnet*,vit_*'")
    parser.add_argument("--source", choices=SOURCES)
    parser.add_argument("--again", action="store_true", help="run also what the results hold")
    parser.add_argument("--status", default="", help="run again only rows of these, e.g. wrong,crash")
    parser.add_argument("--again-peer", action="store_true")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--skip-own", action="store_true", help="run Torch-Pruning alone")
    parser.add_argument("--skip-files", action="store_true", help="leave ONNX out; a later run adds it")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900, help="seconds a network")
    parser.add_argument("--memory", type=float, default=10, help="GiB a network")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def _load_everything() -> None:
    """Import now what the networks' processes need: they are forks, and a file may be edited while the zoo runs."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import timm  # noqa: F401
    import torch_pruning  # noqa: F401
    import torchvision  # noqa: F401
    import zoo_peer  # noqa: F401

    import chipdeploy.engines.ort
    import chipdeploy.graph.simplify  # noqa: F401


def _opened(path: Path) -> Row:
    if path.is_file():
        store: Row = json.loads(path.read_text())
        return store
    return {"schema": 1, "environment": environment(), "networks": {}}


def _wanted(net: Net, options: argparse.Namespace) -> bool:
    named = any(fnmatch(net.name, pattern) for pattern in options.only.split(","))
    return named and options.source in (None, net.source)


def _tasks(net: Net, store: Row, options: argparse.Namespace) -> list[Callable[[], _Job]]:
    """What is still to be done for a network; each starts when it is called."""
    found = store["networks"].get(_key(net), {})
    ours, peer = found.get("chipdeploy"), found.get("torch-pruning")
    tasks: list[Callable[[], _Job]] = []
    if not options.skip_own and (ours is None or _once_more(ours, options)):
        known = {"dense_ops": ours["dense_ops"]} if ours and "dense_ops" in ours else {}
        tasks.append(partial(_Job, net, "chipdeploy", known, partial(check, files=not options.skip_files)))
    if not options.skip_peer and (peer is None or options.again_peer):
        from zoo_peer import check_peer

        tasks.append(partial(_Job, net, "torch-pruning", {}, partial(check_peer, gain=(ours or {}).get("gain", GAIN))))
    return tasks


def _once_more(row: Row, options: argparse.Namespace) -> bool:
    """Whether a network is run although the results hold it: asked for, or its files were left out."""
    if options.status:
        return row["status"] in options.status.split(",")
    return options.again or (row["status"] == "pass" and "onnx_s" not in row and not options.skip_files)


def _key(net: Net) -> str:
    return f"{net.source}:{net.name}"


def _keep(store: Row, job: _Job) -> None:
    """Put a row into the results, in the order of the list."""
    store["environment"]["packages"] = {name: version(name) for name in PACKAGES}
    networks = store["networks"]
    networks.setdefault(_key(job.net), asdict(job.net))[job.what] = job.row
    order = {_key(net): number for number, net in enumerate(read_list())}
    store["networks"] = dict(sorted(networks.items(), key=lambda item: order.get(item[0], len(order))))


class _Job:
    """A network in a process of its own; what it has found is read from a file, even when it had to be stopped."""

    def __init__(self, net: Net, what: str, known: Row, work: Work) -> None:
        self.net, self.what, self.row = net, what, dict(known)
        self._started = time.monotonic()
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "row.json"
        arguments = (net, known, work, self._path)
        self._process: BaseProcess = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        self._process.start()

    def ended(self, options: argparse.Namespace) -> bool:
        """Whether it is over, or had to be ended here."""
        seconds = time.monotonic() - self._started
        stopped = None
        if self._process.is_alive():
            if seconds > options.timeout:
                stopped = ("timeout", f"more than {options.timeout:.0f} s")
            elif self._memory() > options.memory * 2**30:
                stopped = ("crash", f"more than {options.memory:.0f} GiB of memory")
            if stopped is None:
                return False
            self._process.kill()
        self._process.join()
        self._finish(stopped, seconds)
        return True

    def line(self) -> str:
        """The row in short."""
        errors = {
            key: f"{value:.0e}" for key, value in self.row.items() if key.startswith(("float", "onnx_e", "error"))
        }
        rest = {key: self.row[key] for key in ("prunable_macs", "trace_s", "reason", "onnx_refused") if key in self.row}
        return f"{_key(self.net)} {self.what}: {self.row['status']} {errors} {rest} {self.row['wall_s']} s"

    def _memory(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def _finish(self, stopped: tuple[str, str] | None, seconds: float) -> None:
        if self._path.is_file():
            self.row |= json.loads(self._path.read_text())
        step = self.row.pop("step", None)
        if stopped is None and step is not None:
            stopped = ("crash", f"the process died with {self._process.exitcode}")
        if stopped is not None:
            self.row |= {"status": stopped[0], "reason": f"{step}: {stopped[1]}"}
        self.row["wall_s"] = round(seconds, 1)
        self._folder.cleanup()


def _run(net: Net, known: Row, work: Work, path: Path) -> None:
    """In the child: do the work and leave the row in `path` after each step."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())

    def save(row: Row) -> None:
        row["cpu_s"] = round(time.process_time(), 1)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps({key: _plain(value) for key, value in row.items()}))

    work(net, {"step": "start"} | known, save)


def _plain(value: Any) -> Any:
    """JSON has neither infinity nor NaN."""
    if isinstance(value, float) and not abs(value) < 1e300:
        return 1e300
    return value


if __name__ == "__main__":
    main()
