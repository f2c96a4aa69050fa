"""One look for every figure: colour-blind-safe (Okabe and Ito, 2008), legible at print size, byte-stable
files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p"]
LINES = ["-", "--", ":", "-."]
PHASES = {"forward": "#0072B2", "backward": "#D55E00", "update": "#009E73"}
WIDE, COLUMN = 7.2, 3.5  # inches: two columns of print, one column
ENGINE_COLOURS = {"znn": "#0072B2", "znn_bundled": "#56B4E9", "torch_cpu": "#D55E00", "torch_gpu": "#009E73"}


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in this style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.labelsize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "errorbar.capsize": 2,
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "znn",
        }
    )
    return plt


def sequence(count: int) -> list:
    """Colours for ordered values, dark to light, distinct in grey as well."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.85 * i / max(1, count - 1)) for i in range(count)]


def intervals(axis: Any, x: Sequence[float], estimates: Sequence[Sequence[float]], **style: Any) -> Any:
    """Points with their intervals, joined by a line. estimates: (value, low, high) each."""
    values = [e[0] for e in estimates]
    below = [max(0.0, e[0] - e[1]) for e in estimates]
    above = [max(0.0, e[2] - e[0]) for e in estimates]
    return axis.errorbar(x, values, yerr=[below, above], **style)


def plain_log(axis: Any, which: str = "x", ticks: Sequence[float] | None = None, base: float = 2) -> None:
    """A logarithmic axis with plain numbers at the given ticks."""
    import matplotlib.ticker as ticker

    one = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log", base=base)
    if ticks is not None:
        one.set_major_locator(ticker.FixedLocator(list(ticks)))
    one.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    one.set_minor_locator(ticker.NullLocator())


def group_ticks(axis: Any, groups: Sequence[tuple[str, Any]], labels: Sequence[str]) -> None:
    """Ticks 0, 1, ... for groups of (machine, ...); a letter tells machines apart where there are several."""
    machines = sorted({group[0] for group in groups})
    letters = {
        machine: f"\n({chr(65 + i)})" if len(machines) > 1 else "" for i, machine in enumerate(machines)
    }
    axis.set_xticks(range(len(groups)), [label + letters[group[0]] for group, label in zip(groups, labels)])
    axis.grid(axis="x", visible=False)


def name_machines(figure: Any, machines: Sequence[str], marks: Sequence[str] | None = None) -> None:
    """A line under the figure that says which letter, or marker, is which machine; nothing where there is
    one."""
    if len(set(machines)) > 1:
        marks = marks or [f"({chr(65 + i)})" for i in range(len(machines))]
        figure.supxlabel(
            "   ".join(f"{mark} {machine}" for mark, machine in zip(marks, sorted(set(machines)))), fontsize=6
        )


MARKER_NAMES = ("circles:", "squares:", "triangles:", "diamonds:", "inverted triangles:", "pluses:")


def save(figure: Any, stem: str) -> None:
    """Write PDF and PNG without dates, so that equal records give equal bytes."""
    figure.savefig(
        f"{stem}.pdf", metadata={"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None}
    )
    figure.savefig(f"{stem}.png", metadata={"Software": None})
