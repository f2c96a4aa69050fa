"""Image volumes with labels, read by patch.

A volume is an image stack (z, y, x), or (maps, z, y, x) for several channels, and optionally a label stack
and a mask (z, y, x) of the same extent. Files are opened lazily: .npy and uncompressed TIFF stacks are mapped
into memory, HDF5 and Zarr read the chunks a patch touches, a compressed TIFF stack is read whole where that
takes no more than a quarter of the memory, else section by section. So a volume may be larger than memory.
2D images are volumes of one section.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from znn.errors import DataError
from znn.train.regions import Region, remainder

TARGETS = ("boundary", "classes", "affinities")
_STATISTICS_SECTIONS = 16  # sections read to find mean, deviation and label frequencies of a large volume


@dataclass(frozen=True)
class Volume:
    """An image with its labels; arrays may be lazy, anything that NumPy's slices read.

    image (maps, z, y, x); labels and mask (z, y, x) or None. Images are handed out as float32 scaled by
    `(value - mean) / deviation`. Validated by `make_volume`, which callers should use.

    window      the part of the arrays that this volume is (None: all); the image around it can be read
    hidden      parts of the arrays whose labels are never handed out: they read as 0
    picture     whether the labels are a boundary picture, see `targets_from_labels`; None: if they have two values
    """

    name: str
    image: object
    labels: object | None
    mask: object | None
    mean: float
    deviation: float
    window: Region | None = None
    hidden: tuple[Region, ...] = ()
    picture: bool | None = None

    @property
    def maps(self) -> int:
        return self.image.shape[0]

    @property
    def extent(self) -> tuple[int, int, int]:
        return tuple(self.image.shape[1:]) if self.window is None else self.window.extent

    @property
    def region(self) -> Region:
        """Where this volume lies in its arrays."""
        return self.window or Region.whole(self.extent)

    @property
    def known(self) -> list[Region]:
        """Disjoint boxes of the arrays that hold every voxel of this volume whose label is not hidden."""
        return remainder(self.region, self.hidden)

    def image_patch(self, corner: Sequence[int], extent: Sequence[int]) -> np.ndarray:
        """float32 (maps, z, y, x) from `corner` on; beyond the borders of the image it is mirrored."""
        corner = self._place(corner)
        patch = self._finite("image", read_mirrored(self.image, corner, extent).astype(np.float32), corner)
        patch -= self.mean
        patch /= self.deviation
        return patch

    def label_patch(self, corner: Sequence[int], extent: Sequence[int]) -> np.ndarray:
        """Labels (z, y, x) in the file's own type from `corner` on, mirrored beyond the borders; 0 where hidden."""
        corner = self._place(corner)
        patch = self._finite("labels", read_mirrored(self.labels, corner, extent), corner)
        if not self.hidden:
            return patch
        patch = patch.copy()
        where = [mirrored_indices(a, count, n) for a, count, n in zip(corner, extent, self.labels.shape)]
        for region in self.hidden:
            inside = [(a <= index) & (index < b) for index, a, b in zip(where, region.start, region.stop)]
            patch[np.ix_(*inside)] = 0
        return patch

    def mask_patch(self, corner: Sequence[int], extent: Sequence[int]) -> np.ndarray | None:
        """bool (z, y, x): where the labels are to be trusted, mirrored beyond the borders. None without a mask."""
        if self.mask is None:
            return None
        corner = self._place(corner)
        return self._finite("mask", read_mirrored(self.mask, corner, extent), corner) != 0

    def part(self, region: Region) -> Volume:
        """A region as a volume of its own, scaled as the whole; what the image shows around it can still be read."""
        return replace(self, name=f"{self.name}[{region}]", window=region.moved(self.region.start))

    def hiding(self, regions: Sequence[Region]) -> Volume:
        """The same volume without the labels of `regions`, whose image can still be read."""
        return replace(self, hidden=(*self.hidden, *(region.moved(self.region.start) for region in regions)))

    def _finite(self, what: str, patch: np.ndarray, corner: Sequence[int]) -> np.ndarray:
        """The patch, read from `corner` of the arrays on. Raises DataError where it is not finite."""
        if patch.dtype.kind == "f" and not np.isfinite(patch).all():
            raise DataError(
                f"{self.name}: {what}: NaN or infinity found in the {tuple(patch.shape[-3:])} voxels from {tuple(corner)} on; "
                "expected finite values"
            )
        return patch

    def _place(self, corner: Sequence[int]) -> list[int]:
        return [int(c) + a for c, a in zip(corner, self.region.start)]


