import json
import os
import subprocess
import sys

import numpy as np
import pytest

import znn
from znn import cli
from znn.checkpoint import load_checkpoint, save_checkpoint
from znn.errors import PlanError
from znn.graph import Graph
from znn.spec import NetworkSpec

TINY = NetworkSpec.layered(
    "tiny",
    1,
    [{"conv": 4, "kernel": 4, "transfer": "relu"}, {"max_pool": 2}, {"conv": 1, "kernel": 2}],
    loss="binomial",
    dims=2,
)
COMMANDS = ("describe", "plan", "train", "infer", "bench", "trace", "convert", "info")


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TINY.save("tiny.toml")
    rng = np.random.default_rng(0)
    image = rng.standard_normal((5, 40, 40)).astype(np.float32)
    np.save("image.npy", image)
    np.save("labels.npy", (image < 0.7).astype(np.uint8))
    return tmp_path


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:\n  znn " + command in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_understood(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].strip().splitlines()
    for example in examples:
        cli._parser().parse_args(example.split("#")[0].split()[1:])


def test_describe(in_folder, capsys):
    code, out, err = run(capsys, "describe", "scaling_3d", "--width", 10, "--draw", "net.svg")
    graph = Graph.build(cli.load_network("scaling_3d", 10), output=12)
    assert code == 0 and not err
    assert f"{graph.parameter_count:,} parameters" in out and "37x37x37" in out and "sparsity 4x4x4" in out
    assert "<svg" in (in_folder / "net.svg").read_text()
    first = (in_folder / "net.svg").read_bytes()
    run(capsys, "describe", "scaling_3d", "--width", 10, "--draw", "net.svg")
    assert (in_folder / "net.svg").read_bytes() == first
    code, out, _ = run(capsys, "describe", "3d_5", "--input", 80, "--draw", "net.dot")
    assert code == 0 and (in_folder / "net.dot").read_text().startswith("digraph")
    assert run(capsys, "describe", "tiny.toml", "--draw", "net.jpg")[0] == 2


def test_train_then_infer_then_convert(in_folder, capsys):
    train = (
        "train",
        "--net",
        "tiny.toml",
        "--images",
        "image.npy",
        "--labels",
        "labels.npy",
        "--rounds",
        30,
        "--output",
        "12,12",
        "--rate",
        0.1,
        "--validate-every",
        10,
    )
    code, out, err = run(capsys, *train)
    assert code == 0 and err == "", "quiet where stderr is not a terminal"
    summary = json.loads((in_folder / "runs" / "tiny" / "summary.json").read_text())
    assert f"{summary['pixel_error']:.2%}" in out and f"{summary['trivial_error']:.2%}" in out
    assert load_checkpoint("runs/tiny/last.npz").output == {"output": (1, 12, 12)}
    assert run(capsys, *train, "--seed", 3)[0] == 2
    assert run(capsys, *train, "--seed", 3, "--fresh")[0] == 0

    code, out, err = run(capsys, "infer", "runs/tiny/last.npz", "image.npy", "out.npy", "--patch", "1,16,16")
    assert code == 0 and "voxels/s" in out and err == ""
    output = np.load("out.npy")
    assert output.shape == (1, 5, 40, 40) and 0 <= output.min() <= output.max() <= 1

    assert run(capsys, "convert", "runs/tiny/last.npz", "dense.toml", "--dense")[0] == 0
    assert NetworkSpec.load("dense.toml").edges[1].kind == "max_filter"
    assert run(capsys, "convert", "runs/tiny/last.npz", "back.toml")[0] == 0
    assert NetworkSpec.load("back.toml") == TINY


def test_plan_is_saved_and_taken_again(in_folder, capsys):
    code, out, _ = run(capsys, "plan", "tiny.toml", "--output", "4", "--method", "fft", "--save", "plan.json")
    assert code == 0 and "conv1" in out and "saved as plan.json" in out
    assert znn.Plan.load("plan.json").layers["conv1"].method == "fft"
    assert run(capsys, "trace", "tiny.toml", "--output", "4", "--plan", "plan.json", "--rounds", 1)[0] == 0
    (in_folder / "plan.json").write_text("{")
    assert run(capsys, "trace", "tiny.toml", "--output", "4", "--plan", "plan.json")[0] == 2


