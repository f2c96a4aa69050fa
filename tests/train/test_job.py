import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from znn.checkpoint import load_checkpoint
from znn.errors import DataError
from znn.spec import NetworkSpec
from znn.train.job import Settings, load_volumes, run_job
from znn.train.loop import read_curve

ROOT = str(Path(__file__).parents[2])
SPEC = NetworkSpec.layered(
    "tiny",
    1,
    [{"conv": 8, "kernel": 5, "transfer": "relu"}, {"max_filter": 2}, {"conv": 1, "kernel": 3}],
    loss="binomial",
    dims=2,
)
SETTINGS = Settings(
    rounds=40,
    validate_every=10,
    output=(1, 16, 16),
    synthetic_extent=(5, 48, 48),
    rate=0.05,
    seed=3,
    threads=2,
    plan="direct",
    sum="ordered",
)
FILES = {"best.npz", "curve.jsonl", "last.npz", "learning-curve.png", "sections.png", "summary.json"}


def test_a_job_without_data_runs_and_leaves_its_files(tmp_path):
    summary = run_job(SETTINGS, tmp_path / "run", SPEC)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["measured_on"] == "held-out sections" and summary["voxels"] == 48 * 48
    assert summary["pixel_error"] < summary["trivial_error"] and summary["rounds"] == 40
    for name in ("learning-curve.png", "sections.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_going_on_with_more_rounds(tmp_path):
    run_job(SETTINGS, tmp_path / "run", SPEC)
    summary = run_job(replace(SETTINGS, rounds=50), tmp_path / "run")
    assert summary["rounds"] == 50
    rounds = [line["round"] for line in read_curve(tmp_path / "run" / "curve.jsonl")]
    assert rounds == sorted(rounds) and rounds[-1] == 50


def test_another_run_in_the_same_folder_is_refused_or_starts_afresh(tmp_path):
    run_job(SETTINGS, tmp_path / "run", SPEC)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"rate = 0.05, not 0.2.*--fresh"):
        run_job(replace(SETTINGS, rate=0.2), tmp_path / "run", SPEC)
    other = NetworkSpec.layered("other", 1, [{"conv": 1, "kernel": 3}], loss="binomial", dims=2)
    with pytest.raises(DataError, match="another network"):
        run_job(SETTINGS, tmp_path / "run", other)
    assert run_job(replace(SETTINGS, rate=0.2), tmp_path / "run", other, fresh=True)["network"] == "other"
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"notes.txt"}


def test_killed_by_signal_9_and_resumed_equals_never_killed(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_job
from znn.train.job import run_job
run_job(test_job.SETTINGS, {str(tmp_path / "killed")!r}, test_job.SPEC)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": ROOT})
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "last.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(tmp_path / "killed" / "last.npz").round >= 10
    for name in ("killed", "whole"):
        run_job(SETTINGS, tmp_path / name, SPEC)
    ours, theirs = (load_checkpoint(tmp_path / name / "last.npz") for name in ("killed", "whole"))
    assert ours.round == theirs.round == 40
    for name in theirs.parameters:
        np.testing.assert_array_equal(ours.parameters[name], theirs.parameters[name])


def test_nothing_held_out_is_measured_on_the_training_sections(tmp_path):
    summary = run_job(replace(SETTINGS, hold_out=0, rounds=3), tmp_path, SPEC)
    assert summary["measured_on"] == "training sections"
    assert not (tmp_path / "best.npz").exists()


def test_several_volumes_with_masks_from_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.random((10, 20, 20)))
        np.save(tmp_path / f"{name}-labels.npy", rng.integers(0, 2, (10, 20, 20)))
        np.save(tmp_path / f"{name}-mask.npy", np.ones((10, 20, 20), bool))
    files = {
        kind: tuple(str(tmp_path / f"{name}{end}.npy") for name in "ab")
        for kind, end in (("images", ""), ("labels", "-labels"), ("masks", "-mask"))
    }
    training, held_out = load_volumes(Settings(**files, hold_out=3))
    assert [v.extent[0] for v in training] == [7, 7] and [v.extent[0] for v in held_out] == [3, 3]
    assert training[0].mask_patch((0, 0, 0), (1, 2, 2)).all()
    with pytest.raises(DataError, match="2 images but 1 labels"):
        load_volumes(Settings(**files | {"labels": files["labels"][:1]}))
    with pytest.raises(DataError, match="cannot hold out 10 of 10"):
        load_volumes(Settings(**files, hold_out=10))
    with pytest.raises(DataError, match="without images"):
        load_volumes(Settings(labels=("x",)))
