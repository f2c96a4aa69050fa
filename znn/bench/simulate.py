"""Discrete-event simulation of the scheduler: the tasks of training rounds on P workers, from measured
durations.

The same rules as the engine's: ready tasks by policy, backward over forward over update, FORCE, a node's sum
finished
by its last contribution, updates of a round overlapping the next forward pass. Time in queues and locks is
not
modelled, except the lock of the locked sum; shared memory bandwidth is (`Contention`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from znn.graph import Graph

POLICIES = ("priority", "fifo", "lifo", "stealing")
FORWARD, BACKWARD, UPDATE = 0, 1, 2
PHASES = ("forward", "backward", "update")
WAITING, QUEUED, RUNNING, DONE = range(4)


class Durations(NamedTuple):
    """Seconds of a task by (phase, edge group, from map, to map), and of finishing a node's map by (phase,
    node, map)."""

    edge: Callable[[int, str, int, int], float]
    node: Callable[[int, str, int], float]


@dataclass(frozen=True)
class Contention:
    """Slowdown of tasks while `n` workers are busy: a share `memory` of their time scales with the bandwidth
    asked for.

    one_worker: the share of the machine's bandwidth that one worker can draw, so n workers ask for n *
    one_worker.
    slow(n) = (1 - memory) + memory * max(1, n * one_worker)
    """

    memory: float = 0.0
    one_worker: float = 0.0

    def slow(self, workers: int) -> float:
        return 1 - self.memory + self.memory * max(1.0, workers * self.one_worker)

    @classmethod
    def fit(cls, slowdown: Mapping[int, float], one_worker: float) -> Contention:
        """Least squares of `memory` over the measured slowdown of tasks at each number of workers (1.0 at one
        worker)."""
        x = np.array([max(1.0, n * one_worker) - 1 for n in slowdown])
        y = np.array(list(slowdown.values())) - 1
        return cls(float(np.clip(x @ y / (x @ x), 0, 1)) if x.any() else 0.0, one_worker)


@dataclass
class TaskGraph:
    """Tasks of one training round, map by map. A task is an edge in a phase; node n's image or gradient
    completes when
    its last contribution is in, which costs `finish_s` in that phase and readies the tasks that read it."""

    seconds: list[float] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    priority: list[tuple] = field(default_factory=list)
    adds_to: list[int] = field(default_factory=list)  # index of the sum a task contributes to, -1: none
    forces: list[int] = field(default_factory=list)  # the update task a forward task forces, -1: none
    contributions: list[int] = field(default_factory=list)  # by sum
    sum_phase: list[int] = field(default_factory=list)  # by sum
    finish_s: list[float] = field(default_factory=list)  # by sum
    readies: list[list[int]] = field(default_factory=list)  # by sum: tasks that start once it is complete
    first: dict[int, list[int]] = field(default_factory=dict)  # tasks ready when the phase begins

    @property
    def work_s(self) -> float:
        """T1 of one round: all tasks and all finishing."""
        return sum(self.seconds) + sum(s for s, n in zip(self.finish_s, self.contributions) if n)


def expand(graph: Graph, durations: Durations) -> TaskGraph:
    """The map-level tasks of a round. Nothing is computed towards the gradients of the inputs.

    Handing in an input image or an output gradient is a task too: its node's finishing (transforms, loss)
    follows it.
    """
    tasks = TaskGraph(first={FORWARD: [], BACKWARD: []})
    sums = {phase: _add_sums(tasks, graph, durations, phase) for phase in (FORWARD, BACKWARD)}
    to_output, to_input = _distances(graph)
    inputs, outputs = ({graph.node(n).index for n in names} for names in (graph.inputs, graph.outputs))
    for phase, ends in ((FORWARD, inputs), (BACKWARD, outputs)):
        for where in (sums[phase][node, m] for node in sorted(ends) for m in range(graph.nodes[node].maps)):
            tasks.first[phase].append(_append(tasks, 0.0, phase, (3,), where))
    for edge in graph.edges:
        source, target = edge.source, edge.target
        for a, b in _pairs(graph, edge):
            update = -1
            if edge.kind == "conv":
                update = _add_task(tasks, durations, UPDATE, edge.name, a, b, (0, 0, 0))
            forward = _add_task(
                tasks,
                durations,
                FORWARD,
                edge.name,
                a,
                b,
                (1, to_output[target], -target, -b),
                sums[FORWARD][target, b],
                update,
            )
            tasks.readies[sums[FORWARD][source, a]].append(forward)
            gradient = tasks.readies[sums[BACKWARD][target, b]]
            if update >= 0:
                gradient.append(update)
            if source not in inputs:
                backward = _add_task(
                    tasks,
                    durations,
                    BACKWARD,
                    edge.name,
                    a,
                    b,
                    (2, to_input[source], -source, -a),
                    sums[BACKWARD][source, a],
                )
                gradient.append(backward)
    return tasks


def _add_sums(tasks: TaskGraph, graph: Graph, durations: Durations, phase: int) -> dict[tuple[int, int], int]:
    found = {}
    for node in graph.nodes:
        for m in range(node.maps):
            found[node.index, m] = len(tasks.contributions)
            tasks.contributions.append(0)
            tasks.sum_phase.append(phase)
            tasks.finish_s.append(durations.node(phase, node.name, m))
            tasks.readies.append([])
    return found


def _add_task(
    tasks: TaskGraph,
    durations: Durations,
    phase: int,
    name: str,
    a: int,
    b: int,
    priority: tuple,
    adds_to: int = -1,
    forces: int = -1,
) -> int:
    return _append(tasks, durations.edge(phase, name, a, b), phase, priority, adds_to, forces)


def _append(
    tasks: TaskGraph, seconds: float, phase: int, priority: tuple, adds_to: int = -1, forces: int = -1
) -> int:
    tasks.seconds.append(seconds)
    tasks.phase.append(phase)
    tasks.priority.append(priority)
    tasks.adds_to.append(adds_to)
    tasks.forces.append(forces)
    if adds_to >= 0:
        tasks.contributions[adds_to] += 1
    return len(tasks.seconds) - 1


def _pairs(graph: Graph, edge) -> itertools.product | list[tuple[int, int]]:
    ins, outs = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps
    if edge.kind == "conv" and not edge.spec.depthwise:
        return itertools.product(range(ins), range(outs))
    return [(m, m) for m in range(ins)]


def _distances(graph: Graph) -> tuple[list[int], list[int]]:
    """Longest distance of every node to an output and to an input, in edges."""
    to_output, to_input = [0] * len(graph.nodes), [0] * len(graph.nodes)
    for edge in graph.edges:  # edges come by topological order of their targets
        to_input[edge.target] = max(to_input[edge.target], to_input[edge.source] + 1)
    for edge in reversed(graph.edges):
        to_output[edge.source] = max(to_output[edge.source], to_output[edge.target] + 1)
    return to_output, to_input


class _Queue:
    """Ready tasks under one policy. Tasks taken out by FORCE stay in the containers and are skipped when
    met."""

    def __init__(self, policy: str, workers: int, tasks: TaskGraph, state: list[int], seed: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
        self._policy, self._tasks, self._state = policy, tasks, state
        self._heap: list[tuple] = []
        self._lists = [deque() for _ in range(workers if policy == "stealing" else 1)]
        self._rng, self._counter = random.Random(seed), itertools.count()

    def push(self, task: int, worker: int) -> None:
        self._state[task] = QUEUED
        if self._policy == "priority":  # highest first, newest first within a priority
            key = tuple(-p for p in self._tasks.priority[task])
            heapq.heappush(self._heap, (key, -next(self._counter), task))
        else:
            self._lists[worker % len(self._lists)].append(task)

    def pop(self, worker: int) -> int | None:
        while True:
            task = self._take(worker)
            if task is None or self._state[task] == QUEUED:
                return task

    def _take(self, worker: int) -> int | None:
        if self._policy == "priority":
            return heapq.heappop(self._heap)[2] if self._heap else None
        own = self._lists[worker % len(self._lists)]
        if own:
            return own.popleft() if self._policy == "fifo" else own.pop()
        victims = [other for other in self._lists if other]
        return self._rng.choice(victims).popleft() if victims else None


class _Machine:
    """P workers and the state of the rounds they run."""

    def __init__(
        self,
        tasks: TaskGraph,
        workers: int,
        policy: str,
        contention: Contention,
        lock_s: Callable[[int], float] | None,
        seed: int,
    ) -> None:
        self.tasks, self.contention, self.lock_s = tasks, contention, lock_s
        self.state = [DONE] * len(tasks.seconds)  # before the first round every update is complete
        self.queue = _Queue(policy, workers, tasks, self.state, seed)
        self.idle, self.events, self.now = list(range(workers))[::-1], [], 0.0
        self.order = itertools.count()  # of two events at one moment the earlier started comes first
        self.followers: dict[int, list[int]] = {}
        self.missing = list(tasks.contributions)
        self.lock_free = [0.0] * len(tasks.contributions)
        self.busy_s = 0.0
        self.phase = FORWARD
        self.left = 0  # sums of the running pass that are not finished

    def run_phase(self, phase: int) -> None:
        """Start a pass and go on until its last sum is finished; updates may remain queued or running."""
        self.phase = phase
        self.left = sum(1 for p, n in zip(self.tasks.sum_phase, self.tasks.contributions) if p == phase and n)
        for task in self.tasks.first[phase]:
            self.queue.push(task, task)
        self.feed()
        while self.left:
            self.step()

    def step(self) -> None:
        """The next worker to come to the end of what it does. It goes on with finishing nodes and delegated
        tasks."""
        self.now, _, worker, tasks, sums = heapq.heappop(self.events)
        for where in sums:
            self.left -= self.tasks.sum_phase[where] == self.phase
            for ready in self.tasks.readies[where]:
                self.queue.push(ready, worker)
        follow = [follower for task in tasks for follower in self.followers.pop(task, [])]
        complete = [self.tasks.adds_to[task] for task in tasks if self.finishes(task)]
        for task in tasks:
            self.state[task] = DONE
        if follow or complete:
            self.start(worker, follow, complete)
        else:
            self.idle.append(worker)
        self.feed()

    def finishes(self, task: int) -> bool:
        """Whether a task that ends now made the last contribution to its sum."""
        where = self.tasks.adds_to[task]
        if where < 0:
            return False
        self.missing[where] -= 1
        if self.missing[where]:
            return False
        self.missing[where] = self.tasks.contributions[where]
        return True

    def feed(self) -> None:
        """Give ready tasks to idle workers; a forward task FORCEs its edge's update first."""
        while self.idle:
            worker = self.idle[-1]
            task = self.queue.pop(worker)
            if task is None:
                return
            forced = self.tasks.forces[task]
            if forced >= 0 and self.state[forced] == RUNNING:
                self.state[task] = WAITING
                self.followers.setdefault(forced, []).append(task)
                continue
            self.idle.pop()
            self.start(worker, [forced, task] if forced >= 0 and self.state[forced] == QUEUED else [task], [])

    def start(self, worker: int, tasks: list[int], sums: list[int]) -> None:
        """Occupy a worker with finishing sums and running tasks, in a row."""
        seconds = sum(self.tasks.finish_s[where] for where in sums)
        for task in tasks:
            self.state[task] = RUNNING
            seconds += self.tasks.seconds[task]
        seconds *= self.contention.slow(len(self.events) + 1)
        self.busy_s += seconds
        end = self.now + seconds
        for task in tasks:
            end = max(end, self._locked_until(task, end))
        heapq.heappush(self.events, (end, next(self.order), worker, tasks, sums))

    def _locked_until(self, task: int, end: float) -> float:
        """With the locked sum a task's addition waits for the additions before it."""
        where = self.tasks.adds_to[task]
        if where < 0 or self.lock_s is None:
            return end
        add = self.lock_s(task)
        self.lock_free[where] = max(self.lock_free[where], end - add) + add
        return self.lock_free[where]


@dataclass(frozen=True)
class Result:
    """Steady-state seconds of a round and the share of the workers' time spent in tasks."""

    round_s: float
    busy_share: float


def simulate(
    tasks: TaskGraph,
    workers: int,
    policy: str = "priority",
    contention: Contention = Contention(),
    lock_s: Callable[[int], float] | None = None,
    rounds: int = 3,
    seed: int = 1510,
) -> Result:
    """Rounds of backward(i) and forward(i+1) on `workers` workers; the first, without pending updates, is not
    counted.

    lock_s: seconds a task's addition holds the lock of its sum (the locked sum); None: the wait-free sum.
    """
    machine = _Machine(tasks, workers, policy, contention, lock_s, seed)
    machine.run_phase(FORWARD)
    machine.run_phase(BACKWARD)
    machine.run_phase(FORWARD)
    start, busy = machine.now, machine.busy_s
    for _ in range(rounds):
        machine.run_phase(BACKWARD)
        machine.run_phase(FORWARD)
    wall = machine.now - start
    return Result(wall / rounds, (machine.busy_s - busy) / (wall * workers))
