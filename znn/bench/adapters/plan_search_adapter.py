"""How far the autotuned plan of a network of bundles is from the best that an exhaustive search finds."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from ..problem import Problem
from .base import Computed

REPEATS = 15  # turns: a slow moment of the machine is longer than one


class PlanSearchAdapter(Computed):
    """The record holds a row for each layer: what was chosen, what is best, the seconds of both, taken in turns."""

    name = "plan_search"

    def version(self) -> str:
        return metadata.version("znn")

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return 4 << 30  # a few candidates of one layer at a time

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        from znn import plan

        graph = problem.graph()
        chosen, request = plan.resolve_width("autotune", graph, plan.Request())
        return {"bundle": request.bundle, "layers": [asdict(row) for row in plan.exhaustive_search(graph, chosen, request, REPEATS)]}


ADAPTER = PlanSearchAdapter()
