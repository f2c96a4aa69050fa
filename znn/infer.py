"""Inference over whole volumes, tiled so that the result equals one dense pass.

Each tile is read with the network's field of view around it, so no border is visible where tiles meet. A
network trained with max-pooling answers for a grid of voxels only; its dense form (`dense`) gives the same
answer at every voxel: pooling becomes max-filtering, and everything behind it gets the pooling's stride as
sparsity (Masci et al. 2013; the paper's section on max-filtering).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from znn.checkpoint import Checkpoint, load_checkpoint
from znn.errors import DataError, SpecError
from znn.files import atomic_write, sync_folder
from znn.graph import Graph
from znn.spec import EdgeSpec, Extent, NetworkSpec, format_extent
from znn.train.evaluate import cover, probabilities
from znn.train.volumes import Volume, make_volume

BORDERS = ("mirror", "valid")
_SAVE_EVERY_S = 5.0
_WORTHWHILE = 1.05  # a larger patch is taken if it is this much faster
_HDF5_ROOM = 2**20  # for its index of chunks
_LARGEST = 4096  # no patch is longer than this, along any axis


@dataclass(frozen=True)
class Inference:
    """What `infer` did: the output array (an open file unless it was kept in memory), the patch, the tiles,
    how many of them this call computed, the seconds that took, and the rate in output voxels a second."""

    output: Any
    patch: Extent
    tiles: int
    computed: int
    seconds: float
    voxels_per_s: float


def dense(spec: NetworkSpec) -> NetworkSpec:
    """The network that answers at every voxel what `spec` answers at one, with parameters of the same names.

    Raises SpecError where paths of different total stride meet, for such a network has no dense form.
    """
    graph = Graph.build(spec, output=1)
    strides: dict[int, Extent] = {}
    edges = []
    for node in graph.nodes:
        found = {_times(strides[edge.source], edge.stride) for edge in graph.incoming(node.index)}
        if len(found) > 1:
            raise SpecError(
                f"node {node.name!r}: paths of total stride {sorted(found)} meet here, so the network "
                "has no dense form"
            )
        strides[node.index] = found.pop() if found else (1, 1, 1)
        edges += [_dense_edge(edge, strides[edge.source]) for edge in graph.incoming(node.index)]
    by_name = {edge.name: edge for edge in edges}
    return replace(spec, edges=tuple(by_name[edge.name] for edge in spec.edges))


def _dense_edge(edge, stride: Extent) -> EdgeSpec:
    if edge.kind == "max_pool":
        return EdgeSpec(
            edge.name, "max_filter", edge.spec.source, edge.spec.target, window=edge.window, sparsity=stride
        )
    if edge.kind in ("conv", "max_filter"):
        return replace(edge.spec, sparsity=_times(edge.sparsity, stride))
    if edge.kind == "crop":
        return replace(edge.spec, offset=_times(edge.offset, stride))
    return edge.spec


def _times(one: Extent, other: Extent) -> Extent:
    return tuple(a * b for a, b in zip(one, other))


def infer(
    source,
    volume: Volume | np.ndarray,
    out: str | os.PathLike | None = None,
    *,
    patch: Extent | None = None,
    borders: str = "mirror",
    memory_bytes: int | None = None,
    raw: bool = False,
    fresh: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    **engine_options,
) -> Inference:
    """Run a network over a volume.

    source        a checkpoint (`Checkpoint` or the path of one) or a `znn.Network`
    volume        a `Volume`, or an array that `make_volume` takes; scaled as in training
    out           None: an array in memory; else a .npy, .tif/.tiff, .h5/.hdf5 (dataset "output") or .zarr
                  file. It appears under its name when it is complete; a run that was stopped goes on where it
                  was, `fresh` starts over
    patch         extent of the output computed at once; None: the fastest of a few that fit into memory
    borders       "mirror": the output has the volume's extent, the image is mirrored beyond its borders;
                  "valid": only where the field of view fits, extent - field of view + 1
    memory_bytes  limit on what the process's own memory may grow by, output arrays apart; None: half of what is
                  available now. Held by measuring: patches grow only as far as the memory that smaller ones took allows
    raw           the output node's values instead of probabilities
    progress      called with (tiles done, tiles, seconds so far)
    The other options are those of `znn.Network`; `bundle` is "auto" unless it is given. Output (maps, z, y, x)
    float32. Raises DataError for a volume that does not suit the network, a patch beyond the memory, or a file that
    cannot be written (nothing of which is left then), CheckpointError for a damaged checkpoint.
    """
    engine_options = {"bundle": "auto"} | engine_options
    spec, parameters = _network_of(source)
    volume = volume if isinstance(volume, Volume) else make_volume(volume)
    spec = dense(spec)
    graph = Graph.build(spec, output=1)
    fov = _check(graph, volume, borders, patch)
    full = volume.extent if borders == "mirror" else tuple(n - f + 1 for n, f in zip(volume.extent, fov))
    if min(full) < 1:
        raise DataError(
            f"{volume.name}: extent {volume.extent} is smaller than the field of view {fov}; "
            "use mirrored borders"
        )
    lead = tuple((f - 1) // 2 for f in fov) if borders == "mirror" else (0, 0, 0)
    reader = _Reader(volume, fov, lead)
    limit = memory_bytes if memory_bytes is not None else _available_bytes() // 2
    trials = _Trials(spec, parameters, reader, _Memory(limit), engine_options)
    if patch is None:
        patch = _choose_patch(trials, full)
    else:
        patch = tuple(min(p, n) for p, n in zip(patch, full))
        if memory_bytes is not None:
            trials.check(patch)
    maps = graph.node(graph.outputs[0]).maps
    key = _fingerprint(spec, parameters, volume, patch, borders, raw)
    sink = _open_sink(out, (maps, *full), key, fresh)
    with trials.engine(patch) as net:
        return _run(net, reader, sink, full, patch, None if raw else spec.loss, progress)


def least_bytes(spec: NetworkSpec, patch: Extent) -> int:
    """What inference with this output patch takes at the very least: the parameters and, for one of the convolutions,
    the images on both sides."""
    graph = Graph.build(spec, output=patch)
    images = [4 * node.maps * int(np.prod(node.extent)) for node in graph.nodes]
    pairs = [images[edge.source] + images[edge.target] for edge in graph.edges]
    return max(pairs, default=max(images)) + 4 * graph.parameter_count


def _network_of(source) -> tuple[NetworkSpec, Mapping[str, np.ndarray]]:
    if isinstance(source, (str, os.PathLike)):
        source = load_checkpoint(source)
    if isinstance(source, Checkpoint):
        return source.spec, source.parameters
    return source.graph.spec, source.parameters()


def _check(graph: Graph, volume: Volume, borders: str, patch: Extent | None) -> Extent:
    if borders not in BORDERS:
        raise DataError(f"borders {borders!r}; expected one of {', '.join(BORDERS)}")
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise DataError(
            f"network {graph.spec.name!r} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; "
            "inference over volumes takes networks of one each"
        )
    expected = graph.node(graph.inputs[0]).maps
    if volume.maps != expected:
        raise DataError(f"{volume.name}: {volume.maps} maps, but the network's input has {expected}")
    if patch is not None and (len(patch) != 3 or min(patch) < 1):
        raise DataError(f"patch {patch}; expected three positive numbers z, y, x")
    return tuple(graph.field_of_view(graph.outputs[0]))


@dataclass(frozen=True)
class _Reader:
    volume: Volume
    fov: Extent
    lead: Extent

    def tile(self, corner: Sequence[int], patch: Extent) -> np.ndarray:
        """The input for the output patch that starts at `corner`."""
        start = [c - n for c, n in zip(corner, self.lead)]
        return np.ascontiguousarray(
            self.volume.image_patch(start, [p + f - 1 for p, f in zip(patch, self.fov)])
        )


class _Memory:
    """How much the memory that is the process's own (not files mapped into it) has grown, and by how much it may."""

    def __init__(self, limit: int):
        self.limit, self._start = limit, _own_bytes()

    def grown(self) -> int:
        return _own_bytes() - self._start


