"""The experiment torch_replace: models that can be built, both sides checked and interleaved, and what the record says."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import znn.torch
from znn.bench import adapters, sweep, torch_models
from znn.bench.adapters import torch_model_adapter
from znn.bench.problem import Problem, ProblemError

ROOT = Path(__file__).resolve().parents[1]
SWEEP = sweep.load(ROOT / "experiments/sweeps/torch_replace.toml")
TINY = ("conv2d_3_tiny", "conv3d_3_tiny")


def test_the_sweep_names_every_model_in_both_phases_and_both_sides_take_turns():
    cases = sweep.expand(SWEEP, "paper", (2, 2))
    assert {c.problem["net"] for c in cases} == set(torch_models.MODELS)
    groups = {}
    for case in cases:
        groups.setdefault(case.group, set()).add(case.adapter)
    assert all(names == {"torch_model", "torch_replaced"} for names in groups.values())
    assert len(groups) == 2 * len(torch_models.MODELS)


def test_the_models_cover_what_a_user_may_bring():
    convs = []
    for name, model in torch_models.MODELS.items():
        built, example = torch_models.build(model)
        again, _ = torch_models.build(model)
        assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), again.state_dict().values()))
        assert name.startswith(f"conv{model.dims}d") and example.shape == model.example
        convs += [m for m in built if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    for kind in (torch.nn.Conv2d, torch.nn.Conv3d):
        mine = [c for c in convs if isinstance(c, kind)]
        assert {1, 3, 5, 7} <= {max(c.kernel_size) for c in mine}
        assert any(c.groups == c.in_channels > 1 for c in mine) and any(1 < c.groups < c.in_channels for c in mine)
        assert any(max(c.stride) > 1 for c in mine)
    assert any(max(c.dilation) > 1 for c in convs)
    with pytest.raises(ProblemError, match="model 'nothing' is not one of conv2d_1"):
        torch_models.of("nothing")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("phase", ["round", "forward"])
def test_a_replaced_model_says_what_was_decided_and_is_checked(name, phase, monkeypatch):
    from znn.torch import replace

    monkeypatch.setattr(replace.Seconds, "faster", lambda *_: True)  # so that something is exchanged
    adapter = adapters.load("torch_replaced")
    problem = Problem.from_dict({"net": name, "phase": phase})
    session = adapter.start(problem, {"threads": 1})
    assert session.plan.startswith("replaced: 0, 2, 4\n")
    assert {type(session.model[i]) for i in (0, 2)} <= {znn.torch.Conv2d, znn.torch.Conv3d}
    found = json.loads(json.dumps(session.metrics()))
    assert [d["name"] for d in found["convolutions"]] == ["0", "2", "4"] and found["replace_s"] > 0
    before = session.model[0].weight.detach().clone()
    session.lap()
    assert torch.equal(before, session.model[0].weight) == (phase == "forward")
    check = adapter.check(problem, {"threads": 1})
    assert check["passed"] and check["max_rel_err"] < 1e-5
    assert ("gradients" in check["reference"]) == (phase == "round")


def test_a_wrong_result_fails_the_check(monkeypatch):
    adapter = adapters.load("torch_model")
    problem = Problem.from_dict({"net": TINY[0]})
    session = adapter.start(problem, {"threads": 1})
    assert adapter.check(problem, {"threads": 1})["passed"]
    honest = torch_model_adapter.gradients

    def wrong(session, double):
        found = honest(session, double)
        return found if double else found | {"weight": found["weight"] * 1.001}

    monkeypatch.setattr(torch_model_adapter, "gradients", wrong)
    assert not adapter.check(problem, {"threads": 1})["passed"]
    session.close()
