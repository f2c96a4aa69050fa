import numpy as np
import pytest

from znn import zoo
from znn.errors import SpecError
from znn.graph import Graph
from znn.init import initial_parameters
from znn.reference import ReferenceNetwork
from znn.spec import NetworkSpec

CHAINS = tuple(name for name in zoo.names() if name != "multiscale")


@pytest.mark.parametrize("name", zoo.names())
def test_every_network_builds_at_its_default_output(name):
    graph = Graph.build(zoo.build(name, width=2), output=zoo.default_output(name))
    assert graph.spec.name == name
    assert graph.nodes[0].maps == 1 and len(graph.outputs) == 1
    assert graph.node(graph.outputs[0]).extent == zoo.default_output(name)


@pytest.mark.parametrize("name", zoo.names())
def test_round_trip(name):
    spec = zoo.build(name)
    assert NetworkSpec.from_toml(spec.to_toml()) == spec


def kernels_and_sparsities(graph):
    convs = [edge for edge in graph.edges if edge.kind == "conv"]
    return [edge.kernel for edge in convs], [edge.sparsity for edge in convs]


def test_scaling_3d():
    graph = Graph.build(zoo.build("scaling_3d", width=7), output=zoo.default_output("scaling_3d"))
    kernels, sparsities = kernels_and_sparsities(graph)
    assert kernels == [(3, 3, 3)] * 4 and sparsities == [(s, s, s) for s in (1, 2, 4, 4)]
    assert [edge.kind for edge in graph.edges] == ["conv", "max_filter", "conv", "max_filter", "conv", "conv"]
    assert [node.extent[0] for node in graph.nodes] == [37, 35, 34, 30, 28, 20, 12]
    assert [node.maps for node in graph.nodes] == [1, 7, 7, 7, 7, 7, 1]
    assert [node.spec.transfer for node in graph.nodes if node.spec.kind == "transfer"] == ["relu"] * 4


def test_scaling_2d():
    graph = Graph.build(zoo.build("scaling_2d", width=7), output=zoo.default_output("scaling_2d"))
    kernels, sparsities = kernels_and_sparsities(graph)
    assert kernels == [(1, 11, 11)] * 6 and sparsities == [(1, s, s) for s in (1, 2, 4, 4, 4, 4)]
    assert [node.extent[2] for node in graph.nodes] == [241, 231, 230, 210, 208, 168, 128, 88, 48]
    assert {node.extent[0] for node in graph.nodes} == {1}
    assert [node.maps for node in graph.nodes] == [1] + [7] * 7 + [3]


@pytest.mark.parametrize(
    "name, dims, kernel", [("3d_3", 3, 3), ("3d_7", 3, 7), ("3d_9", 3, 9), ("2d_10", 2, 10), ("2d_13", 2, 13)]
)
@pytest.mark.parametrize("out", [1, 4])
def test_comparison_nets(name, dims, kernel, out):
    graph = Graph.build(zoo.build(name), output=out)
    side = 4 * out + 19 * (kernel - 1)
    assert graph.nodes[0].extent == ((side,) * 3 if dims == 3 else (1, side, side))
    assert [n.maps for n in graph.nodes if n.spec.kind == "transfer"] == [40, 40, 40, 40, 40, 3]
    assert [n.spec.transfer for n in graph.nodes if n.spec.kind == "transfer"] == ["relu"] * 5 + ["linear"]
    assert [edge.kind for edge in graph.edges] == ["conv", "max_pool"] * 2 + ["conv"] * 4


@pytest.mark.parametrize(
    "name, view, first, later, poolings",
    [("m36", 85, 2, 3, 3), ("m56", 163, 4, 5, 3), ("m76", 117, 6, 7, 2), ("m96", 155, 8, 9, 2)],
)
def test_inference_nets(name, view, first, later, poolings):
    graph = Graph.build(zoo.build(name), output=1)
    assert graph.field_of_view() == (view,) * 3 == graph.nodes[0].extent
    kernels, _ = kernels_and_sparsities(graph)
    assert kernels == [(first,) * 3] + [(later,) * 3] * (poolings + 3)
    assert sum(edge.kind == "max_pool" for edge in graph.edges) == poolings
    assert {node.maps for node in graph.nodes[1:-1]} == {80} and graph.nodes[-1].maps == 3


