"""Work, critical path and parallelism from the task graph, against the closed formulas where the net is a
chain."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import metadata
from typing import Any

from ..problem import Problem, extent
from .base import Computed


class TheoryAdapter(Computed):
    """options: lists of widths, methods, memoize (settings) and outputs; the record holds a row for each
    combination."""

    name = "theory"

    def version(self) -> str:
        return metadata.version("znn")

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        from znn.cost import MEMOIZE

        planar = all(node.extent[0] == 1 for node in problem.graph().nodes)
        outputs = [extent(value, planar) for value in options.get("outputs", [list(problem.output)])]
        settings = options.get("memoize", [list(MEMOIZE)])
        return {
            "rows": [
                _row(replace(problem, width=width, output=output), method, memoize)
                for width, output, method, memoize in itertools.product(
                    options["widths"], outputs, options["methods"], settings
                )
            ]
        }


def _row(problem: Problem, method: str, memoize: list[str]) -> dict[str, Any]:
    from znn import cost, theory

    graph = problem.graph()
    tasks = theory.task_graph(graph, method, memoize)
    row = {
        "width": problem.width,
        "output": list(problem.output),
        "method": method,
        "memoize": memoize,
        "work_flop": tasks.work,
        "span_flop": tasks.span,
        "tasks": tasks.task_count,
        "transforms": cost.network_cost(graph, method, memoize).transforms,
    }
    if problem.net == "chain":
        work, span = theory.chain_closed_form(
            problem.width, problem.depth, problem.kernel, problem.output[0], method, memoize
        )
        row |= {"closed_work_flop": float(work), "closed_span_flop": float(span)}
    return row


ADAPTER = TheoryAdapter()