class _Trials:
    """Trial passes over the volume's first tile: voxels a second and memory by patch."""

    def __init__(self, spec: NetworkSpec, parameters, reader: _Reader, memory: _Memory, engine_options):
        self.spec, self.parameters, self.reader = spec, parameters, reader
        self.memory, self.engine_options = memory, engine_options
        self._bytes_per_voxel = 0.0  # of input, in the largest trial so far

    def engine(self, patch: Extent):
        import znn

        return znn.Network(self.spec, output=patch, parameters=self.parameters, training=False, **self.engine_options)

    def expected_bytes(self, patch: Extent) -> int:
        """What a patch will take, going by the trials so far: memory grows with the input's voxels or slower."""
        return max(least_bytes(self.spec, patch), int(self._bytes_per_voxel * self._voxels(patch)))

    def run(self, patch: Extent) -> float:
        """Output voxels a second: the best of two passes after one to warm up."""
        tile, seconds = self.reader.tile((0, 0, 0), patch), []
        with self.engine(patch) as net:
            for _ in range(3):
                started = time.perf_counter()
                net.forward(tile, phase="infer")
                seconds.append(time.perf_counter() - started)
            self._bytes_per_voxel = self.memory.grown() / self._voxels(patch)
        return float(np.prod(patch)) / min(seconds[1:])

    def check(self, patch: Extent) -> None:
        """Raises DataError if the patch takes more memory than allowed, judged by trials of smaller ones."""
        for smaller in _patches(patch, self.reader.fov):
            if self.expected_bytes(patch) > self.memory.limit:
                raise DataError(
                    f"a patch of {format_extent(patch)} takes about {self.expected_bytes(patch) / 2**20:.0f} MiB; the "
                    f"limit is {self.memory.limit / 2**20:.0f} MiB"
                )
            if np.prod(smaller) < np.prod(patch) / 4:
                self.run(smaller)

    def _voxels(self, patch: Extent) -> float:
        return float(np.prod([p + f - 1 for p, f in zip(patch, self.reader.fov)]))


