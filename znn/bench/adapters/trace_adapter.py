"""One traced round, for the Gantt picture: who ran which task when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

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
        trace, wall_s = traced_laps(problem, options, 1)
        summary = trace.summary()
        kept = ("workers", "tasks", "work_s", "task_share", "outside_share", "by_phase", "by_kind")

        return {"wall_s": wall_s, "events": compact(trace)} | {key: summary[key] for key in kept if key in summary}


def traced_laps(problem: Problem, options: dict[str, Any], laps: int) -> tuple[Trace, float]:
    """The trace of `laps` steady rounds, with all their updates and nothing else, and the seconds they took."""
    from znn.trace import Trace

    session = ZNN.start(problem, options | {"trace": True})
    try:
        for _ in range(WARMUPS):
            session.lap()
        session.net.sync()
        begin = time.monotonic_ns()  # the clock of the trace
        for _ in range(laps):
            session.lap()
        session.net.sync()
        end = time.monotonic_ns()
        whole = session.net.trace()
    finally:
        session.close()
    inside = (whole.events["start_ns"] >= begin) & (whole.events["end_ns"] <= end)
    return Trace(whole.events[inside], whole.names), (end - begin) * 1e-9


ADAPTER = TraceAdapter()
