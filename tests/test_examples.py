"""The example scripts run, in a tiny setting; on the ISBI stack where it lies beside the clone."""
from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import znn
from znn.graph import Graph
from znn.train import cell_volume, read_curve

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
ISBI = ROOT.parent / "shared" / "data" / "isbi2012"


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stacks(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    images, labels = cell_volume((12, 72, 72), seed=3, cell=24.0)
    tifffile.imwrite("images.tif", images)
    tifffile.imwrite("labels.tif", np.where(labels > 0, 255, 0).astype(np.uint8))
    return ["images.tif", "labels.tif"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does(name):
    text = (ROOT / "examples" / name).read_text()
    assert re.match(r'#!/usr/bin/env python3\n""".*\.', text), "no first sentence"
    shown = subprocess.run([sys.executable, ROOT / "examples" / name, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "usage:" in shown.stdout


def test_boundaries_in_2d(stacks):
    summary = load("examples/isbi2012_2d.py").main([*stacks, "--hold-out", "3", "--rounds", "40", "--output", "1", "24", "24",
                                                    "--threads", "2"])
    assert summary["measured_on"] == "held-out sections" and summary["pixel_error"] < summary["trivial_error"]
    import tifffile

    assert tifffile.imread("runs/isbi2012-2d/boundaries.tif").squeeze().shape == (12, 72, 72)


def test_boundaries_in_3d(stacks):
    script = load("examples/isbi2012_3d.py")
    summary = script.main([*stacks, "--hold-out", "3", "--rounds", "6", "--output", "1", "8", "8", "--threads", "2"])
    assert 0 < summary["pixel_error"] < 1
    import tifffile

    assert tifffile.imread("runs/isbi2012-3d/boundaries.tif").squeeze().shape == (12, 72, 72)
    assert Path("runs/isbi2012-3d/learning-curve.png").exists()


@pytest.mark.parametrize("name", ["isbi2012_3d", "cremi_hdf5"])
def test_the_field_of_view_is_the_one_written_down(name):
    script = load(f"examples/{name}.py")
    fov = Graph.build(script.network(), output=1).field_of_view()
    assert "ield of view " + " x ".join(map(str, fov)) in script.network.__doc__


@pytest.mark.parametrize("name", ["isbi2012_2d", "isbi2012_3d"])
def test_on_the_isbi_stack(name):
    if not ISBI.is_dir():
        pytest.skip(f"the ISBI 2012 stack is not in {ISBI}")
    out = ["--output", "1", "128", "128"] if name.endswith("2d") else ["--output", "2", "32", "32"]
    files = [str(ISBI / "train-volume.tif"), str(ISBI / "train-labels.tif")]
    module = load(f"examples/{name}.py")
    module.infer = lambda *arguments, **options: pytest.skip("trained; the whole stack takes too long here")
    with pytest.raises(pytest.skip.Exception):
        module.main([*files, "--rounds", "3", *out, "--threads", "2"])
    summary = json.loads(Path(f"runs/{name.replace('_', '-')}/summary.json").read_text())
    assert 0.15 < summary["trivial_error"] < 0.3 and summary["measured_on"] == "held-out sections"


def test_affinities_from_hdf5(capsys):
    h5py = pytest.importorskip("h5py")
    script = load("examples/cremi_hdf5.py")
    script.main(["--make", "a.hdf"])
    error = script.main(["a.hdf", "--rounds", "30", "--output", "2", "16", "16", "--threads", "2"])
    assert 0 < error < 0.5
    with h5py.File("runs/cremi/affinities.h5") as file:
        assert file["output"].shape == (3, 16, 96, 96)
    with h5py.File("b.hdf", "w") as file:
        file["other"] = np.zeros((2, 2, 2))
    with pytest.raises(znn.DataError, match="b.hdf: no dataset volumes/raw"):
        script.main(["b.hdf"])


def test_the_unlabelled_voxels_of_a_cremi_file_do_not_count():
    pytest.importorskip("h5py")
    script = load("examples/cremi_hdf5.py")
    script.main(["--make", "a.hdf"])
    volume = script.read_cremi(Path("a.hdf"))
    assert not volume.mask_patch((0, 0, 0), (2, 9, 9)).any() and volume.mask_patch((2, 0, 0), (2, 9, 9)).all()


def test_a_speed_study(capsys):
    rows = load("examples/speed_study.py").main(
        ["scaling_3d", "--width", "2", "--outputs", "1", "2", "--threads", "1", "--rounds", "1", "--csv", "speed.csv"])
    assert len(rows) == 4 and all(row["training_voxels_per_s"] > 0 < row["inference_voxels_per_s"] for row in rows)
    assert "fastest in training" in capsys.readouterr().out
    assert len(Path("speed.csv").read_text().splitlines()) == 5


def test_errors_of_an_example_are_one_line():
    done = subprocess.run([sys.executable, ROOT / "examples" / "isbi2012_2d.py", "none.tif", "none.tif"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "isbi2012_2d: none.tif: no such file\n"


# ---- the learning curves, an experiment of its own ------------------------------------------------------
def test_pytorch_trains_the_same_net_in_the_same_way(rng):
    """One loop and one stream of patches; after some rounds the parameters agree."""
    pytest.importorskip("torch")
    script = load("experiments/learning_curves.py")
    spec = znn.NetworkSpec.layered("tiny", 1, [{"conv": 3, "kernel": 3, "transfer": "relu"}, {"max_filter": 2},
                                               {"conv": 1, "kernel": 3}], loss="binomial", dims=2)
    graph = Graph.build(spec, output=(1, 9, 9))
    parameters = znn.init.initial_parameters(graph, 0)
    optimiser = znn.SGD(0.05, 0.9, 0.01)
    image = rng.standard_normal((1, *graph.node("input").extent)).astype(np.float32)
    target = (rng.random((1, 1, 9, 9)) < 0.3).astype(np.float32)
    weights = rng.random((1, 1, 9, 9)).astype(np.float32)
    theirs = script.TorchTrainer(graph, parameters, optimiser, channels_last=False)
    with znn.Network(graph, parameters=parameters, optimiser=optimiser, threads=1, plan="direct") as ours:
        for number in range(6):
            for net in (ours, theirs):
                net.learning_rate = 0.05 / (number + 1)
            factors = weights if number % 2 else None
            assert ours.train_step(image, target, factors) == pytest.approx(theirs.train_step(image, target, factors), rel=1e-4)
        assert theirs.round == ours.round == 6
        np.testing.assert_allclose(ours.forward(image), theirs.forward(image), rtol=1e-3, atol=1e-4)


def test_learning_curves_of_both_engines_in_one_figure():
    pytest.importorskip("torch")
    command = [sys.executable, ROOT / "experiments" / "learning_curves.py", "--minutes", "0.05", "--output", "1", "16", "16",
               "--validate-every", "2", "--threads", "1", "--results", "results", "--name", "tiny", "--plan", "direct"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"ZNN_FFTW_RIGOUR": "estimate"})
    assert done.returncode == 0, done.stderr
    files = sorted(Path("results").glob("*/learning_curves/*.jsonl"))
    assert [file.name for file in files] == ["tiny-torch.jsonl", "tiny-znn.jsonl"]
    for file in files:
        run, *lines = read_curve(file)
        assert run["kind"] == "run" and run["settings"]["output"] == [1, 16, 16] and run["machine"]["cpu"]
        assert {line["kind"] for line in lines} == {"train", "validation"}
    drawn = subprocess.run([sys.executable, ROOT / "paper_figs" / "build.py", "--results", "results", "--out", "figures",
                            "--only", "learning_curves"], capture_output=True, text=True, timeout=120)
    assert drawn.returncode == 0 and "drawn" in drawn.stdout, drawn.stderr
    assert Path("figures/learning_curves.png").stat().st_size > 5000
