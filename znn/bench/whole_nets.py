"""The table of whole networks beside PyTorch, from the records of the experiment `whole_nets` and what its file asks.

A number passes where the whole of its interval does, and fails where none of it does; else it is open.
"""

from __future__ import annotations

import csv
import io
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import stats, store
from .provenance import machine_names
from .record import Record
from .stats import Estimate

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT, OURS, THEIRS, PAPERS, COPIES = "whole_nets", "znn_bundled", "torch_cpu", "znn", "znn_copies"
SEARCH = "plan_search"
PASSED, FAILED, OPEN = "yes", "no", "open"
PHASES = {"round": "training", "forward": "forward"}


@dataclass(frozen=True)
class Row:
    """One net, phase and number of threads. Ratios are the competitor's value over ours; speedup is one thread's time over
    this number's; room: the speedup of as many networks of one worker side by side, which share nothing but the machine;
    search: a round by the plan's choices over one by the best of an exhaustive search, on one core; exchange: bytes per second
    from core to core, before and after."""

    machine: str
    net: str
    phase: str
    threads: int
    seconds: Estimate
    theirs: Estimate | None = None
    papers: Estimate | None = None
    ratio: Estimate | None = None
    memory: float | None = None
    speedup: Estimate | None = None
    room: Estimate | None = None
    search: Estimate | None = None
    bound_s: float | None = None
    exchange: tuple[float, ...] = ()
    error: float | None = None
    reason: str = ""
    versions: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    samples: int = 0

    def verdict(self, what: str) -> str:
        """Of ratio, memory, speedup or search; empty where nothing is asked or known."""
        if what == "memory":
            limit = self.asked.get("memory")
            return "" if limit is None or self.memory is None else (PASSED if self.memory <= limit else FAILED)
        value, limit = getattr(self, what), self.limit(what)
        if value is None or limit is None:
            return ""
        if what == "search":
            return PASSED if value.high <= limit else FAILED if value.low > limit else OPEN
        return PASSED if value.low >= limit else FAILED if value.high < limit else OPEN

    def limit(self, what: str) -> float | None:
        """What is asked of ratio or speedup."""
        if what == "speedup":
            if self.threads == 1:
                return None
            return self.asked.get("speedup") if self.threads == 2 else self.asked.get("efficiency", 0) * self.threads or None
        return self.asked.get(what)


def requirements(path: Path = ROOT / "experiments" / "sweeps" / "whole_nets.toml") -> list[dict[str, Any]]:
    """The [[asked]] tables of the sweep file."""
    return tomllib.loads(path.read_text()).get("asked", [])


