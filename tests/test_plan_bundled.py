"""Plans of networks in bundles of maps: candidates, measuring, memory within a limit, what bounds a phase."""
from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import znn
from checks import assert_close
from znn import bundled, cache, zoo
from znn import plan as planning
from znn.bundled import Candidate
from znn.errors import EngineError, PlanError, SpecError
from znn.graph import Graph
from znn.plan import LayerPlan, Plan, Request


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZNN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def graph():
    """Large enough for its spectra to be cut into slabs, with a layer that no machine convolves directly as fast."""
    layers = [{"conv": 8, "kernel": 3, "transfer": "relu"}, {"conv": 9, "kernel": (3, 3, 2), "transfer": "tanh"},
              {"max_filter": 2}, {"conv": 8, "kernel": 5, "transfer": "relu"}, {"conv": 2, "kernel": 3}]
    return Graph.build(znn.NetworkSpec.layered("slabs", 1, layers), output=(60, 70, 64))


def layer_of(graph, name="conv2", bundle=8):
    return next(layer for layer in bundled.layers(graph, bundle) if layer.name == name)


def test_candidates_are_ranked_and_those_explored_differ(graph):
    layer = layer_of(graph)
    ranked = layer.ranked()
    seconds = [layer.predict(candidate) for candidate in ranked]
    assert seconds == sorted(seconds) and min(seconds) > 0
    explored = layer.explored(ranked)
    assert explored[0] == ranked[0] and len(explored) <= bundled.EXPLORED + len(bundled.METHODS)
    assert not any(bundled._alike(a, b) for i, a in enumerate(explored) for b in explored[:i])


def test_only_few_input_maps_are_fused_and_nothing_goes_back_to_the_input(graph):
    first, second = layer_of(graph, "conv1"), layer_of(graph, "conv2")
    assert any(c.method == "fused" for c in first.ranked()) and not any(c.method == "fused" for c in second.ranked())
    tile = Candidate("tiled", first.first_tile())
    assert all(first.phases(tile)[phase] == 0 for phase in (1, 6, 7, 8)) and all(second.phases(Candidate(
        "tiled", second.first_tile())))


