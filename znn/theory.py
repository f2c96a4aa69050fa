"""How parallel a training round is: work T1, critical path Tinf and the speedup that Brent's theorem
promises.

A round is expanded into the paper's tasks, one per single-map edge and phase, with the transforms that single
maps share as tasks of their own; then T1 is the sum of all work and Tinf the longest path, both in
floating-point operations (`znn.cost` says how many each task takes). All maps of a group are alike, so groups
stand for their maps and width costs nothing. Assumptions: as many processors as are useful, free scheduling,
and sums of m images in a binary tree of ceil(log2 m) additions that begins when the last image is there.

Forward, an fft edge transforms each source map (s^3 sub-lattices in one task) and, beside it, each kernel;
then multiplies, sums over the maps in the frequency domain, and transforms each sum back. Backward is the
mirror image. An update multiplies the spectra of image and gradient and transforms back to a kernel gradient.
The update of a round has to end before the next forward pass, so Tinf is the longest path through forward,
loss, backward and update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from znn import cost
from znn.errors import PlanError
from znn.graph import Graph, GraphEdge, GraphNode
from znn.spec import NetworkSpec


@dataclass(frozen=True)
class TaskGroup:
    """`count` equal tasks of `flop` operations that start `start` operations after the round began (unlimited
    processors). A tree of additions counts its additions; `depth` of them follow each other."""

    name: str
    phase: str
    count: int
    flop: float
    start: float
    depth: int = 1

    @property
    def work(self) -> float:
        return self.count * self.flop

    @property
    def end(self) -> float:
        return self.start + self.depth * self.flop


@dataclass(frozen=True)
class TaskGraph:
    """The task groups of one training round, each after those it depends on."""

    groups: tuple[TaskGroup, ...] = field(repr=False)

    @property
    def work(self) -> float:
        """T1: operations of all tasks."""
        return sum(group.work for group in self.groups)

    @property
    def span(self) -> float:
        """Tinf: operations on the longest path."""
        return max(group.end for group in self.groups)

    @property
    def parallelism(self) -> float:
        """S_inf = T1 / Tinf: the speedup with unlimited processors."""
        return self.work / self.span

    @property
    def task_count(self) -> int:
        return sum(group.count for group in self.groups)

    def speedup_bound(self, processors: float) -> float:
        """The speedup that Brent's theorem promises on `processors`."""
        return brent_bound(self.parallelism, processors)


def brent_bound(parallelism: float, processors: float) -> float:
    """S_inf / (1 + (S_inf - 1) / P): at least this speedup on P processors (Brent 1974, T_P <= Tinf + (T1 -
    Tinf)/P).

    Raises PlanError for less than one processor.
    """
    if not processors >= 1:
        raise PlanError(f"processors is {processors!r}; expected a number of at least 1")
    return parallelism / (1.0 + (parallelism - 1.0) / processors)


def task_graph(
    graph: Graph,
    method: str | Mapping[str, str] = "fft",
    memoize: Iterable[str] = cost.MEMOIZE,
    input_gradient: bool = False,
) -> TaskGraph:
    """The tasks of one training round of `graph`; arguments and errors as for `znn.cost.network_cost`."""
    methods, switches = cost.check_methods(graph, method), cost.check_memoize(memoize)
    expansion = _Expansion(graph, methods, switches, cost.gradient_nodes(graph, input_gradient))
    return TaskGraph(tuple(expansion.run()))


@dataclass(frozen=True)
class _Arrival:
    """Images that reach a node by one edge: how many converge on each map, and when the last one is there."""

    images: int
    time: float


