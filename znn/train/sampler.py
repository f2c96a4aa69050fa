"""Random patches of labelled volumes, as a stream that can be entered anywhere.

Patch number i of a stream is a function of (seed, i) alone, so a resumed run needs no saved random state, and
patches may be prepared by any number of threads in any order.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from znn.errors import DataError
from znn.train.augment import NONE, Augmentation, Variant, deform_image, deform_labels
from znn.train.regions import Region, remainder
from znn.train.volumes import TARGETS, Volume, label_values, targets_from_labels

_TRIES = 200  # patches drawn in search of one with a labelled voxel before giving up


@dataclass(frozen=True)
class Geometry:
    """How the output patch of a network lies in its input patch; all are extents (z, y, x).

    Output voxel p sees the input voxels from p * stride to p * stride + fov - 1 and stands for the one at
    p * stride + centre.
    """

    in_extent: tuple[int, int, int]
    out_extent: tuple[int, int, int]
    fov: tuple[int, int, int]
    stride: tuple[int, int, int]

    @classmethod
    def of(cls, graph) -> Geometry:
        """From a `znn.graph.Graph` of one input and one output. Raises DataError for others."""
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise DataError(
                f"network {graph.spec.name!r} has {len(graph.inputs)} inputs and {len(graph.outputs)} "
                "outputs; training on volumes takes networks of one each"
            )
        nodes = {node.name: node for node in graph.nodes}
        in_extent, out_extent = nodes[graph.inputs[0]].extent, nodes[graph.outputs[0]].extent
        fov = tuple(graph.field_of_view(graph.outputs[0]))
        stride = tuple((i - f) // (o - 1) if o > 1 else 1 for i, o, f in zip(in_extent, out_extent, fov))
        return cls(tuple(in_extent), tuple(out_extent), fov, stride)

    @property
    def centre(self) -> tuple[int, int, int]:
        return tuple((f - 1) // 2 for f in self.fov)

    @property
    def span(self) -> tuple[int, int, int]:
        """Voxels of the volume from the first output voxel to the last, both included."""
        return tuple((o - 1) * s + 1 for o, s in zip(self.out_extent, self.stride))

    @property
    def surrounded(self) -> tuple[int, int, int]:
        """The input patch with a voxel on every side."""
        return tuple(n + 2 for n in self.in_extent)

    @property
    def square(self) -> bool:
        """Whether y and x can be exchanged."""
        return all(e[1] == e[2] for e in (self.in_extent, self.out_extent, self.fov, self.stride))


class Sample(NamedTuple):
    """One round's worth: image, target and voxel weights (None: all one), each (maps, z, y, x) float32, with
    the patches in front where a round has several."""

    image: np.ndarray
    target: np.ndarray
    weights: np.ndarray | None


class PatchReader:
    """Reads image, target and weight patches of volumes by position, for training and for evaluation alike.

    target: "boundary" (one map), "classes" (`maps` maps) or "affinities" (three maps), see
    `volumes.targets_from_labels`. Raises DataError for volumes without labels, of unequal map counts, or
    smaller than the output patch, and for labels that do not suit the target.
    """

    def __init__(
        self, volumes: Sequence[Volume], geometry: Geometry, target: str = "boundary", maps: int = 1
    ):
        if not volumes:
            raise DataError("no volume given; expected at least one")
        if target not in TARGETS:
            raise DataError(f"target {target!r}; expected one of {', '.join(TARGETS)}")
        self.volumes, self.geometry, self.target, self.maps = list(volumes), geometry, target, maps
        self._picture = [self._check(volume) for volume in self.volumes]

    def _check(self, volume: Volume) -> bool:
        """Whether the target is a boundary picture."""
        if volume.labels is None:
            raise DataError(f"{volume.name}: no labels given, so there is nothing to learn or compare with")
        if any(n < s for n, s in zip(volume.extent, self.geometry.span)):
            raise DataError(
                f"{volume.name}: extent {volume.extent} is smaller than the output patch, which spans "
                f"{self.geometry.span}; give a smaller output patch"
            )
        if volume.maps != self.volumes[0].maps:
            raise DataError(
                f"{volume.name}: {volume.maps} maps, but {self.volumes[0].name} has "
                f"{self.volumes[0].maps}; volumes must agree"
            )
        expected = {"boundary": 1, "affinities": 3}.get(self.target, self.maps)
        if self.maps != expected:
            raise DataError(
                f"target {self.target!r} has {expected} maps, but the network's output has {self.maps}"
            )
        values = label_values(volume)
        self._check_classes(volume, values)
        if self.target != "affinities" and len(values) < 2 and volume.window is None:
            raise DataError(f"{volume.name}: every label is {values[0]}; expected at least two values")
        picture = len(values) == 2 if volume.picture is None else volume.picture
        return self.target == "boundary" and picture

    def _check_classes(self, volume: Volume, values: np.ndarray) -> None:
        """Label values that are no class, of all sections looked at or of a patch, would be learned as none."""
        if self.target == "classes" and (values.min() < 0 or values.max() >= self.maps or np.any(values % 1)):
            raise DataError(
                f"{volume.name}: labels from {values.min()} to {values.max()}; expected whole numbers "
                f"from 0 to {self.maps - 1}, one for each map of the network's output"
            )

    def free(self, index: int, margin: int = 0) -> list[Region]:
        """Where the span of a patch of a volume may start, as disjoint boxes of corners.

        That is everywhere the span fits, and no target in it depends on a hidden label, even if labels move by up to
        `margin` voxels in y and x.
        """
        volume, span = self.volumes[index], self.geometry.span
        near = int(self.target == "boundary" and not self._picture[index])  # targets look at neighbours
        reach = (1, 1, 1) if self.target == "affinities" else (0, near, near)
        reach = (reach[0], reach[1] + margin, reach[2] + margin)
        room = Region((0, 0, 0), tuple(n - s + 1 for n, s in zip(volume.extent, span)))
        hidden = (region.moved([-n for n in volume.region.start]) for region in volume.hidden)
        return remainder(room, [
            Region(tuple(a - r - s + 1 for a, r, s in zip(region.start, reach, span)),
                   tuple(b + r for b, r in zip(region.stop, reach)))
            for region in hidden
        ])

    def target_patch(self, index: int, corner: Sequence[int], variant: Variant | None = None):
        """Target (maps, z, y, x) and mask (bool, same shape) or None for the span that starts at `corner`.

        A variant that exchanges y and x needs a square geometry.
        """
        volume = self.volumes[index]
        # One voxel more on every side, for targets look at neighbours.
        labels = self._labels(volume.label_patch, corner, variant, 1)
        self._check_classes(volume, labels)
        if self._picture[index]:
            labels = labels != 0
        mask = None if volume.mask is None else self._labels(volume.mask_patch, corner, variant, 0)
        steps = tuple(slice(None, None, step) for step in self.geometry.stride)
        target = targets_from_labels(labels, self.target, self.maps)[(slice(None), *steps)]
        if mask is not None:
            mask = np.broadcast_to(mask[steps], target.shape)
        return np.ascontiguousarray(target), mask

    def _labels(self, read, corner: Sequence[int], variant: Variant | None, around: int) -> np.ndarray:
        """What `read` says about the span at `corner` and `around` voxels on every side, in the variant's form."""
        margin = 0 if variant is None else variant.margin
        grow = (around, around + margin, around + margin)
        patch = read([c - g for c, g in zip(corner, grow)], [s + 2 * g for s, g in zip(self.geometry.span, grow)])
        if variant is None:
            return patch
        patch = variant.move(patch)
        if variant.deformation is None:
            return patch
        # The field covers the input patch and a voxel on every side; the span begins at its centre.
        field = variant.deformation.displacement(self.geometry.surrounded)
        box = tuple(slice(c + 1 - around, c + 1 + s + around) for c, s in zip(self.geometry.centre, self.geometry.span))
        return deform_labels(patch, field[(slice(None), *box)], margin)

    def image_patch(self, index: int, corner: Sequence[int], variant: Variant | None = None) -> np.ndarray:
        """The input patch (maps, z, y, x) whose output span starts at `corner`."""
        geometry = self.geometry
        lead = list(geometry.centre)
        if variant is not None:
            # Where the field of view is even its centre is not its middle, so a flip moves it by one voxel.
            lead = [f - 1 - c if flipped else c for f, c, flipped in zip(geometry.fov, lead, variant.flip)]
            if variant.transpose:
                lead = [lead[0], lead[2], lead[1]]
        margin = (0, 0, 0) if variant is None else (0, variant.margin, variant.margin)
        image = self.volumes[index].image_patch(
            [c - n - m for c, n, m in zip(corner, lead, margin)],
            [n + 2 * m for n, m in zip(geometry.in_extent, margin)],
        )
        if variant is None:
            return np.ascontiguousarray(image)
        image = variant.move(image)
        if variant.deformation is not None:
            field = variant.deformation.displacement(geometry.surrounded)
            image = deform_image(image, field[:, 1:-1, 1:-1, 1:-1], variant.margin)
        return np.ascontiguousarray(variant.shade(image))

    def frequencies(self) -> np.ndarray:
        """The share of each target map that is 1, over a grid of patches of every volume; shape (maps,)."""
        totals, count = 0.0, 0
        for index in range(len(self.volumes)):
            for corner in _grid(self.free(index), self.geometry.span, 64):
                target, mask = self.target_patch(index, corner)
                keep = np.ones_like(target) if mask is None else mask
                totals = totals + (target * keep).sum((1, 2, 3))
                count = count + keep[0].sum()
        return totals / max(count, 1)


