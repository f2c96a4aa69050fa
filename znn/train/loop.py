"""The training loop: rounds, learning-rate schedule, validation, checkpoints and a learning curve on disk.

A run lives in one folder:

    last.npz, best.npz     checkpoints (`znn.checkpoint`): the newest, and the one with the least validation
                           error
    round-NNNNNNNN.npz     checkpoints kept for good, every `keep_every` rounds
    curve.jsonl            a JSON object a line: kind "train" (mean loss since the last such line, and the seconds
                           spent waiting for samples) or "validation" (an `Evaluation`), each with round, seconds
                           (of training so far) and learning_rate

A run killed at any moment goes on from last.npz: the samples are a function of seed and round, lines of the
curve beyond the checkpoint are dropped, and with a schedule by rounds and `sum="ordered"` the result is
bit-identical to that of a run never killed. A schedule by time (`minutes`) follows the clock and cannot be.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from znn.checkpoint import save_checkpoint
from znn.errors import DataError, EngineError
from znn.files import atomic_write
from znn.train.evaluate import Evaluation, Evaluator
from znn.train.sampler import PatchSampler, Prefetcher

SCHEDULES = ("constant", "cosine", "linear", "step", "exponential")
_FLOOR = 1e-3  # share of the rate that every schedule ends with, or above
_LINES = 400  # lines of kind "train" in the learning curve of a whole run, about


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run: a linear rise over the first `warm_up` (a share of the run, from 0 to below 1), then

    constant; linear to zero; cosine (half of one, to zero); step (a tenth of the rate after half of the run, a
    hundredth after three quarters); exponential (to a thousandth).
    """

    rate: float
    kind: str = "cosine"
    warm_up: float = 0.02

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise DataError(f"schedule {self.kind!r}; expected one of {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise DataError(f"learning rate {self.rate}; expected a positive number")
        if not 0 <= self.warm_up < 1:
            raise DataError(f"warm-up {self.warm_up}; expected a share of the run from 0 to below 1")

    def __call__(self, progress: float) -> float:
        """The rate at `progress` from 0 to 1 through the run."""
        rise = min(1.0, (progress + 1e-3) / self.warm_up) if self.warm_up else 1.0
        rest = min(1.0, max(0.0, (progress - self.warm_up) / (1 - self.warm_up)))
        fall = {
            "constant": 1.0,
            "linear": 1 - rest,
            "cosine": 0.5 * (1 + math.cos(math.pi * rest)),
            "step": 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01,
            "exponential": _FLOOR**rest,
        }[self.kind]
        return self.rate * rise * max(fall, _FLOOR)


@dataclass(frozen=True)
class Limits:
    """When a run ends, and what happens how often on the way; rounds, minutes, or whichever comes first."""

    rounds: int | None = None
    minutes: float | None = None
    validate_every: int = 200
    keep_every: int | None = None

    def __post_init__(self):
        if self.rounds is None and self.minutes is None:
            raise DataError("a run needs an end: give rounds or minutes")
        for name in ("rounds", "minutes", "validate_every", "keep_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError(f"{name} is {value}; expected a positive number")

    def progress(self, rounds: int, seconds: float) -> float:
        """How far through the run, from 0 to 1."""
        parts = [
            0.0 if self.rounds is None else rounds / self.rounds,
            0.0 if self.minutes is None else seconds / (60 * self.minutes),
        ]
        return min(1.0, max(parts))


@dataclass
class State:
    """What a run knows beside its network; kept in the checkpoint's `extra`."""

    seconds: float = 0.0
    best_error: float | None = None
    last: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"training": asdict(self)}

    @classmethod
    def from_extra(cls, extra: Any) -> State:
        """Raises DataError where a checkpoint was not written by a training run."""
        try:
            return cls(**extra["training"])
        except (TypeError, KeyError) as error:
            raise DataError(
                "the checkpoint was not written by a training run, so there is no run to resume"
            ) from error


class Run:
    """A training run of `net` on `sampler`'s stream, validated by `evaluator` (None: not at all).

    `state` comes from `State.from_extra` when a run is resumed. `report(line)` is called with every line of
    the learning curve; `progress` shows a line with the time left (see `Progress`).
    """

    def __init__(
        self,
        net,
        sampler: PatchSampler,
        evaluator: Evaluator | None,
        folder: str | os.PathLike,
        schedule: Schedule,
        limits: Limits,
        state: State | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ):
        self.net, self.sampler, self.evaluator = net, sampler, evaluator
        self.folder, self.schedule, self.limits = Path(folder), schedule, limits
        self.state = state or State()
        self._report = report or (lambda line: None)
        self._progress = progress or Progress(None)
        self._loss_sum, self._loss_rounds, self._waited_s, self._line_due = 0.0, 0, 0.0, 0.0
        self._first_round = net.round

    def train(self) -> State:
        """Train to the limit, or to the first Ctrl-C or termination signal (then KeyboardInterrupt is raised,
        after the checkpoint is written). Raises EngineError when the loss stops being finite."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be the folder of the run: {error.strerror}") from error
        trim_curve(self.folder / "curve.jsonl", self.net.round)
        if self.net.round:
            self._line_due = self._at() + 1 / _LINES  # as at the checkpoint, which is written after a line
        with Prefetcher(self.sampler, self.net.round) as samples, _stop_on_signals() as stop:
            while self._at() < 1.0 and not stop.is_set():
                self._one_round(samples)
            self._finish(validate=not stop.is_set() and self.net.round > self._first_round)
        if stop.is_set():
            raise KeyboardInterrupt
        return self.state

    def _at(self) -> float:
        return self.limits.progress(self.net.round, self.state.seconds)

    def _one_round(self, samples: Prefetcher) -> None:
        started = time.perf_counter()
        sample = next(samples)
        self._waited_s += time.perf_counter() - started
        self.net.learning_rate = self.schedule(self._at())
        loss = float(self.net.train_step(sample.image, sample.target, sample.weights))
        self.state.seconds += time.perf_counter() - started
        if not math.isfinite(loss):
            raise EngineError(
                f"round {self.net.round}: the loss is {loss}; lower the learning rate "
                f"({self.schedule.rate:g}). The last good checkpoint is in {self.folder}"
            )
        self._loss_sum += loss
        self._loss_rounds += 1
        if self._at() >= self._line_due:
            self._write_train_line()
        if self.net.round % self.limits.validate_every == 0:
            self._milestone()
        if self.limits.keep_every and self.net.round % self.limits.keep_every == 0:
            self._save(f"round-{self.net.round:08d}.npz")
        self._progress.show(self._at(), self.state.seconds, self._message())

    def _message(self) -> str:
        last = self.state.last
        shown = (
            f", pixel error {last['pixel_error']:.2%} (trivial {last['trivial_error']:.2%})" if last else ""
        )
        return f"round {self.net.round}{shown}"

    def _write_train_line(self) -> None:
        if not self._loss_rounds:
            return
        mean, waited = self._loss_sum / self._loss_rounds, round(self._waited_s, 4)
        self._line("train", {"loss": mean, "rounds": self._loss_rounds, "waited_s": waited})
        self._loss_sum, self._loss_rounds, self._waited_s = 0.0, 0, 0.0
        self._line_due = self._at() + 1 / _LINES

    def _milestone(self) -> None:
        self._write_train_line()
        started = time.perf_counter()
        if self.evaluator is not None:
            self._validate()
        self.state.seconds += time.perf_counter() - started
        self._save("last.npz")

    def _validate(self) -> None:
        result: Evaluation = self.evaluator.run(self.net)
        self.state.last = result.to_dict()
        self._line("validation", result.to_dict())
        if self.state.best_error is None or result.pixel_error < self.state.best_error:
            self.state.best_error = result.pixel_error
            self._save("best.npz")

    def _finish(self, validate: bool) -> None:
        if validate and self.net.round % self.limits.validate_every:
            self._milestone()
        elif self.net.round > self._first_round:
            self._write_train_line()
            self._save("last.npz")
        self._progress.done()

    def _line(self, kind: str, values: dict[str, Any]) -> None:
        line = {
            "kind": kind,
            "round": self.net.round,
            "seconds": round(self.state.seconds, 3),
            "learning_rate": self.net.learning_rate,
        } | values
        with open(self.folder / "curve.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._report(line)

    def _save(self, name: str) -> None:
        save_checkpoint(self.folder / name, self.net, self.state.to_dict())


class Progress:
    """One line, rewritten in place, with the time left; silent when the stream is not a terminal (or
    None).
    """

    def __init__(self, stream: IO[str] | None = sys.stderr):
        self._stream = stream if stream is not None and stream.isatty() else None
        self._shown = 0.0

    def show(self, done: float, seconds: float, message: str) -> None:
        """`done` from 0 to 1 after `seconds` of work; at most five times a second."""
        if self._stream is None or time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        left = f", {duration(seconds * (1 - done) / done)} left" if done > 0 else ""
        self._stream.write(f"\r\x1b[K{done:4.0%} {message}, {duration(seconds)}{left}")
        self._stream.flush()

    def done(self) -> None:
        """Clear the line."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def read_curve(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a learning curve; a torn last line, left by a kill, is ignored. Missing file: no lines."""
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error
    return lines


def trim_curve(path: Path, last_round: int) -> None:
    """Drop the lines beyond `last_round`, which a resumed run will write again."""
    if path.exists():
        kept = [line for line in read_curve(path) if line["round"] <= last_round]
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)


@contextmanager
def _stop_on_signals():
    """An event set by the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
