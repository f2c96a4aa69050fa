"""Made-up records of every experiment, for tests of figures and claims only; never written into results/."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from znn.bench import adapters, store, sweep
from znn.bench.problem import Problem, extent
from znn.bench.record import Record, Run

SWEEPS = Path(__file__).resolve().parents[2] / "experiments" / "sweeps"
PHASES = ["forward", "backward", "update"]


def write(
    root: Path,
    tier: str = "quick",
    machine: str = "example-8c-0000",
    cores: int = 8,
    missing: tuple[str, ...] = ("torch_gpu",),
    slow: float = 1.0,
    only: set[str] | None = None,
    change=None,
) -> Path:
    """A results folder with one run that holds every case of a tier; `change(record)` may alter or drop
    records."""
    run = Run(
        f"run-{machine}",
        machine,
        "2026-01-01T00:00:00+00:00",
        {
            "cpu": "Example CPU" if cores == 8 else "Other CPU",
            "physical_cores": cores,
            "usable_cores": cores,
            "source": {"commit": "0123456789abcdef", "dirty": False},
        },
        {"tier": tier},
    )
    writer = store.RunWriter(root, run)
    for path in sorted(SWEEPS.glob("*.toml")):
        if only is None or path.stem in only:
            cases = sweep.expand(sweep.load(path), tier, (cores, cores))
            for case in cases:
                record = make(case, cases, run.run_id, cores, missing, slow)
                record = change(record) if change else record
                if record:
                    writer.write(record)
    writer.close()
    if only is None or "learning_curves" in only:
        write_curves(root / machine / "learning_curves", run)
    return writer.path


def write_curves(folder: Path, run: Run) -> None:
    """Learning curves as experiments/learning_curves.py leaves them: the same by rounds, PyTorch three times slower."""
    folder.mkdir(parents=True, exist_ok=True)
    for engine, round_s in (("znn", 0.05), ("torch", 0.15)):
        head = {
            "kind": "run",
            "engine": engine,
            "name": "example",
            "threads": 2,
            "how": {"version": "1"},
            "machine": run.machine,
            "command": "python experiments/learning_curves.py",
        }
        lines = [json.dumps(head)]
        for number in range(50, 2000, 50):
            error = 0.08 + 0.14 * math.exp(-number / 500)
            line = {"kind": "validation", "round": number, "seconds": number * round_s, "loss": error}
            line |= {"pixel_error": error, "standard_error": 0.004, "trivial_error": 0.22}
            lines.append(json.dumps(line))
        (folder / f"example-{engine}.jsonl").write_text("\n".join(lines) + "\n")


def make(case, cases, run_id, cores, missing, slow) -> Record:
    rng = np.random.default_rng(int(case.case_id, 16))
    group = [c.case_id for c in cases if c.group == case.group and c is not case]
    adapter = {"name": case.adapter, "version": "1", "options": case.options}
    common = dict(
        experiment=case.experiment,
        case_id=case.case_id,
        problem=case.problem,
        adapter=adapter,
        protocol=case.protocol.to_dict(),
        run_id=run_id,
        command="python experiments/run_all.py",
    )
    if case.adapter in missing:
        return Record(
            **common, status="skipped", reason="not available: no CUDA device is visible to PyTorch"
        )
    if case.adapter == "torch_cpu" and case.problem.get("net") == "2d_40":
        return Record(**common, status="oom", reason="killed by the system, most likely for memory")
    samples = [] if case.adapter in COMPUTED else (slow * lap_s(case) * rng.lognormal(0, 0.02, 9)).tolist()
    return Record(
        **common,
        status="ok",
        samples_s=samples,
        interleaved_with=group,
        peak_rss_bytes=int(8e8),
        check={"reference": "x", "max_rel_err": 1e-6, "tol": 1e-4, "passed": True},
        metrics=(COMPUTED[case.adapter](case, cores) if case.adapter in COMPUTED else counters(case, cores))
        | ({"round_s": samples} if case.adapter == "znn_copies" else {}),
    )


def lap_s(case) -> float:
    problem, options = case.problem, case.options
    width, net = problem.get("width") or 10, str(problem.get("net"))
    kernel = int(net.split("_")[1]) if net[0] in "23" else 3
    n = extent(problem.get("output", 1))[-1]
    seconds = 1e-3 * width * (width + 5) / 20 * (1 + n / 4)
    if options.get("plan") == "direct":
        seconds *= kernel**1.5 / 8
    seconds *= {"fifo": 1.1, "lifo": 1.05, "stealing": 1.03}.get(options.get("policy"), 1)
    seconds *= {"locked": 1.08, "ordered": 1.15}.get(options.get("sum"), 1) * {"malloc": 1.06}.get(
        options.get("allocator"), 1
    )
    seconds *= 1 + 0.12 * (3 - len(options.get("memoize", PHASES)))
    seconds *= {"torch_cpu": 1.6, "torch_gpu": 0.1, "torch_layers": 1.6, "torch_model": 1.6}.get(case.adapter, 1)
    threads = options.get("threads", 1)
    return seconds / (threads * width / (width + 0.3 * threads) if threads > 1 else 1)


def counters(case, cores) -> dict:
    if case.adapter == "locks":
        lock = {"wait-free": 0.001, "locked": 0.02, "ordered": 0.01}[case.options["sum"]]
        lock *= 10 / case.problem["width"]
        return {"lock_s": [cores * lock * (1 + 0.1 * i) for i in range(9)], "wall_s": [1.0] * 9, "workers": cores}
    width, kept = case.problem.get("width") or 10, len(case.options.get("memoize", PHASES))
    return {
        "laps": 9,
        "transforms": {"kernels": 9 * (2 + (kept < 3)) * width**2, "images": 9 * 4 * width},
    } | ({"device": "Example GPU"} if case.adapter == "torch_gpu" else {})


def theory(case, cores) -> dict:
    return adapters.load("theory").compute(Problem.from_dict(case.problem), case.options)


def trace(case, cores) -> dict:
    rng = np.random.default_rng(1)
    columns = {"worker": [], "phase": [], "kind": [], "group": [], "start_us": [], "duration_us": []}
    for worker in range(cores):
        now = 0
        for phase, count in ((1, 30), (2, 8), (0, 30)):
            for _ in range(count):
                length = int(rng.uniform(100, 900))
                for key, value in zip(columns, (worker, phase, 0, 0, now, length)):
                    columns[key].append(value)
                now += length + int(rng.exponential(20))
    return {
        "wall_s": 0.03,
        "events": {"names": {"phase": PHASES, "kind": ["task"], "group": ["conv1"]}} | columns,
    }


def simulate(case, cores) -> dict:
    width = case.problem["width"]
    speed = lambda n, top: n / (1 + n / (6 * width)) if top else n / (1 + n / (2 * width))  # noqa: E731
    rng = np.random.default_rng(2)
    counts = [2**i for i in range(int(math.log2(cores)) + 1)]
    return {
        "validation": [
            {
                "workers": n,
                "samples_s": (1 / speed(n, True) * rng.lognormal(0, 0.02, 9)).tolist(),
                "simulated_s": 1 / speed(n, True),
                "error": 0.02 * n / cores,
                "error_without_bandwidth": -0.1 * n / cores,
            }
            for n in counts
        ],
        "predicted": [
            {
                "workers": n,
                "bandwidth": name,
                "round_s": 1 / speed(n, top),
                "busy_share": 0.9,
                "speedup": speed(n, top),
            }
            for n in case.options["workers"]
            for name, top in (("grows with cores", True), ("as on this machine", False))
        ],
    }


def valgrind(case, cores) -> dict:
    misses = {"priority": 1.0, "fifo": 1.4, "lifo": 1.1, "stealing": 1.2}[case.options["policy"]] * 1e6
    rounds = [int(misses * (1 + 0.01 * (i % 3))) for i in range(7)]
    return {"per_round": {"LL_read_misses": rounds, "LL_write_misses": [n // 3 for n in rounds]}}


def plan_search(case, cores) -> dict:
    seconds = [0.01 * (1 + 0.01 * (i % 3)) for i in range(5)]
    return {"layers": [{"layer": f"conv{i}", "chosen": "direct", "best": "tiled 8x8x8", "candidates": 40, "seconds": seconds,
                        "best_seconds": [s / 1.02 for s in seconds]} for i in (1, 2)]}


def direct_passes(case, cores) -> dict:
    row = {"layer": "conv1", "code_path": "avx2", "flop": 1e9, "peak_s": [0.01 * (1 + 0.01 * (i % 3)) for i in range(7)]}
    return {"layers": [row | {f"{name}_s": [s / 0.9 for s in row["peak_s"]] for name in PHASES}]}


COMPUTED = {
    "direct_passes": direct_passes,
    "plan_search": plan_search,
    "theory": theory,
    "trace": trace,
    "simulate": simulate,
    "valgrind": valgrind,
}
