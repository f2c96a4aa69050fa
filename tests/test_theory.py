import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_nets import dags

from znn import cost, theory, zoo
from znn.errors import PlanError
from znn.graph import Graph
from znn.spec import NetworkSpec

widths = st.integers(1, 130)


@given(
    widths,
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(cost.METHODS),
    st.sets(st.sampled_from(cost.MEMOIZE)),
)
def test_task_graph_agrees_with_the_closed_form(width, depth, kernel, output, method, memoize):
    graph = Graph.build(theory.chain(width, depth, kernel), output=output)
    tasks = theory.task_graph(graph, method, memoize)
    work, span = theory.chain_closed_form(width, depth, kernel, output, method, memoize)
    assert tasks.work == pytest.approx(float(work), rel=1e-12)
    assert tasks.span == pytest.approx(float(span), rel=1e-12)


def test_closed_form_takes_arrays_of_widths():
    several = np.array([5, 40, 120])
    work, span = theory.chain_closed_form(several, 6, 3, 4)
    for i, width in enumerate(several):
        assert [work[i], span[i]] == [float(v) for v in theory.chain_closed_form(int(width), 6, 3, 4)]
    with pytest.raises(PlanError, match="'tiled'"):
        theory.chain_closed_form(5, 6, 3, 4, "tiled")


