import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_nets import dags

from znn import cost, zoo
from znn.errors import PlanError
from znn.graph import Graph
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec


def factors(n):
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def smooth(n):
    return all(p in (2, 3, 5, 7) for p in factors(n)) and factors(n).count(7) <= 1


@given(st.integers(1, 3000))
def test_smooth_extent_is_the_smallest_smooth_one(n):
    found = cost.smooth_extent(n)
    assert found >= n and smooth(found)
    assert not any(smooth(m) for m in range(n, found))


def test_smooth_extents_that_are_known():
    assert [cost.smooth_extent(n) for n in (1, 11, 13, 37, 49, 97, 121)] == [1, 12, 14, 40, 50, 100, 125]


def layer(f=3, g=5, n=20, k=4, sparsity=1, first=False, depthwise=False):
    """A graph in which the layer `c`, f -> g, has an input of side n; not the first layer unless `first`."""
    nodes = [NodeSpec("a", f, "input"), NodeSpec("b", f, "transfer"), NodeSpec("o", g, "transfer", "relu")]
    edges = [
        EdgeSpec("ab", "conv", "a", "b", kernel=1),
        EdgeSpec("c", "conv", "b", "o", kernel=k, sparsity=sparsity, depthwise=depthwise),
    ]
    if first:
        nodes, edges = [nodes[0], nodes[2]], [EdgeSpec("c", "conv", "a", "o", kernel=k)]
    return Graph.build(NetworkSpec("net", nodes, edges), input=n)


def test_direct_multiply_adds_are_the_papers():
    phases = cost.network_cost(layer(), "direct").layer("c").phases
    for phase in cost.PHASES:
        assert phases[phase].multiply_adds == 3 * 5 * 17**3 * 4**3
        assert phases[phase].flop == 2 * phases[phase].multiply_adds
        assert phases[phase].transforms == 0


def transforms(memoize, **kwargs):
    phases = cost.network_cost(layer(**kwargs), "fft", memoize).layer("c").phases
    return [phases[phase].transforms for phase in cost.PHASES]


@given(st.integers(1, 9), st.integers(1, 9))
def test_transforms_are_the_papers(f, g):
    everything = f + g + f * g
    assert transforms((), f=f, g=g) == [everything] * 3
    assert transforms(cost.MEMOIZE, f=f, g=g) == [everything, f + g, f * g]


@pytest.mark.parametrize(
    "memoize, expected",
    [
        (("kernels",), [23, 8, 23]),
        (("images",), [23, 23, 20]),
        (("gradients",), [23, 23, 18]),
        ("images", [23, 23, 20]),
    ],
)
def test_switches_save_one_kind_each(memoize, expected):
    assert transforms(memoize) == expected


def test_memoization_saves_a_third_of_a_wide_layer():
    saved = 1 - sum(transforms(cost.MEMOIZE, f=200, g=200)) / sum(transforms((), f=200, g=200))
    assert saved == pytest.approx(1 / 3, abs=0.01)


def test_kinds_of_transforms():
    phases = cost.network_cost(layer(), "fft", ()).layer("c").phases
    assert [(p.image_transforms, p.inverse_transforms, p.kernel_transforms) for p in phases.values()] == [
        (3, 5, 15),
        (5, 3, 15),
        (8, 0, 15),
    ]


def test_first_layer_has_no_backward_pass_unless_asked_for():
    phases = cost.network_cost(layer(first=True), "fft").layer("c").phases
    assert phases["backward"] == cost.PhaseCost()
    # Nobody has left the gradients' spectra behind, so the update makes them.
    assert (phases["update"].image_transforms, phases["update"].kernel_transforms) == (5, 15)
    asked = cost.network_cost(layer(first=True), "fft", input_gradient=True).layer("c").phases
    assert [asked[phase].transforms for phase in cost.PHASES] == [23, 8, 15]
    assert cost.network_cost(layer(first=True), "direct").layer("c").phases["backward"].flop == 0


def test_fft_operations():
    found = cost.network_cost(layer(n=20), "fft", ()).layer("c")
    assert found.transform_extent == (20, 20, 20)
    one = cost.FFT_CONSTANT * 3 * 20**3 * math.log2(20)  # the paper's 3 C n^3 log2 n
    for phase in cost.PHASES:
        assert found.phases[phase].flop == pytest.approx(23 * one + 15 * 4 * 20**3)
        assert found.phases[phase].multiply_adds == 15 * 20 * 20 * 11


def test_sparse_layers_transform_their_sub_lattices():
    found = cost.network_cost(layer(n=25, sparsity=(1, 2, 3)), "fft", ()).layer("c")
    assert found.transform_extent == (25, 14, 9)
    voxels = 25 * 14 * 9
    one = cost.FFT_CONSTANT * voxels * math.log2(voxels)
    assert found.phases["forward"].flop == pytest.approx(one * (6 * (3 + 5) + 15) + 6 * 15 * 4 * voxels)
    assert found.phases["forward"].transforms == 23


def test_sparsity_saves_work():
    dense = cost.network_cost(layer(n=24, k=2, sparsity=4), "fft").layer("c")
    assert dense.transform_extent == (6, 6, 6)
    assert dense.flop < cost.network_cost(layer(n=24, k=5), "fft").layer("c").flop


def test_depthwise():
    phases = cost.network_cost(layer(g=3, depthwise=True), "fft", ()).layer("c").phases
    assert phases["forward"].transforms == 3 + 3 + 3
    phases = cost.network_cost(layer(g=3, depthwise=True), "direct").layer("c").phases
    assert phases["forward"].multiply_adds == 3 * 17**3 * 64


