"""Finding and loading FFTW, and keeping what its planner has learned with the machine.

FFTW (single precision) is loaded at run time: the newer of the system's libfftw3f and the one that pyfftw's wheel ships,
or the file named by the environment variable ZNN_FFTW. ZNN_FFTW_RIGOUR sets how long its planner may look (estimate,
measure, patient).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import re
from functools import lru_cache
from pathlib import Path

from znn import _core, cache
from znn.errors import PlanError

_kept_wisdom = ""


@lru_cache(maxsize=None)
def load() -> str:
    """Load FFTW once; returns its version text. Raises PlanError when there is none or it is not usable."""
    forced = os.environ.get("ZNN_FFTW")
    found = [forced] if forced else sorted(_candidates(), key=_version_number, reverse=True)
    if not found:
        raise PlanError("the fft method needs FFTW in single precision, and no libfftw3f was found; "
                        "install pyfftw (pip) or libfftw3-single3 (Debian), or set ZNN_FFTW to the library's path")
    try:
        _core.load_fftw(found[0])
        _core.set_fftw_rigour(os.environ.get("ZNN_FFTW_RIGOUR", "measure"))
    except RuntimeError as error:
        raise PlanError(str(error)) from None
    _import_wisdom()
    return _core.fftw_version()


def keep_wisdom() -> None:
    """Store what the planner has learned since it was last kept, so that the next process plans alike and at once."""
    global _kept_wisdom
    if not _core.fftw_loaded() or _core.fftw_rigour() == "estimate":
        return
    wisdom = _core.export_wisdom()
    if wisdom != _kept_wisdom:
        cache.write_text(_wisdom_name(), wisdom)
        _kept_wisdom = wisdom


def _import_wisdom() -> None:
    global _kept_wisdom
    text = cache.read_text(_wisdom_name())
    if text and _core.fftw_rigour() != "estimate" and _core.import_wisdom(text):
        _kept_wisdom = _core.export_wisdom()


def _wisdom_name() -> str:
    return f"{_core.fftw_version()}-{_core.fftw_rigour()}.wisdom"


def _candidates() -> list[str]:
    """Paths or names of the single-precision libraries on this machine."""
    found = []
    system = ctypes.util.find_library("fftw3f")
    if system:
        found.append(system)
    spec = importlib.util.find_spec("pyfftw")  # finds the package without importing it
    if spec and spec.origin:
        package = Path(spec.origin).parent
        for folder in (package.parent / "pyfftw.libs", package / ".dylibs"):
            found += [str(path) for path in sorted(folder.glob("libfftw3f[-.]*")) if "threads" not in path.name]
    return found


def _version_number(path: str) -> tuple[int, ...]:
    try:
        text = (ctypes.c_char * 32).in_dll(ctypes.CDLL(path), "fftwf_version").value
    except (OSError, ValueError):
        return ()
    match = re.search(rb"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else ()
