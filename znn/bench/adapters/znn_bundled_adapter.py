"""ZNN's bundled engine: maps in bundles, tiled FFT and direct methods (native/tiled) instead of one map per node."""

from __future__ import annotations

from typing import Any

from ..memory import INTERPRETER_BYTES
from ..problem import Problem
from .znn_adapter import ZnnAdapter, ZnnSession

OTHER_PLANS = 1.3  # the measured plan may keep more than the one that is predicted
APART = 0.25  # of the fastest exchange between cores that was ever measured here: below it they are not where they were


class BundledSession(ZnnSession):
    def __init__(self, problem: Problem, net: Any, inputs: Any, gradients: Any) -> None:
        super().__init__(problem, net, inputs, gradients)
        self.plan = f"bundles of {net.bundle} maps, {self.plan}"
        self._exchange: list[float] = []

    def mark(self) -> None:
        super().mark()
        self._exchange = self._exchange_rate()

    def _exchange_rate(self) -> list[float]:
        from znn import bundled

        shared = self.net.bundle > 1 and self.net.plan_request.threads > 1
        return [bundled.exchange_rate_now(self.net.bundle)] if shared else []

    def disturbed(self) -> str:
        """Virtual machines have their cores moved apart for minutes, and several threads are then of little use."""
        from znn import bundled

        rate = self._exchange_rate()
        apart = rate and rate[0] < APART * bundled.exchange_rate(self.net.bundle)
        return f"cores exchange {rate[0] / 1e9:.2g} GB/s, which have been nearer to each other" if apart else ""

    def metrics(self) -> dict[str, Any]:
        """Also `bound_s`: the seconds of one core that a lap takes at least with this plan (`znn.roofline`); and for several
        threads `exchange_bytes_per_s`, before and after the laps: how fast spectra go from core to core
        (native/engine/exchange.hpp), as a virtual machine may have its cores moved apart for a while."""
        from znn import roofline

        passes = roofline.PASSES if self._phase == "round" else ("forward",)
        rows = roofline.rows(self.net.graph, self.net.plan, self.net.plan_request) if self.net.bundle > 1 else []
        found = {"bound_s": sum(row.bound_s for row in rows if row.name in passes)}
        if self._exchange:
            found["exchange_bytes_per_s"] = self._exchange + self._exchange_rate()
        return super().metrics() | found


class ZnnBundledAdapter(ZnnAdapter):
    name = "znn_bundled"

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        from znn import plan as planning

        graph = problem.graph()
        request = planning.Request(problem.patches, threads=options.get("threads") or 1, training=problem.phase == "round")
        model, request = planning.resolve_width("model", graph, request)
        return int(INTERPRETER_BYTES + OTHER_PLANS * planning.footprint(model, graph, request).total)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> BundledSession:
        net = self.network(problem, graph, {"bundle": "auto"} | options, parameters, rate)
        return BundledSession(problem, net, inputs, gradients)


ADAPTER = ZnnBundledAdapter()
