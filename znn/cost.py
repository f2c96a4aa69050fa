"""How much work a network is: multiply-adds, transforms, floating-point operations and bytes, by layer,
phase, method.

The counts for a fully connected convolution layer f -> f' are those of the paper (arXiv 1510.06706): direct
multiply-adds f f' n'^3 k^3 in each phase; with transforms f + f' + f f' of them in each phase, of which
memoization saves f f' in the backward phase (kernels) and f (images) and f' (gradients) in the update.

A real transform of N voxels takes C N log2 N floating-point operations, the paper's 3 C n^3 log2 n for N =
n^3, with C = 2.5: half of the 5 N log2 N that a complex radix-2 transform takes. The product of two spectra,
added to a sum, takes 4 N: N/2 frequencies, 8 operations each. A layer of sparsity s is s^3 separate problems,
one per sub-lattice of ceil(n / s) voxels, which share their kernels' transforms.

Other operations are linear in the voxels: a max-filter takes 3 comparisons per input voxel and filtered axis
whatever its window (van Herk 1992, Gil and Werman 1993), everything else one operation per voxel it reads or
writes (a bias and a transfer function one each).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from znn.errors import PlanError
from znn.graph import Graph, GraphEdge, GraphNode
from znn.spec import Extent, format_extent

PHASES = ("forward", "backward", "update")
METHODS = ("direct", "fft")
MEMOIZE = ("kernels", "images", "gradients")
FFT_CONSTANT = 2.5


@cache
def smooth_extent(n: int) -> int:
    """The smallest extent of at least `n` that transforms well: factors 2, 3 and 5, and at most one 7."""
    while not _is_smooth(n):
        n += 1
    return n


def _is_smooth(n: int) -> bool:
    if n % 7 == 0:
        n //= 7
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    return n == 1


def transform_extent(edge: GraphEdge) -> Extent:
    """The extent at which fft transforms one sub-lattice of `edge`'s source: smooth_extent(ceil(n / s))."""
    return tuple(smooth_extent(-(-n // s)) for n, s in zip(edge.in_extent, edge.sparsity))


def transform_flop(extent: Extent) -> float:
    """Operations of one real transform: C N log2 N."""
    voxels = math.prod(extent)
    return FFT_CONSTANT * voxels * math.log2(voxels)


def spectrum_bytes(extent: Extent) -> int:
    """Bytes of the spectrum of one real image, single precision: z y (x // 2 + 1) complex numbers."""
    z, y, x = extent
    return 8 * z * y * (x // 2 + 1)


def map_pairs(graph: Graph, edge: GraphEdge) -> int:
    """How many single-map edges an edge group stands for: f f' (fully connected), f (map to map)."""
    out_maps = graph.nodes[edge.target].maps
    fully = edge.kind == "conv" and not edge.spec.depthwise
    return out_maps * graph.nodes[edge.source].maps if fully else out_maps


@dataclass(frozen=True)
class PhaseCost:
    """What an edge or node group takes in one phase of one round.

    multiply_adds: real ones (direct), complex ones (fft). image_transforms: of whole images or gradients, to
    spectra; inverse_transforms: back to images or gradients; kernel_transforms: of kernels, or back to kernel
    gradients. The transform of an image of a sparse layer is that of all its sub-lattices.
    """

    multiply_adds: int = 0
    image_transforms: int = 0
    inverse_transforms: int = 0
    kernel_transforms: int = 0
    flop: float = 0.0

    @property
    def transforms(self) -> int:
        return self.image_transforms + self.inverse_transforms + self.kernel_transforms


@dataclass(frozen=True)
class LayerCost:
    """Costs of an edge group (or of a node group: bias and transfer function, or loss) by phase.

    method and transform_extent are None for anything but convolutions (and transform_extent for direct ones).
    spectra_bytes: of the spectra kept from one phase for a later one.
    """

    name: str
    kind: str
    method: str | None
    transform_extent: Extent | None
    phases: Mapping[str, PhaseCost]
    spectra_bytes: int = 0

    @property
    def flop(self) -> float:
        return sum(phase.flop for phase in self.phases.values())


@dataclass(frozen=True)
class NetworkCost:
    """Costs of one training round (forward, backward, update, loss) of one patch, edges first, then nodes."""

    layers: tuple[LayerCost, ...] = field(repr=False)

    def layer(self, name: str) -> LayerCost:
        """The costs of the edge or node called `name`. Raises PlanError."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"there is no edge or node {name!r}")

    @property
    def flop(self) -> float:
        return sum(layer.flop for layer in self.layers)

    @property
    def spectra_bytes(self) -> int:
        return sum(layer.spectra_bytes for layer in self.layers)

    def phase(self, phase: str) -> PhaseCost:
        """All layers together in one phase."""
        costs = [layer.phases[phase] for layer in self.layers]
        return PhaseCost(
            *(sum(getattr(cost, name) for cost in costs) for name in PhaseCost.__dataclass_fields__)
        )

    @property
    def transforms(self) -> int:
        return sum(self.phase(phase).transforms for phase in PHASES)

    def __str__(self) -> str:
        rows = [
            f"{'layer':<16}{'kind':<12}{'method':<8}{'transform':<14}"
            + "".join(f"{phase + ' Mflop':>16}" for phase in PHASES)
            + f"{'kept MB':>10}"
        ]
        for layer in self.layers:
            extent = format_extent(layer.transform_extent) if layer.transform_extent else "-"
            rows.append(
                f"{layer.name:<16}{layer.kind:<12}{layer.method or '-':<8}{extent:<14}"
                + "".join(f"{layer.phases[phase].flop / 1e6:>16.3f}" for phase in PHASES)
                + f"{layer.spectra_bytes / 1e6:>10.1f}"
            )
        return "\n".join(rows)


def network_cost(
    graph: Graph,
    method: str | Mapping[str, str] = "fft",
    memoize: Iterable[str] = MEMOIZE,
    input_gradient: bool = False,
) -> NetworkCost:
    """The costs of one round of one patch.

    method: "direct", "fft", or a mapping from every convolution's name to one of them. memoize: which
    transforms are kept between phases. Without `input_gradient`, nothing is propagated to nodes with no
    parameters upstream. Raises PlanError for unknown methods, memoization switches or edges.
    """
    methods, memoize = check_methods(graph, method), check_memoize(memoize)
    wanted = gradient_nodes(graph, input_gradient)
    layers = [
        edge_cost(graph, edge, methods.get(edge.name), memoize, wanted[edge.source]) for edge in graph.edges
    ]
    layers += [node_cost(node, wanted[node.index], node.name in graph.outputs) for node in graph.nodes]
    return NetworkCost(tuple(layers))


def check_methods(graph: Graph, method: str | Mapping[str, str]) -> dict[str, str]:
    """The method of every convolution by name. Raises PlanError."""
    names = [edge.name for edge in graph.edges if edge.kind == "conv"]
    methods = dict.fromkeys(names, method) if isinstance(method, str) else dict(method)
    if set(methods) != set(names):
        odd = sorted(set(methods) ^ set(names))
        raise PlanError(
            f"methods are given for {', '.join(methods)}; expected one for each convolution "
            f"({', '.join(odd)} too many or missing)"
        )
    for name, value in methods.items():
        if value not in METHODS:
            raise PlanError(f"method of edge {name!r} is {value!r}; expected one of {', '.join(METHODS)}")
    return methods


def check_memoize(memoize: Iterable[str]) -> frozenset[str]:
    """The memoization switches as a set. Raises PlanError for an unknown one."""
    switches = frozenset((memoize,) if isinstance(memoize, str) else memoize)
    if not switches <= set(MEMOIZE):
        raise PlanError(f"memoize is {sorted(switches)}; expected any of {', '.join(MEMOIZE)}")
    return switches


def gradient_nodes(graph: Graph, input_gradient: bool = False, training: bool = True) -> list[bool]:
    """For every node whether its gradient is wanted: all, or those with parameters in or above them, or none (inference)."""
    if not training:
        return [False] * len(graph.nodes)
    wanted = [input_gradient or node.spec.bias for node in graph.nodes]
    for edge in graph.edges:
        if edge.kind == "conv" or wanted[edge.source]:
            wanted[edge.target] = True
    return wanted


def edge_cost(
    graph: Graph,
    edge: GraphEdge,
    method: str | None = None,
    memoize: frozenset[str] = frozenset(MEMOIZE),
    backward: bool = True,
) -> LayerCost:
    """The costs of one edge group; `backward`: whether its source's gradient is wanted."""
    if edge.kind != "conv":
        return _map_to_map_cost(graph, edge, backward)
    if method == "direct":
        return _direct_cost(graph, edge, backward)
    return _fft_cost(graph, edge, memoize, backward)


def node_cost(node: GraphNode, backward: bool, is_output: bool) -> LayerCost:
    """The costs of a node group: bias, transfer function, at an output the loss (backward)."""
    values = node.maps * math.prod(node.extent)
    bias = values if node.spec.bias else 0
    transfer = values if node.spec.transfer != "linear" else 0
    loss = 3 * values if is_output else 0
    phases = {
        "forward": PhaseCost(flop=bias + transfer),
        "backward": PhaseCost(flop=loss + transfer * backward),
        "update": PhaseCost(flop=bias),
    }
    return LayerCost(node.name, node.spec.kind, None, None, phases)


def _map_to_map_cost(graph: Graph, edge: GraphEdge, backward: bool) -> LayerCost:
    maps = graph.nodes[edge.source].maps
    inputs, outputs = maps * math.prod(edge.in_extent), maps * math.prod(edge.out_extent)
    forward = {
        "max_filter": 3 * sum(w > 1 for w in edge.window or ()) * inputs,
        "max_pool": inputs,
        "dropout": inputs,
    }.get(edge.kind, outputs)
    phases = {
        "forward": PhaseCost(flop=forward),
        "backward": PhaseCost(flop=outputs * backward),
        "update": PhaseCost(),
    }
    return LayerCost(edge.name, edge.kind, None, None, phases)


def _direct_cost(graph: Graph, edge: GraphEdge, backward: bool) -> LayerCost:
    count = map_pairs(graph, edge) * math.prod(edge.out_extent) * math.prod(edge.kernel)
    cost = PhaseCost(multiply_adds=count, flop=2.0 * count)
    phases = {"forward": cost, "backward": cost if backward else PhaseCost(), "update": cost}
    return LayerCost(edge.name, edge.kind, "direct", None, phases)


def _fft_cost(graph: Graph, edge: GraphEdge, memoize: frozenset[str], backward: bool) -> LayerCost:
    extent, lattices = transform_extent(edge), math.prod(edge.sparsity)
    f, g, pairs = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps, map_pairs(graph, edge)
    # Spectra of gradients and kernels are left by the backward phase only where there is one.
    images_kept, gradients_kept = "images" in memoize, "gradients" in memoize and backward
    kernels_kept = "kernels" in memoize and backward

    def phase(images: int, inverses: int, kernels: int) -> PhaseCost:
        one = transform_flop(extent)
        flop = one * (lattices * (images + inverses) + kernels) + 4.0 * pairs * lattices * math.prod(extent)
        frequencies = spectrum_bytes(extent) // 8
        return PhaseCost(pairs * lattices * frequencies, images, inverses, kernels, flop)

    phases = {
        "forward": phase(f, g, pairs),
        "backward": phase(g, f, 0 if kernels_kept else pairs) if backward else PhaseCost(),
        "update": phase((0 if images_kept else f) + (0 if gradients_kept else g), 0, pairs),
    }
    kept = pairs * kernels_kept + lattices * (f * images_kept + g * gradients_kept)
    return LayerCost(edge.name, edge.kind, "fft", extent, phases, kept * spectrum_bytes(extent))