def test_workers_without_a_piece_count(graph):
    """The last pieces of a phase keep all workers from what follows; a plan for many takes phases that they can share evenly."""
    spec = znn.NetworkSpec.layered("first", 1, [{"conv": 8, "kernel": 3, "transfer": "relu"}])
    small = Graph.build(spec, output=(12, 12, 12))
    alone, together = (bundled.layers(small, 8, training=False, workers=n)[0] for n in (1, 4))
    for candidate in (Candidate("fused", (14, 14, 14)), *alone.ranked()):
        counts = alone.native(candidate).pieces
        phases = [float(count > 0 and alone.takes_part(candidate, phase)) for phase, count in enumerate(counts)]
        assert alone.total(candidate, phases) == sum(phases)
        pieces = [count for count, part in zip(together.native(candidate).pieces, phases) if part]
        turns = [(count + 3) // 4 for count in pieces]  # 1, 2, 3 or 4 pieces take as long as one
        shared = sum(4 * n / count for n, count in zip(turns, pieces))
        # Of spectra, which the tiled method hands from phase to phase and the fused one to parts of a group of tiles, three quarters
        # come from other workers.
        handed = 2 if candidate.method == "tiled" else int(together.native(candidate).pieces[2] > 0)
        spectra = together.native(candidate).buffer_bytes[2:2 + handed]
        assert len(spectra) == handed and all(size > 0 for size in spectra)
        most = bundled._core.TiledMachine().l2_bytes // 4
        exchanged = 0.75 * sum(min(size, most) for size in spectra) / bundled.exchange_rate(8)
        assert together.total(candidate, phases) == pytest.approx(shared + exchanged, rel=1e-9)
        assert (together.total(candidate, phases) > shared) == (handed > 0)
    assert alone.native(Candidate("fused", (14, 14, 14))).pieces[4] == 1  # one tile
    request = Request(bundle=8, threads=4, patches=2)
    assert all(layer.workers == 2 for layer in request.layers(small))


def test_a_single_disturbed_lap_does_not_end_a_measurement(graph, monkeypatch):
    """All get the laps that there are at least, and the shortest counts."""
    layer = layer_of(graph)
    quick, disturbed, slow = Candidate("direct", None), Candidate("tiled", (8, 8, 8)), Candidate("tiled", (16, 16, 16))
    laps = {quick: [9, 1, 1], disturbed: [9, 30, 0.5], slow: [9, 2, 2]}
    runs = {candidate: 0 for candidate in laps}

    class Probe:
        def __init__(self, native, *_):
            self.candidate = next(c for c in laps if layer.native(c) is native)

        def run(self, phase):
            lap, runs[self.candidate] = runs[self.candidate], runs[self.candidate] + (phase == 4)
            return laps[self.candidate][min(lap, 2)] if phase == 4 else 0.0

    monkeypatch.setattr(bundled._core, "TiledProbe", Probe)
    monkeypatch.setattr(bundled, "PATIENCE_S", 0.0)
    monkeypatch.setattr(bundled, "ENOUGH_S", 0.0)
    least = bundled.Timings(layer).take_turns(laps)
    assert [least[c][4] for c in laps] == [1, 0.5, 2]
    assert list(runs.values()) == [3, 3, 3]


@pytest.mark.parametrize("workers", [2, 7, 1000])
def test_updates_fill_the_gaps_of_a_backward_pass(workers):
    """Where each worker has a piece; but for those of the first layer, after which nothing of the round is left. A forward pass has
    none to fill its gaps."""
    layers = [{"conv": 8, "kernel": 3}, {"conv": 8, "kernel": 3}]
    small = Graph.build(znn.NetworkSpec.layered("two", 1, layers), output=(3, 3, 5))
    direct, seen = Candidate("direct", None), set()
    for layer in bundled.layers(small, 8, workers=workers):
        for phase, count in enumerate(layer.native(direct).pieces):
            whole = -(-count // workers) * workers / count if count else 1.0
            fills = layer.name == "conv2" and phase not in bundled.PASSES["forward"] and count >= workers
            seen.add((fills, whole > 1))
            phases = [float(i == phase) for i in range(bundled._core.TILED_PHASES)]
            assert layer.total(direct, phases) == pytest.approx(1.0 if fills else whole)
    assert (True, True) in seen or workers == 1000


def test_spectra_that_parts_of_a_fused_layer_share_are_a_choice():
    """One worker needs no parts. For many they are kept, unless memory is short; what was timed depends on the parts."""
    graph = Graph.build(znn.NetworkSpec.layered("first", 1, [{"conv": 24, "kernel": 3}]), output=(30, 30, 30))
    alone, many = (bundled.layers(graph, 8, workers=n)[0] for n in (1, 8))
    kept, made = Candidate("fused", (16, 16, 16)), Candidate("fused", (16, 16, 16), memoize=False)
    for layer, candidate, shares in ((alone, kept, False), (many, kept, True), (many, made, False)):
        native = layer.native(candidate)
        assert (native.pieces[2] > 0) == (native.buffer_bytes[2] > 0) == (layer.phases(candidate)[2] > 0) == shares
        assert layer.takes_part(candidate, 9) and layer.phases(candidate)[9] > 0
    assert many.keeps(kept) and not many.keeps(made)
    assert alone.key(kept) != many.key(kept) != many.key(made)
    smaller = planning._smaller(many, {kept: 1.0})
    assert made in smaller and smaller[made] > 0 and made not in planning._smaller(alone, {kept: 1.0})


def test_the_fastest_exchange_between_cores_is_kept(own_cache, monkeypatch):
    most = bundled.EXCHANGE_RATES[1]
    for found, expected in ((0.0, most), (3e9, 3e9), (2 * most, 3e9), (9e9, 9e9), (5e9, 9e9)):
        bundled.exchange_rate.cache_clear()
        monkeypatch.setattr(bundled._core, "exchange_rate", lambda bundle, found=found: found)
        assert bundled.exchange_rate(8) == expected
    monkeypatch.undo()
    bundled.exchange_rate.cache_clear()
    assert (bundled._core.exchange_rate(8) > 0) == (len(bundled._core.usable_physical_cores()) > 1)


@pytest.mark.parametrize("edge", ["max_pool", "max_filter"])
def test_pooling_left_to_an_edge_takes_at_least_what_its_kernel_takes(edge, own_cache, monkeypatch):
    layers = [{"conv": 8, "kernel": 3}, {edge: 2}, {"conv": 2, "kernel": 2}]
    graph = Graph.build(znn.NetworkSpec.layered("pools", 1, layers), output=(4, 4, 4))
    bundled.pool_rates.cache_clear()
    filters = edge == "max_filter"
    assert bundled.pool_rates(8, filters).forward > 0 and bundled.pool_rates(8, filters).backward > 0
    slow = bundled._core.PoolRates()
    slow.forward, slow.backward = 1e6, 5e5
    monkeypatch.setattr(bundled, "pool_rates", lambda bundle, filters: slow)
    for training, each in ((True, 3), (False, 1)):
        layer = bundled.layers(graph, 8, training=training)[0]
        alone, phases = Candidate("tiled", (3, 3, 3)), [0.0] * 11  # windows would lie in two tiles
        assert layer.total(alone, phases) == pytest.approx(each * 8 * np.prod(graph.node("nconv1").extent) / 1e6)
        for candidate in [Candidate("direct", None)] + ([] if filters else [Candidate("fused", layer.first_tile())]):
            assert layer.total(candidate, phases) == 0, "pools itself"


@pytest.mark.parametrize("seconds, timed", [(1.9, True), (2.1, False)])
def test_direct_is_timed_unless_it_is_hopeless(graph, monkeypatch, seconds, timed):
    layer = layer_of(graph)
    ranked = sorted(layer.ranked(), key=lambda candidate: candidate.method == "direct")  # last
    monkeypatch.setattr(layer, "predict", lambda candidate: seconds if candidate.method == "direct" else 1.0)
    assert (Candidate("direct", None) in layer.explored(ranked)) == timed
    assert bundled.WORTH_MEASURING < 1.9 < bundled.WORTH_SEARCHING < 2.1


def test_of_those_as_fast_the_model_decides(graph):
    layer = layer_of(graph)
    first, second, third = layer.ranked()[:3]
    assert layer.choose({third: 1.0, second: 1.02, first: 1.5}) == second
    assert layer.choose({third: 1.0, second: 1.02, first: 1.01}) == first
    assert layer.choose({third: 1.0, second: 1.1, first: 1.5}) == third


def test_what_was_timed_is_kept_and_serves_layers_of_the_same_shape(own_cache):
    spec = znn.NetworkSpec.layered("n", 8, [{"conv": 8, "kernel": 3}, {"conv": 8, "kernel": 1}])
    said: list[str] = []
    layer = layer_of(Graph.build(spec, output=6), "conv1")
    first = layer.measured(progress=said.append)
    assert said and all("conv1: timing" in text for text in said)
    other = layer_of(Graph.build(dataclasses.replace(spec, name="other"), output=6), "conv1")
    for _ in range(5):  # a disturbed first timing may lead to other candidates, which are timed once, too
        del said[:]
        first = other.measured(progress=said.append)
        if not said:
            break
    assert not said and layer.measured(progress=said.append) == first and not said
    file = next(own_cache.glob("*/tiled-timings-*.json"))
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"build": "another"}))
    layer.measured(progress=said.append)
    assert said, "timings of another build of the core were taken"
    file.write_text("{ damaged")
    assert set(layer.explored(layer.ranked())) <= set(layer.measured())  # which others follow depends on the timings
    assert json.loads(file.read_text())["build"] == data["build"]


