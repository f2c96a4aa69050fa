import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "allocator",
    "baselines",
    "crossover",
    "direct",
    "forward_2d",
    "forward_3d",
    "gantt",
    "inference",
    "kernel_size_2d",
    "kernel_size_3d",
    "learning_curves",
    "many_cores",
    "memoization",
    "plans",
    "policies",
    "scaling_threads",
    "scaling_width",
    "sums",
    "theory",
    "torch_layers",
    "torch_replace",
    "whole_nets",
}


def build(results, out, *more, check=True):
    """Run build.py in a process in which importing znn or torch is an error; returns its standard output."""
    blocked = (
        "import sys, runpy; sys.modules['znn'] = None; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        blocked,
        str(ROOT / "paper_figs/build.py"),
        "--results",
        str(results),
        "--out",
        str(out),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    synthetic.write(root, "smoke", cores=2)
    return root, build(root, root / "figures")


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_figure_comes_from_records_without_the_engine(built):
    root, output = built
    assert {line.split()[0] for line in output.splitlines() if line.endswith("drawn")} == FIGURES
    for name in FIGURES:
        for suffix in (".pdf", ".png", ".csv", ".txt"):
            assert (root / "figures" / f"{name}{suffix}").stat().st_size > 50


def test_captions_name_machine_commit_and_samples(built):
    root, _ = built
    caption = (root / "figures" / "scaling_threads.txt").read_text()
    assert "Example CPU" in caption or "Other CPU" in caption
    assert "0123456789" in caption and "9 to 9 samples a case" in caption
    assert "SIMULATED" in (root / "figures" / "many_cores.txt").read_text()
    assert "not measured by us" in (root / "figures" / "inference.txt").read_text()
    assert "no CUDA device" in (root / "figures" / "baselines.txt").read_text()


def test_the_csv_holds_what_the_records_say(built):
    root, _ = built
    with open(root / "figures" / "scaling_threads.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["threads"] == "1"]
    assert rows and all(float(row["speedup"]) == 1 for row in rows)


def test_nothing_is_drawn_again_until_its_records_change(built, tmp_path):
    root = shutil.copytree(built[0], tmp_path / "copy")
    before = digest(root / "figures")
    assert "drawn" not in build(root, root / "figures").replace("unchanged", "")
    assert digest(root / "figures") == before
    synthetic.write(root, "smoke", machine="late", cores=4, only={"allocator"})
    drawn = {line.split()[0] for line in build(root, root / "figures").splitlines() if line.endswith("drawn")}
    assert drawn == {"allocator"}


def test_equal_records_give_equal_bytes(built, tmp_path):
    build(built[0], tmp_path / "again", "--only", "scaling_threads,baselines,gantt")
    for path in (tmp_path / "again").glob("*.p??"):
        assert path.read_bytes() == (built[0] / "figures" / path.name).read_bytes(), path.name


def test_no_records_no_figures_but_verdicts(tmp_path):
    output = build(tmp_path / "empty", tmp_path / "out")
    assert "drawn" not in output and output.count("not testable here") == 8
    verdicts = json.loads((tmp_path / "empty" / "claims.json").read_text())["claims"]
    assert {v["verdict"] for v in verdicts} == {"not testable here"} and all(v["reason"] for v in verdicts)


def test_an_unknown_figure_is_refused(tmp_path):
    assert build(tmp_path, tmp_path / "out", "--only", "nothing", check=False) == ""


def test_figures_do_not_mention_the_engine():
    for path in (ROOT / "paper_figs").glob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        assert not [
            line
            for line in lines
            if line[:2] in (["import", "znn"], ["from", "znn"]) or "znn." in " ".join(line[:2])
        ]


def test_reading_modules_use_nothing_outside_their_package():
    """What paper_figs loads of znn.bench must not import znn in any other way."""
    for name in ("record", "store", "stats", "claims", "report", "counters"):
        text = (ROOT / "znn" / "bench" / f"{name}.py").read_text()
        assert "import znn" not in text and "from znn" not in text and "from .." not in text
