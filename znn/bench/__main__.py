"""`python -m znn.bench check results/`: what is there, and what is wrong with it.

`python -m znn.bench compare first/ second/`: whether two runs of the same cases agree within their intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from . import stats, store

AGREEING = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m znn.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="summarise a results folder").add_argument(
        "folders", type=Path, nargs=1
    )
    commands.add_parser("compare", help="compare two results folders").add_argument(
        "folders", type=Path, nargs=2
    )
    options = parser.parse_args()
    for folder in options.folders:
        if not folder.is_dir():
            print(f"{folder}: no such folder", file=sys.stderr)
            return 2
    text, sound = (check if options.command == "check" else compare)(*options.folders)
    print(text)
    return 0 if sound else 1


def check(root: Path) -> tuple[str, bool]:
    """A summary of a results folder, and whether every line could be read and every case that ran is
    right."""
    loaded = store.load(root)
    lines, latest = [], loaded.latest()
    for machine in sorted({r.machine_id for r in latest} | {r.machine_id for r in loaded.runs.values()}):
        lines += _machine_lines(machine, loaded, [r for r in latest if r.machine_id == machine])
    orphans = [r for r in loaded.records if r.run_id not in loaded.runs]
    problems = list(loaded.problems) + [
        f"case {r.case_id} of run {r.run_id} has no run line" for r in orphans
    ]
    problems += [
        f"case {r.case_id} is marked ok but its check failed"
        for r in latest
        if r.status == "ok" and r.check and not r.check["passed"]
    ]
    lines += [f"problem: {problem}" for problem in problems] or ["no problems"]
    return "\n".join(lines), not problems


def compare(first: Path, second: Path) -> tuple[str, bool]:
    """The cases both folders hold, by machine, and whether the share of overlapping intervals is what chance
    allows.

    Intervals of two sound 95 % medians overlap in more than 95 % of cases (99 % for equal widths); a share
    below 90 % means
    the machine changed between the runs or is too noisy.
    """
    tables = [
        {(r.machine_id, r.experiment, r.case_id): r for r in store.load(folder).latest() if r.samples_s}
        for folder in (first, second)
    ]
    lines, overlapping, common = [], 0, sorted(set(tables[0]) & set(tables[1]))
    for key in common:
        a, b = (stats.median(table[key].samples_s) for table in tables)
        overlapping += a.overlaps(b)
        lines.append(
            f"{'agrees ' if a.overlaps(b) else 'DIFFERS'} {b.value / a.value:6.3f}  {a.low:.4g}..{a.high:.4g} "
            f""
            f"s  "
            f"{b.low:.4g}..{b.high:.4g} s  {key[1]} {key[2]}"
        )
    share = overlapping / len(common) if common else 0.0
    lines.append(f"{overlapping} of {len(common)} cases agree within their intervals ({share:.0%})")
    return "\n".join(lines), share >= AGREEING


def _machine_lines(machine: str, loaded: store.Loaded, records: list) -> list[str]:
    runs = [run for run in loaded.runs.values() if run.machine_id == machine]
    facts = max(runs, key=lambda run: run.started).machine if runs else {}
    lines = [
        f"{machine}: {facts.get('cpu', 'unknown CPU')}, {facts.get('physical_cores', '?')} physical cores; "
        f"{len(runs)} runs, {len(records)} cases"
    ]
    for experiment in sorted({r.experiment for r in records}):
        mine = [r for r in records if r.experiment == experiment]
        counts = Counter(r.status for r in mine)
        samples = sum(len(r.samples_s) for r in mine)
        lines.append(
            f"  {experiment:<24}{', '.join(f'{n} {s}' for s, n in sorted(counts.items())):<28}{samples:>6} "
            f"samples"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
