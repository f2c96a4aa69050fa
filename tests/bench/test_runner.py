import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from znn.bench import runner as rn
from znn.bench import store
from znn.bench.protocol import Protocol
from znn.bench.record import Run
from znn.bench.sweep import Case

QUICK = Protocol(
    warmups=2, min_rounds=4, max_rounds=6, spread=0.0, timeout_s=20, interleave=("action", "lap_s")
)


def case(adapter="fake_adapters:Fake", protocol=QUICK, **options):
    return Case("t", {"net": "scaling_3d", "width": 3}, adapter, options, protocol)


@pytest.fixture
def run(tmp_path):
    writer = store.RunWriter(tmp_path, Run("r1", "m", "2026", {}))

    def go(*cases, available=lambda: 1 << 40):
        with rn.Runner(writer, "r1", lambda c: "command", available) as runner:
            return runner.run_group(cases)

    go.root = tmp_path
    return go


def test_an_interleaved_group(run):
    records = run(case(), case(lap_s=0.002))
    assert [r.status for r in records] == ["ok", "ok"]
    assert all(len(r.samples_s) == 6 and len(r.warmups_s) == 2 and r.metrics["laps"] == 6 for r in records)
    assert records[0].interleaved_with == [records[1].case_id]
    assert records[0].metrics["pid"] != records[1].metrics["pid"] and records[0].peak_rss_bytes > 1 << 20
    assert records[0].plan == "fake plan" and records[0].check["passed"]
    assert store.load(run.root).latest() == sorted(
        (r.__class__(**{**r.__dict__, "machine_id": "m"}) for r in records), key=lambda r: r.case_id
    )


def test_rounds_wait_for_a_disturbed_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(rn, "PAUSE_S", 0.01)
    said: list[str] = []

    def looks_and_waits(noisy, patience_s):
        writer = store.RunWriter(tmp_path / f"{noisy} {patience_s}", Run("r4", "m", "2026", {}))
        protocol = Protocol(min_rounds=4, max_rounds=4, patience_s=patience_s)
        with rn.Runner(writer, "r4", lambda c: "command", say=said.append) as runner:
            records = runner.run_group([case(protocol=protocol, noisy=noisy), case(protocol=protocol, lap_s=0.002)])
        assert all(r.status == "ok" and len(r.samples_s) == 4 for r in records)
        assert runner.seconds["waiting"] >= 0.01 * min(noisy, patience_s / 0.01)
        return records[0].metrics["looks"], records[1].metrics.get("waited_s")

    assert looks_and_waits(noisy=3, patience_s=5.0) == (3 + 4, pytest.approx(0.03))
    assert len(said) == 1 and "5 s" in said[0] and "noise" in said[0]
    assert looks_and_waits(noisy=1000, patience_s=0.05) == (5, pytest.approx(0.05)), "then they go on"
    assert looks_and_waits(noisy=1000, patience_s=0.0) == (0, None)


@pytest.mark.parametrize(
    "action, status, words",
    [
        ("raise", "failed", "third lap went wrong"),
        ("memory", "oom", "no room"),
        ("killed", "oom", "killed by the system"),
        ("exit", "failed", "exit status 3"),
        ("wrong", "failed", "wrong result"),
    ],
)
def test_a_bad_case_is_recorded_and_the_others_go_on(run, action, status, words):
    bad, good = run(case(action=action), case())
    assert (bad.status, good.status) == (status, "ok") and words in bad.reason
    assert len(good.samples_s) == 6 and good.interleaved_with == []


def test_a_check_that_failed_is_not_taken_for_another_options_check(run):
    good, bad = run(case(), case(action="wrong"))
    assert (good.status, bad.status) == ("ok", "failed") and bad.samples_s == []


def test_a_hanging_case_times_out(run):
    start = time.monotonic()
    (record,) = run(case(action="hang", protocol=Protocol(timeout_s=1.5)))
    assert record.status == "timeout" and "1.5 s" in record.reason and time.monotonic() - start < 10


def test_the_memory_guard(run):
    small, large = run(case(), case(bytes=1 << 33), available=lambda: 1 << 32)
    assert (small.status, large.status) == ("ok", "skipped") and "8.00 GiB" in large.reason
    first, second = run(case(bytes=3 << 30, lap_s=0.001), case(bytes=3 << 30), available=lambda: 4 << 30)
    assert (first.status, second.status) == ("ok", "ok") and first.interleaved_with == []


def test_what_is_not_available_says_why(run):
    (record,) = run(case("fake_adapters:Absent"))
    assert record.status == "skipped" and "no such device" in record.reason


def test_computed_cases_and_chatty_libraries(run):
    (record,) = run(case("fake_adapters:Sums"))
    assert record.metrics == {"twice": 6} and record.samples_s == [] and record.status == "ok"
    (record,) = run(case(action="chatter"))
    assert record.status == "ok"


def test_a_server_that_was_killed_is_replaced(run, tmp_path):
    writer = store.RunWriter(tmp_path, Run("r2", "m", "2026", {}))
    with rn.Runner(writer, "r2", lambda c: "command") as runner:
        first = runner.run_group([case()])
        (server,) = runner._servers.values()
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        second = runner.run_group([case()])
        assert runner._servers and server not in runner._servers.values()
    assert [r.status for r in first + second] == ["ok", "ok"]


def test_seconds_are_booked_by_stage(tmp_path):
    writer = store.RunWriter(tmp_path, Run("r3", "m", "2026", {}))
    with rn.Runner(writer, "r3", lambda c: "command") as runner:
        begin = time.perf_counter()
        runner.run_group([case(lap_s=0.05), case("fake_adapters:Sums")])
        wall = time.perf_counter() - begin
    assert set(runner.seconds) == set(rn.Runner.STAGES) and runner.seconds["waiting"] == 0
    assert all(s > 0 for stage, s in runner.seconds.items() if stage != "waiting")
    assert runner.seconds["laps"] >= 6 * 0.05 and runner.seconds["warmup"] >= 2 * 0.05
    assert runner.measuring_s < sum(runner.seconds.values()) <= wall


def test_an_unknown_adapter_is_a_failed_case(run):
    (record,) = run(case("nobody"))
    assert record.status == "failed" and "'nobody'" in record.reason


def test_resume():
    cases = [case(), case(lap_s=0.5), case(lap_s=0.7)]
    records = [
        rn.Record("t", c.case_id, {}, {"name": "a"}, {}, s, "r", "c") for c, s in zip(cases, ("ok", "failed"))
    ]
    assert rn.pending(cases, records) == cases[2:]
    assert rn.pending(cases, records, retry_failed=True) == cases[1:]
    assert rn.pending(cases, records, force=True) == cases
    assert (
        rn.pending([Case("u", c.problem, c.adapter, c.options, QUICK) for c in cases], records)[0].experiment
        == "u"
    )


def test_killing_the_runner_kills_its_children_and_keeps_what_was_recorded(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_runner as t
from znn.bench import store, runner as rn
from znn.bench.record import Run
writer = store.RunWriter({str(tmp_path)!r}, Run("r1", "m", "2026", {{}}))
run = rn.Runner(writer, "r1", lambda c: "")
run.run_group([t.case()])
print("recorded", flush=True)
run.run_group([t.case(action="hang")])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "recorded\n"
    deadline = time.monotonic() + 10
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=5)
    assert children and not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)
    assert [r.status for r in store.load(tmp_path).records] == ["ok"]
