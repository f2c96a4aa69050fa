"""Bad files at the command line: one clear sentence that names the file, exit code 2, and nothing half-written."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from znn.cli import main
from znn.train import cell_volume

tifffile = pytest.importorskip("tifffile")
TRAIN = ("--rounds", "2", "--output", "1,8,8", "--validate-every", "1", "--threads", "1", "--folder", "run")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A good stack of labels and images, and bad ones of every kind."""
    monkeypatch.chdir(tmp_path)
    image, labels = cell_volume((8, 48, 48), seed=2, cell=16.0)
    tifffile.imwrite("image.tif", image)
    tifffile.imwrite("labels.tif", labels)
    whole = Path("image.tif").read_bytes()
    Path("cut.tif").write_bytes(whole[: len(whole) // 2])
    tifffile.imwrite("packed.tif", image, compression="zlib")
    packed = Path("packed.tif").read_bytes()
    Path("cut-packed.tif").write_bytes(packed[: len(packed) // 2])
    tifffile.imwrite("channels.tif", np.stack([image] * 3, axis=-1))
    tifffile.imwrite("turned.tif", labels.transpose(2, 1, 0))
    tifffile.imwrite("shorter.tif", labels[:-1])
    tifffile.imwrite("flat.tif", np.ones_like(labels))
    tifffile.imwrite("no-mask.tif", np.zeros_like(labels))
    nan = image.astype(np.float32)
    nan[0, 3, 3] = np.nan
    np.save("nan.npy", nan)
    nan_labels = labels.astype(np.float32)
    nan_labels[0, 3, 3] = np.nan
    np.save("nan-labels.npy", nan_labels)
    Path("empty.tif").write_bytes(b"")
    Path("text.tif").write_text("this is no picture")
    return tmp_path


CASES = [
    (("cut.tif", "labels.tif"), "cut.tif: truncated"),
    (("cut-packed.tif", "labels.tif"), "cut-packed.tif: damaged"),
    (("empty.tif", "labels.tif"), "empty.tif: damaged"),
    (("text.tif", "labels.tif"), "text.tif: damaged"),
    (("none.tif", "labels.tif"), "none.tif: no such file"),
    (("channels.tif", "labels.tif"), "channels.tif: axes QYXS of extents (8, 48, 48, 3); expected YX, ZYX or CZYX"),
    (("image.tif", "turned.tif"), "image.tif: labels: extent (48, 48, 8), but the image's is (8, 48, 48)"),
    (("image.tif", "shorter.tif"), "labels: extent (7, 48, 48), but the image's is (8, 48, 48)"),
    (("image.tif", "flat.tif"), "every label is 1; expected at least two values"),
    (("nan.npy", "labels.tif"), "nan.npy: image: NaN or infinity found"),
    (("image.tif", "nan-labels.npy"), "labels: NaN or infinity found"),
    (("image.tif", "labels.tif", "no-mask.tif"), "the mask is empty"),
    (("image.tif", "labels.tif", "turned.tif"), "mask: extent (48, 48, 8)"),
]


@pytest.mark.parametrize("given, message", CASES, ids=["-".join(given) for given, _ in CASES])
def test_training_refuses_a_bad_file(files, capsys, given, message):
    options = [word for pair in zip(("--images", "--labels", "--masks"), given) for word in pair]
    assert main(["train", *options, *TRAIN]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("znn: ") and told.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("image, message", [
    ("cut.tif", "cut.tif: truncated"), ("nan.npy", "NaN or infinity"), ("channels.tif", "channels.tif: axes QYXS")])
def test_inference_refuses_a_bad_file(files, capsys, image, message):
    assert main(["train", "--images", "image.tif", "--labels", "labels.tif", *TRAIN]) == 0
    before = sorted(Path().iterdir())
    assert main(["infer", "run/last.npz", image, "out.tif", "--threads", "1"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1000] + b"x" * 1000, lambda whole: b""])
def test_a_damaged_checkpoint_is_refused_and_left_alone(files, capsys, damage):
    assert main(["train", "--images", "image.tif", "--labels", "labels.tif", *TRAIN]) == 0
    path = Path("run/last.npz")
    path.write_bytes(damage(path.read_bytes()))
    content, before = path.read_bytes(), sorted(Path().iterdir())
    for command in (["infer", "run/last.npz", "image.tif", "out.tif"],
                    ["train", "--images", "image.tif", "--labels", "labels.tif", *TRAIN]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "run/last.npz: not a readable checkpoint" in told and told.count("\n") == 1
    assert path.read_bytes() == content and sorted(Path().iterdir()) == before


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing is an error then
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from znn.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_while_training_is_one_sentence_and_the_last_checkpoint_stays(files):
    """RLIMIT_FSIZE: files cannot grow beyond a limit smaller than a checkpoint."""
    assert main(["train", "--images", "image.tif", "--labels", "labels.tif", *TRAIN]) == 0
    before = Path("run/last.npz").read_bytes()
    more = ("--rounds", "4", *TRAIN[2:])
    done = subprocess.run([sys.executable, "-c", FULL, "train", "--images", "image.tif", "--labels", "labels.tif", *more],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"ZNN_CACHE": ""})
    assert done.returncode == 1
    assert "cannot write the checkpoint: File too large" in done.stderr and done.stderr.count("\n") == 1
    assert Path("run/last.npz").read_bytes() == before
    assert not list(Path("run").glob(".*.tmp"))
    assert main(["train", "--images", "image.tif", "--labels", "labels.tif", *more]) == 0  # goes on once there is room


def last_line(text: str) -> str:
    """After what was said on the way, such as what a plan times."""
    return text.rstrip("\n").rpartition("\n")[2]


@pytest.mark.parametrize("command", [
    ["convert", "run/last.npz", "made.toml"], ["describe", "3d_3", "--output", "1", "--draw", "made.svg"],
    ["plan", "boundary", "--output", "1,8,8", "--threads", "1", "--save", "made.json"],
])
def test_a_full_disk_is_named_with_the_file_and_leaves_none(files, command):
    """And so is a folder that does not exist."""
    assert main(["train", "--images", "image.tif", "--labels", "labels.tif", *TRAIN]) == 0
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from znn.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 1 and last_line(done.stderr) == f"znn: {command[-1]}: File too large"
    assert not [path for path in Path().iterdir() if "made" in path.name]
    command[-1] = f"nowhere/{command[-1]}"
    done = subprocess.run([sys.executable, "-m", "znn", *command], capture_output=True, text=True)
    assert done.returncode == 1 and last_line(done.stderr) == f"znn: {command[-1]}: No such file or directory"
