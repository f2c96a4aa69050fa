"""Augmentation: flips, transpositions, elastic deformation and jitter of the intensity, drawn per patch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from znn.errors import DataError

_SPACING = (8, 32, 32)  # voxels from one control point of a deformation to the next, z, y, x


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a patch: flip along z, y and x, exchange y and x, deform it, and change the intensity.

    Flips and the transposition together give all eight rotations and reflections of a section. `intensity` is
    the deviation of a random factor and offset (images have unit deviation); 0 leaves intensities alone.
    `elastic` is the deviation, in voxels, of the displacement of a smooth random deformation within sections
    (see `Deformation`); 0 leaves shapes alone. Raises DataError for negative or infinite amounts.
    """

    flip: tuple[bool, bool, bool] = (True, True, True)
    transpose: bool = True
    intensity: float = 0.1
    elastic: float = 0.0

    def __post_init__(self) -> None:
        for name in ("intensity", "elastic"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"augmentation: {name} is {value}; expected a number from 0")

    @property
    def margin(self) -> int:
        """Voxels of y and x that a patch may be deformed by, rounded up."""
        return Deformation(0, self.elastic).margin

    def draw(self, rng: np.random.Generator) -> Variant:
        """One random variant. Draws the same number of values whatever is switched on."""
        coins, jitter, seed = rng.random(4) < 0.5, rng.standard_normal(2), int(rng.integers(2**63))
        flip = tuple(bool(allowed and coin) for allowed, coin in zip(self.flip, coins))
        return Variant(
            flip,
            bool(self.transpose and coins[3]),
            float(1 + self.intensity * jitter[0]),
            float(self.intensity * jitter[1]),
            Deformation(seed, self.elastic) if self.elastic else None,
        )


NONE = Augmentation((False, False, False), False, 0.0)


@dataclass(frozen=True)
class Variant:
    """One way to change a patch: first the exchange of y and x, then the flips, then the deformation; factor
    and offset of intensity.
    """

    flip: tuple[bool, bool, bool]
    transpose: bool
    factor: float
    offset: float
    deformation: Deformation | None = None

    def move(self, array: np.ndarray) -> np.ndarray:
        """Apply the exchange of axes and the flips to the last three axes."""
        if self.transpose:
            array = np.swapaxes(array, -1, -2)
        axes = tuple(axis for axis, flipped in zip((-3, -2, -1), self.flip) if flipped)
        return np.flip(array, axes) if axes else array

    def shade(self, image: np.ndarray) -> np.ndarray:
        """Apply factor and offset to an image patch."""
        return image * np.float32(self.factor) + np.float32(self.offset)

    @property
    def margin(self) -> int:
        """Voxels of y and x that a deformed patch needs around it."""
        return 0 if self.deformation is None else self.deformation.margin


@dataclass(frozen=True)
class Deformation:
    """A smooth random displacement of voxels within their sections, determined by its seed.

    The displacement is a tensor product of cubic B-splines over control points 8 sections and 32 voxels apart,
    with independent normal coefficients (free-form deformation, Rueckert et al. 1999; as augmentation, Simard
    et al. 2003), scaled to a deviation of `voxels` and cut at three times that. z stays, for in serial
    sections neighbours are far apart.
    """

    seed: int
    voxels: float

    @property
    def margin(self) -> int:
        """The largest displacement, rounded up."""
        return math.ceil(3 * self.voxels)

    @lru_cache(maxsize=8)  # image and labels of a patch are deformed one after the other
    def displacement(self, extent: tuple[int, int, int]) -> np.ndarray:
        """float32 (2, z, y, x), read-only: where each voxel of an extent gets its value from in y and x, relative to
        itself.
        """
        points = [(n - 1) // spacing + 4 for n, spacing in zip(extent, _SPACING)]
        field = np.random.default_rng(self.seed).standard_normal((2, *points), dtype=np.float32)
        for axis, (n, spacing) in enumerate(zip(extent, _SPACING), 1):
            first, weights = _splines(n, spacing)
            shape = (-1,) + (1,) * (3 - axis)
            # Sums of four slices: a product of matrices would wake BLAS's threads, which are in the engine's way.
            field = sum(field.take(first + i, axis) * weight.reshape(shape) for i, weight in enumerate(weights))
        limit = np.float32(3 * self.voxels)
        field = np.clip(field * np.float32(self.voxels), -limit, limit)
        field.setflags(write=False)
        return field


def _splines(count: int, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `count` voxels the first of its four control points, and (4, count) their cubic B-spline weights, of
    unit Euclidean norm, so that a sum of unit normal coefficients has unit deviation everywhere."""
    first, within = np.divmod(np.arange(count), spacing)
    t = within / spacing
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    return first, (weights / np.sqrt(np.square(weights).sum(0))).astype(np.float32)


def deform_image(image: np.ndarray, displacement: np.ndarray, margin: int) -> np.ndarray:
    """Bilinear values of `image` (maps, z, y + 2 margin, x + 2 margin) at the voxels moved by `displacement`
    (2, z, y, x); float32 (maps, z, y, x)."""
    y, x = _positions(displacement, margin)
    low_y, low_x = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    part_y, part_x = (y - low_y).astype(np.float32), (x - low_x).astype(np.float32)
    rows, columns = image.shape[-2:]
    section = np.arange(image.shape[-3])[:, None, None] * (rows * columns)
    corner = section + np.minimum(low_y, rows - 2) * columns + np.minimum(low_x, columns - 2)
    part_y, part_x = part_y + (low_y > rows - 2), part_x + (low_x > columns - 2)
    flat = image.reshape(image.shape[0], -1)
    upper = flat.take(corner, 1) * (1 - part_x) + flat.take(corner + 1, 1) * part_x
    lower = flat.take(corner + columns, 1) * (1 - part_x) + flat.take(corner + columns + 1, 1) * part_x
    return upper * (1 - part_y) + lower * part_y


def deform_labels(labels: np.ndarray, displacement: np.ndarray, margin: int) -> np.ndarray:
    """The nearest label: as `deform_image`, for labels (z, y + 2 margin, x + 2 margin) of any type."""
    y, x = (np.rint(position).astype(np.intp) for position in _positions(displacement, margin))
    return labels[np.arange(labels.shape[0])[:, None, None], y, x]


def _positions(displacement: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = displacement.shape[-2:]
    return displacement[0] + np.arange(margin, margin + rows)[:, None], displacement[1] + np.arange(margin, margin + columns)
