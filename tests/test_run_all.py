"""The main job as people run it: the smoke tier of every experiment, then the figures, the verdicts, and a second run that has nothing left to do."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from znn.bench import store

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "experiments/run_all.py", "--tier", "smoke"]


def run(out: Path, cache: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"ZNN_CACHE": str(cache), "MPLBACKEND": "Agg"}
    return subprocess.run([*COMMAND, "--out", str(out)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=2400)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results folder of the smoke tier, and what the command said."""
    out, cache = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("cache")
    return out, cache, run(out, cache)


@pytest.mark.slow
def test_every_case_is_measured_checked_and_recorded(smoke):
    out, _, done = smoke
    assert done.returncode == 0, done.stdout[-4000:]
    loaded = store.load(out)
    assert not loaded.problems
    (run_id,) = loaded.runs
    assert loaded.ends[run_id]["complete"]
    records = loaded.latest()
    assert {record.experiment for record in records} == {path.stem for path in (ROOT / "experiments/sweeps").glob("*.toml")}
    for record in records:
        what = f"{record.experiment} {record.case_id}: {record.status} {record.reason}"
        # Without a GPU, PyTorch or valgrind a case is skipped, and says so; nothing may fail.
        assert record.status == "ok" or record.status == "skipped" and record.reason, what
        assert record.adapter_name != "znn" or record.status == "ok", what
        if record.samples_s:
            assert record.check["passed"], what
            assert min(record.samples_s) > 0 and record.peak_rss_bytes > 0 and record.command, what


@pytest.mark.slow
def test_figures_and_verdicts_are_made(smoke):
    out, _, done = smoke
    assert done.returncode == 0, done.stdout[-4000:]
    figures = out / "figures"
    for suffix in (".png", ".pdf", ".csv", ".txt"):
        assert (figures / f"scaling_threads{suffix}").stat().st_size > 0
    assert "<html" in (figures / "report.html").read_text().lower()
    verdicts = json.loads((out / "claims.json").read_text())
    text = json.dumps(verdicts)
    assert all(f'"C{i}"' in text for i in range(1, 9))
    assert "C8" in (out / "claims.md").read_text()


@pytest.mark.slow
def test_a_second_run_measures_nothing_again(smoke):
    out, cache, _ = smoke
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    done = run(out, cache)
    assert done.returncode == 0 and "have records" in done.stdout, done.stdout[-4000:]
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before
