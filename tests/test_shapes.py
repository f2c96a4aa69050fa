import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_nets import dags, extents

from znn import shapes
from znn.errors import SpecError
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec, topological_order

ONES = (1, 1, 1)


def brute_force_positions(n, size, spread, stride):
    """How many places a window of `size` taps `spread` apart has in `n` voxels, every `stride` voxels."""
    return len([p for p in range(0, n, stride) if p + spread * (size - 1) < n])


@given(st.sampled_from(["conv", "max_filter"]), extents(1, 5), extents(1, 3), extents(13, 30))
def test_sliding_edges_count_window_positions(kind, size, sparsity, extent):
    key = "kernel" if kind == "conv" else "window"
    edge = EdgeSpec("e", kind, "a", "b", **{key: size})
    out = shapes.output_extent(edge, sparsity, extent)
    assert out == tuple(brute_force_positions(n, k, s, 1) for n, k, s in zip(extent, size, sparsity))
    assert shapes.input_extent(edge, sparsity, out) == extent


@given(extents(1, 4), extents(1, 4), extents(1, 20))
def test_pooling_counts_window_positions_and_divides(window, stride, extent):
    edge = EdgeSpec("e", "max_pool", "a", "b", window=window, stride=stride)
    fits = all(n >= w and (n - w) % t == 0 for n, w, t in zip(extent, window, stride))
    if not fits:
        with pytest.raises(SpecError, match="'e'"):
            shapes.output_extent(edge, ONES, extent)
        return
    out = shapes.output_extent(edge, ONES, extent)
    assert out == tuple(brute_force_positions(n, w, 1, t) for n, w, t in zip(extent, window, stride))
    assert shapes.input_extent(edge, ONES, out) == extent


@given(extents(1, 20))
def test_other_edges_keep_the_extent(extent):
    for edge in (EdgeSpec("e", "identity", "a", "b"), EdgeSpec("e", "dropout", "a", "b", ratio=0.5)):
        assert shapes.output_extent(edge, ONES, extent) == extent == shapes.input_extent(edge, ONES, extent)


def test_a_kernel_as_large_as_the_image_fits_and_a_larger_one_does_not():
    edge = EdgeSpec("big", "conv", "a", "b", kernel=(1, 3, 5))
    assert shapes.output_extent(edge, ONES, (1, 3, 5)) == ONES
    with pytest.raises(SpecError, match="'big' .*kernel of 1x3x5 .*larger than its image of 1x3x4"):
        shapes.output_extent(edge, ONES, (1, 3, 4))
    with pytest.raises(SpecError, match="sparsity 1x2x1"):
        shapes.output_extent(edge, (1, 2, 1), (1, 4, 5))


def net(*edges, maps=1):
    names = dict.fromkeys(name for edge in edges for name in (edge.source, edge.target))
    inputs = set(names) - {edge.target for edge in edges}
    nodes = [NodeSpec(name, maps, "input" if name in inputs else "sum") for name in names]
    return NetworkSpec("net", nodes, edges)


def sparsities(spec):
    return shapes.edge_sparsities(spec, topological_order(spec))


def conv(name, source, target, kernel=3, **kwargs):
    return EdgeSpec(name, "conv", source, target, kernel=kernel, **kwargs)


def test_filters_multiply_the_sparsity_of_what_follows():
    spec = net(
        conv("c1", "a", "b"),
        EdgeSpec("f1", "max_filter", "b", "c", window=(1, 2, 3)),
        conv("c2", "c", "d"),
        EdgeSpec("f2", "max_filter", "d", "e", window=2),
        EdgeSpec("d1", "dropout", "e", "f", ratio=0.5),
        EdgeSpec("p1", "max_pool", "f", "g", window=2),
        conv("c3", "g", "h"),
    )
    assert sparsities(spec) == {
        "c1": ONES,
        "f1": ONES,
        "c2": (1, 2, 3),
        "f2": (1, 2, 3),
        "d1": ONES,
        "p1": ONES,
        "c3": (2, 4, 6),
    }


def test_given_sparsity_stands_and_does_not_change_what_follows():
    spec = net(
        EdgeSpec("f1", "max_filter", "a", "b", window=2, sparsity=3),
        conv("c1", "b", "c", sparsity=5),
        conv("c2", "c", "d"),
    )
    assert sparsities(spec) == {"f1": (3, 3, 3), "c1": (5, 5, 5), "c2": (2, 2, 2)}


def test_converging_paths_that_disagree_need_an_explicit_sparsity():
    edges = [
        EdgeSpec("f", "max_filter", "a", "b", window=2),
        EdgeSpec("i", "identity", "b", "d"),
        conv("c", "a", "d", kernel=2),
    ]
    with pytest.raises(SpecError, match="'out' .*1x1x1 and 2x2x2; give its sparsity explicitly"):
        sparsities(net(*edges, conv("out", "d", "e")))
    assert sparsities(net(*edges, conv("out", "d", "e", sparsity=2)))["out"] == (2, 2, 2)
    # Nothing downstream needs it: no error.
    assert set(sparsities(net(*edges, EdgeSpec("out", "identity", "d", "e"))).values()) == {ONES}


