"""Whole networks of the engine against the float64 reference, several rounds (1e-4), under every option."""
from __future__ import annotations

import itertools

import numpy as np
import psutil
import pytest

import znn
from checks import (MEMOIZE, NETWORK_TOLERANCE, NETWORKS, PLANS, POLICIES, SUMS, assert_close,
                    assert_identical, pair, random_inputs, random_output_gradients, random_parameters,
                    random_targets, small_graph, smooth_inputs, train_alike)
from znn import zoo
from znn.graph import Graph
from znn.reference import ReferenceNetwork
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec

plans = pytest.mark.parametrize("plan", PLANS)


# ---- training is the reference's, whatever the options ------------------------------------------------
@plans
@pytest.mark.parametrize("patches, weighted", [(None, False), (3, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_training(rng, name, plan, patches, weighted):
    net, expected = pair(small_graph(name), patches=patches, plan=plan)
    with net:
        train_alike(net, expected, rng, rounds=4, patches=patches, weighted=weighted)


@pytest.mark.parametrize("plan", ["model", "autotune"])
@pytest.mark.parametrize("name", ["dense_3d", "multiscale_small"])
def test_training_under_a_chosen_plan(rng, name, plan):
    net, expected = pair(small_graph(name), plan=plan)
    with net:
        train_alike(net, expected, rng)


@pytest.mark.parametrize("patches", [None, 3])
@pytest.mark.parametrize("memoize", MEMOIZE, ids="+".join)
@pytest.mark.parametrize("name", ["dense_3d", "several_ends"])
def test_training_whatever_is_memoized(rng, name, memoize, patches):
    net, expected = pair(small_graph(name), patches=patches, plan="fft", memoize=memoize)
    with net:
        train_alike(net, expected, rng, patches=patches)


@plans
@pytest.mark.parametrize("policy, sum_", list(itertools.product(POLICIES, SUMS)))
def test_training_under_every_policy_and_sum(rng, policy, sum_, plan):
    net, expected = pair(small_graph("multiscale_small"), plan=plan, policy=policy, sum=sum_, threads=3)
    with net:
        train_alike(net, expected, rng)


@pytest.mark.parametrize("allocator", ["pools", "malloc"])
@pytest.mark.parametrize("threads", range(1, 9))
def test_training_with_any_number_of_threads(rng, threads, allocator):
    net, expected = pair(small_graph("strided_3d"), plan="fft", threads=threads, allocator=allocator)
    with net:
        assert net.threads == threads
        train_alike(net, expected, rng)


@plans
@pytest.mark.parametrize("name, form, width, output", [
    ("scaling_3d", "dense", 2, 2), ("3d_3", "strided", 3, 2), ("3d_3", "dense", 2, 3),
    ("multiscale", "dense", 2, 2), ("2d_4", "strided", 2, 2), ("m36", "strided", 2, 1)])
def test_training_of_the_zoo(rng, name, form, width, output, plan):
    """Too many voxels to keep all of them off ReLU's kink: the parameters alone, and a plain random input."""
    graph = Graph.build(zoo.build(name, width=width, form=form), output=output)
    net, expected = pair(graph, plan=plan, optimiser={"rate": 0.001, "momentum": 0.9, "weight_decay": 0.01})
    with net:
        for _ in range(3):
            inputs, targets = random_inputs(graph, rng), random_targets(graph, rng)
            losses = [n.train_step(inputs, targets) for n in (net, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=NETWORK_TOLERANCE)
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")
        assert_close(net.forward(inputs), expected.forward(inputs), NETWORK_TOLERANCE, "output")


@plans
def test_the_papers_round_backward_then_forward(rng, plan):
    """Updates queued by backward must be seen by the very next forward, without any call in between."""
    net, expected = pair(small_graph("groups"), plan=plan, optimiser={"rate": 0.1, "momentum": 0.5,
                                                                      "weight_decay": 0.01})
    with net:
        for number in range(8):
            inputs = smooth_inputs(expected, rng)
            outputs = [n.forward(inputs, "train") for n in (net, expected)]
            assert_close(*outputs, NETWORK_TOLERANCE, f"output of round {number}")
            gradients = random_output_gradients(net.graph, rng)
            for n in (net, expected):
                n.backward(gradients)
        net.sync()
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE, "parameters")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("memoize", MEMOIZE, ids="+".join)
def test_a_loss_that_begins_early_leaves_queued_updates_alone(rng, memoize, policy):
    """One output may be on its way back while another still waits for the update of the round before."""
    edges = [EdgeSpec(f"conv{i}", "conv", "input", f"out{i}", kernel=1) for i in range(3)]
    nodes = [NodeSpec("input", 1, "input"), *(NodeSpec(f"out{i}", 2, "transfer") for i in range(3))]
    graph = Graph.build(NetworkSpec("fan", tuple(nodes), tuple(edges)), output=4)
    net, expected = pair(graph, plan="fft", threads=1, policy=policy, memoize=memoize)
    with net:
        train_alike(net, expected, rng, rounds=4)


def test_a_dense_network_is_the_strided_one_at_every_voxel(rng):
    strided, dense = (zoo.build("3d_3", width=2, form=form) for form in ("strided", "dense"))
    dense_graph, strided_graph = Graph.build(dense, output=(2, 3, 2)), Graph.build(strided, output=1)
    parameters = random_parameters(dense_graph, 3)
    inputs = random_inputs(dense_graph, rng)
    with (znn.Network(dense_graph, parameters=parameters, plan="fft") as net,
          znn.Network(strided_graph, parameters=parameters, plan="direct") as single):
        output, view = net.forward(inputs), strided_graph.node("input").extent
        for z, y, x in np.ndindex(2, 3, 2):
            window = np.ascontiguousarray(inputs[:, z:z + view[0], y:y + view[1], x:x + view[2]])
            alone = single.forward(window)[:, 0, 0, 0]
            assert_close(alone, output[:, z, y, x], NETWORK_TOLERANCE, f"voxel {z, y, x}")


# ---- state --------------------------------------------------------------------------------------------
def test_parameters_and_momenta_survive_bit_for_bit(rng):
    graph = small_graph("multiscale_small")
    with znn.Network(graph, seed=1) as net, znn.Network(graph, seed=2) as other:
        for _ in range(2):
            net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
        other.set_parameters(net.parameters())
        other.set_momenta(net.momenta())
        assert_identical(other.parameters(), net.parameters())
        assert_identical(other.momenta(), net.momenta())
        x = random_inputs(graph, rng)
        assert_close(other.forward(x), net.forward(x), 1e-5)


def test_new_parameters_reach_the_memoized_transforms(rng):
    graph = small_graph("dense_3d")
    net, expected = pair(graph, plan="fft")
    with net:
        for seed in (1, 2, 3):
            parameters = random_parameters(graph, seed)
            net.set_parameters(parameters)
            expected.set_parameters(parameters)
            x = random_inputs(graph, rng)
            assert_close(net.forward(x), expected.forward(x), NETWORK_TOLERANCE, f"output, seed {seed}")


def test_what_is_handed_out_belongs_to_the_caller(rng):
    graph = small_graph("several_ends")
    net, _ = pair(graph)
    with net:
        x, targets = random_inputs(graph, rng), random_targets(graph, rng)
        kept = {name: value.copy() for name, value in x.items()}
        first = net.forward(x)
        again = {name: value.copy() for name, value in first.items()}
        parameters = net.parameters()
        net.train_step({name: 2 * value for name, value in x.items()}, targets)
        assert_identical(x, kept, "inputs")
        assert_identical(first, again, "outputs of an earlier round")
        before = net.parameters()
        for value in (*parameters.values(), *net.momenta().values()):
            value[...] = np.nan
        assert_identical(net.parameters(), before, "parameters")


def test_seed_rounds_and_attributes(rng):
    graph = small_graph("groups")
    with znn.Network(graph.spec, 3, seed=5, optimiser=znn.SGD(rate=0.5)) as net:
        assert net.graph == graph and net.learning_rate == 0.5 and net.optimiser == znn.SGD(rate=0.5)
        assert_identical(net.parameters(), znn.init.initial_parameters(graph, 5))
        assert net.round == 0
        net.forward(random_inputs(graph, rng))
        assert net.round == 0
        for number in range(1, 4):
            net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
            assert net.round == number
        assert all(not np.any(np.isnan(v)) for v in net.momenta().values())


def test_forward_alone_never_changes_the_parameters(rng):
    graph = small_graph("strided_2d")
    with znn.Network(graph) as net:
        before = net.parameters()
        x = random_inputs(graph, rng)
        outputs = [net.forward(x, phase) for phase in ("infer", "train", "infer")]
        assert_close(outputs[2], outputs[0], 1e-6)
        assert_identical(net.parameters(), before)


def test_training_learns(rng):
    """A filter is found again from its own outputs: the loss falls by orders of magnitude."""
    graph = Graph.build(NetworkSpec.layered("f", 1, [{"conv": 1, "kernel": 3}]), output=8)
    teacher = ReferenceNetwork(graph, random_parameters(graph, 7))
    with znn.Network(graph, seed=1, optimiser=znn.SGD(rate=0.05, momentum=0.9)) as net:
        losses = []
        for _ in range(200):
            x = random_inputs(graph, rng)
            losses.append(net.train_step(x, teacher.forward(x).astype(np.float32)))
    assert losses[-1] < 1e-6 * losses[0]


# ---- the long run -------------------------------------------------------------------------------------
@plans
def test_ten_thousand_rounds_do_not_grow_memory(rng, plan):
    spec = NetworkSpec.layered("tiny", 1, [{"conv": 2, "kernel": 2, "transfer": "relu"}, {"max_filter": 2},
                                           {"dropout": 0.5}, {"conv": 1, "kernel": 2}])
    graph = Graph.build(spec, output=2)
    x, t = random_inputs(graph, rng), random_targets(graph, rng)
    process = psutil.Process()
    with znn.Network(graph, plan=plan, threads=2) as net:
        for number in range(10_000):
            net.train_step(x, t)
            if number == 1_000:
                early = process.memory_info().rss
        grown = process.memory_info().rss - early
        assert all(np.all(np.isfinite(v)) for v in net.parameters().values())
    assert grown < 2 << 20, f"resident memory grew by {grown} bytes in 9,000 rounds"


# ---- what memoizing saves -----------------------------------------------------------------------------
@pytest.mark.parametrize("memoize", MEMOIZE, ids="+".join)
def test_transforms_per_round_are_those_of_the_cost_model(rng, memoize):
    """The paper's table for one fully connected layer f -> f': keeping all transforms saves a third."""
    f, g = 3, 4
    graph = Graph.build(NetworkSpec.layered("layer", f, [{"conv": g, "kernel": 3}]), output=4)
    with znn.Network(graph, plan="fft", memoize=memoize, input_gradient=True, threads=2) as net:
        inputs, gradients = random_inputs(graph, rng), random_output_gradients(graph, rng)

        def rounds(number):
            for _ in range(number):
                net.forward(inputs, "train")
                net.backward(gradients)
            net.sync()
            return dict(net.stats()["transforms"])

        before, after = rounds(2), rounds(5)
    counted = {kind: (after[kind] - before[kind]) / 5 for kind in after}
    kept = {kind: 1 if kind in memoize else 2 for kind in ("kernels", "images", "gradients")}
    assert counted == {"kernels": kept["kernels"] * f * g, "images": kept["images"] * f,
                       "gradients": kept["gradients"] * g, "inverse_images": g, "inverse_gradients": f,
                       "inverse_kernels": f * g}
