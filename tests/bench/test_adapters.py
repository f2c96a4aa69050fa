"""One conformance test over every adapter: it says why it is unavailable, or passes its check and gives what
it promises."""

import json

import numpy as np
import pytest

from znn.bench import adapters
from znn.bench.adapters.base import Computed, Timed, relative_error
from znn.bench.problem import Problem

TIMED = [name for name in adapters.BUILT_IN if isinstance(found := adapters.load(name), Timed) and found.referenced]  # zoo networks
COMPUTED = [name for name in adapters.BUILT_IN if isinstance(adapters.load(name), Computed)]
PROBLEMS = [
    {"net": "scaling_3d", "width": 3, "output": 2},
    {"net": "3d_3", "width": 3, "form": "strided"},
    {"net": "3d_3", "width": 2, "form": "dense", "kernel": 2},
    {"net": "2d_10", "width": 2, "kernel": 4},
    {"net": "multiscale", "width": 3, "output": 2},
    {"net": "scaling_3d", "width": 3, "output": 2, "phase": "forward"},
    {"net": "scaling_3d", "width": 3, "output": 2, "patches": 2},
]
SMALL = Problem.from_dict({"net": "scaling_3d", "width": 3, "output": 4})
COMPUTE_OPTIONS = {
    "theory": {"widths": [3, 5], "methods": ["fft", "direct"]},
    "simulate": {"workers": [2, 8], "laps": 3, "plan": "fft"},
    "trace": {"threads": 2, "plan": "fft"},
    "plan_search": {},
    "direct_passes": {},
}


def ready(name):
    adapter = adapters.load(name)
    reason = adapter.unavailable()
    if reason:
        assert len(reason) > 10
        pytest.skip(reason)
    return adapter


def options(adapter, **more):
    return {} if adapter.name == "torch_gpu" else {"threads": 2} | more


@pytest.mark.parametrize("name", adapters.BUILT_IN)
def test_every_adapter_names_itself_and_predicts(name):
    adapter = ready(name)
    assert adapter.name == name and adapter.version()
    assert 1 << 20 < adapter.predicted_bytes(SMALL, options(adapter)) < 1 << 36


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: " ".join(map(str, p.values())))
@pytest.mark.parametrize("name", TIMED)
def test_timed_adapters_agree_with_the_reference(name, problem):
    adapter = ready(name)
    found = adapter.check(Problem.from_dict(problem), options(adapter))
    assert found["passed"] and found["max_rel_err"] <= found["tol"], found


@pytest.mark.parametrize("name", TIMED)
def test_the_check_can_fail(name, monkeypatch):
    """An engine that learns at another rate gives other outputs after two rounds."""
    adapter = ready(name)
    monkeypatch.setattr("znn.bench.adapters.base.MOMENTUM", 0.0)  # the reference's; adapters keep their own
    assert not adapter.check(SMALL, options(adapter))["passed"]


@pytest.mark.parametrize("name", TIMED)
def test_sessions_lap_mark_and_close(name):
    adapter = ready(name)
    session = adapter.start(SMALL, options(adapter))
    first = session.outputs()
    session.lap()
    session.mark()
    session.lap()
    metrics = session.metrics()
    json.dumps(metrics)
    assert session.plan and {k: (v.shape, v.dtype) for k, v in first.items()} == {
        "output": ((1, 4, 4, 4), np.float32)
    }
    assert metrics.get("laps", 1) == 1
    session.close()


def test_seconds_in_locks_are_counted_for_every_lap():
    session = ready("locks").start(SMALL, {"threads": 2, "plan": "fft", "sum": "locked"})
    session.lap()
    session.mark()
    for _ in range(3):
        session.lap()
    metrics = session.metrics()
    session.close()
    assert len(metrics["lock_s"]) == len(metrics["wall_s"]) == 3 and metrics["workers"] == 2
    assert all(0 < locked < 2 * wall for locked, wall in zip(metrics["lock_s"], metrics["wall_s"]))


def test_a_torch_session_can_go_back_to_its_start():
    session = ready("torch_cpu").start(SMALL, {"threads": 1}, rate=0.1)
    first = session.outputs()["output"].copy()
    session.lap()
    trained = session.outputs()["output"].copy()
    session.reset()
    assert np.array_equal(session.outputs()["output"], first) and not np.array_equal(trained, first)
    session.lap()
    assert np.array_equal(session.outputs()["output"], trained)


