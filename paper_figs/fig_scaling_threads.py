"""Speedup against worker threads, one line per width, with Brent's bound."""

import style
from scaling import MEMOIZED, panels, speedups


def table(data):
    return [
        {key: value for key, value in row.items() if key not in ("cores", "memoize")}
        for row in speedups(data)
        if row["memoize"] == MEMOIZED
    ]


def caption(rows):
    return (
        "Speedup over one worker of the same program, all convolutions by FFT, all transforms memoized. A "
        "round is backward(i) "
        "and forward(i+1). Bars: 95 % bootstrap intervals over paired interleaved rounds. Dashed: least "
        "speedup by Brent's "
        "theorem. Grey: linear."
    )


def draw(rows, plt):
    machines = sorted({r["machine"] for r in rows})
    figure, axes = panels(plt, rows)
    widths, legend = sorted({r["width"] for r in rows}), {}  # one colour per width in all panels
    for axis, net in axes:
        mine = [r for r in rows if r["net"] == net]
        most = max(r["threads"] for r in mine)
        axis.plot([1, most], [1, most], color="0.6", lw=0.8)
        for colour, width in zip(style.sequence(len(widths)), widths):
            for marker, machine in zip(style.MARKERS, machines):
                line = [r for r in mine if r["width"] == width and r["machine"] == machine]
                if not line:
                    continue
                threads = [r["threads"] for r in line]
                style.intervals(
                    axis,
                    threads,
                    [(r["speedup"], r["low"], r["high"]) for r in line],
                    color=colour,
                    marker=marker,
                    label=f"width {width}" if machine == machines[0] else None,
                )
                if all(r["brent"] != "" for r in line):
                    axis.plot(threads, [r["brent"] for r in line], color=colour, ls="--", lw=0.7)
        legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
        ticks = sorted({r["threads"] for r in mine})
        axis.set(
            title=net,
            xlabel="worker threads",
            xticks=ticks if len(ticks) <= 12 else ticks[:: len(ticks) // 8],
        )
    axes[0][0].set_ylabel("speedup over one worker")
    legend["Brent's bound"] = plt.Line2D([], [], color="0.3", ls="--", lw=0.7)
    legend["linear"] = plt.Line2D([], [], color="0.6", lw=0.8)
    figure.legend(legend.values(), legend.keys(), loc="outside right center")
    style.name_machines(figure, machines, style.MARKER_NAMES)
    return figure