def test_trace(in_folder, capsys):
    code, out, _ = run(capsys, "trace", "tiny.toml", "--output", "4", "--threads", 2, "--save", "a.json")
    assert code == 0 and "of the time in tasks" in out and "conv2" in out
    events = json.loads((in_folder / "a.json").read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"forward", "backward", "update"}


def test_bench_prints_a_row_per_method_and_thread_count(in_folder, capsys):
    code, out, _ = run(
        capsys,
        "bench",
        "tiny.toml",
        "--output",
        "4",
        "--methods",
        "direct",
        "fft",
        "--threads",
        1,
        2,
        "--rounds",
        2,
    )
    rows = [line.split() for line in out.splitlines()[2:]]
    assert code == 0 and [row[:2] for row in rows] == [[m, t] for m in ("direct", "fft") for t in "12"]
    assert all(float(row[2]) > 0 and float(row[4].replace(",", "")) > 0 for row in rows)


def test_info_names_what_is_missing(capsys, monkeypatch):
    from importlib import metadata

    def version(name):
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = run(capsys, "info")
    assert code == 0 and "zarr missing, needed for Zarr; pip install 'znn[data]'" in out and "tifffile 1.2.3" in out
    assert "usable of" in out and "core " in out and "fftw      fftw-3" in out.lower()


def test_info_says_how_to_get_fftw(capsys, monkeypatch):
    def load():
        raise PlanError("no libfftw3f was found; install pyfftw")

    monkeypatch.setattr("znn.fftw.load", load)
    code, out, _ = run(capsys, "info")
    assert code == 0 and "fftw      missing: no libfftw3f was found; install pyfftw" in out


