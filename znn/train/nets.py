"""The network that `znn train` takes when none is given."""

from __future__ import annotations

from znn.spec import NetworkSpec


def boundary_network(input_maps: int = 1) -> NetworkSpec:
    """A dense 2D net for boundaries of cells: max-filters in place of pooling, so every voxel gets an answer.

    Its field of view of 43 x 43 sees a membrane in its surroundings; sections are looked at one by one, since
    those of serial-section stacks correlate weakly. One output map of boundary probability (binomial loss).
    """
    layers = [
        {"conv": 16, "kernel": 4, "transfer": "relu"},
        {"max_filter": 2},
        {"conv": 24, "kernel": 4, "transfer": "relu"},
        {"max_filter": 2},
        {"conv": 32, "kernel": 4, "transfer": "relu"},
        {"conv": 32, "kernel": 4, "transfer": "relu"},
        {"conv": 32, "kernel": 3, "transfer": "relu"},
        {"conv": 1, "kernel": 1, "transfer": "linear", "init": {"kind": "xavier"}},
    ]
    return NetworkSpec.layered("boundary", input_maps, layers, loss="binomial", dims=2)
