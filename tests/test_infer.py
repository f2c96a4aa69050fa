import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import znn.infer
from znn import Network as Engine
from znn.checkpoint import save_checkpoint
from znn.errors import DataError, SpecError
from znn.graph import Graph
from znn.infer import dense
from znn.init import initial_parameters
from znn.spec import EdgeSpec, NetworkSpec, NodeSpec
from znn.train.volumes import make_volume

POOLED = NetworkSpec.layered(
    "pooled",
    1,
    [
        {"conv": 3, "kernel": (1, 3, 2), "transfer": "relu"},
        {"max_pool": (1, 2, 2)},
        {"conv": 3, "kernel": (2, 2, 3), "transfer": "tanh"},
        {"max_pool": (2, 3, 2)},
        {"conv": 2, "kernel": (1, 2, 2)},
    ],
    loss="softmax",
)
# The ordered sum gives the same bits every time.
ENGINE = {"plan": "direct", "sum": "ordered", "threads": 2, "pin": False}
IMAGE = np.random.default_rng(0).standard_normal((7, 33, 30)).astype(np.float32)


def Network(spec, output, **options):
    return Engine(spec, output, **ENGINE, **options)


def infer(*arguments, **options):
    return znn.infer.infer(*arguments, **ENGINE, **options)


@pytest.fixture
def net():
    return Network(POOLED, (1, 1, 1), seed=3)


