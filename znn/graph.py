"""A network description with every extent resolved, in topological order, ready to be planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from znn import shapes
from znn.errors import SpecError
from znn.spec import EdgeSpec, Extent, NetworkSpec, NodeSpec, format_extent, topological_order


@dataclass(frozen=True)
class GraphNode:
    """A node group of one extent `(z, y, x)`; `index` is its place in `Graph.nodes`."""

    index: int
    spec: NodeSpec
    extent: Extent

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def maps(self) -> int:
        return self.spec.maps


@dataclass(frozen=True)
class GraphEdge:
    """An edge group between the nodes of index `source` and `target`.

    kernel, window and offset are None for kinds that have none; sparsity and stride are (1, 1, 1) there.
    offset (crop) is resolved.
    """

    index: int
    spec: EdgeSpec
    source: int
    target: int
    sparsity: Extent
    stride: Extent
    offset: Extent | None
    in_extent: Extent
    out_extent: Extent

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def kernel(self) -> Extent | None:
        return self.spec.kernel

    @property
    def window(self) -> Extent | None:
        return self.spec.window


@dataclass(frozen=True)
class Graph:
    """A network with extents. Build it with `Graph.build`.

    nodes are in topological order (of several possible ones, declaration order decides), edges by target,
    then as declared; so both are the same for equal specs. inputs and outputs are names, as declared.
    """

    spec: NetworkSpec
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def build(cls, spec: NetworkSpec, output: Any = None, input: Any = None) -> Graph:  # noqa: A002
        """Resolve the extents of `spec` from its output extents, its input extents, or both.

        output, input: an extent (int, (y, x) or (z, y, x)) for all output (input) nodes, or {name: extent}.
        Raises SpecError, naming the edge or node, where they do not fit together; see
        `znn.shapes.node_extents`.
        """
        if not isinstance(spec, NetworkSpec):
            raise SpecError(f"cannot build a graph from a {type(spec).__name__}; expected a NetworkSpec")
        order = topological_order(spec)
        sparsities = shapes.edge_sparsities(spec, order)
        extents = shapes.node_extents(spec, sparsities, output, input)
        index = {name: i for i, name in enumerate(order)}
        nodes = tuple(GraphNode(i, spec.node(name), extents[name]) for i, name in enumerate(order))
        declared = sorted(spec.edges, key=lambda edge: index[edge.target])
        edges = tuple(
            GraphEdge(
                i,
                edge,
                index[edge.source],
                index[edge.target],
                sparsities[edge.name],
                edge.stride or shapes.ONES,
                _offset(edge, extents),
                extents[edge.source],
                extents[edge.target],
            )
            for i, edge in enumerate(declared)
        )
        return cls(spec, nodes, edges, shapes.input_names(spec), shapes.output_names(spec))

    def node(self, name: str) -> GraphNode:
        """The node called `name`. Raises SpecError."""
        return _find(self.nodes, name, "node")

    def edge(self, name: str) -> GraphEdge:
        """The edge called `name`. Raises SpecError."""
        return _find(self.edges, name, "edge")

    def incoming(self, node: str | int) -> tuple[GraphEdge, ...]:
        """The edges that converge on a node, given by name or index."""
        index = self.node(node).index if isinstance(node, str) else node
        return tuple(edge for edge in self.edges if edge.target == index)

    def outgoing(self, node: str | int) -> tuple[GraphEdge, ...]:
        """The edges that leave a node, given by name or index."""
        index = self.node(node).index if isinstance(node, str) else node
        return tuple(edge for edge in self.edges if edge.source == index)

    @property
    def output_voxels(self) -> int:
        """z * y * x of the output node; summed where there are several outputs."""
        return sum(math.prod(self.node(name).extent) for name in self.outputs)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters: kernels (out, in, z, y, x) by edge name, biases (maps,) by node name."""
        result: dict[str, tuple[int, ...]] = {}
        for node in self.nodes:
            for edge in self.incoming(node.index):
                if edge.kind == "conv":
                    fan = 1 if edge.spec.depthwise else self.nodes[edge.source].maps
                    result[edge.name] = (node.maps, fan, *edge.kernel)
            if node.spec.bias:
                result[node.name] = (node.maps,)
        return result

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    def field_of_view(self, node: str | None = None, input: str | None = None) -> Extent:  # noqa: A002
        """The extent of the input region that one voxel of `node` depends on.

        node: default the only output. input: the input node meant; default all, and the largest extent per
        axis. Where paths converge it is the smallest box that holds the view along every path. Raises
        SpecError.
        """
        if node is None:
            if len(self.outputs) > 1:
                raise SpecError(
                    f"the network has the outputs {', '.join(self.outputs)}; say which field of view"
                )
            node = self.outputs[0]
        target = self.node(node).index
        inputs = self.inputs if input is None else (input,)
        views = [self._view(self.node(name).index, target) for name in inputs]
        if not any(views):
            raise SpecError(f"node {node!r} does not depend on {', '.join(inputs)}")
        return tuple(max(axis) for axis in zip(*filter(None, views)))

    def _view(self, source: int, target: int) -> Extent | None:
        """Field of view of node `target` on the node `source`, None where it does not depend on it."""
        views: list[tuple[_View, _View, _View] | None] = [None] * len(self.nodes)
        views[source] = ({1: (0, 0)}, {1: (0, 0)}, {1: (0, 0)})
        for edge in self.edges:
            if (view := views[edge.source]) is not None:
                beyond = views[edge.target] or ({}, {}, {})
                views[edge.target] = tuple(
                    _through(edge, axis, view[axis], beyond[axis]) for axis in range(3)
                )
        if views[target] is None:
            return None
        ends = [list(view.values()) for view in views[target]]
        return tuple(max(b for _, b in axis) - min(a for a, _ in axis) + 1 for axis in ends)

    def to_dot(self) -> str:
        """The network in the DOT language of Graphviz."""
        lines = [f"digraph {_quote(self.spec.name)} {{", "  rankdir=LR;", "  node [shape=box];"]
        for node in self.nodes:
            detail = node.spec.transfer if node.spec.kind == "transfer" else node.spec.kind
            label = f"{node.name}\\n{node.maps} x {format_extent(node.extent)}\\n{detail}"
            lines.append(f"  n{node.index} [label={_quote(label)}];")
        for edge in self.edges:
            label = f"{edge.name}\\n{_detail(edge)}"
            lines.append(f"  n{edge.source} -> n{edge.target} [label={_quote(label)}];")
        return "\n".join([*lines, "}"]) + "\n"


