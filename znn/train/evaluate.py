"""How good a network is on labelled volumes: loss, pixel error, and what calling everything one class
would give.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from znn.train.sampler import PatchReader


def probabilities(output: np.ndarray, loss: str) -> np.ndarray:
    """What the output maps (maps, z, y, x) say, as numbers from 0 to 1, by the loss the network is
    trained with.
    """
    if loss == "binomial":
        return 0.5 * (1.0 + np.tanh(0.5 * output))  # the logistic function, free of overflow
    if loss == "softmax":
        shifted = np.exp(output - output.max(axis=-4, keepdims=True))
        return shifted / shifted.sum(axis=-4, keepdims=True)
    return np.clip(output, 0.0, 1.0)


def wrong_voxels(probability: np.ndarray, target: np.ndarray, exclusive: bool) -> np.ndarray:
    """bool (maps, z, y, x): where the decision differs from the target.

    Every map is a decision of its own at 0.5; `exclusive` classes are one decision, for the largest map, and
    give one map.
    """
    if exclusive:
        return (probability.argmax(axis=0) != target.argmax(axis=0))[None]
    return (probability > 0.5) != (target > 0.5)


@dataclass(frozen=True)
class Evaluation:
    """loss per voxel; pixel_error, the share of wrong decisions, with its standard error over tiles;
    trivial_error, the pixel error of the best constant answer on the same voxels; voxels and tiles looked
    at."""

    loss: float
    pixel_error: float
    standard_error: float
    trivial_error: float
    voxels: int
    tiles: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Compares a network with the labels of whole volumes, tile by tile, in the infer phase.

    With `tiles` only so many, evenly spread and always the same, are looked at: enough to follow a training.
    """

    def __init__(self, reader: PatchReader, loss: str, tiles: int | None = None):
        self.reader, self.loss = reader, loss
        self._tiles = [
            (index, tile)
            for index, volume in enumerate(reader.volumes)
            for tile in cover(volume.extent, reader.geometry.span)
        ]
        if tiles is not None and tiles < len(self._tiles):
            chosen = np.unique(np.linspace(0, len(self._tiles) - 1, tiles).round().astype(int))
            self._tiles = [self._tiles[i] for i in chosen]

    def run(self, net) -> Evaluation:
        """Evaluate `net` (a `znn.Network`), whose parameters stay as they are."""
        wrong, counts, losses, classes = [], [], 0.0, 0.0
        for (index, (corner, fresh)), output in zip(self._tiles, self._outputs(net, self._tiles)):
            target, mask = self.reader.target_patch(index, corner)
            keep = (
                self._fresh(target.shape, fresh) if mask is None else self._fresh(target.shape, fresh) & mask
            )
            decided = wrong_voxels(probabilities(output, self.loss), target, self.reader.target == "classes")
            keep_decisions = keep[: decided.shape[0]]
            wrong.append(int((decided & keep_decisions).sum()))
            counts.append(int(keep_decisions.sum()))
            losses += _loss_sum(output, target, keep, self.loss)
            classes = classes + (target * keep).sum(axis=(1, 2, 3))
        return _evaluation(wrong, counts, losses, classes, self.reader.target)

    def _outputs(self, net, tiles) -> Iterator[np.ndarray]:
        for start in range(0, len(tiles), net.patches):
            batch = tiles[start : start + net.patches]
            images = [self.reader.image_patch(index, corner) for index, (corner, _) in batch]
            yield from _forward(net, images)

    def _fresh(self, shape: Sequence[int], fresh: Sequence[slice]) -> np.ndarray:
        keep = np.zeros(shape, bool)
        if max(self.reader.geometry.stride) > 1:
            keep[:] = (
                True  # a strided network answers for a grid of voxels only; grids of tiles do not overlap
            )
        else:
            keep[(slice(None), *fresh)] = True
        return keep

    def section(self, net, index: int = 0, z: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One section of a volume (z None: the middle one): image (y, x), target and probability (maps, y,
        x), NaN where a strided network gives no answer."""
        volume, geometry = self.reader.volumes[index], self.reader.geometry
        z = volume.extent[0] // 2 if z is None else z
        tiles = [
            (index, tile)
            for tile in cover(volume.extent, geometry.span)
            if 0 <= z - tile[0][0] < geometry.span[0] and (z - tile[0][0]) % geometry.stride[0] == 0
        ]
        probability = np.full((self.reader.maps, *volume.extent[1:]), np.nan, np.float32)
        target = probability.copy()
        for (_, (corner, _)), output in zip(tiles, self._outputs(net, tiles)):
            within = (z - corner[0]) // geometry.stride[0]
            place = (
                slice(None),
                *(slice(c, c + n, s) for c, n, s in zip(corner[1:], geometry.span[1:], geometry.stride[1:])),
            )
            probability[place] = probabilities(output, self.loss)[:, within]
            target[place] = self.reader.target_patch(index, corner)[0][:, within]
        return volume.image_patch((z, 0, 0), (1, *volume.extent[1:]))[0, 0], target, probability


def cover(extent: Sequence[int], span: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Tiles of `span` that cover `extent`: (corner, slices of the tile no earlier tile covers).

    The last tile of an axis is moved inwards to fit, so every tile is whole. span may not exceed extent.
    """
    axes = []
    for n, s in zip(extent, span):
        starts = [min(start, n - s) for start in range(0, n, s)]
        done = [0, *(start + s for start in starts[:-1])]
        axes.append([(start, slice(end - start, s)) for start, end in zip(starts, done)])
    return [
        (tuple(start for start, _ in tile), tuple(fresh for _, fresh in tile))
        for tile in itertools.product(*axes)
    ]


def _forward(net, images: list[np.ndarray]) -> list[np.ndarray]:
    if net.patches == 1:
        return [net.forward(image, phase="infer") for image in images]
    padded = images + [images[-1]] * (net.patches - len(images))
    return list(net.forward(np.stack(padded), phase="infer"))[: len(images)]


def _loss_sum(output: np.ndarray, target: np.ndarray, keep: np.ndarray, loss: str) -> float:
    if loss == "binomial":
        terms = np.maximum(output, 0) - output * target + np.log1p(np.exp(-np.abs(output)))
    elif loss == "softmax":
        shifted = output - output.max(axis=0)
        terms = target * (np.log(np.exp(shifted).sum(axis=0)) - shifted)
    else:
        terms = 0.5 * np.square(output - target)
    return float((terms * keep).sum(dtype=np.float64))


def _evaluation(
    wrong: list[int], counts: list[int], losses: float, classes: np.ndarray, target: str
) -> Evaluation:
    total = sum(counts)
    if not total:
        return Evaluation(float("nan"), float("nan"), float("nan"), float("nan"), 0, len(counts))
    voxels = total if target == "classes" else total / len(classes)
    share = classes / voxels
    trivial = 1 - share.max() if target == "classes" else np.minimum(share, 1 - share).mean()
    error, weights = sum(wrong) / total, np.array(counts) / total
    per_tile = np.array([w / c if c else error for w, c in zip(wrong, counts)])
    deviation = np.sqrt((np.square(weights) * np.square(per_tile - error)).sum())
    return Evaluation(losses / voxels, error, float(deviation), float(trivial), int(voxels), len(counts))