def test_auto_is_the_width_that_a_plan_makes_fastest(graph, monkeypatch):
    def width(seconds, plan="model", of=graph, **asked):
        monkeypatch.setattr(planning, "_seconds", lambda plan, graph, request: seconds[request.bundle])
        chosen, request = planning.resolve_width(plan, of, Request(**asked))
        chosen.check(of, request.bundle)
        return request.bundle

    both = bundled.widths()
    assert width({8: 1.0, 16: 0.995}) == 8, "as fast, so the one that pads fewer maps"
    assert width({8: 1.0, 16: 0.98}) == both[-1] and width({8: 1.0, 16: 1.3}) == 8
    assert width({8: 1.0, 16: 0.5}, plan="direct") == both[-1]
    assert width({}, plan="fft") == 1
    with pytest.raises(PlanError, match="memory limit"):
        width({8: 1.0, 16: 0.8}, memory_limit=1 << 20)
    assert width({8: 0.995, 16: 1.0}, of=Graph.build(zoo.build("scaling_3d", width=32), output=4)) == both[-1], "as fast, and pads no more"
    resolve = planning.resolve
    monkeypatch.setattr(planning, "resolve", lambda plan, graph, request: refuse() if request.bundle != 8 else resolve(plan, graph, request))
    assert width({8: 1.0, 16: 0.8}) == 8, "the other one is refused"
    monkeypatch.setattr(planning, "tiled_autotune_plan", planning.tiled_model_plan)  # what is timed does not matter here
    assert width({8: 2.0, 16: 0.8}, plan="autotune") == 8, "clearly slower, but the other one is refused"


