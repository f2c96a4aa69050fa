import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from znn import SGD, Network
from znn.checkpoint import VERSION, load_checkpoint, save_checkpoint
from znn.errors import CheckpointError
from znn.spec import NetworkSpec

SPEC = NetworkSpec.layered(
    "small",
    1,
    [
        {"conv": 3, "kernel": 3, "transfer": "relu"},
        {"max_filter": 2},
        {"conv": 2, "kernel": 2, "transfer": "tanh"},
    ],
)
OUTPUT = (2, 3, 4)


def trained(rounds=3, seed=5, threads=1, spec=SPEC, plan="direct", patches=1):
    net = Network(
        spec,
        OUTPUT,
        seed=seed,
        optimiser=SGD(0.05, 0.8, 0.01),
        threads=threads,
        plan=plan,
        sum="ordered",
        patches=patches,
        pin=False,
    )
    train(net, range(rounds))
    return net


def train(net, rounds):
    extent = net.graph.node("input").extent
    lead = () if net.patches == 1 else (net.patches,)
    for index in rounds:
        rng = np.random.default_rng(index)
        net.train_step(
            rng.standard_normal((*lead, 1, *extent), dtype=np.float32),
            rng.standard_normal((*lead, 2, *OUTPUT), dtype=np.float32),
        )


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])


def test_everything_comes_back(tmp_path):
    net = trained()
    net.learning_rate = 0.0123
    save_checkpoint(tmp_path / "a.npz", net, {"who": ["me", 1]})
    checkpoint = load_checkpoint(tmp_path / "a.npz")
    assert checkpoint.spec == SPEC and checkpoint.output == {"output": OUTPUT}
    assert (checkpoint.round, checkpoint.seed, checkpoint.patches) == (3, 5, 1)
    assert checkpoint.learning_rate == 0.0123 and checkpoint.extra == {"who": ["me", 1]}
    assert checkpoint.make_optimiser() == SGD(0.05, 0.8, 0.01)
    same(checkpoint.parameters, net.parameters())
    same(checkpoint.momenta, net.momenta())


DROPPING = NetworkSpec.layered(
    "dropping", 1, [{"conv": 3, "kernel": 3, "transfer": "relu"}, {"dropout": 0.5}, {"conv": 2, "kernel": 3}]
)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("plan", ["direct", "fft"])
@pytest.mark.parametrize("spec, patches", [(SPEC, 1), (DROPPING, 1), (DROPPING, 2)])
def test_resumed_training_is_bit_identical(tmp_path, threads, plan, spec, patches):
    options = dict(spec=spec, plan=plan, patches=patches)
    whole = trained(6, threads=threads, **options)
    save_checkpoint(tmp_path / "a.npz", trained(3, threads=threads, **options))
    # The resumed half may even run on another number of threads.
    for others in {threads, 2}:
        resumed = load_checkpoint(tmp_path / "a.npz").network(
            threads=others, plan=plan, sum="ordered", pin=False
        )
        assert resumed.round == 3 and resumed.patches == patches
        train(resumed, range(3, 6))
        same(resumed.parameters(), whole.parameters())
        same(resumed.momenta(), whole.momenta())


def test_the_same_state_gives_the_same_bytes(tmp_path):
    net = trained()
    save_checkpoint(tmp_path / "a.npz", net)
    save_checkpoint(tmp_path / "b.npz", net)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_numpy_alone_reads_the_file(tmp_path):
    net = trained()
    save_checkpoint(tmp_path / "a.npz", net)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        assert header["format"] == "znn checkpoint" and header["round"] == 3
        np.testing.assert_array_equal(file["parameters/conv1"], net.parameters()["conv1"])


def test_every_truncation_is_found(tmp_path):
    save_checkpoint(tmp_path / "a.npz", trained())
    content = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / "cut.npz").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut.npz"):
            load_checkpoint(tmp_path / "cut.npz")


def test_a_changed_bit_is_found_or_harmless(tmp_path):
    save_checkpoint(tmp_path / "a.npz", trained(), "extra")
    good = load_checkpoint(tmp_path / "a.npz")
    content = (tmp_path / "a.npz").read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in rng.integers(0, len(content), 400):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.integers(8)
        (tmp_path / "changed.npz").write_bytes(changed)
        try:
            checkpoint = load_checkpoint(tmp_path / "changed.npz")
        except CheckpointError as error:
            assert "changed.npz" in str(error) and "\n" not in str(error)
            found += 1
        else:
            same(checkpoint.parameters, good.parameters)
            assert (checkpoint.round, checkpoint.extra) == (3, "extra")
    assert found > 200


def rewrite(source, target, change=lambda header: None, drop=()):
    """Write the checkpoint again with another header, or without some members."""
    with np.load(source) as file:
        members = {name: file[name] for name in file.files if name not in drop}
    header = json.loads(members["header"].tobytes()) if "header" in members else {}
    change(header)
    if "header" in members:
        members["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(target, **members)


@pytest.mark.parametrize(
    "change, drop, message",
    [
        (lambda h: h.update(version=VERSION + 1), (), f"version {VERSION + 1} is newer than this znn"),
        (lambda h: h.update(version="two"), (), "version 'two'"),
        (lambda h: h.update(format="other"), (), "not a znn checkpoint"),
        (lambda h: h.pop("round"), (), "lacks round"),
        (lambda h: h["spec"].update(loss="none"), (), "loss"),
        (lambda h: h["arrays"]["momenta/conv1"].__setitem__(0, [1]), (), "momenta/conv1"),
        (lambda h: None, ("parameters/conv1",), "'parameters/conv1' is missing"),
        (lambda h: None, ("header",), "without the member 'header.npy'"),
    ],
)
def test_foreign_and_inconsistent_files(tmp_path, change, drop, message):
    save_checkpoint(tmp_path / "a.npz", trained())
    rewrite(tmp_path / "a.npz", tmp_path / "b.npz", change, drop)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "b.npz")
    assert "b.npz" in str(error.value)


def test_no_code_runs_while_loading(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "zipped.npz", "w") as archive:
        archive.writestr("header.npy", pickle.dumps(Bomb()))
    objects = np.empty(1, object)
    objects[0] = Bomb()
    np.savez(tmp_path / "objects.npz", header=objects)
    for name in ("pickle.npz", "zipped.npz", "objects.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint file"):
            load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    net = trained()
    save_checkpoint(tmp_path / "a.npz", net)
    before = (tmp_path / "a.npz").read_bytes()
    train(net, [9])
    with pytest.raises(CheckpointError, match="extra must be"):
        save_checkpoint(tmp_path / "a.npz", net, object())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="a.npz: cannot write the checkpoint: No space left"):
        save_checkpoint(tmp_path / "a.npz", net)
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_unknown_optimiser(tmp_path):
    save_checkpoint(tmp_path / "a.npz", trained())
    rewrite(tmp_path / "a.npz", tmp_path / "b.npz", lambda h: h["optimiser"].update(kind="Shampoo"))
    with pytest.raises(CheckpointError, match="unknown optimiser 'Shampoo'"):
        load_checkpoint(tmp_path / "b.npz").network()
