"""Every operation of the engine, forward, backward and update, against the float64 reference (1e-5)."""
from __future__ import annotations

import numpy as np
import pytest

import znn
from checks import (OPERATION_TOLERANCE, PLANS, assert_close, assert_identical, chain, operation_alike, pair,
                    random_inputs, random_output_gradients, random_targets, random_weights, relative_error)
from znn import reference
from znn.graph import Graph
from znn.spec import NetworkSpec

PLAIN = {"rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
plans = pytest.mark.parametrize("plan", PLANS)
patch_counts = pytest.mark.parametrize("patches", [None, 3])

# (kernel, sparsity, output extent)
CONVOLUTIONS = [
    ((3, 3, 3), (1, 1, 1), (5, 5, 5)),
    ((1, 1, 1), (1, 1, 1), (3, 4, 5)),
    ((2, 2, 2), (1, 1, 1), (4, 6, 5)),
    ((4, 3, 2), (1, 1, 1), (1, 1, 1)),
    ((5, 1, 3), (1, 1, 1), (7, 11, 13)),
    ((1, 1, 7), (1, 1, 1), (1, 1, 40)),
    ((1, 4, 5), (1, 1, 1), (1, 16, 17)),
    ((1, 11, 11), (1, 1, 1), (1, 12, 9)),
    ((5, 5, 5), (1, 1, 1), (12, 12, 12)),
    ((7, 7, 7), (1, 1, 1), (2, 2, 2)),
    ((3, 3, 3), (2, 2, 2), (5, 4, 3)),
    ((2, 3, 4), (1, 2, 3), (2, 7, 5)),
    ((1, 3, 2), (1, 4, 4), (1, 9, 10)),
    ((2, 2, 2), (4, 4, 4), (3, 3, 3)),
    ((3, 1, 2), (5, 1, 7), (1, 2, 3)),
]


def graph_of(spec, output):
    return Graph.build(spec, output=output)


# ---- convolution --------------------------------------------------------------------------------------
@plans
@patch_counts
@pytest.mark.parametrize("kernel, sparsity, output", CONVOLUTIONS)
def test_convolution(rng, plan, patches, kernel, sparsity, output):
    graph = graph_of(chain("conv", 2, 3, kernel=kernel, sparsity=sparsity), output)
    net, expected = pair(graph, patches=patches, plan=plan, optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng, patches)


@plans
@patch_counts
@pytest.mark.parametrize("kernel, sparsity, output", CONVOLUTIONS[::3])
def test_depthwise_convolution(rng, plan, patches, kernel, sparsity, output):
    graph = graph_of(chain("conv", 4, 4, kernel=kernel, sparsity=sparsity, depthwise=True), output)
    net, expected = pair(graph, patches=patches, plan=plan, optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng, patches)


@plans
@pytest.mark.parametrize("in_maps, out_maps", [(1, 1), (1, 9), (9, 1), (7, 17), (16, 8)])
def test_convolution_of_many_maps(rng, plan, in_maps, out_maps):
    graph = graph_of(chain("conv", in_maps, out_maps, kernel=(2, 3, 2)), (3, 4, 4))
    net, expected = pair(graph, plan=plan, optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng)


@plans
def test_convolution_flips_the_kernel(plan):
    """An impulse gives the kernel itself, as a true convolution does (cross-correlation would mirror it)."""
    graph = graph_of(chain("conv", kernel=(2, 3, 4)), (2, 3, 4))
    kernel = np.arange(24, dtype=np.float32).reshape(1, 1, 2, 3, 4)
    impulse = np.zeros((1, 3, 5, 7), np.float32)
    impulse[0, 1, 2, 3] = 1
    with znn.Network(graph, plan=plan, parameters={"edge": kernel, "output": np.zeros(1, np.float32)}) as net:
        assert_close(net.forward(impulse), kernel[0], OPERATION_TOLERANCE)


# ---- max-filter and max-pool --------------------------------------------------------------------------
@patch_counts
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("window, sparsity, output", [
    ((2, 2, 2), (1, 1, 1), (4, 5, 6)), ((3, 1, 4), (1, 1, 1), (3, 3, 3)), ((1, 1, 1), (1, 1, 1), (3, 4, 5)),
    ((1, 5, 5), (1, 1, 1), (1, 9, 8)), ((2, 3, 2), (2, 2, 2), (3, 4, 5)), ((3, 2, 2), (1, 3, 4), (1, 1, 1)),
    ((7, 9, 8), (1, 1, 1), (5, 4, 11)), ((2, 2, 2), (4, 4, 4), (5, 3, 6))])
def test_max_filter(rng, window, sparsity, output, ties, patches):
    graph = graph_of(chain("max_filter", 3, window=window, sparsity=sparsity), output)
    check_maximum(rng, graph, ties, patches)


@patch_counts
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("window, stride, output", [
    ((2, 2, 2), None, (3, 4, 5)), ((1, 2, 2), None, (1, 7, 6)), ((3, 2, 1), (1, 2, 3), (3, 3, 4)),
    ((2, 2, 2), (3, 3, 3), (2, 3, 2)), ((3, 3, 3), (2, 2, 2), (3, 2, 4)), ((4, 4, 4), None, (1, 1, 1))])
def test_max_pool(rng, window, stride, output, ties, patches):
    check_maximum(rng, graph_of(chain("max_pool", 3, window=window, stride=stride), output), ties, patches)


def check_maximum(rng, graph, ties, patches):
    """Values must be exact; with ties (few different values) the gradient goes to the first maximum."""
    inputs = random_inputs(graph, rng, patches)
    if ties:
        inputs = rng.integers(-1, 2, inputs.shape).astype(np.float32)
    net, expected = pair(graph, patches=patches, optimiser=PLAIN)
    with net:
        assert_identical(net.forward(inputs), expected.forward(inputs).astype(np.float32))
        operation_alike(net, expected, rng, patches, inputs)


# ---- transfer functions, dropout, crop, identity ------------------------------------------------------
@patch_counts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transfer", ["linear", "relu", "tanh", "logistic"])
def test_transfer_function(rng, transfer, bias, patches):
    spec = NetworkSpec.layered("t", 2, [{"conv": 3, "kernel": 2, "transfer": transfer, "bias": bias}])
    net, expected = pair(graph_of(spec, (3, 5, 7)), patches=patches, plan="direct", optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng, patches)


@pytest.mark.parametrize("transfer", ["linear", "relu", "tanh", "logistic"])
def test_transfer_function_at_the_ends_and_at_zero(transfer):
    spec = NetworkSpec.layered("t", 1, [{"conv": 1, "kernel": 1, "transfer": transfer, "bias": False}])
    graph = graph_of(spec, (1, 1, 9))
    x = np.array([-1e30, -200, -90, -10, 0, 10, 90, 200, 1e30], np.float32).reshape(1, 1, 1, 9)
    parameters = {"conv1": np.ones((1, 1, 1, 1, 1), np.float32)}
    expected = reference.ReferenceNetwork(graph, parameters)
    with znn.Network(graph, plan="direct", parameters=parameters, input_gradient=True) as net:
        np.testing.assert_allclose(net.forward(x, "train"), expected.forward(x), rtol=1e-5, atol=1e-37)
        for network in (net, expected):
            network.backward(np.ones_like(x))
        np.testing.assert_allclose(net.input_gradient(), expected.input_gradient(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patches", [None, 2])
def test_dropout_drops_the_ratio_scales_and_uses_one_mask_for_both_directions(rng, patches):
    ratio, graph = 0.3, graph_of(chain("dropout", 3, ratio=0.3), (10, 20, 30))
    x = np.abs(random_inputs(graph, rng, patches)) + 0.5
    with znn.Network(graph, input_gradient=True, patches=patches or 1, seed=4) as net:
        assert_identical(net.forward(x, "infer"), x)
        output = net.forward(x, "train")
        kept = output != 0
        assert relative_error(output[kept], x[kept] / (1 - ratio)) < 1e-6
        per_map = kept.mean(axis=(-3, -2, -1))
        sigma = np.sqrt(ratio * (1 - ratio) / 6000)
        assert np.all(np.abs(per_map - (1 - ratio)) < 6 * sigma), "every map drops about the ratio"
        net.backward(np.ones_like(x))
        gradient = net.input_gradient()
        np.testing.assert_array_equal(gradient != 0, kept)
        assert relative_error(gradient[kept] / gradient[kept][0], np.ones(kept.sum())) < 1e-6
        again = net.forward(x, "train") != 0
        assert 0.3 < np.mean(again != kept) < 0.55, "a new round draws a new mask (0.42 of it differs)"
        flat = kept.reshape(-1, 6000)
        assert all(0.3 < np.mean(a != b) < 0.55 for a, b in zip(flat, flat[1:])), "each map has its own mask"


def test_dropout_masks_follow_the_seed(rng):
    graph = graph_of(chain("dropout", 2, ratio=0.5), (4, 8, 8))
    x = np.ones((2, 4, 8, 8), np.float32)

    def masks(seed, threads):
        with znn.Network(graph, seed=seed, threads=threads) as net:
            return np.stack([net.forward(x, "train") for _ in range(3)])

    assert_identical(masks(1, 1), masks(1, 2))
    assert np.any(masks(1, 1) != masks(2, 1))


def test_dropout_of_ratio_zero_changes_nothing(rng):
    net, expected = pair(graph_of(chain("dropout", 2, ratio=0.0), (3, 4, 5)), optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng)


@patch_counts
@pytest.mark.parametrize("offset", [None, (0, 0, 0), (2, 0, 1), (2, 3, 2)])
def test_crop(rng, offset, patches):
    graph = Graph.build(chain("crop", 3, offset=offset), output=(3, 1, 5), input=(5, 4, 7))
    net, expected = pair(graph, patches=patches, optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng, patches)


@patch_counts
def test_identity(rng, patches):
    net, expected = pair(graph_of(chain("identity", 3), (3, 4, 5)), patches=patches, optimiser=PLAIN)
    with net:
        operation_alike(net, expected, rng, patches)


# ---- losses -------------------------------------------------------------------------------------------
@patch_counts
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["squared", "binomial", "softmax"])
def test_loss(rng, loss, weighted, patches):
    spec = NetworkSpec.layered("l", 2, [{"conv": 3, "kernel": (1, 2, 2)}], loss=loss)
    net, expected = pair(graph_of(spec, (3, 4, 5)), patches=patches, plan="direct", optimiser=PLAIN)
    inputs, targets = random_inputs(net.graph, rng, patches), random_targets(net.graph, rng, patches)
    weights = random_weights(net.graph, rng, patches) if weighted else None
    with net:
        losses = [n.train_step(inputs, targets, weights) for n in (net, expected)]
        assert isinstance(losses[0], float)
        assert losses[0] == pytest.approx(losses[1], rel=OPERATION_TOLERANCE)
        assert_close(net.momenta(), expected.gradients(), OPERATION_TOLERANCE, "parameter gradient")
        assert_close(net.input_gradient(), expected.input_gradient(), OPERATION_TOLERANCE, "input gradient")


@pytest.mark.parametrize("loss", ["squared", "binomial", "softmax"])
def test_weights_of_zero_mask_everything(rng, loss):
    spec = NetworkSpec.layered("l", 1, [{"conv": 2, "kernel": 2}], loss=loss)
    net, _ = pair(graph_of(spec, 3), optimiser=PLAIN)
    with net:
        before, targets = net.parameters(), random_targets(net.graph, rng)
        assert net.train_step(random_inputs(net.graph, rng), targets, np.zeros_like(targets)) == 0
        assert_identical(net.parameters(), before)


@pytest.mark.parametrize("loss", ["binomial", "softmax"])
def test_cross_entropies_of_huge_outputs(loss):
    spec = NetworkSpec.layered("l", 2, [{"conv": 2, "kernel": 1, "bias": False}], loss=loss)
    graph = graph_of(spec, (1, 1, 2))
    parameters = {"conv1": np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1, 1)}
    x = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32).reshape(2, 1, 1, 2)
    targets = np.array([[0, 0], [1, 1]], np.float32).reshape(2, 1, 1, 2)
    expected = reference.ReferenceNetwork(graph, parameters)
    with znn.Network(graph, parameters=parameters, plan="direct", input_gradient=True) as net:
        assert net.train_step(x, targets) == pytest.approx(expected.train_step(x, targets), rel=1e-6)
        np.testing.assert_allclose(net.input_gradient(), expected.input_gradient(), rtol=1e-5, atol=1e-6)


