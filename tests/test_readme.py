"""The README holds what it promises: its example runs as printed, its commands work, its links lead somewhere."""
from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import markdown_code as markdown
from markdown_code import ROOT
from znn.cli import main

README = ROOT / "README.md"


def test_the_example_runs_as_printed(capsys):
    names = markdown.run_python(README)
    try:
        assert names["losses"][-1] < names["losses"][0], "the network did not learn"
        assert str(names["net"].plan) in capsys.readouterr().out
    finally:
        names["net"].close()


def test_the_example_is_short():
    (example,) = markdown.blocks(README, "python")
    assert len(example.text.splitlines()) <= 10


@pytest.fixture
def stacks(tmp_path, monkeypatch):
    """train-volume.tif and train-labels.tif in a folder of their own, which becomes the current one."""
    tifffile = pytest.importorskip("tifffile")
    from znn.train import cell_volume

    images, labels = cell_volume((10, 64, 64), seed=3)
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("train-volume.tif", np.asarray(images, np.float32))
    tifffile.imwrite("train-labels.tif", np.asarray(labels, np.uint16))
    return tmp_path


def test_the_commands_train_and_infer(stacks, capsys):
    """As printed, but for a training time of two rounds."""
    train, infer = [words[1:] for words in markdown.commands(README) if words[:2] in (["znn", "train"], ["znn", "infer"])]
    at = train.index("--minutes")
    tiny = [*train[:at], "--rounds", "2", *train[at + 2:], "--output", "1,8,8", "--validate-every", "1", "--threads", "1"]
    assert main(tiny) == 0, capsys.readouterr().err
    assert main([*infer, "--threads", "1"]) == 0, capsys.readouterr().err
    import tifffile

    boundaries = tifffile.imread("boundaries.tif")
    assert boundaries.shape[-3:] == (10, 64, 64)
    assert 0 <= boundaries.min() < boundaries.max() <= 1


def test_the_other_commands_exist():
    markdown.check_commands(README)


def test_the_links_lead_somewhere():
    markdown.check_links(README)


def test_the_two_commands_are_rules_of_the_makefile():
    for rule in ("run", "test"):
        asked = subprocess.run(["make", "--dry-run", rule], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert asked.returncode == 0, asked.stderr
        assert {"run": "experiments/run_all.py", "test": "-m pytest"}[rule] in asked.stdout


def test_citation_and_readme_name_the_same_paper():
    citation, readme = (ROOT / "CITATION.cff").read_text(), README.read_text()
    assert "1510.06706" in citation and "1510.06706" in readme
    title = "A Fast and Scalable Algorithm for Training 3D Convolutional Networks"
    assert title in citation and title in " ".join(readme.split()).replace("{3D}", "3D")


def test_help_names_every_rule_for_people():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    for rule in ("run", "test", "setup", "figures", "docs", "bench", "clean"):
        assert f"make {rule}" in shown


@pytest.fixture
def bare_path(tmp_path):
    """A search path with the tools every system has, and nothing that compiles, installs or runs Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "find", "head", "id", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def setup(path, venv):
    return subprocess.run(["/bin/sh", "tools/setup.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={"PATH": str(path), "ZNN_VENV": str(venv)})


def test_setup_says_that_there_is_no_python(bare_path, tmp_path):
    told = setup(bare_path, tmp_path / "venv")
    assert told.returncode == 1
    assert "Python 3.11 or newer is needed" in told.stderr and len(told.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


def test_setup_says_that_there_is_no_compiler(bare_path, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    told = setup(bare_path, tmp_path / "venv")
    assert told.returncode == 1
    assert "no compiler for C++20 was found" in told.stderr and len(told.stderr.splitlines()) == 1
    assert not (tmp_path / "venv" / ".engine").exists()


def test_this_python_is_one_the_package_accepts():
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=3.11" and sys.version_info >= (3, 11)
