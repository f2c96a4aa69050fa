"""What importing znn loads: NumPy and the core, nothing that costs people time they did not ask for."""
from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import znn

HEAVY = {"pandas", "matplotlib", "pyfftw", "torch", "scipy", "skimage", "tifffile", "h5py", "zarr", "psutil", "asv"}


def loaded_by(code: str, cwd) -> set[str]:
    """Full names of the modules that a fresh interpreter loads for `code`."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {match[1] for match in re.finditer(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", done.stderr, re.M)}


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_check_can_fail(tmp_path):
    assert "psutil" in top(loaded_by("import psutil", tmp_path))


@pytest.mark.parametrize("code", [
    "import znn",
    "import znn; znn.Graph.build(znn.zoo.build('scaling_3d', width=2), output=2)",
    "import znn; znn.Network(znn.zoo.build('scaling_3d', width=2), output=2, threads=1, plan='direct').close()",
], ids=["import", "graph", "network"])
def test_importing_and_building_loads_nothing_heavy(code, tmp_path):
    names = loaded_by(code, tmp_path)
    assert {"znn", "numpy"} <= names
    assert not top(names) & HEAVY, f"loaded {sorted(top(names) & HEAVY)}"
    assert not any(name.startswith(("znn.bench", "znn.train", "znn.cli")) for name in names)


def test_describing_a_net_on_the_command_line_loads_nothing_heavy(tmp_path):
    code = "import sys; from znn.cli import main; sys.exit(main(['describe', 'scaling_3d', '--width', '2']))"
    found = top(loaded_by(code, tmp_path)) & HEAVY
    assert not found, f"loaded {sorted(found)}"


def test_every_public_name_is_there():
    for name in znn.__all__:
        assert getattr(znn, name) is not None
    assert len(set(znn.__all__)) == len(znn.__all__)


def test_the_version_is_the_packages():
    from importlib import metadata

    assert znn.__version__ == metadata.version("znn")
    assert importlib.import_module("znn._core").build_info()["version"] == znn.__version__
