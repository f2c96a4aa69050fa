"""Whether two runs of the same cases on one machine agree within their stated intervals.

For every case that both runs hold, the ratio of its medians (second over first) has a bootstrap interval with a
coverage of at least 95 %: where nothing has changed, 1 lies outside it in at most 5 % of the cases on average, and
by chance in no more than a binomial bound allows. Seconds are compared after the drift of the machine as a whole (the median ratio over all
cases) is taken out, and the drift itself must be small; and as the rounds of one process cannot know how processes
differ (where memory lies, what else ran just then), an allowance is made for that. Ratios of cases that were measured in turns, which is what
figures and claims are made of, are compared as they are: drift is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import stats
from .record import Record
from .stats import Estimate

CHANCE = 0.05  # of a ratio's interval to miss 1 where nothing has changed
SURE = 0.99  # so sure must one be that more were missed than chance explains
ALLOWANCE = 1.05  # for the difference between processes, in seconds only
MAX_DRIFT = 0.1  # of the machine between the runs
LEAST_FOR_DRIFT = 8  # cases; of fewer, drift cannot be told from a change

Pair = tuple[Record, Record]


class Row(NamedTuple):
    """A number in both runs (seconds, or a ratio of seconds) and its change."""

    what: str
    first: float
    second: float
    change: Estimate
    allowance: float = 1.0  # by this factor the interval is widened on both sides

    @property
    def agrees(self) -> bool:
        return self.change.low / self.allowance <= 1 <= self.change.high * self.allowance

    def strictly(self) -> Row:
        """The same without an allowance."""
        return self._replace(allowance=1.0)


@dataclass(frozen=True)
class Agreement:
    """seconds and ratios: a row for each case and for each pair of cases measured in turns."""

    seconds: list[Row]
    ratios: list[Row]
    drift: Estimate

    @property
    def sound(self) -> bool:
        """Whether the runs agree: few enough rows miss, and the machine drifted little."""
        return bool(self.seconds) and abs(math.log(self.drift.value)) <= math.log1p(MAX_DRIFT) and all(
            missed(rows) <= allowed(len(rows)) for rows in (self.seconds, self.ratios)
        )


def agreement(first: Sequence[Record], second: Sequence[Record]) -> Agreement:
    """Compare the timed cases that both hold on the same machine."""
    tables = [
        {(r.machine_id, r.experiment, r.case_id): r for r in records if r.status == "ok" and r.samples_s}
        for records in (first, second)
    ]
    pairs = {key: (tables[0][key], tables[1][key]) for key in sorted(set(tables[0]) & set(tables[1]))}
    changes = {key: stats.unpaired_ratio(b.samples_s, a.samples_s) for key, (a, b) in pairs.items()}
    drift = Estimate(1.0, 1.0, 1.0)
    if len(changes) >= LEAST_FOR_DRIFT:
        drift = stats.median([change.value for change in changes.values()])
    seconds = [
        Row(_label(a), _median(a), _median(b), _over(changes[key], drift.value), ALLOWANCE)
        for key, (a, b) in pairs.items()
    ]
    return Agreement(seconds, _ratios(pairs), drift)


def missed(rows: Sequence[Row]) -> int:
    return sum(not row.agrees for row in rows)


def allowed(count: int) -> int:
    """How many of so many intervals may miss before chance no longer explains it."""
    total, k = 0.0, -1
    while total < SURE:
        k += 1
        total += math.comb(count, k) * CHANCE**k * (1 - CHANCE) ** (count - k)
    return k


def _ratios(pairs: dict[tuple, Pair]) -> list[Row]:
    """Every case over the first (by its id) of those measured in turns with it in both runs."""
    rows = []
    for (machine, experiment, case), pair in pairs.items():
        together = set(pair[0].interleaved_with) & set(pair[1].interleaved_with)
        base = min((c for c in together if (machine, experiment, c) in pairs), default=case)
        if base < case:
            rows.append(_ratio_row(pair, pairs[machine, experiment, base]))
    return rows


def _ratio_row(pair: Pair, base: Pair) -> Row:
    values, draws = [], []
    for run, (top, bottom) in enumerate(zip(pair, base)):
        n = min(len(top.samples_s), len(bottom.samples_s))
        x, y = np.array(top.samples_s[:n]), np.array(bottom.samples_s[:n])
        rounds = np.random.default_rng(stats.SEED + run).integers(0, n, (stats.RESAMPLES, n))
        values.append(np.median(x) / np.median(y))
        draws.append(np.median(x[rounds], axis=1) / np.median(y[rounds], axis=1))
    change = stats.from_bootstrap(values[1] / values[0], draws[1] / draws[0])
    return Row(f"{_label(pair[0])} over {_differing(pair[0], base[0])}", *map(float, values), change)


def _median(record: Record) -> float:
    return stats.median(record.samples_s).value


def _over(e: Estimate, factor: float) -> Estimate:
    return Estimate(e.value / factor, e.low / factor, e.high / factor, e.coverage)


def _label(record: Record) -> str:
    return f"{record.experiment} {_described(record.problem | {'by': record.adapter_name} | record.options)}"


def _differing(record: Record, base: Record) -> str:
    """What tells `base` from `record`, in the words of its options."""
    mine, other = ({"by": r.adapter_name} | r.problem | r.options for r in (record, base))
    return _described({key: value for key, value in other.items() if mine.get(key) != value})


def _described(table: dict) -> str:
    return " ".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in table.items())


def to_text(found: Agreement, every: bool = False) -> str:
    """The table (rows that disagree, or every row) and the summary."""
    lines = []
    for title, rows in (("seconds", found.seconds), ("ratios", found.ratios)):
        for row in sorted(rows, key=lambda row: row.agrees):
            if every or not row.agrees:
                lines.append(
                    f"{'agrees ' if row.agrees else 'DIFFERS'} {row.change.value:6.3f} "
                    f"({row.change.low:.3f} to {row.change.high:.3f})  {row.first:.4g} {row.second:.4g}  {row.what}"
                )
        if rows:
            lines.append(
                f"{title}: {len(rows) - missed(rows)} of {len(rows)} agree within their 95 % intervals "
                f"({1 - missed(rows) / len(rows):.0%}; expected {1 - CHANCE:.0%} or more, at least "
                f"{len(rows) - allowed(len(rows))} with {SURE:.0%} certainty)"
            )
        if title == "seconds" and rows:
            strict = sum(row.strictly().agrees for row in rows)
            lines[-1] += f", widened by {ALLOWANCE - 1:.0%} for the difference between processes; {strict} without that"
    drift = found.drift
    lines.append(
        f"drift of the machine, second run over first: {drift.value:.3f} ({drift.low:.3f} to {drift.high:.3f}), "
        f"taken out of the seconds; at most {1 + MAX_DRIFT:g} counts as the same machine"
    )
    lines.append("the runs agree" if found.sound else "the runs do not agree" if found.seconds else "no common case")
    return "\n".join(lines)
