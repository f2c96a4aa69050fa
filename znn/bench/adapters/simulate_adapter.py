"""The many-core simulation: durations traced on one worker, validated against measured rounds, then more
workers."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from .. import provenance, simulate, stats
from ..problem import Problem
from ..traced import durations, work_s
from .base import Computed
from .trace_adapter import traced_laps
from .znn_adapter import ADAPTER as ZNN

TRACED_LAPS = 3
BANDWIDTH_BYTES = 1 << 27
SEED = 1510


class SimulateAdapter(Computed):
    """options: workers (list to predict for), laps (measured rounds at each thread count), policy, sum,
    memoize, plan."""

    name = "simulate"
    version = ZNN.version
    unavailable = ZNN.unavailable

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return ZNN.predicted_bytes(problem, {"threads": max(thread_counts())}) * len(thread_counts())

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        workers, laps = options.pop("workers"), options.pop("laps", 9)
        counts = thread_counts()
        traces = {n: traced_laps(problem, options | {"threads": n}, TRACED_LAPS).trace for n in counts}
        slowdown = {n: work_s(trace) / work_s(traces[1]) for n, trace in traces.items()}
        bandwidth = {n: copy_bandwidth(n) for n in {1, max(counts)}}
        contention = simulate.Contention.fit(slowdown, bandwidth[1] / bandwidth[max(counts)])
        graph = problem.graph()
        tasks = simulate.expand(graph, durations(traces[1], graph, TRACED_LAPS))
        policy = options.get("policy", "priority")
        measured = measured_rounds(problem, options, counts, laps)
        validation = []
        for n, samples in measured.items():
            simulated = simulate.simulate(tasks, n, policy, contention).round_s
            without = simulate.simulate(tasks, n, policy).round_s
            measured_s = stats.median(samples).value
            validation.append(
                {
                    "workers": n,
                    "samples_s": samples,
                    "simulated_s": simulated,
                    "error": simulated / measured_s - 1,
                    "error_without_bandwidth": without / measured_s - 1,
                }
            )
        return {
            "tasks": len(tasks.seconds),
            "work_s": tasks.work_s,
            "task_slowdown": {str(n): s for n, s in slowdown.items()},
            "bandwidth_bytes_per_s": {str(n): b for n, b in bandwidth.items()},
            "contention": {"memory": contention.memory, "one_worker": contention.one_worker},
            "validation": validation,
            "predicted": predicted(tasks, workers, policy, contention, max(counts)),
        }


def predicted(
    tasks: simulate.TaskGraph, workers: list[int], policy: str, contention: simulate.Contention, cores: int
) -> list[dict[str, Any]]:
    """Rounds on more workers under two assumptions: bandwidth grows with the cores, or stays what it is
    here."""
    base = simulate.simulate(tasks, 1, policy).round_s
    rows = []
    for n in workers:
        # Where bandwidth grows with the cores, n workers press on it as all workers of this machine press on
        # its own.
        grows = simulate.Contention(contention.memory, contention.one_worker * cores / n)
        for name, model in (("grows with cores", grows), ("as on this machine", contention)):
            result = simulate.simulate(tasks, n, policy, model, rounds=1)
            rows.append(
                {
                    "workers": n,
                    "bandwidth": name,
                    "round_s": result.round_s,
                    "busy_share": result.busy_share,
                    "speedup": base / result.round_s,
                }
            )
    return rows


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all usable physical cores: where the simulation is validated."""
    cores = provenance.physical_cores()
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {1, cores})


def measured_rounds(
    problem: Problem, options: dict[str, Any], counts: list[int], laps: int
) -> dict[int, list[float]]:
    """Seconds of untraced rounds at each thread count, interleaved in a seeded order after two warm-ups."""
    sessions = {n: ZNN.start(problem, options | {"threads": n}) for n in counts}
    samples: dict[int, list[float]] = {n: [] for n in counts}
    order = np.random.default_rng(SEED)
    try:
        for lap in range(laps + 2):
            for n in order.permutation(counts):
                start = time.perf_counter()
                sessions[n].lap()
                if lap >= 2:
                    samples[int(n)].append(time.perf_counter() - start)
    finally:
        for session in sessions.values():
            session.close()
    return samples


def copy_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes per second read and written by copying arrays larger than the caches on `threads` threads at
    once."""
    arrays = [
        (np.zeros(BANDWIDTH_BYTES // 4, np.float32), np.ones(BANDWIDTH_BYTES // 4, np.float32))
        for _ in range(threads)
    ]
    best = 0.0
    for _ in range(repeats):
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * BANDWIDTH_BYTES * threads / (time.perf_counter() - start))
    return best


ADAPTER = SimulateAdapter()