def asked_of(problem: dict[str, Any], tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is asked of a problem: the values of all tables that it agrees with, the last one winning."""
    found: dict[str, Any] = {}
    for table in tables:
        axes = {k: v for k, v in table.items() if k in ("net", "output", "width", "phase", "kernel", "form")}
        if all(problem.get(k) == v or (isinstance(v, list) and problem.get(k) in v) for k, v in axes.items()):
            found |= {k: v for k, v in table.items() if k not in axes}
    return found


def rows(records: Sequence[Record], tables: Sequence[dict[str, Any]] | None = None) -> list[Row]:
    """A row for every good record of ours, training first, in the order of what is asked; records: of any status."""
    tables = requirements() if tables is None else tables
    mine = [r for r in records if r.experiment == EXPERIMENT]
    ours = [r for r in mine if r.adapter_name == OURS and r.status == "ok"]
    searches = [r for r in records if r.adapter_name == SEARCH and r.status == "ok"]
    return [_row(record, mine, tables, searches) for record in sorted(ours, key=lambda record: _place(record, tables))]


def _place(record: Record, tables: Sequence[dict[str, Any]]) -> tuple:
    problem = record.problem
    fitting = [i for i, table in enumerate(tables) if "ratio" in table and asked_of(problem, [table])]
    return (record.machine_id, list(PHASES).index(problem.get("phase", "round")), fitting[:1] or [len(tables)],
            str(problem.get("net")), problem.get("width") or 0, record.options["threads"])


def _row(ours: Record, records: Sequence[Record], tables: Sequence[dict[str, Any]], searches: Sequence[Record]) -> Row:
    def other(adapter: str, threads: int) -> Record | None:
        return next((r for r in records if r.machine_id == ours.machine_id and r.problem == ours.problem
                     and r.adapter_name == adapter and r.options.get("threads") == threads), None)

    threads = ours.options["threads"]
    theirs, papers, one, copies = (other(*wanted) for wanted in
                                   ((THEIRS, threads), (PAPERS, threads), (OURS, 1), (COPIES, threads)))
    good = theirs is not None and theirs.status == "ok"
    bound = ours.metrics.get("bound_s")
    return Row(
        machine=ours.machine_id, net=name_of(ours.problem), phase=PHASES[ours.problem.get("phase", "round")], threads=threads,
        seconds=stats.median(ours.samples_s),
        theirs=stats.median(theirs.samples_s) if good else None,
        papers=stats.median(papers.samples_s) if papers is not None and papers.status == "ok" else None,
        ratio=paired(theirs, ours) if good else None,
        memory=ours.peak_rss_bytes / theirs.peak_rss_bytes if good and theirs.peak_rss_bytes else None,
        speedup=paired(one, ours) if one is not None and one.status == "ok" and threads > 1 else None,
        room=_room(one, copies, threads) if threads > 1 else None,
        search=_search(ours, searches) if threads == 1 and ours.problem.get("phase", "round") == "round" else None,
        bound_s=bound / threads if bound else None,
        exchange=tuple(sorted(ours.metrics.get("exchange_bytes_per_s", ()))),
        error=(ours.check or {}).get("max_rel_err"),
        reason="" if good else f"PyTorch: {theirs.status}: {theirs.reason}" if theirs else "PyTorch: not measured",
        versions=f"PyTorch {theirs.adapter.get('version', '')}, {_path(theirs.plan)}" if good else "",
        asked=asked_of(ours.problem, tables), samples=len(ours.samples_s),
    )


def _room(one: Record | None, copies: Record | None, threads: int) -> Estimate | None:
    """Rounds per second of copies side by side over those of one alone."""
    if one is None or copies is None or "ok" != one.status or "ok" != copies.status:
        return None
    return stats.unpaired_ratio(one.samples_s, [seconds / threads for seconds in copies.metrics["round_s"]])


def _search(ours: Record, searches: Sequence[Record]) -> Estimate | None:
    """Seconds of the chosen plan over those of the best, all layers together."""
    layers = next((r.metrics["layers"] for r in searches if r.machine_id == ours.machine_id and all(
        r.problem.get(axis) == ours.problem.get(axis) for axis in ("net", "output", "width"))), None)
    if not layers:
        return None
    chosen, best = ([sum(turn) for turn in zip(*(layer[which] for layer in layers))] for which in ("seconds", "best_seconds"))
    return stats.ratio(chosen, best)


def paired(numerator: Record, denominator: Record) -> Estimate:
    """Ratio of medians, over paired rounds where both were measured in the same ones."""
    together = numerator.run_id == denominator.run_id and denominator.case_id in numerator.interleaved_with
    return (stats.ratio if together else stats.unpaired_ratio)(numerator.samples_s, denominator.samples_s)


def name_of(problem: dict[str, Any]) -> str:
    """3d_3, output 8x8x8, width 40."""
    output = problem.get("output", 1)
    side = "x".join(map(str, output)) if isinstance(output, list) else str(output)
    return f"{problem.get('net')}, output {side}, width {problem.get('width')}"


def _path(plan: str) -> str:
    """Layout and convolution code of a PyTorch plan: 'layout x (trial laps: ...); oneDNN: ...'."""
    layout, kinds = re.match(r"layout (\w+)", plan), re.findall(r"convolution (\S+) x(\d+)", plan)
    code = ", ".join(f"{name} x{count}" for name, count in kinds) or "no oneDNN convolution"
    return f"{layout[1] if layout else 'unknown layout'}, {code}"


# ---- the table --------------------------------------------------------------------------------------------
def to_markdown(found: Sequence[Row], machines: dict[str, str], provenance: str = "") -> str:
    """The table by machine, then what ran; `machines`: what to call them."""
    lines = ["# Whole networks beside PyTorch", "",
             "Made by `python -m znn.bench whole-nets results/` from the records; see docs/measuring.md for how they are taken. "
             "A round of training is backward, update and forward. Ratios are PyTorch's seconds over ours, with 95 % intervals over "
             "paired rounds; bound: the least time that arithmetic, caches and memory allow the methods chosen, as a share of the time "
             "taken; room: the speedup of as many networks of one worker each, side by side, which is what the machine has room "
             "for; over best plan: a round by the plan's choices over one by the best of an exhaustive search, layer by layer on one core "
             "(experiment `plan_search`); exchange: how fast spectra went from one core to another, before and after the rounds, in GB/s, "
             "which small networks on several workers wait for (where cores of a virtual machine are moved apart, it drops, which "
             "rounds wait for to pass if their protocol has patience); memory: our peak over PyTorch's; largest error: of the outputs of "
             "the same net, reduced, after its rounds, against "
             "float64 (native/tests/tiled_test.cpp holds single operations to 2e-6).", ""]
    for machine in dict.fromkeys(row.machine for row in found):
        mine = [row for row in found if row.machine == machine]
        lines += [f"## {machines.get(machine, machine)}", "",
                  "| net | phase | threads | seconds | PyTorch | paper's engine | times faster | asked | passed | memory | passed | "
                  "speedup | passed | room | exchange | over best plan | passed | bound | largest error |", "|---|---|---" + "|---:" * 16 + "|"]
        lines += [_line(row) for row in mine]
        for what, text in (("ratio", "times faster"), ("memory", "memory"), ("speedup", "speedup"), ("search", "over best plan")):
            verdicts = [row.verdict(what) for row in mine if row.verdict(what)]
            if verdicts:
                lines += ["", f"{text}: {verdicts.count(PASSED)} of {len(verdicts)} pass, {verdicts.count(OPEN)} open."]
        lines += ["", "PyTorch ran:", ""]
        lines += [f"- {row.net}, {row.phase}, threads {row.threads}: {row.versions or row.reason}" for row in mine]
        lines += [""]
    return "\n".join([*lines, *([provenance, ""] if provenance else [])])


def _line(row: Row) -> str:
    cells = [row.net, row.phase, str(row.threads), f"{row.seconds.value:.4g}", f"{row.theirs.value:.4g}" if row.theirs else "–",
             f"{row.papers.value:.4g}" if row.papers else "–", _interval(row.ratio), _number(row.asked.get("ratio")),
             row.verdict("ratio"), _number(row.memory, ".2f"), row.verdict("memory"), _interval(row.speedup),
             row.verdict("speedup"), _interval(row.room), " to ".join(f"{rate / 1e9:.3g}" for rate in row.exchange) or "–",
             _interval(row.search), row.verdict("search"), f"{row.bound_s / row.seconds.value:.0%}" if row.bound_s else "–",
             _number(row.error, ".1e")]
    return "| " + " | ".join(cells) + " |"


def _interval(value: Estimate | None) -> str:
    return "–" if value is None else f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _number(value: float | None, form: str = "g") -> str:
    return "–" if value is None else format(value, form)


COLUMNS = ("machine", "net", "phase", "threads", "samples", "seconds", "seconds_low", "seconds_high", "torch_seconds",
           "paper_seconds", "ratio", "ratio_low", "ratio_high", "asked", "aim", "ratio_passed", "memory_ratio", "memory_passed",
           "speedup", "speedup_low", "speedup_high", "speedup_passed", "room", "room_low", "room_high", "exchange_low",
           "exchange_high", "search", "search_low",
           "search_high", "search_passed", "bound_seconds", "error", "versions", "reason")


def to_dict(row: Row) -> dict[str, Any]:
    """A row as columns of numbers and words."""
    def three(name: str, value: Estimate | None) -> dict[str, float]:
        return {} if value is None else {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}

    found: dict[str, Any] = {
        "machine": row.machine, "net": row.net, "phase": row.phase, "threads": row.threads, "samples": row.samples,
        **three("seconds", row.seconds), "torch_seconds": row.theirs.value if row.theirs else None,
        "paper_seconds": row.papers.value if row.papers else None, **three("ratio", row.ratio), "asked": row.asked.get("ratio"),
        "aim": row.asked.get("aim"), "ratio_passed": row.verdict("ratio"), "memory_ratio": row.memory,
        "memory_passed": row.verdict("memory"), **three("speedup", row.speedup), "speedup_passed": row.verdict("speedup"),
        **three("room", row.room), **three("search", row.search),
        "exchange_low": row.exchange[0] if row.exchange else None, "exchange_high": row.exchange[-1] if row.exchange else None,
        "search_passed": row.verdict("search"), "bound_seconds": row.bound_s, "error": row.error, "versions": row.versions, "reason": row.reason,
    }
    return {column: found.get(column) for column in COLUMNS}


def to_csv(found: Sequence[Row]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(to_dict, found))
    return text.getvalue()


def of_results(root: str | Path) -> tuple[list[Row], str, str]:
    """The rows of a results folder, and the table as Markdown and CSV."""
    loaded = store.load(root)
    found = rows(loaded.distinct())
    return found, to_markdown(found, machine_names(loaded.machines())), to_csv(found)
