"""Timing one convolution layer: PyTorch's and ours in turns, on the same threads, in this process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from znn.errors import PlanError
from znn.torch import functional, layers
from znn.torch.layers import Method, Problem

METHODS_TIMED = 3
ROUNDS = 3, 25  # at least and at most, after the warm-up
TURN_S = 0.01  # a turn that is shorter is made of so many laps, after one that meets what the one before left running
HOPELESS = 2.0  # times the fastest: not timed further


@dataclass(frozen=True)
class Case:
    """A layer in use. backward: the gradients of weight and bias are wanted, input_gradient: also that of the input."""

    problem: Problem
    dims: int = 3
    batch: int = 1
    bias: bool = True
    backward: bool = True
    input_gradient: bool = True
    channels_last: bool = False

    def __str__(self) -> str:
        def short(extent):
            return "x".join(str(n) for n in extent[-self.dims:])

        p = self.problem
        return (f"{p.in_maps}->{p.out_maps} maps, kernel {short(p.kernel)}, input {self.batch}x{short(p.input)}"
                + (f", padded to {short(p.padded)}" if p.padded != p.input else "")
                + (f", dilation {short(p.dilation)}" if max(p.dilation) > 1 else "")
                + (f", {p.groups} groups" if p.groups > 1 else "")
                + ("" if self.backward else ", forward"))


@dataclass(frozen=True)
class Timing:
    """Samples in seconds, PyTorch's and those of the methods tried, taken in turns; least: the shortest lap of each, PyTorch's
    under None."""

    torch_s: tuple[float, ...]
    methods: dict[Method, tuple[float, ...]] = field(default_factory=dict)
    least: dict[Method | None, float] = field(default_factory=dict)

    @property
    def theirs(self) -> float:
        return statistics.median(self.torch_s)

    @property
    def best(self) -> Method:
        return min(self.methods, key=lambda method: statistics.median(self.methods[method]))

    @property
    def ours(self) -> float:
        return statistics.median(self.methods[self.best])

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours


def measure(case: Case, budget_s: float = 1.0, methods: int = METHODS_TIMED) -> Timing:
    """Time the layer in turns with PyTorch and with the likeliest methods, for about `budget_s` seconds (three rounds at least,
    unless PyTorch is so far behind that they would take much longer). Raises PlanError where no method can compute it."""
    tried = layers.ranked_methods(case.problem, case.input_gradient and case.backward)[:methods]
    if not tried:
        raise PlanError(f"{case}: no method can compute this layer")
    runs: dict[Method | None, Callable[[], None]] = {None: _run(case, None)} | {m: _run(case, m) for m in tried}
    samples: dict[Method | None, list[float]] = {key: [] for key in runs}
    shortest = dict.fromkeys(runs, math.inf)
    live, spent = list(runs), 0.0
    for key in live:  # meets cold memory
        spent += _timed(runs[key])
    while len(samples[None]) < ROUNDS[0] or (len(samples[None]) < ROUNDS[1] and spent < budget_s):
        first = len(samples[None]) % len(live)  # so that nobody always follows the same other one
        for key in live[first:] + live[:first]:
            start = time.perf_counter()
            found = turn(runs[key])
            samples[key].append(found.mean)
            shortest[key] = min(shortest[key], found.least)
            spent += time.perf_counter() - start
        least = min(min(samples[method]) for method in tried)
        live = [key for key in live if key is None or min(samples[key]) <= HOPELESS * least]
        if min(samples[None]) > HOPELESS * least and spent > 4 * budget_s:
            break  # PyTorch is far behind: more rounds would not change that
    rounds = len(samples[None])
    return Timing(tuple(samples[None]), {m: tuple(s) for m, s in samples.items() if m and len(s) == rounds}, shortest)


class Turn(NamedTuple):
    """Seconds of a lap: the mean over a turn, and its shortest."""

    mean: float
    least: float


def turn(run: Callable[[], None], least_s: float = TURN_S) -> Turn:
    """One lap, or if it is short as many as take `least_s`, after one that is not counted.

    PyTorch's threads spin for a while after each of its operations, and take processor time from what comes next.
    """
    laps = [_timed(run)]
    if laps[0] < least_s:
        laps = [_timed(run) for _ in range(math.ceil(least_s / laps[0]))]
    return Turn(statistics.fmean(laps), min(laps))


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tensors(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Random input, weight, bias (or None) and output gradient of a case; leaves that want the gradients it says."""
    p, generator = case.problem, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(case.batch, p.in_maps, *p.input[-case.dims:])
    weight = normal(p.out_maps, p.in_maps // p.groups, *p.kernel[-case.dims:]) / math.sqrt(
        p.in_maps // p.groups * math.prod(p.kernel))
    bias = normal(p.out_maps) if case.bias else None
    gradient = normal(case.batch, p.out_maps, *p.output[-case.dims:])
    if case.channels_last:
        last = torch.channels_last if case.dims == 2 else torch.channels_last_3d
        x, gradient = x.contiguous(memory_format=last), gradient.contiguous(memory_format=last)
    for tensor, wanted in ((x, case.input_gradient), (weight, True), (bias, True)):
        if tensor is not None:
            tensor.requires_grad_(case.backward and wanted)
    return x, weight, bias, gradient


def _run(case: Case, method: Method | None) -> Callable[[], None]:
    """One pass over the layer, by PyTorch (None) or one of our methods."""
    x, weight, bias, gradient = tensors(case)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]

    def run() -> None:
        output = convolve(case, method, x, weight, bias)
        if case.backward:
            torch.autograd.grad(output, wanted, gradient)

    return run


def convolve(case: Case, method: Method | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer by PyTorch (None) or by one of our methods."""
    p, dims = case.problem, case.dims
    if method is not None:
        return functional.run(p, dims, x, weight, bias, method)
    theirs = torch.nn.functional.conv3d if dims == 3 else torch.nn.functional.conv2d
    if p.before == p.after:
        return theirs(x, weight, bias, 1, p.before[-dims:], p.dilation[-dims:], p.groups)
    return theirs(x, weight, bias, 1, "same", p.dilation[-dims:], p.groups)
