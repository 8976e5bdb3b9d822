#!/usr/bin/env python3
"""Run the commands of a file side by side, each on a core of its own: many small networks fill a GPU that one does not.

    side_by_side.py jobs.txt --logs folder

A line is `NAME [after OTHER,OTHER]: COMMAND`. A job starts when a core is free and those named after `after` have ended
well; the first lines go first. What a job prints is in NAME.log, what came of all in the last lines that are printed.
With `nvidia-cuda-mps-control -d` running, and CUDA_MPS_PIPE_DIRECTORY set, the jobs' kernels run at the same time;
without it they take turns. Nothing can be timed beside them (see `--untimed` of compare.py) but on cores that are set
aside with `--quiet`, by the jobs that know of them (latency_accuracy.py). Where cores share their units in pairs, set
aside whole pairs, and name one of each.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from quiet import CORES

LINE = re.compile(r"(?P<name>[\w.-]+)(?: after (?P<needs>[\w.,-]+))?: (?P<command>.+)")


@dataclass
class Job:
    """A command, and those that it waits for."""

    name: str
    needs: tuple[str, ...]
    command: str

    @classmethod
    def of(cls, line: str) -> Job:
        found = LINE.fullmatch(line)
        if not found:
            raise SystemExit(f"a line is 'NAME [after OTHER,OTHER]: COMMAND', got {line!r}")
        return cls(found["name"], tuple((found["needs"] or "").split(",")) if found["needs"] else (), found["command"])


@dataclass
class Running:
    """A job that was started."""

    job: Job
    process: subprocess.Popen[bytes]
    core: int
    since: float = field(default_factory=time.monotonic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--quiet", default="", help="cores on which jobs may time, one at a time; give taskset others")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    os.environ |= {CORES: options.quiet, "OMP_NUM_THREADS": "1"}
    lines = options.jobs.read_text(encoding="utf-8").splitlines()
    failed = run([Job.of(line) for line in lines if line.strip()], options.logs)
    if failed:
        raise SystemExit(f"did not end well: {', '.join(failed)}; see {options.logs}")


def run(waiting: list[Job], logs: Path) -> list[str]:
    """Run all jobs; returns the names of those that failed, or whose needs did."""
    cores, running, done, failed = sorted(os.sched_getaffinity(0)), list[Running](), set[str](), list[str]()
    while waiting or running:
        for one in [each for each in running if each.process.poll() is not None]:
            running.remove(one)
            cores.append(one.core)
            code = one.process.returncode
            failed += [one.job.name] if code else []
            done |= set() if code else {one.job.name}
            seconds = time.monotonic() - one.since
            print(f"{one.job.name}: exit code {code}, {seconds:.0f} s; {len(waiting)} wait", flush=True)
        lost = [job for job in waiting if set(job.needs) & set(failed)]
        failed += [job.name for job in lost]
        ready = [job for job in waiting if job not in lost and set(job.needs) <= done][: len(cores)]
        waiting = [job for job in waiting if job not in lost and job not in ready]
        running += [start(job, cores.pop(0), logs) for job in ready]
        if waiting and not running:
            raise SystemExit(f"these wait for what is not in the file: {', '.join(job.name for job in waiting)}")
        time.sleep(0.2)
    return failed


def start(job: Job, core: int, logs: Path) -> Running:
    """One thread on one core: threads of many processes would only get in each other's way."""
    with (logs / f"{job.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), "sh", "-c", job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Running(job, process, core)


if __name__ == "__main__":
    main()
