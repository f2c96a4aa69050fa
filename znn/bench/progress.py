"""One line of progress with the time left: redrawn on a terminal, a plain line per group otherwise."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """weights: expected seconds of each step; the time left is scaled by how the steps so far compared with
    theirs."""

    def __init__(self, weights: list[float], stream: TextIO | None = None) -> None:
        self._weights, self._stream = weights, stream or sys.stderr
        self._done, self._start, self._terminal = 0, time.monotonic(), self._stream.isatty()

    def left_s(self) -> float:
        """Seconds still expected."""
        finished, remaining = sum(self._weights[: self._done]), sum(self._weights[self._done :])
        elapsed = time.monotonic() - self._start
        return remaining * (elapsed / finished) if finished else remaining

    def show(self, text: str) -> None:
        """Say what is being done now."""
        head = f"[{self._done + 1}/{len(self._weights)}] about {duration(self.left_s())} left  "
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[K" + (head + text)[: width - 1])
        else:
            self._stream.write(head + text + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._stream.write(("\r\x1b[K" if self._terminal else "") + text + "\n")
        self._stream.flush()

    def step(self) -> None:
        self._done += 1

    def close(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
