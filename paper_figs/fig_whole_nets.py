"""Whole networks in the paper's engine, in bundles and tiles, and in PyTorch, and the least time the machine allows."""

import style
from records import ENGINES
from znn_bench import whole_nets

DECADES = [10.0**e for e in range(-5, 4)]
SERIES = (
    ("znn", "paper_seconds"),
    ("znn_bundled", "seconds"),
    ("torch_cpu", "torch_seconds"),
)
SIZE = 0.27


def table(data):
    records = data.select("whole_nets", status=None)
    rows = []
    for row in whole_nets.rows(records):
        rows.append(whole_nets.to_dict(row) | {"machine": data.machine(row.machine)})
    most = {machine: max(r["threads"] for r in rows if r["machine"] == machine) for machine in {r["machine"] for r in rows}}
    return [row for row in rows if row["threads"] == most[row["machine"]]]


def caption(rows):
    text = (
        "Seconds per round of whole networks on all cores (medians; a round of training is backward, update and forward), each "
        "engine checked against the float64 reference before it was timed. Numbers are PyTorch's seconds over those of bundles "
        "and tiles. Black lines: the least time that arithmetic and bandwidth, measured on the same cores, allow the methods that "
        "bundles and tiles chose. "
    )
    reasons = sorted({f"{r['net']}, {r['phase']}: {r['reason']}" for r in rows if r["reason"]})
    return text + ("Missing: " + "; ".join(reasons) + "." if reasons else "")


def draw(rows, plt):
    panels = list(dict.fromkeys((r["machine"], r["phase"]) for r in rows))
    most = max(sum((r["machine"], r["phase"]) == panel for r in rows) for panel in panels)
    figure, axes = plt.subplots(len(panels), 1, figsize=(max(style.COLUMN, min(style.WIDE, 1.1 * most)), 2.6 * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels):
        _panel(axis, [r for r in rows if (r["machine"], r["phase"]) == panel], most)
        several = len({machine for machine, _ in panels}) > 1
        axis.set_title(", ".join([panel[1], *([panel[0]] if several else [])]))
    handles = [plt.Rectangle((0, 0), 1, 1, fc=style.ENGINE_COLOURS[name], label=ENGINES[name]) for name, column in SERIES
               if any(r[column] for r in rows)]
    if any(r["bound_seconds"] for r in rows):
        handles.append(plt.Line2D([], [], color="black", label="least time, methods as chosen"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _panel(axis, rows, places):
    """Bars are as wide in all panels: each has room for so many `places`."""
    for i, row in enumerate(rows):
        shown = [(name, row[column]) for name, column in SERIES if row[column]]
        left = i - SIZE * len(shown) / 2
        for j, (name, seconds) in enumerate(shown):
            axis.bar(left + (j + 0.5) * SIZE, seconds, SIZE * 0.95, color=style.ENGINE_COLOURS[name])
            if name == "torch_cpu":
                ratio = f"{row['ratio']:.{0 if row['ratio'] >= 10 else 1}f}×"
                axis.text(left + (j + 0.5) * SIZE, seconds * 1.08, ratio, ha="center", va="bottom", fontsize=6)
        if row["bound_seconds"]:
            mine = left + ([name for name, _ in shown].index("znn_bundled") + 0.5) * SIZE
            axis.hlines(row["bound_seconds"], mine - SIZE * 0.6, mine + SIZE * 0.6, color="black", lw=1.2)
    values = [row[column] for row in rows for column in (*(c for _, c in SERIES), "bound_seconds") if row[column]]
    crowded = max(values) > 1000 * min(values)
    style.plain_log(axis, "y", [m * ten for ten in DECADES for m in ((1,) if crowded else (1, 2, 5))], base=10)
    axis.set(xticks=range(len(rows)), xticklabels=[_label(row["net"]) for row in rows], ylabel="seconds per round",
             xlim=(-0.6, places - 0.4), ylim=(min(values) / 2, max(values) * 2.5))
    axis.tick_params(axis="x", labelsize=6)
    axis.set_xlabel("net, output patch, width")
    axis.grid(axis="x", visible=False)


def _label(net):
    """3d_3, output 8x8x8, width 40 -> four short lines."""
    name, output, width = net.split(", ")
    sides = output.removeprefix("output ").split("x")
    flat = len(sides) == 3 and sides[0] == "1" and ("2d" in name or sides[1:] != ["1", "1"])  # a single voxel tells nothing
    side = sides[-1] + ("²" if flat else "³") if len(set(sides[flat:])) == 1 else "×".join(sides)
    head, _, rest = name.rpartition("_")
    return f"{head}\n{rest}\n{side}\n{width.removeprefix('width ')}" if head == "scaling" else f"{name}\n\n{side}\n{width[6:]}"