def _offset(edge: EdgeSpec, extents: Mapping[str, Extent]) -> Extent | None:
    if edge.kind != "crop":
        return None
    return shapes.crop_offset(edge, extents[edge.source], extents[edge.target])


def _find(items: tuple[Any, ...], name: str, what: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise SpecError(f"the graph has no {what} {name!r}; it has {', '.join(item.name for item in items)}")


# What a node sees of an image along one axis: by how far apart the views of neighbouring voxels are on a
# path, the first and the last voxel that voxel 0 sees.
_View = dict[int, tuple[int, int]]


def _through(edge: GraphEdge, axis: int, view: _View, beyond: _View) -> _View:
    """The view of `edge`'s target: what it sees through the edge, added to what it sees by others."""
    start = edge.offset[axis] if edge.offset else 0
    if edge.kind == "max_pool":
        reach = edge.window[axis] - 1
    else:
        reach = shapes.shrinkage(edge.spec, edge.sparsity)[axis]
    result = dict(beyond)
    for step, (first, last) in view.items():
        ends = (first + step * start, last + step * (start + reach))
        old = result.get(step * edge.stride[axis], ends)
        result[step * edge.stride[axis]] = (min(old[0], ends[0]), max(old[1], ends[1]))
    return result


def _detail(edge: GraphEdge) -> str:
    size = edge.kernel or edge.window
    text = edge.kind if size is None else f"{edge.kind} {format_extent(size)}"
    if edge.sparsity != (1, 1, 1):
        text += f" sparsity {format_extent(edge.sparsity)}"
    if edge.kind == "max_pool":
        text += f" stride {format_extent(edge.stride)}"
    return text


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