def _choose_patch(trials: _Trials, full: Extent) -> Extent:
    """The fastest of a growing series of patches, measured on the volume's first tile.

    Larger patches waste less on the field of view around them; the search ends when two in a row gain
    nothing, or at the memory's limit.
    """
    candidates = _patches(full, trials.reader.fov)
    best, best_rate, misses = None, 0.0, 0
    for patch in candidates:
        if trials.expected_bytes(patch) > trials.memory.limit:
            break
        rate = trials.run(patch)
        if trials.memory.grown() > trials.memory.limit:
            break
        misses = 0 if rate > best_rate * _WORTHWHILE else misses + 1
        if misses == 0:
            best, best_rate = patch, rate
        elif misses == 2:
            break
    if best is None:
        raise DataError(
            f"not even the smallest patch, {format_extent(candidates[0])}, fits into "
            f"{trials.memory.limit / 2**20:.0f} MiB of memory; allow more"
        )
    return best


def _patches(full: Extent, fov: Extent) -> list[Extent]:
    """Output patches of 16, 32, 64, ... voxels along each axis, cut to the volume, smallest first; a single
    voxel along axes where the field of view is one voxel, for there nothing is shared between neighbours."""
    sides = [2**n for n in range(4, _LARGEST.bit_length())]
    found = [tuple(1 if f == 1 else min(side, n) for n, f in zip(full, fov)) for side in sides]
    return list(dict.fromkeys(found))


