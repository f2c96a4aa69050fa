"""Measured task durations from traces, in the form the simulator and the Gantt picture need."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .simulate import PHASES, Durations

if TYPE_CHECKING:
    from znn.trace import Trace


def durations(trace: Trace, rounds: int) -> Durations:
    """Mean seconds per round of every edge task and of finishing every node map, from a trace of `rounds` rounds.

    A task may have left several events (its product, then the inverse transform of the node it completed): events
    labelled with an edge group and two maps belong to the edge task, others to the node.
    """
    seconds: dict[tuple, float] = defaultdict(float)
    for event in trace.events:
        phase = trace.names["phase"][event["phase"]]
        if phase in PHASES and event["group"] >= 0:
            key = (PHASES.index(phase), trace.names["group"][event["group"]], int(event["a"]), int(event["b"]))
            seconds[key] += float(event["end_ns"] - event["start_ns"]) * 1e-9 / rounds

    def edge(phase: int, name: str, a: int, b: int) -> float:
        return seconds.get((phase, name, a, b), 0.0)

    def node(phase: int, name: str, m: int) -> float:
        return seconds.get((phase, name, m, -1), 0.0) + seconds.get((phase, name, -1, m), 0.0)

    return Durations(edge, node)


def compact(trace: Trace) -> dict[str, Any]:
    """The events as columns of small numbers, microseconds from the first, for a record."""
    events = np.sort(trace.events, order="start_ns")
    origin = int(events["start_ns"].min()) if len(events) else 0
    return {"names": trace.names, "worker": events["worker"].tolist(), "phase": events["phase"].tolist(),
            "kind": events["kind"].tolist(), "group": events["group"].tolist(),
            "start_us": ((events["start_ns"] - origin) // 1000).tolist(),
            "duration_us": np.maximum(1, (events["end_ns"] - events["start_ns"]) // 1000).tolist()}


def work_s(trace: Trace) -> float:
    """Seconds in tasks, all workers together."""
    return float((trace.events["end_ns"] - trace.events["start_ns"]).sum()) * 1e-9
