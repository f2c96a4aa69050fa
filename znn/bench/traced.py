"""Measured task durations from traces, in the form the simulator and the Gantt picture need."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .simulate import BACKWARD, FORWARD, UPDATE, Durations

# Taking in an image and computing the loss belong to finishing the input's image and the output's gradient.
PHASE_OF = {"forward": FORWARD, "backward": BACKWARD, "update": UPDATE, "input": FORWARD, "loss": BACKWARD}

if TYPE_CHECKING:
    from znn.graph import Graph
    from znn.trace import Trace


def durations(trace: Trace, graph: Graph, rounds: int) -> Durations:
    """Mean seconds per round of every edge task and of finishing every node map, from a trace of `rounds`
    rounds.

    A task may have left several events (its product, then the inverse transform of the node it completed):
    those of
    edge groups belong to the edge's task, those of node groups to the node's map.
    """
    edges = {edge.name for edge in graph.edges}
    seconds: dict[tuple, float] = defaultdict(float)
    for event in trace.events:
        phase, group = PHASE_OF[trace.names["phase"][event["phase"]]], trace.names["group"][event["group"]]
        if group in edges:
            where: tuple[int, ...] = (int(event["a"]), int(event["b"]))
        else:  # the spectrum of a gradient that only updates read is made on their behalf
            where, phase = (max(0, int(event["a"])),), BACKWARD if phase == UPDATE else phase
        seconds[phase, group, *where] += float(event["end_ns"] - event["start_ns"]) * 1e-9 / rounds
    return Durations(lambda *task: seconds.get(task, 0.0), lambda *node: seconds.get(node, 0.0))


def compact(trace: Trace) -> dict[str, Any]:
    """The events as columns of small numbers, microseconds from the first, for a record."""
    events = np.sort(trace.events, order="start_ns")
    origin = int(events["start_ns"].min()) if len(events) else 0
    return {
        "names": trace.names,
        "worker": events["worker"].tolist(),
        "phase": events["phase"].tolist(),
        "kind": events["kind"].tolist(),
        "group": events["group"].tolist(),
        "start_us": ((events["start_ns"] - origin) // 1000).tolist(),
        "duration_us": np.maximum(1, (events["end_ns"] - events["start_ns"]) // 1000).tolist(),
    }


def work_s(trace: Trace) -> float:
    """Seconds in tasks, all workers together."""
    return float((trace.events["end_ns"] - trace.events["start_ns"]).sum()) * 1e-9
