"""How a group of cases is measured: warm-ups, interleaved rounds in a seeded random order, and when to
stop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import stats


@dataclass(frozen=True)
class Protocol:
    """Measure until the interval of every median is within `spread` of it, between `min_rounds` and
    `max_rounds`.

    `max_s` caps the timed seconds of a case, `timeout_s` all seconds of a case with its set-up and check.
    `interleave` names the axes whose values are measured together, round by round. Where a lap is shorter than
    `turn_s`, a case's turn in a round is so long, and its sample the mean of the laps in it. Rounds wait until no case finds
    the machine disturbed (`Session.disturbed`), `patience_s` at most for all rounds of a group together.
    """

    warmups: int = 3
    min_rounds: int = 7
    max_rounds: int = 31
    spread: float = 0.03
    max_s: float = 30.0
    timeout_s: float = 900.0
    interleave: tuple[str, ...] = ()
    seed: int = 1510
    timer: str = "perf_counter"
    turn_s: float = 0.0
    patience_s: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Protocol:
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"protocol: unknown setting {', '.join(sorted(unknown))}")
        values = dict(data)
        if "interleave" in values:
            values["interleave"] = tuple(values["interleave"])
        protocol = cls(**values)
        if not 1 <= protocol.min_rounds <= protocol.max_rounds:
            raise ValueError(
                f"protocol: min_rounds {protocol.min_rounds} must be from 1 to max_rounds "
                f"{protocol.max_rounds}"
            )
        return protocol

    def to_dict(self) -> dict[str, Any]:
        """As records and case ids hold it: without turns or patience it is the same as before there were any."""
        found = asdict(self) | {"interleave": list(self.interleave)}
        return {key: value for key, value in found.items() if value or key not in ("turn_s", "patience_s")}

    def orders(self, cases: int) -> Iterator[list[int]]:
        """The order in which the cases run in round 0, 1, ...: a fresh seeded shuffle each, so no case always
        follows another."""
        rng = random.Random(self.seed)
        while True:
            order = list(range(cases))
            rng.shuffle(order)
            yield order

    def enough(self, samples: Sequence[Sequence[float]]) -> bool:
        """Whether the group is measured well enough; all its cases have the same number of rounds."""
        rounds = len(samples[0])
        if rounds >= self.max_rounds or max(map(sum, samples), default=0.0) >= self.max_s:
            return True
        return rounds >= self.min_rounds and all(stats.median(s).spread <= self.spread for s in samples)
