#!/usr/bin/env python3
"""Random small networks against the invariant: how many are taken, how many refused and why, and none may be wrong.

    random_graphs.py --out results/random-graphs.json --count 2000 --seed 0

Every third network has only ops that have rules: of those most must be taken. The rest may have any op. Failures are
shrunk and printed as code, and the file holds them. What the file holds already is not run again (`--again` runs it).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chipdeploy.latency.environment import environment
from chipdeploy.run import read_json, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "invariants"))
from graph_check import Verdict, blank, check  # type: ignore[import-not-found]
from graphs import Seeded, Spec, build, draw_spec, example, sensitive  # type: ignore[import-not-found]

SCHEMA = 1
KINDS = ("ruled", "any")
SAVED_EVERY = 20
RETRACED_EVERY = 4  # the cut network is traced again, which takes as long as all the rest
NAME = r"\bx\d+\b(?:\[\d+\])?"  # of a tensor, or of one of several results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000, help="networks that are checked, all in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plans", type=int, default=3, help="random plans a network, beside three others")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = fresh(options.seed) if options.again or not options.out.exists() else read_json(options.out)
    if facts["seed"] != options.seed:
        sys.exit(f"{options.out} holds networks of --seed {facts['seed']}; give that seed, --again or another file")
    while checked(facts) < options.count:
        one_more(facts, options.plans)
        if checked(facts) % SAVED_EVERY == 0 or checked(facts) == options.count:
            write_json(options.out, facts)
    print(summary(facts))


def fresh(seed: int) -> dict[str, Any]:
    """A file without networks."""
    counts = dict.fromkeys(("graphs", "accepted", "refused", "wrong", "crashed"), 0)
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "seed": seed,
        "drawn": 0,
        "insensitive": 0,
        **{kind: counts | {"prunable_sum": 0.0, "worst_error": 0.0} for kind in KINDS},
        "seconds": 0.0,
        "ops": {},
        "refusals": {},
        "pins": {},
        "failures": [],
    }


def checked(facts: dict[str, Any]) -> int:
    return sum(facts[kind]["graphs"] for kind in KINDS)


def one_more(facts: dict[str, Any], plans: int) -> None:
    """Draw the next network, check it, and count it."""
    started = time.perf_counter()
    number = facts["drawn"]
    facts["drawn"] += 1
    kind = "ruled" if number % 3 == 0 else "any"
    spec = draw_spec(Seeded([facts["seed"], number]), ruled=kind == "ruled")
    if not sensitive(spec):
        facts["insensitive"] += 1
        return
    verdict = verdict_on(spec, plans, retrace=number % RETRACED_EVERY == 0)
    row = facts[kind]
    row["graphs"] += 1
    row[verdict.status] += 1
    row["prunable_sum"] += verdict.prunable
    row["worst_error"] = max(row["worst_error"], verdict.error if verdict.status == "accepted" else 0.0)
    tally(facts["ops"], Counter({step.kind for step in spec.steps}))
    tally(facts["pins"], verdict.pins)
    if verdict.status == "refused":
        tally(facts["refusals"], Counter([blank(verdict.reason)]))
    if verdict.failed:
        facts["failures"].append(shrunk_failure(spec, verdict, plans))
        print(report(facts["failures"][-1]), flush=True)
    facts["seconds"] += time.perf_counter() - started


def verdict_on(spec: Spec, plans: int, *, retrace: bool = True) -> Verdict:
    return check(build(spec), example(spec), again=example(spec, 5, batch=3), plans=plans, retrace=retrace)


def tally(into: dict[str, int], counts: Counter[str]) -> None:
    for key, count in counts.items():
        into[key] = into.get(key, 0) + count


def shrunk_failure(spec: Spec, verdict: Verdict, plans: int) -> dict[str, Any]:
    """The smallest network found that fails in the same way, with what went wrong."""

    def fails(candidate: Spec) -> bool:
        try:
            if not sensitive(candidate):
                return False
        except Exception:  # a candidate that lacks what a later step needs
            return False
        found = verdict_on(candidate, plans)
        return bool(found.status == verdict.status and blank(found.reason)[:30] == blank(verdict.reason)[:30])

    spec = shrink(spec, fails)
    final = verdict_on(spec, plans)
    return {"status": final.status, "reason": final.reason, "proof": final.proof, "spec": spec.to_dict()}


def shrink(spec: Spec, fails: Callable[[Spec], bool]) -> Spec:
    """Take away whatever the failure does not need, until nothing more can go."""
    smaller: Spec | None = spec
    while smaller is not None:
        spec = smaller
        smaller = next((candidate for candidate in smaller_specs(spec) if fails(candidate)), None)
    return spec


def smaller_specs(spec: Spec) -> Iterator[Spec]:
    """One output of several; no tied or frozen parameters; a step less, its readers reading one of its sources."""
    outputs = list(dict.fromkeys(re.findall(NAME, spec.output)))
    if len(outputs) > 1:
        yield from (replace(spec, output=name) for name in outputs)
    if spec.init:
        yield replace(spec, init=[])
    for place, step in reversed(list(enumerate(spec.steps))):
        for source in dict.fromkeys(re.findall(NAME, step.call)):
            yield without_step(spec, place, source)


def without_step(spec: Spec, place: int, source: str) -> Spec:
    """The spec without a step; those who read its tensor read `source`, and later tensors move up by one."""
    gone = len(spec.inputs) + place

    def renamed(code: str) -> str:
        code = re.sub(rf"\bx{gone}\b(\[\d+\])?", source, code)
        return re.sub(r"\bx(\d+)\b", lambda m: f"x{int(m[1]) - (int(m[1]) > gone)}", code)

    steps = [replace(step, call=renamed(step.call)) for i, step in enumerate(spec.steps) if i != place]
    return replace(spec, steps=steps, output=renamed(spec.output))


def report(failure: dict[str, Any]) -> str:
    """A failure as code that can be pasted."""
    spec = Spec.from_dict(failure["spec"])
    return (
        f"\n{failure['status']}: {failure['reason']}\nprove: {failure['proof']}\n"
        f"inputs {spec.inputs}, seed {spec.seed}\n{spec.source}"
    )


def summary(facts: dict[str, Any]) -> str:
    lines = []
    for kind in KINDS:
        row = facts[kind]
        share = row["prunable_sum"] / max(1, row["accepted"])
        lines.append(
            f"{kind}: {row['graphs']} networks, {row['accepted']} accepted, {row['refused']} refused, "
            f"{row['wrong']} wrong, {row['crashed']} crashed; {share:.0%} of the MACs prunable in accepted ones, "
            f"worst error {row['worst_error']:.1e}"
        )
    lines.append(f"{facts['drawn']} drawn, {facts['insensitive']} of them insensitive; {facts['seconds']:.0f} s")
    for name in ("refusals", "pins"):
        most = sorted(facts[name].items(), key=lambda item: -item[1])[:12]
        lines += [f"{name}:", *(f"  {count:6} {reason}" for reason, count in most)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
