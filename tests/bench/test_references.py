"""The kept outputs of the reference are those that the reference gives, and all that checks need is kept."""

import json

import numpy as np
import pytest

from znn.bench import adapters, references, suite
from znn.bench.adapters.base import direct_flop
from znn.bench.problem import Problem

SMALL = Problem.from_dict({"net": "scaling_3d", "width": 3, "output": 2})
CHEAP_FLOP = 1e8


@pytest.fixture
def counted(monkeypatch):
    """How often the reference is computed."""
    calls = []
    compute = references.Reference.compute
    monkeypatch.setattr(references.Reference, "compute", lambda self: (calls.append(self.key()), compute(self))[1])
    return calls


def test_the_kept_outputs_are_the_references():
    kept, compared = references.read(references.KEPT), 0
    for _, reference in suite.checked_problems():
        if direct_flop(reference.problem) < CHEAP_FLOP:
            outputs = kept[reference.key()]["outputs"]
            for name, array in reference.compute().items():
                np.testing.assert_allclose(np.array(outputs[name]), array, rtol=1e-10, atol=1e-12)
                compared += 1
    assert compared >= 5


def test_every_timed_case_of_the_project_has_its_outputs_kept():
    wanted = {reference.key(): text for text, reference in suite.checked_problems()}
    kept = set(references.read(references.KEPT))
    missing = [text for key, text in wanted.items() if key not in kept]
    assert not missing, f"python -m znn.bench references computes them: {missing}"
    assert kept <= set(wanted)


def test_whatever_goes_in_changes_the_key():
    from dataclasses import replace

    reference = adapters.reference(SMALL)
    keys = {reference.key(), adapters.reference(SMALL).key()}
    assert len(keys) == 1
    for other in (replace(SMALL, seed=1), replace(SMALL, width=4), replace(SMALL, phase="forward")):
        keys.add(adapters.reference(other).key())
    keys.add(references.Reference(SMALL, reference.rounds, 0.5, reference.momentum).key())
    keys.add(references.Reference(SMALL, 1, reference.rate, reference.momentum).key())
    assert len(keys) == 6


def test_cases_of_a_run_share_what_is_not_kept(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(references, "KEPT", tmp_path / "nothing.json")
    reference = adapters.reference(SMALL)
    first = references.outputs(reference, tmp_path)
    again = references.outputs(reference, tmp_path)
    assert len(counted) == 1 and np.array_equal(first["output"], again["output"])
    assert first["output"].dtype == np.float64


def test_renewing_computes_what_is_missing_and_drops_the_rest(tmp_path, counted):
    path = tmp_path / "kept.json"
    other = adapters.reference(Problem.from_dict({"net": "3d_3", "width": 2, "kernel": 2}))
    assert references.renew([("small", adapters.reference(SMALL)), ("other", other)], path) == (2, 2)
    assert references.renew([("small", adapters.reference(SMALL))], path) == (1, 0) and len(counted) == 2
    (entry,) = json.loads(path.read_text()).values()
    assert entry["problem"] == "small" and np.shape(entry["outputs"]["output"]) == (1, 2, 2, 2)