def test_multiscale_paths_meet():
    graph = Graph.build(zoo.build("multiscale", width=4), output=5)
    assert graph.field_of_view("fine3") == (7, 7, 7)
    assert graph.field_of_view("coarse3") == graph.field_of_view() == (17, 17, 17)
    assert graph.edge("crop").offset == (5, 5, 5)
    assert len(graph.incoming("merged")) == 2


def test_the_fine_path_looks_at_the_middle_of_the_coarse_one():
    """The views of both paths have one centre."""
    graph = Graph.build(zoo.build("multiscale", width=1), output=1)
    offset, fine = graph.edge("crop").offset[0], graph.field_of_view("fine3")[0]
    assert offset + (fine - 1) / 2 == (graph.field_of_view()[0] - 1) / 2


@pytest.mark.parametrize("name", CHAINS)
def test_dense_and_strided_forms_share_parameters_and_view(name):
    dense, strided = (
        Graph.build(zoo.build(name, width=2, form=form), output=1) for form in ("dense", "strided")
    )
    assert dense.parameter_shapes == strided.parameter_shapes
    assert dense.field_of_view() == strided.field_of_view()
    assert {edge.kind for edge in dense.edges} == {"conv", "max_filter"}
    assert {edge.kind for edge in strided.edges} == {"conv", "max_pool"}
    one, two = initial_parameters(dense, 5), initial_parameters(strided, 5)
    assert all(np.array_equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    "name, kernel", [("scaling_3d", 2), ("scaling_2d", 3), ("3d_2", None), ("2d_3", None)]
)
def test_dense_form_computes_at_every_voxel_what_the_strided_form_computes_at_one(name, kernel):
    dense = Graph.build(zoo.build(name, width=2, kernel=kernel, form="dense"), output=3)
    strided = Graph.build(zoo.build(name, width=2, kernel=kernel, form="strided"), output=1)
    parameters = initial_parameters(strided, 1)
    image = np.random.default_rng(0).standard_normal((1, *dense.nodes[0].extent))
    everywhere = ReferenceNetwork(dense, parameters).forward(image)
    view = strided.nodes[0].extent
    assert np.ptp(everywhere) > 0
    for z, y, x in np.ndindex(dense.nodes[-1].extent):
        patch = image[:, z : z + view[0], y : y + view[1], x : x + view[2]]
        one = ReferenceNetwork(strided, parameters).forward(patch)
        np.testing.assert_allclose(everywhere[:, z, y, x], one[:, 0, 0, 0], rtol=1e-9, atol=1e-12)


def test_kernel_and_width_are_taken():
    assert zoo.build("3d_5", width=7, kernel=3) == zoo.build("3d_3", width=7)
    spec = zoo.build("scaling_2d", width=4, kernel=5)
    assert spec.edge("conv1").kernel == (1, 5, 5) and spec.node("nconv1").maps == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "vgg"}, "no network 'vgg' in the zoo; it has scaling_3d"),
        ({"name": "4d_3"}, "'4d_3'"),
        ({"name": "3d_0"}, "'3d_0'"),
        ({"name": "m36", "kernel": 3}, "kernel=3 is given for m36"),
        ({"name": "multiscale", "form": "strided"}, "no strided form"),
        ({"name": "3d_5", "form": "sparse"}, "'sparse'"),
        ({"name": "3d_5", "width": 0}, "maps=0"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(SpecError, match=words):
        zoo.build(**arguments)
    if "no network" in words:
        with pytest.raises(SpecError, match=words):
            zoo.default_output(arguments["name"])
