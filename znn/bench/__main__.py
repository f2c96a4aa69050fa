"""`python -m znn.bench check results/`: what is there, and what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from . import store


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m znn.bench", description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    if not options.results.is_dir():
        print(f"{options.results}: no such folder", file=sys.stderr)
        return 2
    text, sound = check(options.results)
    print(text)
    return 0 if sound else 1


def check(root: Path) -> tuple[str, bool]:
    """A summary of a results folder, and whether every line could be read and every case that ran is right."""
    loaded = store.load(root)
    lines, latest = [], loaded.latest()
    for machine in sorted({r.machine_id for r in latest} | {r.machine_id for r in loaded.runs.values()}):
        lines += _machine_lines(machine, loaded, [r for r in latest if r.machine_id == machine])
    orphans = [r for r in loaded.records if r.run_id not in loaded.runs]
    problems = list(loaded.problems) + [f"case {r.case_id} of run {r.run_id} has no run line" for r in orphans]
    problems += [f"case {r.case_id} is marked ok but its check failed" for r in latest
                 if r.status == "ok" and r.check and not r.check["passed"]]
    lines += [f"problem: {problem}" for problem in problems] or ["no problems"]
    return "\n".join(lines), not problems


def _machine_lines(machine: str, loaded: store.Loaded, records: list) -> list[str]:
    runs = [run for run in loaded.runs.values() if run.machine_id == machine]
    facts = max(runs, key=lambda run: run.started).machine if runs else {}
    lines = [f"{machine}: {facts.get('cpu', 'unknown CPU')}, {facts.get('physical_cores', '?')} physical cores; "
             f"{len(runs)} runs, {len(records)} cases"]
    for experiment in sorted({r.experiment for r in records}):
        mine = [r for r in records if r.experiment == experiment]
        counts = Counter(r.status for r in mine)
        samples = sum(len(r.samples_s) for r in mine)
        lines.append(f"  {experiment:<24}{', '.join(f'{n} {s}' for s, n in sorted(counts.items())):<28}{samples:>6} samples")
    return lines


if __name__ == "__main__":
    sys.exit(main())
