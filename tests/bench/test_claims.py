import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "paper_figs"))
import synthetic  # noqa: E402

from znn.bench import claims, store  # noqa: E402

EXPERIMENTS = {
    "theory",
    "policies",
    "sums",
    "scaling_3d",
    "scaling_2d",
    "many_cores",
    "kernel_size_3d",
    "memoization",
}


def verdicts(root, thresholds=None, **how):
    synthetic.write(root, how.pop("tier", "quick"), only=EXPERIMENTS, **how)
    return {v.claim: v for v in claims.evaluate(store.load(root), thresholds or loose())}


def loose():
    """The project's thresholds with room for the made-up records."""
    limits = claims.load_thresholds()
    limits["C4"] = {"efficiency": 0.8}
    limits["C6"] |= {"efficiency": 0.8}
    return limits


def test_good_records(tmp_path):
    found = verdicts(tmp_path)
    assert {c: v.verdict for c, v in found.items()} == {
        "C1": claims.REPRODUCED,
        "C2": claims.REPRODUCED,
        "C3": claims.REPRODUCED,
        "C4": claims.REPRODUCED,
        "C5": claims.SIMULATED,
        "C6": claims.SIMULATED,
        "C7": claims.UNTESTABLE,
        "C8": claims.REPRODUCED,
    }
    assert "GPU" in found["C7"].reason and "width 80" in found["C6"].reason
    assert all(t.low is not None for t in found["C4"].tests)


def test_every_claim_has_a_threshold_in_the_sweeps():
    assert set(claims.load_thresholds()) == set(claims.CLAIMS)


def worse(claim):
    """Changes records so that one claim no longer holds."""

    def change(record):
        options, metrics = record.options, record.metrics
        if claim == "C1" and record.experiment == "theory":
            for row in metrics["rows"]:
                row["span_flop"] *= 1.01
        if claim == "C2" and record.adapter_name == "valgrind" and options["policy"] == "lifo":
            metrics["per_round"]["LL_read_misses"] = [1] * 7
        if claim == "C3" and record.adapter_name == "locks" and options["sum"] == "locked":
            metrics["lock_s"] = [1e-9] * 9
        if claim == "C4" and record.experiment == "scaling_3d" and options["threads"] == 8:
            return dataclasses.replace(record, samples_s=[3 * s for s in record.samples_s])
        if claim == "C8" and record.experiment == "memoization" and options["memoize"]:
            metrics["transforms"] = {"kernels": 9 * 3 * record.problem["width"] ** 2}
        return record

    return change


@pytest.mark.parametrize("claim", ["C1", "C2", "C3", "C4", "C8"])
def test_verdicts_change_with_the_records(tmp_path, claim):
    found = verdicts(tmp_path, change=worse(claim))
    assert found[claim].verdict == claims.FAILED and found[claim].reason
    others = {"C1", "C2", "C3", "C4", "C8"} - {claim}
    assert all(found[other].verdict == claims.REPRODUCED for other in others)


def test_verdicts_change_with_the_thresholds(tmp_path):
    limits = loose()
    limits["C4"]["efficiency"] = 1.5
    assert verdicts(tmp_path, limits)["C4"].verdict == claims.FAILED


def test_a_bad_simulation_proves_nothing(tmp_path):
    def change(record):
        if record.experiment == "many_cores":
            record.metrics["validation"][-1]["error"] = -0.6
        return record

    found = verdicts(tmp_path, change=change)["C5"]
    assert found.verdict == claims.UNTESTABLE and "60.0%" in found.reason


def test_a_simulation_that_falls_short_says_so(tmp_path):
    def change(record):
        if record.experiment == "many_cores":
            record.metrics["predicted"] = [
                p | {"speedup": min(50, p["speedup"])} for p in record.metrics["predicted"]
            ]
        return record

    found = verdicts(tmp_path, change=change)["C5"]
    assert found.verdict == claims.SIMULATED and "against" in found.reason


def test_measured_beats_simulated(tmp_path):
    found = verdicts(tmp_path, cores=256, machine="many")
    assert found["C5"].verdict == claims.FAILED and not any(t.simulated for t in found["C5"].tests)
    assert found["C5"].tests[0].value < 90  # the made-up net of width 40 reaches 256 * 40 / (40 + 0.3 * 256)


def test_the_papers_grid_can_speak_of_width(tmp_path):
    found = verdicts(tmp_path, tier="paper")["C6"]
    assert found.verdict in (claims.SIMULATED, claims.FAILED) and {t.simulated for t in found.tests} == {
        True,
        False,
    }


def test_gpu_records(tmp_path):
    def change(record):
        if record.adapter_name == "torch_gpu":
            factor = 0.01 if record.problem["net"] == "3d_3" else 1000
            return dataclasses.replace(record, samples_s=[factor * s for s in record.samples_s])
        return record

    assert verdicts(tmp_path / "a", missing=(), change=change)["C7"].verdict == claims.REPRODUCED
    found = verdicts(tmp_path / "b", missing=())["C7"]
    assert found.verdict == claims.FAILED and "ahead" in found.reason


def test_being_ahead_and_behind_is_not_enough_where_the_kernel_does_not_matter(tmp_path):
    def change(record):
        if record.adapter_name == "torch_gpu":  # slower at the smallest kernels, faster at the others
            factor = 1000 if record.problem["net"] in ("3d_3", "2d_10") else 0.01
            return dataclasses.replace(record, samples_s=[factor * s for s in record.samples_s])
        return record

    found = verdicts(tmp_path, missing=(), change=change)["C7"]
    assert found.verdict == claims.FAILED and "gains on the GPU with the kernel" in found.reason
    counts = {t.what: t.passed for t in found.tests if t.passed is not None}
    assert counts["cases in which ZNN is ahead of the GPU"] and counts["cases in which ZNN is behind the GPU"]


def test_the_simulations_errors_are_numbers_of_the_report(tmp_path):
    tests = verdicts(tmp_path)["C5"].tests
    errors = [t for t in tests if t.what.startswith("error of the simulated")]
    assert any("8 workers" in t.what for t in errors) and any("bandwidth left out" in t.what for t in errors)
    assert all(t.low <= t.value <= t.high for t in errors)


def test_one_core_cannot_speak_of_speedup_or_locks(tmp_path):
    found = verdicts(tmp_path, cores=1, machine="one")
    assert found["C4"].verdict == claims.UNTESTABLE and "two physical cores" in found["C4"].reason
    assert found["C3"].verdict == claims.UNTESTABLE and "one core" in found["C3"].reason


def test_markdown_and_json_agree(tmp_path):
    found = list(verdicts(tmp_path).values())
    text = claims.to_markdown(found, {})
    for v in found:
        assert f"| **{v.verdict}** |" in text and v.claim in claims.to_json(found)