@pytest.mark.parametrize("name", [n for n in COMPUTED if n != "valgrind"])
def test_computed_adapters_give_json(name):
    adapter = ready(name)
    metrics = adapter.compute(SMALL, COMPUTE_OPTIONS[name])
    json.dumps(metrics)
    if name == "theory":
        assert len(metrics["rows"]) == 4 and all(
            row["work_flop"] > row["span_flop"] > 0 for row in metrics["rows"]
        )
    if name == "trace":
        events = metrics["events"]
        assert len({len(events[k]) for k in events if k != "names"}) == 1 and set(events["worker"]) <= {0, 1}
        assert {"forward", "backward", "update"} <= set(events["names"]["phase"])
    if name == "plan_search":
        for row in metrics["layers"]:
            assert len(row["seconds"]) == len(row["best_seconds"]) > 1 and min(row["seconds"]) > 0 < row["candidates"]
    if name == "direct_passes":
        for row in metrics["layers"]:
            assert row["flop"] > 0 and len({len(row[f"{name}_s"]) for name in ("peak", "forward", "backward", "update")}) == 1
            assert min(min(row[f"{name}_s"]) for name in ("peak", "forward", "backward", "update")) > 0
    if name == "simulate":
        assert metrics["validation"][0]["workers"] == 1 and len(metrics["predicted"]) == 4


def test_the_simulator_gets_every_measured_second():
    ready("trace")
    from znn.bench import simulate
    from znn.bench.adapters.trace_adapter import traced_laps
    from znn.bench.traced import durations, work_s

    for problem in (SMALL, Problem.from_dict({"net": "multiscale", "width": 3, "output": 4})):
        traced, graph = traced_laps(problem, {"threads": 1, "plan": "fft"}, 2), problem.graph()
        tasks = simulate.expand(graph, durations(traced.trace, graph, 2))
        assert tasks.work_s == pytest.approx(work_s(traced.trace) / 2)
        assert simulate.simulate(tasks, 1).round_s == pytest.approx(tasks.work_s)


@pytest.mark.slow
def test_cache_misses_are_counted_round_by_round():
    adapter = ready("valgrind")
    problem = Problem.from_dict({"net": "scaling_3d", "width": 2, "output": 4})
    counts = adapter.compute(problem, {"plan": "fft", "policy": "priority", "laps": 3})["per_round"]
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in counts.values())
    for event in ("instructions", "reads"):  # the same work in every round, and none of Python's start
        assert max(counts[event]) < 1.1 * min(counts[event]) < 1e9
    assert max(counts["LL_read_misses"]) < min(counts["D1_read_misses"]) < min(counts["reads"])


def test_a_case_without_valgrind_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "apt-get install valgrind" in adapters.load("valgrind").unavailable()


def test_torch_gpu_says_why_it_cannot_run():
    reason = adapters.load("torch_gpu").unavailable()
    assert reason is None or "CUDA" in reason or "PyTorch" in reason


def test_onednn_paths_are_recorded():
    adapter = ready("torch_cpu")
    plan = adapter.start(SMALL, {"threads": 2}).plan
    assert "layout" in plan and "oneDNN" in plan


@pytest.mark.parametrize("name", ["nobody", "json:loads_", "no_such_module:Thing"])
def test_unknown_adapters_are_refused(name):
    with pytest.raises(adapters.AdapterError, match=name.split(":")[0]):
        adapters.load(name)


def test_relative_error():
    assert relative_error(np.ones(3), np.full(3, 2.0)) == 0.5
    assert relative_error(np.ones(3), np.ones(4)) == float("inf")
    assert relative_error(np.array([np.nan]), np.ones(1)) == float("inf")


@pytest.mark.parametrize(
    "data, words",
    [
        ({"net": "3d_3", "colour": 1}, "colour"),
        ({"width": 3}, "either"),
        ({"net": "3d_3", "network": "x"}, "either"),
        ({"net": "3d_3", "phase": "sideways"}, "sideways"),
        ({"net": "3d_3", "output": [0, 1, 1]}, "positive"),
    ],
)
def test_bad_problems_are_named(data, words):
    with pytest.raises(ValueError, match=words):
        Problem.from_dict(data)


@pytest.mark.parametrize(
    "value, planar, result",
    [
        (3, False, (3, 3, 3)),
        (3, True, (1, 3, 3)),
        ("1x48x48", True, (1, 48, 48)),
        ([4, 5], True, (1, 4, 5)),
        ([2], False, (2, 2, 2)),
    ],
)
def test_output_patches(value, planar, result):
    from znn.bench.problem import extent

    assert extent(value, planar) == result


def test_width_of_ones_own_network_leaves_the_ends_alone():
    from znn import zoo
    from znn.bench.problem import with_width

    spec = with_width(zoo.build("multiscale", width=4), 7)
    maps = {node.name: node.maps for node in spec.nodes}
    assert (
        maps["input"] == 1
        and maps["output"] == 1
        and {v for k, v in maps.items() if k not in ("input", "output")} == {7}
    )
