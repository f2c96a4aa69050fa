"""The wheel: it builds, and runs in an environment that has neither the sources nor a compiler; its recipe for cibuildwheel."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where scikit-build-core keeps what an installation compiled (pyproject.toml, build-dir): a wheel then takes seconds.
COMPILED = sorted((ROOT / "build").glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*/CMakeCache.txt"))


def run(command: list, cwd: Path, timeout: float = 120, **environment: str) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env=environment or None)
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if given := os.environ.get("ZNN_WHEEL"):  # one that was built before
        return Path(given)
    if not COMPILED:
        pytest.skip("nothing compiled to make a wheel of: `make setup`, or ZNN_WHEEL=FILE")
    for module in ("scikit_build_core", "pybind11"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], ROOT, 1800,
        **os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": "2"})
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_engine_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("znn/_core.") and name.endswith(".so") for name in names)
    assert "znn/train/job.py" in names and "znn/cli.py" in names
    for name in names:
        assert name.startswith(("znn/", "znn-")), f"{name} has no business in the wheel"
        assert not name.endswith((".cpp", ".hpp", ".a", ".o"))


@pytest.mark.slow
def test_the_wheel_trains_without_sources_and_build_tools(wheel, tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], tmp_path)
    # The dependencies are those of this environment; their folder comes after the new environment's own.
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("platlib") + "\n")
    clean = {"PATH": str(python.parent), "HOME": str(tmp_path), "ZNN_CACHE": str(tmp_path / "cache"),
             "ZNN_FFTW_RIGOUR": "estimate"}
    where = run([python, "-c", "import znn, znn._core; print(znn.__file__, znn._core.__file__)"], tmp_path, **clean).split()
    assert all(str(site) in file for file in where)
    assert "core      compiler" in run([python.parent / "znn", "info"], tmp_path, **clean)
    trained = run([python.parent / "znn", "train", "--rounds", "3", "--output", "1,16,16", "--threads", "1"], tmp_path, 300, **clean)
    assert "3 rounds" in trained and (tmp_path / "runs" / "boundary" / "best.npz").exists()


def test_cibuildwheel_accepts_its_recipe():
    """It builds for the Pythons the package is made for, and tries each wheel out."""
    recipe = PROJECT["tool"]["cibuildwheel"]
    assert "znn train" in recipe["test-command"]
    if not importlib.util.find_spec("cibuildwheel"):
        pytest.skip("cibuildwheel is not installed (pip install 'znn[wheels]')")
    chosen = run([sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--print-build-identifiers", ROOT], ROOT).split()
    assert {"cp311-manylinux_x86_64", "cp312-manylinux_x86_64", "cp313-manylinux_x86_64"} <= set(chosen)
    assert not [name for name in chosen if "musllinux" in name or name.startswith("pp")]
