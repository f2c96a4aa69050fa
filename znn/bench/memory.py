"""How much memory a network will need, estimated before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from znn.graph import Graph

INTERPRETER_BYTES = 64 << 20
TORCH_BYTES = 400 << 20
# Pools round up to powers of two, but not everything lives at once (predictions measured 1.1 to 1.5 times the peak).
SLACK = 1.1
EVERYTHING = ("kernels", "images", "gradients")


def network_bytes(
    graph: Graph, threads: int, plan: Any = "model", memoize: Sequence[str] | None = None
) -> int:
    """Bytes a training round of ZNN needs: images and gradients of every node, kernels with momenta, spectra
    kept.

    A real transform of n voxels holds n float32 within one plane. Kernel spectra have the extent of one
    sub-lattice
    (image extent over sparsity). Where the plan is not all direct, every layer is taken to be FFT: an upper
    estimate.
    """
    kept = EVERYTHING if memoize is None else tuple(memoize)
    images = sum(node.maps * _voxels(node.extent) for node in graph.nodes)
    kernels = spectra = largest = 0
    for edge in graph.edges:
        if edge.kind != "conv":
            continue
        ins, outs = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps
        pairs = outs if edge.spec.depthwise else ins * outs
        kernels += pairs * _voxels(edge.kernel)
        if plan == "direct":
            continue
        image = _voxels(edge.in_extent)
        lattice = _voxels([-(-n // s) for n, s in zip(edge.in_extent, edge.sparsity)])
        largest = max(largest, image)
        spectra += pairs * lattice * ("kernels" in kept)
        spectra += image * (ins * ("images" in kept) + outs * ("gradients" in kept) + outs)
    words = 2 * images + 3 * kernels + spectra + 6 * threads * largest
    return int(INTERPRETER_BYTES + SLACK * 4 * words)


def torch_bytes(graph: Graph) -> int:
    """Bytes a training round of PyTorch needs: activations, their gradients, parameters, and oneDNN's
    reordered copies."""
    images = sum(node.maps * _voxels(node.extent) for node in graph.nodes)
    kernels = sum(
        _voxels(e.kernel) * graph.nodes[e.source].maps * graph.nodes[e.target].maps
        for e in graph.edges
        if e.kind == "conv"
    )
    return int(TORCH_BYTES + 4 * (5 * images + 6 * kernels))


def _voxels(extent: Sequence[int]) -> int:
    return int(np.prod(extent, dtype=np.int64))
