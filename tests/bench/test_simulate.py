import numpy as np
import pytest

from znn.bench import simulate as sim
from znn.graph import Graph
from znn.spec import NetworkSpec

UNIT = sim.Durations(lambda *key: 1.0, lambda *key: 0.0)


def layered(width, depth=3):
    spec = NetworkSpec.layered("n", 1, [{"conv": width, "kernel": 2, "transfer": "relu"}] * depth)
    return Graph.build(spec, output=(2, 2, 2))


def random_durations(seed):
    rng = np.random.default_rng(seed)
    return sim.Durations(lambda *key: float(rng.uniform(0.5, 1.5)), lambda *key: float(rng.uniform(0, 0.3)))


def test_the_expanded_graph_has_every_task_of_the_paper():
    tasks = sim.expand(layered(4), UNIT)
    by_phase = [tasks.phase.count(phase) for phase in range(3)]
    # one input image and four output gradients are handed in; no gradient is computed for the input
    assert by_phase == [1 + 4 + 16 + 16, 4 + 16 + 16, 4 + 16 + 16]
    assert tasks.work_s == sum(by_phase) - 5
    assert sum(len(r) for r in tasks.readies) + len(tasks.first[0]) + len(tasks.first[1]) == sum(by_phase)


@pytest.mark.parametrize("policy", sim.POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_one_worker_takes_the_work_and_many_stay_between_the_bounds(policy, seed):
    tasks = sim.expand(layered(5), random_durations(seed))
    assert sim.simulate(tasks, 1, policy).round_s == pytest.approx(tasks.work_s)
    for workers in (2, 3, 8):
        result = sim.simulate(tasks, workers, policy)
        assert tasks.work_s / workers - 1e-9 <= result.round_s <= tasks.work_s + 1e-9
        assert result.busy_share == pytest.approx(tasks.work_s / workers / result.round_s)


def test_a_greedy_schedule_keeps_brents_bound():
    """T_P <= Tinf + (T1 - Tinf) / P for each pass between two barriers, so for their sum."""
    tasks = sim.expand(layered(6), UNIT)
    for workers in (2, 4, 7, 16):
        longest = (
            3 + 2 + 1
        )  # forward, backward, and an update forced before the first forward task of the next round
        assert sim.simulate(tasks, workers).round_s <= longest + (tasks.work_s - longest) / workers + 1e-9


def test_with_workers_to_spare_a_round_takes_its_longest_chain():
    tasks = sim.expand(layered(3), UNIT)
    # backward: two layers; forward: three; the last updates become ready with the last gradients and are
    # forced by the
    # first forward tasks, one step more.
    assert sim.simulate(tasks, 1000).round_s == pytest.approx(2 + 3 + 1)


def test_finishing_a_node_delays_the_layer_behind_it():
    slow = sim.Durations(lambda *key: 1.0, lambda phase, name, m: 10.0 if phase == sim.FORWARD else 0.0)
    # two backward and three forward tasks on the longest chain; input and three layers finish slowly, updates
    # meanwhile
    assert sim.simulate(sim.expand(layered(2), slow), 50).round_s == pytest.approx(2 + 3 + 4 * 10)


def test_updates_overlap_the_next_forward_pass():
    """With only one layer's updates slow, a free worker runs them while others go on; forcing waits only for
    its own."""

    def edge(phase, name, a, b):
        return 5.0 if phase == sim.UPDATE and name == slow_name else 1.0

    graph = layered(1)
    slow_name = graph.edges[-1].name
    two = sim.simulate(sim.expand(graph, sim.Durations(edge, UNIT.node)), 2).round_s
    # one worker runs the slow update (0 to 5), the other two backward tasks, two forced updates and the
    # forward pass
    assert two == pytest.approx(7.0)


def test_the_locked_sum_serialises_additions():
    tasks = sim.expand(layered(8), UNIT)
    free, locked = (sim.simulate(tasks, 8, lock_s=lock).round_s for lock in (None, lambda task: 0.5))
    assert locked > free * 1.4
    assert sim.simulate(tasks, 1, lock_s=lambda task: 0.5).round_s == pytest.approx(tasks.work_s)


def test_contention_slows_and_is_fitted():
    true = sim.Contention(memory=0.4, one_worker=0.3)
    assert true.slow(1) == true.slow(3) == 1.0 and true.slow(10) == pytest.approx(0.6 + 0.4 * 3)
    fitted = sim.Contention.fit({n: true.slow(n) for n in (1, 2, 4, 8, 16)}, 0.3)
    assert fitted.memory == pytest.approx(0.4)
    assert sim.Contention.fit({1: 1.0, 2: 1.2}, 0.3).memory == 0.0  # below the wall nothing can be told
    tasks = sim.expand(layered(10), UNIT)
    assert sim.simulate(tasks, 8, contention=true).round_s > sim.simulate(tasks, 8).round_s


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'best'"):
        sim.simulate(sim.expand(layered(1), UNIT), 1, "best")
