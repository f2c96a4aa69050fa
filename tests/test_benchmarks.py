"""The asv suite runs as it stands: every benchmark gives a number, and old builds are skipped, not failed."""
from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import znn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common, start, tasks  # noqa: E402


def configuration() -> dict:
    """asv's configuration; its comments are lines of their own."""
    text = (ROOT / "asv.conf.json").read_text()
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))


def test_results_stay_in_the_results_folder_and_the_rest_out_of_the_way():
    conf = configuration()
    assert conf["results_dir"] == "results/asv"
    assert conf["env_dir"].startswith(".asv/") and conf["html_dir"].startswith(".asv/")
    assert "--no-deps" in " ".join(conf["build_command"]), "asv finds several wheels otherwise"


def test_a_build_without_the_names_is_skipped(monkeypatch):
    monkeypatch.delattr(znn, "Network")
    for benchmark, arguments in ((tasks.TinyTasks(), ("priority", "wait-free", 1)), (start.Planning(), ())):
        with pytest.raises(NotImplementedError, match="lacks"):
            benchmark.setup(*arguments)
        if hasattr(benchmark, "teardown"):
            benchmark.teardown(*arguments)


def test_a_build_without_an_option_is_skipped():
    with pytest.raises(NotImplementedError, match="option"):
        common.network(common.layered({"conv": 1, "kernel": 1}), 1, no_such_option=True)


def test_a_wrong_answer_is_not_timed(monkeypatch):
    forward = znn.Network.forward
    monkeypatch.setattr(znn.Network, "forward", lambda *args, **options: 1.001 * forward(*args, **options))
    common.check.cache_clear()
    with pytest.raises(AssertionError, match="the output is off"):
        common.check(common.layered({"conv": 2, "kernel": 3}), 2, "direct")


def test_nothing_starts_threads_when_imported():
    """Threads started at import would hang asv's fork server."""
    modules = ", ".join(f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("[a-z]*.py")))
    code = f"import os, {modules}; print(len(os.listdir('/proc/self/task')))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env=environment)
    assert done.stdout.strip() == "1", done.stderr or done.stdout


@pytest.fixture
def asv(tmp_path):
    """Runs an asv command whose results stay in the test's folder; returns what it said."""
    pytest.importorskip("asv")
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git clone, which asv needs")
    conf = configuration() | {"repo": str(ROOT), "benchmark_dir": str(ROOT / "benchmarks"), "env_dir": str(tmp_path / "env"),
                              "results_dir": str(tmp_path / "results"), "html_dir": str(tmp_path / "html")}
    (tmp_path / "asv.conf.json").write_text(json.dumps(conf))

    def go(*command: str, **more: str) -> str:
        # asv keeps a file about the machine in the home folder.
        environment = os.environ | {"HOME": str(tmp_path), "ZNN_CACHE": str(tmp_path / "cache")} | more
        done = subprocess.run([sys.executable, "-m", "asv", *command, "--config", str(tmp_path / "asv.conf.json")],
                              cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                              timeout=1200)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    go("machine", "--yes")
    return go


@pytest.mark.slow
def test_asv_compare_shows_a_regression(asv, tmp_path):
    """Two commits, of which the later one builds graphs more slowly, as far as asv can tell."""
    log = subprocess.run(["git", "-C", str(ROOT), "log", "-2", "--format=%H"], capture_output=True, text=True)
    commits = log.stdout.split()
    if len(commits) < 2:
        pytest.skip("a clone of one commit has nothing to compare")
    (tmp_path / "slower").mkdir()
    (tmp_path / "slower" / "sitecustomize.py").write_text(
        "import time\n"
        "from znn.graph import Graph\n"
        "build = Graph.build\n"
        "Graph.build = lambda *a, **k: (time.sleep(0.2), build(*a, **k))[1]\n")
    run = ["run", "--python=same", "--bench", "Planning.time_graph", "--show-stderr",
           *("-a repeat=6 -a number=1 -a warmup_time=0 -a rounds=1").split()]
    asv(*run, "--set-commit-hash", commits[1])
    asv(*run, "--set-commit-hash", commits[0], PYTHONPATH=str(tmp_path / "slower"))
    said = asv("compare", "--factor", "2", commits[1], commits[0])
    assert [line for line in said.splitlines() if line.startswith("| +") and "Planning.time_graph" in line], said
    assert not [line for line in asv("compare", commits[1], commits[1]).splitlines() if line.startswith("| +")]


@pytest.mark.slow
def test_asv_runs_every_benchmark(asv, tmp_path):
    """`asv run --quick` in this environment: each benchmark once, each parameter set with a finite positive result."""
    asv("run", "--python=same", "--quick", "--set-commit-hash", "HEAD", "--show-stderr")
    (stored,) = [path for path in (tmp_path / "results").glob("*/*.json") if path.name != "machine.json"]
    data = json.loads(stored.read_text())
    column = data["result_columns"].index("result")
    results = {name: row[column] for name, row in data["results"].items()}
    assert len(results) >= 15
    for name, values in results.items():
        # A failure is null, what this processor has no code for (a bundle of 16) is skipped and NaN.
        ran = [value for value in values or [None] if value is None or not math.isnan(value)]
        assert ran and all(value is not None and 0 < value < math.inf for value in ran), (name, values)
        assert len(ran) == len(values) or "Bundled" in name, (name, values)