def _run(
    net, reader: _Reader, sink: _Sink, full: Extent, patch: Extent, loss: str | None, progress
) -> Inference:
    tiles = cover(full, patch)
    first, started, saved = sink.done, time.perf_counter(), time.perf_counter()
    try:
        for index, image in zip(range(first, len(tiles)), _read_ahead(reader, tiles[first:], patch)):
            corner, fresh = tiles[index]
            values = net.forward(image, phase="infer")
            values = values if loss is None else probabilities(values, loss)
            place = tuple(slice(c + f.start, c + f.stop) for c, f in zip(corner, fresh))
            sink.write((slice(None), *place), values[(slice(None), *fresh)])
            if time.perf_counter() - saved > _SAVE_EVERY_S:
                sink.save(index + 1)
                saved = time.perf_counter()
            if progress is not None:
                progress(index + 1, len(tiles), time.perf_counter() - started)
    except KeyboardInterrupt:
        sink.save(index)
        raise
    seconds = time.perf_counter() - started
    computed = len(tiles) - first
    rate = float(np.prod(full)) * computed / len(tiles) / seconds if computed else 0.0
    return Inference(sink.finish(), patch, len(tiles), computed, seconds, rate)


def _read_ahead(reader: _Reader, tiles, patch: Extent) -> Iterator[np.ndarray]:
    """The input of each tile; the next is read while the caller works on one."""
    with ThreadPoolExecutor(1, "znn-read") as pool:
        following = None
        for corner, _ in tiles:
            current, following = following, pool.submit(reader.tile, corner, patch)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def _fingerprint(spec, parameters, volume: Volume, patch, borders, raw) -> str:
    """Two runs with the same fingerprint compute the same tiles, so one may finish what the other began."""
    digest = hashlib.sha256()
    facts = [
        spec.to_dict(),
        volume.name,
        volume.image.shape,
        volume.mean,
        volume.deviation,
        patch,
        borders,
        raw,
    ]
    digest.update(json.dumps(facts).encode())
    for name in sorted(parameters):
        digest.update(np.ascontiguousarray(parameters[name]))
    return digest.hexdigest()


class _Sink:
    """Where the output goes: an array in memory."""

    def __init__(self, shape: Sequence[int]):
        self.array, self.done = np.empty(shape, np.float32), 0

    def write(self, place: tuple[slice, ...], values: np.ndarray) -> None:
        self.array[place] = values

    def save(self, done: int) -> None:
        """Note that so many tiles are safely stored."""

    def finish(self) -> np.ndarray:
        return self.array


