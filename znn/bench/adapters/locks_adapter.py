"""The workers' time in the critical sections of sums, waiting for them included, lap by lap in traced rounds."""

from __future__ import annotations

import time
from typing import Any

from .znn_adapter import ZnnAdapter, ZnnSession


class LocksSession(ZnnSession):
    """A lap ends when its updates have: what is counted belongs to it alone."""

    def __init__(self, *arguments: Any) -> None:
        self._locked: list[float] = []
        self._wall: list[float] = []
        super().__init__(*arguments)

    def lap(self) -> None:
        before, start = self._lock_s(), time.perf_counter()
        super().lap()
        self.net.sync()
        self._wall.append(time.perf_counter() - start)
        self._locked.append(self._lock_s() - before)

    def _lock_s(self) -> float:
        return sum(self.net.stats()["lock_s"])

    def mark(self) -> None:
        super().mark()
        self._locked, self._wall = [], []

    def metrics(self) -> dict[str, Any]:
        return {"lock_s": self._locked, "wall_s": self._wall, "workers": self.net.threads}


class LocksAdapter(ZnnAdapter):
    """options: as for znn. The metrics hold, for each lap, lock_s (summed over workers) and wall_s."""

    name = "locks"

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> LocksSession:
        net = self.network(problem, graph, options | {"trace": True}, parameters, rate)
        return LocksSession(problem, net, inputs, gradients)


ADAPTER = LocksAdapter()
