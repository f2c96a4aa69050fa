from pathlib import Path

import pytest

from znn.bench import sweep as sw

SWEEPS = sorted((Path(__file__).parents[2] / "experiments" / "sweeps").glob("*.toml"))
TEXT = """
[experiment]
name = "t"
title = "T"
adapter = ["znn", "torch_cpu"]
[protocol]
interleave = ["threads"]
[grid]
net = "scaling_3d"
width = [5, 10]
threads = "powers"
[[tied]]
kernel = [3, 5]
output = [[4, 4, 4], [1, 1, 1]]
[[tied]]
kernel = 7
output = [[2, 2, 2]]
[[exclude]]
adapter = "torch_cpu"
width = 10
[tiers.smoke]
width = 5
protocol = {max_rounds = 9}
[tiers.paper]
skip = true
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(TEXT)
    return sw.load(path)


def test_grid_ties_and_exclusions(sweep):
    cases = sw.expand(sweep, "quick", (4, 8))
    points = {
        (c.adapter, c.problem["width"], c.problem["kernel"], tuple(c.problem["output"]), c.options["threads"])
        for c in cases
    }
    assert len(points) == len(cases) == 3 * 3 * 4
    assert {(p[2], p[3]) for p in points} == {(3, (4, 4, 4)), (5, (1, 1, 1)), (7, (2, 2, 2))}
    assert {p[4] for p in points} == {1, 2, 4, 8}
    assert not [p for p in points if p[0] == "torch_cpu" and p[1] == 10]


def test_tiers_overrides_and_chosen_adapters(sweep):
    assert sw.expand(sweep, "paper", (2, 2)) == []
    smoke = sw.expand(sweep, "smoke", (2, 2))
    assert {c.problem["width"] for c in smoke} == {5} and {c.protocol.max_rounds for c in smoke} == {9}
    chosen = sw.expand(sweep, "quick", (2, 2), {"threads": [3], "width": [7]}, adapters=["znn"])
    assert {(c.adapter, c.options["threads"], c.problem["width"]) for c in chosen} == {("znn", 3, 7)}


def test_ids_are_stable_and_groups_mix_only_the_interleaved_axis(sweep):
    cases = sw.expand(sweep, "quick", (2, 2))
    assert [c.case_id for c in cases] == [c.case_id for c in sw.expand(sweep, "quick", (2, 2))]
    groups = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    for members in groups.values():
        assert [c.options["threads"] for c in members] == [1, 2]
        assert len({(c.adapter, str(c.problem)) for c in members}) == 1


def test_competitors_share_a_group_and_lose_our_switches(tmp_path):
    path = tmp_path / "b.toml"
    path.write_text(
        '[experiment]\nname="b"\ntitle="B"\nadapter=["znn","torch_cpu"]\n[protocol]\ninterleave=["adapter","plan"]\n'
        '[grid]\nnet="3d_5"\nthreads=2\nplan=["direct","fft"]\n'
    )
    cases = sw.expand(sw.load(path), "quick", (2, 2))
    assert len(cases) == 3 and len({c.group for c in cases}) == 1
    assert [c.options for c in cases if c.adapter == "torch_cpu"] == [{"threads": 2}]


def test_words_for_threads_work_in_tied_tables_too(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(
        '[experiment]\nname="w"\ntitle="W"\nadapter="znn"\n[[tied]]\nwidth=[5,10]\nthreads="ends"\n[grid]\n'
        'net="3d_5"\n'
    )
    cases = sw.expand(sw.load(path), "quick", (4, 8))
    assert [(c.problem["width"], c.options["threads"]) for c in cases] == [(5, 1), (5, 4), (10, 1), (10, 4)]


@pytest.mark.parametrize(
    "value, counts",
    [
        ("all", [1, 2, 3, 4]),
        ("physical", [2]),
        ("ends", [1, 2]),
        ("powers", [1, 2, 4]),
        ([3, "ends"], [1, 2, 3]),
        (5, [5]),
    ],
)
def test_words_for_thread_counts(value, counts):
    assert sw.threads_of(value, (2, 4)) == counts


@pytest.mark.parametrize(
    "change, words",
    [
        (("[grid]", "[gird]"), "gird"),
        (('title = "T"', ""), "needs `title`"),
        (("[tiers.smoke]", "[tiers.tiny]"), "'tiny'"),
        (("kernel = [3, 5]", "kernel = [3]"), "differ in length"),
        (('"powers"', '"many"'), "'many'"),
        (("[grid]", "[grid"), "t.toml"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    path = tmp_path / "t.toml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(sw.SweepError, match=words):
        sw.expand(sw.load(path), "quick", (2, 2))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_of_the_project_expands(path):
    from znn.bench.problem import Problem

    sweep = sw.load(path)
    assert sweep.name == path.stem
    sizes = [len(sw.expand(sweep, tier, (4, 8))) for tier in sw.TIERS]
    assert 0 <= sizes[0] <= sizes[1] <= sizes[2] and sizes[2] > 0
    for case in sw.expand(sweep, "paper", (4, 8)):
        Problem.from_dict(case.problem)
        assert all(type(case.options.get(key, 0)) is int for key in ("threads", "width"))
