"""Checking the options a network is built with: one sentence naming the option, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from znn.errors import SpecError

POLICIES = ("priority", "fifo", "lifo", "stealing")
SUMS = ("wait-free", "locked", "ordered")
ALLOCATORS = ("pools", "malloc")
MEMOIZE = ("kernels", "images", "gradients")
MOST_THREADS = 1024


def choice(option: str, value: Any, choices: Iterable[str]) -> str:
    """`value`, which must be one of `choices`. Raises SpecError."""
    if not isinstance(value, str) or value not in choices:
        raise SpecError(f"{option} is {value!r}, expected one of {', '.join(choices)}")
    return value


def whole(option: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int between `least` and `most`. Raises SpecError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
        limit = f"from {least} to {most}" if most < 2**63 - 1 else f"of at least {least}"
        raise SpecError(f"{option} is {value!r}, expected a whole number {limit}")
    return int(value)


def number(option: str, value: Any, least: float, most: float = math.inf) -> float:
    """`value` as a finite float between `least` and `most`. Raises SpecError."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not least <= value <= most:
        limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise SpecError(f"{option} is {value!r}, expected a finite number {limit}")
    return float(value)


def memoization(value: Any) -> frozenset[str]:
    """The transforms to keep, a subset of kernels, images, gradients. Raises SpecError."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SpecError(f"memoize is {value!r}, expected some of {', '.join(MEMOIZE)} in a tuple, list or set")
    kept = frozenset(value)
    for name in kept:
        choice("memoize", name, MEMOIZE)
    return kept


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and weight decay.

    g' = g + weight_decay * w, v = momentum * v + g', w = w - rate * v, where g is the gradient of the loss per output
    voxel (the paper divides the rate by the output voxels). Biases do not decay. Raises SpecError.
    """

    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    second_moments = False  # whether the engine keeps any

    def __post_init__(self) -> None:
        number("rate", self.rate, 0)
        number("momentum", self.momentum, 0, 1)
        number("weight_decay", self.weight_decay, 0)

    def step(self, rate: float) -> tuple[float, ...]:
        """What the engine takes: rate, momentum, weight decay, momentum of the squares, epsilon."""
        return (rate, self.momentum, self.weight_decay, 0.0, 1.0)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), with PyTorch's formulas and defaults.

    g' = g + weight_decay * w, m = momentum * m + (1 - momentum) * g', s = square_momentum * s + (1 - square_momentum) * g'^2,
    w = w - rate * m / (1 - momentum^t) / (sqrt(s / (1 - square_momentum^t)) + epsilon) in round t, from 1, where g is the
    gradient of the loss per output voxel. Biases do not decay. Raises SpecError.
    """

    rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    square_momentum: float = 0.999
    epsilon: float = 1e-8
    second_moments = True

    def __post_init__(self) -> None:
        number("rate", self.rate, 0)
        number("weight_decay", self.weight_decay, 0)
        for name in ("momentum", "square_momentum"):
            if number(name, getattr(self, name), 0) >= 1:
                raise SpecError(f"{name} is {getattr(self, name)!r}, expected a number from 0 to below 1")
        if number("epsilon", self.epsilon, 0) < 1e-30:
            raise SpecError(f"epsilon is {self.epsilon!r}, expected a positive number")

    def step(self, rate: float) -> tuple[float, ...]:
        """What the engine takes: rate, momentum, weight decay, momentum of the squares, epsilon."""
        return (rate, self.momentum, self.weight_decay, self.square_momentum, self.epsilon)


OPTIMISERS = {"sgd": SGD, "adam": Adam}
