"""One traced round, for the Gantt picture: who ran which task when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ..problem import Problem
from ..traced import compact
from .base import Computed
from .znn_adapter import ADAPTER as ZNN

if TYPE_CHECKING:
    from znn.trace import Trace

WARMUPS = 3


class TraceAdapter(Computed):
    """options: as for znn. The record holds the events of one round and the summary of shares."""

    name = "trace"
    version = ZNN.version
    unavailable = ZNN.unavailable

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return ZNN.predicted_bytes(problem, options)

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        traced = traced_laps(problem, options, 1)
        summary = traced.trace.summary()
        kept = ("workers", "tasks", "work_s", "task_share", "outside_share", "by_phase", "by_kind")
        return {"wall_s": traced.wall_s, "counters": traced.counters, "events": compact(traced.trace)} | {
            key: summary[key] for key in kept
        }


class Traced(NamedTuple):
    """Steady rounds with all their updates and nothing else; counters as `znn.Network.stats` gives them."""

    trace: Trace
    wall_s: float
    counters: dict[str, Any]


def traced_laps(problem: Problem, options: dict[str, Any], laps: int) -> Traced:
    """Run and trace `laps` steady rounds."""
    from znn.trace import Trace

    session = ZNN.start(problem, options | {"trace": True})
    try:
        for _ in range(WARMUPS):
            session.lap()
        session.mark()
        begin = time.monotonic_ns()  # the clock of the trace
        for _ in range(laps):
            session.lap()
        session.net.sync()
        end = time.monotonic_ns()
        whole, counters = session.net.trace(), session.metrics()
    finally:
        session.close()
    inside = (whole.events["start_ns"] >= begin) & (whole.events["end_ns"] <= end)
    return Traced(Trace(whole.events[inside], whole.names), (end - begin) * 1e-9, counters)


ADAPTER = TraceAdapter()
