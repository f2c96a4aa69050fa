"""Verdicts on the paper's claims, from records and the thresholds written in the sweep files. Nothing else
enters."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import stats, store
from .counters import lock_shares, misses, transforms
from .record import Record
from .stats import Estimate

REPRODUCED, FAILED, SIMULATED, UNTESTABLE = (
    "reproduced",
    "not reproduced",
    "only simulated",
    "not testable here",
)
KEPT = ["kernels", "images", "gradients"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Test:
    """One number held against its threshold. passed None: shown, but the verdict does not depend on it."""

    what: str
    machine: str
    value: float
    low: float | None
    high: float | None
    threshold: str
    passed: bool | None
    simulated: bool = False


@dataclass(frozen=True)
class Verdict:
    claim: str
    text: str
    verdict: str
    reason: str
    tests: list[Test] = field(default_factory=list)


class Evidence:
    """The records of a results folder and the thresholds of a claim."""

    def __init__(self, loaded: store.Loaded, thresholds: dict[str, dict[str, Any]]) -> None:
        self.loaded, self.thresholds = loaded, thresholds
        self.records = [r for r in loaded.distinct() if r.status == "ok"]

    def of(self, experiment: str, **fields: Any) -> list[Record]:
        return store.select(self.records, experiment=experiment, **fields)

    def cores(self, record: Record) -> int:
        run = self.loaded.runs.get(record.run_id)
        return (run.machine.get("physical_cores") or 1) if run else 1


def load_thresholds(sweeps: Path = ROOT / "experiments" / "sweeps") -> dict[str, dict[str, Any]]:
    """Thresholds by claim, joined over the sweep files that state them."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(sweeps.glob("*.toml")):
        for claim, values in tomllib.loads(path.read_text()).get("claims", {}).items():
            found.setdefault(claim, {}).update(values)
    return found


def evaluate(loaded: store.Loaded, thresholds: dict[str, dict[str, Any]] | None = None) -> list[Verdict]:
    """The verdict on every claim."""
    evidence = Evidence(loaded, thresholds if thresholds is not None else load_thresholds())
    texts = tomllib.loads((ROOT / "experiments" / "claims.toml").read_text())
    return [_verdict(claim, texts[claim]["text"], evidence) for claim in sorted(texts)]


def _verdict(claim: str, text: str, evidence: Evidence) -> Verdict:
    tests, missing = CLAIMS[claim](evidence, evidence.thresholds.get(claim, {}))
    counted = [test for test in tests if test.passed is not None]
    failed = [test for test in counted if not test.passed and not test.simulated]
    if failed:
        return Verdict(claim, text, FAILED, "; ".join(map(_sentence, failed[:3])), tests)
    if missing or not counted:
        return Verdict(claim, text, UNTESTABLE, missing or "no records of the experiments it needs", tests)
    simulated = [test for test in counted if test.simulated]
    if simulated:
        against = [test for test in simulated if not test.passed]
        reason = (
            "the simulation speaks against it: "
            if against
            else "the simulation, validated against measured rounds, agrees: "
        )
        return Verdict(
            claim, text, SIMULATED, reason + "; ".join(map(_sentence, (against or simulated)[:3])), tests
        )
    return Verdict(claim, text, REPRODUCED, f"all {len(counted)} numbers are within their thresholds", tests)


def _sentence(test: Test) -> str:
    interval = f" (interval {test.low:.4g} to {test.high:.4g})" if test.low is not None else ""
    return f"{test.what}: {test.value:.4g}{interval}, threshold {test.threshold}"


Found = tuple[list[Test], str]


def _brent(evidence: Evidence, limits: dict) -> Found:
    tests = []
    for record in sorted(evidence.of("theory"), key=lambda r: r.problem["depth"]):
        rows, depth = record.metrics["rows"], record.problem["depth"]
        error = max(
            abs(row[f"{key}_flop"] / row[f"closed_{key}_flop"] - 1)
            for row in rows
            for key in ("work", "span")
        )
        tests.append(
            _at_most(
                f"task graph against closed formulas, depth {depth}",
                record,
                error,
                limits["formula_tolerance"],
            )
        )
        for row, p in itertools.product(
            (r for r in rows if r["width"] == limits["width"]), limits["processors"]
        ):
            s = row["work_flop"] / row["span_flop"]
            tests.append(
                _at_least(
                    f"Brent's bound over P = {p} at width {limits['width']}, depth {depth}, {row['method']}",
                    record,
                    s / (1 + (s - 1) / p) / p,
                    limits["efficiency"],
                )
            )
    return tests, ""


