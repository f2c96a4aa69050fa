"""The experiment torch_layers: its adapters agree with the reference, say what ran, and why they cannot run."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from znn.bench import adapters, sweep
from znn.bench.problem import Problem

ROOT = Path(__file__).resolve().parents[1]
COMPILED = "znn.bench.adapters.torch_compiled_adapter:TorchCompiledAdapter"
LAYER = Problem.from_dict({"net": "chain", "width": 8, "depth": 1, "kernel": 3, "output": 4})
CASES = sweep.expand(sweep.load(ROOT / "experiments/sweeps/torch_layers.toml"), "quick", cores=(2, 2))


def test_the_grid_has_every_engine_and_both_phases():
    assert {case.adapter for case in CASES} == {"torch_layers", "torch_znn", COMPILED}
    assert {case.problem.get("phase", "round") for case in CASES} == {"round", "forward"}
    assert all(set(case.options) == {"threads"} for case in CASES)
    groups = {}
    for case in CASES:
        groups.setdefault(case.group, set()).add(case.adapter)
    assert all({"torch_layers", "torch_znn"} <= names for names in groups.values()), "engines take turns"


def test_a_lap_computes_the_gradient_of_the_input():
    for name in ("torch_layers", "torch_znn"):
        session = adapters.load(name).start(LAYER, {"threads": 2})
        session.lap()
        image = next(iter(session._inputs.values()))
        session.lap()
        assert image.grad is not None and image.grad.abs().max() > 0
        session.close()


def test_plans_say_what_ran():
    assert "methods: " in adapters.load("torch_znn").start(LAYER, {"threads": 1}).plan
    assert "layout" in adapters.load("torch_layers").start(LAYER, {"threads": 1}).plan


def test_torch_compile_agrees_with_the_reference():
    adapter = adapters.load(COMPILED)
    reason = adapter.unavailable()
    if reason:
        pytest.skip(reason)
    found = adapter.check(LAYER, {"threads": 2})
    assert found["passed"], found


def test_torch_compile_says_that_it_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CXX", "some-compiler")
    assert "some-compiler is not installed" in adapters.load(COMPILED).unavailable()
