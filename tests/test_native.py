"""The native test programs, plain and under ThreadSanitizer, AddressSanitizer and UBSan; the choice of instruction set.

The programs are built incrementally in build/native-* by CMake, as anyone may do by hand (native/tests/CMakeLists.txt).
"""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from znn import fftw

ROOT = Path(__file__).resolve().parents[1]
BUILD_TIMEOUT_S, RUN_TIMEOUT_S = 900, 300
# How much each program does: everything in the plain build, less where each memory access is watched.
PROGRAMS = {
    "tasks_test": {"": 1000, "thread": 300, "address": 500},
    "stage_test": {"": 300, "thread": 60, "address": 100},
    "sum_test": {"": 300, "thread": 60, "address": 100},
    "pool_test": {"": 20000, "thread": 4000, "address": 8000},
    "engine_stress": {"": 150, "thread": 40, "address": 60},
    "layer_stress": {"": 150, "thread": 25, "address": 40},
    "kernels_test": {"": 600, "thread": 40, "address": 120},
    "tiled_test": {"": 3000, "thread": 20, "address": 100},
}
CPU_FLAGS = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
RUNS_HERE = {"baseline": True, "avx2": {"avx2", "fma"} <= set(CPU_FLAGS),
             "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"} <= set(CPU_FLAGS)}


@lru_cache(maxsize=None)
def build(sanitizer: str) -> Path:
    """The folder with the programs, built with a sanitizer ("thread", "address" or none)."""
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed, so the native tests cannot be built")
    folder = ROOT / "build" / f"native-{sanitizer or 'plain'}"
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "Makefile").exists() else []
    with open(folder / ".lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests may build at once
        command("cmake", "-S", ROOT / "native", "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release",
                "-DZNN_PYTHON=OFF", "-DZNN_NATIVE_TESTS=ON", f"-DZNN_SANITIZE={sanitizer}",
                f"-DZNN_WIDE_AVX2={'' if sanitizer else 'ON'}")
        command("cmake", "--build", folder, "--parallel", len(os.sched_getaffinity(0)), "--target", *PROGRAMS)
    return folder / "tests"


def command(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def run(program: Path, *arguments: object, **environment: str) -> str:
    """What a test program prints last, once it has succeeded."""
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1", **environment}
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=RUN_TIMEOUT_S,
                          env={**os.environ, **options})
    assert done.returncode == 0, f"{program.name} ended with {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", last), last
    return last


@pytest.mark.parametrize("sanitizer", ["", "thread", "address"], ids=["plain", "thread", "address"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_native(program, sanitizer):
    folder = build(sanitizer)
    arguments: list[object] = [PROGRAMS[program][sanitizer], 1]
    if program == "engine_stress":
        arguments.append(fftw_path())
    run(folder / program, *arguments)


def fftw_path() -> str:
    """The library that the engine itself would load."""
    from znn import _core
    fftw.load()
    return _core.fftw_path()


# ---- instruction sets ---------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_kernels_on_a_forced_instruction_set(isa):
    if not RUNS_HERE[isa]:
        pytest.skip(f"this processor has no {isa}")
    run(build("") / "kernels_test", 60, 2, ZNN_ISA=isa)


def python(code: str, isa: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env={**os.environ, "ZNN_ISA": isa})


@pytest.mark.parametrize("isa", RUNS_HERE)
def test_forcing_an_instruction_set(isa):
    done = python("import znn; print(znn._core.isa())", isa)
    if RUNS_HERE[isa]:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa
    else:
        assert done.returncode != 0
        assert f'ZNN_ISA is "{isa}"' in done.stderr


def test_an_unknown_instruction_set_is_named():
    done = python("import znn; znn._core.isa()", "sse9")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("RuntimeError") and '"sse9"' in message and "baseline, avx2 or avx512" in message


def test_without_a_value_the_best_instruction_set_is_chosen():
    best = [isa for isa, here in RUNS_HERE.items() if here][-1]
    assert python("import znn; print(znn._core.isa())", "").stdout.strip() == best


def test_forced_instruction_sets_give_the_same_answer():
    code = ("import numpy as np, znn; from znn.spec import NetworkSpec; "
            "net = znn.Network(NetworkSpec.layered('n', 2, [{'conv': 3, 'kernel': 3, 'transfer': 'tanh'}, "
            "{'max_filter': 2}, {'conv': 1, 'kernel': 2}]), output=4, threads=1, plan='direct', seed=3); "
            "x = np.random.default_rng(1).standard_normal((2, 9, 9, 9)).astype('f4'); "
            "print(np.round(net.forward(x), 3).tolist())")
    answers = [python(code, isa) for isa, here in RUNS_HERE.items() if here]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
    assert all(close(answer.stdout, answers[0].stdout) for answer in answers)


def close(a: str, b: str) -> bool:
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", text)] for text in (a, b)]
    return len(numbers[0]) == len(numbers[1]) > 0 and all(abs(x - y) < 2e-3 for x, y in zip(*numbers, strict=True))


def test_no_weak_symbols_in_the_objects_of_one_instruction_set():
    """The linker may merge a weak symbol across instruction sets, and an older processor would then crash."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed, so the symbols cannot be read")
    objects = sorted((build("").parent / "kernels").rglob("znn_kernels_*.dir/*.o"))
    assert {path.parent.name for path in objects} >= {"znn_kernels_baseline.dir"} and len(objects) >= 8
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, timeout=60, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.match(r"[0-9a-f ]{16} [WVu] ", line)]
        assert not weak, f"{path.parent.name}/{path.name}: {weak[:3]}"
