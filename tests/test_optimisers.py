"""Adam in both engines: against the float64 reference, against PyTorch, resumed, and refused where it is misused."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import znn
from checks import ADAM, assert_identical, pair, random_inputs, random_targets, small_graph, train_alike
from znn import reference
from znn.errors import DataError, SpecError

ENGINES = [{"bundle": 1, "plan": "direct"}, {"bundle": 1, "plan": "fft"}, {"bundle": 8, "plan": "direct"}, {"bundle": 8, "plan": "tiled"}]
engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{e['bundle']}-{e['plan']}")


@engines
@pytest.mark.parametrize("patches", [None, 3])
@pytest.mark.parametrize("name", ["dense_3d", "groups"])
def test_adam_equals_the_reference(rng, name, patches, engine):
    net, expected = pair(small_graph(name), patches=patches, optimiser=ADAM, **engine)
    with net:
        train_alike(net, expected, rng, rounds=5, patches=patches)


def test_the_reference_is_pytorchs_adam(rng):
    torch = pytest.importorskip("torch")
    weights = torch.tensor(rng.standard_normal(7), requires_grad=True)
    theirs = torch.optim.Adam([weights], lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    w, m, s = weights.detach().numpy().copy(), np.zeros(7), np.zeros(7)
    for t in range(1, 6):
        gradient = rng.standard_normal(7)
        weights.grad = torch.tensor(gradient)
        theirs.step()
        w, m, s = reference.adam_step(w, m, s, gradient, 0.03, t, 0.8, 0.95, 1e-6, 0.1)
        np.testing.assert_allclose(w, weights.detach().numpy(), rtol=1e-12)


def test_the_first_step_is_the_rate_whatever_the_gradient(rng):
    """What the corrections for the moments' zero start are for."""
    graph = small_graph("dense_3d")
    with znn.Network(graph, optimiser=znn.Adam(rate=0.01, epsilon=1e-20), threads=1, plan="direct") as net:
        before = net.parameters()
        net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
        for name, value in net.parameters().items():
            step = np.abs(value - before[name])
            assert np.allclose(step[step > 0], 0.01, rtol=1e-3), name


def rounds_of(net, numbers):
    for number in numbers:
        rng = np.random.default_rng(number)
        net.train_step(random_inputs(net.graph, rng), random_targets(net.graph, rng))
        net.learning_rate = 0.01 / (number + 1)


@engines
def test_a_resumed_run_is_bit_identical(tmp_path, engine):
    graph, options = small_graph("dense_3d"), {"threads": 2, "sum": "ordered", "pin": False, **engine}
    with znn.Network(graph, optimiser=znn.Adam(0.01, weight_decay=0.01), seed=3, **options) as whole:
        rounds_of(whole, range(3))
        znn.save_checkpoint(tmp_path / "half.npz", whole)
        rounds_of(whole, range(3, 6))
        checkpoint = znn.load_checkpoint(tmp_path / "half.npz")
        assert checkpoint.make_optimiser() == whole.optimiser
        with checkpoint.network(**options) as resumed:
            rounds_of(resumed, range(3, 6))
            for state in ("parameters", "momenta", "second_moments"):
                assert_identical(getattr(resumed, state)(), getattr(whole, state)(), state)


def test_another_optimiser_begins_anew(tmp_path):
    graph = small_graph("dense_3d")
    with znn.Network(graph, threads=1, plan="direct") as net:
        rounds_of(net, range(2))
        znn.save_checkpoint(tmp_path / "sgd.npz", net)
        with znn.load_checkpoint(tmp_path / "sgd.npz").network(optimiser=znn.Adam(), threads=1, plan="direct") as other:
            assert_identical(other.parameters(), net.parameters())
            assert other.round == 0 and other.learning_rate == 0.001
            assert not any(value.any() for value in other.momenta().values())


def test_second_moments_are_adams_alone(rng):
    graph = small_graph("dense_3d")
    with znn.Network(graph, threads=1, plan="direct") as net:
        assert net.second_moments() == {}
        with pytest.raises(DataError, match="second moments are given, but SGD"):
            net.set_second_moments(net.parameters())
    with znn.Network(graph, threads=1, plan="direct", optimiser=znn.Adam()) as net:
        with pytest.raises(DataError, match="no negative number"):
            net.set_second_moments({name: -np.ones_like(value) for name, value in net.parameters().items()})


@pytest.mark.parametrize("wrong", [{"rate": -1}, {"momentum": 1.0}, {"square_momentum": 1}, {"epsilon": 0}, {"weight_decay": float("nan")}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SpecError, match=f"{next(iter(wrong))} is .*expected a"):
        znn.Adam(**wrong)
    assert dataclasses.replace(znn.Adam(), rate=0.5).rate == 0.5
    with pytest.raises(SpecError, match="expected a znn.SGD or znn.Adam"):
        znn.Network(small_graph("dense_3d"), optimiser="adam")


def test_adam_learns_what_sgd_learns(rng):
    graph = small_graph("dense_3d")
    inputs, targets = random_inputs(graph, rng), random_targets(graph, rng)
    with znn.Network(graph, threads=1, bundle=8, plan="model", optimiser=znn.Adam(rate=0.01)) as net:
        losses = [net.train_step(inputs, targets) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