def _locality(evidence: Evidence, limits: dict) -> Found:
    tests = []
    for (_, width), records in _groups(
        evidence.of("policies", adapter="valgrind"), "machine_id", "width"
    ).items():
        counted = {r.options["policy"]: misses(r.metrics) for r in records}
        tests += [
            _at_least(
                f"last-level misses, {policy} over the paper's order, width {width}",
                records[0],
                stats.unpaired_ratio(counts, counted["priority"]),
                limits["misses"],
                strict=True,
            )
            for policy, counts in counted.items()
            if policy != "priority" and "priority" in counted
        ]
    for (_, width), records in _groups(evidence.of("policies", adapter="znn"), "machine_id", "width").items():
        base = next((r for r in records if r.options["policy"] == "priority"), None)
        tests += [
            _shown(
                f"seconds per round, {r.options['policy']} over the paper's order, width {width}",
                r,
                _ratio(r, base),
                limits["time"],
            )
            for r in records
            if base and r is not base
        ]
    return tests, "" if any(
        t.passed is not None for t in tests
    ) else _why_not(evidence, "policies", "valgrind") or "cache misses are counted in the tier quick"


def _why_not(evidence: Evidence, experiment: str, adapter: str) -> str:
    """The reasons recorded where an adapter did not run."""
    skipped = store.select(evidence.loaded.distinct(), experiment=experiment, adapter=adapter)
    return "; ".join(sorted({r.reason for r in skipped if r.status != "ok"}))


def _sums(evidence: Evidence, limits: dict) -> Found:
    tests, alone = [], False
    for (_, width), records in _groups(evidence.of("sums", adapter="locks"), "machine_id", "width").items():
        found = {r.options["sum"]: r for r in records}
        alone |= evidence.cores(records[0]) < 2
        if evidence.cores(records[0]) > 1 and {"wait-free", "locked"} <= set(found):
            tests.append(
                _at_least(
                    f"time in critical sections, locked over wait-free, width {width}",
                    records[0],
                    _ratio(found["locked"], found["wait-free"], lambda r: lock_shares(r.metrics)),
                    limits["ratio"],
                    strict=True,
                )
            )
    for (_, width), records in _groups(evidence.of("sums", adapter="znn"), "machine_id", "width").items():
        found = {r.options["sum"]: r for r in records}
        if evidence.cores(records[0]) > 1 and {"wait-free", "locked"} <= set(found):
            e = _ratio(found["locked"], found["wait-free"])
            what = f"seconds per round, locked over wait-free, width {width}"
            tests.append(_shown(what, records[0], e, limits["time"]))
    return tests, "one core: nobody waits for a lock" if alone and not tests else ""


def _multi_core(evidence: Evidence, limits: dict) -> Found:
    tests = []
    for net in ("scaling_3d", "scaling_2d"):
        for _, speedups in _speedups(evidence, net).items():
            width = max(speedups)
            record, e, cores = speedups[width]
            tests.append(
                _at_least(
                    f"speedup over {cores} physical cores, {net}, width {width}",
                    record,
                    _scaled(e, 1 / cores),
                    limits["efficiency"],
                )
            )
    return tests, "" if tests else "needs the scaling experiments on at least two physical cores"


