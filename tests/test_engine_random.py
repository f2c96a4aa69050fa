"""Random small networks, layered and any directed acyclic graph, against the float64 reference (hypothesis).

ZNN_EXAMPLES is the number of examples per property: a few, always the same ones, by default; thousands of new
ones when asked (ZNN_EXAMPLES=3000 pytest tests/test_engine_random.py).
"""
from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from checks import (MEMOIZE, NETWORK_TOLERANCE, POLICIES, SUMS, IllPosed, assert_close, pair, smooth_inputs,
                    train_alike)
from znn.errors import SpecError
from znn.graph import Graph
from znn.reference import valid_extent
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec

EXAMPLES = int(os.environ.get("ZNN_EXAMPLES", 60))
random_networks = settings(max_examples=EXAMPLES, deadline=None, derandomize="ZNN_EXAMPLES" not in os.environ,
                           suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much,
                                                  HealthCheck.data_too_large])

TRANSFERS = ("linear", "relu", "tanh", "logistic")
LOSSES = ("squared", "binomial", "softmax")


def extents(dims: int, largest: int) -> st.SearchStrategy:
    depth = st.just(1) if dims == 2 else st.integers(1, largest)
    return st.tuples(depth, st.integers(1, largest), st.integers(1, largest))


@st.composite
def layers(draw, dims: int) -> dict:
    kind = draw(st.sampled_from(["conv", "conv", "conv", "max_filter", "max_pool", "dropout"]))
    if kind != "conv":
        return {kind: 0.0 if kind == "dropout" else draw(extents(dims, 3))}
    return {"conv": draw(st.integers(1, 3)), "kernel": draw(extents(dims, 4)), "bias": draw(st.booleans()),
            "transfer": draw(st.sampled_from(TRANSFERS)), "rate": draw(st.sampled_from([1.0, 0.5])),
            "weight_decay": draw(st.sampled_from([1.0, 0.0]))}


@st.composite
def layered_graphs(draw) -> Graph:
    dims = draw(st.sampled_from([2, 3]))
    chain = draw(st.lists(layers(dims), min_size=1, max_size=5))
    spec = NetworkSpec.layered("random", draw(st.integers(1, 3)), chain, draw(st.sampled_from(LOSSES)), dims)
    graph = Graph.build(spec, output=draw(extents(dims, 4)))
    assume(np.prod(graph.nodes[0].extent) <= 8000)
    return graph


@st.composite
def acyclic_graphs(draw) -> Graph:
    """Nodes are added one by one; the first edge into each fixes its extent, further ones are made to fit."""
    dims = draw(st.sampled_from([2, 3]))
    nodes, edges, at = [], [], {}
    for i in range(draw(st.integers(1, 2))):
        nodes.append(NodeSpec(f"in{i}", draw(st.integers(1, 3)), "input"))
        # Depth 1 in 2D; large enough for a few operations otherwise.
        at[nodes[-1].name] = tuple(1 if dims == 2 and a == 0 else draw(st.integers(7, 11)) for a in range(3))
    inputs = list(nodes)
    for i in range(draw(st.integers(2, 6))):
        source = inputs[i] if i < len(inputs) else draw(st.sampled_from(nodes))
        first, node, extent = draw(first_edge(f"n{i}", source, at[source.name], dims))
        further = [e for j, other in enumerate(draw(st.lists(st.sampled_from(nodes), max_size=2)))
                   if (e := draw(fitting_edge(f"n{i}_{j}", other, at[other.name], node, extent)))]
        nodes.append(node)
        edges += [first, *further]
        at[node.name] = extent
    spec = NetworkSpec("random", tuple(nodes), tuple(edges), draw(st.sampled_from(LOSSES)), dims)
    outputs = {node.name for node in nodes} - {edge.source for edge in edges}
    given = {node.name: at[node.name] for node in inputs}
    try:
        return Graph.build(spec, input=given, output={name: at[name] for name in outputs})
    except SpecError as error:
        assume("only crop edges" not in str(error))  # between two crops an extent is nobody's to say
        raise


@st.composite
def first_edge(draw, name: str, source: NodeSpec, extent: tuple, dims: int) -> tuple:
    kind = draw(st.sampled_from(["conv", "conv", "depthwise", "max_filter", "max_pool", "crop", "identity"]))
    maps = draw(st.integers(1, 3)) if kind == "conv" else source.maps
    if kind in ("conv", "depthwise") or draw(st.booleans()):
        node = NodeSpec(name, maps, "transfer", draw(st.sampled_from(TRANSFERS)), bias=draw(st.booleans()))
    else:
        node = NodeSpec(name, maps, "sum")
    ends = (f"e_{name}", "conv" if kind == "depthwise" else kind, source.name, name)
    size, sparsity = draw(extents(dims, 3)), draw(extents(dims, 2))
    if kind == "identity":
        return EdgeSpec(*ends), node, extent
    if kind == "crop":
        offset = tuple(draw(st.integers(0, (n - 1) // 3)) for n in extent)
        return EdgeSpec(*ends, offset=offset), node, tuple(n - 2 * o for n, o in zip(extent, offset))
    if kind == "max_pool":
        assume(all(n >= w for n, w in zip(extent, size)))
        stride = tuple(w if (n - w) % w == 0 else 1 for n, w in zip(extent, size))
        out = tuple((n - w) // t + 1 for n, w, t in zip(extent, size, stride))
        return EdgeSpec(*ends, window=size, stride=stride), node, out
    assume(all(n > s * (k - 1) for n, k, s in zip(extent, size, sparsity)))
    options = {"window": size} if kind == "max_filter" else {"kernel": size, "depthwise": kind == "depthwise"}
    return EdgeSpec(*ends, sparsity=sparsity, **options), node, valid_extent(extent, size, sparsity)


@st.composite
def fitting_edge(draw, name: str, source: NodeSpec, extent: tuple, node: NodeSpec, out: tuple
                 ) -> EdgeSpec | None:
    """One more edge into a node of known extent, a convolution or a crop; None where none fits."""
    kernel = tuple(n - m + 1 for n, m in zip(extent, out))
    if min(kernel) < 1:
        return None
    ends = (f"e_{name}", source.name, node.name)
    if source.maps == node.maps and draw(st.booleans()):
        return EdgeSpec(ends[0], "crop", *ends[1:])
    if max(kernel) > 5 or np.prod(kernel) > 60:
        return None
    return EdgeSpec(ends[0], "conv", *ends[1:], kernel=kernel, sparsity=(1, 1, 1))


engine_options = st.fixed_dictionaries({
    "plan": st.sampled_from(["fft", "direct", "model"]), "policy": st.sampled_from(POLICIES),
    "sum": st.sampled_from(SUMS), "memoize": st.sampled_from(MEMOIZE), "threads": st.integers(1, 4),
    "patches": st.sampled_from([None, 1, 2, 3])})
seeds = st.integers(0, 2**32 - 1)


def check(graph: Graph, options: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net, expected = pair(graph, seed=seed, **options)
    patches = options["patches"] if options["patches"] != 1 else None
    try:
        with net:
            inputs = smooth_inputs(expected, rng, patches, tries=10)
            assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "output")
            train_alike(net, expected, rng, 2, patches, weighted=seed % 2 == 1)
    except IllPosed:
        assume(False)


@random_networks
@given(layered_graphs(), engine_options, seeds)
def test_layered_networks(graph, options, seed):
    check(graph, options, seed)


@random_networks
@given(acyclic_graphs(), engine_options, seeds)
def test_acyclic_networks(graph, options, seed):
    check(graph, options, seed)
