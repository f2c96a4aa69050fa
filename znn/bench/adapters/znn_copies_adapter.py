"""As many copies of a network as there are threads, one worker and one core each, at the same time.

They share nothing but the machine: caches, memory, clocks. How much slower each is than one alone tells what speedup the
machine itself has room for, whatever the engine does.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ..problem import Problem
from .base import Session
from .znn_bundled_adapter import BundledSession, ZnnBundledAdapter


class CopiesSession(Session):
    """`open_one` makes a session; each is made and run by a thread that stays on a core of its own."""

    def __init__(self, count: int, open_one: Any) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self._threads = [ThreadPoolExecutor(1, initializer=partial(os.sched_setaffinity, 0, {cores[i % len(cores)]}))
                         for i in range(count)]
        self._copies: list[BundledSession] = [thread.submit(open_one).result() for thread in self._threads]
        self.plan, self._rounds = self._copies[0].plan, []

    def _each(self, do: Any) -> list[Any]:
        return [found.result() for found in
                [thread.submit(do, copy) for thread, copy in zip(self._threads, self._copies)]]

    def lap(self) -> None:
        """A round of every copy."""
        self._rounds.append(sum(self._each(_timed_lap)) / len(self._copies))

    def outputs(self) -> dict[str, np.ndarray]:
        return self._copies[-1].outputs()

    def parameters(self) -> dict[str, np.ndarray]:
        return self._copies[-1].parameters()

    def settle(self) -> None:
        self._each(lambda copy: copy.settle())

    def mark(self) -> None:
        self._rounds = []

    def metrics(self) -> dict[str, Any]:
        """round_s: seconds of a copy's round, the mean over the copies, lap by lap."""
        return {"round_s": self._rounds}

    def close(self) -> None:
        self._each(lambda copy: copy.close())
        for thread in self._threads:
            thread.shutdown()


def _timed_lap(session: BundledSession) -> float:
    start = time.perf_counter()
    session.lap()
    return time.perf_counter() - start


class ZnnCopiesAdapter(ZnnBundledAdapter):
    name = "znn_copies"

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return super().predicted_bytes(problem, options | {"threads": 1}) * options.get("threads", 1)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> CopiesSession:
        alone = options | {"threads": 1, "pin": False}  # a copy's worker stays where the thread that made it is
        one = super().open
        return CopiesSession(options.get("threads", 1),
                             lambda: one(problem, graph, alone, parameters, inputs, gradients, rate))


ADAPTER = ZnnCopiesAdapter()
