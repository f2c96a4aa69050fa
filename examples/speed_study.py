#!/usr/bin/env python3
"""A speed study of one's own net: which engine, output patch and number of threads is fastest here, for training and use.

    python examples/speed_study.py net.toml --outputs 8 16 24 --threads 1 2
    python examples/speed_study.py scaling_3d --width 10 --csv speed.csv

Every case runs a few rounds in turn with the others, so that a machine that slows down slows them all; the table has
medians of output voxels a second. Larger patches waste less on their borders until they fall out of the caches. The
study with checks, intervals and records is `experiments/run_all.py --network net.toml --sweep ...`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import znn
from znn.graph import Graph

ENGINES = {"paper": {"bundle": 1}, "bundled": {"bundle": "auto"}}


def arrays(graph: Graph, names) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    nodes = [graph.node(name) for name in names]
    return {node.name: rng.standard_normal((node.maps, *node.extent), dtype=np.float32) for node in nodes}


class Case:
    """One engine, output patch and number of threads; a lap of training and one of inference."""

    def __init__(self, spec: znn.NetworkSpec, engine: str, side: int, threads: int, plan: str):
        depth = 1 if spec.dims == 2 else side
        self.graph = Graph.build(spec, output=(depth, side, side))
        self.net = znn.Network(self.graph, threads=threads, plan=plan, **ENGINES[engine])
        self.inputs, self.targets = arrays(self.graph, self.graph.inputs), arrays(self.graph, self.graph.outputs)
        self.row = {"engine": engine, "output": side, "threads": threads}
        self.seconds: dict[str, list[float]] = {"training": [], "inference": []}

    def lap(self) -> None:
        started = time.perf_counter()
        self.net.train_step(self.inputs, self.targets)
        self.net.sync()
        trained = time.perf_counter()
        self.net.forward(self.inputs)
        self.seconds["training"].append(trained - started)
        self.seconds["inference"].append(time.perf_counter() - trained)

    def rates(self) -> dict:
        laps = {name: statistics.median(times[1:]) for name, times in self.seconds.items()}  # the first warms up
        return self.row | {f"{name}_voxels_per_s": round(self.graph.output_voxels / t, 1) for name, t in laps.items()}


def load(name: str, width: int | None) -> znn.NetworkSpec:
    return znn.NetworkSpec.load(name) if name.endswith((".toml", ".znn")) else znn.zoo.build(name, width=width)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", help="a .toml or .znn file, or a net of the zoo")
    parser.add_argument("--width", type=int, help="maps of the hidden layers (zoo)")
    parser.add_argument("--outputs", type=int, nargs="+", default=[4, 8, 16], help="sides of the output patch")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--plan", default="model", help="model (default) or autotune")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="also write the table there")
    options = parser.parse_args(arguments)
    spec = load(options.net, options.width)
    grid = itertools.product(options.engines, options.outputs, options.threads)
    cases = [Case(spec, *choice, options.plan) for choice in grid]
    for _ in range(options.rounds + 1):
        for case in cases:
            case.lap()
    rows = [case.rates() for case in cases]
    for case in cases:
        case.net.close()
    print(f"{'engine':<10}{'output':>7}{'threads':>9}{'training, voxels/s':>22}{'inference, voxels/s':>22}")
    for row in rows:
        print(f"{row['engine']:<10}{row['output']:>7}{row['threads']:>9}{row['training_voxels_per_s']:>22,.0f}"
              f"{row['inference_voxels_per_s']:>22,.0f}")
    for what in ("training", "inference"):
        best = max(rows, key=lambda row: row[f"{what}_voxels_per_s"])
        print(f"fastest in {what}: {best['engine']}, output {best['output']}, {best['threads']} threads")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    try:
        main()
    except znn.ZnnError as error:
        sys.exit(f"speed_study: {error}")
