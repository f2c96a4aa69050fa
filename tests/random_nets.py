"""Hypothesis strategies for network descriptions."""

from __future__ import annotations

from hypothesis import strategies as st

from znn.spec import EDGE_KINDS, INIT_KINDS, LOSSES, TRANSFERS, EdgeSpec, Init, NetworkSpec, NodeSpec

numbers = st.floats(0.0, 10.0)
inits = st.builds(Init, st.sampled_from(INIT_KINDS), st.one_of(st.none(), numbers))


def extents(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


def shrink(edge_kind: str, size: tuple[int, ...], sparsity: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s * (k - 1) for k, s in zip(size, sparsity))


@st.composite
def dags(draw: st.DrawFn, most_nodes: int = 7) -> tuple[NetworkSpec, tuple[int, int, int]]:
    """A valid network of one width and an input extent that fits it, converging paths made to meet by crops.

    Sparsities are explicit, and images stay large enough for every kernel.
    """
    maps = draw(st.integers(1, 3))
    start = (60, 50, 40)
    nodes = [NodeSpec("input", maps, "input")]
    extent = {"input": start}
    edges: list[EdgeSpec] = []
    for i in range(draw(st.integers(1, most_nodes))):
        target = f"node{i}"
        source = draw(st.sampled_from(nodes)).name
        edge, extent[target] = draw(_edges(f"edge{i}", source, target, extent[source]))
        edges.append(edge)
        for j, other in enumerate(nodes):
            fits = all(a >= b for a, b in zip(extent[other.name], extent[target]))
            if fits and draw(st.booleans()):
                edges.append(draw(_joins(f"join{i}.{j}", other.name, target, extent)))
        nodes.append(draw(_nodes(target, maps)))
    loss = draw(st.sampled_from(LOSSES))
    order = draw(st.permutations(nodes))
    return NetworkSpec("random", tuple(order), tuple(draw(st.permutations(edges))), loss), start


@st.composite
def _nodes(draw: st.DrawFn, name: str, maps: int) -> NodeSpec:
    if draw(st.booleans()):
        return NodeSpec(name, maps, "sum")
    return NodeSpec(
        name,
        maps,
        "transfer",
        draw(st.sampled_from(TRANSFERS)),
        draw(st.booleans()),
        draw(inits),
        draw(numbers),
    )


@st.composite
def _edges(draw: st.DrawFn, name: str, source: str, target: str, extent: tuple[int, ...]):
    """An edge of any kind but crop, with the extent of its target."""
    kind = draw(st.sampled_from([kind for kind in EDGE_KINDS if kind != "crop"]))
    if kind == "conv":
        size, sparsity = draw(extents(1, 3)), draw(extents(1, 2))
        edge = EdgeSpec(
            name,
            kind,
            source,
            target,
            kernel=size,
            sparsity=sparsity,
            depthwise=draw(st.booleans()),
            init=draw(inits),
            rate=draw(numbers),
            weight_decay=draw(numbers),
        )
    elif kind == "max_filter":
        size, sparsity = draw(extents(1, 3)), draw(extents(1, 2))
        edge = EdgeSpec(name, kind, source, target, window=size, sparsity=sparsity)
    elif kind == "max_pool":
        # A window that leaves a whole number of strides.
        stride = draw(extents(1, 2))
        size = tuple(t + (n % t) for n, t in zip(extent, stride))
        edge = EdgeSpec(name, kind, source, target, window=size, stride=stride)
        out = tuple((n - w) // t + 1 for n, w, t in zip(extent, size, stride))
        return (edge, out) if min(out) > 4 else (EdgeSpec(name, "identity", source, target), extent)
    else:
        ratio = draw(st.floats(0.0, 0.99)) if kind == "dropout" else None
        return EdgeSpec(name, kind, source, target, ratio=ratio), extent
    out = tuple(n - d for n, d in zip(extent, shrink(kind, size, sparsity)))
    return (edge, out) if min(out) > 4 else (EdgeSpec(name, "identity", source, target), extent)


@st.composite
def _joins(
    draw: st.DrawFn, name: str, source: str, target: str, extent: dict[str, tuple[int, ...]]
) -> EdgeSpec:
    """A second edge into `target`: a convolution that happens to fit, or a crop."""
    difference = tuple(a - b for a, b in zip(extent[source], extent[target]))
    if max(difference) <= 3 and draw(st.booleans()):
        return EdgeSpec(name, "conv", source, target, kernel=tuple(d + 1 for d in difference), sparsity=1)
    offset = tuple(draw(st.integers(0, d)) for d in difference) if draw(st.booleans()) else None
    return EdgeSpec(name, "crop", source, target, offset=offset)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 50),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["conv", "input", "sum", "transfer", "max_pool", "crop", "a", "b", "msra"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
