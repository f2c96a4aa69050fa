"""Look after results: what is there, whether two runs agree, and the reference outputs that checks use.

python -m znn.bench check results/                  what a results folder holds, and what is wrong with it
python -m znn.bench agree FIRST SECOND              whether two runs (files, folders or run ids) agree
python -m znn.bench whole-nets results/             the table of whole networks beside PyTorch, as Markdown and CSV
python -m znn.bench references                      renew the kept outputs of the float64 reference
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from . import agree, store

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, 1 when something is wrong or the runs disagree, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m znn.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="summarise a results folder").add_argument("folder", type=Path)
    two = commands.add_parser("agree", help="compare two runs of the same cases")
    two.add_argument("first", help="a run file, a results folder or a run id")
    two.add_argument("second")
    two.add_argument("--results", default=str(ROOT / "results"), help="where runs are looked up by id")
    two.add_argument("--all", action="store_true", help="print every case, not only those that differ")
    table = commands.add_parser("whole-nets", help="write whole_nets.md and whole_nets.csv into a results folder")
    table.add_argument("folder", type=Path)
    commands.add_parser("references", help="compute the reference outputs that are missing; drop those unused")
    options = parser.parse_args(arguments)
    try:
        text, sound = COMMANDS[options.command](options)
    except store.StoreError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return 0 if sound else 1


def check_command(options: argparse.Namespace) -> tuple[str, bool]:
    if not options.folder.is_dir():
        raise store.StoreError(f"{options.folder}: no such folder")
    return check(options.folder)


def agree_command(options: argparse.Namespace) -> tuple[str, bool]:
    records = (store.find(where, options.results).latest() for where in (options.first, options.second))
    found = agree.agreement(*records)
    return agree.to_text(found, options.all), found.sound


def whole_nets_command(options: argparse.Namespace) -> tuple[str, bool]:
    from . import whole_nets

    found, markdown, table = whole_nets.of_results(options.folder)
    if not found:
        raise store.StoreError(f"{options.folder}: no records of {whole_nets.EXPERIMENT}, see experiments/run_all.py")
    for name, text in (("whole_nets.md", markdown), ("whole_nets.csv", table)):
        (options.folder / name).write_text(text)
    return markdown, True


def references_command(options: argparse.Namespace) -> tuple[str, bool]:
    from . import references, suite

    kept, computed = references.renew(suite.checked_problems())
    return f"{kept} reference outputs in {references.KEPT}, {computed} computed now", True


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


COMMANDS = {
    "check": check_command,
    "agree": agree_command,
    "whole-nets": whole_nets_command,
    "references": references_command,
}

if __name__ == "__main__":
    sys.exit(main())