class _Expansion:
    """Builds the groups: forward over the nodes, then loss, backward and updates over the nodes reversed."""

    def __init__(
        self, graph: Graph, methods: Mapping[str, str], memoize: frozenset[str], wanted: Sequence[bool]
    ):
        self.graph, self.methods, self.memoize, self.wanted = graph, methods, memoize, wanted
        self.groups: list[TaskGroup] = []
        self.images: dict[int, float] = {}  # by node index: when its images are there
        self.gradients: dict[int, list[_Arrival]] = {node.index: [] for node in graph.nodes}

    def run(self) -> list[TaskGroup]:
        for node in self.graph.nodes:
            self.forward_node(node)
        for node in reversed(self.graph.nodes):
            self.backward_node(node)
        return self.groups

    def add(self, name: str, phase: str, count: int, flop: float, start: float, depth: int = 1) -> float:
        """Append a group of `count` tasks; returns when it ends."""
        self.groups.append(TaskGroup(name, phase, count, float(flop), start, depth))
        return self.groups[-1].end

    def sum(self, name: str, phase: str, maps: int, voxels: int, arrivals: Sequence[_Arrival]) -> float:
        """Add up what converges on each of `maps` images; returns when the sums are there."""
        time = max((arrival.time for arrival in arrivals), default=0.0)
        images = sum(arrival.images for arrival in arrivals)
        if images < 2:
            return time
        return self.add(f"{name} sum", phase, maps * (images - 1), voxels, time, _tree_depth(images))

    def forward_node(self, node: GraphNode) -> None:
        if node.spec.kind == "input":
            self.images[node.index] = self.add(node.name, "data", 1, 0.0, 0.0)
            return
        arrivals = [self.forward_edge(edge) for edge in self.graph.incoming(node.index)]
        time = self.sum(node.name, "forward", node.maps, math.prod(node.extent), arrivals)
        flop = cost.node_cost(node, False, False).phases["forward"].flop
        self.images[node.index] = (
            self.add(node.name, "forward", node.maps, flop / node.maps, time) if flop else time
        )

    def forward_edge(self, edge: GraphEdge) -> _Arrival:
        start, fan_in = self.images[edge.source], self.fans(edge)[0]
        if self.methods.get(edge.name) == "fft":
            return self.spectral(edge, "forward", start, kernels=True, fan=fan_in)[1]
        return _Arrival(fan_in, self.plain(edge, "forward", start))

    def backward_node(self, node: GraphNode) -> None:
        voxels = math.prod(node.extent)
        if node.name in self.graph.outputs:
            loss = self.add(node.name, "loss", node.maps, 3 * voxels, self.images[node.index])
            self.gradients[node.index].append(_Arrival(1, loss))
        if not self.wanted[node.index]:
            return
        time = self.sum(node.name, "backward", node.maps, voxels, self.gradients[node.index])
        if node.spec.transfer != "linear":
            time = self.add(node.name, "backward", node.maps, voxels, time)
        if node.spec.bias:
            self.add(node.name, "update", node.maps, voxels, time)
        for edge in self.graph.incoming(node.index):
            self.backward_edge(edge, time)

    def backward_edge(self, edge: GraphEdge, start: float) -> None:
        spectra = None
        if self.wanted[edge.source]:
            if self.methods.get(edge.name) == "fft":
                kernels = "kernels" not in self.memoize
                spectra, arrival = self.spectral(edge, "backward", start, kernels, fan=self.fans(edge)[1])
            else:
                arrival = _Arrival(self.fans(edge)[1], self.plain(edge, "backward", start))
            self.gradients[edge.source].append(arrival)
        if edge.kind != "conv":
            return
        if self.methods[edge.name] == "fft":
            self.spectral_update(edge, start, spectra if "gradients" in self.memoize else None)
        else:
            self.plain(edge, "update", start)

    def plain(self, edge: GraphEdge, phase: str, start: float) -> float:
        """The tasks of an edge that works on images."""
        pairs = cost.map_pairs(self.graph, edge)
        flop = cost.edge_cost(self.graph, edge, "direct").phases[phase].flop
        return self.add(edge.name, phase, pairs, flop / pairs, start)

    def spectral(
        self, edge: GraphEdge, phase: str, start: float, kernels: bool, fan: int
    ) -> tuple[float, _Arrival]:
        """Transform, multiply, sum `fan` spectra, transform back; when spectra and images are there."""
        pairs, lattices, voxels, one = self.spectral_sizes(edge)
        results = pairs // fan
        sources = self.graph.nodes[edge.source if phase == "forward" else edge.target].maps
        spectra = self.add(f"{edge.name} transform", phase, sources, lattices * one, start)
        ready = spectra
        if kernels:
            ready = max(ready, self.add(f"{edge.name} kernel transform", phase, pairs, one, start))
        products = self.add(edge.name, phase, pairs, 4.0 * lattices * voxels, ready)
        sums = self.sum(edge.name, phase, results, lattices * voxels, [_Arrival(fan, products)])
        return spectra, _Arrival(1, self.add(f"{edge.name} inverse", phase, results, lattices * one, sums))

    def spectral_update(self, edge: GraphEdge, start: float, spectra: float | None) -> None:
        """The update of an fft edge; `spectra`: when backward left the gradient's, None: it did not."""
        pairs, lattices, voxels, one = self.spectral_sizes(edge)
        ready = start if spectra is None else spectra
        if spectra is None:
            maps = self.graph.nodes[edge.target].maps
            ready = self.add(f"{edge.name} gradient transform", "update", maps, lattices * one, start)
        if "images" not in self.memoize:
            maps = self.graph.nodes[edge.source].maps
            ready = max(
                ready, self.add(f"{edge.name} image transform", "update", maps, lattices * one, start)
            )
        products = self.add(edge.name, "update", pairs, 4.0 * lattices * voxels, ready)
        self.add(f"{edge.name} kernel inverse", "update", pairs, one, products)

    def spectral_sizes(self, edge: GraphEdge) -> tuple[int, int, int, float]:
        """Pairs of maps, sub-lattices, voxels of a sub-lattice's transform, operations of that transform."""
        extent = cost.transform_extent(edge)
        return (
            cost.map_pairs(self.graph, edge),
            math.prod(edge.sparsity),
            math.prod(extent),
            cost.transform_flop(extent),
        )

    def fans(self, edge: GraphEdge) -> tuple[int, int]:
        """How many single-map edges converge on a target map forward, and on a source map backward."""
        pairs = cost.map_pairs(self.graph, edge)
        return pairs // self.graph.nodes[edge.target].maps, pairs // self.graph.nodes[edge.source].maps