class SingleMaps:
    """Every single map and single-map edge as a task of its own: an independent expansion."""

    def __init__(self):
        self.work = 0.0
        self.span = 0.0

    def task(self, flop, *after):
        """A task after others, given by when they end; when it ends."""
        end = max(after, default=0.0) + flop
        self.work += flop
        self.span = max(self.span, end)
        return end

    def tree(self, ends, flop):
        """A balanced tree of additions that begins when all is there."""
        level = [max(ends)] * len(ends)
        while len(level) > 1:
            pairs = [self.task(flop, *level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
            level = pairs + level[len(level) // 2 * 2 :]
        return level[0]


def single_map_expansion(maps, sides, kernel):
    """A chain of convolutions with ReLU, maps[l] maps of side sides[l], expanded map by map."""
    run = SingleMaps()
    images = [[0.0] * maps[0]]
    for layer in range(1, len(maps)):
        n, conv = sides[layer] ** 3, 2 * sides[layer] ** 3 * kernel**3
        products = [[run.task(conv, a) for a in images[-1]] for _ in range(maps[layer])]
        images.append([run.task(2 * n, run.tree(ends, n)) for ends in products])
    gradients = [run.task(3 * sides[-1] ** 3, a) for a in images[-1]]
    for layer in range(len(maps) - 1, 0, -1):
        n, conv = sides[layer] ** 3, 2 * sides[layer] ** 3 * kernel**3
        gradients = [run.task(n, g) for g in gradients]
        for g in gradients:
            run.task(n, g)
            for a in images[layer - 1]:
                run.task(conv, a, g)
        if layer > 1:
            products = [[run.task(conv, g) for g in gradients] for _ in range(maps[layer - 1])]
            gradients = [run.tree(ends, sides[layer - 1] ** 3) for ends in products]
    return run


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4), st.integers(1, 6))
def test_groups_stand_for_their_single_maps(maps, kernel, output):
    layers = [{"conv": m, "kernel": kernel, "transfer": "relu"} for m in maps[1:]]
    graph = Graph.build(NetworkSpec.layered("net", maps[0], layers), output=output)
    tasks = theory.task_graph(graph, "direct")
    single = single_map_expansion(maps, [node.extent[0] for node in graph.nodes], kernel)
    assert tasks.work == pytest.approx(single.work)
    assert tasks.span == pytest.approx(single.span)


@pytest.mark.parametrize("name", ["scaling_3d", "3d_3", "multiscale"])
@pytest.mark.parametrize("method", cost.METHODS)
@pytest.mark.parametrize("memoize", [(), ("kernels",), ("images", "gradients"), cost.MEMOIZE])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_work_is_the_cost_model_and_the_sums(name, method, memoize, input_gradient):
    graph = Graph.build(zoo.build(name, width=6), output=2)
    tasks = theory.task_graph(graph, method, memoize, input_gradient)
    sums = sum(group.work for group in tasks.groups if group.name.endswith(" sum"))
    modelled = cost.network_cost(graph, method, memoize, input_gradient).flop
    assert 0 < sums < modelled
    assert tasks.work == pytest.approx(modelled + sums)


def test_task_counts_of_a_layer():
    f = 6
    graph = Graph.build(theory.chain(f, 2, 3), output=4)
    tasks = {(g.name, g.phase): g.count for g in theory.task_graph(graph, "fft").groups}
    assert tasks["conv2", "forward"] == tasks["conv2", "backward"] == tasks["conv2", "update"] == f * f
    assert tasks["conv2 transform", "forward"] == tasks["conv2 inverse", "forward"] == f
    assert tasks["conv2 sum", "forward"] == f * (f - 1)
    assert tasks["conv2 kernel transform", "forward"] == tasks["conv2 kernel inverse", "update"] == f * f
    assert ("conv2 kernel transform", "backward") not in tasks and ("conv1", "backward") not in tasks
    assert tasks["conv1 gradient transform", "update"] == f
    assert ("conv2 gradient transform", "update") not in tasks
    assert tasks["output", "loss"] == f and tasks["input", "data"] == 1
    plain = {(g.name, g.phase): g.count for g in theory.task_graph(graph, "fft", ()).groups}
    assert plain["conv2 kernel transform", "backward"] == f * f
    assert plain["conv2 image transform", "update"] == plain["conv2 gradient transform", "update"] == f


@given(dags(), st.sampled_from(cost.METHODS))
def test_random_networks(net_and_extent, method):
    """The span lies between the longest task and all tasks one after another."""
    spec, extent = net_and_extent
    tasks = theory.task_graph(Graph.build(spec, input=extent), method)
    assert max(group.flop for group in tasks.groups) <= tasks.span <= tasks.work
    assert tasks.parallelism >= 1
    ends = {0.0} | {group.end for group in tasks.groups}
    assert all(group.start in ends for group in tasks.groups)


def test_span_grows_with_the_logarithm_of_the_width():
    spans = [
        theory.task_graph(Graph.build(theory.chain(f, 3, 3), output=6), "direct").span
        for f in (32, 33, 64, 65)
    ]
    assert spans[0] < spans[1] == spans[2] < spans[3]
    assert spans[3] - spans[2] == pytest.approx(spans[1] - spans[0])


def test_wider_networks_are_more_parallel():
    found = [
        theory.task_graph(Graph.build(theory.chain(f, 4, 5), output=4)).parallelism for f in (5, 10, 40, 120)
    ]
    assert found == sorted(found) and found[-1] > 240


def test_brent_bound():
    assert theory.brent_bound(1.0, 100) == 1.0
    assert theory.brent_bound(50.0, 1) == 1.0
    assert theory.brent_bound(100.0, 100) == pytest.approx(100 / 1.99)
    assert theory.brent_bound(1e12, 18) == pytest.approx(18)
    with pytest.raises(PlanError, match="processors is 0"):
        theory.brent_bound(10.0, 0)
    with pytest.raises(PlanError, match="nan"):
        theory.brent_bound(10.0, math.nan)


@given(st.floats(1, 1e6), st.floats(1, 1e4))
def test_brent_bound_follows_from_the_theorem(parallelism, processors):
    """T_P <= Tinf + (T1 - Tinf) / P, with Tinf = 1 and T1 = S_inf."""
    slowest = 1 + (parallelism - 1) / processors
    assert theory.brent_bound(parallelism, processors) == pytest.approx(parallelism / slowest)
    assert theory.brent_bound(parallelism, processors) <= min(parallelism, processors) * (1 + 1e-9)


def test_sweep():
    rows = theory.sweep([5, 120], [4, 40], kernel=5, output=8, processors=(8, 240))
    assert len(rows) == 2 * 2 * 2 * 2
    keys = [tuple(row[k] for k in ("width", "depth", "method", "processors")) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        work, span = theory.chain_closed_form(row["width"], row["depth"], 5, 8, row["method"])
        assert row["parallelism"] == pytest.approx(float(work / span))
        assert row["bound"] == pytest.approx(theory.brent_bound(row["parallelism"], row["processors"]))


def test_bound_of_a_task_graph():
    tasks = theory.task_graph(Graph.build(theory.chain(8, 2, 3), output=4))
    assert tasks.speedup_bound(18) == theory.brent_bound(tasks.work / tasks.span, 18)
    assert tasks.task_count == sum(group.count for group in tasks.groups)


def test_an_update_waits_for_the_spectra_that_it_multiplies():
    graph = Graph.build(theory.chain(6, 2, 3), output=4)
    for memoize, phase, name in (
        (cost.MEMOIZE, "backward", "conv2 transform"),
        ((), "update", "conv2 gradient transform"),
    ):
        groups = {
            (group.name, group.phase): group for group in theory.task_graph(graph, "fft", memoize).groups
        }
        assert groups["conv2", "update"].start == groups[name, phase].end > groups[name, phase].start