def test_converging_paths_that_agree_need_none():
    spec = net(
        EdgeSpec("f", "max_filter", "a", "b", window=2),
        EdgeSpec("g", "max_filter", "a", "c", window=2),
        EdgeSpec("i", "identity", "b", "d"),
        EdgeSpec("j", "identity", "c", "d"),
        conv("out", "d", "e"),
    )
    assert sparsities(spec)["out"] == (2, 2, 2)


def resolve(spec, **kwargs):
    return shapes.node_extents(spec, sparsities(spec), **kwargs)


def test_both_directions():
    spec = net(conv("k", "a", "b"), EdgeSpec("p", "max_pool", "b", "c", window=2))
    expected = {"a": (10, 10, 10), "b": (8, 8, 8), "c": (4, 4, 4)}
    assert resolve(spec, output=4) == resolve(spec, input=10) == resolve(spec, output=4, input=10) == expected
    with pytest.raises(SpecError, match="edge 'p' .*node 'b' of 10x10x10 to 5x5x5.*'c' has to be 4x4x4"):
        resolve(spec, output=4, input=12)
    with pytest.raises(SpecError, match="needs an output or an input extent"):
        resolve(spec)


def test_converging_requirements_that_disagree_are_named_with_both_values():
    spec = net(conv("c", "a", "b", 3), EdgeSpec("i", "identity", "b", "d"), conv("e", "a", "d", 4))
    for given_extent in ({"output": 5}, {"input": 9}):
        with pytest.raises(SpecError, match="edge '[cie]' .*x.*has to be .*x"):
            resolve(spec, **given_extent)


def test_crop_absorbs_the_difference():
    spec = net(conv("c", "a", "b", 3), EdgeSpec("crop", "crop", "b", "d"), conv("e", "a", "d", 6))
    assert (
        resolve(spec, output=5)
        == resolve(spec, input=10)
        == {"a": (10, 10, 10), "b": (8, 8, 8), "d": (5, 5, 5)}
    )


def test_a_crop_that_cannot_be_worked_out_or_does_not_fit():
    spec = net(conv("c", "a", "b"), EdgeSpec("crop", "crop", "b", "d", offset=(2, 2, 2)))
    with pytest.raises(SpecError, match="extent of node 'a' does not follow"):
        resolve(spec, output=4)
    assert resolve(spec, output=4, input=8)["b"] == (6, 6, 6)
    with pytest.raises(SpecError, match="'crop' .*5x5x5 .*'d'.* at offset 2x2x2 out of 6x6x6 .*'b'"):
        resolve(spec, output=5, input=8)
    with pytest.raises(SpecError, match="centred"):
        resolve(net(conv("c", "a", "b"), EdgeSpec("crop", "crop", "b", "d")), output=7, input=8)


@given(extents(0, 6), extents(1, 9))
def test_centred_crop_leaves_at_most_one_voxel_more_at_the_far_end(more, target):
    source = tuple(m + t for m, t in zip(more, target))
    offset = shapes.crop_offset(EdgeSpec("e", "crop", "a", "b"), source, target)
    for o, s, t in zip(offset, source, target):
        assert 0 <= (s - t - o) - o <= 1


def test_several_inputs_and_outputs():
    spec = net(
        conv("a1", "a", "x", 3), conv("b1", "b", "x", 5), conv("o1", "x", "p", 2), conv("o2", "x", "q", 4)
    )
    expected = {"a": (9, 9, 9), "b": (11, 11, 11), "x": (7, 7, 7), "p": (6, 6, 6), "q": (4, 4, 4)}
    assert resolve(spec, output={"p": 6, "q": 4}) == resolve(spec, output={"q": 4}) == expected
    assert resolve(spec, input={"a": 9}) == resolve(spec, input={"a": 9, "b": 11}) == expected
    with pytest.raises(SpecError, match="has to be"):
        resolve(spec, output=4)
    with pytest.raises(SpecError, match="output extent is given for 'x'.*p, q"):
        resolve(spec, output={"x": 4})
    with pytest.raises(SpecError, match="input extent is given for 'p'"):
        resolve(spec, input={"p": 4})


def test_extents_for_2d_networks():
    spec = NetworkSpec.layered("net", 1, [{"conv": 1, "kernel": 3}], dims=2)
    assert resolve(spec, output=8)["input"] == (1, 10, 10)
    assert resolve(spec, output=(8, 6))["input"] == (1, 10, 8)
    assert resolve(spec, output=(2, 8, 8))["input"] == (2, 10, 10)  # a stack of sections, each on its own
    with pytest.raises(SpecError, match="extent of output node 'output' is 0"):
        resolve(spec, output=0)


@given(dags(), st.data())
def test_random_networks_resolve_consistently(net_and_extent, data):
    """Every edge's rule holds, and the outputs give the input back wherever they fix it."""
    spec, start = net_and_extent
    found = resolve(spec, input=start)
    for edge in spec.edges:
        source, target = found[edge.source], found[edge.target]
        if edge.kind == "crop":
            assert all(s >= t for s, t in zip(source, target))
            continue
        size = edge.kernel or edge.window or ONES
        spread = edge.sparsity or ONES
        stride = edge.stride or ONES
        assert target == tuple(brute_force_positions(*a) for a in zip(source, size, spread, stride))
    outputs = {name: found[name] for name in shapes.output_names(spec)}
    assert resolve(spec, input=start, output=outputs) == found
    try:
        back = resolve(spec, output=outputs)
    except SpecError:
        assume(any(edge.kind == "crop" for edge in spec.edges))
        return
    assert back == found
