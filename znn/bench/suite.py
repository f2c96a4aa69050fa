"""The command line of `experiments/run_all.py`: choose cases, measure what has no record yet, rebuild the
figures."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import adapters, provenance, store
from .cluster import Cluster
from .estimate import Estimator
from .problem import Problem
from .progress import Progress, duration
from .record import Run, end_line
from .references import Reference
from .runner import Runner, grouped, pending
from .sweep import TIERS, Case, Sweep, SweepError, expand, load_all

ROOT = Path(__file__).resolve().parents[2]
COMPETITORS = ("torch_cpu", "torch_gpu")
NETWORK_PROTOCOL = {
    "interleave": ["adapter", "threads", "plan"],
    "warmups": 2,
    "min_rounds": 7,
    "max_s": 30.0,
}
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="run_all.py",
        description=__doc__.splitlines()[0] + " Interrupt it at any moment: "
        "the next run goes on where it stopped.",
    )
    p.add_argument(
        "--list",
        action="store_true",
        help="list the experiments with their cases and expected time, then stop",
    )
    p.add_argument("--only", metavar="NAMES", help="these experiments, separated by commas")
    p.add_argument(
        "--tier",
        choices=TIERS,
        default="quick",
        help="smoke: two minutes, quick: twenty minutes, "
        "paper: the paper's full grid, hours (default: quick)",
    )
    p.add_argument(
        "--threads",
        metavar="LIST",
        help="thread counts instead of the experiments' own: 1,2,4 or all, powers, physical, ends",
    )
    p.add_argument(
        "--baselines",
        metavar="LIST",
        help=f"competitors to run: {', '.join(COMPETITORS)} or none (default: all)",
    )
    p.add_argument("--case", metavar="ID", action="append", help="only the case of this id (repeatable)")
    p.add_argument("--dry-run", action="store_true", help="print what would be measured and stop")
    p.add_argument("--force", action="store_true", help="measure again what already has a record")
    p.add_argument(
        "--retry-failed",
        action="store_true",
        help="measure again what failed, was skipped, or ran out of memory or time",
    )
    p.add_argument(
        "--machine", metavar="NAME", help="name of this machine in the results (default: made from its CPU)"
    )
    p.add_argument(
        "--out", metavar="DIR", type=Path, default=ROOT / "results", help="results folder (default: results)"
    )
    p.add_argument(
        "--network",
        metavar="FILE",
        type=Path,
        help="measure your own network (.toml or .znn) instead of the experiments",
    )
    p.add_argument(
        "--sweep",
        metavar="AXIS=V,V",
        nargs="+",
        default=[],
        help="values of an axis, for --network or instead of "
        "the experiments' own: width=10,20 threads=1,2 output=8x8x8,16x16x16 plan=direct,fft",
    )
    p.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="spread the cases over machines: address of a dask.distributed scheduler "
        "(see znn/bench/cluster.py)",
    )
    p.add_argument("--strict", action="store_true", help="stop when the machine is too noisy to measure on")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 when a case failed, 2 for wrong usage or (--strict) a noisy machine, 130 when
    interrupted."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except (SweepError, store.StoreError, ValueError, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    if options.cluster:
        return run_on_cluster(options)
    cores = (provenance.physical_cores(), provenance.usable_cores())
    cases = chosen_cases(options, cores)
    loaded = store.load(options.out)
    for problem in loaded.problems:
        print(f"note: {problem}", file=sys.stderr)
    if options.list or options.dry_run:  # needs no sampling of the machine's state
        machine = options.machine or provenance.machine_id(provenance.identity())
    else:
        facts = provenance.gather(ROOT)
        machine = options.machine or provenance.machine_id(facts)
    records = [r for r in loaded.latest() if r.machine_id == machine]
    todo = pending(cases, records, options.force, options.retry_failed)
    estimator = Estimator(records)
    if options.list:
        print(listing(cases, todo, estimator))
        return 0
    if options.dry_run:
        print("\n".join(dry_lines(cases, todo, estimator, options)))
        return 0
    warnings = provenance.warnings(facts)
    for warning in warnings:
        print(f"{'error' if options.strict else 'warning'}: {warning}", file=sys.stderr)
    if options.strict and warnings:
        return 2
    failed = measure(todo, facts, machine, warnings, options, estimator) if todo else 0
    if not todo:
        print(
            f"all {len(cases)} cases have records in {options.out}; --force measures them again",
            file=sys.stderr,
        )
    return max(build_figures(options.out), failed)


def chosen_cases(options: argparse.Namespace, cores: tuple[int, int]) -> list[Case]:
    """The cases the command line asks for. Raises SweepError for unknown experiments, axes or competitors."""
    overrides = parse_axes(options.sweep)
    if options.threads:
        overrides["threads"] = parse_axes([f"threads={options.threads}"])["threads"]
    competitors = parse_competitors(options.baselines)
    if options.network:
        sweeps = [network_sweep(options.network, overrides, competitors)]
    else:
        sweeps = load_all(ROOT / "experiments" / "sweeps")
    if options.only:
        wanted = options.only.split(",")
        names = {sweep.name for sweep in sweeps}
        if unknown := [name for name in wanted if name not in names]:
            raise SweepError(f"--only {unknown[0]}: no such experiment; there are {', '.join(sorted(names))}")
        sweeps = [sweep for sweep in sweeps if sweep.name in wanted]
    excluded = set(COMPETITORS) - set(competitors)
    cases = [
        case
        for sweep in sweeps
        for case in expand(sweep, options.tier, cores, applicable(sweep, overrides, options))
        if case.adapter not in excluded
    ]
    if options.case:
        cases = [case for case in cases if case.case_id in options.case]
        if not cases:
            raise SweepError(f"--case {' '.join(options.case)}: no such case in tier {options.tier}")
    return cases


def checked_problems() -> Iterator[tuple[str, Reference]]:
    """The reduced problems of every timed case of the project's sweeps, with a description of each."""
    seen = set()
    for tier, sweep in itertools.product(TIERS, load_all(ROOT / "experiments" / "sweeps")):
        for case in expand(sweep, tier, (1, 1)):
            small, adapter = Problem.from_dict(case.problem).reduced(), adapters.load(case.adapter)
            if isinstance(adapter, adapters.Timed) and adapter.referenced and small not in seen:
                seen.add(small)
                yield case.label, adapters.reference(small)


