"""The process in which one case lives: reads commands as JSON lines from stdin, answers each with one JSON
line.

    predict -> what it needs, or why it cannot run      open -> set up and plan
    check -> the comparison with the reference          lap -> seconds      mark -> counters and peak memory start
    outcome -> what training does to outputs and parameters, as a file
    compute -> (instead, for what is not timed)         finish -> counters, peak memory

Only the runner talks to it. `znn.bench.forkserver` starts it and sees to it that it dies with the runner.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from . import adapters
from .adapters.base import CHECK_RATE, Computed, Session
from .problem import Problem

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


class Worker:
    """State of one case between commands."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.problem, self.options = Problem.from_dict(case["problem"]), case["options"]
        self.adapter = adapters.load(case["adapter"])
        self.session: Session | None = None
        self.computed: dict[str, Any] = {}

    def predict(self) -> dict[str, Any]:
        reason = self.adapter.unavailable()
        if reason:
            return {"unavailable": reason}
        return {
            "predicted_bytes": self.adapter.predicted_bytes(self.problem, self.options),
            "flop": self.adapter.flop(self.problem, self.options),
            "version": self.adapter.version(),
            "computed": isinstance(self.adapter, Computed),
        }

    def open(self) -> dict[str, Any]:
        self.session = self.adapter.start(self.problem, self.options)
        return {"plan": self.session.plan, "chosen": self.session.chosen}

    def check(self, shared: str) -> dict[str, Any]:
        options = self.options | self.session.chosen
        return {"check": self.adapter.check(self.problem, options, Path(shared))}

    def compute(self) -> dict[str, Any]:
        self.computed = self.adapter.compute(self.problem, self.options)
        return {}

    def outcome(self, path: str, rounds: int) -> dict[str, Any]:
        """Outputs and parameters before and after a few laps at a rate that shows, for a comparison."""
        session = self.adapter.start(self.problem, self.options, CHECK_RATE)
        try:
            arrays = {f"start parameter {name}": array for name, array in session.parameters().items()}
            for _ in range(rounds):
                session.lap()
            arrays |= {f"output {name}": array for name, array in session.outputs().items()}
            arrays |= {f"parameter {name}": array for name, array in session.parameters().items()}
        finally:
            session.close()
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        return {}

    def mark(self) -> dict[str, Any]:
        self.session.mark()
        forget_peak()
        return {}

    def disturbed(self) -> dict[str, Any]:
        return {"by": self.session.disturbed()}

    def lap(self, turn_s: float = 0.0) -> dict[str, Any]:
        """Seconds of a lap; of laps shorter than `turn_s` the mean over such a turn, after one that is not counted:
        caches and clocks settle, and what the last lap left running is waited for within the time."""
        start = time.perf_counter()
        self.session.lap()
        if not turn_s:
            return {"s": time.perf_counter() - start}
        self.session.settle()
        first = time.perf_counter() - start
        if first >= turn_s:
            return {"s": first}
        laps, start = math.ceil(turn_s / first), time.perf_counter()
        for _ in range(laps):
            self.session.lap()
        self.session.settle()
        return {"s": (time.perf_counter() - start) / laps}

    def finish(self) -> dict[str, Any]:
        peak = peak_bytes()
        metrics = self.session.metrics() if self.session else self.computed
        if self.session:
            self.session.close()
        return {"metrics": metrics, "peak_rss_bytes": peak}


def answer(worker: Worker | None, message: dict[str, Any]) -> tuple[Worker | None, dict[str, Any]]:
    """Carry out one command; an exception becomes an answer with its kind and its sentence."""
    try:
        if message["do"] == "predict":
            worker = Worker(message["case"])
        arguments = {k: v for k, v in message.items() if k not in ("do", "case")}
        return worker, getattr(worker, message["do"])(**arguments)
    except Exception as error:  # noqa: BLE001 - whatever a competitor raises is a result of its case
        text = f"{type(error).__name__}: {error}".strip()
        oom = isinstance(error, MemoryError) or any(words in text.lower() for words in OUT_OF_MEMORY)
        traceback.print_exc()
        return worker, {"error": text, "status": "oom" if oom else "failed"}


def forget_peak() -> None:
    """Let the peak of this process's memory start anew, after what set-up has freed went back to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass  # then the peak is that of the process's whole life


def peak_bytes() -> int:
    """The largest resident memory of this process since `forget_peak`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve() -> None:
    """Answer commands until the runner closes its end."""
    _volunteer_for_oom()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print; only replies go to the runner
    worker = None
    with os.fdopen(os.dup(0)) as commands:
        for line in commands:
            worker, reply = answer(worker, json.loads(line))
            replies.write(json.dumps(reply) + "\n")


def _volunteer_for_oom() -> None:
    """Ask the kernel to kill this process, not the runner, when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("900")
    except OSError:
        pass