def _tree_depth(images: int) -> int:
    return (images - 1).bit_length()


def chain(width: int, depth: int, kernel: int) -> NetworkSpec:
    """`depth` convolutions of `width` maps (the input too), kernels of side `kernel`, ReLUs."""
    layers = [{"conv": width, "kernel": kernel, "transfer": "relu"}] * depth
    return NetworkSpec.layered(f"chain_{depth}x{width}", width, layers)


def chain_closed_form(
    width: np.ndarray | int,
    depth: int,
    kernel: int,
    output: int,
    method: str = "fft",
    memoize: Iterable[str] = cost.MEMOIZE,
) -> tuple[np.ndarray, np.ndarray]:
    """T1 and Tinf of one round of `chain(width, depth, kernel)` with an output of side `output`, as formulas.

    `width` may be an array; nothing is propagated to the input. With n_l the side of layer l's images, N the
    voxels of its transforms, F = C N log2 N and L = ceil(log2 f), a forward or backward pass through a layer
    lengthens the critical path by 2 n_l^3 k^3 + L n^3 (direct; n the side of what is summed) or
    2 F + (4 + L) N (fft), an update by 2 n_l^3 k^3 or 2 F + 4 N, whatever is memoized.
    Raises PlanError for an unknown method or memoization switch.
    """
    if method not in cost.METHODS:
        raise PlanError(f"method is {method!r}; expected one of {', '.join(cost.METHODS)}")
    switches = cost.check_memoize(memoize)
    f = np.asarray(width, dtype=float)
    sides = [output + (kernel - 1) * (depth - layer) for layer in range(depth + 1)]
    work, path = 3 * f * sides[-1] ** 3, np.full_like(f, 3 * sides[-1] ** 3)
    forwards, ends = np.zeros_like(f), []
    for layer in range(depth, 0, -1):
        n_in, n_out = sides[layer - 1], sides[layer]
        if method == "direct":
            layer_work, forward, backward, update = _direct_layer(f, n_in, n_out, kernel, layer == 1)
        else:
            layer_work, forward, backward, update = _fft_layer(f, n_in, switches, layer == 1)
        # Bias and transfer function, the function's derivative, the bias's gradient.
        work = work + layer_work + 4 * f * n_out**3
        forwards = forwards + forward + 2 * n_out**3
        path = path + n_out**3
        ends.append(path + update)
        path = path + backward
    return work, forwards + np.max(ends, axis=0)


def _direct_layer(f: np.ndarray, n_in: int, n_out: int, kernel: int, first: bool) -> tuple[np.ndarray, ...]:
    """Work of a layer f -> f, and how long its forward pass, backward pass and update make the path."""
    conv, steps = 2.0 * n_out**3 * kernel**3, np.ceil(np.log2(f))
    sums = f * (f - 1) * (n_out**3 + (0 if first else n_in**3))
    work = f * f * conv * (2 if first else 3) + sums
    return work, conv + steps * n_out**3, conv + steps * n_in**3, conv


def _fft_layer(f: np.ndarray, n_in: int, memoize: frozenset[str], first: bool) -> tuple[np.ndarray, ...]:
    """As `_direct_layer`. The first layer has no backward pass, so nothing that this would leave is kept."""
    voxels = float(cost.smooth_extent(n_in)) ** 3
    one, steps = cost.FFT_CONSTANT * voxels * math.log2(voxels), np.ceil(np.log2(f))
    passes = 1 if first else 2
    images = 2 * passes + ("images" not in memoize) + (first or "gradients" not in memoize)
    kernels = 2 + (not first and "kernels" not in memoize)
    products = 4 * (passes + 1) * f * f + passes * f * (f - 1)
    work = (images * f + kernels * f * f) * one + products * voxels
    through = 2 * one + (4 + steps) * voxels
    return work, through, through, 2 * one + 4 * voxels


def sweep(
    widths: Sequence[int],
    depths: Sequence[int],
    kernel: int,
    output: int,
    methods: Sequence[str] = cost.METHODS,
    processors: Sequence[int] = (8, 18, 40, 60, 120, 240),
) -> list[dict[str, float | int | str]]:
    """T1, Tinf, S_inf and Brent's bound for chains of every width and depth, by method and processors."""
    rows: list[dict[str, float | int | str]] = []
    for depth in depths:
        for width in widths:
            graph = Graph.build(chain(width, depth, kernel), output=output)
            for method in methods:
                tasks = task_graph(graph, method)
                base = {
                    "width": width,
                    "depth": depth,
                    "kernel": kernel,
                    "output": output,
                    "method": method,
                    "work_flop": tasks.work,
                    "span_flop": tasks.span,
                    "parallelism": tasks.parallelism,
                }
                rows += [base | {"processors": p, "bound": tasks.speedup_bound(p)} for p in processors]
    return rows
