"""Work, critical path and parallelism from the task graph, against the closed formulas where the net is a chain."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

from ..problem import Problem
from .base import Computed


class TheoryAdapter(Computed):
    """options: method, memoize, widths (a list: one case holds a whole curve)."""

    name = "theory"

    def version(self) -> str:
        return metadata.version("znn")

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        from znn import cost, theory

        widths, method = options["widths"], options.get("method", "fft")
        memoize = options.get("memoize", list(cost.MEMOIZE))
        graphs = [replace(problem, width=width).graph() for width in widths]
        tasks = [theory.task_graph(graph, method, memoize) for graph in graphs]
        metrics: dict[str, Any] = {"widths": widths, "work_flop": [t.work for t in tasks],
                                   "span_flop": [t.span for t in tasks], "tasks": [t.task_count for t in tasks],
                                   "transforms": [cost.network_cost(g, method, memoize).transforms for g in graphs]}
        if problem.net == "chain":
            work, span = theory.chain_closed_form(widths, problem.depth, problem.kernel, problem.output[0], method)
            metrics |= {"closed_work_flop": work.tolist(), "closed_span_flop": span.tolist()}
        return metrics


ADAPTER = TheoryAdapter()
