"""What several test files share: relative errors, random data for a graph, small networks of every kind."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import znn
from znn import reference
from znn.graph import Graph
from znn.init import initial_parameters
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec

PLANS = ("direct", "fft")
POLICIES = ("priority", "fifo", "lifo", "stealing")
SUMS = ("wait-free", "locked", "ordered")
MEMOIZE = [(), ("kernels",), ("images",), ("gradients",), ("kernels", "images"), ("kernels", "gradients"),
           ("images", "gradients"), ("kernels", "images", "gradients")]
# The bounds the engine is held to: one operation in one phase, and whole networks over several rounds.
OPERATION_TOLERANCE = 1e-5
NETWORK_TOLERANCE = 1e-4
OPTIMISER = {"rate": 0.01, "momentum": 0.9, "weight_decay": 0.02}
# With a small epsilon Adam goes by the sign of a gradient, and that of a tiny one is a matter of rounding.
ADAM = {"rate": 0.01, "momentum": 0.9, "weight_decay": 0.02, "square_momentum": 0.95, "epsilon": 0.1}


# ---- comparing ----------------------------------------------------------------------------------------
def relative_error(actual: Any, expected: Any) -> float:
    """Max norm of the difference over max norm of the expected (the difference's own norm where it is 0)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return 0.0
    error, scale = np.max(np.abs(actual - expected)), np.max(np.abs(expected))
    assert np.isfinite(scale), "the expected array holds NaN or infinity"
    return float("inf") if np.isnan(error) else float(error / scale if scale > 0 else error)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "array") -> None:
    """Arrays or dicts of arrays within the relative error; dicts need the same names."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), f"{what}: {sorted(actual)}, expected {sorted(expected)}"
        for name in expected:
            assert_close(actual[name], expected[name], tolerance, f"{what}[{name}]")
        return
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e} expected"


def assert_identical(actual: Any, expected: Any, what: str = "array") -> None:
    """Bit for bit, arrays or dicts of arrays."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), f"{what}: {sorted(actual)}, expected {sorted(expected)}"
        for name in expected:
            assert_identical(actual[name], expected[name], f"{what}[{name}]")
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert actual.tobytes() == expected.tobytes(), f"{what}: off by {np.max(np.abs(actual - expected)):.2e}"


def numerical_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6
                       ) -> np.ndarray:
    """Central differences of a scalar function, one element of `at` after the other."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        there = at.astype(np.float64).copy()
        there[index] += step
        above = function(there)
        there[index] -= 2 * step
        gradient[index] = (above - function(there)) / (2 * step)
    return gradient


def kink_distance(net: reference.ReferenceNetwork) -> float:
    """How near the last forward came to a point where the gradient jumps, relative to the images' max norm.

    Those are the zeros of ReLU and the ties of maxima. Below the rounding error of float32 two correct
    engines may take different sides, so data are redrawn rather than compared there. Ties that cannot matter
    are not counted: between zeros that ReLU made, and between copies of one voxel (maxima of maxima).
    """
    distances = [np.inf]
    for node in net.graph.nodes:
        if node.spec.kind == "transfer" and node.spec.transfer == "relu":
            magnitude = np.abs(net.sums[node.name])
            distances.append(magnitude.min() / magnitude.max())
    for edge in net.graph.edges:
        if edge.kind in ("max_filter", "max_pool") and not _exact(net.graph, edge.source):
            distances.append(_tie_distance(net, edge))
    return float(min(distances))


def _exact(graph: Graph, node: int) -> bool:
    """Whether a node's voxels are copies of input voxels, which float32 and float64 order alike."""
    incoming, kind = graph.incoming(node), graph.nodes[node].spec.kind
    if kind != "sum":
        return kind == "input"
    return len(incoming) == 1 and incoming[0].kind != "conv" and _exact(graph, incoming[0].source)