def refuse():
    raise PlanError("memory limit")


def test_the_predictions_behind_auto_count_padded_maps(graph):
    for width in bundled.widths():
        plan = planning.resolve("model", graph, Request(bundle=width))
        convolutions = sum(layer.seconds for layer in plan.layers.values())
        assert planning._seconds(plan, graph, Request(bundle=width)) == pytest.approx(
            convolutions + bundled.image_seconds(graph, width, training=True))
    layers = [{"conv": 24, "kernel": 3}, {"max_filter": 2}, {"conv": 1, "kernel": 3}]  # 24 maps: three bundles of 8, two of 16
    small = Graph.build(znn.NetworkSpec.layered("padded", 1, layers), output=4)
    assert bundled.image_seconds(small, 16, True) == pytest.approx(4 / 3 * bundled.image_seconds(small, 8, True))
    assert bundled.image_seconds(small, 8, True) == pytest.approx(2 * bundled.image_seconds(small, 8, False))
    layers[1] = {"max_pool": 2}  # what the convolution may do itself is counted with it
    pooled = Graph.build(znn.NetworkSpec.layered("pooled", 1, layers), output=4)
    assert bundled.image_seconds(pooled, 8, True) == 0


@pytest.mark.parametrize("width", bundled.widths())
def test_the_machine_is_calibrated_once(own_cache, width):
    def forget():
        bundled.machine.cache_clear(), bundled.peaks.cache_clear()

    forget()
    machine, peaks = bundled.machine(width), bundled.peaks()
    assert peaks.flops > 1e9 and peaks.cache_bytes > 1e8 and peaks.memory_bytes > 1e8
    assert 0.05 * peaks.flops <= machine.product_flops <= peaks.flops
    forget()
    for found, rates, again in ((machine, bundled.RATES, bundled.machine(width)), (peaks, bundled.PEAKS, bundled.peaks())):
        assert [getattr(again, rate) for rate in rates] == [getattr(found, rate) for rate in rates]
    assert cache.read_text(f"machine-{znn._core.isa()}-bundle-{width}.json")
    forget()


@pytest.mark.parametrize("method", ["direct", "tiled", "fused"])
def test_a_bound_is_what_work_and_bytes_need_at_least(graph, method):
    layer = layer_of(graph, "conv1")
    candidate = Candidate(method, None if method == "direct" else layer.tiles(1, method == "fused")[0])
    native, peaks = layer.native(candidate), bundled.peaks()
    for (seconds, what), flops, count in zip(layer.bounds(candidate), native.flops, native.bytes):
        assert what in ("arithmetic", "cache", "memory") and seconds <= flops / peaks.flops + count / min(
            peaks.cache_bytes, peaks.memory_bytes)
    if method == "direct":  # two operations per multiply-add, forward and update alike
        once = 2 * np.prod(graph.edge("conv1").out_extent) * 27 * 8
        assert native.flops[4] == once and native.flops[9] == once


