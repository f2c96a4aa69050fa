"""Cache misses of training rounds on a simulated cache, counted by valgrind: repeatable on any machine.

The simulator is cachegrind's, as callgrind runs it, which can write its counts whenever a named function is
called: so every round of one process is a sample of its own, and Python's start is in none.
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
from ..forkserver import die_with_parent
from ..problem import Problem
from .base import Computed
from .znn_adapter import ADAPTER as ZNN

LAPS = 5
WARMUPS = 1
MARK = "getsid"  # of the C library; nothing else calls it
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


class ValgrindAdapter(Computed):
    """options: as for znn, on one worker; laps. The record holds a list of counts, one a round, for each event."""

    name = "valgrind"

    def version(self) -> str:
        text = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
        return f"{text}, znn {metadata.version('znn')}"

    def unavailable(self) -> str | None:
        if shutil.which("valgrind") is None:
            return "valgrind is not installed (Debian: sudo apt-get install valgrind)"
        return ZNN.unavailable()

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return 3 * ZNN.predicted_bytes(problem, options)

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        laps = options.pop("laps", LAPS)
        # Outside valgrind first: transforms are planned by timing, and the kept wisdom makes every counted
        # run take the same.
        ZNN.start(problem, options | {"threads": 1}).close()
        counted = count(problem, options, laps)
        return {
            "per_round": {name: [lap[event] for lap in counted] for event, name in EVENTS.items()},
            "first_level": FIRST_LEVEL,
            "last_level": LAST_LEVEL,
            "machine_caches": provenance.caches(),
        }


def count(problem: Problem, options: dict[str, Any], laps: int) -> list[dict[str, int]]:
    """Event counts of each of `laps` steady rounds."""
    described = {key: value for key, value in vars(problem).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = [
            "valgrind",
            "--tool=callgrind",
            "--cache-sim=yes",
            f"--dump-before={MARK}",
            f"--callgrind-out-file={out}",
            "--quiet",
            f"--D1={FIRST_LEVEL}",
            f"--LL={LAST_LEVEL}",
            sys.executable,
            "-m",
            __name__,
            json.dumps([described, options, laps]),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            preexec_fn=die_with_parent,
        )
        if done.returncode:
            raise RuntimeError(f"valgrind ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        parts = [Path(f"{out}.{1 + lap}") for lap in range(1, laps + 1)]  # the first is the start and warm-ups
        return [totals(part.read_text()) for part in parts]


def totals(text: str) -> dict[str, int]:
    """The totals of a callgrind output file by event."""
    events = re.search(r"^events: (.+)$", text, re.M)[1].split()
    summary = re.search(r"^(?:totals|summary): (.+)$", text, re.M)[1].split()
    return dict(zip(events, map(int, summary)))


def run(described: dict[str, Any], options: dict[str, Any], laps: int) -> None:
    """The program that is counted. A round ends when its updates have."""
    session = ZNN.start(Problem.from_dict(described), options | {"threads": 1, "pin": False})
    for lap in range(WARMUPS + laps):
        if lap >= WARMUPS:
            os.getsid(0)
        session.lap()
        session.net.sync()
    os.getsid(0)
    session.close()


ADAPTER = ValgrindAdapter()

if __name__ == "__main__":
    run(*json.loads(sys.argv[1]))
