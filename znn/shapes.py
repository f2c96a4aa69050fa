"""Extents, sparsities and fields of view, worked out across a network description. Pure functions on specs.

With valid convolution an edge takes an image of n voxels (per axis) to
    conv         n - s (k - 1)                 kernel k, sparsity s
    max_filter   n - s (w - 1)                 window w, sparsity s
    max_pool     (n - w) / t + 1, exactly      window w, stride t
    crop         n - (a difference the rest of the graph fixes)
    others       n
so that every edge but crop fixes each of its ends from the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from znn.errors import SpecError
from znn.spec import EdgeSpec, Extent, NetworkSpec, as_extent, format_extent

ONES: Extent = (1, 1, 1)


def shrinkage(edge: EdgeSpec, sparsity: Extent) -> Extent:
    """By how many voxels an edge shrinks its image: s (k - 1) per axis (conv, max_filter), 0 for others."""
    size = edge.kernel if edge.kind == "conv" else edge.window if edge.kind == "max_filter" else ONES
    return tuple(s * (k - 1) for s, k in zip(sparsity, size))


def output_extent(edge: EdgeSpec, sparsity: Extent, extent: Extent) -> Extent:
    """The extent of `edge`'s target for a source of `extent` (any kind but crop). Raises SpecError."""
    if edge.kind == "max_pool":
        for n, w, t in zip(extent, edge.window, edge.stride):
            if n < w or (n - w) % t:
                raise SpecError(
                    f"edge {edge.name!r} (max_pool, window {format_extent(edge.window)}, stride "
                    f"{format_extent(edge.stride)}) does not divide its image of {format_extent(extent)}; "
                    f"expected extents of window + a multiple of stride"
                )
        return tuple((n - w) // t + 1 for n, w, t in zip(extent, edge.window, edge.stride))
    out = tuple(n - d for n, d in zip(extent, shrinkage(edge, sparsity)))
    if min(out) < 1:
        name, size = ("kernel", edge.kernel) if edge.kind == "conv" else ("window", edge.window)
        raise SpecError(
            f"edge {edge.name!r} ({edge.kind}) has a {name} of {format_extent(size)} with sparsity "
            f"{format_extent(sparsity)}, larger than its image of {format_extent(extent)}"
        )
    return out


def input_extent(edge: EdgeSpec, sparsity: Extent, extent: Extent) -> Extent:
    """The extent of `edge`'s source that gives a target of `extent` (any kind but crop)."""
    if edge.kind == "max_pool":
        return tuple((n - 1) * t + w for n, w, t in zip(extent, edge.window, edge.stride))
    return tuple(n + d for n, d in zip(extent, shrinkage(edge, sparsity)))


def edge_sparsities(spec: NetworkSpec, order: Sequence[str]) -> dict[str, Extent]:
    """The sparsity of every edge, by name: the given one, else the product of the windows of the max-filters
    upstream.

    A dense net so computes at every voxel what the strided net, with max-pooling in place of filtering,
    computes at one. Edges of kinds without sparsity have (1, 1, 1). Raises SpecError for an edge whose
    sparsity is not given where paths through different max-filters converge upstream.
    """
    products = upstream_windows(spec, order)
    return {
        edge.name: _edge_sparsity(edge, products[edge.source])
        if edge.kind in ("conv", "max_filter")
        else ONES
        for edge in spec.edges
    }


def upstream_windows(spec: NetworkSpec, order: Sequence[str]) -> dict[str, set[Extent]]:
    """For every node the products of the max-filter windows along the paths to it, as a set."""
    incoming = _by_target(spec)
    products: dict[str, set[Extent]] = {}
    for name in order:
        products[name] = set() if incoming[name] else {ONES}
        for edge in incoming[name]:
            window = edge.window if edge.kind == "max_filter" else ONES
            products[name] |= {
                tuple(p * w for p, w in zip(product, window)) for product in products[edge.source]
            }
    return products


def _edge_sparsity(edge: EdgeSpec, upstream: set[Extent]) -> Extent:
    if edge.sparsity is not None:
        return edge.sparsity
    if len(upstream) > 1:
        found = " and ".join(format_extent(p) for p in sorted(upstream))
        raise SpecError(
            f"edge {edge.name!r} ({edge.kind}) has no sparsity and the max-filters on the paths that "
            f"converge upstream give {found}; give its sparsity explicitly"
        )
    return next(iter(upstream))


def node_extents(
    spec: NetworkSpec, sparsities: Mapping[str, Extent], output: Any = None, input: Any = None
) -> dict[str, Extent]:  # noqa: A002 (the contract's word)
    """The extent of every node, by name, from extents of the outputs, of the inputs, or of both.

    `output` and `input` are an extent for all output (input) nodes or a mapping from names to extents.
    Extents are carried over every edge but crop, in both directions, until nothing is new; then every edge is
    checked. Raises SpecError: an extent missing, two requirements that disagree (named, with both values), a
    kernel larger than its image, a pooling window that does not divide, a crop that does not fit.
    """
    known = _given(spec, output, output_names(spec), "output")
    for name, extent in _given(spec, input, input_names(spec), "input").items():
        known[name] = extent
    if not known:
        raise SpecError(f"network {spec.name!r} needs an output or an input extent")
    fixing = [edge for edge in spec.edges if edge.kind != "crop"]
    growing = True
    while growing:
        growing = False
        for edge in fixing:
            if edge.target in known and edge.source not in known:
                known[edge.source] = input_extent(edge, sparsities[edge.name], known[edge.target])
                growing = True
            elif edge.source in known and edge.target not in known:
                known[edge.target] = output_extent(edge, sparsities[edge.name], known[edge.source])
                growing = True
    _check_extents(spec, sparsities, known)
    return {node.name: known[node.name] for node in spec.nodes}


def crop_offset(edge: EdgeSpec, source: Extent, target: Extent) -> Extent:
    """Where in its source a crop edge starts: the given offset, else centred (an odd voxel is left at the far
    end).

    Raises SpecError where the target does not fit into the source at that offset.
    """
    centred = tuple((s - t) // 2 for s, t in zip(source, target))
    offset = centred if edge.offset is None else edge.offset
    if any(o < 0 or o + t > s for o, s, t in zip(offset, source, target)):
        at = "centred" if edge.offset is None else f"at offset {format_extent(offset)}"
        raise SpecError(
            f"edge {edge.name!r} (crop) cannot cut {format_extent(target)} (node {edge.target!r}) {at} "
            f"out of {format_extent(source)} (node {edge.source!r})"
        )
    return offset


def input_names(spec: NetworkSpec) -> tuple[str, ...]:
    """The input nodes, as declared."""
    return tuple(node.name for node in spec.nodes if node.kind == "input")


def output_names(spec: NetworkSpec) -> tuple[str, ...]:
    """The nodes without outgoing edges, as declared."""
    sources = {edge.source for edge in spec.edges}
    return tuple(node.name for node in spec.nodes if node.name not in sources)


def _by_target(spec: NetworkSpec) -> dict[str, list[EdgeSpec]]:
    incoming: dict[str, list[EdgeSpec]] = {node.name: [] for node in spec.nodes}
    for edge in spec.edges:
        incoming[edge.target].append(edge)
    return incoming


def _given(spec: NetworkSpec, value: Any, names: tuple[str, ...], what: str) -> dict[str, Extent]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        value = dict.fromkeys(names, value)
    for name in value:
        if name not in names:
            raise SpecError(
                f"{what} extent is given for {name!r}; the {what} nodes of network {spec.name!r} are "
                f"{', '.join(names)}"
            )
    return {
        name: as_extent(extent, f"extent of {what} node {name!r}", spec.dims)
        for name, extent in value.items()
    }


def _check_extents(spec: NetworkSpec, sparsities: Mapping[str, Extent], known: Mapping[str, Extent]) -> None:
    for node in spec.nodes:
        if node.name not in known:
            raise SpecError(
                f"the extent of node {node.name!r} does not follow from the extents given: only crop edges "
                "lead from it to where extents are known; give the input extent too, or other outputs"
            )
    for edge in spec.edges:
        source, target = known[edge.source], known[edge.target]
        if edge.kind == "crop":
            crop_offset(edge, source, target)
            continue
        out = output_extent(edge, sparsities[edge.name], source)
        if out != target:
            raise SpecError(
                f"edge {edge.name!r} ({edge.kind}) takes node {edge.source!r} of {format_extent(source)} "
                f"to {format_extent(out)}, but its target {edge.target!r} has to be "
                f"{format_extent(target)} by another path or by the extent given"
            )
