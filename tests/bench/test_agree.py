"""Two runs agree when nothing has changed, also on a machine that drifted, and do not when something has."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_record import make

sys.path.insert(0, str(Path(__file__).parents[1] / "paper_figs"))
import synthetic  # noqa: E402

from znn.bench import agree, store  # noqa: E402
from znn.bench.__main__ import main  # noqa: E402


def run(seed, cases=40, slow=lambda case: 1.0, rounds=9):
    """Records of pairs of cases measured in turns, every sample with noise of its own and of its round."""
    rng, records = np.random.default_rng(seed), []
    for pair in range(cases // 2):
        of_round = rng.lognormal(0, 0.05, rounds)
        for which in range(2):
            case = 2 * pair + which
            samples = (0.1 * (1 + which)) * of_round * rng.lognormal(0, 0.01, rounds) * slow(case)
            records.append(
                make(
                    case_id=f"{case:012d}",
                    machine_id="m",
                    samples_s=samples.tolist(),
                    interleaved_with=[f"{case ^ 1:012d}"],
                )
            )
    return records


def test_two_runs_of_the_same_agree():
    found = agree.agreement(run(1), run(2))
    assert len(found.seconds) == 40 and len(found.ratios) == 20 and found.sound
    assert agree.missed(found.seconds) <= agree.allowed(40) and "the runs agree" in agree.to_text(found)


@pytest.mark.parametrize("kind", ["seconds", "ratios"])
def test_the_intervals_miss_no_more_often_than_they_say(kind):
    """Over many pairs of runs of the same; bootstrap intervals of medians of few samples are a little wide."""
    found = [agree.agreement(run(2 * seed), run(2 * seed + 1)) for seed in range(20)]
    rows = [row.strictly() for one in found for row in getattr(one, kind)]
    assert 0 < agree.missed(rows) / len(rows) < 0.08


def test_a_machine_that_drifted_a_little_still_agrees():
    found = agree.agreement(run(1), run(2, slow=lambda case: 1.06))
    assert found.sound and found.drift.value == pytest.approx(1.06, abs=0.02)


def test_a_machine_that_changed_does_not():
    found = agree.agreement(run(1), run(2, slow=lambda case: 1.3))
    assert not found.sound and "the runs do not agree" in agree.to_text(found)


def test_cases_that_changed_are_named():
    found = agree.agreement(run(1), run(2, slow=lambda case: 1.5 if case % 8 == 1 else 1.0))
    assert not found.sound
    assert agree.missed(found.ratios) >= 5 and "DIFFERS" in agree.to_text(found)
    assert all(row.change.value > 1.3 for row in found.ratios if not row.agrees and row.change.low > 1.2)


def test_processes_may_differ_a_little_in_seconds_but_not_in_ratios():
    quiet = lambda seed, slow: run(seed, slow=lambda case: slow if case % 2 else 1.0, rounds=31)  # noqa: E731
    found = agree.agreement(quiet(1, 1.0), quiet(2, 1.04))
    assert agree.missed(found.seconds) <= agree.allowed(40) < agree.missed(found.ratios) and not found.sound


def test_few_cases_are_not_excused_by_drift():
    found = agree.agreement(run(1, cases=2), run(2, cases=2, slow=lambda case: 2.0))
    assert found.drift.value == 1.0 and not found.sound


def test_failed_cases_and_other_machines_do_not_count():
    records = [make(machine_id="m", status="failed", samples_s=[]), make(machine_id="n", samples_s=[1.0])]
    found = agree.agreement(records, [make(machine_id="m", samples_s=[1.0])])
    assert not found.seconds and not found.sound and "no common case" in agree.to_text(found)


@pytest.mark.parametrize("count, most", [(0, 0), (1, 1), (20, 4), (100, 11)])
def test_what_chance_allows(count, most):
    assert agree.allowed(count) == most


def test_the_command_takes_files_folders_and_run_ids(tmp_path, capsys):
    for name, slow in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
        synthetic.write(tmp_path / name, "smoke", slow=slow, machine=f"m-{name}", only={"scaling_3d", "plans"})
        for path in (tmp_path / name).glob("*/*.jsonl"):  # all of one machine
            target = tmp_path / "all" / "m" / f"run-{name}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text())
    folder = str(tmp_path / "all")
    same = main(["agree", "run-a", "run-b", "--results", folder, "--all"])
    out = capsys.readouterr().out
    assert same == 0 and "the runs agree" in out and "agrees" in out and "scaling_3d" in out
    files = [str(tmp_path / "all" / "m" / f"run-{name}.jsonl") for name in "ac"]
    assert main(["agree", *files]) == 1
    assert "the runs do not agree" in capsys.readouterr().out
    assert main(["agree", folder, folder]) == 0
    assert main(["agree", "nobody", "run-a", "--results", folder]) == 2
    assert "nobody" in capsys.readouterr().err


def test_a_run_id_that_means_two_runs_is_refused(tmp_path):
    with pytest.raises(store.StoreError, match="0 runs"):
        store.find("x", tmp_path)
