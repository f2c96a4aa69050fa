"""Sweeps as data: one TOML file per experiment, expanded here and nowhere else into a list of cases.

[experiment]  name, title, adapter (one name or a list), kind
[protocol]    see znn.bench.protocol
[grid]        axis = value or list of values; the axes of `problem.AXES` describe the problem, all others are
adapter options
[[tied]]      lists of equal length that advance together; several tables are alternatives (their union)
[[exclude]]   axis = value or list: cases that agree with every entry are left out
[[only]]      the converse: an adapter listed here keeps only its cases that agree with the other entries
[tiers.X]     grid entries that replace those above in tier X; `protocol`, `tied` and `skip = true` are
understood too
[claims.CN]   thresholds the claims report applies to this experiment's records
[[asked]]     axis = value, and what is asked of such cases beside a competitor (see `znn.bench.whole_nets`)
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import record as rec
from .problem import AXES
from .protocol import Protocol

TIERS = ("smoke", "quick", "paper")


class SweepError(ValueError):
    """A sweep file is wrong; the sentence names file and key."""


@dataclass(frozen=True)
class Case:
    """One thing to measure. `group` is shared by the cases measured in interleaved rounds."""

    experiment: str
    problem: dict[str, Any]
    adapter: str
    options: dict[str, Any]
    protocol: Protocol
    case_id: str = field(init=False)
    group: str = field(init=False)

    def __post_init__(self) -> None:
        protocol = self.protocol.to_dict()
        object.__setattr__(self, "case_id", rec.case_id(self.problem, self.adapter, self.options, protocol))
        mixed = self.protocol.interleave
        keep = [{k: v for k, v in table.items() if k not in mixed} for table in (self.problem, self.options)]
        if (
            "adapter" in mixed
        ):  # competitors share a group when they solve the same problem on as many threads
            keep[1] = {k: v for k, v in keep[1].items() if k == "threads"}
        name = "" if "adapter" in mixed else self.adapter
        object.__setattr__(self, "group", rec.case_id(keep[0], name, keep[1], protocol))

    @property
    def label(self) -> str:
        parts = [str(self.problem.get("net") or self.problem.get("network"))]
        parts += [
            f"{k}={_short(v)}"
            for k, v in (self.problem | self.options).items()
            if k not in ("net", "network")
        ]
        return f"{self.experiment}/{self.adapter} " + " ".join(parts)


@dataclass(frozen=True)
class Sweep:
    """A sweep file as it was read."""

    name: str
    title: str
    path: Path
    data: dict[str, Any]

    @property
    def claims(self) -> dict[str, dict]:
        return self.data.get("claims", {})


def load(path: str | Path) -> Sweep:
    """Read and check a sweep file. Raises SweepError."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SweepError(f"{path}: {error}") from None
    unknown = set(data) - {"experiment", "protocol", "grid", "tied", "exclude", "only", "tiers", "claims", "asked"}
    if unknown:
        raise SweepError(f"{path}: unknown table [{sorted(unknown)[0]}]")
    head = data.get("experiment", {})
    for key in ("name", "title", "adapter"):
        if key not in head:
            raise SweepError(f"{path}: [experiment] needs `{key}`")
    for tier in data.get("tiers", {}):
        if tier not in TIERS:
            raise SweepError(f"{path}: tier {tier!r} is not one of {', '.join(TIERS)}")
    return Sweep(head["name"], head["title"], path, data)


def load_all(folder: str | Path) -> list[Sweep]:
    """Every sweep of a folder, in the order of file names."""
    return [load(path) for path in sorted(Path(folder).glob("*.toml"))]


def expand(
    sweep: Sweep,
    tier: str,
    cores: tuple[int, int],
    overrides: dict[str, Any] | None = None,
    adapters: Iterable[str] | None = None,
) -> list[Case]:
    """The cases of a sweep in a tier.

    cores: (physical, hardware threads) that may be used; `threads` may say "all", "physical", "powers" or
    "ends".
    overrides: axis values from the command line that replace the file's. adapters: keep only these.
    """
    data = sweep.data
    tier_data = dict(data.get("tiers", {}).get(tier, {}))
    if tier_data.pop("skip", False):
        return []
    protocol = Protocol.from_dict(data.get("protocol", {}) | tier_data.pop("protocol", {}))
    tied = tier_data.pop("tied", data.get("tied", [{}]))
    grid = {"adapter": data["experiment"]["adapter"]} | data.get("grid", {}) | tier_data | (overrides or {})
    cases: dict[str, Case] = {}
    for table in tied:
        free = {k: v for k, v in grid.items() if k not in table or k in (overrides or {})}
        bound = {k: v for k, v in table.items() if k not in (overrides or {})}
        for point in _points(sweep, free, bound, cores):
            if not _kept(point, data) or (adapters is not None and point["adapter"] not in adapters):
                continue
            case = _case(sweep.name, point, protocol)
            cases.setdefault(case.case_id, case)
    return list(cases.values())


def _points(sweep: Sweep, free: dict, bound: dict, cores: tuple[int, int]) -> Iterable[dict]:
    lengths = {len(v) for v in bound.values() if isinstance(v, list)}
    if len(lengths) > 1:
        raise SweepError(f"{sweep.path}: tied lists {', '.join(bound)} differ in length: {sorted(lengths)}")
    rows = lengths.pop() if lengths else 1
    values = {k: threads_of(v, cores) if k == "threads" else _as_list(v) for k, v in free.items()}
    for row in range(rows):
        fixed = {k: v[row] if isinstance(v, list) else v for k, v in bound.items()}
        counts = threads_of(fixed.pop("threads"), cores) if "threads" in fixed else []
        table = values | ({"threads": counts} if counts else {})
        for combination in itertools.product(*table.values()):
            yield dict(zip(table, combination)) | fixed


def threads_of(value: Any, cores: tuple[int, int]) -> list[int]:
    """Thread counts: a number, a list of them, or a word that stands for counts of this machine."""
    physical, hardware = cores
    words = {
        "all": range(1, hardware + 1),
        "physical": [physical],
        "ends": sorted({1, physical}),
        "powers": sorted(
            {2**i for i in range(hardware.bit_length()) if 2**i <= hardware} | {1, physical, hardware}
        ),
    }
    counts: list[int] = []
    for item in _as_list(value):
        if isinstance(item, str) and item not in words:
            raise SweepError(f"threads {item!r} is neither a number nor one of {', '.join(words)}")
        counts += words[item] if isinstance(item, str) else [int(item)]
    return sorted(set(counts))


def _kept(point: dict, data: dict) -> bool:
    if any(_agrees(point, rule) for rule in data.get("exclude", [])):
        return False
    mine = [rule for rule in data.get("only", []) if point["adapter"] in _as_list(rule["adapter"])]
    return not mine or any(_agrees(point, rule) for rule in mine)


def _agrees(point: dict, rule: dict) -> bool:
    return all(point.get(k) == v or (isinstance(v, list) and point.get(k) in v) for k, v in rule.items())


def _case(experiment: str, point: dict, protocol: Protocol) -> Case:
    point = dict(point)
    adapter = point.pop("adapter")
    # A sweep may name the phase that is meant anyway; it is the same case.
    problem = {k: v for k, v in point.items() if k in AXES and (k, v) != ("phase", "round")}
    options = {k: v for k, v in point.items() if k not in AXES}
    if adapter.startswith("torch"):  # our scheduler's switches mean nothing to a competitor
        options = {k: v for k, v in options.items() if k == "threads"}
    if adapter == "torch_gpu":
        options = {}
    return Case(experiment, problem, adapter, options, protocol)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
