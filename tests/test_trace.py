import json

import numpy as np
import pytest

import znn
from znn.errors import DataError
from znn.trace import EVENT, Trace

NAMES = {"phase": ["forward", "backward"], "kind": ["convolve"], "group": ["conv1", "conv2"]}


def events(*rows):
    return np.array(
        [(worker, phase, 0, group, a, b, start, end) for worker, phase, group, a, b, start, end in rows],
        EVENT,
    )


@pytest.fixture
def trace():
    # Two chains: 0 -> 2 (1 + 4 us) and 1 -> 2 (3 + 4 us), and 3 on its own (2 us); 10 us of wall time.
    rows = events(
        (0, 0, 0, 0, 0, 5_000, 6_000),
        (1, 0, 0, 0, 1, 5_000, 8_000),
        (1, 1, 1, 1, -1, 8_000, 12_000),
        (0, 1, 1, -1, -1, 13_000, 15_000),
    )
    return Trace(rows, NAMES, {"lock_s": [1e-6, 0.0], "wait_s": [2e-6, 3e-6]}, np.array([[0, 2], [1, 2]]))


def test_summary_adds_up(trace):
    facts = trace.summary()
    assert facts["wall_s"] == pytest.approx(10e-6)
    assert facts["work_s"] == pytest.approx(10e-6)
    assert facts["task_share"] == pytest.approx(0.5) and facts["outside_share"] == pytest.approx(0.5)
    assert facts["counter_share"] == pytest.approx({"lock_s": 0.05, "wait_s": 0.25})
    assert [row["tasks"] for row in facts["by_worker"]] == [2, 2]
    assert facts["by_worker"][1]["task_s"] == pytest.approx(7e-6)
    assert facts["by_phase"]["forward"] == {"tasks": 2, "seconds": pytest.approx(4e-6)}
    assert facts["by_group"]["conv2"]["seconds"] == pytest.approx(6e-6)


def test_critical_path_is_the_longest_chain(trace):
    assert trace.critical_path().tolist() == [1, 2]
    facts = trace.summary()
    assert facts["critical_path_s"] == pytest.approx(7e-6)
    assert facts["parallelism"] == pytest.approx(10 / 7)
    assert facts["critical_path"] == ["conv1 forward convolve 0>1", "conv2 backward convolve 1"]


def test_critical_path_of_a_random_graph_equals_brute_force():
    rng = np.random.default_rng(0)
    n = 12
    ends = np.cumsum(rng.integers(1, 50, n))
    starts = np.concatenate([[0], ends[:-1]])
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.3])
    trace = Trace(
        events(*[(0, 0, 0, i, i, s, e) for i, (s, e) in enumerate(zip(starts, ends))]),
        NAMES,
        dependencies=rng.permutation(pairs),
    )

    def longest(i):
        return (ends - starts)[i] + max((longest(u) for u, v in pairs if v == i), default=0)

    assert trace.summary()["critical_path_s"] == pytest.approx(max(longest(i) for i in range(n)) * 1e-9)


def test_without_dependencies_the_critical_path_is_unknown(trace):
    facts = Trace(trace.events, NAMES).summary()
    assert facts["critical_path_s"] is None and facts["parallelism"] is None
    assert facts["counter_share"] == {}


def test_saved_file_is_a_chrome_trace(trace, tmp_path):
    trace.save(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tasks = [event for event in content if event["ph"] == "X"]
    threads = {event["tid"]: event["args"]["name"] for event in content if event["name"] == "thread_name"}
    assert threads == {0: "worker 0", 1: "worker 1"}
    assert len(tasks) == 4
    assert [(task["ts"], task["dur"]) for task in tasks] == [(0, 1), (0, 3), (3, 4), (8, 2)]
    assert tasks[2] == {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "cat": "backward",
        "name": "conv2 backward convolve",
        "ts": 3.0,
        "dur": 4.0,
        "args": {"from": 1, "to": -1},
    }


def test_empty_trace(tmp_path):
    trace = Trace(np.zeros(0, EVENT), NAMES, dependencies=np.zeros((0, 2)))
    trace.save(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 1
    assert trace.summary()["wall_s"] == 0 and trace.report()


def test_the_engine_says_the_critical_path_of_its_last_pass():
    spec = znn.NetworkSpec.layered(
        "small", 1, [{"conv": 4, "kernel": 3, "transfer": "relu"}, {"conv": 2, "kernel": 3}]
    )
    with znn.Network(spec, output=6, threads=2, trace=True, pin=False) as net:
        for _ in range(2):
            net.train_step(np.zeros((1, 10, 10, 10), np.float32), np.ones((2, 6, 6, 6), np.float32))
        trace = net.trace()
    facts = trace.summary()
    assert set(facts["last_pass_s"]) == {"forward", "backward"}
    assert all(0 < seconds <= facts["wall_s"] for seconds in facts["last_pass_s"].values())
    assert {"forward", "backward", "update"} <= set(facts["by_phase"])
    assert {"conv1", "conv2"} <= set(facts["by_group"])
    assert "critical path of the last pass: forward" in trace.report()


def test_report_names_groups_and_shares(trace):
    text = trace.report()
    assert "conv2" in text and "50.0% of the time in tasks" in text and "critical path 0.01 ms" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e.astype([(name, "f8") for name in EVENT.names]), "1-D array"),
        (lambda e: e.reshape(2, 2), "1-D array"),
        (lambda e: np.concatenate([e, events((0, 7, 0, 0, 0, 0, 1))]), "phase 7 has no name"),
        (lambda e: np.concatenate([e, events((0, 0, 0, 0, 0, 9, 1))]), "ends before it starts"),
    ],
)
def test_bad_events_are_refused(trace, change, message):
    with pytest.raises(DataError, match=message):
        Trace(change(trace.events), NAMES)


def test_wrong_dependencies_are_refused(trace):
    with pytest.raises(DataError, match="does not exist"):
        Trace(trace.events, NAMES, dependencies=np.array([[0, 9]]))
    with pytest.raises(DataError, match="starts before"):
        Trace(trace.events, NAMES, dependencies=np.array([[3, 0]])).critical_path()
