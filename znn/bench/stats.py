"""Medians with intervals, and ratios of paired samples. Everything random is seeded, so a figure repeats
exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 1510


class Estimate(NamedTuple):
    """A value with its interval; `coverage` is the confidence really reached (few samples cannot reach 95
    %)."""

    value: float
    low: float
    high: float
    coverage: float = CONFIDENCE

    @property
    def spread(self) -> float:
        """Half-width of the interval relative to the value."""
        return (self.high - self.low) / 2 / self.value if self.value else math.inf

    def overlaps(self, other: Estimate) -> bool:
        return self.low <= other.high and other.low <= self.high


def median(samples: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Median and its distribution-free interval between two order statistics (binomial; David & Nagaraja,
    2003, 7.1).

    With fewer than six samples the interval is their range and `coverage` says what that is worth.
    """
    x = sorted(samples)
    n = len(x)
    if n == 0:
        raise ValueError("a median needs at least one sample")
    middle = (x[(n - 1) // 2] + x[n // 2]) / 2
    tail, k = 0.5**n, 0  # P(Binomial(n, 1/2) <= k)
    while k + 1 < n / 2:
        wider = tail + math.comb(n, k + 1) * 0.5**n
        if 1 - 2 * wider < confidence:
            break
        tail, k = wider, k + 1
    return Estimate(middle, x[k], x[n - 1 - k], max(0.0, 1 - 2 * tail))


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = SEED, confidence: float = CONFIDENCE
) -> Estimate:
    """Ratio of medians of two cases measured in the same interleaved rounds, by bootstrap over paired rounds.

    Sample i of both belongs to round i; a round is drawn for both together, so that drift common to both
    cancels.
    """
    n = min(len(numerator), len(denominator))
    if n == 0:
        raise ValueError("a ratio needs at least one paired round")
    top, bottom = np.asarray(numerator[:n], float), np.asarray(denominator[:n], float)
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    return from_bootstrap(
        np.median(top) / np.median(bottom),
        np.median(top[draws], axis=1) / np.median(bottom[draws], axis=1),
        confidence,
    )


def unpaired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = SEED, confidence: float = CONFIDENCE
) -> Estimate:
    """Ratio of medians of two cases measured at different times: both are resampled independently."""
    if not len(numerator) or not len(denominator):
        raise ValueError("a ratio needs samples on both sides")
    rng = np.random.default_rng(seed)
    top, bottom = np.asarray(numerator, float), np.asarray(denominator, float)
    tops = np.median(top[rng.integers(0, len(top), (RESAMPLES, len(top)))], axis=1)
    bottoms = np.median(bottom[rng.integers(0, len(bottom), (RESAMPLES, len(bottom)))], axis=1)
    return from_bootstrap(np.median(top) / np.median(bottom), tops / bottoms, confidence)


def from_bootstrap(value: float, resampled: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """A value with the interval of its resampled values (percentile bootstrap)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(min(low, value)), float(max(high, value)), confidence)