def whole_pass(net, borders="valid"):
    """One pass over everything by the dense net, the raw output."""
    spec = dense(POOLED)
    fov = Graph.build(spec, output=1).field_of_view("output")
    scaled = make_volume(IMAGE).image_patch((0, 0, 0), IMAGE.shape)
    if borders == "mirror":
        pads = [((f - 1) // 2, f - 1 - (f - 1) // 2) for f in fov]
        scaled = np.pad(scaled, [(0, 0), *pads], mode="reflect")
    out = tuple(n - f + 1 for n, f in zip(scaled.shape[1:], fov))
    return Network(spec, out, parameters=net.parameters()).forward(scaled)


def test_dense_form_says_everywhere_what_the_strided_net_says_at_one_voxel(net):
    scaled = make_volume(IMAGE).image_patch((0, 0, 0), IMAGE.shape)
    everywhere = whole_pass(net)
    fov = net.graph.node("input").extent
    assert everywhere.shape[1:] == tuple(n - f + 1 for n, f in zip(IMAGE.shape, fov))
    for z, y, x in [(0, 0, 0), (1, 3, 5), (3, 11, 7), tuple(n - 1 for n in everywhere.shape[1:])]:
        window = scaled[:, z : z + fov[0], y : y + fov[1], x : x + fov[2]]
        np.testing.assert_allclose(
            everywhere[:, z, y, x],
            net.forward(np.ascontiguousarray(window))[:, 0, 0, 0],
            rtol=1e-5,
            atol=1e-6,
        )


def test_dense_form_keeps_parameters_and_leaves_dense_nets_alone():
    shapes = Graph.build(POOLED, output=1).parameter_shapes
    assert Graph.build(dense(POOLED), output=1).parameter_shapes == shapes
    assert dense(dense(POOLED)) == dense(POOLED)


def test_crops_scale_with_the_stride():
    nodes = (
        NodeSpec("in", 1, "input"),
        NodeSpec("low", 1, "sum"),
        NodeSpec("far", 1, "transfer"),
        NodeSpec("near", 1, "sum"),
        NodeSpec("out", 1, "sum"),
    )
    edges = (
        EdgeSpec("pool", "max_pool", "in", "low", window=2),
        EdgeSpec("wide", "conv", "low", "far", kernel=5),
        EdgeSpec("cut", "crop", "low", "near"),
        EdgeSpec("a", "identity", "far", "out"),
        EdgeSpec("b", "identity", "near", "out"),
    )
    spec = NetworkSpec("crops", nodes, edges)
    graph = Graph.build(spec, output=1)
    image = np.random.default_rng(1).standard_normal((1, 14, 14, 14)).astype(np.float32)
    parameters = initial_parameters(graph, 0)
    everywhere = Network(dense(spec), 5, parameters=parameters).forward(image)
    small = Network(spec, 1, parameters=parameters)
    for z, y, x in [(0, 0, 0), (1, 2, 3), (4, 4, 4)]:
        window = image[:, z : z + 10, y : y + 10, x : x + 10]
        np.testing.assert_allclose(
            everywhere[:, z, y, x], small.forward(np.ascontiguousarray(window)).ravel(), rtol=1e-5
        )


def test_paths_of_different_stride_have_no_dense_form():
    nodes = (NodeSpec("in", 1, "input"), NodeSpec("out", 1, "sum"))
    edges = (
        EdgeSpec("pool", "max_pool", "in", "out", window=2),
        EdgeSpec("conv", "conv", "in", "out", kernel=1),
    )
    spec = NetworkSpec("odd", nodes, edges)
    with pytest.raises(SpecError):
        dense(spec)


@pytest.mark.parametrize("borders", ["valid", "mirror"])
@pytest.mark.parametrize("patch", [(1, 5, 7), (2, 40, 3), (9, 99, 99)])
def test_tiled_equals_one_dense_pass(net, borders, patch):
    result = infer(net, IMAGE, patch=patch, borders=borders, raw=True)
    expected = whole_pass(net, borders)
    assert result.output.shape == expected.shape and result.output.dtype == np.float32
    assert np.abs(result.output - expected).max() <= 1e-5 * np.abs(expected).max()
    if borders == "mirror":
        assert result.output.shape[1:] == IMAGE.shape


def test_probabilities_by_default(net):
    output = infer(net, IMAGE, patch=(2, 16, 16)).output
    np.testing.assert_allclose(output.sum(0), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a.h5", "a.zarr"])
def test_files_hold_the_same_as_memory(net, tmp_path, name):
    if not name.endswith("npy"):
        pytest.importorskip({"a.tif": "tifffile", "a.h5": "h5py", "a.zarr": "zarr"}[name])
    expected = infer(net, IMAGE, patch=(2, 16, 16)).output
    result = infer(net, IMAGE, tmp_path / name, patch=(2, 16, 16))
    np.testing.assert_array_equal(np.asarray(result.output[:]).reshape(expected.shape), expected)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a.h5", "a.zarr"])
def test_an_interrupted_run_goes_on_where_it_was(net, tmp_path, monkeypatch, name):
    if not name.endswith("npy"):
        pytest.importorskip({"a.tif": "tifffile", "a.h5": "h5py", "a.zarr": "zarr"}[name])
    expected = infer(net, IMAGE, patch=(2, 16, 16))
    stop_at = 5

    def stop(done, tiles, seconds):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(net, IMAGE, tmp_path / name, patch=(2, 16, 16), progress=stop)
    assert not (tmp_path / name).exists()
    result = infer(net, IMAGE, tmp_path / name, patch=(2, 16, 16))
    assert result.computed == expected.tiles - stop_at + 1
    np.testing.assert_array_equal(
        np.asarray(result.output[:]).reshape(expected.output.shape), expected.output
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_run_is_not_continued(net, tmp_path):
    def stop(done, tiles, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(net, IMAGE, tmp_path / "a.npy", patch=(2, 16, 16), progress=stop)
    other = Network(POOLED, 1, seed=4)
    result = infer(other, IMAGE, tmp_path / "a.npy", patch=(2, 16, 16))
    assert result.computed == result.tiles
    np.testing.assert_array_equal(result.output, infer(other, IMAGE, patch=(2, 16, 16)).output)


def test_from_a_checkpoint(net, tmp_path):
    save_checkpoint(tmp_path / "net.npz", net)
    np.testing.assert_array_equal(
        infer(tmp_path / "net.npz", IMAGE, patch=(2, 16, 16)).output,
        infer(net, IMAGE, patch=(2, 16, 16)).output,
    )


@pytest.mark.parametrize("bundle", [1, 8])
def test_both_engines_give_one_dense_pass(net, bundle):
    result = znn.infer.infer(net, IMAGE, patch=(2, 9, 30), borders="valid", raw=True, bundle=bundle, threads=2, pin=False)
    expected = whole_pass(net)
    assert np.abs(result.output - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_patch_is_chosen_within_the_memory_limit(net):
    result = infer(net, IMAGE, memory_bytes=2**28)
    assert result.output.shape[1:] == IMAGE.shape
    with pytest.raises(DataError, match="smallest patch"):
        infer(net, IMAGE, memory_bytes=1000)
    with pytest.raises(DataError, match="the limit is"):
        infer(net, IMAGE, patch=(7, 33, 30), memory_bytes=1000)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(borders="zero"), "borders 'zero'"),
        (dict(patch=(1, 0, 1)), "three positive numbers"),
        (dict(out="a.png"), "cannot write files ending in '.png'"),
        (dict(out="none/such/a.npy"), "does not exist"),
    ],
)
def test_bad_options(net, options, message):
    with pytest.raises(DataError, match=message):
        infer(net, IMAGE, **{"patch": (1, 8, 8)} | options)


def test_bad_volumes(net):
    with pytest.raises(DataError, match="2 maps, but the network's input has 1"):
        infer(net, np.stack([IMAGE, IMAGE]), patch=(1, 8, 8))
    with pytest.raises(DataError, match="smaller than the field of view"):
        infer(net, IMAGE[:1], patch=(1, 8, 8), borders="valid")


# ---- the memory limit: measured in a process of its own, for memory once taken is not always given back --------------
WIDE = NetworkSpec.layered("wide", 1, [{"conv": 24, "kernel": 5, "transfer": "relu"}, {"conv": 24, "kernel": 5}, {"conv": 1, "kernel": 1}])
LIMITED = """
import resource, sys
import numpy as np
import test_infer
from znn import Network
from znn.infer import infer

bundle, limit = int(sys.argv[1]), int(sys.argv[2])
image = np.random.default_rng(0).standard_normal((72, 80, 80)).astype(np.float32)
net = Network(test_infer.WIDE, 1, threads=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
result = infer(net, image, sys.argv[3], memory_bytes=limit, bundle=bundle, threads=2)
print(*result.patch, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.parametrize("bundle", [1, 8])
def test_memory_stays_under_the_limit(tmp_path, bundle):
    limit, output = 150 * 2**20, 4 * 72 * 80 * 80
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(bundle), str(limit), str(tmp_path / "out.npy")],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    *patch, grown = map(int, done.stdout.split())
    assert grown <= limit + output + 16 * 2**20, f"{grown / 2**20:.0f} MiB"  # and libraries loaded on the way
    assert 16**3 <= np.prod(patch) < 72 * 80 * 80


# ---- a disk that fills up: files may not grow beyond a limit, which is an error like that of a full disk --------------
FULL = """
import resource, signal, sys
import numpy as np
import test_infer
from znn.errors import DataError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
net = test_infer.Network(test_infer.POOLED, 1)
try:
    test_infer.infer(net, test_infer.IMAGE, sys.argv[1], patch=(2, 16, 16))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a.h5", "a.zarr"])
@pytest.mark.parametrize("room", [500, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, name, room):
    if not name.endswith("npy"):
        pytest.importorskip({"a.tif": "tifffile", "a.h5": "h5py", "a.zarr": "zarr"}[name])
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / name), str(room)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parent, env=os.environ | {"ZNN_CACHE": ""},
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: cannot write the output: " in done.stdout and len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
