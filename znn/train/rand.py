"""Segmentation error: connected components within sections and the adapted Rand error between segmentations.

Arganda-Carreras et al. 2015 (doi 10.3389/fnana.2015.00142) define the score of the ISBI 2012 challenge, one
minus which is the error here.
"""

from __future__ import annotations

import numpy as np


def connected_components(inside: np.ndarray) -> np.ndarray:
    """Number the 4-connected components of a bool picture (y, x) from 1; 0 elsewhere. int32.

    Runs of each row are joined with the runs of the row above that they touch (union-find over runs).
    """
    height, width = inside.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = inside
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, stops = np.nonzero(change == -1)
    parent = np.arange(len(rows))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1))
    for row in range(1, height):
        above, run = first[row - 1], first[row]
        while above < first[row] and run < first[row + 1]:
            if starts[above] < stops[run] and starts[run] < stops[above]:
                parent[root(run)] = root(above)
            if stops[above] < stops[run]:
                above += 1
            else:
                run += 1
    roots = np.array([root(run) for run in range(len(rows))], np.intp)
    numbers = np.unique(roots, return_inverse=True)[1] + 1
    labels = np.zeros(height * width + 1, np.int32)
    flat = rows * width
    np.add.at(labels, flat + starts, numbers)
    np.add.at(labels, flat + stops, -numbers)
    return np.cumsum(labels[:-1], dtype=np.int32).reshape(height, width)


def adapted_rand_error(truth: np.ndarray, found: np.ndarray) -> float:
    """1 - F score of pairs of different voxels put into one segment; voxels where truth is 0 do not count.

    Segments of `found` numbered 0 count as one segment. NaN when truth is 0 everywhere.
    """
    counted = truth != 0
    if not counted.any():
        return float("nan")
    pairs, counts = np.unique(np.stack([truth[counted], found[counted]]), axis=1, return_counts=True)
    in_both = _pairs(counts)
    in_truth, in_found = (
        _pairs(np.bincount(np.unique(row, return_inverse=True)[1], counts)) for row in pairs
    )
    return float(1 - 2 * in_both / (in_truth + in_found)) if in_truth + in_found else 0.0


def _pairs(sizes: np.ndarray) -> float:
    sizes = sizes.astype(np.float64)
    return float((sizes * (sizes - 1)).sum())


def rand_error_of_boundaries(target: np.ndarray, probability: np.ndarray, threshold: float) -> float:
    """Adapted Rand error of one section: cells of the target picture against those of a boundary probability
    cut at `threshold`; both (y, x)."""
    return adapted_rand_error(
        connected_components(target < 0.5), connected_components(probability < threshold)
    )