def plan_of(graph, memoize):
    return Plan({layer.name: LayerPlan("tiled", (16, 16, 16), memoize=memoize) for layer in bundled.layers(graph, 8)})


@pytest.mark.parametrize("patches, threads", [(None, 1), (None, 3), (2, 2)])
def test_recomputed_spectra_train_as_those_kept(graph, rng, patches, threads):
    lead = () if patches is None else (patches,)
    data = [(rng.standard_normal((*lead, 1, *graph.node("input").extent), dtype=np.float32),
             rng.standard_normal((*lead, 2, 60, 70, 64), dtype=np.float32)) for _ in range(2)]
    results = []
    for memoize in (True, False):
        plan = plan_of(graph, memoize)
        recomputes = any(not layer.keeps(plan.layers[layer.name].candidate) for layer in bundled.layers(graph, 8))
        assert recomputes is not memoize
        with znn.Network(graph, bundle=8, plan=plan, threads=threads, patches=patches or 1) as net:
            losses = [net.train_step(*pair) for pair in data]
            results.append((losses, net.parameters(), net.forward(data[0][0])))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert_close(results[1][1], results[0][1], 1e-5, "parameters")
    assert_close(results[1][2], results[0][2], 1e-5, "output")


def test_within_a_memory_limit(graph, own_cache):
    request = Request(bundle=8, threads=2)
    free = planning.resolve("model", graph, request)
    needed = planning.footprint(free, graph, request).total
    limited = dataclasses.replace(request, memory_limit=int(0.93 * needed))
    plan = planning.resolve("model", graph, limited)
    assert planning.footprint(plan, graph, limited).total <= limited.memory_limit < needed
    assert plan != free and sum(p.seconds for p in plan.layers.values()) > sum(p.seconds for p in free.layers.values())
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match=r"memory limit 1000000 bytes.*slabs.*expected (\d+) bytes") as caught:
        planning.resolve("model", graph, dataclasses.replace(request, memory_limit=1000000))
    least = int(str(caught.value).split("expected ")[1].split()[0])
    assert planning.footprint(planning.resolve("model", graph, dataclasses.replace(request, memory_limit=least)), graph,
                              request).total <= least
    with pytest.raises(PlanError, match="too small for this plan"):
        planning.resolve(free, graph, limited)


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_memory_is_what_its_plan_says(graph, training):
    import psutil

    process = psutil.Process()
    x = np.ones((1, *graph.node("input").extent), np.float32)
    y = np.ones((2, 60, 70, 64), np.float32)
    before = process.memory_info().rss
    with znn.Network(graph, bundle=8, plan=plan_of(graph, True), threads=2, training=training) as net:
        for _ in range(2):
            net.train_step(x, y) if training else net.forward(x)
        grown = process.memory_info().rss - before
        expected = planning.footprint(net.plan, graph, net.plan_request).total
    # Pages that were free in this process before are not seen to grow.
    assert 0.6 * expected <= grown <= 1.05 * expected


def test_without_training_a_round_is_the_forward_pass(graph, own_cache):
    for trained, layer in zip(bundled.layers(graph, 8), bundled.layers(graph, 8, training=False)):
        for candidate in (Candidate("direct", None), Candidate("tiled", layer.first_tile())):
            whole, forward = trained.phases(candidate), layer.phases(candidate)
            assert [i for i, s in enumerate(forward) if s > 0] == [i for i in bundled.PASSES["forward"] if whole[i] > 0]
            assert 0 < layer.predict(candidate) < trained.predict(candidate)
            assert layer.keeps(candidate) and layer.key(candidate) != trained.key(candidate)
            measured = bundled.Timings(layer).of([candidate])[candidate]
            assert sum(measured) > 0 and all(s == 0 for i, s in enumerate(measured) if i not in bundled.PASSES["forward"])


