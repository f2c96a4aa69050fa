"""ZNN itself. A lap is backward(i) and forward(i+1): the updates of round i overlap the next forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import network_bytes
from ..problem import Problem
from .base import MOMENTUM, Session, Timed, by_name_or_single, direct_flop, named

if TYPE_CHECKING:
    import znn
    from znn.graph import Graph

OPTIONS = ("threads", "plan", "policy", "sum", "memoize", "allocator", "pin", "trace", "bundle")

LEVELS = ("critical_path_s", "pool_bytes", "pool_blocks", "kernel_spectra_bytes", "processors")


class ZnnSession(Session):
    def __init__(self, problem: Problem, net: Any, inputs: Any, gradients: Any) -> None:
        self._phase, self.net = problem.phase, net
        self._inputs, self._gradients = by_name_or_single(inputs), by_name_or_single(gradients)
        self.plan = str(net.plan)
        self._result: Any = None
        self._before: dict[str, Any] = {}
        self._laps = 0
        self._forward()

    def _forward(self) -> None:
        self._result = self.net.forward(self._inputs, phase="train" if self._phase == "round" else "infer")

    def lap(self) -> None:
        if self._phase == "round":
            self.net.backward(self._gradients)
        self._forward()
        self._laps += 1

    def outputs(self) -> dict[str, np.ndarray]:
        return named(self._result, self.net.graph)

    def parameters(self) -> dict[str, np.ndarray]:
        return self.net.parameters()

    def settle(self) -> None:
        self.net.sync()

    def mark(self) -> None:
        self.net.sync()
        self._before, self._laps = dict(self.net.stats()), 0

    def metrics(self) -> dict[str, Any]:
        self.net.sync()
        return {"laps": self._laps} | difference(self.net.stats(), self._before)

    def close(self) -> None:
        self.net.close()


class ZnnAdapter(Timed):
    name = "znn"

    def version(self) -> str:
        from importlib import metadata

        return metadata.version("znn")

    def unavailable(self) -> str | None:
        try:
            from znn import _core  # noqa: F401
        except ImportError as error:
            return f"the compiled core znn._core cannot be imported: {error}"
        return None

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return network_bytes(
            problem.graph(), options.get("threads") or 1, options.get("plan", "model"), options.get("memoize")
        )

    def flop(self, problem: Problem, options: dict[str, Any]) -> float | None:
        return direct_flop(problem)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> ZnnSession:
        net = self.network(problem, graph, options, parameters, rate)
        return ZnnSession(problem, net, inputs, gradients)

    def network(
        self,
        problem: Problem,
        graph: Graph,
        options: dict[str, Any],
        parameters: dict[str, np.ndarray],
        rate: float,
    ) -> znn.Network:
        """The network that is measured."""
        import znn

        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise ValueError(
                f"adapter znn: unknown option {sorted(unknown)[0]!r}; options are {', '.join(OPTIONS)}"
            )
        given = dict(options)
        if "memoize" in given:
            given["memoize"] = tuple(given["memoize"])
        return znn.Network(
            graph,
            parameters=parameters,
            patches=problem.patches,
            seed=problem.seed,
            optimiser=znn.SGD(rate=rate, momentum=MOMENTUM),
            training=problem.phase == "round",
            **given,
        )


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`znn.Network.stats` since a mark: counters are subtracted, also within lists and tables; levels stay as
    they are."""
    result: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict):
            result[key] = difference(value, old or {})
        elif old is None or key in LEVELS:
            result[key] = value
        elif isinstance(value, (list, tuple)):
            result[key] = [a - b for a, b in zip(value, old)]
        else:
            result[key] = value - old
    return result


ADAPTER = ZnnAdapter()