# ---- the optimiser ------------------------------------------------------------------------------------
def test_momentum_decay_and_multipliers_over_many_steps(rng):
    spec = NetworkSpec.layered("s", 1, [{"conv": 2, "kernel": 2, "rate": 0.5, "weight_decay": 3.0,
                                         "bias_rate": 2.0}, {"conv": 2, "kernel": 1, "rate": 0.0}])
    optimiser = {"rate": 0.02, "momentum": 0.8, "weight_decay": 0.1}
    net, expected = pair(graph_of(spec, (3, 4, 4)), plan="direct", optimiser=optimiser)
    with net:
        frozen = net.parameters()["conv2"]
        for _ in range(10):
            inputs, gradients = random_inputs(net.graph, rng), random_output_gradients(net.graph, rng)
            for n in (net, expected):
                n.forward(inputs, "train")
                n.backward(gradients)
        assert_close(net.momenta(), expected.momenta(), OPERATION_TOLERANCE, "momenta")
        assert_close(net.parameters(), expected.parameters(), OPERATION_TOLERANCE, "parameters")
        assert_identical(net.parameters()["conv2"], frozen)


def test_the_learning_rate_can_be_changed_between_rounds(rng):
    net, expected = pair(graph_of(chain("conv", 1, 2, kernel=2), 3), plan="direct")
    with net:
        for rate in (0.1, 0.01, 0.0):
            inputs, targets = random_inputs(net.graph, rng), random_targets(net.graph, rng)
            for n in (net, expected):
                n.learning_rate = rate
                n.train_step(inputs, targets)
            assert net.learning_rate == pytest.approx(rate)
            assert_close(net.parameters(), expected.parameters(), OPERATION_TOLERANCE, f"at {rate}")
