import csv
import dataclasses
import io
import sys
from pathlib import Path

import pytest

from znn.bench import store, sweep, whole_nets
from znn.bench.__main__ import main
from znn.bench.stats import Estimate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "paper_figs"))
import synthetic  # noqa: E402

SWEEP = ROOT / "experiments" / "sweeps" / "whole_nets.toml"


@pytest.fixture
def results(tmp_path):
    def faster(record):
        if record.adapter_name == "znn_copies":
            return dataclasses.replace(record, metrics={"round_s": [s / 5 for s in record.samples_s]})
        if record.adapter_name != "znn_bundled":
            return record
        return dataclasses.replace(record, samples_s=[s / 6 for s in record.samples_s], peak_rss_bytes=int(4e8),
                                   metrics=record.metrics | {"bound_s": 1e-4, "exchange_bytes_per_s": [3e9, 2.5e9]})
    synthetic.write(tmp_path, "paper", cores=2, only={"whole_nets", "plan_search"}, change=faster)
    return tmp_path


@pytest.fixture
def found(results):
    return whole_nets.of_results(results)[0]


def row_of(found, net, phase="training", threads=2):
    return next(r for r in found if (r.net, r.phase, r.threads) == (net, phase, threads))


def test_every_net_that_is_asked_about_is_measured_in_the_paper_tier():
    cases = sweep.expand(sweep.load(SWEEP), "paper", (2, 2))
    ours = [case for case in cases if case.adapter == "znn_bundled"]
    for table in whole_nets.requirements():
        assert any(whole_nets.asked_of(case.problem, [table]) for case in ours), table
    assert all(whole_nets.asked_of(case.problem, whole_nets.requirements())["ratio"] >= 1 for case in ours)
    for case in ours:
        assert case.options["plan"] == "autotune"
        rivals = {c.adapter for c in cases if c.problem == case.problem and c.options["threads"] == case.options["threads"]}
        several = case.options["threads"] > 1
        assert rivals == {"znn_bundled", "torch_cpu"} | ({"znn_copies"} if several else set()) | (
            {"znn"} if case.problem.get("phase", "round") == "round" and several else set())
    assert len({case.group for case in ours}) == len(ours) // 2, "one and two threads take turns in one group"


def test_what_is_asked_is_that_of_the_tables_that_fit():
    tables = whole_nets.requirements()
    asked = whole_nets.asked_of({"net": "3d_3", "width": 40, "output": [8, 8, 8]}, tables)
    assert (asked["ratio"], asked["aim"], asked["speedup"], asked["memory"]) == (5.5, 8, 1.85, 1)
    assert whole_nets.asked_of({"net": "3d_3", "width": 8, "output": [1, 1, 1]}, tables)["ratio"] == 1
    assert "ratio" not in whole_nets.asked_of({"net": "m36", "width": 8, "output": [2, 2, 2]}, tables)


def test_rows_hold_ratios_speedups_memory_and_the_bound(found):
    row = row_of(found, "3d_3, output 8x8x8, width 40")
    assert 9 < row.ratio.value < 10.2 and row.ratio.low <= row.ratio.value <= row.ratio.high
    assert 1.8 < row.speedup.value < 2.2 and row.memory == pytest.approx(0.5) and row.bound_s == pytest.approx(5e-5)
    assert row.papers.value > row.seconds.value and row.verdict("ratio") == "yes" and row.verdict("memory") == "yes"
    assert row_of(found, "3d_7, output 8x8x8, width 40").verdict("ratio") == "no"
    assert row.exchange == (2.5e9, 3e9)
    assert row.room.low <= row.room.value <= row.room.high and row.room.value == pytest.approx(
        row.speedup.value * 2 * 5 / 6, rel=0.1)  # two copies a round, each a fifth of what theirs takes, ours a sixth
    one = row_of(found, "3d_3, output 8x8x8, width 40", threads=1)
    assert one.search.value == pytest.approx(1.02) and one.verdict("search") == "yes" and row.search is None
    assert dataclasses.replace(one, asked={"search": 1.01}).verdict("search") == "no"
    assert one.speedup is None and one.room is None and one.verdict("speedup") == ""
    assert row_of(found, "3d_3, output 8x8x8, width 40", "forward").papers is None
    lost = row_of(found, "2d_40, output 1x1x1, width 40")
    assert lost.ratio is None and lost.verdict("ratio") == "" and "oom" in lost.reason
    order = [row.net for row in found if row.phase == "training" and row.threads == 2]
    assert [name.split(",")[0] for name in order][:4] == ["3d_3", "3d_5", "3d_7", "scaling_3d"]


def test_a_verdict_needs_the_whole_interval():
    row = whole_nets.Row("m", "n", "training", 4, Estimate(1, 1, 1), ratio=Estimate(5.0, 4.0, 6.0), memory=1.1,
                         speedup=Estimate(3.5, 3.45, 3.6), asked={"ratio": 4.5, "memory": 1, "efficiency": 0.85})
    assert [row.verdict(w) for w in ("ratio", "memory", "speedup")] == ["open", "no", "yes"]
    assert dataclasses.replace(row, asked={"ratio": 4}).verdict("ratio") == "yes"
    assert dataclasses.replace(row, asked={"ratio": 6.1}).verdict("ratio") == "no"


def test_the_command_writes_the_table(results, capsys):
    assert main(["whole-nets", str(results)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == (results / "whole_nets.md").read_text().strip()
    assert "| 3d_5, output 8x8x8, width 40 | training | 2 |" in text and "times faster:" in text and "oom" in text
    rows = list(csv.DictReader(io.StringIO((results / "whole_nets.csv").read_text())))
    assert len(rows) == len(whole_nets.rows(store.load(results).distinct()))
    assert float(rows[0]["ratio_low"]) <= float(rows[0]["ratio"]) and rows[0]["asked"] == "5.5"
    assert main(["whole-nets", str(results / "nowhere")]) == 2
