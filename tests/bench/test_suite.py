"""The command line, with experiments of its own made of fake adapters in place of the project's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from znn.bench import store, suite
from znn.bench.protocol import Protocol
from znn.bench.sweep import SweepError

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
[experiment]
name = "fakes"
title = "Fakes"
adapter = "fake_adapters:Fake"
[protocol]
interleave = ["threads"]
warmups = 1
min_rounds = 3
max_rounds = 3
timeout_s = 60
[grid]
net = "scaling_3d"
width = [3, 4]
threads = [1, 2]
lap_s = 0.002
"""


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    folder = tmp_path / "root" / "experiments" / "sweeps"
    folder.mkdir(parents=True)
    (folder / "fakes.toml").write_text(SWEEP)
    monkeypatch.setattr(suite, "ROOT", tmp_path / "root")
    monkeypatch.setattr(suite, "build_figures", lambda results: 0)
    return folder / "fakes.toml"


def run(tmp_path, *arguments):
    return suite.main([*arguments, "--out", str(tmp_path / "results"), "--machine", "here"])


def records(tmp_path):
    return store.load(tmp_path / "results").records


def test_measure_then_resume_then_force(experiments, tmp_path, capsys):
    assert run(tmp_path) == 0
    assert len(records(tmp_path)) == 4 and {r.status for r in records(tmp_path)} == {"ok"}
    (end,) = store.load(tmp_path / "results").ends.values()
    assert end["complete"] and 0 <= end["overhead_s"] <= end["wall_s"]
    measuring = sum(end["stages_s"][stage] for stage in ("setup", "warmup", "waiting", "laps", "compute"))
    assert end["overhead_s"] == pytest.approx(end["wall_s"] - measuring)
    assert end["overhead_s"] >= end["stages_s"]["check"] + end["stages_s"]["start"]
    assert "overhead" in capsys.readouterr().err
    assert run(tmp_path) == 0 and len(records(tmp_path)) == 4
    assert "all 4 cases have records" in capsys.readouterr().err
    assert run(tmp_path, "--force", "--threads", "2") == 0 and len(records(tmp_path)) == 6


def test_the_recorded_command_repeats_its_case(experiments, tmp_path):
    run(tmp_path)
    record = records(tmp_path)[0]
    words = record.command.split()
    assert words[:2] == ["python", "experiments/run_all.py"]
    assert run(tmp_path, *words[2:]) == 0
    assert [r.case_id for r in records(tmp_path)].count(record.case_id) == 2 and len(records(tmp_path)) == 5


def test_failures_are_retried_only_when_asked(experiments, tmp_path):
    experiments.write_text(SWEEP.replace("lap_s = 0.002", 'action = "raise"'))
    assert run(tmp_path) == 1
    assert run(tmp_path) == 0 and len(records(tmp_path)) == 4
    assert run(tmp_path, "--retry-failed") == 1 and len(records(tmp_path)) == 8


