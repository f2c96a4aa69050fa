"""What every layer of a network in bundles of maps takes in each pass of a round, and what it needs at least.

The bound of a phase is the longer of its operations over the peak of a core's arithmetic and of the bytes that it reads and
writes over the bandwidth of the last cache, or of memory where they do not fit (the roofline: Williams, Waterman and
Patterson 2009); a pass is bound by the sum of its phases. Peaks are measured on this machine and kept with it. It is a
bound of the method that the plan has chosen: another method may need fewer operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from znn import bundled
from znn.footprint import STATEFUL, has_small_window, layer_bytes
from znn.graph import Graph, GraphEdge
from znn.plan import Plan, Request
from znn.trace import Trace

PASSES = ("forward", "backward", "update")


@dataclass(frozen=True)
class PassRow:
    """One layer in one pass of a round, seconds of one core, all patches.

    predicted_s: by the cost model (None where there is none); bound_by: arithmetic, cache or memory, whichever bounds most.
    """

    layer: str
    method: str
    name: str
    predicted_s: float | None
    bound_s: float
    bound_by: str
    memory_bytes: int


def rows(graph: Graph, plan: Plan, request: Request) -> list[PassRow]:
    """Every edge group in every pass in which it has work, in the graph's order."""
    layers = {layer.name: layer for layer in request.layers(graph)}
    wanted = request.setting(graph).wanted
    done = {layer.pool.name for layer in layers.values() if layer.pool and layer.native(plan.layers[layer.name].candidate).pools}
    found = []
    for edge in graph.edges:
        if edge.name in done:
            continue  # by the convolution before it
        if edge.name in layers:
            found += _conv_rows(layers[edge.name], plan.layers[edge.name].candidate, request)
        else:
            found += _simple_rows(graph, edge, request, wanted[edge.source])
    return found


def _conv_rows(layer: bundled.Layer, candidate: bundled.Candidate, request: Request) -> list[PassRow]:
    predicted, bounds = layer.phases(candidate), layer.bounds(candidate)
    part = layer_bytes(layer, candidate, request.patches, request.moments)
    found = []
    for name, phases in layer.passes().items():
        seconds: dict[str, float] = {}
        for phase in phases:
            value, what = bounds[phase]
            seconds[what] = seconds.get(what, 0.0) + value
        if sum(seconds.values()) > 0:
            once = {i: 1 if i in (0, 1, 10) else request.patches for i in phases}  # kernels are those of all patches
            scale = sum(once[i] * bounds[i][0] for i in phases) / sum(seconds.values())
            found.append(PassRow(layer.name, candidate.describe(), name, sum(once[i] * predicted[i] for i in phases),
                                 scale * sum(seconds.values()), max(seconds, key=seconds.get), part.parameters + part.spectra))
    return found


def _simple_rows(graph: Graph, edge: GraphEdge, request: Request, backward: bool) -> list[PassRow]:
    """Edges of other kinds read one image and write another: nothing but bytes."""
    each = [4 * request.patches * graph.nodes[node].maps * math.prod(graph.nodes[node].extent)
            for node in (edge.source, edge.target)]
    state = each[1] // (4 if has_small_window(edge) else 1) if edge.kind in STATEFUL else 0
    count = sum(each) + state
    place = bundled.place_of(count)
    return [PassRow(edge.name, edge.kind, name, None, count / bundled.copy_rate(place), place, state)
            for name in ("forward", *["backward"] * backward)]


def measured(traces: Sequence[Trace]) -> dict[tuple[str, str], float]:
    """Seconds that all workers together spent in each (group, pass): the median over traces of one round each."""
    totals: list[dict[tuple[str, str], float]] = []
    for trace in traces:
        found: dict[tuple[str, str], float] = {}
        for event in trace.events:
            key = trace.names["group"][event["group"]], trace.names["phase"][event["phase"]]
            found[key] = found.get(key, 0.0) + 1e-9 * float(event["end_ns"] - event["start_ns"])
        totals.append(found)
    keys = dict.fromkeys(key for found in totals for key in found)
    return {key: _median([found.get(key, 0.0) for found in totals]) for key in keys}


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def table(found: Sequence[PassRow], times: Mapping[tuple[str, str], float] | None = None) -> str:
    """The rows as text; times: as `measured`, for the columns of what was measured."""
    head = f"{'layer':<12}{'method':<26}{'pass':<10}{'predicted':>10}{'bound':>9}  {'by':<11}"
    lines = [head + (f"{'measured':>9}{'of bound':>10}" if times else "") + f"{'memory':>12}"]
    seen = set()
    for row in found:
        predicted = "" if row.predicted_s is None else f"{row.predicted_s * 1e3:.2f}"
        line = f"{row.layer:<12}{row.method:<26}{row.name:<10}{predicted:>10}{row.bound_s * 1e3:>9.2f}  {row.bound_by:<11}"
        if times:
            seconds = times.get((row.layer, row.name), 0.0)
            # An edge whose work is done in another's (maxima taken by a convolution) has no time of its own.
            line += f"{seconds * 1e3:>9.2f}{row.bound_s / seconds:>10.0%}" if seconds else f"{'-':>9}{'-':>10}"
        line += "" if row.layer in seen else f"{row.memory_bytes / 2**20:>8.1f} MiB"
        seen.add(row.layer)
        lines.append(line.rstrip())
    bound = sum(row.bound_s for row in found)
    line = f"{'all':<12}{'':<26}{'':<10}{sum(row.predicted_s or 0.0 for row in found) * 1e3:>10.2f}{bound * 1e3:>9.2f}  {'':<11}"
    if times:
        named = {(row.layer, row.name) for row in found}
        rest = sum(seconds for key, seconds in times.items() if key not in named)
        lines.append(f"{'the rest':<12}{'losses, biases, inputs':<26}{'':<40}{rest * 1e3:>11.2f}")
        line += f"{sum(times.values()) * 1e3:>9.2f}{bound / sum(times.values()):>10.0%}"
    return "\n".join([*lines, line.rstrip()])
