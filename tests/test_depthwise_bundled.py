"""Depthwise layers of networks in bundles of maps: against the float64 reference, bundle 1, and as they are planned."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import znn
from checks import (ADAM, NETWORK_TOLERANCE, IllPosed, assert_close, assert_identical, chain,
                    operation_alike, pair, random_inputs, random_targets, smooth_inputs, train_alike)
from test_engine_random import TRANSFERS, extents, random_networks, seeds
from test_native import RUNS_HERE
from znn import _core, bundled, cli, roofline
from znn import plan as planning
from znn.errors import PlanError
from znn.graph import Graph
from znn.plan import Plan, Request

# No momentum and no weight decay: the momenta are the gradients.
PLAIN = {"rate": 0.01, "momentum": 0.0, "weight_decay": 0.0}
BUNDLES = [bundle for bundle in (8, 16) if _core.has_bundle(bundle)]
bundles = pytest.mark.parametrize("bundle", BUNDLES)


def block(maps: int, kernel: object, **layer: object) -> Graph:
    """Depthwise layers between a first and a last convolution, beside a max-filter and dropout."""
    layers = [{"conv": maps, "kernel": 2, "transfer": "relu"}, {"max_filter": (1, 2, 2)},
              {"conv": maps, "kernel": kernel, "depthwise": True, "transfer": "tanh", **layer}, {"dropout": 0.0},
              {"conv": maps, "kernel": 1, "transfer": "relu"}, {"conv": maps, "kernel": (2, 1, 3), "depthwise": True},
              {"conv": 2, "kernel": 1}]
    return Graph.build(znn.NetworkSpec.layered("block", 3, layers), output=(3, 4, 7))


@bundles
@pytest.mark.parametrize("patches", [None, 3])
@pytest.mark.parametrize("maps, kernel, sparsity, output", [
    (1, 3, 1, 5), (8, 7, 1, (3, 4, 24)), (9, (2, 4, 6), 1, (4, 3, 5)), (20, (1, 5, 5), 1, (1, 9, 13)), (3, (1, 1, 17), 1, (2, 3, 31)),
    (11, (9, 1, 1), (2, 1, 1), (3, 5, 2)), (16, 1, 1, (5, 6, 40)), (7, 3, (1, 2, 3), 6), (5, (3, 2, 2), 4, (3, 2, 1))])
def test_one_layer_in_every_phase(rng, bundle, patches, maps, kernel, sparsity, output):
    graph = Graph.build(chain("conv", maps, kernel=kernel, sparsity=sparsity, depthwise=True), output=output)
    net, expected = pair(graph, patches=patches, optimiser=PLAIN, bundle=bundle, plan="direct")
    with net:
        assert net.parameters()["edge"].shape == (maps, 1, *graph.edge("edge").kernel)
        operation_alike(net, expected, rng, patches)


@bundles
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("optimiser", [None, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("patches", [None, 2])
def test_training_among_other_layers(rng, patches, optimiser, threads, bundle):
    options = {} if optimiser is None else {"optimiser": optimiser}
    net, expected = pair(block(11, (3, 4, 5)), patches=patches, bundle=bundle, threads=threads, **options)
    with net:
        train_alike(net, expected, rng, 5, patches, weighted=patches == 2)


@st.composite
def depthwise_nets(draw: st.DrawFn) -> Graph:
    """One to three depthwise layers, of any extents and sparsity, below and above other layers or none."""
    dims, maps = draw(st.sampled_from([2, 3])), draw(st.integers(1, 18))
    layers = [{"conv": maps, "kernel": draw(extents(dims, 2)), "transfer": draw(st.sampled_from(TRANSFERS))}] * draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        depth, height, width = draw(extents(dims, 5))
        kernel = depth, height, draw(st.sampled_from([width, draw(st.integers(6, 16))]))
        layers.append({"conv": maps, "kernel": kernel, "sparsity": draw(extents(dims, 3)), "depthwise": True,
                       "bias": draw(st.booleans()), "transfer": draw(st.sampled_from(TRANSFERS)),
                       "rate": draw(st.sampled_from([1.0, 0.5]))})
        layers += [{"max_filter": draw(extents(dims, 2)), "sparsity": 1}] * draw(st.booleans())
    spec = znn.NetworkSpec.layered("depthwise", layers[0]["conv"] if "depthwise" in layers[0] else 2, layers, dims=dims)
    graph = Graph.build(spec, output=draw(extents(dims, 6)))
    assume(np.prod(graph.nodes[0].extent) <= 20000)
    return graph


@random_networks
@given(graph=depthwise_nets(), seed=seeds)
def test_random_networks(graph, seed):
    rng, patches = np.random.default_rng(seed), (None, 2)[seed % 2]
    net, expected = pair(graph, seed=seed, bundle=BUNDLES[seed % len(BUNDLES)], threads=1 + seed % 4, patches=patches)
    try:
        with net:
            assert_close(net.forward(inputs := smooth_inputs(expected, rng, patches, tries=10)), expected.forward(inputs),
                         NETWORK_TOLERANCE, "output")
            train_alike(net, expected, rng, 2, patches)
    except IllPosed:
        assume(False)


def trained(graph, rounds, **options):
    with znn.Network(graph, seed=5, pin=False, **options) as net:
        losses = [net.train_step(*data) for data in rounds]
        return {"loss": np.array(losses)} | net.parameters()


def test_bundles_train_as_single_maps_do_and_alike_to_the_bit_for_any_threads(rng):
    """Dropout included, whose masks are the same."""
    layers = [{"conv": 10, "kernel": 3, "depthwise": True, "transfer": "tanh"}, {"dropout": 0.3},
              {"conv": 10, "kernel": (1, 3, 5), "depthwise": True}, {"conv": 2, "kernel": 1}]
    graph = Graph.build(znn.NetworkSpec.layered("n", 10, layers), output=(4, 5, 9))
    rounds = [(random_inputs(graph, rng), random_targets(graph, rng)) for _ in range(5)]
    expected = trained(graph, rounds, bundle=8, threads=1)
    for threads in (2, 3, 4):
        assert_identical(trained(graph, rounds, bundle=8, threads=threads), expected, f"{threads} threads")
    assert_close(expected, trained(graph, rounds, bundle=1, threads=2, plan="direct"), NETWORK_TOLERANCE, "bundle 1")


@pytest.mark.parametrize("isa", RUNS_HERE)
def test_every_instruction_set(isa):
    if not RUNS_HERE[isa]:
        pytest.skip(f"this processor has no {isa}")
    name = "test_one_layer_in_every_phase"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{name}"], timeout=300,
                          cwd=Path(__file__).parent, env={**os.environ, "ZNN_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]


# ---- plans ------------------------------------------------------------------------------------------------
def test_plans_are_direct_in_depthwise_layers():
    graph = block(16, 5)
    tiled = Plan.uniform(graph, "tiled", 8)
    assert {name: layer.method for name, layer in tiled.layers.items()} == {
        "conv1": "tiled", "conv2": "direct", "conv3": "tiled", "conv4": "direct", "conv5": "tiled"}
    layer = next(layer for layer in bundled.layers(graph, 8) if layer.name == "conv2")
    assert [c.method for c in layer.ranked()] == ["direct"] and layer.tiles(5) == []
    for plan in ("model", "autotune"):
        assert planning.resolve(plan, graph, bundle=8).layers["conv2"].method == "direct"
    for method in ("tiled", ("tiled", (8, 8, 8))):
        with pytest.raises(PlanError, match="edge 'conv2'.*depthwise.*direct"):
            Plan.of(graph, dict.fromkeys(planning.conv_names(graph), "direct") | {"conv2": method}, 8)


def test_auto_takes_bundles():
    with znn.Network(block(8, 3), bundle="auto", threads=1) as net:
        assert net.bundle > 1


def test_describe_says_how_they_are_done(tmp_path, capsys):
    block(8, 3).spec.save(tmp_path / "net.toml")
    assert cli.main(["describe", str(tmp_path / "net.toml"), "--output", "3,4,7"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("conv2 ")]
    assert [row[1:3] for row in rows[-3:]] == [["direct", name] for name in ("forward", "backward", "update")]


def test_memory_and_bounds_count_one_kernel_per_map():
    graph = block(16, 5)
    setting = Request(bundle=8).setting(graph)
    layer = next(layer for layer in bundled.layers(graph, 8) if layer.name == "conv2")
    candidate, = layer.ranked()
    native = layer.native(candidate)
    assert native.kernel_bytes == 4 * 16 * 125
    flops = 2 * np.prod(graph.edge("conv2").out_extent) * 125 * 16
    assert native.flops[4] == native.flops[7] == native.flops[9] == flops
    chosen = {layer.name: layer.ranked()[0] for layer in bundled.layers(graph, 8)}
    assert setting.footprint(bundled.layers(graph, 8), chosen).total > 0
    plan = planning.resolve("model", graph, bundle=8)
    rows = [row for row in roofline.rows(graph, plan, Request(bundle=8)) if row.layer == "conv2"]
    assert [row.name for row in rows] == ["forward", "backward", "update"]
    assert all(row.predicted_s > 0 and row.bound_s > 0 for row in rows)


def test_the_networks_memory_is_what_its_plan_says():
    """In a process of its own, where no memory was freed before."""
    code = """if True:
        import numpy as np, psutil, znn
        from znn import plan as planning
        layers = [{"conv": 16, "kernel": 1, "transfer": "relu"}, *[{"conv": 16, "kernel": 5, "depthwise": True}] * 2]
        graph = znn.Graph.build(znn.NetworkSpec.layered("n", 8, layers), output=48)
        x, y = np.ones((8, 56, 56, 56), np.float32), np.ones((16, 48, 48, 48), np.float32)
        with znn.Network(znn.NetworkSpec.layered("first", 8, layers), 1, bundle=8, threads=2) as net:
            net.train_step(x[:, :9, :9, :9].copy(), y[:, :1, :1, :1].copy())  # what every process loads once
        before = psutil.Process().memory_info().rss
        with znn.Network(graph, bundle=8, threads=2) as net:
            for _ in range(2):
                net.train_step(x, y)
            grown = psutil.Process().memory_info().rss - before
            print(grown / planning.footprint(net.plan, graph, net.plan_request).total)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 0.6 <= float(done.stdout) <= 1.05