class _WithMaps:
    """A (z, y, x) array seen as (1, z, y, x), without reading it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, (1, *array.shape), array.dtype, 4

    def __getitem__(self, key):
        return np.asarray(self.array[tuple(key[1:])])[None]


def make_volume(image, labels=None, mask=None, name: str = "volume") -> Volume:
    """A checked `Volume` from arrays: image (z, y, x), (y, x) or (maps, z, y, x); labels and mask likewise.

    Mean and deviation of the image are taken over at most 16 evenly spaced sections. Raises DataError for a
    wrong rank or type, channels in the last axis, unequal extents, NaN or infinity in these sections (elsewhere:
    when they are read), a constant image, or a mask that is nowhere set.
    """
    image = _with_rank(image, (4,), f"{name}: image", maps=True)
    if image.shape[-1] <= 4 and (image.shape[0] > 4 or image.shape[-2] >= 32):
        raise DataError(
            f"{name}: image: shape {tuple(image.shape)} looks as if the channels came last; expected (z, y, x) or "
            "(maps, z, y, x)"
        )
    extent = tuple(image.shape[1:])
    labels = None if labels is None else _companion(labels, extent, f"{name}: labels")
    mask = None if mask is None else _companion(mask, extent, f"{name}: mask")
    mean, deviation = _statistics(image, name)
    if mask is not None and not any(np.any(section) for section in _some_sections(mask, everything=True)):
        raise DataError(f"{name}: the mask is empty, so nothing could be learned from this volume")
    return Volume(name, image, labels, mask, mean, deviation)


def read_volume(images: str, labels: str | None = None, mask: str | None = None) -> Volume:
    """A `Volume` from files; see `open_array` for the formats and how a dataset inside a file is named."""
    return make_volume(
        open_array(images),
        None if labels is None else open_array(labels),
        None if mask is None else open_array(mask),
        name=str(images),
    )


def open_array(path: str):
    """Open a stack: .tif/.tiff (tifffile), .npy, .h5/.hdf5 (h5py), .zarr (zarr). Lazy where possible.

    Inside HDF5 and Zarr, `file.h5:volumes/raw` names the dataset; without one the file must hold exactly one.
    Raises DataError naming the file for a missing, truncated or foreign file or a missing library.
    """
    path = str(path)
    file, dataset = _split_dataset(path)
    if not Path(file).exists():
        raise DataError(f"{path}: no such file")
    suffix = Path(file).suffix.lower()
    readers = {
        ".tif": _open_tiff,
        ".tiff": _open_tiff,
        ".npy": _open_npy,
        ".h5": _open_hdf5,
        ".hdf5": _open_hdf5,
        ".hdf": _open_hdf5,
        ".zarr": _open_zarr,
    }
    if suffix not in readers:
        raise DataError(
            f"{path}: cannot read files ending in {suffix!r}; expected one of {', '.join(readers)}"
        )
    try:
        return readers[suffix](file, dataset)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory; store it as .npy, HDF5 or Zarr") from error
    except Exception as error:  # the libraries raise many types for damaged files
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{path}: damaged or not a {suffix} stack ({type(error).__name__}: {reason})"
        ) from error


def read_mirrored(array, corner: Sequence[int], extent: Sequence[int]) -> np.ndarray:
    """Read the last three axes of `array` from `corner` over `extent`, mirrored beyond the borders.

    Mirroring repeats no voxel (-1 is 1, n is n - 2) and goes to and fro as often as needed.
    """
    full = array.shape[-3:]
    indices = [mirrored_indices(start, count, n) for start, count, n in zip(corner, extent, full)]
    lead = (slice(None),) * (array.ndim - 3)
    # Only the bounding box is read, in one slice, for the sake of chunked files.
    box = tuple(slice(int(index.min()), int(index.max()) + 1) for index in indices)
    block = np.asarray(array[lead + box])
    inside = all(start >= 0 and start + count <= n for start, count, n in zip(corner, extent, full))
    if inside:
        return block
    z, y, x = (index - int(index.min()) for index in indices)
    return block[..., z[:, None, None], y[:, None], x]


def mirrored_indices(start: int, count: int, n: int) -> np.ndarray:
    """Indices start ... start + count - 1 folded into 0 ... n - 1 by mirroring at the first and last."""
    if n == 1:
        return np.zeros(count, np.intp)
    index = np.mod(np.arange(start, start + count), 2 * n - 2)
    return np.minimum(index, 2 * n - 2 - index)


def targets_from_labels(labels: np.ndarray, kind: str, classes: int = 1) -> np.ndarray:
    """Target maps float32 from a label patch that has a margin of one voxel on every side.

    labels (z+2, y+2, x+2) -> (maps, z, y, x):
    boundary    one map, 1 on boundaries. Labels of two values are a boundary picture whose zeros are
                boundaries (as ISBI 2012's); labels of more values are segments: a voxel is boundary where it
                is 0 or a neighbour within its section belongs to another segment
    classes     one-hot maps of the values 0 ... classes - 1
    affinities  three maps z, y, x: 1 where a voxel and its predecessor along the axis share a segment not 0
    Which of the two boundary forms applies is the caller's to say, as a patch cannot tell: pass labels as
    bool for a boundary picture (True inside cells).
    """
    inner = labels[1:-1, 1:-1, 1:-1]
    if kind == "classes":
        return (inner == np.arange(classes).reshape(-1, 1, 1, 1)).astype(np.float32)
    if kind == "affinities":
        before = (labels[:-2, 1:-1, 1:-1], labels[1:-1, :-2, 1:-1], labels[1:-1, 1:-1, :-2])
        return np.stack([(inner == other) & (inner != 0) for other in before]).astype(np.float32)
    if labels.dtype == bool:
        return (~inner)[None].astype(np.float32)
    boundary = inner == 0
    for neighbour in (
        labels[1:-1, :-2, 1:-1],
        labels[1:-1, 2:, 1:-1],
        labels[1:-1, 1:-1, :-2],
        labels[1:-1, 1:-1, 2:],
    ):
        boundary |= (neighbour != inner) & (neighbour != 0)
    return boundary[None].astype(np.float32)


def label_values(volume: Volume) -> np.ndarray:
    """The distinct label values that are not hidden, over at most 16 evenly spaced sections. Raises DataError for NaN
    among them."""
    parts = volume.known
    sections = [z for z in range(volume.region.start[0], volume.region.stop[0])
                if any(part.start[0] <= z < part.stop[0] for part in parts)]
    if not sections:
        raise DataError(f"{volume.name}: every label is held out, so there is nothing to learn from")
    values = np.unique(np.concatenate([
        np.unique(_of_section(volume.labels, z, part))
        for z in _evenly(sections)
        for part in parts
        if part.start[0] <= z < part.stop[0]
    ]))
    if not np.isfinite(values).all():
        raise DataError(f"{volume.name}: labels: NaN or infinity found; expected finite values")
    return values


def is_labelled(volume: Volume) -> bool:
    """Whether the mask, if there is one, leaves any voxel whose label is not hidden."""
    return any(
        volume.mask is None or np.any(_of_section(volume.mask, z, part))
        for part in volume.known
        for z in range(part.start[0], part.stop[0])
    )


def _of_section(array, z: int, part: Region) -> np.ndarray:
    """The voxels of section z of an array (z, y, x) that lie in `part`."""
    return np.asarray(array[(slice(z, z + 1), *(slice(a, b) for a, b in zip(part.start[1:], part.stop[1:])))])


def _evenly(sections: Sequence[int]) -> list[int]:
    """At most 16 of `sections`, evenly spaced."""
    count = min(len(sections), _STATISTICS_SECTIONS)
    return [sections[i] for i in np.unique(np.linspace(0, len(sections) - 1, count).astype(int))]


def _split_dataset(path: str) -> tuple[str, str | None]:
    file, colon, dataset = path.rpartition(":")
    known = Path(file).suffix.lower() in (".h5", ".hdf5", ".hdf", ".zarr")
    return (file, dataset) if colon and known else (path, None)


def _open_tiff(file: str, dataset: str | None):
    tifffile = _library("tifffile", file)
    complaints: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(record.getMessage())
    logger = logging.getLogger("tifffile")
    logger.addHandler(handler)
    try:
        stack = _tiff_array(tifffile, file)
    finally:
        logger.removeHandler(handler)
    if complaints:  # of a truncated file tifffile returns the sections that are left, and only logs an error
        raise DataError(f"{file}: damaged or truncated TIFF stack ({complaints[0]})")
    return stack


def _tiff_array(tifffile, file: str):
    opened = tifffile.TiffFile(file)
    series = opened.series[0]
    wrong = [axis for axis in series.axes[1:] if axis in "CST"] or (series.axes[:1] == "C" and series.ndim == 3)
    if wrong:  # channels or times where sections are expected; other letters say nothing
        raise DataError(
            f"{file}: axes {series.axes} of extents {series.shape}; expected YX, ZYX or CZYX (a 2D image of several channels: "
            "CZYX with one section)"
        )
    if series.dataoffset is not None and series.size:
        if series.dataoffset + series.nbytes > os.path.getsize(file):
            raise DataError(f"{file}: truncated TIFF stack; it should hold {series.shape} voxels")
        opened.close()
        return tifffile.memmap(file, mode="r")
    if len(series.shape) == 3 and len(series.pages) == series.shape[0] and series.nbytes > memory_bytes() // 4:
        return _TiffSections(opened, series)
    with opened:
        return opened.asarray()


class _TiffSections:
    """A compressed TIFF stack (z, y, x), whose sections are read when they are asked for, the last few kept."""

    def __init__(self, file, series):
        self._file, self._name = file, file.filename
        self.shape, self.dtype, self.ndim = tuple(series.shape), series.dtype, 3
        self._section = lru_cache(maxsize=16)(lambda z: series.pages[z].asarray())
        self._lock = threading.Lock()  # the file has one position

    def __getitem__(self, key):
        z, *rest = key if isinstance(key, tuple) else (key,)
        try:
            with self._lock:
                sections = [self._section(int(index)) for index in range(*z.indices(self.shape[0]))]
        except Exception as error:  # tifffile raises many types for damaged files
            raise DataError(f"{self._name}: damaged or truncated TIFF stack ({error})") from error
        return np.stack([section[tuple(rest)] for section in sections])


def _open_npy(file: str, dataset: str | None):
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _open_hdf5(file: str, dataset: str | None):
    h5py = _library("h5py", file)
    handle = h5py.File(file, "r")
    found: list[str] = []
    handle.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return handle[_choose(file, dataset, found)]


def _open_zarr(file: str, dataset: str | None):
    node = _library("zarr", file).open(file, mode="r")
    if hasattr(node, "shape"):
        return node
    return node[dataset or _choose(file, dataset, sorted(node.array_keys()))]


def _choose(file: str, dataset: str | None, found: list[str]) -> str:
    if dataset is None and len(found) == 1:
        return found[0]
    if dataset not in found:
        wanted = "no dataset named" if dataset is None else f"no dataset {dataset!r}"
        raise DataError(f"{file}: {wanted}; it holds {', '.join(found) or 'none'} (write {file}:NAME)")
    return dataset


def _library(name: str, file: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{file}: reading it needs {name}; pip install 'znn[data]'") from error


def _with_rank(array, ranks: tuple[int, ...], what: str, maps: bool = False):
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        array = np.asarray(array)
    if array.dtype.kind not in "buif":
        raise DataError(f"{what}: type {array.dtype}; expected integers or floats")
    if len(array.shape) == 2:
        array = np.asarray(array[:, :])[None]
    if maps and len(array.shape) == 3:
        array = _WithMaps(array)
    if len(array.shape) not in ranks:
        raise DataError(
            f"{what}: shape {tuple(array.shape)}; expected (z, y, x)"
            + (" or (maps, z, y, x)" if maps else "")
        )
    if 0 in array.shape:
        raise DataError(f"{what}: shape {tuple(array.shape)} is empty")
    return array


def _companion(array, extent: tuple[int, ...], what: str):
    array = _with_rank(array, (3,), what)
    if tuple(array.shape) != extent:
        raise DataError(
            f"{what}: extent {tuple(array.shape)}, but the image's is {extent}; they must be equal"
        )
    return array


def memory_bytes() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _some_sections(array, everything: bool = False):
    axis = array.ndim - 3
    sections = range(array.shape[axis])
    for z in sections if everything else _evenly(sections):
        yield np.asarray(array[(slice(None),) * axis + (slice(int(z), int(z) + 1), slice(None), slice(None))])


def _statistics(image, name: str) -> tuple[float, float]:
    count, total, squares = 0, 0.0, 0.0
    for section in _some_sections(image):
        values = section.astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"{name}: image: NaN or infinity found; expected finite values")
        count += values.size
        total += values.sum()
        squares += np.square(values).sum()
    mean = total / count
    deviation = float(np.sqrt(max(squares / count - mean * mean, 0.0)))
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        raise DataError(
            f"{name}: image: every voxel is {mean:g}; a constant image cannot be scaled or learned from"
        )
    return float(mean), deviation