class PatchSampler:
    """The training stream: `sample(i)` is round i's data, the same whenever and wherever it is asked for.

    Positions are uniform over every place where the output patch fits into the volume and its target depends on no
    hidden label (volumes weighted by the number of such places); the image is mirrored where the field of view reaches
    beyond the volume. With `balance` the classes get weights so that each has the same total weight. Raises DataError
    as `PatchReader` does, and where there is no such place.
    """

    def __init__(
        self,
        reader: PatchReader,
        seed: int = 0,
        augmentation: Augmentation = NONE,
        patches: int = 1,
        balance: bool = False,
    ):
        self.reader, self.seed, self.patches = reader, seed, patches
        square = reader.geometry.square
        self.augmentation = augmentation if square else replace(augmentation, transpose=False)
        self._places = [
            (index, box)
            for index in range(len(reader.volumes))
            for box in reader.free(index, self.augmentation.margin)
        ]
        if not self._places:
            raise DataError(
                "nothing is left to train on: what is held out leaves no place for an output patch, which spans "
                f"{reader.geometry.span}, and the labels its target looks at"
            )
        sizes = np.array([np.prod(box.extent, dtype=np.float64) for _, box in self._places])
        self._shares = sizes / sizes.sum()
        self._class_weights = _class_weights(reader) if balance else None

    def sample(self, index: int) -> Sample:
        """The data of round `index`."""
        rng = np.random.default_rng([self.seed, index])
        parts = [self._patch(rng) for _ in range(self.patches)]
        if self.patches == 1:
            return parts[0]
        weights = None
        if any(part.weights is not None for part in parts):
            weights = np.stack([np.ones_like(p.target) if p.weights is None else p.weights for p in parts])
        return Sample(np.stack([p.image for p in parts]), np.stack([p.target for p in parts]), weights)

    def _patch(self, rng: np.random.Generator) -> Sample:
        variant = self.augmentation.draw(rng)
        for _ in range(_TRIES):
            index, box = self._places[int(rng.choice(len(self._shares), p=self._shares))]
            corner = [low + int(rng.integers(room)) for low, room in zip(box.start, box.extent)]
            target, mask = self.reader.target_patch(index, corner, variant)
            if mask is None or mask.any():
                weights = self._weights(target, mask)
                return Sample(
                    self.reader.image_patch(index, corner, variant),
                    target,
                    None if weights is None else np.ascontiguousarray(weights),
                )
        raise DataError(
            f"{self.reader.volumes[index].name}: {_TRIES} patches drawn without one voxel inside the "
            "mask; use a larger output patch or cut the volume to the masked part"
        )

    def _weights(self, target: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        if self._class_weights is None:
            return None if mask is None else mask.astype(np.float32)
        absent, present = self._class_weights
        if self.reader.target == "classes":
            weights = np.broadcast_to((target * present).sum(0, keepdims=True), target.shape).astype(
                np.float32
            )
        else:
            weights = np.where(target > 0, present, absent).astype(np.float32)
        return weights if mask is None else weights * mask


class Prefetcher:
    """Keeps the next samples ready, made by low-priority threads while the engine trains.

    Iterating gives sample(start), sample(start + 1), ... in order, without end. An exception in a thread
    reaches the caller with the sample it concerns. Close it, or use it as a context manager.
    """

    def __init__(self, sampler: PatchSampler, start: int = 0, depth: int = 8, threads: int = 2):
        self._sampler, self._next = sampler, start
        self._pool = ThreadPoolExecutor(threads, "znn-prefetch", initializer=_step_back)
        self._ready: deque = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._ready.append(self._pool.submit(self._sampler.sample, self._next))
        self._next += 1

    def __iter__(self):
        return self

    def __next__(self) -> Sample:
        sample = self._ready.popleft().result()
        self._submit()
        return sample

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _step_back() -> None:
    # On Linux niceness belongs to the thread; the engine's workers keep theirs and are not disturbed.
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def _grid(places: Sequence[Region], span: Sequence[int], most: int) -> list[tuple[int, int, int]]:
    """At most about `most` corners of disjoint patches spread evenly over boxes of corners."""
    corners = []
    for box in places:
        starts = [range(-(-a // s) * s, b, s) for a, b, s in zip(box.start, box.stop, span)]
        corners += itertools.product(*starts)
    corners = corners or [box.start for box in places[:1]]
    return corners[:: max(1, len(corners) // most)]


def _class_weights(reader: PatchReader) -> tuple[np.ndarray, np.ndarray]:
    share = reader.frequencies().reshape(-1, 1, 1, 1)
    if np.any(share <= 0) or (reader.target != "classes" and np.any(share >= 1)):
        raise DataError(
            "class rebalancing: a class does not occur in the training volumes, so it has no weight"
        )
    if reader.target == "classes":
        return np.zeros_like(share), 1 / (len(share) * share)
    return 0.5 / (1 - share), 0.5 / share
