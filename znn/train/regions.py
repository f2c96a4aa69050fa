"""Boxes of a volume: what is held out of a training, and where its patches may still lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from znn.errors import DataError

_REGION = re.compile(r"(?:(\d+)@)?" + ",".join([r"\s*(\d*)\s*:\s*(\d*)\s*"] * 3))
SYNTAX = "expected three ranges of voxels z,y,x such as 24:30,0:256,: (with several volumes 2@24:30,0:256,: for the second)"

Extent = tuple[int, int, int]


@dataclass(frozen=True)
class Region:
    """The voxels `start` <= (z, y, x) < `stop` of a volume."""

    start: Extent
    stop: Extent

    @classmethod
    def whole(cls, extent: Sequence[int]) -> Region:
        """All voxels of an extent."""
        return cls((0, 0, 0), tuple(extent))

    @property
    def extent(self) -> Extent:
        return tuple(b - a for a, b in zip(self.start, self.stop))

    @property
    def voxels(self) -> int:
        z, y, x = (max(0, n) for n in self.extent)
        return z * y * x

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop))

    def moved(self, offset: Sequence[int]) -> Region:
        """The same box, `offset` further on."""
        return Region(*(tuple(n + d for n, d in zip(end, offset)) for end in (self.start, self.stop)))

    def within(self, other: Region) -> Region:
        """What both share; a box of no voxels where they share nothing."""
        return Region(tuple(map(max, self.start, other.start)), tuple(map(min, self.stop, other.stop)))

    def without(self, other: Region) -> list[Region]:
        """Disjoint boxes that hold what `other` leaves of this one: first those before and after it in z, then in y
        and x."""
        if not self.within(other).voxels:
            return [self]
        parts, start, stop = [], list(self.start), list(self.stop)
        for axis in range(3):
            for a, b in ((start[axis], other.start[axis]), (other.stop[axis], stop[axis])):
                if a < b:
                    low, high = list(start), list(stop)
                    low[axis], high[axis] = a, b
                    parts.append(Region(tuple(low), tuple(high)))
            start[axis] = max(start[axis], other.start[axis])
            stop[axis] = min(stop[axis], other.stop[axis])
        return parts


def remainder(region: Region, taken: Iterable[Region]) -> list[Region]:
    """Disjoint boxes that hold what all of `taken` leave of `region`."""
    parts = [region]
    for other in taken:
        parts = [rest for part in parts for rest in part.without(other)]
    return parts


def check_syntax(texts: Iterable[str]) -> None:
    """Raises DataError for the first text that is no region (see `parse_regions`)."""
    for text in texts:
        if not isinstance(text, str) or not _REGION.fullmatch(text):
            raise DataError(f"validation region {text!r}: {SYNTAX}")


def parse_regions(texts: Sequence[str], volumes: Sequence[tuple[str, Extent]]) -> list[list[Region]]:
    """The regions of each volume that `texts` name, where `volumes` are their names and extents.

    A text is `z0:z1,y0:y1,x0:x1` in voxels from 0, the second number of each range not included; a number left out
    is the volume's border. Before it stands `N@` for the Nth volume, from 1, which may be left out where there is but one.
    Raises DataError for another syntax, a volume that does not exist, regions that are empty or reach beyond their
    volume, and regions of one volume that overlap.
    """
    check_syntax(texts)
    found: list[list[Region]] = [[] for _ in volumes]
    for text in texts:
        number, *numbers = _REGION.fullmatch(text).groups()
        index = _volume(text, number, len(volumes))
        name, extent = volumes[index]
        start = tuple(int(a or 0) for a in numbers[::2])
        stop = tuple(int(b) if b else n for b, n in zip(numbers[1::2], extent))
        region = Region(start, stop)
        for axis, a, b, n in zip("zyx", start, stop, extent):
            if b > n or a >= n:
                raise DataError(f"validation region {text!r}: {axis} is {a}:{b}, but {name} has {n} voxels along it")
            if a >= b:
                raise DataError(f"validation region {text!r} is empty: {axis} is {a}:{b}")
        for other in found[index]:
            if region.within(other).voxels:
                raise DataError(f"validation region {text!r} overlaps {other} of {name}; give disjoint regions")
        found[index].append(region)
    return found


def _volume(text: str, number: str | None, count: int) -> int:
    if number is None and count > 1:
        raise DataError(f"validation region {text!r}: which of the {count} volumes? Write 1@{text} to {count}@{text}")
    index = int(number or 1) - 1
    if not 0 <= index < count:
        raise DataError(
            f"validation region {text!r}: there is no volume {number}; expected "
            + ("1, for one volume is given" if count == 1 else f"1 to {count}")
        )
    return index