def test_kept_spectra():
    one = 8 * 20 * 20 * 11
    assert cost.spectrum_bytes((20, 20, 20)) == one
    kept = {
        memoize: cost.network_cost(layer(), "fft", memoize).layer("c").spectra_bytes
        for memoize in ((), ("kernels",), ("images",), ("gradients",), cost.MEMOIZE)
    }
    assert [n // one for n in kept.values()] == [0, 15, 3, 5, 23] and not any(n % one for n in kept.values())
    assert cost.network_cost(layer(), "direct").spectra_bytes == 0
    sparse = cost.network_cost(layer(n=24, k=2, sparsity=4), "fft").layer("c").spectra_bytes
    assert sparse == (15 + 64 * (3 + 5)) * cost.spectrum_bytes((6, 6, 6))


def test_operations_that_are_linear_in_the_voxels():
    nodes = [
        NodeSpec("a", 2, "input"),
        NodeSpec("b", 2, "transfer", "relu"),
        NodeSpec("c", 2, "sum"),
        NodeSpec("d", 2, "sum"),
        NodeSpec("e", 2, "sum"),
    ]
    edges = [
        EdgeSpec("ab", "conv", "a", "b", kernel=1),
        EdgeSpec("bc", "max_filter", "b", "c", window=(1, 2, 3)),
        EdgeSpec("cd", "max_pool", "c", "d", window=(1, 2, 2)),
        EdgeSpec("de", "dropout", "d", "e", ratio=0.5),
    ]
    graph = Graph.build(NetworkSpec("net", nodes, edges), input=(4, 5, 6))
    costs = cost.network_cost(graph, "direct")
    flops = {layer.name: [layer.phases[phase].flop for phase in cost.PHASES] for layer in costs.layers}
    b, c, d = 2 * 4 * 5 * 6, 2 * 4 * 4 * 4, 2 * 4 * 2 * 2
    assert flops["bc"] == [3 * 2 * b, c, 0] and flops["cd"] == [c, d, 0] and flops["de"] == [d, d, 0]
    assert flops["b"] == [2 * b, b, b] and flops["c"] == [0, 0, 0] and flops["e"] == [0, 3 * d, 0]


def test_totals_and_table():
    graph = Graph.build(zoo.build("scaling_3d", width=4), output=12)
    costs = cost.network_cost(graph)
    assert costs.flop == pytest.approx(sum(costs.phase(phase).flop for phase in cost.PHASES))
    assert costs.transforms == sum(layer.phases[p].transforms for layer in costs.layers for p in cost.PHASES)
    lines = str(costs).splitlines()
    assert len(lines) == 1 + len(graph.edges) + len(graph.nodes)
    assert lines[1].split()[:4] == ["conv1", "conv", "fft", "40x40x40"]


def test_methods_can_differ_by_layer():
    graph = layer()
    costs = cost.network_cost(graph, {"ab": "direct", "c": "fft"})
    assert (costs.layer("ab").method, costs.layer("c").method) == ("direct", "fft")
    assert costs.layer("c") == cost.network_cost(graph, "fft").layer("c")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "winograd"}, "'winograd'"),
        ({"method": {"c": "fft"}}, "ab"),
        ({"memoize": ("weights",)}, "weights"),
        ({"method": {"ab": "fft", "c": "fft", "d": "fft"}}, "d too many"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(PlanError, match=words):
        cost.network_cost(layer(), **arguments)
    with pytest.raises(PlanError, match="'q'"):
        cost.network_cost(layer()).layer("q")


def test_gradients_stop_where_nothing_upstream_is_trained():
    nodes = [
        NodeSpec("a", 1, "input"),
        NodeSpec("b", 1, "sum"),
        NodeSpec("c", 1, "sum"),
        NodeSpec("d", 1, "sum"),
    ]
    edges = [
        EdgeSpec("ab", "max_filter", "a", "b", window=2),
        EdgeSpec("bc", "conv", "b", "c", kernel=2),
        EdgeSpec("cd", "identity", "c", "d"),
    ]
    graph = Graph.build(NetworkSpec("net", nodes, edges), output=3)
    assert cost.gradient_nodes(graph) == [False, False, True, True]
    assert cost.gradient_nodes(graph, input_gradient=True) == [True] * 4
    assert cost.network_cost(graph).layer("ab").phases["backward"].flop == 0


@given(dags(), st.sampled_from(cost.METHODS))
def test_random_networks(net_and_extent, method):
    spec, extent = net_and_extent
    graph = Graph.build(spec, input=extent)
    costs = cost.network_cost(graph, method)
    assert math.isfinite(costs.flop) and costs.flop > 0
    more, less = (cost.network_cost(graph, method, memoize) for memoize in ((), cost.MEMOIZE))
    assert more.flop >= less.flop and more.spectra_bytes <= less.spectra_bytes
    assert cost.network_cost(graph, method, input_gradient=True).flop >= costs.flop


def test_a_transfer_function_that_no_gradient_passes_costs_nothing_backward():
    nodes = [
        NodeSpec("a", 2, "input"),
        NodeSpec("b", 2, "transfer", "tanh", bias=False),
        NodeSpec("c", 2, "transfer", "tanh"),
    ]
    edges = [EdgeSpec("ab", "identity", "a", "b"), EdgeSpec("bc", "conv", "b", "c", kernel=1)]
    graph = Graph.build(NetworkSpec("net", nodes, edges), input=3)
    flops = [
        cost.network_cost(graph, input_gradient=g).layer("b").phases["backward"].flop for g in (False, True)
    ]
    assert flops == [0, 2 * 27]
