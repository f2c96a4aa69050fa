#!/usr/bin/env python3
"""Boundary detection on the ISBI 2012 stack with a 3D net, trained with max-pooling, applied densely.

    python examples/isbi2012_3d.py train-volume.tif train-labels.tif --minutes 10

The sections are 50 nm thick and the voxels 4 nm wide, so kernels and pooling are flat but for the last layers, which look
at five sections. Training with pooling answers for every fourth voxel along y and x and is cheap; for the boundary map
`infer` turns the pooling into max-filtering with sparsity, with the same parameters, and answers for every voxel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import znn
from znn.infer import dense, infer
from znn.train import Progress, Settings, read_volume, run_job


def network() -> znn.NetworkSpec:
    """Field of view 5 x 47 x 47."""
    layers = [
        {"conv": 16, "kernel": (1, 4, 4), "transfer": "relu"},
        {"max_pool": (1, 2, 2)},
        {"conv": 24, "kernel": (1, 5, 5), "transfer": "relu"},
        {"max_pool": (1, 2, 2)},
        {"conv": 32, "kernel": (3, 5, 5), "transfer": "relu"},
        {"conv": 32, "kernel": (3, 5, 5), "transfer": "relu"},
        {"conv": 1, "kernel": 1, "init": {"kind": "xavier"}},
    ]
    return znn.NetworkSpec.layered("isbi2012-3d", 1, layers, loss="binomial")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("images", help="the stack")
    made.add_argument("labels", help="its labels")
    made.add_argument("--hold-out", type=int, default=6, help="last sections kept for validation (default 6)")
    length = made.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time to train for (default 10)")
    length.add_argument("--rounds", type=int)
    made.add_argument("--output", type=int, nargs=3, default=(2, 24, 24), help="output patch (default 2 24 24)")
    made.add_argument("--threads", type=int)
    made.add_argument("--memory-mib", type=int, default=2048, help="for inference (default 2048)")
    made.add_argument("--folder", type=Path, default=Path("runs/isbi2012-3d"))
    return made


def main(arguments: list[str] | None = None) -> dict:
    options = parser().parse_args(arguments)
    spec = network()
    filters = [edge.name for edge in dense(spec).edges if edge.kind == "max_filter"]
    print(f"trained with max-pooling, applied with {len(filters)} max-filters; the parameters are the same")
    settings = Settings(
        images=(options.images,),
        labels=(options.labels,),
        hold_out=options.hold_out,
        output=tuple(options.output),
        rounds=options.rounds,
        minutes=options.minutes or (None if options.rounds else 10.0),
        optimiser="adam",
        balance=True,
        threads=options.threads,
    )
    summary = run_job(settings, options.folder, spec, progress=Progress(sys.stderr))
    print(f"pixel error on held-out sections {summary['pixel_error']:.2%}")
    out = options.folder / "boundaries.tif"
    result = infer(options.folder / "best.npz", read_volume(options.images), out, threads=options.threads,
                   memory_bytes=options.memory_mib * 2**20)
    print(f"{out}: {result.voxels_per_s:,.0f} voxels/s in patches of {result.patch}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except znn.ZnnError as error:
        sys.exit(f"isbi2012_3d: {error}")
