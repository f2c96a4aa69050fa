"""Augmentation: flips, transpositions and jitter of the intensity, drawn per patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a patch: flip along z, y and x, exchange y and x, and change the intensity.

    Flips and the transposition together give all eight rotations and reflections of a section. `intensity` is
    the deviation of a random factor and offset (images have unit deviation); 0 leaves intensities alone.
    """

    flip: tuple[bool, bool, bool] = (True, True, True)
    transpose: bool = True
    intensity: float = 0.1

    def draw(self, rng: np.random.Generator) -> Variant:
        """One random variant. Draws the same number of values whatever is switched on."""
        coins, jitter = rng.random(4) < 0.5, rng.standard_normal(2)
        flip = tuple(bool(allowed and coin) for allowed, coin in zip(self.flip, coins))
        return Variant(
            flip,
            bool(self.transpose and coins[3]),
            float(1 + self.intensity * jitter[0]),
            float(self.intensity * jitter[1]),
        )


NONE = Augmentation((False, False, False), False, 0.0)


@dataclass(frozen=True)
class Variant:
    """One way to change a patch: first the exchange of y and x, then the flips; factor and offset of
    intensity.
    """

    flip: tuple[bool, bool, bool]
    transpose: bool
    factor: float
    offset: float

    def move(self, array: np.ndarray) -> np.ndarray:
        """Apply the geometry to the last three axes."""
        if self.transpose:
            array = np.swapaxes(array, -1, -2)
        axes = tuple(axis for axis, flipped in zip((-3, -2, -1), self.flip) if flipped)
        return np.flip(array, axes) if axes else array

    def image(self, image: np.ndarray) -> np.ndarray:
        """Apply geometry and intensity to an image patch (maps, z, y, x)."""
        return self.move(image) * np.float32(self.factor) + np.float32(self.offset)