def test_nothing_but_the_result_is_written_where_there_is_no_terminal(in_folder):
    """No progress, no control characters: output may go into a file or a pipe."""
    command = [sys.executable, "-m", "znn", "train", "--images", "image.npy", "--labels", "labels.npy", "--net", "tiny.toml",
               "--rounds", "3", "--output", "1,4,4", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert all(line.isprintable() for line in done.stdout.splitlines()) and "3 rounds" in done.stdout
    out = subprocess.run([sys.executable, "-m", "znn", "infer", "runs/tiny/last.npz", "image.npy", "out.npy"],
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and out.stderr == "" and "voxels/s" in out.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("describe", "no_such_net"), "no_such_net"),
        (("describe", "none.toml"), "none.toml"),
        (("describe", "tiny.toml", "--width", 3), "--width"),
        (("describe", "tiny.toml", "--input", "3"), "conv"),
        (("train", "--images", "none.tif", "--labels", "none.tif"), "none.tif: no such file"),
        (("train", "--images", "image.npy", "--labels", "image.npy", "image.npy"), "1 images but 2 labels"),
        (("train", "--images", "image.npy", "--labels", "labels.npy", "--hold-out", 9), "cannot hold out 9"),
        (
            ("train", "--rate", -1, "--images", "image.npy", "--labels", "labels.npy", "--net", "tiny.toml"),
            "learning rate",
        ),
        (("infer", "tiny.toml", "image.npy", "out.npy"), "tiny.toml: not a readable checkpoint"),
        (("infer", "none.npz", "image.npy", "out.npy"), "none.npz: no such checkpoint"),
        (("convert", "tiny.toml", "tiny.png"), "tiny.png"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(in_folder, capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err and err.startswith("znn: ") and err.count("\n") == 1


def test_failures_are_one_line_and_code_1(in_folder, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "load_network", fail)
    code, _, err = run(capsys, "describe", "tiny.toml")
    assert code == 1 and "No space left" in err and err.count("\n") == 1


def test_ctrl_c_is_130(in_folder, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_network", interrupt)
    assert run(capsys, "describe", "tiny.toml")[0] == 130


@pytest.mark.parametrize(
    "arguments",
    [
        ("describe",),
        ("describe", "x", "--output", "0"),
        ("fly",),
        ("infer", "a", "b", "c", "--memory", "lots"),
        ("bench", "x", "--threads", "0"),
        ("train", "--schedule", "steps"),
    ],
)
def test_unknown_options_are_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    assert exit_.value.code == 2


def test_parsing():
    assert cli.parse_extent("96") == 96 and cli.parse_extent("1x9,6") == (1, 9, 6)
    assert cli.parse_bytes("2.5GiB") == int(2.5 * 2**30) and cli.parse_bytes("800M") == 800 * 2**20
    assert cli.parse_bytes("123") == 123


def test_a_net_in_a_checkpoint_can_be_described(in_folder, capsys):
    save_checkpoint("net.npz", znn.Network(TINY, (1, 2, 2)))
    code, out, _ = run(capsys, "describe", "net.npz", "--output", "2")
    assert code == 0 and out.startswith("tiny: loss binomial")


def test_the_module_runs_as_a_program(in_folder):
    done = subprocess.run(
        [sys.executable, "-m", "znn", "describe", "nonsense"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(znn.__file__))},
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.startswith("znn: ") and done.stdout == ""


def test_describe_measures_layers_against_the_roofline(in_folder, capsys):
    code, out, _ = run(capsys, "describe", "tiny.toml", "--output", "8")
    assert code == 0 and "in bundles of" in out and "of bound" not in out
    code, out, err = run(
        capsys, "describe", "tiny.toml", "--output", "8", "--measure", "--rounds", 2, "--threads", 1
    )
    assert code == 0 and "GFLOP/s" in out and "; measured " in out
    table = out[out.index("layer ") :].splitlines()
    rows = [line.split() for line in table[1:] if line.startswith("conv")]
    assert {row[0] for row in rows} == {"conv1", "conv2"} and table[0].split()[-3:] == ["of", "bound", "memory"]
    assert any(row[-1].endswith("%") or "MiB" in row for row in rows)
    assert "all" in table[-2] and table[-1].startswith("memory")
    assert "in bundles" not in run(capsys, "describe", "tiny.toml", "--bundle", 1)[1]


def test_plan_and_describe_of_inference(in_folder, capsys):
    for command in (["describe", "--measure", "--rounds", 1], ["plan", "--method", "model"]):
        training = [*command, "scaling_3d", "--width", 8, "--output", 12]
        code, out, _ = run(capsys, *training)
        inference = run(capsys, *training, "--inference")
        memory, less = (float(text[text.rindex("\nmemory ") :].split()[1]) for text in (out, inference[1]))
        assert code == inference[0] == 0 and less < memory
        assert "conv2" in inference[1] and " update " not in inference[1].split("in bundles")[-1]


def test_plan_keeps_to_a_memory_limit(in_folder, capsys):
    code, out, _ = run(capsys, "plan", "tiny.toml", "--output", "8", "--method", "model", "--memory-limit", "1GiB")
    assert code == 0 and "memory" in out
    code, _, err = run(capsys, "plan", "tiny.toml", "--output", "8", "--method", "model", "--memory-limit", "1M")
    assert code == 2 and "memory limit 1048576 bytes" in err and "at least" in err


def test_plan_beside_the_best_of_all(in_folder, capsys, monkeypatch):
    monkeypatch.setenv("ZNN_CACHE", str(in_folder / "cache"))
    code, out, err = run(capsys, "plan", "tiny.toml", "--output", "4", "--exhaustive")
    rows = [line.split() for line in out.splitlines() if line.startswith("conv") and line.split()[-1].isdigit()]
    assert code == 0 and "conv1: timing" in err and [row[0] for row in rows] == ["conv1", "conv2"]
    assert all(float(row[-2]) > 0 for row in rows) and out.strip().splitlines()[-1].startswith("all")
    assert run(capsys, "plan", "tiny.toml", "--output", "4", "--bundle", 1, "--method", "direct", "--exhaustive")[0] == 2


def test_bench_of_forward_passes(in_folder, capsys):
    code, out, _ = run(
        capsys, "bench", "tiny.toml", "--output", "4", "--methods", "bundled", "--threads", "1,2", "--rounds", 2, "--forward"
    )
    assert code == 0 and "a round is forward," in out and [line.split()[1] for line in out.splitlines()[2:]] == ["1", "2"]


def test_bench_against_pytorch(in_folder, capsys):
    pytest.importorskip("torch")
    code, out, err = run(
        capsys, "bench", "tiny.toml", "--output", "4", "--threads", "1", "--rounds", 2, "--against", "torch"
    )
    assert code == 0, err
    assert "tiny, output 1x4x4, 1 thread" in out and "times faster" in out and "updated parameters" in out
    assert "1 thread: layout c" in out and "oneDNN" in out and "round 2" in err
    dropout = NetworkSpec.layered("d", 1, [{"conv": 4, "kernel": 3}, {"dropout": 0.5}], dims=2)
    dropout.save("dropout.toml")
    code, _, err = run(capsys, "bench", "dropout.toml", "--output", "4", "--threads", "1", "--against", "torch")
    assert code == 2 and "dropout" in err
