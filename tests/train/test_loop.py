import io
import json
import os
import signal
import threading

import numpy as np
import pytest

import znn
from znn.checkpoint import load_checkpoint
from znn.errors import DataError, EngineError
from znn.graph import Graph
from znn.spec import NetworkSpec
from znn.train.augment import Augmentation
from znn.train.evaluate import Evaluator
from znn.train.loop import SCHEDULES, Limits, Progress, Run, Schedule, State, duration, read_curve, trim_curve
from znn.train.sampler import Geometry, PatchReader, PatchSampler
from znn.train.volumes import make_volume

SPEC = NetworkSpec.layered(
    "tiny",
    1,
    [{"conv": 2, "kernel": 3, "transfer": "relu"}, {"conv": 1, "kernel": 1}],
    loss="binomial",
    dims=2,
)
OUTPUT = (1, 8, 8)
ENGINE = {"threads": 2, "plan": "direct", "sum": "ordered", "pin": False}
IMAGE = np.random.default_rng(0).standard_normal((4, 24, 24)).astype(np.float32)
VOLUME = make_volume(IMAGE, (IMAGE < 0.5).astype(np.uint8))


@pytest.fixture
def build(tmp_path):
    def build(folder="run", rounds=20, net=None, state=None, rate=0.1, every=5, **options):
        net = net or znn.Network(SPEC, OUTPUT, optimiser=znn.SGD(rate), **ENGINE)
        reader = PatchReader([VOLUME], Geometry.of(Graph.build(SPEC, output=OUTPUT)))
        return Run(
            net,
            PatchSampler(reader, 1, Augmentation()),
            Evaluator(reader, "binomial"),
            tmp_path / folder,
            Schedule(rate),
            Limits(rounds, validate_every=every, keep_every=10),
            state,
            **options,
        )

    return build


def curve(run):
    """The learning curve without what the clock says."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "waited_s")}
        for line in read_curve(run.folder / "curve.jsonl")
    ]


def test_a_run_learns_and_leaves_its_files(build):
    run = build(rounds=60)
    state = run.train()
    assert run.net.round == 60
    assert sorted(path.name for path in run.folder.iterdir()) == (
        ["best.npz", "curve.jsonl", "last.npz"] + [f"round-000000{n}0.npz" for n in range(1, 7)]
    )
    validation = [line for line in read_curve(run.folder / "curve.jsonl") if line["kind"] == "validation"]
    assert [line["round"] for line in validation] == list(range(5, 61, 5))
    assert validation[-1]["pixel_error"] < 0.5 * validation[-1]["trivial_error"]
    assert validation[-1]["loss"] < validation[0]["loss"]
    best = min(validation, key=lambda line: line["pixel_error"])
    assert state.best_error == best["pixel_error"]
    assert load_checkpoint(run.folder / "best.npz").round == best["round"]


def test_a_finished_run_is_left_as_it_is(build):
    run = build(rounds=7)
    state = run.train()
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    again = build(rounds=7, net=run.net, state=state)
    again.train()
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


class Killed(Exception):
    pass


def test_a_run_killed_anywhere_ends_as_one_never_killed(build):
    whole = build("whole")
    whole.train()
    for death in (1, 4, 5, 6, 13, 19):

        def kill(line, death=death):
            if line["kind"] == "train" and line["round"] == death:
                raise Killed

        broken = build(f"killed{death}", report=kill)
        with pytest.raises(Killed):
            broken.train()
        with open(broken.folder / "curve.jsonl", "a") as file:
            file.write('{"kind": "tra')  # the line a kill tore
        if (broken.folder / "last.npz").exists():
            checkpoint = load_checkpoint(broken.folder / "last.npz")
            resumed = build(
                broken.folder.name, net=checkpoint.network(**ENGINE), state=State.from_extra(checkpoint.extra)
            )
            assert resumed.net.round == death - death % 5
        else:
            resumed = build(broken.folder.name)
        resumed.train()
        for name, value in whole.net.parameters().items():
            np.testing.assert_array_equal(resumed.net.parameters()[name], value)
        assert curve(resumed) == curve(whole)


def test_a_diverging_loss_stops_the_run(build):
    run = build(rate=1e200)
    with np.errstate(all="ignore"), pytest.raises(EngineError, match="lower the learning rate"):
        run.train()


def test_a_signal_stops_after_the_round_and_saves(build):
    seen = []

    def interrupt(line):
        seen.append(line["round"])
        if line["round"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = build(report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert load_checkpoint(run.folder / "last.npz").round == run.net.round == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_threads_of_a_run_end_with_it(build):
    build().train()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("znn-prefetch")]


def test_schedules():
    for kind in SCHEDULES:
        schedule = Schedule(2.0, kind)
        rates = np.array([schedule(p) for p in np.linspace(0, 1, 101)])
        assert (rates > 0).all() and rates.max() == pytest.approx(2.0)
        assert rates[0] < 0.2
        assert (np.diff(rates[3:]) <= 0).all()
        assert rates[-1] == pytest.approx({"constant": 2.0, "step": 0.02}.get(kind, 0.002))
    assert Schedule(1.0, "linear")(0.51) == pytest.approx(0.5)
    assert Schedule(1.0, "cosine")(0.51) == pytest.approx(0.5)
    assert [Schedule(1.0, "step")(p) for p in (0.4, 0.6, 0.8)] == pytest.approx([1.0, 0.1, 0.01])
    assert Schedule(1.0, "exponential", 0.0)(2 / 3) == pytest.approx(0.01)
    assert Schedule(1.0, "constant", 0.0)(0.0) == 1.0
    rising = Schedule(1.0, "constant", 0.5)
    assert rising(0.25) == pytest.approx(0.5, abs=0.01) and rising(0.6) == 1.0
    for warm_up in (-0.1, 1.0):
        with pytest.raises(DataError, match="warm-up"):
            Schedule(1.0, warm_up=warm_up)


def test_limits():
    assert Limits(rounds=10).progress(5, 1e9) == 0.5
    assert Limits(minutes=2).progress(10**9, 60) == 0.5
    assert Limits(rounds=10, minutes=2).progress(9, 60) == 0.9
    for bad in ({}, {"rounds": 0}, {"minutes": -1}, {"rounds": 1, "validate_every": 0}):
        with pytest.raises(DataError):
            Limits(**bad)
    for bad in ((0.1, "steps"), (0.0,), (float("nan"),)):
        with pytest.raises(DataError):
            Schedule(*bad)


def test_curve_reading(tmp_path):
    path = tmp_path / "curve.jsonl"
    assert read_curve(path) == []
    lines = [{"kind": "train", "round": n} for n in range(1, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind"')
    assert read_curve(path) == lines
    trim_curve(path, 2)
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:2])
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_curve(path)


def test_a_foreign_checkpoint_is_no_run():
    for extra in (None, {}, {"training": 1}, {"training": {"unknown": 1}}):
        with pytest.raises(DataError, match="no run to resume"):
            State.from_extra(extra)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals_only():
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        progress = Progress(stream)
        progress.show(0.25, 30, "round 5")
        progress.done()
        assert ("round 5, 0:30, 1:30 left" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown
    assert duration(59.6) == "1:00" and duration(3723) == "1:02:03"
