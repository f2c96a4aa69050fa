"""Direct convolution of single layers on bundles of maps, pass by pass, beside the peak of the core that runs it."""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

from ..problem import Problem
from .base import Computed

WIDEST = 16
TURNS = 41


class DirectPassesAdapter(Computed):
    """For each convolution layer the record holds, turn by turn, the seconds of one thread in each pass of a round (forward;
    backward, with the gradient of the input; update, with all that is done to kernels) and those of as many operations at
    the core's peak (`znn.bundled.Layer.beside_peak`). `bundle`: the widest that pads no map."""

    name = "direct_passes"

    def version(self) -> str:
        return metadata.version("znn")

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        graph = problem.graph()
        voxels = sum(-(-node.maps // WIDEST) * WIDEST * math.prod(node.extent) for node in graph.nodes)
        kernels = sum(math.prod(edge.kernel) * graph.nodes[edge.source].maps * graph.nodes[edge.target].maps
                      for edge in graph.edges if edge.kind == "conv")
        return (64 << 20) + 16 * voxels + 20 * kernels

    def compute(self, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        from znn import bundled

        graph, direct = problem.graph(), bundled.Candidate("direct", None)
        bundle = max(width for width in bundled.widths() if width == 8 or all(node.maps % width == 0 for node in graph.nodes))
        layers = bundled.layers(graph, bundle, input_gradient=True)
        return {"bundle": bundle, "layers": [{"layer": layer.name} | layer.beside_peak(direct, TURNS) for layer in layers]}


ADAPTER = DirectPassesAdapter()
