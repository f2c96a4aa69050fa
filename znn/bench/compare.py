"""One network in ZNN and in a competitor, side by side: `znn bench NET --against torch`.

Both get the same parameters, inputs and output gradients; they train a little and are compared before anything is timed.
Then they take turns, round by round, each in a process of its own with as many threads; memory is measured apart, in
processes that do nothing else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import stats
from .adapters import preloads
from .forkserver import ForkServer
from .protocol import Protocol
from .runner import CaseStopped, Child
from .stats import Estimate
from .sweep import Case

COMPETITORS = {"torch": "torch_cpu"}
PROTOCOL = Protocol(warmups=2, min_rounds=7, max_rounds=25, spread=0.02, max_s=20.0, turn_s=0.1, timeout_s=7200.0)
CHECK_ROUNDS, MEMORY_LAPS = 1, 3
TOLERANCE = {"output": 1e-3, "parameter": 1e-2}  # of the largest output, of the largest change of a parameter


class CompareError(ValueError):
    """The two cannot be compared; the sentence says which and why."""


@dataclass(frozen=True)
class Side:
    """One of those compared: what it is called, its adapter and options."""

    name: str
    adapter: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What was found out about one side on some number of threads."""

    side: Side
    version: str
    plan: str
    samples_s: list[float]
    peak_bytes: int
    differences: dict[str, float]  # from the competitor, of the largest value or change

    @property
    def seconds(self) -> Estimate:
        return stats.median(self.samples_s)


@dataclass
class Comparison:
    """All sides on some number of threads; the competitor is last."""

    title: str
    threads: int
    forward: bool
    results: list[Result]

    def ratio(self, result: Result) -> Estimate:
        """How many times faster than the competitor, over paired rounds."""
        return stats.ratio(self.results[-1].samples_s, result.samples_s)


def compare(title: str, problem: dict[str, Any], ours: Sequence[Side], against: str, threads: int,
            protocol: Protocol = PROTOCOL, say: Callable[[str], None] = lambda text: None) -> Comparison:
    """Check, time and weigh one problem (see `znn.bench.problem`) on some number of threads. Raises CompareError."""
    theirs = Side(against, COMPETITORS.get(against, against))
    sides = [*ours, theirs]
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="znn-compare-")))
        servers = {side.adapter: ForkServer(preloads(side.adapter)) for side in sides}
        for server in servers.values():
            stack.callback(server.close)
        taking_part = [_Turn(side, _case(problem, side, threads, protocol), servers[side.adapter], say) for side in sides]
        for turn in taking_part:
            stack.callback(turn.close)
        for turn in taking_part:
            turn.begin(shared)
        differences = [compare_outcomes(turn.outcome, taking_part[-1].outcome, turn.side.name) for turn in taking_part]
        for turn in taking_part:
            turn.open()
        _take_turns(taking_part, protocol, say)
        for turn in taking_part:
            turn.close()
        peaks = [_peak(turn, servers[turn.side.adapter], say) for turn in taking_part]
    results = [Result(turn.side, turn.version, turn.plan, turn.samples, peak, found)
               for turn, peak, found in zip(taking_part, peaks, differences)]
    return Comparison(title, threads, problem.get("phase") == "forward", results)


def _case(problem: dict[str, Any], side: Side, threads: int, protocol: Protocol) -> Case:
    return Case("compare", problem, side.adapter, {"threads": threads} | side.options, protocol)


class _Turn:
    """One side's process while it is timed."""

    def __init__(self, side: Side, case: Case, server: ForkServer, say: Callable[[str], None]) -> None:
        self.side, self.case, self._say = side, case, say
        self._child: Child | None = Child(case, server)
        self.version, self.plan, self.samples, self.outcome = "", "", [], {}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._child.ask(do, **arguments)
        except CaseStopped as stopped:
            raise CompareError(f"{self.side.name}: {stopped}") from None

    def begin(self, shared: Path) -> None:
        """Find out whether it is there, and what it makes of a little training."""
        case = self.case
        facts = self.ask("predict", case={"problem": case.problem, "adapter": case.adapter, "options": case.options})
        if "unavailable" in facts:
            raise CompareError(f"{self.side.name} is not available: {facts['unavailable']}")
        self.version = facts["version"]
        self._say(f"{self.side.name}: planning and checking")
        path = shared / f"{id(self)}.npz"
        self.ask("outcome", path=str(path), rounds=CHECK_ROUNDS)
        with np.load(path, allow_pickle=False) as file:
            self.outcome = dict(file)
        path.unlink()

    def open(self) -> None:
        self._say(f"{self.side.name}: setting up")
        self.plan = self.ask("open")["plan"]
        for _ in range(self.case.protocol.warmups):
            self.ask("lap")
        self.outcome = {}

    def lap(self) -> None:
        self.samples.append(self.ask("lap", turn_s=self.case.protocol.turn_s)["s"])

    def close(self) -> None:
        if self._child:
            self._child.close()
            self._child = None