def _many_core(evidence: Evidence, limits: dict) -> Found:
    for net in ("scaling_3d", "scaling_2d"):
        for _, speedups in _speedups(evidence, net, limits["hardware_threads"]).items():
            record, e, threads = speedups[max(speedups)]
            return [
                _at_least(
                    f"speedup with {threads} hardware threads, {net}",
                    record,
                    e,
                    limits["speedup"],
                    strict=True,
                )
            ], ""
    tests, missing = [], []
    for _, records in _groups(evidence.of("many_cores"), "machine_id").items():
        record = max(records, key=lambda r: r.problem["width"])
        validation = record.metrics["validation"]
        tests += _simulation_errors(record, limits["validation_error"])
        worst = max(abs(v["error"]) for v in validation)
        tests.append(
            _shown(
                f"largest error of the simulation against measured rounds, width {record.problem['width']}",
                record,
                Estimate(worst, worst, worst),
                limits["validation_error"],
            )
        )
        if worst > limits["validation_error"]:
            missing.append(
                f"the simulation errs by {worst:.1%} on {record.machine_id}, more than "
                f"{limits['validation_error']:.0%}"
            )
            continue
        best = max(
            p["speedup"] for p in record.metrics["predicted"] if p["workers"] <= limits["hardware_threads"]
        )
        tests.append(
            _at_least(
                f"simulated speedup, width {record.problem['width']}, at most {limits['hardware_threads']} "
                f"workers",
                record,
                best,
                limits["speedup"],
                strict=True,
                simulated=True,
            )
        )
    if any(test.simulated for test in tests):
        return tests, ""
    return tests, "; ".join(missing) or "no machine with 240 hardware threads, and no simulation"


def _simulation_errors(record: Record, limit: float) -> Iterator[Test]:
    """The simulation against measured rounds at each number of workers, with and without shared bandwidth."""
    for v in record.metrics["validation"]:
        what = f"error of the simulated seconds per round, width {record.problem['width']}, {v['workers']} workers"
        measured = stats.median(v["samples_s"])
        for key, how in (("error", ""), ("error_without_bandwidth", ", bandwidth left out")):
            if key in v:
                simulated = (1 + v[key]) * measured.value
                e = Estimate(v[key], simulated / measured.high - 1, simulated / measured.low - 1)
                yield _shown(what + how, record, e, limit)


def _widths(evidence: Evidence, limits: dict) -> Found:
    tests, missing = [], []
    for _, speedups in _speedups(evidence, "scaling_3d").items():
        for width, (record, e, cores) in sorted(speedups.items()):
            if width >= limits["multi_core_width"]:
                tests.append(
                    _at_least(
                        f"speedup over {cores} physical cores, width {width}",
                        record,
                        _scaled(e, 1 / cores),
                        limits["efficiency"],
                    )
                )
    if not tests:
        missing.append(
            f"no net of width {limits['multi_core_width']} or more was measured on two cores or more"
        )
    simulated, workers = [], limits["many_core_processors"]
    for record in evidence.of("many_cores"):
        if record.problem["width"] >= limits["many_core_width"]:
            best = max(
                (p["speedup"] for p in record.metrics["predicted"] if p["workers"] == workers), default=0.0
            )
            simulated.append(
                _at_least(
                    f"simulated speedup over {workers} cores, width {record.problem['width']}",
                    record,
                    best / workers,
                    limits["efficiency"],
                    simulated=True,
                )
            )
    if not simulated:
        missing.append(f"no simulation at width {limits['many_core_width']} or more (tier paper)")
    return tests + simulated, "; ".join(missing)


COMPARISONS = ("kernel_size_3d", "kernel_size_2d", "baselines")


