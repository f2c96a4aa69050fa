"""The record of one measured case: raw samples and their context, one JSON line each; nothing derived is
stored.

A run file starts with a `Run` line (the machine and the settings), then holds one `Record` line per case,
then an end line.
Lines of an older schema are brought up to date by `UPGRADES`, one function per schema step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 2
STATUSES = ("ok", "failed", "skipped", "timeout", "oom")


class RecordError(ValueError):
    """A line is no record, or is one of a schema this version cannot read."""


@dataclass(frozen=True)
class Record:
    """One case. Times in seconds, memory in bytes, `flop` counted by the cost model for one round.

    `interleaved_with` lists the case ids measured in the same interleaved rounds: sample i of each belongs to
    one round.
    `metrics` holds what the adapter counted (transforms, seconds in locks) or computed; its keys are the
    adapter's.
    """

    experiment: str
    case_id: str
    problem: dict[str, Any]
    adapter: dict[str, Any]
    protocol: dict[str, Any]
    status: str
    run_id: str
    command: str
    reason: str = ""
    plan: str = ""
    check: dict[str, Any] | None = None
    samples_s: list[float] = field(default_factory=list)
    warmups_s: list[float] = field(default_factory=list)
    interleaved_with: list[str] = field(default_factory=list)
    peak_rss_bytes: int | None = None
    predicted_bytes: int | None = None
    flop: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    machine_id: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise RecordError(
                f"record {self.case_id}: status {self.status!r} is not one of {', '.join(STATUSES)}"
            )

    @property
    def options(self) -> dict[str, Any]:
        return self.adapter.get("options", {})

    @property
    def adapter_name(self) -> str:
        return self.adapter["name"]


@dataclass(frozen=True)
class Run:
    """What holds for every case of a run file: the machine, the settings and the warnings."""

    run_id: str
    machine_id: str
    started: str
    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def case_id(problem: dict, adapter_name: str, options: dict, protocol: dict) -> str:
    """Twelve hexadecimal digits that name a case: the hash of problem, adapter, options and protocol, in any
    key order."""
    text = json.dumps([problem, adapter_name, options, protocol], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_line(item: Record | Run) -> str:
    """The JSON line of a record or run, without the newline."""
    kind = "case" if isinstance(item, Record) else "run"
    return json.dumps({"kind": kind, "schema": SCHEMA} | dataclasses.asdict(item), separators=(",", ":"))


def end_line(run_id: str, **facts: Any) -> str:
    """The line that closes a run: seconds by stage and whether it was interrupted."""
    return json.dumps({"kind": "end", "schema": SCHEMA, "run_id": run_id} | facts, separators=(",", ":"))


def from_line(text: str) -> Record | Run | dict:
    """A line of any known schema as a `Record`, a `Run`, or (end line) a dict. Raises RecordError."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"not a JSON line ({error.msg} at column {error.colno})") from None
    if not isinstance(data, dict):
        raise RecordError("a line must hold a JSON object")
    schema = data.get("schema", 1)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise RecordError(f"schema {schema!r} is unknown: this version reads schemas 1 to {SCHEMA}")
    for step in range(schema, SCHEMA):
        data = UPGRADES[step](data)
    kind = data.pop("kind", None)
    data.pop("schema", None)
    if kind == "end":
        return data
    if kind not in ("case", "run"):
        raise RecordError(f"kind {kind!r} is not one of case, run, end")
    cls = Record if kind == "case" else Run
    try:
        return cls(**data)
    except TypeError as error:
        raise RecordError(f"{kind} line does not fit schema {SCHEMA}: {error}") from None


def _upgrade_1(data: dict) -> dict:
    """Schema 1 had no `kind`, no experiment and no metrics; `interleaved` in the protocol was only a
    switch."""
    data = dict(data)
    if "case_id" in data:
        data.setdefault("kind", "case")
        data.setdefault("experiment", data["problem"].get("net", "unknown"))
    elif "machine" in data:
        data.setdefault("kind", "run")
    return data


UPGRADES = {1: _upgrade_1}
