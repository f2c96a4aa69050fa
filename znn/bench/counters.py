"""What figures and verdicts read from the engine's counters in a record's metrics."""

from __future__ import annotations

from typing import Any


def transforms(metrics: dict[str, Any]) -> float | None:
    """Transforms of one round, of all kinds together, as the engine counted them."""
    counted = metrics.get("transforms")
    if not counted or not metrics.get("laps"):
        return None
    return sum(counted.values()) / metrics["laps"]


def lock_share(metrics: dict[str, Any]) -> float | None:
    """Share of the workers' time in critical sections of sums, over traced rounds."""
    locked, wall = metrics.get("counters", {}).get("lock_s"), metrics.get("wall_s")
    return sum(locked) / (len(locked) * wall) if locked and wall else None
