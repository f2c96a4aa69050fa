"""Exchanging the convolutions of a model where ours are faster, by measurement."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from znn import cache
from znn.errors import DataError, PlanError
from znn.torch import functional, layers, modules
from znn.torch.layers import Method
from znn.torch.measure import Case, Turn, measure, turn

OURS = {torch.nn.Conv2d: modules.Conv2d, torch.nn.Conv3d: modules.Conv3d}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
MODEL_ROUNDS = 5, 25  # of the whole model, at least and at most, after the warm-up
MODEL_BUDGET_S = 1.0  # for each side, where the least rounds take no longer
MODEL_TURN_S = 0.03


@dataclass(frozen=True)
class Seconds:
    """Medians of the rounds with PyTorch's convolutions and with ours, and the shortest lap of each."""

    theirs: float
    ours: float
    theirs_least: float
    ours_least: float

    def faster(self, margin: float = 0.0) -> bool:
        """Whether ours are faster by more than `margin`, and in their shortest laps as well: where the machine has other work,
        medians tell how each side bears it."""
        return self.theirs > (1 + margin) * self.ours and self.theirs_least > self.ours_least


@dataclass(frozen=True)
class Decision:
    """One convolution of a model: its name, what it computes, seconds of PyTorch's and of ours, and what was decided."""

    name: str
    layer: str
    uses: str  # "znn" or "torch"
    reason: str = ""
    torch_s: float | None = None
    znn_s: float | None = None
    method: str = ""


@dataclass(frozen=True)
class Report:
    """What `replace_convs` did. Prints as a table. model_s: seconds of the whole model before and after, if it was timed."""

    decisions: tuple[Decision, ...]
    model_s: tuple[float, float] | None = field(default=None)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the modules that now use ZNN's kernels."""
        return tuple(d.name for d in self.decisions if d.uses == "znn")

    def __str__(self) -> str:
        def ms(seconds: float | None) -> str:
            return "" if seconds is None else f"{seconds * 1e3:.3g}"

        rows = [("module", "layer", "torch ms", "znn ms", "uses", "")]
        rows += [(d.name, d.layer, ms(d.torch_s), ms(d.znn_s), d.uses, d.reason or d.method) for d in self.decisions]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip() for row in rows]
        if self.model_s:
            lines.append(f"whole model: {ms(self.model_s[0])} ms before, {ms(self.model_s[1])} ms after")
        return "\n".join(lines)


def replace_convs(model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor], *, backward: bool = True,
                  margin: float = 0.05, budget_s: float = 1.0, remeasure: bool = False) -> Report:
    """Exchange the `Conv2d` and `Conv3d` modules of `model` that are faster with ZNN's kernels on this machine, in place.

    example: the model's input, or a sequence of its inputs. backward: measure training (forward and backward), else
    inference. A layer is exchanged where the median of its interleaved rounds is faster by more than `margin`, and its
    shortest lap faster at all; then the whole model is timed both ways, and everything is put back if it has not become faster.
    What holds for the example's shapes need not hold for others. `budget_s`: seconds of measurement per layer
    and shape, not counting shapes known from ZNN's cache (unless `remeasure`).

    The modules stay the same objects with the same parameters, hooks and state: only their class changes, so an optimiser
    made before goes on working. The model's gradients, buffers and the random state are as before. Raises DataError for an
    example that is no tensor.
    """
    inputs = _inputs(example)
    convs = {name: module for name, module in model.named_modules() if type(module) in (*OURS, *THEIRS)}
    before = {name: type(module) for name, module in convs.items()}
    with _untouched(model):
        seen = _watch(model, inputs, convs, backward)
        timings = {case: _measured(case, budget_s, remeasure)
                   for case in dict.fromkeys(case for cases in seen.values() for case in cases) if isinstance(case, Case)}
        decisions = [_decide(name, cases, timings, margin) for name, cases in seen.items()]
        for d in decisions:
            _set_class(convs[d.name], d.uses)
        changed = any(d.uses == "znn" for d in decisions)
        model_s = _time_model(model, inputs, convs, decisions, backward) if changed else None
    if model_s and not model_s.faster():
        for name, module in convs.items():
            module.__class__ = THEIRS.get(before[name], before[name])
        decisions = [replace(d, uses="torch", reason="the whole model was no faster") if d.uses == "znn" else d for d in decisions]
    return Report(tuple(decisions), model_s and (model_s.theirs, model_s.ours))


def restore_convs(model: torch.nn.Module) -> tuple[str, ...]:
    """Put PyTorch's convolutions back, in place; returns the names of the modules changed."""
    found = [(name, module) for name, module in model.named_modules() if type(module) in THEIRS]
    for _, module in found:
        _set_class(module, "torch")
    return tuple(name for name, _ in found)


def _set_class(module: torch.nn.Module, uses: str) -> None:
    classes = OURS if uses == "znn" else THEIRS
    module.__class__ = classes.get(type(module), type(module))


def _inputs(example: Any) -> tuple[torch.Tensor, ...]:
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example) if isinstance(example, Sequence) else ()
    if not inputs or not all(isinstance(tensor, torch.Tensor) for tensor in inputs):
        raise DataError(f"replace_convs: example is a {type(example).__name__}, expected a tensor or a sequence of tensors")
    return inputs


