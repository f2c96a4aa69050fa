"""Who ran which task when: the record of a traced run, its Chrome trace file and its summary.

The engine fills one structured array, a row per task executed; everything here is computed from it. `save`
writes the Trace Event Format that chrome://tracing and https://ui.perfetto.dev open
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from znn.errors import DataError
from znn.files import atomic_write

EVENT = np.dtype(
    [
        ("worker", "i4"),
        ("phase", "i4"),
        ("kind", "i4"),
        ("group", "i4"),
        ("a", "i4"),
        ("b", "i4"),
        ("start_ns", "i8"),
        ("end_ns", "i8"),
    ]
)
NAMED = ("phase", "kind", "group")


class Trace:
    """The tasks of a traced run.

    events        structured array of `EVENT`: the worker; phase (forward, backward, update, ...), kind (what
                  the task does) and group (node or edge group), each an index into its table of names, -1 for
                  none; a and b, the maps concerned (from, to; -1 for none); start and end in nanoseconds of
                  one clock
    names         {"phase": [...], "kind": [...], "group": [...]}
    counters      {name: seconds per worker}: time the engine measured apart from tasks, such as "queue_s",
                  "lock_s", "wait_s"
    dependencies  (n, 2) event indices (before, after), where the engine knows them; they give the measured
                  critical path
    last_pass_s   {phase: seconds}: the critical path of the last pass of each phase, as the engine measured
                  it by adding up times along its tasks' dependencies
    Raises DataError for an array of another dtype, an index without a name, or a task that ends before it
    starts.
    """

    def __init__(
        self,
        events: np.ndarray,
        names: Mapping[str, Sequence[str]],
        counters: Mapping[str, Sequence[float]] | None = None,
        dependencies: np.ndarray | None = None,
        last_pass_s: Mapping[str, float] | None = None,
    ):
        self.events = np.asarray(events)
        self.names = {field: list(names.get(field, ())) for field in NAMED}
        self.counters = {
            name: [float(value) for value in values] for name, values in (counters or {}).items()
        }
        self.dependencies = (
            None if dependencies is None else np.asarray(dependencies, np.int64).reshape(-1, 2)
        )
        self.last_pass_s = dict(last_pass_s or {})
        self._check()

    def _check(self) -> None:
        if self.events.dtype != EVENT or self.events.ndim != 1:
            raise DataError(
                f"trace: events must be a 1-D array of {EVENT}, got {self.events.ndim}-D of "
                f"{self.events.dtype}"
            )
        for field in NAMED:
            if len(self.events) and self.events[field].max() >= len(self.names[field]):
                raise DataError(
                    f"trace: {field} {self.events[field].max()} has no name; "
                    f"the table holds {len(self.names[field])}"
                )
        if np.any(self.events["end_ns"] < self.events["start_ns"]):
            raise DataError("trace: a task ends before it starts")
        if self.dependencies is not None and self.dependencies.size:
            if self.dependencies.min() < 0 or self.dependencies.max() >= len(self.events):
                raise DataError("trace: a dependency names an event that does not exist")

    @property
    def workers(self) -> int:
        """Workers that took part: those with a counter, or with a task."""
        seen = int(self.events["worker"].max()) + 1 if len(self.events) else 0
        return max([seen] + [len(values) for values in self.counters.values()])

    @property
    def wall_s(self) -> float:
        """Seconds from the start of the first task to the end of the last."""
        if not len(self.events):
            return 0.0
        return float(self.events["end_ns"].max() - self.events["start_ns"].min()) * 1e-9

    def save(self, path: str | os.PathLike) -> None:
        """Write the Chrome trace (JSON), atomically; open it at https://ui.perfetto.dev."""
        with atomic_write(path, "w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for position, event in enumerate(self._chrome_events()):
                file.write((",\n" if position else "") + json.dumps(event))
            file.write("\n]}\n")

    def summary(self) -> dict[str, Any]:
        """The run in numbers, seconds throughout; shares are of workers times wall time.

        wall_s, workers, tasks (count), work_s (T1: the sum over tasks), task_share, outside_share (all that
        was not in a task), counter_share {counter: share}, by_worker [{worker, tasks, task_s, **counters}],
        by_phase, by_kind and by_group {name: {tasks, seconds}}, and critical_path_s, critical_path (its tasks
        in order) and parallelism (work over critical path), None where dependencies are not known;
        last_pass_s {phase: critical path of its last pass} where the engine measured it.
        """
        durations = self._durations()
        budget = self.workers * self.wall_s
        share = lambda seconds: seconds / budget if budget else 0.0
        path = self.critical_path()
        path_s = None if path is None else float(durations[path].sum())
        work = float(durations.sum())
        return {
            "wall_s": self.wall_s,
            "workers": self.workers,
            "tasks": len(self.events),
            "work_s": work,
            "task_share": share(work),
            "outside_share": 1.0 - share(work) if budget else 0.0,
            "counter_share": {name: share(sum(values)) for name, values in self.counters.items()},
            "by_worker": [self._worker_row(worker, durations) for worker in range(self.workers)],
            **{f"by_{field}": self._totals(field, durations) for field in NAMED},
            "critical_path_s": path_s,
            "critical_path": None if path is None else [self._label(self.events[i]) for i in path],
            "parallelism": None if not path_s else work / path_s,
            "last_pass_s": self.last_pass_s,
        }

    def critical_path(self) -> np.ndarray | None:
        """Indices of the tasks on the longest chain of dependencies by measured time; None if not known.

        Raises DataError when a task starts before one it depends on, for then the dependencies are wrong.
        """
        if self.dependencies is None:
            return None
        starts, durations = self.events["start_ns"], self._durations()
        before, after = self.dependencies.T
        if np.any(starts[after] < self.events["end_ns"][before]):
            raise DataError("trace: a task starts before one it depends on has ended")
        finish, previous = durations.copy(), np.full(len(durations), -1)
        # By start, and by end where clocks tie, every task comes after those it depends on.
        for edge in np.lexsort((self.events["end_ns"][after], starts[after])):
            u, v = before[edge], after[edge]
            if finish[u] + durations[v] > finish[v]:
                finish[v], previous[v] = finish[u] + durations[v], u
        chain = [int(np.argmax(finish))] if len(finish) else []
        while chain and previous[chain[-1]] >= 0:
            chain.append(int(previous[chain[-1]]))
        return np.array(chain[::-1], dtype=np.int64)

    def report(self) -> str:
        """The summary as text, for a terminal."""
        facts = self.summary()
        lines = [
            f"{facts['tasks']} tasks on {facts['workers']} workers in {facts['wall_s'] * 1e3:.2f} ms: "
            f"{facts['task_share']:.1%} of the time in tasks, {facts['outside_share']:.1%} outside"
        ]
        lines += [f"  {name}: {value:.2%}" for name, value in facts["counter_share"].items()]
        if facts["critical_path_s"] is not None:
            lines.append(
                f"work {facts['work_s'] * 1e3:.2f} ms, "
                f"critical path {facts['critical_path_s'] * 1e3:.2f} ms, "
                f"parallelism {facts['parallelism'] or 0:.1f}"
            )
        if self.last_pass_s:
            lines.append(
                "critical path of the last pass: "
                + ", ".join(f"{phase} {seconds * 1e3:.2f} ms" for phase, seconds in self.last_pass_s.items())
            )
        for field in NAMED:
            rows = sorted(facts[f"by_{field}"].items(), key=lambda row: -row[1]["seconds"])
            lines.append(f"by {field}:")
            lines += [
                f"  {name:<24} {row['tasks']:>8} tasks {row['seconds'] * 1e3:>10.2f} ms" for name, row in rows
            ]
        return "\n".join(lines)

    def _durations(self) -> np.ndarray:
        return (self.events["end_ns"] - self.events["start_ns"]) * 1e-9

    def _worker_row(self, worker: int, durations: np.ndarray) -> dict[str, Any]:
        mine = self.events["worker"] == worker
        counters = {name: values[worker] for name, values in self.counters.items() if worker < len(values)}
        return {"worker": worker, "tasks": int(mine.sum()), "task_s": float(durations[mine].sum())} | counters

    def _totals(self, field: str, durations: np.ndarray) -> dict[str, dict[str, Any]]:
        totals = {}
        for index in np.unique(self.events[field]):
            mine = self.events[field] == index
            totals[self._name(field, index)] = {
                "tasks": int(mine.sum()),
                "seconds": float(durations[mine].sum()),
            }
        return totals

    def _name(self, field: str, index: int) -> str:
        return self.names[field][index] if index >= 0 else "none"

    def _label(self, event) -> str:
        maps = [str(event[field]) for field in ("a", "b") if event[field] >= 0]
        label = " ".join(self._name(field, event[field]) for field in ("group", "phase", "kind"))
        return f"{label} {'>'.join(maps)}".rstrip()

    def _chrome_events(self) -> Iterator[dict[str, Any]]:
        yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "znn"}}
        for worker in range(self.workers):
            yield {
                "ph": "M",
                "pid": 1,
                "tid": worker,
                "name": "thread_name",
                "args": {"name": f"worker {worker}"},
            }
        origin = int(self.events["start_ns"].min()) if len(self.events) else 0
        for event in np.sort(self.events, order="start_ns", kind="stable"):
            phase, kind, group = (self._name(field, event[field]) for field in NAMED)
            yield {
                "ph": "X",
                "pid": 1,
                "tid": int(event["worker"]),
                "cat": phase,
                "name": f"{group} {phase} {kind}",
                "ts": (int(event["start_ns"]) - origin) / 1e3,
                "dur": int(event["end_ns"] - event["start_ns"]) / 1e3,
                "args": {"from": int(event["a"]), "to": int(event["b"])},
            }
