"""Any number of threads, every policy and sum, alone and several networks at once: always the same answer."""
from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

import znn
from checks import (NETWORK_TOLERANCE, PLANS, POLICIES, SUMS, assert_close, assert_identical, pair,
                    random_inputs, random_output_gradients, random_parameters, random_targets, small_graph,
                    smooth_inputs, train_alike)
from znn.graph import Graph
from znn.spec import NetworkSpec

plans = pytest.mark.parametrize("plan", PLANS)
policies = pytest.mark.parametrize("policy", POLICIES)


def wide_graph() -> Graph:
    """Many small tasks and long sums: what strains the queue, FORCE and the sums most."""
    return Graph.build(NetworkSpec.layered("wide", 2, [
        {"conv": 16, "kernel": 2, "transfer": "tanh"}, {"max_filter": (1, 2, 2)}, {"dropout": 0.2},
        {"conv": 12, "kernel": (1, 2, 2), "transfer": "tanh"}, {"conv": 2, "kernel": 1}]), output=2)


def trained(graph: Graph, rounds: int, patches: int = 1, **options) -> dict:
    """Everything that training leaves behind, from fixed parameters and fixed data."""
    rng = np.random.default_rng(11)
    count = patches if patches > 1 else None
    optimiser = znn.SGD(rate=0.01, momentum=0.9, weight_decay=0.01)
    with znn.Network(graph, parameters=random_parameters(graph, 2), optimiser=optimiser, patches=patches,
                     input_gradient=True, pin=False, **options) as net:
        losses = [net.train_step(random_inputs(graph, rng, count), random_targets(graph, rng, count))
                  for _ in range(rounds)]
        return {"losses": np.array(losses), "gradient": net.input_gradient(),
                "output": net.forward(random_inputs(graph, rng, count)),
                **net.parameters(), **{f"momentum of {k}": v for k, v in net.momenta().items()}}


# ---- the answer does not depend on who ran what -------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2, 4, 8])
@pytest.mark.parametrize("policy, sum_", list(itertools.product(POLICIES, SUMS)))
def test_every_policy_and_sum_with_few_and_many_threads(rng, policy, sum_, threads):
    net, expected = pair(small_graph("several_ends"), plan="fft", policy=policy, sum=sum_, threads=threads)
    with net:
        train_alike(net, expected, rng)


@plans
@pytest.mark.parametrize("graph, patches", [("multiscale_small", 1), ("multiscale_small", 3), ("wide", 1)])
def test_the_ordered_sum_is_bit_identical_for_any_number_of_threads(graph, patches, plan):
    graph = wide_graph() if graph == "wide" else small_graph(graph)
    expected = trained(graph, 4, patches, plan=plan, sum="ordered", threads=1)
    for threads in range(2, 9):
        assert_identical(trained(graph, 4, patches, plan=plan, sum="ordered", threads=threads), expected,
                         f"with {threads} threads")


@policies
def test_the_ordered_sum_is_bit_identical_under_every_policy(policy):
    graph = wide_graph()
    expected = trained(graph, 4, plan="fft", sum="ordered", threads=1)
    for _ in range(3):
        assert_identical(trained(graph, 4, plan="fft", sum="ordered", threads=4, policy=policy), expected)


# ---- stress -------------------------------------------------------------------------------------------
@policies
@pytest.mark.parametrize("sum_", SUMS)
def test_many_rounds_of_more_threads_than_cores(policy, sum_):
    graph = wide_graph()
    expected = trained(graph, 60, plan="direct", sum="ordered", threads=1)
    actual = trained(graph, 60, plan="direct", sum=sum_, threads=8, policy=policy)
    assert_close(actual, expected, NETWORK_TOLERANCE)


@policies
def test_updates_are_forced_in_time_over_many_overlapping_rounds(rng, policy):
    """backward, forward, backward, ... never waiting for the updates: each forward must see them all."""
    graph = wide_graph()
    parameters = random_parameters(graph, 2)
    options = {"plan": "fft", "sum": "ordered", "parameters": parameters, "policy": policy}
    with (znn.Network(graph, threads=8, pin=False, **options) as net,
          znn.Network(graph, threads=1, **options) as calm):
        for _ in range(60):
            x, gradient = random_inputs(graph, rng), random_output_gradients(graph, rng)
            outputs = net.forward(x, "train"), calm.forward(x, "train")
            net.backward(gradient)
            calm.backward(gradient)
            calm.sync()
            assert_identical(*outputs)
        assert_identical(net.parameters(), calm.parameters())


def test_networks_train_at_once_in_python_threads():
    graph = wide_graph()
    expected = trained(graph, 20, plan="fft", sum="ordered", threads=2)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(trained, graph, 20, plan="fft", sum="ordered", threads=2) for _ in range(4)]
        for job in jobs:
            assert_identical(job.result(timeout=120), expected)


