import math

import numpy as np
import pytest

from znn import zoo
from znn.errors import SpecError
from znn.graph import Graph
from znn.init import initial_parameters
from znn.spec import EdgeSpec, Init, NetworkSpec, NodeSpec


def kernel(init, in_maps=20, out_maps=40, size=(2, 5, 5), depthwise=False, name="c"):
    nodes = [NodeSpec("a", in_maps, "input"), NodeSpec("b", out_maps, "transfer")]
    edge = EdgeSpec(name, "conv", "a", "b", kernel=size, init=init, depthwise=depthwise)
    return initial_parameters(Graph.build(NetworkSpec("net", nodes, [edge]), output=1), seed=3)[name]


def test_arrays_are_what_the_engine_takes():
    graph = Graph.build(zoo.build("scaling_3d", width=3), output=2)
    parameters = initial_parameters(graph, 0)
    assert {name: array.shape for name, array in parameters.items()} == graph.parameter_shapes
    assert all(
        a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable for a in parameters.values()
    )
    assert all(not parameters[node.name].any() for node in graph.nodes if node.name in parameters)


@pytest.mark.parametrize(
    "init, sigma",
    [
        (Init("gaussian", 0.3), 0.3),
        (Init("uniform", 0.3), 0.3 / math.sqrt(3)),
        (Init("msra"), math.sqrt(2 / (20 * 50))),
        (Init("msra", 2.0), 2 * math.sqrt(2 / (20 * 50))),
        (Init("xavier"), math.sqrt(6 / (20 * 50 + 40 * 50)) / math.sqrt(3)),
    ],
)
def test_standard_deviation(init, sigma):
    values = kernel(init).astype(float)
    assert values.size == 40_000
    assert abs(values.mean()) < 5 * sigma / math.sqrt(values.size)
    assert values.std() == pytest.approx(sigma, rel=0.03)


def test_uniform_ranges():
    for init, half in ((Init("uniform", 0.3), 0.3), (Init("xavier"), math.sqrt(6 / (60 * 50)))):
        values = kernel(init)
        assert (
            abs(values).max() <= half * (1 + 1e-6)
            and values.max() > 0.99 * half
            and values.min() < -0.99 * half
        )


def test_depthwise_counts_one_map():
    values = kernel(Init("msra"), 400, 400, depthwise=True)
    assert values.shape == (400, 1, 2, 5, 5)
    assert values.std() == pytest.approx(math.sqrt(2 / 50), rel=0.03)
    assert abs(kernel(Init("xavier"), 400, 400, depthwise=True)).max() == pytest.approx(
        math.sqrt(6 / 100), rel=0.01
    )


def test_constants_and_biases():
    assert np.all(kernel(Init("constant", -1.5)) == -1.5)
    spec = NetworkSpec.layered(
        "net", 1, [{"conv": 50, "kernel": 1, "bias_init": {"kind": "uniform", "value": 0.5}}]
    )
    bias = initial_parameters(Graph.build(spec, output=1), 0)["output"]
    assert bias.shape == (50,) and 0.3 < abs(bias).max() <= 0.5


def test_streams_depend_on_seed_and_name_alone():
    graph = Graph.build(zoo.build("3d_3", width=3), output=1)
    deeper = Graph.build(NetworkSpec.layered("deeper", 1, [{"conv": 3, "kernel": 3}] * 7), output=1)
    one, same, other = (initial_parameters(graph, seed) for seed in (1, 1, 2))
    more = initial_parameters(deeper, 1)
    for name in ("conv1", "conv2", "conv5"):
        assert np.array_equal(one[name], same[name]) and np.array_equal(one[name], more[name])
        assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one["conv2"], one["conv3"])


def test_values_are_the_same_on_every_machine():
    """Pinned: a change here changes what a seed means in every record."""
    values = kernel(Init("uniform", 1.0), 1, 1, (1, 1, 4)).ravel()
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, SHA256_OF_C))))
    assert np.array_equal(values, generator.uniform(-1, 1, 4).astype(np.float32))


# The first 16 bytes, little-endian, of sha256(b"c").
SHA256_OF_C = int.from_bytes(bytes.fromhex("2e7d2c03a9507ae265ecf5b5356885a5"), "little")


@pytest.mark.parametrize("seed", [-1, 1.5, None, "1", True])
def test_seeds_that_are_none(seed):
    with pytest.raises(SpecError, match="seed"):
        initial_parameters(Graph.build(zoo.build("3d_3", width=1), output=1), seed)
