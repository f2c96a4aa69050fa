"""Where the workers' time goes over several traced rounds: tasks, queue, locks of sums, waiting."""

from __future__ import annotations

from typing import Any

from ..problem import Problem
from .trace_adapter import TraceAdapter, traced_laps

LAPS = 5


class SharesAdapter(TraceAdapter):
    """options: as for znn."""

    name = "shares"

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        traced = traced_laps(problem, options, LAPS)
        return {
            "laps": LAPS,
            "wall_s": traced.wall_s,
            "counters": traced.counters,
            "work_s": traced.trace.summary()["work_s"],
        }


ADAPTER = SharesAdapter()