def applicable(sweep: Sweep, overrides: dict[str, list], options: argparse.Namespace) -> dict[str, list]:
    """The overrides an experiment has an axis for: --threads means nothing to the theory."""
    if options.network:
        return {}
    text = [sweep.data.get("grid", {}), *sweep.data.get("tied", [])]
    axes = {key for table in text for key in table}
    return {key: values for key, values in overrides.items() if key in axes}


def parse_axes(items: Sequence[str]) -> dict[str, list]:
    """`axis=v,v` texts as values: numbers where they are numbers, extents such as 8x8x8 as lists."""
    axes: dict[str, list] = {}
    for item in items:
        axis, equals, values = item.partition("=")
        if not equals or not axis or not values:
            raise SweepError(f"--sweep {item}: expected AXIS=VALUE,VALUE")
        axes[axis] = [_value(text) for text in values.split(",")]
    return axes


def _value(text: str) -> Any:
    if text.isdigit():
        return int(text)
    parts = text.split("x")
    return [int(p) for p in parts] if len(parts) > 1 and all(p.isdigit() for p in parts) else text


def parse_competitors(text: str | None) -> list[str]:
    if text is None:
        return list(COMPETITORS)
    chosen = [] if text == "none" else text.split(",")
    if unknown := [name for name in chosen if name not in COMPETITORS]:
        raise SweepError(f"--baselines {unknown[0]}: expected {', '.join(COMPETITORS)} or none")
    return chosen


def network_sweep(path: Path, axes: dict[str, list], competitors: list[str]) -> Sweep:
    """An experiment made of a network file and the axes of the command line."""
    if not path.is_file():
        raise SweepError(f"--network {path}: no such file")
    grid: dict[str, Any] = {"network": str(path), "threads": "ends"} | axes
    head = {"name": f"network_{path.stem}", "title": path.name, "adapter": ["znn", *competitors]}
    return Sweep(
        head["name"], head["title"], path, {"experiment": head, "protocol": NETWORK_PROTOCOL, "grid": grid}
    )


def repeat_command(case: Case, options: argparse.Namespace) -> str:
    """The command that measures one case again."""
    words = ["python", "experiments/run_all.py"]
    if options.network:
        words += ["--network", str(options.network)]
    else:
        words += ["--only", case.experiment, "--tier", options.tier]
    words += ["--threads", options.threads] if options.threads else []
    words += ["--sweep", *options.sweep] if options.sweep else []
    return shlex.join([*words, "--case", case.case_id, "--force"])


def listing(cases: list[Case], todo: list[Case], estimator: Estimator) -> str:
    """A table of experiments: cases, how many have records, expected time of the rest."""
    rows = [f"{'experiment':<24}{'cases':>7}{'recorded':>10}   time left"]
    for name in dict.fromkeys(case.experiment for case in cases):
        mine, left = ([c for c in some if c.experiment == name] for some in (cases, todo))
        seconds = sum(estimator.case_s(case) for case in left)
        rows.append(f"{name:<24}{len(mine):>7}{len(mine) - len(left):>10}   {duration(seconds)}")
    return "\n".join(
        [
            *rows,
            f"{'in all':<24}{len(cases):>7}{len(cases) - len(todo):>10}   "
            f"{duration(sum(map(estimator.case_s, todo)))}",
        ]
    )


def dry_lines(
    cases: list[Case], todo: list[Case], estimator: Estimator, options: argparse.Namespace
) -> list[str]:
    """One line per case, and the command that measures it alone; then the experiments and the time in all."""
    waiting = {(case.experiment, case.case_id) for case in todo}
    lines = []
    for case in cases:
        state = duration(estimator.case_s(case)) if (case.experiment, case.case_id) in waiting else "recorded"
        lines += [f"{case.case_id} {state:>9}  {case.label}", f"    {repeat_command(case, options)}"]
    return [
        *lines,
        "",
        *listing(cases, todo, estimator).splitlines(),
        f"{len(todo)} of {len(cases)} cases to measure, about {duration(sum(map(estimator.case_s, todo)))}",
    ]