@pytest.mark.parametrize("bundle", [1, 8])
def test_a_network_for_inference_alone(graph, bundle):
    small = Graph.build(graph.spec, output=(5, 6, 4))
    x = np.random.default_rng(2).standard_normal((1, *small.node("input").extent), dtype=np.float32)
    y = np.zeros((2, 5, 6, 4), np.float32)
    with znn.Network(small, bundle=bundle) as both, znn.Network(small, bundle=bundle, training=False) as net:
        assert sum(p.seconds for p in net.plan.layers.values()) < sum(p.seconds for p in both.plan.layers.values())
        assert_close(net.forward(x), both.forward(x), 1e-5, "output")
        for call in (lambda: net.train_step(x, y), lambda: net.forward(x, phase="train"), lambda: net.backward(y)):
            with pytest.raises(EngineError, match="slabs.*training=False"):
                call()
        assert_close(net.forward(x), both.forward(x), 1e-5, "output afterwards")
    with pytest.raises(SpecError, match="input_gradient is True with training=False"):
        znn.Network(small, bundle=bundle, training=False, input_gradient=True)


@pytest.mark.parametrize("method", ["direct", "tiled"])
def test_training_after_inference_has_the_kernels_it_needs(graph, method):
    """Inference leaves those of the backward pass as they were."""
    small = Graph.build(graph.spec, output=(5, 6, 4))
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((1, *small.node("input").extent), dtype=np.float32), np.zeros((2, 5, 6, 4), np.float32)
    found = []
    for first in ("infer", "train"):
        with znn.Network(small, bundle=8, plan=method, seed=1) as net:
            start = net.parameters()
            net.forward(x, phase=first)
            net.train_step(x, y)
            net.set_parameters(start)
            net.forward(x, phase=first)
            net.train_step(x, y)
            found.append(net.parameters())
    assert_close(found[0], found[1], 1e-6, "parameters")


def test_a_lap_that_no_other_confirms_is_not_quiet():
    assert not bundled._is_quiet([1.0]) and not bundled._is_quiet([1.0, 1.1, 1.2])
    assert bundled._is_quiet([1.3, 1.0, 1.02])


def test_limits_that_mean_nothing_are_refused():
    spec = znn.NetworkSpec.layered("n", 1, [{"conv": 2, "kernel": 2}])
    with pytest.raises(PlanError, match="memory_limit is 10000000.*bundle 8"):
        znn.Network(spec, 3, memory_limit=10**7)
    with pytest.raises(SpecError, match="memory_limit is 0"):
        znn.Network(spec, 3, bundle=8, memory_limit=0)


def test_an_exhaustive_search_times_every_candidate(own_cache, monkeypatch):
    graph = Graph.build(znn.NetworkSpec.layered("n", 1, [{"conv": 8, "kernel": 3}]), output=6)
    layer = layer_of(graph, "conv1")
    seconds = {candidate: layer.predict(candidate) for candidate in layer.ranked(bundled.ALL)}
    for limit in (1.0, 1.5, np.inf):  # which are within it is for this machine's rates to say; all of them are within the last
        monkeypatch.setattr(bundled, "WORTH_SEARCHING", limit)
        assert set(layer.everything()) == {c for c, s in seconds.items() if s <= limit * min(seconds.values())}
    everything = layer.everything()
    assert {candidate.method for candidate in everything} == set(bundled.METHODS)
    rough = bundled.Timings(layer, rough=True).of(everything)
    assert set(rough) == set(everything) and all(sum(phases) > 0 for phases in rough.values())
    measured = layer.searched()
    hopeless = set(everything) - set(measured)
    assert measured and all(sum(rough[c]) > bundled.ROUGHLY * min(map(sum, rough.values())) for c in hopeless)
    exhaustive = planning.tiled_autotune_plan(graph, Request(bundle=8), exhaustive=True)
    assert exhaustive.layers["conv1"].seconds <= 1.03 * min(map(sum, measured.values()))


def test_plans_of_the_zoo_cover_every_layer():
    for name in ("scaling_3d", "2d_10"):
        graph = Graph.build(zoo.build(name, width=8), output=1)
        plan = planning.resolve("model", graph, bundle=8)
        assert list(plan.layers) == planning.conv_names(graph)
