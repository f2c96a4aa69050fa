"""Record files: `results/<machine-id>/<run-id>.jsonl`, appended line by line, each synced before the next
case starts.

Folders of several people merge by copying them together, because every run has a file of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import record as rec
from .record import Record, RecordError, Run


class StoreError(RuntimeError):
    """A record could not be written or a results folder could not be read."""


class RunWriter:
    """Appends lines to one run file. A line is either on disk whole or, after a failure, not in the file at
    all."""

    def __init__(self, root: str | Path, run: Run) -> None:
        self.path = Path(root) / run.machine_id / f"{run.run_id}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise StoreError(f"cannot create record file {self.path}: {error.strerror}") from None
        self.write(run)

    def write(self, item: Record | Run | str) -> None:
        """Append one line and sync it. Raises StoreError (disk full, ...) after removing what was written of
        it."""
        line = item if isinstance(item, str) else rec.to_line(item)
        data = line.encode() + b"\n"
        before = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise StoreError(
                f"cannot write to {self.path}: {error.strerror}; earlier records are safe"
            ) from None

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class Loaded:
    """Everything found under a results folder; `problems` are sentences about lines that had to be left
    out."""

    records: list[Record] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    ends: dict[str, dict] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def machines(self) -> dict[str, dict[str, Any]]:
        """The facts of every machine, by id, as its newest run has them."""
        return {run.machine_id: run.machine for run in sorted(self.runs.values(), key=lambda run: run.started)}

    def latest(self) -> list[Record]:
        """One record per machine, experiment and case: the newest good one, or the newest of any status."""
        chosen: dict[tuple, Record] = {}
        started = {run_id: run.started for run_id, run in self.runs.items()}
        order = sorted(self.records, key=lambda r: (r.status == "ok", started.get(r.run_id, ""), r.run_id))
        for record in order:
            chosen[(record.machine_id, record.experiment, record.case_id)] = record
        return sorted(chosen.values(), key=lambda r: (r.machine_id, r.experiment, r.run_id, r.case_id))

    def distinct(self) -> list[Record]:
        """`latest`, with one record where several protocols measured the same thing: the good one of the
        longest protocol."""
        chosen: dict[str, Record] = {}
        started = {run_id: run.started for run_id, run in self.runs.items()}
        rank = lambda r: (r.status == "ok", r.protocol.get("max_rounds", 0), started.get(r.run_id, ""))  # noqa: E731
        for record in sorted(self.latest(), key=rank):
            same = [record.machine_id, record.experiment, record.problem, record.adapter_name, record.options]
            chosen[json.dumps(same, sort_keys=True)] = record
        return sorted(chosen.values(), key=lambda r: (r.machine_id, r.experiment, r.run_id, r.case_id))


def load(root: str | Path) -> Loaded:
    """Read every run file below `root`; torn and foreign lines are reported in `problems`, never raised."""
    loaded = Loaded()
    for path in sorted(Path(root).glob("*/*.jsonl")):
        _load_file(path, loaded)
    return loaded


def find(where: str | Path, results: str | Path) -> Loaded:
    """What a run file holds, a results folder, or the run of this id below `results`. Raises StoreError."""
    path = Path(where)
    if path.is_dir():
        return load(path)
    if not path.is_file():
        runs = sorted(Path(results).glob(f"*/{where}*.jsonl"))
        if len(runs) != 1:
            raise StoreError(f"{where}: no such file or folder, and {len(runs)} runs of that id in {results}")
        path = runs[0]
    loaded = Loaded()
    _load_file(path, loaded)
    return loaded


def _load_file(path: Path, loaded: Loaded) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        loaded.problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    torn = lines.pop()
    if torn:
        loaded.problems.append(f"{path}: the last line is torn ({len(torn)} bytes) and was ignored")
    machine_id = path.parent.name
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = rec.from_line(line.decode(errors="replace"))
        except RecordError as error:
            loaded.problems.append(f"{path}:{number}: {error}")
            continue
        if isinstance(item, Record):
            loaded.records.append(replace(item, machine_id=machine_id))
        elif isinstance(item, Run):
            loaded.runs[item.run_id] = replace(item, machine_id=machine_id)
        else:
            loaded.ends[item["run_id"]] = item


def select(
    records: Iterable[Record], where: Callable[[Record], bool] | None = None, **fields: Any
) -> list[Record]:
    """Records that fit: keywords name Record fields, else keys of problem, else of adapter options."""
    return [
        r
        for r in records
        if all(value(r, key) == want for key, want in fields.items()) and (where is None or where(r))
    ]


def value(record: Record, key: str) -> Any:
    """Look `key` up in the record, its problem, its adapter options and its metrics, in this order; None if
    nowhere."""
    if key == "adapter":
        return record.adapter_name
    if hasattr(record, key):
        return getattr(record, key)
    for table in (record.problem, record.options, record.metrics):
        if key in table:
            return table[key]
    return None
