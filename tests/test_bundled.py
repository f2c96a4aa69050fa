"""The bundled engine: maps in bundles of 8, tiled FFT and direct methods, against the float64 reference."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given

import znn
from checks import (NETWORK_TOLERANCE, NETWORKS, IllPosed, assert_close, assert_identical, pair, random_inputs,
                    random_targets, small_graph, smooth_inputs, train_alike)
from test_engine_random import acyclic_graphs, layered_graphs, random_networks, seeds
from znn import bundled, roofline, zoo
from znn.errors import PlanError, SpecError
from znn.graph import Graph
from znn.plan import LayerPlan, Request

plans = pytest.mark.parametrize("plan", ["direct", "tiled", "model"])


@plans
@pytest.mark.parametrize("patches", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_equals_the_reference(rng, name, patches, plan):
    net, expected = pair(small_graph(name), patches=patches, plan=plan, bundle=8)
    with net:
        train_alike(net, expected, rng, patches=patches, weighted=patches == 3)


@plans
@pytest.mark.parametrize("name, form, width, output", [
    ("scaling_3d", "dense", 9, 2), ("3d_3", "strided", 8, 2), ("3d_5", "strided", 3, 1), ("2d_4", "strided", 9, 2),
    ("multiscale", "dense", 10, 2)])
def test_training_of_the_zoo(rng, name, form, width, output, plan):
    graph = Graph.build(zoo.build(name, width=width, form=form), output=output)
    net, expected = pair(graph, plan=plan, bundle=8, optimiser={"rate": 0.001, "momentum": 0.9, "weight_decay": 0.01})
    with net:
        for _ in range(3):
            inputs, targets = random_inputs(graph, rng), random_targets(graph, rng)
            losses = [n.train_step(inputs, targets) for n in (net, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=NETWORK_TOLERANCE)
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")
        assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "output")


@pytest.mark.parametrize("plan", ["direct", "tiled"])
@pytest.mark.parametrize("name", list(NETWORKS)[:3])
def test_results_are_bit_identical_for_any_number_of_threads_and_policy(rng, name, plan):
    graph = small_graph(name)
    rounds = [(random_inputs(graph, rng), random_targets(graph, rng)) for _ in range(6)]

    def run(threads, policy):
        with znn.Network(graph, plan=plan, bundle=8, threads=threads, policy=policy, pin=False) as net:
            losses = [net.train_step(*data) for data in rounds]
            return {"loss": np.array(losses)} | net.parameters()

    expected = run(1, "priority")
    for threads, policy in itertools.chain(((t, "priority") for t in range(2, 9)), ((3, p) for p in ("fifo", "lifo", "stealing"))):
        assert_identical(run(threads, policy), expected, f"{threads} threads, {policy}")


def filtering_net(dims, transfer, bias):
    side = 2 if dims == 3 else (1, 2, 2)
    layers = [{"conv": 9, "kernel": 3, "transfer": transfer, "bias": bias}, {"max_filter": side},
              {"conv": 6, "kernel": 2, "transfer": transfer, "bias": bias}, {"max_filter": side}, {"conv": 2, "kernel": 2}]
    return Graph.build(znn.NetworkSpec.layered("filters", 1, layers, dims=dims), output=(2, 4, 5) if dims == 3 else (1, 7, 9))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transfer", ["relu", "tanh", "linear"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("width", bundled.widths())
def test_filters_that_convolutions_do(rng, width, dims, transfer, bias):
    graph = filtering_net(dims, transfer, bias)
    whole = tuple(-(-n // s) for n, s in zip(graph.edge("conv2").in_extent, graph.edge("conv2").sparsity))
    plan = {"conv1": "direct", "conv2": ("tiled", whole), "conv3": "direct"}
    left = [row.layer for row in roofline.rows(graph, znn.plan.Plan.of(graph, plan, width), Request(bundle=width))]
    assert set(left) == {"conv1", "conv2", "conv3"}, "a filter is an edge of its own"
    results = []
    for threads in (1, 3):
        net, expected = pair(graph, plan=plan, bundle=width, threads=threads, patches=2)
        with net:
            train_alike(net, expected, np.random.default_rng(3), patches=2)
            results.append(net.parameters())
            inputs = smooth_inputs(expected, rng, 2)
            assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "output of inference")
    assert_identical(*results, "3 threads")
    rounds = [(random_inputs(graph, rng), random_targets(graph, rng)) for _ in range(3)]
    for wanted in (False, True):  # the gradient of the input; without it, it stays as it comes
        with znn.Network(graph, plan=plan, bundle=width, threads=2, input_gradient=wanted, pin=False) as net:
            losses = [net.train_step(*data) for data in rounds]
            results.append(net.parameters() | {"losses": np.array(losses)})
    assert_identical(*results[2:], "with the input's gradient")


def test_what_a_convolution_cannot_filter_is_left_to_an_edge():
    graph = filtering_net(3, "relu", True)
    for conv2 in ("direct", ("tiled", (3, 8, 8))):  # several maps; several tiles
        plan = znn.plan.Plan.of(graph, {"conv1": ("fused", (8, 8, 8)), "conv2": conv2, "conv3": "direct"}, 8)
        left = [row.layer for row in roofline.rows(graph, plan, Request(bundle=8))]
        assert {"filter1", "filter2"} <= set(left)


@pytest.mark.parametrize("plan", ["direct", "tiled"])
def test_backward_then_forward_overlap_the_updates(rng, plan):
    graph = small_graph("dense_3d")
    net, expected = pair(graph, plan=plan, bundle=8, threads=3, optimiser={"rate": 0.01, "momentum": 0.5, "weight_decay": 0.01})
    with net:
        for number in range(10):
            inputs = smooth_inputs(expected, rng)
            outputs = [n.forward(inputs, "train") for n in (net, expected)]
            assert_close(*outputs, NETWORK_TOLERANCE, f"output of round {number}")
            gradient = np.ones_like(outputs[0])
            for n in (net, expected):
                n.backward(gradient)
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")


def test_dropout_masks_are_those_of_the_papers_engine(rng):
    spec = znn.NetworkSpec.layered("d", 3, [{"dropout": 0.4}, {"conv": 9, "kernel": 1}])
    graph = Graph.build(spec, output=(3, 4, 5))
    x = random_inputs(graph, rng)
    outputs = []
    for bundle in (1, 8):
        with znn.Network(graph, bundle=bundle, plan="direct", seed=5) as net:
            outputs.append(net.forward(x, "train"))
    assert_close(outputs[1], outputs[0], 1e-6)


def test_foreign_methods_are_refused():
    with pytest.raises(PlanError, match="fft.*bundle 8"):
        znn.Network(znn.NetworkSpec.layered("n", 1, [{"conv": 2, "kernel": 2}]), 3, bundle=8, plan="fft")
    with pytest.raises(PlanError, match="tiled.*bundle 1"):
        znn.Network(znn.NetworkSpec.layered("n", 1, [{"conv": 2, "kernel": 2}]), 3, plan="tiled")
    with pytest.raises(SpecError, match="bundle is 7"):
        znn.Network(znn.NetworkSpec.layered("n", 1, [{"conv": 2, "kernel": 2}]), 3, bundle=7)


def test_autotuning_chooses_among_measured_candidates_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("ZNN_CACHE", str(tmp_path))
    graph = small_graph("strided_3d")
    with znn.Network(graph, bundle=8, plan="autotune") as net:
        first = net.plan
    assert first.source == "autotune" and all(layer.seconds > 0 for layer in first.layers.values())
    with znn.Network(graph, bundle=8, plan="autotune") as net:
        assert net.plan == first


def check(graph, plan, seed):
    rng = np.random.default_rng(seed)
    net, expected = pair(graph, seed=seed, plan=plan, bundle=8, threads=1 + seed % 3, patches=(None, 2)[seed % 2])
    patches = (None, 2)[seed % 2]
    try:
        with net:
            inputs = smooth_inputs(expected, rng, patches, tries=10)
            assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "output")
            train_alike(net, expected, rng, 2, patches)
    except IllPosed:
        assume(False)


@plans
@random_networks
@given(graph=layered_graphs(), seed=seeds)
def test_random_layered_networks(plan, graph, seed):
    check(graph, plan, seed)


@plans
@random_networks
@given(graph=acyclic_graphs(), seed=seeds)
def test_random_acyclic_networks(plan, graph, seed):
    check(graph, plan, seed)


@pytest.mark.parametrize("patches", [None, 2])
@pytest.mark.parametrize("memoize", [True, False])
@pytest.mark.parametrize("maps, output", [(1, (7, 9, 10)), (3, (7, 9, 10)), (2, (1, 9, 40))])
def test_parts_of_a_fused_layer_find_its_inputs_or_make_them(rng, maps, output, memoize, patches):
    flat = output[0] == 1
    layers = [{"conv": 24, "kernel": (1, 3, 3) if flat else 3, "transfer": "relu"}, {"conv": 2, "kernel": (1, 2, 2) if flat else 2}]
    graph = Graph.build(znn.NetworkSpec.layered("f", maps, layers), output=output)
    plan = znn.Plan({"conv1": LayerPlan("fused", (1, 12, 21) if flat else (10, 6, 7), memoize=memoize), "conv2": LayerPlan("direct")})
    net, expected = pair(graph, plan=plan, bundle=8, patches=patches, threads=8)
    layer = net.plan_request.layers(graph)[0]
    native = layer.native(plan.layers["conv1"].candidate)
    assert native.pieces[4] > 1 and (native.buffer_bytes[2] > 0) == (native.pieces[2] > 0) == memoize
    with net:
        for _ in range(3):
            inputs, targets = random_inputs(graph, rng, patches), random_targets(graph, rng, patches)
            assert_close(net.train_step(inputs, targets), expected.train_step(inputs, targets), NETWORK_TOLERANCE)
        assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "inference")
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")


@pytest.mark.parametrize("transfer", ["linear", "relu"])
@pytest.mark.parametrize("maps, input_gradient", [(1, False), (1, True), (3, False), (4, True)])
def test_the_fused_method_for_few_input_maps(rng, maps, input_gradient, transfer):
    layers = [{"conv": 10, "kernel": (3, 2, 4), "transfer": transfer}, {"max_filter": (1, 2, 2)}, {"conv": 2, "kernel": 2}]
    graph = Graph.build(znn.NetworkSpec.layered("f", maps, layers), output=(7, 9, 10))
    for patches in (None, 2):
        net, expected = pair(graph, plan={"conv1": "fused", "conv2": "tiled"}, bundle=8, patches=patches,
                             input_gradient=input_gradient)
        with net:
            for _ in range(3):
                inputs, targets = random_inputs(graph, rng, patches), random_targets(graph, rng, patches)
                assert_close(net.train_step(inputs, targets), expected.train_step(inputs, targets), NETWORK_TOLERANCE)
            assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")
            if input_gradient:
                assert_close(net.input_gradient(), expected.input_gradient(), NETWORK_TOLERANCE, "input gradient")
