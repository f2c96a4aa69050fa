"""How long cases will take, from the cost model, corrected by what this machine's records say about the
model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from .problem import Problem
from .record import Record
from .sweep import Case

SETUP_S = 0.5  # process, check, arrays; planning and first passes are counted as laps
SETUP_LAPS = 3
# Of a whole case, where the cost model does not count its operations.
CASE_S = {"theory": 0.6, "trace": 5.0, "valgrind": 60.0, "simulate": 30.0, "torch_model": 2.5, "torch_replaced": 7.0,
          "plan_search": 300.0, "direct_passes": 5.0}
FLOP_PER_S = {
    "znn": 4e9,
    "locks": 4e9,
    "znn_bundled": 1e11,
    "znn_copies": 1e11,
    "torch_cpu": 2e10,
    "torch_gpu": 2e12,
}  # a thread, or a device; only until there are records
FALLBACK_FLOP_PER_S = 1e9


class Estimator:
    """Expected seconds of cases. records: good ones of this machine."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for record in records:
            if record.status == "ok" and record.samples_s and record.adapter_name not in CASE_S:
                measured, predicted = sums[_kind(record.adapter_name, record.options)]
                predicted += _lap_model(record.problem, record.adapter_name, record.options)
                measured += float(np.median(record.samples_s))
                sums[_kind(record.adapter_name, record.options)] = [measured, predicted]
        # Of sums, so that the large cases count: small ones are slower than their operations tell.
        self._correction = {kind: measured / predicted for kind, (measured, predicted) in sums.items()}

    def lap_s(self, case: Case) -> float:
        """Seconds of one lap."""
        kind = _kind(case.adapter, case.options)
        return _lap_model(case.problem, case.adapter, case.options) * self._correction.get(kind, 1.0)

    def case_s(self, case: Case) -> float:
        """Seconds of a case with set-up, warm-ups and rounds, as the protocol bounds them."""
        if case.adapter in CASE_S:
            return CASE_S[case.adapter]
        protocol, lap = case.protocol, self.lap_s(case)
        rounds = min(protocol.max_rounds, max(1.0, protocol.max_s / lap))
        return min(protocol.timeout_s, SETUP_S + (SETUP_LAPS + protocol.warmups + rounds) * lap)


def _kind(adapter: str, options: dict[str, Any]) -> tuple:
    return adapter, options.get("plan")


def _lap_model(problem: dict[str, Any], adapter: str, options: dict[str, Any]) -> float:
    flop = _flop(Problem.from_dict(problem), options.get("plan") == "fft")
    return flop / FLOP_PER_S.get(adapter, FALLBACK_FLOP_PER_S) / (options.get("threads") or 1)


@lru_cache(maxsize=4096)
def _flop(problem: Problem, fft: bool) -> float:
    from znn import cost

    graph = problem.graph()
    methods = ("fft",) if fft else ("direct", "fft")
    share = 1 / 3 if problem.phase == "forward" else 1
    return share * problem.patches * min(cost.network_cost(graph, method).flop for method in methods)
