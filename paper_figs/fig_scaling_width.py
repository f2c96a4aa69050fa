"""Speedup at all physical cores against width, with transforms of kernels memoized and recomputed."""

import style
from scaling import MEMOIZED, panels, speedups

SETTINGS = {MEMOIZED: "all memoized", ("images", "gradients"): "kernel transforms recomputed"}


def table(data):
    return [
        {"kernels": SETTINGS[row["memoize"]]} | {k: v for k, v in row.items() if k not in ("memoize", "threads")}
        for row in speedups(data)
        if row["memoize"] in SETTINGS and row["threads"] == row["cores"] > 1
    ]


def caption(rows):
    return (
        "Speedup over one worker with a worker on every physical core, against width. Bars: 95 % bootstrap "
        "intervals over "
        "paired interleaved rounds. Dashed: least speedup by Brent's theorem. Grey: the number of physical "
        "cores."
    )


def draw(rows, plt):
    machines, settings = sorted({r["machine"] for r in rows}), list(SETTINGS.values())
    figure, axes = panels(plt, rows)
    for axis, net in axes:
        for colour, machine in zip(style.COLOURS, machines):
            for marker, dash, setting in zip(style.MARKERS, ("-", ":"), settings):
                line = [r for r in rows if (r["net"], r["machine"], r["kernels"]) == (net, machine, setting)]
                if not line:
                    continue
                widths = [r["width"] for r in line]
                style.intervals(
                    axis,
                    widths,
                    [(r["speedup"], r["low"], r["high"]) for r in line],
                    color=colour,
                    marker=marker,
                    ls=dash,
                    label=f"{setting}\n{machine}",
                )
                axis.axhline(line[0]["cores"], color="0.6", lw=0.8)
                if setting == settings[0] and all(r["brent"] != "" for r in line):
                    bound = "Brent's bound" if machine == machines[-1] else None
                    axis.plot(widths, [r["brent"] for r in line], color=colour, ls="--", lw=0.7, label=bound)
        top = max(max(r["high"], r["cores"]) for r in rows if r["net"] == net)
        axis.set(title=net, xlabel="width (feature maps per layer)", ylim=(0, 1.1 * top))
    axes[0][0].set_ylabel("speedup at all physical cores")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)  # apart from the lines it names
    return figure