def test_one_network_called_from_several_python_threads():
    """Calls take turns: each gets the answer to its own input."""
    graph = small_graph("dense_2d")
    inputs = [random_inputs(graph, np.random.default_rng(i)) for i in range(4)]
    with znn.Network(graph, plan="direct", sum="ordered", threads=2) as net, ThreadPoolExecutor(4) as pool:
        expected = [net.forward(x) for x in inputs]
        answers = pool.map(lambda i: (i, net.forward(inputs[i])), [n % 4 for n in range(200)])
        for i, answer in answers:
            assert_identical(answer, expected[i])


def test_the_interpreter_runs_while_the_engine_works(rng):
    graph = Graph.build(NetworkSpec.layered("big", 4, [{"conv": 12, "kernel": 5}]), output=40)
    x, counted, stop = random_inputs(graph, rng), [0], threading.Event()

    def count():
        while not stop.wait(0.001):
            counted[0] += 1

    with znn.Network(graph, plan="direct", threads=1) as net:
        counter = threading.Thread(target=count)
        counter.start()
        net.forward(x)
        stop.set()
        counter.join()
    assert counted[0] > 0, "no other Python thread ran during a forward pass: the GIL was held"


# ---- beginnings and ends ------------------------------------------------------------------------------
@plans
def test_networks_come_and_go_without_leaving_threads(rng, plan):
    graph = small_graph("groups")
    x, gradient = random_inputs(graph, rng), random_output_gradients(graph, rng)

    def one_life(threads: int) -> None:
        net = znn.Network(graph, plan=plan, threads=threads, pin=False)
        net.forward(x, "train")
        net.backward(gradient)
        net.close()  # with the updates still queued

    one_life(2)
    before = psutil.Process().num_threads()
    for number in range(40):
        one_life(1 + number % 8)
    assert psutil.Process().num_threads() <= before


def test_a_network_that_is_dropped_frees_its_threads(rng):
    graph = small_graph("groups")
    with znn.Network(graph, threads=2):
        pass
    before = psutil.Process().num_threads()
    for _ in range(10):
        net = znn.Network(graph, threads=4, pin=False)
        net.forward(random_inputs(graph, rng), "train")
        del net
    assert psutil.Process().num_threads() <= before


def test_a_network_never_run_closes():
    for threads in (1, 8):
        znn.Network(small_graph("groups"), threads=threads, pin=False).close()


def test_sync_may_be_called_at_any_time(rng):
    net, expected = pair(small_graph("groups"))
    with net:
        net.sync()
        for n in (net, expected):
            x = smooth_inputs(expected, np.random.default_rng(3))
            n.forward(x, "train")
            n.sync()
            n.backward(np.ones((2, 3, 3, 3), np.float32))
            n.sync()
            n.sync()
        assert_close(net.parameters(), expected.parameters(), NETWORK_TOLERANCE)


@pytest.mark.parametrize("bundle", [1, 8])
def test_the_caller_works_pinned_and_leaves_as_it_came(rng, bundle):
    graph, before = wide_graph(), os.sched_getaffinity(0)
    with znn.Network(graph, threads=1, bundle=bundle, pin=True, trace=True) as net:
        threads = len(psutil.Process().threads())
        net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
        assert len(psutil.Process().threads()) == threads, "one worker: the caller, and no thread besides"
        assert os.sched_getaffinity(0) == before
        assert set(net.trace().events["worker"]) == {0}


def test_inference_between_rounds_of_training_disturbs_neither(rng):
    """The queued updates of a bundled network still read what the forward pass kept when inference begins."""
    graph = small_graph("multiscale_small")
    rounds = [(random_inputs(graph, rng), random_targets(graph, rng)) for _ in range(6)]
    with (znn.Network(graph, threads=2, bundle=8, plan="tiled", seed=3) as disturbed,
          znn.Network(graph, threads=2, bundle=8, plan="tiled", seed=3) as alone):
        for image, target in rounds:
            losses = disturbed.train_step(image, target), alone.train_step(image, target)
            disturbed.forward(image)
            assert losses[0] == losses[1]
        assert_identical(disturbed.parameters(), alone.parameters(), "with inference in between")


@pytest.mark.parametrize("bundle", [1, 8])
def test_with_one_worker_a_round_leaves_nothing_queued(rng, bundle):
    graph = wide_graph()
    with znn.Network(graph, threads=1, bundle=bundle, trace=True) as net:
        net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
        returned = time.perf_counter_ns()
        trace = net.trace()
    assert "update" in {trace.names["phase"][phase] for phase in trace.events["phase"]}
    assert trace.events["end_ns"].max() <= returned


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_piece_of_a_layer_runs_once_whichever_worker_takes_it(rng, threads):
    graph, rounds = wide_graph(), 5
    with znn.Network(graph, threads=threads, bundle=8, trace=True) as net:

        def run(rounds: int) -> Counter:
            for _ in range(rounds):
                net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
            events = net.trace().events
            return Counter(zip(*(events[field].tolist() for field in ("phase", "kind", "group", "a")), strict=True))

        run(1)  # kernels are transformed before it once more
        pieces = run(rounds)
        assert pieces.total() == rounds * net._core.task_count
        assert all(count % rounds == 0 for count in pieces.values()), pieces
