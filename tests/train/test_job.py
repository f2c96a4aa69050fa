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

from znn.checkpoint import load_checkpoint, save_checkpoint
from znn.errors import DataError
from znn.infer import infer
from znn.spec import NetworkSpec
from znn.train.job import RATES, Settings, load_volumes, run_job
from znn.train.loop import read_curve
from znn.train.synthetic import cell_volume
from znn.train.volumes import read_volume

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
    assert [v.known[0].extent[0] for v in training] == [7, 7] and [v.extent[0] for v in held_out] == [3, 3]
    assert training[0].mask_patch((0, 0, 0), (1, 2, 2)).all()
    with pytest.raises(DataError, match="2 images but 1 labels"):
        load_volumes(Settings(**files | {"labels": files["labels"][:1]}))
    with pytest.raises(DataError, match="cannot hold out 10 of 10"):
        load_volumes(Settings(**files, hold_out=10))
    with pytest.raises(DataError, match="without images"):
        load_volumes(Settings(labels=("x",)))


def test_adam_with_everything_on_resumes_bit_identically(tmp_path):
    """Elastic deformation, rebalancing and several patches are functions of seed and round, too."""
    settings = replace(
        SETTINGS, rounds=16, validate_every=4, optimiser="adam", rate=0.01, elastic=3.0, balance=True, patches=2,
        schedule="step", warm_up=0.1, bundle=8, output=(1, 12, 12),
    )
    run_job(settings, tmp_path / "whole", SPEC)
    whole = load_checkpoint(tmp_path / "whole" / "last.npz")

    def stop(line):
        if line["kind"] == "validation" and line["round"] == 8:
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError):
        run_job(settings, tmp_path / "killed", SPEC, report=stop)
    run_job(settings, tmp_path / "killed", SPEC)
    resumed = load_checkpoint(tmp_path / "killed" / "last.npz")
    assert resumed.round == 16 and resumed.optimiser["kind"] == "Adam"
    for state in ("parameters", "momenta", "second_moments"):
        for name, value in getattr(whole, state).items():
            np.testing.assert_array_equal(getattr(resumed, state)[name], value)


def test_the_rate_goes_with_the_optimiser():
    assert Settings().rate == RATES["sgd"] and Settings(optimiser="adam").rate == RATES["adam"]
    with pytest.raises(DataError, match="optimiser 'lion'; expected one of sgd, adam"):
        Settings(optimiser="lion")


def test_runs_of_older_versions_go_on(tmp_path):
    """Their checkpoints lack the settings that came later, which had the defaults' meaning."""
    run_job(replace(SETTINGS, rounds=4), tmp_path, SPEC)
    checkpoint = load_checkpoint(tmp_path / "last.npz")
    settings = checkpoint.extra["training"]["settings"]
    for name in ("optimiser", "warm_up", "elastic", "tensorboard"):
        del settings[name]
    with checkpoint.network(threads=1, plan="direct") as net:
        save_checkpoint(tmp_path / "last.npz", net, checkpoint.extra)
    assert run_job(replace(SETTINGS, rounds=6), tmp_path, SPEC)["rounds"] == 6


def test_event_files_hold_the_learning_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(SETTINGS, rounds=20, tensorboard=True)
    run_job(settings, tmp_path, SPEC)
    run_job(replace(settings, rounds=30), tmp_path, SPEC)  # resumed: no round twice
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    lines = [line for line in read_curve(tmp_path / "curve.jsonl") if line["kind"] == "validation"]
    found = events.Tensors("validation/pixel_error")
    assert [event.step for event in found] == [line["round"] for line in lines] == [10, 20, 30]
    np.testing.assert_allclose([event.tensor_proto.float_val[0] for event in found],
                               [line["pixel_error"] for line in lines], rtol=1e-6)
    assert {"train/loss", "validation/loss", "learning_rate"} <= set(events.Tags()["tensors"])


def test_event_files_without_the_library_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(DataError, match=r"need the package tensorboard; pip install 'znn\[tensorboard\]'"):
        run_job(replace(SETTINGS, tensorboard=True), tmp_path / "run", SPEC)
    assert not (tmp_path / "run" / "curve.jsonl").exists()


def volumes_on_disk(folder, target):
    """Two HDF5 volumes with images, labels and masks, of different extents."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(1)
    files = []
    for number, extent in enumerate([(10, 40, 44), (8, 36, 30)]):
        image, cells = cell_volume(extent, seed=number, cell=16.0)
        classes = np.where(cells == 0, 1, np.where(image > 175, 2, 0)).astype(np.uint8)
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file["raw"], file["mask"] = image, rng.random(extent) < 0.9
            file["labels"] = classes if target == "classes" else cells
        files.append(str(folder / f"{number}.h5"))
    return {kind: tuple(f"{file}:{name}" for file in files)
            for kind, name in (("images", "raw"), ("labels", "labels"), ("masks", "mask"))}


@pytest.mark.parametrize("target, loss, maps", [("boundary", "binomial", 1), ("classes", "softmax", 3), ("affinities", "binomial", 3)])
def test_every_target_from_several_masked_volumes_to_a_whole_output(tmp_path, target, loss, maps):
    layers = [{"conv": 8, "kernel": 3, "transfer": "relu"}, {"max_pool": (1, 2, 2)},
              {"conv": 8, "kernel": (1, 3, 3), "transfer": "relu"}, {"conv": maps, "kernel": 1}]
    spec = NetworkSpec.layered("pooled", 1, layers, loss=loss)
    files = volumes_on_disk(tmp_path, target)
    settings = Settings(**files, hold_out=2, target=target, output=(2, 6, 6), rounds=60, validate_every=30, rate=0.01,
                        optimiser="adam", balance=True, elastic=2.0, threads=2, seed=1)
    losses = []
    summary = run_job(settings, tmp_path / "run", spec, report=lambda line: losses.append(line["loss"]))
    assert losses[-1] < losses[0] and summary["measured_on"] == "held-out sections"
    assert 0 <= summary["pixel_error"] < 0.5 and summary["standard_error"] > 0
    result = infer(tmp_path / "run" / "best.npz", read_volume(files["images"][0]), tmp_path / "out.h5", threads=2)
    assert result.output.shape == (maps, 10, 40, 44)
    values = result.output[:]
    assert 0 <= values.min() < values.max() <= 1
    if target == "classes":
        np.testing.assert_allclose(values.sum(0), 1, rtol=1e-5)


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DataError, match=f"{folder}: cannot be the folder of the run: (File exists|Not a directory)"):
            run_job(SETTINGS, folder, SPEC)
    assert (tmp_path / "file").read_text() == "mine"
