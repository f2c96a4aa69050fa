"""What figures and verdicts read from the engine's counters in a record's metrics."""

from __future__ import annotations

from typing import Any


def transforms(metrics: dict[str, Any]) -> float | None:
    """Transforms of one round, of all kinds together, as the engine counted them."""
    counted = metrics.get("transforms")
    if not counted or not metrics.get("laps"):
        return None
    return sum(counted.values()) / metrics["laps"]


def lock_shares(metrics: dict[str, Any]) -> list[float]:
    """Share of the workers' time in critical sections of sums, for each traced lap."""
    return [s / (metrics["workers"] * wall) for s, wall in zip(metrics["lock_s"], metrics["wall_s"])]


def misses(metrics: dict[str, Any]) -> list[int]:
    """Last-level misses, reads and writes together, of each counted round."""
    counts = metrics["per_round"]
    return [reads + writes for reads, writes in zip(counts["LL_read_misses"], counts["LL_write_misses"])]