def _tie_distance(net: reference.ReferenceNetwork, edge: Any) -> float:
    source = net.graph.nodes[edge.source]
    images, out = net.images[source.name], edge.out_extent
    boxes = [tuple(slice(s * j, s * j + d * (n - 1) + 1, d) for j, s, n, d in
                   zip(tap, edge.sparsity, out, edge.stride)) for tap in np.ndindex(*edge.window)]
    candidates = np.stack([images[(slice(None), slice(None), *box)] for box in boxes])
    best = candidates.max(axis=0)
    tied = (candidates == best).sum(axis=0) > 1
    if source.spec.transfer == "relu":
        tied &= best != 0
    of_maxima = all(e.kind in ("max_filter", "max_pool") for e in net.graph.incoming(edge.source))
    if tied.any() and not of_maxima:
        return 0.0
    below = np.where(candidates < best, candidates, -np.inf).max(axis=0)
    return float(np.min(best - below) / max(np.max(np.abs(images)), 1e-30))


# ---- data -------------------------------------------------------------------------------------------
def by_name_or_alone(arrays: dict[str, np.ndarray]) -> Any:
    """As the networks take and give them: one array alone, several by name."""
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def random_parameters(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """The initial parameters, with the biases made random too."""
    rng = np.random.default_rng(seed)
    return {name: value if value.ndim > 1 else (0.2 * rng.standard_normal(value.shape)).astype(np.float32)
            for name, value in initial_parameters(graph, seed).items()}


def _shaped(graph: Graph, name: str, patches: int | None, maps: int | None = None) -> tuple[int, ...]:
    node = graph.node(name)
    shape = (maps or node.maps, *node.extent)
    return shape if patches is None else (patches, *shape)


def random_inputs(graph: Graph, rng: np.random.Generator, patches: int | None = None) -> Any:
    """float32 inputs; patches None: without the patch axis."""
    return by_name_or_alone({name: rng.standard_normal(_shaped(graph, name, patches)).astype(np.float32)
                             for name in graph.inputs})


def random_output_gradients(graph: Graph, rng: np.random.Generator, patches: int | None = None) -> Any:
    return by_name_or_alone({name: rng.standard_normal(_shaped(graph, name, patches)).astype(np.float32)
                             for name in graph.outputs})


def random_targets(graph: Graph, rng: np.random.Generator, patches: int | None = None) -> Any:
    """Targets that suit the loss: real numbers, probabilities, or those that sum to 1 over the maps."""
    def draw(name: str) -> np.ndarray:
        shape = _shaped(graph, name, patches)
        if graph.spec.loss == "squared":
            return rng.standard_normal(shape)
        target = rng.uniform(0.05, 1.0, shape)
        return target / target.sum(axis=-4, keepdims=True) if graph.spec.loss == "softmax" else target

    return by_name_or_alone({name: draw(name).astype(np.float32) for name in graph.outputs})


def random_weights(graph: Graph, rng: np.random.Generator, patches: int | None = None) -> Any:
    """Voxel weights, the same for all maps of an output; a third of them 0, as in a mask."""
    def draw(name: str) -> np.ndarray:
        weights = rng.uniform(0.5, 2.0, _shaped(graph, name, patches, maps=1))
        weights *= rng.uniform(size=weights.shape) > 1 / 3
        return np.broadcast_to(weights, _shaped(graph, name, patches)).astype(np.float32, order="C")

    return by_name_or_alone({name: draw(name) for name in graph.outputs})


def pair(graph: Graph, seed: int = 1, patches: int | None = None, optimiser: Mapping[str, float] = OPTIMISER,
         **options: Any) -> tuple[znn.Network, reference.ReferenceNetwork]:
    """The engine and the reference with the same parameters. Close the engine (it is a context manager)."""
    parameters = random_parameters(graph, seed)
    options = {"threads": 2, "input_gradient": True, "pin": False} | options
    kind = znn.Adam if "square_momentum" in optimiser else znn.SGD
    net = znn.Network(graph, parameters=parameters, optimiser=kind(**optimiser), patches=patches or 1, **options)
    return net, reference.ReferenceNetwork(graph, parameters, **optimiser)


class IllPosed(Exception):
    """No data far enough from ties and kinks were found."""


def smooth_inputs(net: reference.ReferenceNetwork, rng: np.random.Generator, patches: int | None = None,
                  distance: float = 5e-6, tries: int = 100) -> Any:
    """Random inputs at which the network's gradient is safely unambiguous in float32. Raises IllPosed."""
    for _ in range(tries):
        inputs = random_inputs(net.graph, rng, patches)
        net.forward(inputs, "infer")
        if kink_distance(net) > distance:
            return inputs
    raise IllPosed(f"no inputs of {net.graph.spec.name!r} keep {distance} away from ties and kinks")


def train_alike(net: Any, expected: reference.ReferenceNetwork, rng: np.random.Generator, rounds: int = 3,
                patches: int | None = None, weighted: bool = False, tolerance: float = NETWORK_TOLERANCE
                ) -> None:
    """Train both for several rounds on the same data; every loss, and at the end everything else, must agree.

    net is anything with the methods of `znn.Network`; its input gradient is compared too.
    """
    graph = expected.graph
    for number in range(rounds):
        inputs, targets = smooth_inputs(expected, rng, patches), random_targets(graph, rng, patches)
        weights = random_weights(graph, rng, patches) if weighted else None
        loss, expected_loss = (n.train_step(inputs, targets, weights) for n in (net, expected))
        assert_close(loss, expected_loss, tolerance, f"loss of round {number + 1}")
    assert_close(net.input_gradient(), expected.input_gradient(), tolerance, "input gradient")
    assert_close(net.momenta(), expected.momenta(), tolerance, "momenta")
    if getattr(expected, "square_momentum", None) is not None:
        assert_close(net.second_moments(), expected.second_moments(), tolerance, "second moments")
    assert_close(net.parameters(), expected.parameters(), tolerance, "parameters")
    inputs = smooth_inputs(expected, rng, patches)
    assert_close(net.forward(inputs), expected.forward(inputs), tolerance, "output")


def operation_alike(net: Any, expected: reference.ReferenceNetwork, rng: np.random.Generator,
                    patches: int | None = None, inputs: Any = None) -> None:
    """Forward in both phases, backward and update, to the operations' bound.

    For networks without momentum and weight decay: then the momenta are the parameters' gradients.
    """
    inputs = smooth_inputs(expected, rng, patches) if inputs is None else inputs
    for phase in ("infer", "train"):
        output = net.forward(inputs, phase)
        assert_close(output, expected.forward(inputs, phase), OPERATION_TOLERANCE, f"output ({phase})")
    gradients = random_output_gradients(expected.graph, rng, patches)
    net.backward(gradients)
    expected.backward(gradients)
    assert_close(net.input_gradient(), expected.input_gradient(), OPERATION_TOLERANCE, "input gradient")
    assert_close(net.momenta(), expected.gradients(), OPERATION_TOLERANCE, "parameter gradient")
    assert_close(net.parameters(), expected.parameters(), OPERATION_TOLERANCE, "parameters")


# ---- small networks ---------------------------------------------------------------------------------
def chain(kind: str, in_maps: int = 1, out_maps: int | None = None, **options: Any) -> NetworkSpec:
    """One edge from an input to an output node: the smallest network that holds an operation."""
    target = NodeSpec("output", out_maps or in_maps, "transfer" if kind == "conv" else "sum")
    return NetworkSpec(f"one_{kind}", (NodeSpec("input", in_maps, "input"), target),
                       (EdgeSpec("edge", kind, "input", "output", **options),))


def multiscale() -> NetworkSpec:
    """Two paths of different field of view that meet by a crop, and a residual (identity) edge."""
    nodes = (NodeSpec("image", 2, "input"), NodeSpec("a", 3, "transfer", "relu"), NodeSpec("wide", 3, "sum"),
             NodeSpec("b", 3, "transfer", "tanh"), NodeSpec("c", 3, "transfer", "logistic", bias=False),
             NodeSpec("meet", 3, "sum"), NodeSpec("out", 2, "transfer"))
    edges = (EdgeSpec("conv_a", "conv", "image", "a", kernel=(2, 3, 2)),
             EdgeSpec("filter", "max_filter", "a", "wide", window=(1, 2, 2)),
             EdgeSpec("conv_b", "conv", "wide", "b", kernel=(2, 2, 3)),
             EdgeSpec("conv_c", "conv", "b", "c", kernel=(2, 1, 1), depthwise=True),
             EdgeSpec("crop_a", "crop", "a", "meet"),
             EdgeSpec("crop_b", "crop", "b", "meet", offset=(1, 0, 0)),
             EdgeSpec("residual", "identity", "c", "meet"),
             EdgeSpec("conv_out", "conv", "meet", "out", kernel=(1, 2, 2), sparsity=(1, 2, 1)))
    return NetworkSpec("multiscale_small", nodes, edges)


def several_ends(loss: str = "squared") -> NetworkSpec:
    """Two inputs that converge and two outputs of different extent."""
    nodes = (NodeSpec("image", 1, "input"), NodeSpec("hint", 2, "input"),
             NodeSpec("a", 3, "transfer", "tanh"), NodeSpec("main", 2, "transfer"),
             NodeSpec("b", 3, "transfer", "relu"), NodeSpec("side", 2, "transfer", bias=False))
    edges = (EdgeSpec("conv_image", "conv", "image", "a", kernel=3),
             EdgeSpec("conv_hint", "conv", "hint", "a", kernel=(1, 2, 1)),
             EdgeSpec("conv_main", "conv", "a", "main", kernel=(3, 2, 2)),
             EdgeSpec("conv_b", "conv", "a", "b", kernel=(1, 2, 2), depthwise=True),
             EdgeSpec("conv_side", "conv", "b", "side", kernel=(2, 1, 3)))
    return NetworkSpec("several_ends", nodes, edges, loss)


def _layered(name: str, input_maps: int, *layers: dict, **options: Any) -> NetworkSpec:
    return NetworkSpec.layered(name, input_maps, layers, **options)


# name: (spec, output extent)
NETWORKS: dict[str, tuple[NetworkSpec, Any]] = {spec.name: (spec, output) for spec, output in [
    (_layered("dense_3d", 2, {"conv": 3, "kernel": 3, "transfer": "relu"}, {"max_filter": 2},
              {"conv": 4, "kernel": (2, 3, 1), "transfer": "tanh"}, {"max_filter": (1, 2, 3)},
              {"conv": 2, "kernel": 2}), (2, 1, 2)),
    (_layered("dense_2d", 1, {"conv": 3, "kernel": 4, "transfer": "relu"}, {"max_filter": 3},
              {"conv": 3, "kernel": (3, 2), "transfer": "logistic"}, {"conv": 2, "kernel": 1},
              loss="binomial", dims=2), (5, 6)),
    (_layered("strided_3d", 1, {"conv": 3, "kernel": 2, "transfer": "relu"}, {"max_pool": 2},
              {"conv": 4, "kernel": 3, "transfer": "relu"}, {"max_pool": (2, 1, 3), "stride": (1, 1, 2)},
              {"conv": 3, "kernel": (1, 2, 2)}, loss="softmax"), (1, 2, 1)),
    (_layered("strided_2d", 3, {"conv": 2, "kernel": 5, "transfer": "tanh"}, {"max_pool": 2},
              {"conv": 3, "kernel": 2, "transfer": "relu"}, {"dropout": 0.0}, {"conv": 1, "kernel": 3},
              loss="binomial", dims=2), (3, 5)),
    (_layered("sparse", 2, {"conv": 2, "kernel": 3, "sparsity": 2, "transfer": "logistic"},
              {"conv": 2, "kernel": 2, "sparsity": (1, 2, 3), "depthwise": True, "transfer": "tanh"},
              {"max_filter": (3, 2, 1), "sparsity": (1, 2, 1)}, {"max_filter": (1, 2, 2)},
              {"conv": 2, "kernel": (1, 1, 2), "sparsity": (4, 2, 3)}), (2, 3, 2)),
    (_layered("groups", 1, {"conv": 3, "kernel": 2, "transfer": "tanh", "rate": 0.5, "weight_decay": 0.0},
              {"conv": 3, "kernel": 2, "transfer": "relu", "bias": False, "rate": 2.0},
              {"conv": 2, "kernel": 1, "bias_rate": 0.0, "weight_decay": 3.0}, loss="softmax"), (3, 3, 3)),
    (multiscale(), (3, 4, 5)),
    (several_ends(), {"main": (2, 5, 6), "side": (3, 5, 4)}),
]}


def small_graph(name: str) -> Graph:
    spec, output = NETWORKS[name]
    return Graph.build(spec, output=output)