def _gpu(evidence: Evidence, limits: dict) -> Found:
    """PyTorch's seconds over those of the paper's engine with its faster plan, on the same problem."""
    pairs = list(_against_torch(evidence))
    gpu = [(other, ours) for other, ours in pairs if other.adapter_name == "torch_gpu"]
    cpu = [(other, ours) for other, ours in pairs if other.adapter_name == "torch_cpu"]
    tests = [
        _shown(f"PyTorch on CPU over ZNN, {_problem(other)}", ours, _ratio(other, ours), limits["ahead"])
        for other, ours in cpu
    ]
    if not gpu:
        why = _why_not(evidence, "baselines", "torch_gpu")
        return tests, "no record from a machine with a GPU" + (f" ({why})" if why else "")
    # So many comparisons at 95 % each would find some cases ahead and some behind by chance.
    confidence = 1 - (1 - stats.CONFIDENCE) / len(gpu)
    ratios = {}
    for other, ours in gpu:
        e = stats.unpaired_ratio(other.samples_s, ours.samples_s, confidence=confidence)
        ratios[other.experiment, other.machine_id, _problem(other)] = other, ours, e
        name = f"PyTorch on {other.metrics.get('device', 'GPU')} over ZNN, {_problem(other)}"
        tests.append(_shown(name, ours, e, limits["ahead"]))
    record = gpu[0][1]
    ahead = sum(e.low > limits["ahead"] for _, _, e in ratios.values())
    behind = sum(e.high < limits["ahead"] for _, _, e in ratios.values())
    tests.append(_at_least("cases in which ZNN is ahead of the GPU", record, float(ahead), 1))
    tests.append(_at_least("cases in which ZNN is behind the GPU", record, float(behind), 1))
    growth = list(_growth(ratios, limits))
    if not growth:
        return tests, "no net was measured with a GPU at more than one kernel size"
    share = sum(test.low > limits["growth"] for test in growth) / len(growth)
    what = "share of the series in which ZNN gains on the GPU with the kernel"
    return [*tests, *growth, _at_least(what, record, share, limits["series"])], ""


def _against_torch(evidence: Evidence) -> Iterator[tuple[Record, Record]]:
    """PyTorch's records, each with our fastest of the same problem: from the same machine, or else from any."""
    for experiment in COMPARISONS:
        for records in _groups(evidence.of(experiment), "problem_text").values():
            mine = [r for r in records if r.adapter_name == "znn"]
            for other in (r for r in records if mine and r.adapter_name in ("torch_cpu", "torch_gpu")):
                near = [r for r in mine if r.machine_id == other.machine_id]
                yield other, min(near or mine, key=_seconds)


def _growth(ratios: dict[tuple, tuple[Record, Record, Estimate]], limits: dict) -> Iterator[Test]:
    """How the ratio at the largest kernel compares with that at the smallest, for each series of nets that differ
    only in their kernels; the interval is that of the quotient at its worst."""
    series: dict[tuple, dict[int, tuple[Record, Estimate]]] = {}
    for (experiment, machine, _), (other, ours, e) in ratios.items():
        dims, kernel = other.problem["net"].split("_")
        rest = " ".join(f"{k}={v}" for k, v in other.problem.items() if k != "net")
        if experiment.startswith("kernel_size"):
            series.setdefault((machine, dims, rest), {})[int(kernel)] = ours, e
    for (_, dims, rest), by_kernel in sorted(series.items()):
        (few, (_, small)), (many, (ours, large)) = (f(by_kernel.items(), key=lambda i: i[0]) for f in (min, max))
        if many > few:
            change = Estimate(large.value / small.value, large.low / small.high, large.high / small.low)
            what = f"GPU over ZNN at kernel {many} over that at kernel {few}, {dims} {rest}"
            yield _shown(what, ours, change, limits["growth"])


def _memoized(evidence: Evidence, limits: dict) -> Found:
    tests = []
    for _, records in _groups(evidence.of("memoization"), "machine_id").items():
        width = max(r.problem["width"] for r in records)
        kept, none = (
            next(
                (r for r in records if r.problem["width"] == width and r.options["memoize"] == setting), None
            )
            for setting in (KEPT, [])
        )
        if kept and none and transforms(kept.metrics) and transforms(none.metrics):
            saved = 1 - transforms(kept.metrics) / transforms(none.metrics)
            tests.append(
                _at_most(
                    f"share of transforms saved, distance from one third, width {width}",
                    kept,
                    abs(saved - limits["saving"]),
                    limits["tolerance"],
                )
            )
            tests.append(
                _shown(
                    f"share of transforms saved, width {width}",
                    kept,
                    Estimate(saved, saved, saved),
                    limits["saving"],
                )
            )
    return tests, ""


CLAIMS: dict[str, Callable[[Evidence, dict], Found]] = {
    "C1": _brent,
    "C2": _locality,
    "C3": _sums,
    "C4": _multi_core,
    "C5": _many_core,
    "C6": _widths,
    "C7": _gpu,
    "C8": _memoized,
}


