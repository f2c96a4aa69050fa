#!/usr/bin/env python3
"""Boundary detection on the ISBI 2012 stack with a 2D net: train, test on held-out sections, write the boundary map.

    python examples/isbi2012_2d.py train-volume.tif train-labels.tif --minutes 10

The stack (30 sections of 512 x 512, Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142) is at
https://imagej.net/events/isbi-2012-segmentation-challenge. Its labels are a picture, 255 inside cells and 0 on
membranes; any other stack with such a picture, or with numbered cells, goes as well. `znn train` does the same from the
command line; here the parts are in your hands.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import znn
from znn.infer import infer
from znn.train import Progress, Settings, boundary_network, read_volume, run_job


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("images", help="the stack")
    made.add_argument("labels", help="its labels")
    made.add_argument("--hold-out", type=int, default=6, help="last sections kept for validation (default 6)")
    length = made.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time to train for (default 10)")
    length.add_argument("--rounds", type=int)
    made.add_argument("--output", type=int, nargs=3, default=(1, 96, 96), help="output patch (default 1 96 96)")
    made.add_argument("--threads", type=int)
    made.add_argument("--folder", type=Path, default=Path("runs/isbi2012-2d"))
    return made


def main(arguments: list[str] | None = None) -> dict:
    options = parser().parse_args(arguments)
    minutes = options.minutes or (None if options.rounds else 10.0)
    settings = Settings(
        images=(options.images,),
        labels=(options.labels,),
        hold_out=options.hold_out,
        output=tuple(options.output),
        rounds=options.rounds,
        minutes=minutes,
        optimiser="adam",
        elastic=3.0,
        threads=options.threads,
    )
    summary = run_job(settings, options.folder, boundary_network(), progress=Progress(sys.stderr))
    print(f"pixel error on held-out sections {summary['pixel_error']:.2%}, adapted Rand error {summary['rand_error']:.3f}")
    best = options.folder / "best.npz"
    result = infer(best, read_volume(options.images), options.folder / "boundaries.tif", threads=options.threads)
    print(f"{options.folder / 'boundaries.tif'}: {result.voxels_per_s:,.0f} voxels/s in patches of {result.patch}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except znn.ZnnError as error:
        sys.exit(f"isbi2012_2d: {error}")
