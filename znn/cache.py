"""A folder per machine for what is costly to find out again: plans' timings, FFTW's wisdom.

It lies in ZNN_CACHE, else in XDG_CACHE_HOME/znn, else in ~/.cache/znn. A cache that cannot be read or written is no
error: things are found out again.
"""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from znn.files import atomic_write


def folder() -> Path:
    """The folder of this machine."""
    base = os.environ.get("ZNN_CACHE")
    if not base:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "znn"
    return Path(base) / machine_key()


@lru_cache(maxsize=None)
def machine_key() -> str:
    """Names the processor model: what was measured on one does not hold on another."""
    model = platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "cpu family", "model\t", "stepping", "flags")):
                model += line.partition(":")[2].strip() + "\n"
            if not line:
                break
    return hashlib.sha256(model.encode()).hexdigest()[:16]


def read_text(name: str) -> str | None:
    """The cached text, or None."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder() / name).read_text("utf-8")
    return None


def write_text(name: str, text: str) -> None:
    """Keep a text, atomically, if the folder can be written."""
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(folder() / name, "w") as file:
            file.write(text)
