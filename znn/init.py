"""First values of the parameters."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from znn.errors import SpecError
from znn.graph import Graph
from znn.spec import Init


def initial_parameters(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Kernels under their edge's name, biases under their node's name, float32 and C-contiguous.

    Each group is drawn from its own PCG64 stream, derived from `seed` and the group's name, so that adding a
    layer does not change the others. With n the kernel's voxels, fan_in = in_maps * n and fan_out = out_maps
    * n (a depthwise convolution counts 1 map on both sides): uniform in [-value, value]; gaussian with sigma
    = value; xavier uniform with half-width value * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010);
    msra Gaussian with sigma = value * sqrt(2 / fan_in) (He et al. 2015). For a bias, fan_in is 1 and fan_out
    the number of maps. Raises SpecError for a seed that is not a non-negative integer.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
        raise SpecError(f"seed is {seed!r}; expected an integer of at least 0")
    inits = {edge.name: edge.spec.init for edge in graph.edges} | {
        n.name: n.spec.bias_init for n in graph.nodes
    }
    depthwise = {edge.name for edge in graph.edges if edge.spec.depthwise}
    return {
        name: _draw(inits[name], shape, _fans(shape, name in depthwise), int(seed), name)
        for name, shape in graph.parameter_shapes.items()
    }


def _fans(shape: tuple[int, ...], depthwise: bool) -> tuple[int, int]:
    """fan_in and fan_out of a parameter group."""
    if len(shape) == 1:
        return 1, shape[0]
    out_maps, in_maps, *kernel = shape
    voxels = math.prod(kernel)
    return in_maps * voxels, (1 if depthwise else out_maps) * voxels


def _draw(init: Init, shape: tuple[int, ...], fans: tuple[int, int], seed: int, name: str) -> np.ndarray:
    if init.kind == "constant":
        return np.full(shape, init.value, np.float32)
    # A hash of the name, because Python's own is different in every process.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key))))
    width = _width(init, *fans)
    if init.kind in ("uniform", "xavier"):
        values = generator.uniform(-width, width, shape)
    else:
        values = generator.normal(0.0, width, shape)
    return values.astype(np.float32)


def _width(init: Init, fan_in: int, fan_out: int) -> float:
    """Half-width of the uniform distribution, or sigma of the Gaussian."""
    if init.kind == "msra":
        return init.value * math.sqrt(2.0 / fan_in)
    if init.kind == "xavier":
        return init.value * math.sqrt(6.0 / (fan_in + fan_out))
    return init.value
