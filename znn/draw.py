"""A drawing of a network's graph: a box per node group, an arrow per edge group."""

from __future__ import annotations

import os
from pathlib import Path

from znn.errors import DataError
from znn.files import atomic_write
from znn.graph import Graph, GraphEdge
from znn.spec import format_extent

_STEP, _ROW, _BOX = 2.6, 1.3, (1.5, 0.62)


def draw_graph(graph: Graph, path: str | os.PathLike) -> None:
    """Write the drawing to `path`: .svg, .png or .pdf by matplotlib, .dot in Graphviz's language.

    Raises DataError for another ending.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".dot":
        with atomic_write(path, "w") as file:
            file.write(graph.to_dot())
        return
    if suffix not in (".svg", ".png", ".pdf"):
        raise DataError(
            f"{path}: cannot draw into files ending in {suffix!r}; expected .svg, .png, .pdf or .dot"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    places = _places(graph)
    width = max(x for x, _ in places) + _STEP
    height = max(y for _, y in places) - min(y for _, y in places) + 1.6
    with plot.rc_context({"svg.hashsalt": "znn"}):
        figure, axis = plot.subplots(figsize=(max(3.0, width), max(1.8, height)), layout="constrained")
        for edge in graph.edges:
            _draw_edge(axis, edge, places)
        for node, (x, y) in zip(graph.nodes, places):
            detail = node.spec.transfer if node.spec.kind == "transfer" else node.spec.kind
            axis.text(
                x,
                y,
                f"{node.name} ({detail})\n{node.maps} x {format_extent(node.extent)}",
                ha="center",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "round,pad=0.4", "fc": "white", "ec": "0.3"},
            )
        axis.set_xlim(-_STEP / 2, width - _STEP / 2)
        axis.set_ylim(min(y for _, y in places) - 0.8, max(y for _, y in places) + 0.8)
        axis.set_axis_off()
        with atomic_write(path) as file:
            figure.savefig(
                file,
                format=suffix[1:],
                dpi=150,
                metadata={}
                if suffix == ".png"
                else {"Date": None}
                if suffix == ".svg"
                else {"CreationDate": None},
            )
        plot.close(figure)


def _places(graph: Graph) -> list[tuple[float, float]]:
    """Column by longest distance from an input, rows centred within the column."""
    columns: list[int] = []
    for node in graph.nodes:
        columns.append(max((columns[edge.source] + 1 for edge in graph.incoming(node.index)), default=0))
    rows = {column: [i for i, c in enumerate(columns) if c == column] for column in set(columns)}
    return [
        (column * _STEP, (rows[column].index(i) - (len(rows[column]) - 1) / 2) * -_ROW)
        for i, column in enumerate(columns)
    ]


def _draw_edge(axis, edge: GraphEdge, places) -> None:
    (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
    jump = x1 - x0 > 1.5 * _STEP  # an edge that passes by other columns bends around them
    axis.annotate(
        "",
        (x1 - _BOX[0] / 2, y1),
        (x0 + _BOX[0] / 2, y0),
        arrowprops={
            "arrowstyle": "->",
            "color": "0.4",
            "connectionstyle": f"arc3,rad={-0.25 if jump else 0.0}",
        },
    )
    label = (
        edge.kind
        if edge.kernel is None and edge.window is None
        else (f"{edge.kind} {format_extent(edge.kernel or edge.window)}")
    )
    if edge.sparsity != (1, 1, 1):
        label += f"\nsparsity {format_extent(edge.sparsity)}"
    axis.text(
        (x0 + x1) / 2,
        (y0 + y1) / 2 + (0.45 if jump else 0.34),
        label,
        ha="center",
        va="center",
        fontsize=6.5,
        color="0.3",
    )
