"""Cache misses of a training round, counted by valgrind's cachegrind on a simulated cache: repeatable on any
machine.

Two runs that differ in their number of rounds are subtracted, so that Python's start and the set-up cancel.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import provenance
from ..problem import Problem
from .base import Computed
from .znn_adapter import ADAPTER as ZNN

LAPS = (1, 4)
EVENTS = {
    "Ir": "instructions",
    "Dr": "reads",
    "Dw": "writes",
    "D1mr": "D1_read_misses",
    "D1mw": "D1_write_misses",
    "DLmr": "LL_read_misses",
    "DLmw": "LL_write_misses",
}
FIRST_LEVEL = "32768,8,64"
LAST_LEVEL = "1048576,16,64"  # an L2 of 1 MiB: what temporal locality is meant to serve


class CachegrindAdapter(Computed):
    """options: as for znn, on one worker."""

    name = "cachegrind"

    def version(self) -> str:
        text = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
        return f"{text}, znn {metadata.version('znn')}"

    def unavailable(self) -> str | None:
        return "valgrind is not installed" if shutil.which("valgrind") is None else ZNN.unavailable()

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return 3 * ZNN.predicted_bytes(problem, options)

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        # Outside valgrind first: transforms are planned by timing, and the kept wisdom makes every counted
        # run take the same.
        ZNN.start(problem, options | {"threads": 1}).close()
        few, many = (count(problem, options, laps) for laps in LAPS)
        rounds = LAPS[1] - LAPS[0]
        return {
            "per_round": {name: (many[event] - few[event]) / rounds for event, name in EVENTS.items()},
            "first_level": FIRST_LEVEL,
            "last_level": LAST_LEVEL,
            "rounds": rounds,
            "machine_caches": provenance.caches(),
        }


def count(problem: Problem, options: dict[str, Any], laps: int) -> dict[str, int]:
    """Total event counts of a process that runs `laps` rounds under cachegrind."""
    described = {key: value for key, value in vars(problem).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cachegrind.out"
        command = [
            "valgrind",
            "--tool=cachegrind",
            "--cache-sim=yes",
            f"--cachegrind-out-file={out}",
            "--quiet",
            f"--D1={FIRST_LEVEL}",
            f"--LL={LAST_LEVEL}",
            sys.executable,
            "-m",
            __name__,
            json.dumps([described, options, laps]),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "0"}
        )
        if done.returncode:
            raise RuntimeError(f"valgrind ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        return totals(out.read_text())


def totals(text: str) -> dict[str, int]:
    """The program totals of a cachegrind output file by event."""
    events = re.search(r"^events: (.+)$", text, re.M)[1].split()
    summary = re.search(r"^summary: (.+)$", text, re.M)[1].replace(",", "").split()
    return dict(zip(events, map(int, summary)))


def run(described: dict[str, Any], options: dict[str, Any], laps: int) -> None:
    """The program that is counted."""
    session = ZNN.start(Problem.from_dict(described), options | {"threads": 1, "pin": False})
    for _ in range(laps):
        session.lap()
    session.close()


ADAPTER = CachegrindAdapter()

if __name__ == "__main__":
    run(*json.loads(sys.argv[1]))