def test_list_and_dry_run_measure_nothing(experiments, tmp_path, capsys):
    assert run(tmp_path, "--list") == 0
    assert run(tmp_path, "--dry-run", "--sweep", "width=5") == 0
    out = capsys.readouterr().out
    assert "fakes" in out and "2 of 2 cases to measure" in out and "width=5" in out and "--case" in out
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "nothing"], "no such experiment"),
        (["--sweep", "width"], "AXIS=VALUE"),
        (["--baselines", "jax"], "jax"),
        (["--network", "missing.toml"], "no such file"),
        (["--case", "0" * 12], "no such case"),
        (["--threads", "lots"], "lots"),
    ],
)
def test_wrong_usage_is_one_sentence(experiments, tmp_path, capsys, arguments, words):
    assert run(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_strict_refuses_a_noisy_machine(experiments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.provenance, "warnings", lambda facts: ["something is loud"])
    assert run(tmp_path, "--strict") == 2 and records(tmp_path) == []
    assert run(tmp_path) == 0 and "warning: something is loud" in capsys.readouterr().err
    assert next(iter(store.load(tmp_path / "results").runs.values())).warnings == ["something is loud"]


def test_a_network_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    from znn import zoo

    path.write_text(zoo.build("scaling_3d", width=5).to_toml())
    assert (
        run(
            tmp_path,
            "--network",
            str(path),
            "--dry-run",
            "--sweep",
            "width=5,7",
            "threads=1,2",
            "output=4x4x4,8x8x8",
            "--baselines",
            "none",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "8 of 8 cases" in out and "--network" in out


def test_axes_of_the_command_line():
    assert suite.parse_axes(["width=1,20", "output=1x48x48,8x8x8", "plan=direct"]) == {
        "width": [1, 20],
        "output": [[1, 48, 48], [8, 8, 8]],
        "plan": ["direct"],
    }
    with pytest.raises(SweepError):
        suite.parse_axes(["=1"])
    assert suite.parse_competitors("none") == [] and suite.parse_competitors(None) == list(suite.COMPETITORS)
    Protocol.from_dict(suite.NETWORK_PROTOCOL)


def test_a_record_file_cut_in_half_costs_only_what_was_cut(experiments, tmp_path, capsys):
    run(tmp_path)
    (path,) = (tmp_path / "results").glob("*/*.jsonl")
    os.truncate(path, path.stat().st_size // 2)
    kept = len(records(tmp_path))
    assert 0 < kept < 4 and run(tmp_path) == 0
    loaded = store.load(tmp_path / "results")
    assert len(loaded.latest()) == 4 and len(loaded.records) == 4
    assert "torn" in capsys.readouterr().err and len(loaded.problems) == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for a run line and a record or two."""
    folder = tmp_path / "results"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a process of the suite may be about to close its file


def test_a_full_disk_ends_in_one_sentence_and_the_next_run_goes_on(experiments, tmp_path, tiny_disk, capsys):
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(8192))  # leaves two pages beside the folder
    experiments.write_text(SWEEP.replace("width = [3, 4]", "width = [3, 4, 5, 6, 7, 8, 9, 10]"))
    assert run(tmp_path) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and "earlier records are safe" in err and "Traceback" not in err
    kept = len(records(tmp_path))
    assert 0 < kept < 16 and store.load(tiny_disk).problems == []
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    assert run(tmp_path) == 0 and len(records(tmp_path)) == 16


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_an_interrupted_run_leaves_whole_records_and_the_next_goes_on(tmp_path, how):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from znn.bench import suite
suite.ROOT = Path({str(tmp_path)!r}) / "root"
suite.build_figures = lambda results: 0
sys.exit(suite.main(["--out", {str(tmp_path / "results")!r}, "--machine", "here"]))
"""
    folder = tmp_path / "root" / "experiments" / "sweeps"
    folder.mkdir(parents=True)
    (folder / "fakes.toml").write_text(
        SWEEP.replace("lap_s = 0.002", "lap_s = [0.001, 2]")
        .replace("width = [3, 4]", "width = 3")
        .replace("threads = [1, 2]", "threads = 1")
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(records(tmp_path)) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    loaded = store.load(tmp_path / "results")
    assert len(loaded.records) == 1 and loaded.problems == [] and "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode == suite.INTERRUPTED and "goes on from here" in err
        assert next(iter(loaded.ends.values()))["complete"] is False
    else:
        assert process.returncode == -signal.SIGKILL and not loaded.ends
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and len(records(tmp_path)) == 2


def test_run_all_lists_every_experiment_of_the_project(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments/run_all.py"),
            "--list",
            "--tier",
            "paper",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "experiments" / "sweeps").glob("*.toml"):
        assert path.stem in done.stdout


def test_check_reports_what_is_wrong(experiments, tmp_path, capsys):
    from znn.bench.__main__ import check

    run(tmp_path)
    text, sound = check(tmp_path / "results")
    assert sound and "4 ok" in text and "12 samples" in text
    path = next((tmp_path / "results").glob("*/*.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"kind": "ca')
    text, sound = check(tmp_path / "results")
    assert not sound and "torn" in text


def test_records_are_lines_of_json(experiments, tmp_path):
    run(tmp_path)
    lines = next((tmp_path / "results").glob("*/*.jsonl")).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["run", *["case"] * 4, "end"]