def _speedups(
    evidence: Evidence, net: str, least: int | None = None
) -> dict[str, dict[int, tuple[Record, Estimate, int]]]:
    """By machine and width: the record on all physical cores (or on the most threads, at least `least`), its
    speedup over
    one worker, and the count."""
    found: dict[str, dict[int, tuple[Record, Estimate, int]]] = {}
    for (machine, width), records in _groups(evidence.of(net, memoize=KEPT), "machine_id", "width").items():
        most = max(r.options["threads"] for r in records)
        wanted = evidence.cores(records[0]) if least is None else most
        one, many = (next((r for r in records if r.options["threads"] == n), None) for n in (1, wanted))
        if one and many and wanted > 1 and wanted >= (least or 0):
            found.setdefault(machine, {})[width] = (many, _ratio(one, many), wanted)
    return found


def _groups(records: list[Record], *keys: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = tuple(_problem(record) if k == "problem_text" else store.value(record, k) for k in keys)
        groups.setdefault(key, []).append(record)
    return groups


def _problem(record: Record) -> str:
    return " ".join(f"{k}={v}" if k != "net" else str(v) for k, v in record.problem.items())


def _seconds(record: Record) -> float:
    return stats.median(record.samples_s).value


def _ratio(
    top: Record, bottom: Record, samples: Callable[[Record], list[float]] = lambda r: r.samples_s
) -> Estimate:
    """Ratio of medians of what `samples` takes from the records, over paired rounds where there are such."""
    together = top.run_id == bottom.run_id and bottom.case_id in top.interleaved_with
    return (stats.ratio if together else stats.unpaired_ratio)(samples(top), samples(bottom))


def _scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(e.value * factor, e.low * factor, e.high * factor, e.coverage)


def _at_least(
    what: str,
    record: Record,
    value: float | Estimate,
    limit: float,
    strict: bool = False,
    simulated: bool = False,
) -> Test:
    """Passes when the lower end of the interval reaches the limit."""
    e = value if isinstance(value, Estimate) else None
    number, low = (e.value, e.low) if e else (value, value)
    passed = low > limit if strict else low >= limit
    return Test(
        what,
        record.machine_id,
        number,
        e and e.low,
        e and e.high,
        f"{'>' if strict else '>='} {limit:g}",
        bool(passed),
        simulated,
    )


def _at_most(what: str, record: Record, value: float, limit: float) -> Test:
    return Test(what, record.machine_id, value, None, None, f"<= {limit:g}", bool(value <= limit))


def _shown(what: str, record: Record, e: Estimate, limit: float) -> Test:
    return Test(what, record.machine_id, e.value, e.low, e.high, f"compare {limit:g}", None)


def to_json(verdicts: list[Verdict]) -> str:
    return json.dumps({"claims": [asdict(v) for v in verdicts]}, indent=1) + "\n"


def to_markdown(verdicts: list[Verdict], machines: dict[str, str]) -> str:
    """The report: a table of verdicts, then the numbers behind each. machines: what each machine id is
    called."""
    lines = [
        "# The paper's claims, tested on the records in this folder",
        "",
        "Generated by `python paper_figs/build.py`; thresholds are in `experiments/sweeps/*.toml`. A number "
        "passes when the "
        "lower end of its interval does.",
        "",
        "| claim | verdict | why |",
        "|---|---|---|",
    ]
    lines += [f"| {v.claim}: {v.text} | **{v.verdict}** | {v.reason} |" for v in verdicts]
    for v in verdicts:
        lines += ["", f"## {v.claim}: {v.verdict}", "", v.text, ""]
        if v.tests:
            lines += [
                "| number | machine | value | 95 % interval | threshold | passed |",
                "|---|---|---|---|---|---|",
            ]
        for t in v.tests:
            interval = f"{t.low:.4g} to {t.high:.4g}" if t.low is not None else ""
            passed = {True: "yes", False: "no", None: ""}[t.passed]
            lines.append(
                f"| {t.what} | {machines.get(t.machine, t.machine)} | "
                f"{t.value:.4g}{' (simulated)' if t.simulated else ''} | "
                f"{interval} | {t.threshold} | {passed} |"
            )
    return "\n".join(lines) + "\n"
