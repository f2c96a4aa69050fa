"""What an adapter must offer, and the check every timed adapter passes before it is timed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..problem import Problem

if TYPE_CHECKING:
    from znn.graph import Graph

TOLERANCE = 1e-4  # whole networks, float32 against float64: max norm of the difference over max norm
TIMED_RATE = 1e-5  # so small that a hundred laps with one fixed gradient leave the network as it was
CHECK_RATE = 1e-2  # large enough for a wrong update to show in the next output
MOMENTUM = 0.9
CHECK_ROUNDS = 2
LARGE_FLOP = 2e9  # of a round of the reduced problem: from here on one round is checked, not two


class AdapterError(RuntimeError):
    """An adapter is unknown or cannot do what a case asks."""


class Session(ABC):
    """A network ready to run laps. `plan` says in words which methods, layouts or code paths run."""

    plan: str = ""

    @abstractmethod
    def lap(self) -> None:
        """One round: backward(i) and forward(i+1) with the update in between, or one forward pass. This is
        timed."""

    @abstractmethod
    def outputs(self) -> dict[str, np.ndarray]:
        """The newest outputs by node name, as float32 arrays shaped like those of `znn.Network.forward`."""

    def mark(self) -> None:
        """Called between warm-ups and timed laps: counters start here."""

    def metrics(self) -> dict[str, Any]:
        """What was counted since `mark`, JSON-ready."""
        return {}

    def close(self) -> None:
        """Free everything."""


class Adapter(ABC):
    """Base of both kinds; `name` is what sweeps and records call it."""

    name: str

    @abstractmethod
    def version(self) -> str:
        """Version of the software that will run."""

    def unavailable(self) -> str | None:
        """Why this adapter cannot run here, in one sentence; None if it can."""
        return None

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        """Upper estimate of the memory the case will need; the runner refuses cases that do not fit."""
        return 300 << 20

    def flop(self, problem: Problem, options: dict[str, Any]) -> float | None:
        """Operations of one lap by the cost model, None where it does not apply."""
        return None


class Timed(Adapter):
    """An adapter whose laps are timed."""

    @abstractmethod
    def open(
        self,
        problem: Problem,
        graph: Graph,
        options: dict[str, Any],
        parameters: dict[str, np.ndarray],
        inputs: dict[str, np.ndarray],
        gradients: dict[str, np.ndarray],
        rate: float,
    ) -> Session:
        """A session that has already run its first forward pass."""

    def start(self, problem: Problem, options: dict[str, Any], rate: float = TIMED_RATE) -> Session:
        """A session on the problem's own random arrays and initial parameters."""
        from znn.init import initial_parameters

        graph = problem.graph()
        inputs, gradients = problem.arrays(graph)
        return self.open(
            problem, graph, options, initial_parameters(graph, problem.seed), inputs, gradients, rate
        )

    def check(self, problem: Problem, options: dict[str, Any], shared: Path | None = None) -> dict[str, Any]:
        """Outputs after training rounds of the reduced problem against the float64 reference.

        shared: folder in which the cases of a run leave the reference's outputs for each other.
        """
        small = problem.reduced()
        rounds = (
            0
            if small.phase == "forward"
            else CHECK_ROUNDS
            if (self.flop(small, options) or 0) < LARGE_FLOP
            else 1
        )
        session = self.start(small, options, CHECK_RATE)
        try:
            for _ in range(rounds):
                session.lap()
            got = session.outputs()
        finally:
            session.close()
        error = max(
            relative_error(got[name], want) for name, want in shared_reference(small, rounds, shared).items()
        )
        return {
            "reference": f"znn.reference, float64, {small.output} patch, width {small.width}, {rounds} "
            "rounds",
            "max_rel_err": error,
            "tol": TOLERANCE,
            "passed": bool(error <= TOLERANCE),
        }


class Computed(Adapter):
    """An adapter that computes its metrics instead of being timed (theory, simulation, cache misses)."""

    @abstractmethod
    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        """The metrics of the case, JSON-ready."""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Max norm of the difference over the max norm of the reference; infinite where shapes differ or a value
    is no number."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def shared_reference(problem: Problem, rounds: int, shared: Path | None) -> dict[str, np.ndarray]:
    """`reference_outputs`, computed once per problem for all cases that share the folder."""
    if shared is None:
        return reference_outputs(problem, rounds)
    path = shared / (hashlib.sha256(repr((problem, rounds)).encode()).hexdigest()[:16] + ".npz")
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    outputs = reference_outputs(problem, rounds)
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, **outputs)
    path.with_suffix(".part").rename(path)
    return outputs


def reference_outputs(problem: Problem, rounds: int) -> dict[str, np.ndarray]:
    """Outputs by name of the float64 reference after `rounds` of forward, backward and update, then one
    forward."""
    from znn.init import initial_parameters
    from znn.reference import ReferenceNetwork

    graph = problem.graph()
    inputs, gradients = problem.arrays(graph)
    net = ReferenceNetwork(graph, initial_parameters(graph, problem.seed), rate=CHECK_RATE, momentum=MOMENTUM)
    for _ in range(rounds):
        net.forward(inputs, phase="train")
        net.backward(by_name_or_single(gradients))
    return named(net.forward(inputs), graph)


def named(result: Any, graph: Graph) -> dict[str, np.ndarray]:
    """The result of `forward`, which is an array or a dict of arrays, always as a dict."""
    return result if isinstance(result, dict) else {graph.outputs[0]: result}


def by_name_or_single(arrays: dict[str, np.ndarray]) -> Any:
    """The one array of a dict of one, else the dict: what `znn.Network` takes."""
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays
