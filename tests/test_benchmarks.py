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


@pytest.mark.slow
def test_asv_runs_every_benchmark(tmp_path):
    """`asv run --quick` in this environment: each benchmark once, each parameter set with a finite positive result."""
    pytest.importorskip("asv")
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git clone, which asv needs")
    conf = configuration() | {"repo": str(ROOT), "benchmark_dir": str(ROOT / "benchmarks"), "env_dir": str(tmp_path / "env"),
                              "results_dir": str(tmp_path / "results"), "html_dir": str(tmp_path / "html")}
    (tmp_path / "asv.conf.json").write_text(json.dumps(conf))
    # asv keeps a file about the machine in the home folder.
    environment = os.environ | {"HOME": str(tmp_path), "ZNN_CACHE": str(tmp_path / "cache")}
    asv = [sys.executable, "-m", "asv"]
    for command in (["machine", "--yes"],
                    ["run", "--python=same", "--quick", "--set-commit-hash", "HEAD", "--show-stderr"]):
        done = subprocess.run([*asv, *command, "--config", str(tmp_path / "asv.conf.json")], cwd=tmp_path, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, timeout=1200)
        assert done.returncode == 0, done.stdout[-4000:]
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
