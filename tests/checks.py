"""What several test files share: relative errors, random data for a graph, small networks of every kind."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def relative_error(actual: Any, expected: Any) -> float:
    """Max norm of the difference over max norm of the expected (the difference's own norm where it is 0)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return 0.0
    error, scale = np.max(np.abs(actual - expected)), np.max(np.abs(expected))
    assert np.isfinite(scale), "the expected array holds NaN or infinity"
    return float("inf") if np.isnan(error) else float(error / scale if scale > 0 else error)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "array") -> None:
    """Arrays or dicts of arrays within the relative error; dicts need the same names."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), f"{what}: {sorted(actual)}, expected {sorted(expected)}"
        for name in expected:
            assert_close(actual[name], expected[name], tolerance, f"{what}[{name}]")
        return
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e} expected"


def numerical_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6
                       ) -> np.ndarray:
    """Central differences of a scalar function, one element of `at` after the other."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        there = at.astype(np.float64).copy()
        there[index] += step
        above = function(there)
        there[index] -= 2 * step
        gradient[index] = (above - function(there)) / (2 * step)
    return gradient
