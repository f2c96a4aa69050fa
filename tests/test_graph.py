import itertools
import math
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_nets import dags

from znn import zoo
from znn.errors import SpecError
from znn.graph import Graph
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec


def built(net_and_extent):
    spec, extent = net_and_extent
    return Graph.build(spec, input=extent)


@given(dags())
def test_order_and_indices(net_and_extent):
    graph = built(net_and_extent)
    assert [node.index for node in graph.nodes] == list(range(len(graph.nodes)))
    assert [edge.index for edge in graph.edges] == list(range(len(graph.edges)))
    assert all(edge.source < edge.target for edge in graph.edges)
    assert [edge.target for edge in graph.edges] == sorted(edge.target for edge in graph.edges)
    for edge in graph.edges:
        assert graph.nodes[edge.source].name == edge.spec.source
        assert graph.nodes[edge.target].name == edge.spec.target
        assert edge.in_extent == graph.nodes[edge.source].extent
        assert edge.out_extent == graph.nodes[edge.target].extent
        assert (edge.offset is None) == (edge.kind != "crop")


@given(dags())
def test_equal_specs_give_equal_graphs(net_and_extent):
    spec, extent = net_and_extent
    assert built(net_and_extent) == Graph.build(NetworkSpec.from_toml(spec.to_toml()), input=extent)


def test_order_of_ready_nodes_is_declaration_order():
    nodes = [NodeSpec(name, 1, "input" if name == "in" else "sum") for name in ("z", "in", "y", "x")]
    edges = [EdgeSpec(f"to_{name}", "identity", "in", name) for name in ("x", "y", "z")]
    graph = Graph.build(NetworkSpec("net", nodes, edges), input=4)
    assert [node.name for node in graph.nodes] == ["in", "z", "y", "x"]
    assert graph.outputs == ("z", "y", "x")


@given(dags(), st.randoms())
def test_extents_do_not_depend_on_the_order_of_declaration(net_and_extent, rng: random.Random):
    spec, extent = net_and_extent
    shuffled = replace(
        spec, nodes=rng.sample(spec.nodes, len(spec.nodes)), edges=rng.sample(spec.edges, len(spec.edges))
    )
    one, two = built(net_and_extent), Graph.build(shuffled, input=extent)
    assert {n.name: n.extent for n in one.nodes} == {n.name: n.extent for n in two.nodes}
    assert one.parameter_count == two.parameter_count


def voxels_seen(graph, axis):
    """Per node, for each of its voxels along an axis, the set of voxels of `input` that it depends on."""
    seen = {graph.node("input").index: [{i} for i in range(graph.node("input").extent[axis])]}
    for node in graph.nodes:
        for edge in graph.incoming(node.index):
            size = (edge.kernel or edge.window or (1, 1, 1))[axis]
            start = edge.offset[axis] if edge.offset else 0
            views = seen.setdefault(node.index, [set() for _ in range(node.extent[axis])])
            for p, j in itertools.product(range(node.extent[axis]), range(size)):
                views[p] |= seen[edge.source][start + p * edge.stride[axis] + j * edge.sparsity[axis]]
    return seen


@given(dags())
def test_field_of_view_against_dependence_voxel_by_voxel(net_and_extent):
    graph = built(net_and_extent)
    seen = [voxels_seen(graph, axis) for axis in range(3)]
    for node in graph.nodes:
        views = [seen[axis][node.index][0] for axis in range(3)]
        assert graph.field_of_view(node.name) == tuple(max(view) - min(view) + 1 for view in views)


def test_field_of_view_by_input():
    nodes = [
        NodeSpec("a", 1, "input"),
        NodeSpec("b", 1, "input"),
        NodeSpec("x", 1, "sum"),
        NodeSpec("y", 1, "sum"),
        NodeSpec("z", 1, "sum"),
    ]
    edges = [
        EdgeSpec("ax", "conv", "a", "x", kernel=(3, 1, 2)),
        EdgeSpec("bx", "conv", "b", "x", kernel=(1, 5, 2)),
        EdgeSpec("xy", "conv", "x", "y", kernel=2),
        EdgeSpec("az", "conv", "a", "z", kernel=1),
    ]
    graph = Graph.build(NetworkSpec("net", nodes, edges), output={"y": 4})
    assert graph.field_of_view("y", "a") == (4, 2, 3)
    assert graph.field_of_view("y", "b") == (2, 6, 3)
    assert graph.field_of_view("y") == (4, 6, 3)
    with pytest.raises(SpecError, match="node 'z' does not depend on b"):
        graph.field_of_view("z", "b")
    with pytest.raises(SpecError, match="outputs y, z"):
        graph.field_of_view()
    with pytest.raises(SpecError, match="no node 'q'"):
        graph.field_of_view("q")


def test_paper_image_sizes():
    graph = Graph.build(zoo.build("scaling_3d"), output=12)
    assert [node.extent[0] for node in graph.nodes] == [37, 35, 34, 30, 28, 20, 12]
    graph = Graph.build(zoo.build("scaling_2d"), output=48)
    assert [node.extent for node in graph.nodes] == [
        (1, n, n) for n in (241, 231, 230, 210, 208, 168, 128, 88, 48)
    ]


def test_parameter_shapes():
    nodes = [
        NodeSpec("a", 3, "input"),
        NodeSpec("b", 4, "transfer"),
        NodeSpec("c", 4, "transfer", bias=False),
        NodeSpec("d", 4, "sum"),
    ]
    edges = [
        EdgeSpec("ab", "conv", "a", "b", kernel=(2, 3, 4)),
        EdgeSpec("bc", "conv", "b", "c", kernel=3, depthwise=True),
        EdgeSpec("bc2", "conv", "b", "c", kernel=3),
        EdgeSpec("cd", "max_filter", "c", "d", window=2),
    ]
    graph = Graph.build(NetworkSpec("net", nodes, edges), output=4)
    assert graph.parameter_shapes == {
        "ab": (4, 3, 2, 3, 4),
        "b": (4,),
        "bc": (4, 1, 3, 3, 3),
        "bc2": (4, 4, 3, 3, 3),
    }
    assert graph.parameter_count == 4 * 3 * 24 + 4 + 4 * 27 + 16 * 27


def test_output_voxels():
    assert Graph.build(zoo.build("scaling_2d", width=2), output=(7, 5)).output_voxels == 35


def test_dot_names_every_node_and_edge_once():
    graph = Graph.build(zoo.build("multiscale"), output=4)
    dot = graph.to_dot()
    assert dot.startswith('digraph "multiscale" {') and dot.endswith("}\n")
    assert len(re.findall(r"^  n\d+ \[", dot, re.M)) == len(graph.nodes)
    arrows = re.findall(r"^  n(\d+) -> n(\d+) \[label=\"([^\\]+)", dot, re.M)
    assert arrows == [(str(e.source), str(e.target), e.name) for e in graph.edges]


def test_refuses_what_is_no_spec():
    with pytest.raises(SpecError, match="from a str"):
        Graph.build("scaling_3d", output=12)


def test_deep_chain_is_built_quickly_and_rightly():
    spec = NetworkSpec.layered("deep", 1, [{"conv": 1, "kernel": 3}] * 40)
    graph = Graph.build(spec, output=1)
    assert graph.field_of_view() == (81, 81, 81) == graph.node("input").extent
    assert math.prod(graph.node("output").extent) == 1