# ---- what the model computes ------------------------------------------------------------------------------
def _watch(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], convs: Mapping[str, torch.nn.Module],
           backward: bool) -> dict[str, list[Case | str]]:
    """The cases that each convolution meets in one pass, or in words why a call is not for our kernels."""
    seen: dict[str, list[Case | str]] = {name: [] for name in convs}

    def watch(name: str) -> Any:
        return lambda module, args: seen[name].append(_case(module, args[0], backward))

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in convs.items()]
    try:
        _pass(model, inputs, False, differentiable=backward)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _case(conv: torch.nn.Module, images: torch.Tensor, backward: bool) -> Case | str:
    dims = 2 if isinstance(conv, torch.nn.Conv2d) else 3
    if any(step != 1 for step in conv.stride):
        return f"stride {'x'.join(map(str, conv.stride))}"
    if not functional._is_ours(images, conv.weight, conv.bias):
        return f"{str(images.dtype).removeprefix('torch.')} on {images.device.type}, or another kind of tensor"
    images, padding = modules._pad(conv, images)
    problem = functional._problem(dims, images, conv.weight, conv.bias, padding, conv.dilation, conv.groups)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    batched = images.ndim == dims + 2
    return Case(problem, dims, images.shape[0] if batched else 1, conv.bias is not None, backward and conv.weight.requires_grad,
                images.requires_grad,
                batched and images.is_contiguous(memory_format=last) and not images.is_contiguous())


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and the random state are afterwards as before."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def _pass(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], backward: bool, differentiable: bool) -> None:
    with torch.set_grad_enabled(differentiable):
        outputs = [t for t in _flat(model(*inputs)) if t.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if backward and outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _flat(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, Mapping | Sequence) and not isinstance(result, str):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from _flat(part)


def _time_model(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], convs: Mapping[str, torch.nn.Module],
                decisions: Sequence[Decision], backward: bool) -> Seconds:
    """Seconds of the whole model with PyTorch's convolutions and as decided, in turns. Leaves it as decided."""
    samples: dict[str, list[float]] = {"torch": [], "znn": []}
    shortest = dict.fromkeys(samples, math.inf)

    def timed(uses: str) -> Turn:
        for d in decisions:
            _set_class(convs[d.name], uses if d.uses == "znn" else "torch")
        return turn(lambda: _pass(model, inputs, backward, differentiable=backward), MODEL_TURN_S)

    for uses in samples:  # meets cold memory
        timed(uses)
    while _more_rounds(samples):
        for uses in sorted(samples, reverse=len(samples["znn"]) % 2 == 1):  # neither always follows the other
            found = timed(uses)
            samples[uses].append(found.mean)
            shortest[uses] = min(shortest[uses], found.least)
    for d in decisions:
        _set_class(convs[d.name], d.uses)
    return Seconds(*map(statistics.median, samples.values()), *shortest.values())


def _more_rounds(samples: Mapping[str, Sequence[float]]) -> bool:
    rounds, spent = len(samples["znn"]), max(map(sum, samples.values()))
    return rounds < MODEL_ROUNDS[0] or (rounds < MODEL_ROUNDS[1] and spent < MODEL_BUDGET_S)


# ---- decisions --------------------------------------------------------------------------------------------
def _decide(name: str, cases: Sequence[Case | str], timings: Mapping[Case, Found | str], margin: float) -> Decision:
    if not cases:
        return Decision(name, "", "torch", "not used for this example")
    other = next((case for case in cases if isinstance(case, str)), None)
    if other is not None:
        return Decision(name, "", "torch", other)
    text = str(cases[0]) + (f" and {len(cases) - 1} more calls" if len(cases) > 1 else "")
    found = [timings[case] for case in cases]
    reason = next((f for f in found if isinstance(f, str)), None)
    if reason is not None:
        return Decision(name, text, "torch", reason)
    seconds = Seconds(*map(sum, zip(*(f.seconds for f in found))))
    faster = seconds.faster(margin)
    for case, f in zip(cases, found):
        if faster:
            layers.choose(case.problem, f.method)
    return Decision(name, text, "znn" if faster else "torch", "", seconds.theirs, seconds.ours, str(found[0].method))


class Found(NamedTuple):
    """Of a case: seconds in the order of `Seconds`, and our best method."""

    seconds: tuple[float, float, float, float]
    method: Method


def _measured(case: Case, budget_s: float, remeasure: bool) -> Found | str:
    """From the cache or measured now, or in words why no method of ours can compute it."""
    key = repr((case, layers.threads(), torch.__version__))
    known = _read()
    if remeasure or key not in known:
        try:
            timing = measure(case, budget_s)
        except PlanError as error:
            return str(error)
        best = timing.best
        known = _read() | {key: [timing.theirs, timing.ours, timing.least[None], timing.least[best], [best.name, best.bundle, list(best.tile)]]}
        cache.write_text(layers.cache_name(), json.dumps(known, indent=0, sort_keys=True))
    *seconds, (name, bundle, tile) = known[key]
    return Found(tuple(seconds), Method(name, bundle, tuple(tile)))


def _read() -> dict[str, list]:
    try:
        data = json.loads(cache.read_text(layers.cache_name()) or "{}")
        return {key: value for key, value in data.items() if len(value) == 5 and len(value[4]) == 3}
    except (ValueError, AttributeError, TypeError):
        return {}  # damaged: measured again and overwritten