def _take_turns(taking_part: list[_Turn], protocol: Protocol, say: Callable[[str], None]) -> None:
    for count, order in enumerate(protocol.orders(len(taking_part)), 1):
        say(f"round {count}: " + ", ".join(f"{turn.side.name} {turn.samples[-1]:.4g} s" for turn in taking_part if turn.samples))
        for index in order:
            taking_part[index].lap()
        if protocol.enough([turn.samples for turn in taking_part]):
            return


def _peak(turn: _Turn, server: ForkServer, say: Callable[[str], None]) -> int:
    """Peak memory of a process that only runs the network, in the layout that was timed."""
    layout = re.match(r"layout (\w+)", turn.plan)
    options = turn.side.options | ({"layout": layout[1]} if layout else {})
    case = replace(turn.case, options={"threads": turn.case.options["threads"]} | options)
    say(f"{turn.side.name}: measuring memory")
    alone = _Turn(replace(turn.side, options=options), case, server, say)
    try:
        alone.ask("predict", case={"problem": case.problem, "adapter": case.adapter, "options": case.options})
        alone.ask("open")
        alone.ask("mark")
        for _ in range(MEMORY_LAPS):
            alone.ask("lap")
        return alone.ask("finish")["peak_rss_bytes"]
    finally:
        alone.close()


def compare_outcomes(got: dict[str, np.ndarray], want: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """The largest difference of outputs, of the largest output, and of parameters, of the largest change of one.

    Raises CompareError where they differ by more than rounding.
    """
    found = {}
    for kind, limit in TOLERANCE.items():
        keys = [key for key in want if key.startswith(kind)]
        scale = _largest(want, keys, "start" if kind == "parameter" else "")
        differences = [float(np.abs(got[key] - want[key]).max()) for key in keys]
        found[kind] = max(differences, default=0.0) / scale
        if not found[kind] <= limit:
            raise CompareError(f"{name} computes something else: {kind}s differ by {found[kind]:.3g}, expected at most {limit:g}; "
                               "nothing was timed")
    return found


def _largest(arrays: dict[str, np.ndarray], keys: list[str], before: str) -> float:
    """The largest value, or the largest change since the array of the same name under `before`."""
    values = [np.abs(arrays[key] - arrays.get(f"{before} {key}", np.zeros(1, np.float32))).max() for key in keys]
    return max(map(float, values), default=0.0) or 1.0


# ---- the text ---------------------------------------------------------------------------------------------
def to_text(found: Sequence[Comparison]) -> str:
    """A block for each number of threads, then what more threads bring."""
    return "\n\n".join([*map(_block, found), *([_speedups(found)] if len(found) > 1 else [])])


def _block(comparison: Comparison) -> str:
    what = "a round is a forward pass" if comparison.forward else "a round is backward, update and forward"
    lines = [f"{comparison.title}, {comparison.threads} thread{'s' if comparison.threads > 1 else ''}; {what}",
             f"{'':<24}{'s/round':>10}{'95 % interval':>22}{'rounds':>8}{'peak memory':>14}{'times faster':>26}"]
    theirs = comparison.results[-1]
    for result in comparison.results:
        e = result.seconds
        ratio = "" if result is theirs else "{0.value:.2f} ({0.low:.2f} to {0.high:.2f})".format(comparison.ratio(result))
        lines.append(f"{_label(result):<24}{e.value:>10.4g}{f'{e.low:.4g} to {e.high:.4g}':>22}{len(result.samples_s):>8}"
                     f"{result.peak_bytes / 2**20:>10.0f} MiB{ratio:>26}")
    for result in comparison.results[:-1]:
        share = result.peak_bytes / theirs.peak_bytes
        lines.append(f"{result.side.name}: {share:.2f} of {theirs.side.name}'s memory; largest difference: outputs "
                     f"{result.differences['output']:.1e} of the largest"
                     + ("" if comparison.forward else f", updated parameters {result.differences['parameter']:.1e} of their largest change"))
        lines += [f"  {line}" for line in result.plan.splitlines()]
    lines.append(f"{_label(theirs)}, {comparison.threads} thread{'s' if comparison.threads > 1 else ''}: {theirs.plan}")
    if theirs.seconds.coverage < stats.CONFIDENCE:
        lines.append(f"few rounds: the intervals of the medians are good for {theirs.seconds.coverage:.0%}")
    return "\n".join(lines)


def _label(result: Result) -> str:
    return f"{result.side.name} {result.version}"


def _speedups(found: Sequence[Comparison]) -> str:
    first, lines = found[0], []
    for other in found[1:]:
        for a, b in zip(first.results, other.results):
            e = stats.unpaired_ratio(a.samples_s, b.samples_s)
            lines.append(f"{a.side.name}: {other.threads} threads are {e.value:.2f} times as fast as {first.threads} "
                         f"({e.low:.2f} to {e.high:.2f})")
    return "\n".join(lines)