class _FileSink(_Sink, ABC):
    """An array in `NAME.partial` beside its final place, with the count of finished tiles in
    `NAME.progress`.
    """

    def __init__(self, path: Path, shape: Sequence[int], key: str, fresh: bool):
        self.path, self.key = path, key
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.progress = path.with_name(f"{path.name}.progress")
        self.done = 0 if fresh else self._resumable()
        self.array = None
        with self._whole_or_nothing():
            self.array = self._open(tuple(shape), create=self.done == 0)

    def _resumable(self) -> int:
        with suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(self.progress.read_text())
            if note["key"] == self.key and self.partial.exists():
                return int(note["done"])
        return 0

    @contextmanager
    def _whole_or_nothing(self):
        """Errors of writing as DataError, after what was written has been removed: a full disk should not stay full,
        and a file that writing failed on is not to be trusted."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            with suppress(OSError, ValueError, RuntimeError):
                self._close()
            _remove(self.partial)
            self.progress.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
            raise DataError(f"{self.path}: cannot write the output: {reason}") from error

    def write(self, place: tuple[slice, ...], values: np.ndarray) -> None:
        with self._whole_or_nothing():
            self.array[place] = values

    def save(self, done: int) -> None:
        with self._whole_or_nothing():
            self._flush()
            with atomic_write(self.progress, "w") as file:
                json.dump({"key": self.key, "done": done}, file)

    def finish(self):
        with self._whole_or_nothing():
            self._flush()
            self._close()
            if self.path.is_dir():
                _remove(self.path)
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        self.progress.unlink(missing_ok=True)
        return self._reopen()

    def _flush(self) -> None:
        self.array.flush()

    def _close(self) -> None:
        self.array = None

    @abstractmethod
    def _open(self, shape: tuple[int, ...], create: bool):
        """The array in the partial file, new or as it was left."""

    @abstractmethod
    def _reopen(self):
        """The array in the finished file, for reading."""


class _NpySink(_FileSink):
    def _open(self, shape, create):
        if create:
            return _allocate(np.lib.format.open_memmap(self.partial, "w+", np.float32, shape))
        return np.load(self.partial, mmap_mode="r+", allow_pickle=False)

    def _reopen(self):
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


class _TiffSink(_FileSink):
    """(maps, z, y, x) pages, uncompressed, so that they can be written in any order."""

    def _open(self, shape, create):
        tifffile = _library("tifffile", self.path)
        if create:
            array = tifffile.memmap(
                self.partial,
                shape=shape,
                dtype=np.float32,
                photometric="minisblack",
                bigtiff=4 * np.prod(shape, dtype=np.int64) > 2**31,
            )
            return _allocate(array)
        return tifffile.memmap(self.partial, mode="r+").reshape(shape)

    def _reopen(self):
        return _library("tifffile", self.path).memmap(self.path, mode="r")


class _Hdf5Sink(_FileSink):
    file = None

    def _open(self, shape, create):
        h5py = _library("h5py", self.path)
        if not create:
            self.file = h5py.File(self.partial, "r+")
            return self.file["output"]
        # HDF5 does not get over a failed write: the room is set aside before it writes anything.
        with open(self.partial, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape, dtype=np.int64)) + _HDF5_ROOM)
        self.file = h5py.File(self.partial, "w")
        space, layout = h5py.h5s.create_simple(shape), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk(_chunks(shape))
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        made = h5py.h5d.create(self.file.id, b"output", h5py.h5t.NATIVE_FLOAT, space, layout)
        self.file.flush()
        with open(self.partial, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return h5py.Dataset(made)

    def _flush(self):
        self.file.flush()

    def _close(self):
        self.array = None
        if self.file is not None:
            self.file.close()

    def _reopen(self):
        return _library("h5py", self.path).File(self.path, "r")["output"]


class _ZarrSink(_FileSink):
    def _open(self, shape, create):
        zarr = _library("zarr", self.path)
        if create:
            return zarr.open_array(
                str(self.partial), mode="w", shape=shape, dtype="float32", chunks=_chunks(shape)
            )
        return zarr.open_array(str(self.partial), mode="r+")

    def _flush(self):
        pass  # every chunk is written when it is assigned

    def _reopen(self):
        return _library("zarr", self.path).open_array(str(self.path), mode="r")


_SINKS = {
    ".npy": _NpySink,
    ".tif": _TiffSink,
    ".tiff": _TiffSink,
    ".h5": _Hdf5Sink,
    ".hdf5": _Hdf5Sink,
    ".zarr": _ZarrSink,
}


def _open_sink(out, shape: Sequence[int], key: str, fresh: bool) -> _Sink:
    if out is None:
        return _Sink(shape)
    path = Path(out)
    if path.suffix.lower() not in _SINKS:
        raise DataError(
            f"{path}: cannot write files ending in {path.suffix!r}; expected one of {', '.join(_SINKS)}"
        )
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist")
    return _SINKS[path.suffix.lower()](path, shape, key, fresh)


def _allocate(array: np.memmap) -> np.memmap:
    """Have the system set the file's blocks aside: a disk that fills up while a mapped file is written to ends the
    process, where an error now can be told."""
    with open(array.filename, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _chunks(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, *(min(limit, n) for limit, n in zip((16, 128, 128), shape[1:])))


def _library(name: str, path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path}: writing it needs {name}; pip install 'znn[data]'") from error


def _own_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident, shared = (int(word) for word in file.read().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    for line in _meminfo():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**32


def _meminfo() -> Iterator[str]:
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        yield from file
