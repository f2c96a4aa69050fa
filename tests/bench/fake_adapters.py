"""Adapters that behave, and misbehave, on purpose; cases name them as `fake_adapters:Class`."""

from __future__ import annotations

import os
import time

import numpy as np

from znn.bench.adapters.base import Computed, Session, Timed


class FakeSession(Session):
    plan = "fake plan"

    def __init__(self, options: dict) -> None:
        self.options, self.laps, self.marked, self.looks = options, 0, 0, 0

    def lap(self) -> None:
        self.laps += 1
        action = self.options.get("action")
        if action == "raise" and self.laps > 2:
            raise RuntimeError("the third lap went wrong")
        if action == "memory":
            raise MemoryError("no room")
        if action == "killed":
            os.kill(os.getpid(), 9)
        if action == "exit":
            os._exit(3)
        time.sleep(60 if action == "hang" else self.options.get("lap_s", 0.001))

    def disturbed(self) -> str:
        self.looks += 1
        return "noise" if self.looks <= self.options.get("noisy", 0) else ""

    def mark(self) -> None:
        self.marked = self.laps

    def outputs(self) -> dict:
        return {"y": np.ones(3, np.float32)}

    def metrics(self) -> dict:
        return {"laps": self.laps - self.marked, "pid": os.getpid(), "looks": self.looks}


class Fake(Timed):
    name = "fake"

    def version(self) -> str:
        return "1.0"

    def unavailable(self) -> str | None:
        return None

    def start(self, problem, options, rate=0.0):
        if options.get("action") == "chatter":
            os.write(1, b"libraries print to stdout\n")
        return FakeSession(options)

    def open(self, *arguments):
        raise AssertionError("start is overridden")

    def check(self, problem, options, shared=None):
        wrong = options.get("action") == "wrong"
        return {"reference": "none", "max_rel_err": 1.0 if wrong else 0.0, "tol": 1e-4, "passed": not wrong}

    def predicted_bytes(self, problem, options) -> int:
        return options.get("bytes", 1 << 20)


class Absent(Fake):
    def unavailable(self) -> str:
        return "there is no such device"


class Sums(Computed):
    name = "sums"

    def version(self) -> str:
        return "1.0"

    def compute(self, problem, options) -> dict:
        return {"twice": 2 * problem.width}
