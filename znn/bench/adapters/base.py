"""What an adapter must offer, and the check every timed adapter passes before it is timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import references
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
    chosen: dict[str, Any] = {}  # options that setting up has decided, for the check to take the same way

    @abstractmethod
    def lap(self) -> None:
        """One round: backward(i) and forward(i+1) with the update in between, or one forward pass. This is
        timed."""

    @abstractmethod
    def outputs(self) -> dict[str, np.ndarray]:
        """The newest outputs by node name, as float32 arrays shaped like those of `znn.Network.forward`."""

    def parameters(self) -> dict[str, np.ndarray]:
        """The newest parameters by name, in the paper's orientation."""
        return {}

    def settle(self) -> None:
        """Wait for what a lap has left running."""

    def disturbed(self) -> str:
        """What keeps the machine from being as fast as it can be, in a few words, where that passes; else nothing."""
        return ""

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

    referenced = True  # whether `check` compares with znn.reference, whose outputs for the sweeps are kept

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
        want = reference(small)
        session = self.start(small, options, CHECK_RATE)
        try:
            for _ in range(want.rounds):
                session.lap()
            got = session.outputs()
        finally:
            session.close()
        error = max(relative_error(got[n], array) for n, array in references.outputs(want, shared).items())
        return {
            "reference": f"znn.reference, float64, {small.output} patch, width {small.width}, {want.rounds} "
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


def reference(small: Problem) -> references.Reference:
    """What a reduced problem is checked against: two rounds, so that the momentum shows; one of a large net."""
    rounds = CHECK_ROUNDS if direct_flop(small) < LARGE_FLOP else 1
    return references.Reference(small, rounds if small.phase == "round" else 0, CHECK_RATE, MOMENTUM)


def direct_flop(problem: Problem) -> float:
    """Flop of one lap by direct convolution (two per multiply-add), the common yardstick of all methods."""
    graph = problem.graph()
    passes = 3 if problem.phase == "round" else 1
    total, inputs = 0.0, {i for i, node in enumerate(graph.nodes) if node.name in graph.inputs}
    for edge in graph.edges:
        if edge.kind == "conv":
            pairs = graph.nodes[edge.target].maps * (
                1 if edge.spec.depthwise else graph.nodes[edge.source].maps
            )
            mine = (
                passes - 1 if passes == 3 and edge.source in inputs else passes
            )  # no gradient for the input
            total += 2.0 * mine * pairs * float(np.prod(edge.kernel)) * float(np.prod(edge.out_extent))
    return total * problem.patches


def named(result: Any, graph: Graph) -> dict[str, np.ndarray]:
    """The result of `forward`, which is an array or a dict of arrays, always as a dict."""
    return result if isinstance(result, dict) else {graph.outputs[0]: result}


def by_name_or_single(arrays: dict[str, np.ndarray]) -> Any:
    """The one array of a dict of one, else the dict: what `znn.Network` takes."""
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays
