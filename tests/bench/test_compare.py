import dataclasses
import importlib.util

import numpy as np
import pytest

from znn.bench import compare as comparing
from znn.bench.compare import CompareError, Comparison, Result, Side, compare, compare_outcomes, to_text
from znn.bench.protocol import Protocol

QUICK = Protocol(warmups=1, min_rounds=2, max_rounds=2, max_s=5.0, turn_s=0.005, timeout_s=120)
PROBLEM = {"net": "scaling_3d", "width": 3, "output": [2, 2, 2]}
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def arrays(change=0.0, wrong=0.0):
    start = np.ones((2, 3), np.float32)
    return {"start parameter w": start, "parameter w": start - np.float32(0.01 + change),
            "output y": np.full(4, 2 + wrong, np.float32)}


def test_differences_are_those_of_the_largest_output_and_change():
    found = compare_outcomes(arrays(5e-5, 1e-3), arrays(), "us")
    assert found["output"] == pytest.approx(5e-4, rel=1e-2) and found["parameter"] == pytest.approx(5e-3, rel=1e-2)
    with pytest.raises(CompareError, match="us computes something else: outputs differ by 0.5"):
        compare_outcomes(arrays(wrong=1.0), arrays(), "us")
    with pytest.raises(CompareError, match="parameters differ by 1"):
        compare_outcomes(arrays(change=0.01), arrays(), "us")
    with pytest.raises(CompareError):
        compare_outcomes(arrays(wrong=np.nan), arrays(), "us")


def result(name, samples, plan="a plan", peak=1 << 30):
    return Result(Side(name, "fake"), "1.0", plan, samples, peak, {"output": 1e-7, "parameter": 2e-6})


def test_the_text_has_everything_that_was_asked_for():
    rows = [Comparison("net, output 8x8x8", threads, False,
                       [result("ZNN", [0.1 / threads] * 7, peak=1 << 29), result("torch", [0.9 / threads] * 7, "layout x")])
            for threads in (1, 2)]
    text = to_text(rows)
    for words in ("net, output 8x8x8, 1 thread;", "backward, update and forward", "9.00 (9.00 to 9.00)", "512 MiB",
                  "0.50 of torch's memory", "outputs 1.0e-07", "updated parameters 2.0e-06", "torch 1.0, 2 threads: layout x",
                  "ZNN: 2 threads are 2.00 times as fast as 1"):
        assert words in text, words
    few = to_text([dataclasses.replace(rows[0], results=[result("ZNN", [1.0, 1.1]), result("torch", [2.0, 2.1])])])
    assert "few rounds" in few and "threads are" not in few


@pytest.mark.parametrize("phase", ["round", "forward"])
def test_two_engines_of_ours_take_turns_in_processes_of_their_own(phase):
    said: list[str] = []
    ours = Side("bundled", "znn_bundled", {"plan": "model"})
    found = compare("n", PROBLEM | {"phase": phase}, [ours], "znn", 2, QUICK, said.append)
    first, last = found.results
    assert [r.side.adapter for r in found.results] == ["znn_bundled", "znn"] and found.forward == (phase == "forward")
    assert len(first.samples_s) == len(last.samples_s) == 2 and min(first.samples_s + last.samples_s) > 0
    assert 10 << 20 < first.peak_bytes < 1 << 30 and "plan from" in first.plan
    assert 0 < first.differences["output"] < 1e-4 and last.differences == {"output": 0.0, "parameter": 0.0}
    assert found.ratio(first).low > 0 and any("round 2" in text for text in said)


@needs_torch
def test_against_pytorch():
    for phase in ("round", "forward"):
        found = compare("n", PROBLEM | {"phase": phase}, [Side("ZNN", "znn_bundled")], "torch", 1, QUICK)
        theirs = found.results[-1]
        assert theirs.version.startswith("2.") and "layout" in theirs.plan and "oneDNN" in theirs.plan
        assert found.results[0].differences["output"] < 1e-4 and theirs.peak_bytes > found.results[0].peak_bytes


def test_what_cannot_be_compared_says_so():
    with pytest.raises(CompareError, match="fake_adapters:Absent is not available: there is no such device"):
        compare("n", PROBLEM, [Side("ours", "znn_bundled", {"plan": "model"})], "fake_adapters:Absent", 1, QUICK)
    with pytest.raises(CompareError, match="ours: outcome: .*nonsense"):
        compare("n", PROBLEM, [Side("ours", "znn_bundled", {"plan": "nonsense"})], "znn", 1, QUICK)


def test_short_laps_fill_a_turn():
    from znn.bench.child import Worker

    worker = Worker({"problem": PROBLEM, "adapter": "fake_adapters:Fake", "options": {"lap_s": 0.002}})
    worker.open()
    alone = worker.lap()["s"]
    laps = worker.session.laps
    assert laps == 1 and alone >= 0.002
    turn = worker.lap(turn_s=0.02)["s"]
    assert 3 <= worker.session.laps - laps <= 11 and turn >= 0.002
    laps = worker.session.laps
    worker.lap(turn_s=0.001)
    assert worker.session.laps == laps + 1


def test_the_peak_is_that_since_it_was_forgotten():
    from znn.bench import child

    block = np.ones(1 << 26, np.float32)
    high = child.peak_bytes()
    del block
    child.forget_peak()
    assert child.peak_bytes() < high - (200 << 20)


def test_the_protocol_of_older_records_has_no_turns():
    assert "turn_s" not in Protocol().to_dict() and Protocol(turn_s=0.1).to_dict()["turn_s"] == 0.1
    assert Protocol.from_dict(Protocol().to_dict()) == Protocol()
    assert comparing.PROTOCOL.turn_s > 0
