"""A synthetic volume of cells, so that everything runs without data.

Cells are the Voronoi regions of random points in a warped space, hence with bent membranes; the image
imitates electron microscopy of tissue: dark membranes of uneven contrast, cytoplasm of uneven brightness and
texture, dark round organelles inside cells as distractors, blur and noise. Sections are thick, so neighbours
correlate only in part.
"""

from __future__ import annotations

import numpy as np

from znn.errors import DataError


def cell_volume(
    extent: tuple[int, int, int] = (24, 256, 256), seed: int = 0, cell: float = 40.0
) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 and labels uint16, both (z, y, x); the same arguments give the same volume.

    Labels number the cells from 1; 0 is membrane. `cell` is the mean diameter of a cell in voxels within a
    section; a section is as thick as five voxels are wide. Raises DataError for a seed or extent out of
    range.
    """
    if min(extent) < 1 or cell < 4 or seed < 0:
        raise DataError(
            f"synthetic volume: extent {extent}, cell {cell}, seed {seed}; expected positive extents, "
            "a cell diameter of at least 4 and a seed from 0"
        )
    rng = np.random.default_rng(seed)
    thickness = 5.0
    size = np.array([extent[0] * thickness, extent[1], extent[2]], np.float32)
    points = _spread_points(rng, size, cell)
    warp = [_smooth_noise(rng, extent, cell) * (cell / 8) for _ in range(2)]
    labels = np.empty(extent, np.uint16)
    membrane = np.empty(extent, np.float32)
    for z in range(extent[0]):
        labels[z], membrane[z] = _section(points, z * thickness, cell, warp[0][z], warp[1][z])
    image = _render(rng, labels, membrane, cell)
    labels[membrane < 1.8] = 0
    return image, labels


def _spread_points(rng, size: np.ndarray, cell: float) -> np.ndarray:
    """One random point in every cube of side `cell`, reaching beyond the borders."""
    counts = np.ceil(size / cell).astype(int) + 2
    corners = np.stack(np.meshgrid(*(np.arange(n) - 1 for n in counts), indexing="ij"), -1).reshape(-1, 3)
    return ((corners + rng.random(corners.shape)) * cell).astype(np.float32)


def _section(points: np.ndarray, z: float, cell: float, warp_y: np.ndarray, warp_x: np.ndarray):
    """Cell of every voxel (from 1) and its distance to the membrane, the plane halfway to the next cell's
    point.
    """
    shape = warp_y.shape
    y = np.arange(shape[0], dtype=np.float32)[:, None] + warp_y
    x = np.arange(shape[1], dtype=np.float32) + warp_x
    nearest, second = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    label, other = np.zeros(shape, np.intp), np.zeros(shape, np.intp)
    # With a point in every cube of side `cell`, the nearest two are hardly ever further than two sides away.
    reach = 2 * cell
    for index in np.flatnonzero(np.abs(points[:, 0] - z) < reach):
        point = points[index]
        box = tuple(slice(max(0, int(centre - reach)), max(0, int(centre + reach))) for centre in point[1:])
        distance = (point[0] - z) ** 2 + np.square(y[box] - point[1]) + np.square(x[box] - point[2])
        first, runner_up = distance < nearest[box], distance < second[box]
        other[box] = np.where(first, label[box], np.where(runner_up, index, other[box]))
        second[box] = np.where(first, nearest[box], np.where(runner_up, distance, second[box]))
        label[box] = np.where(first, index, label[box])
        nearest[box] = np.where(first, distance, nearest[box])
    between = np.linalg.norm(points[label] - points[other], axis=-1)
    return (label + 1).astype(np.uint16), (second - nearest) / (2 * np.maximum(between, 1e-3))


def _render(rng, labels: np.ndarray, gap: np.ndarray, cell: float) -> np.ndarray:
    extent = labels.shape
    brightness = rng.normal(0.68, 0.05, int(labels.max()) + 1).astype(np.float32)[labels]
    image = brightness + 0.06 * _smooth_noise(rng, extent, 3) + 0.05 * _smooth_noise(rng, extent, 40)
    _add_organelles(rng, image, gap, cell)
    contrast = np.clip(0.36 + 0.12 * _smooth_noise(rng, extent, 12), 0.08, 0.6)
    image -= contrast * np.exp(-np.square(gap / 1.6))
    image = _blur(image, 0.7) + 0.07 * rng.standard_normal(extent, dtype=np.float32)
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def _add_organelles(rng, image: np.ndarray, gap: np.ndarray, cell: float) -> None:
    """Round dark bodies with darker rims, inside cells and spanning a few sections."""
    depth, height, width = image.shape
    for _ in range(max(1, round(image.size / (cell**2 * 4)))):
        z, y, x = rng.integers(0, depth), rng.integers(0, height), rng.integers(0, width)
        radius = rng.uniform(0.08, 0.16) * cell
        if gap[z, y, x] < radius * 0.8:
            continue
        reach = int(radius) + 3
        for section in range(max(0, z - 1), min(depth, z + 2)):
            rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
            grid_y, grid_x = np.ogrid[
                rows.start : min(rows.stop, height), columns.start : min(columns.stop, width)
            ]
            distance = np.hypot(grid_y - y, grid_x - x)
            body = 0.12 * (distance < radius) + 0.2 * np.exp(-np.square((distance - radius) / 1.2))
            image[section, rows, columns] -= body.astype(np.float32)


def _smooth_noise(rng, extent: tuple[int, int, int], scale: float) -> np.ndarray:
    """Noise of zero mean and unit deviation, smooth over about `scale` voxels within sections."""
    noise = rng.standard_normal(extent, dtype=np.float32)
    noise = _blur(noise, scale / 2)
    return (noise - noise.mean()) / max(float(noise.std()), 1e-12)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur within sections, by FFT (periodic), sigma in voxels; a section is a fifth as blurred
    in z.
    """
    factors = [
        np.exp(-2 * np.square(np.pi * np.fft.fftfreq(n) * s))
        for n, s in zip(image.shape, (sigma / 5, sigma, sigma))
    ]
    factors[2] = factors[2][: image.shape[2] // 2 + 1]
    spectrum = np.fft.rfftn(image) * (factors[0][:, None, None] * factors[1][:, None] * factors[2])
    return np.fft.irfftn(spectrum, image.shape, axes=(0, 1, 2)).astype(np.float32)
