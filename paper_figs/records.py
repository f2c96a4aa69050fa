"""Records for the figures. The reading modules of znn.bench are loaded by their folder, so that nothing of
the engine is:
figures regenerate on a machine without a compiler."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_package = types.ModuleType("znn_bench")
_package.__path__ = [str(ROOT / "znn" / "bench")]
sys.modules.setdefault("znn_bench", _package)

from znn_bench import stats, store  # noqa: E402
from znn_bench.provenance import machine_names  # noqa: E402
from znn_bench.record import Record  # noqa: E402
from znn_bench.stats import Estimate  # noqa: E402

__all__ = ["ROOT", "Data", "Estimate", "Record", "by", "paired_ratio", "stats", "store"]

ENGINES = {
    "znn": "ZNN, the paper's engine",
    "znn_bundled": "ZNN, bundles and tiles",
    "torch_cpu": "PyTorch, CPU",
    "torch_gpu": "PyTorch, GPU",
}


class Data:
    """The latest records of a results folder. Remembers which it handed out, for the captions."""

    def __init__(self, results: Path) -> None:
        self.root, self.fallback = results, ROOT / "results"
        self.loaded = store.load(results)
        self.records = self.loaded.distinct()
        self.names = machine_names(self.loaded.machines())
        self.used: dict[tuple, Record] = {}

    def select(
        self,
        experiment: str,
        adapter: str | None = None,
        status: str | None = "ok",
        where: Callable[[Record], bool] | None = None,
        **fields: Any,
    ) -> list[Record]:
        """Records of an experiment that fit, as `store.select` understands the fields."""
        if adapter:
            fields["adapter"] = adapter
        if status:
            fields["status"] = status
        found = store.select(self.records, where, experiment=experiment, **fields)
        self.used |= {(r.machine_id, r.experiment, r.case_id): r for r in found}
        return found

    def machine(self, machine_id: str) -> str:
        """What a legend calls a machine."""
        return self.names.get(machine_id, machine_id)

    def physical_cores(self, record: Record) -> int | None:
        run = self.loaded.runs.get(record.run_id)
        return run.machine.get("physical_cores") if run else None

    def engine(self, record: Record) -> str:
        """What a legend calls an engine; GPU results carry the device's name."""
        device = record.metrics.get("device")
        return f"PyTorch, {device}" if device else ENGINES.get(record.adapter_name, record.adapter_name)

    def provenance(self) -> str:
        """Machines, commits and sample counts of the records handed out since the last call."""
        lines = []
        for machine in sorted({r.machine_id for r in self.used.values()}):
            mine = [r for r in self.used.values() if r.machine_id == machine]
            runs = [self.loaded.runs[r.run_id] for r in mine if r.run_id in self.loaded.runs]
            commits = sorted({_commit(run.machine) for run in runs})
            counts = sorted(len(r.samples_s) for r in mine if r.samples_s)
            samples = (
                f"{counts[0]} to {counts[-1]} samples a case, {sum(counts)} in all"
                if counts
                else "nothing timed"
            )
            lines.append(
                f"{self.machine(machine)} ({machine}): {len(mine)} cases, {samples}; commit "
                f"{', '.join(commits)}."
            )
        self.used = {}
        return "\n".join(lines)


def _commit(machine: dict[str, Any]) -> str:
    source = machine.get("source") or {}
    return (source.get("commit") or "unknown")[:10] + (" with changes" if source.get("dirty") else "")


def by(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records grouped by the values of keys (see `store.value`), in sorted order of the groups."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(_plain(store.value(record, key)) for key in keys), []).append(record)
    return dict(sorted(groups.items(), key=lambda item: tuple((v is None, str(type(v)), v) for v in item[0])))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def paired_ratio(numerator: Record, denominator: Record) -> Estimate:
    """Ratio of medians, over paired rounds where both were measured in the same ones."""
    together = numerator.run_id == denominator.run_id and denominator.case_id in numerator.interleaved_with
    function = stats.ratio if together or numerator is denominator else stats.unpaired_ratio
    return function(numerator.samples_s, denominator.samples_s)


def output_side(record: Record) -> int:
    """Side of the (square or cubic) output patch."""
    output = record.problem.get("output", 1)
    return output if isinstance(output, int) else output[-1]


def voxels(record: Record) -> int:
    """Voxels of the output patch: that of 2D nets is one voxel deep."""
    output, net = record.problem.get("output", 1), str(record.problem.get("net"))
    if isinstance(output, int):
        return output ** (2 if net.startswith(("2d", "scaling_2d")) else 3)
    return output[0] * output[1] * output[2]


def spinning_note(rows: Iterable[dict[str, Any]]) -> str:
    """What a caption says of measured rows whose records took no long turns (`turn_s`), else nothing."""
    machines = sorted({r["machine"] for r in rows if r.get("samples") and not r["turn_s"]})
    if not machines:
        return ""
    return (
        f"{' and '.join(machines)}: measured in turns of single rounds, during which the threads of PyTorch's turn may still "
        "spin; short rounds of the others suffer. "
    )