def measure(
    todo: list[Case],
    facts: dict,
    machine: str,
    warnings: list[str],
    options: argparse.Namespace,
    estimator: Estimator,
) -> int:
    """Measure and record; returns 1 when a case failed."""
    run_id = new_run_id()
    settings = {"tier": options.tier, "arguments": sys.argv[1:], "cases": len(todo)}
    writer = store.RunWriter(options.out, Run(run_id, machine, provenance.now(), facts, settings, warnings))
    groups = grouped(todo)
    progress = Progress([sum(map(estimator.case_s, group)) for group in groups])
    progress.note(
        f"{len(todo)} cases in {len(groups)} groups, about {duration(progress.left_s())}; records go to "
        f"{writer.path}"
    )
    statuses: Counter[str] = Counter()
    begin, complete = time.perf_counter(), False
    runner = Runner(writer, run_id, lambda case: repeat_command(case, options), say=progress.show)
    try:
        for group in groups:
            progress.show(group[0].label + (f" and {len(group) - 1} more" if len(group) > 1 else ""))
            for record in runner.run_group(group):
                statuses[record.status] += 1
                if record.status != "ok":
                    case = next(c for c in group if c.case_id == record.case_id)
                    progress.note(f"{record.status}: {case.label}: {record.reason}")
            progress.step()
        complete = True
    finally:
        progress.close()
        runner.close()
        wall = time.perf_counter() - begin
        writer.write(
            end_line(
                run_id,
                wall_s=wall,
                stages_s=runner.seconds,
                overhead_s=wall - runner.measuring_s,
                complete=complete,
                ended=provenance.now(),
            )
        )
        writer.close()
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    print(f"{counts}; {where_time_went(wall, runner)}", file=sys.stderr)
    return int(statuses["failed"] > 0)


def where_time_went(wall: float, runner: Runner) -> str:
    """One sentence for the end of a run: the seconds measured, and what the suite cost besides."""
    spent, rest = runner.seconds, wall - runner.measuring_s
    elsewhere = rest - spent["check"]
    timed = sum(spent[stage] for stage in runner.TIMED)
    return (
        f"{duration(wall)}: {timed:.0f} s of timed work, {spent['setup']:.0f} s of setting up what was timed, "
        f"{spent['waiting']:.0f} s of waiting for the machine; "
        f"overhead {rest / wall:.1%} ({spent['check']:.0f} s checking results, {elsewhere:.0f} s elsewhere)"
    )


def run_on_cluster(options: argparse.Namespace) -> int:
    """Measure what no machine of the cluster has a record of, each group on one of them."""
    cluster = Cluster(options.cluster)
    try:
        cases = chosen_cases(options, cluster.cores())
        mine = {machine["machine_id"] for machine in cluster.machines.values()}
        records = [r for r in store.load(options.out).latest() if r.machine_id in mine]
        groups = grouped(pending(cases, records, options.force, options.retry_failed))
        failed = measure_on_cluster(cluster, groups, options) if groups else 0
    finally:
        cluster.close()
    return max(build_figures(options.out), failed)


def measure_on_cluster(cluster: Cluster, groups: list[list[Case]], options: argparse.Namespace) -> int:
    """Record groups as they come back, each in the run file of its machine; returns 1 when a case failed."""
    run_id, begin = new_run_id(), time.perf_counter()
    settings = {"tier": options.tier, "arguments": sys.argv[1:], "cluster": options.cluster}
    runs = cluster.runs(run_id, settings)
    writers = {machine: store.RunWriter(options.out, run) for machine, run in runs.items()}
    commands = {case.case_id: repeat_command(case, options) for group in groups for case in group}
    progress, failed = Progress([1.0] * len(groups)), 0
    try:
        for machine, found in cluster.measure(groups, commands, run_id):
            progress.show(f"{found[0].experiment} on {machine}")
            for record in found:
                writers[machine].write(dataclasses.replace(record, run_id=runs[machine].run_id))
                failed |= int(record.status == "failed")
            progress.step()
    finally:
        progress.close()
        for machine, writer in writers.items():
            writer.write(
                end_line(runs[machine].run_id, wall_s=time.perf_counter() - begin, ended=provenance.now())
            )
            writer.close()
    return failed


def new_run_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


def build_figures(results: Path) -> int:
    """Rebuild figures, claims and report from the records, in a process that does not know the engine."""
    own = results.resolve() == (ROOT / "results").resolve()
    figures = ROOT / "paper_figs" / "built" if own else results / "figures"
    command = [
        sys.executable,
        str(ROOT / "paper_figs" / "build.py"),
        "--results",
        str(results),
        "--out",
        str(figures),
    ]
    return subprocess.run(command).returncode
