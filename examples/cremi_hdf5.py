#!/usr/bin/env python3
"""Reading CREMI- or SNEMI-style HDF5 files and learning 3D affinities from them.

    python examples/cremi_hdf5.py sample_A.hdf sample_B.hdf --minutes 30
    python examples/cremi_hdf5.py --make example.hdf      # writes a small synthetic file of the same layout

A CREMI file (https://cremi.org) holds `volumes/raw` (uint8) and `volumes/labels/neuron_ids` (uint64), both (z, y, x), with
the resolution in nanometres as an attribute; voxels that nobody labelled have a number near 2**64. The datasets are read
by patch, straight from the file. The unlabelled voxels become a mask, which is worked out on the way, too: anything with
a shape, a type and slices will do as a volume.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import znn
from znn.graph import Graph
from znn.infer import infer
from znn.train import (
    Augmentation, Evaluator, Geometry, Limits, PatchReader, PatchSampler, Progress, Region, Run, Schedule, cell_volume,
    make_volume,
)

RAW, LABELS = "volumes/raw", "volumes/labels/neuron_ids"
NOBODY = np.uint64(2**64 - 10)  # numbers from here on mean: not labelled


class Labelled:
    """True where a label dataset has a label; computed for the slices that are asked for."""

    def __init__(self, labels):
        self.labels, self.shape, self.ndim, self.dtype = labels, labels.shape, 3, np.dtype(bool)

    def __getitem__(self, key):
        return self.labels[key] < NOBODY


def read_cremi(path: Path):
    """A `znn.train.Volume` on the open file."""
    import h5py

    file = h5py.File(path, "r")
    for name in (RAW, LABELS):
        if name not in file:
            raise znn.DataError(f"{path}: no dataset {name}; this is not a CREMI file")
    print(f"{path}: {file[RAW].shape} voxels of {tuple(file[RAW].attrs.get('resolution', ()))} nm")
    return make_volume(file[RAW], file[LABELS], Labelled(file[LABELS]), name=path.name)


def make_example(path: Path, extent=(16, 96, 96)) -> None:
    """A synthetic volume of cells in CREMI's layout; the first sections of it are not labelled."""
    import h5py

    image, cells = cell_volume(extent, seed=0, cell=24.0)
    ids = cells.astype(np.uint64)
    ids[:2] = 2**64 - 3
    with h5py.File(path, "w") as file:
        for name, data in ((RAW, image), (LABELS, ids)):
            made = file.create_dataset(name, data=data, chunks=(8, 32, 32), compression="gzip")
            made.attrs["resolution"] = (40.0, 4.0, 4.0)


def network() -> znn.NetworkSpec:
    """Three affinity maps (z, y, x), field of view 5 x 20 x 20."""
    layers = [
        {"conv": 12, "kernel": (1, 5, 5), "transfer": "relu"},
        {"conv": 16, "kernel": (3, 5, 5), "transfer": "relu"},
        {"max_filter": (1, 2, 2)},
        {"conv": 16, "kernel": (3, 5, 5), "transfer": "relu"},
        {"conv": 3, "kernel": (1, 2, 2), "init": {"kind": "xavier"}},
    ]
    return znn.NetworkSpec.layered("affinities", 1, layers, loss="binomial")


def main(arguments: list[str] | None = None) -> float | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--make", type=Path, metavar="FILE", help="only write a synthetic example file")
    parser.add_argument("--hold-out", type=int, default=4, help="last sections of each file for validation (default 4)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--output", type=int, nargs=3, default=(4, 48, 48))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/cremi"))
    options = parser.parse_args(arguments)
    if options.make:
        return make_example(options.make)
    if not options.files:
        parser.error("name at least one file, or make one with --make")
    volumes = [read_cremi(path) for path in options.files]
    last = [Region((volume.extent[0] - options.hold_out, 0, 0), volume.extent) for volume in volumes]
    training = [volume.hiding([region]) for volume, region in zip(volumes, last)]
    held_out = [volume.part(region) for volume, region in zip(volumes, last)]
    graph = Graph.build(network(), output=tuple(options.output))
    geometry = Geometry.of(graph)
    sampler = PatchSampler(PatchReader(training, geometry, "affinities", 3), 0, Augmentation(elastic=2.0), balance=True)
    evaluator = Evaluator(PatchReader(held_out, geometry, "affinities", 3), "binomial", tiles=24)
    limits = Limits(options.rounds, None if options.rounds else options.minutes, validate_every=50)
    with znn.Network(graph, bundle="auto", threads=options.threads, optimiser=znn.Adam(0.002)) as net:
        Run(net, sampler, evaluator, options.folder, Schedule(0.002), limits, progress=Progress(sys.stderr)).train()
        result = evaluator.run(net)
        print(f"wrong affinities on held-out sections {result.pixel_error:.2%} +- {result.standard_error:.2%} "
              f"(all one class: {result.trivial_error:.2%})")
        out = options.folder / "affinities.h5"
        done = infer(net, volumes[0], out, threads=options.threads)
        print(f"{out}: {done.output.shape}, {done.voxels_per_s:,.0f} voxels/s")
    return result.pixel_error


if __name__ == "__main__":
    try:
        main()
    except znn.ZnnError as error:
        sys.exit(f"cremi_hdf5: {error}")
