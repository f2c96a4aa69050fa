"""Speedup against worker threads, one line per width, with Brent's bound."""

import style
from records import by, paired_ratio

NETS = ("scaling_3d", "scaling_2d")
MEMOIZED = ["kernels", "images", "gradients"]


def table(data):
    bounds = {key[:2]: s for key, s in parallelism(data).items() if key[2] == tuple(MEMOIZED)}
    rows = []
    for net in NETS:
        for (machine, width), records in by(
            data.select(net, memoize=MEMOIZED), "machine_id", "width"
        ).items():
            base = next((r for r in records if r.options["threads"] == 1), None)
            for record in sorted(records if base else [], key=lambda r: r.options["threads"]):
                threads, e = record.options["threads"], paired_ratio(base, record)
                s = bounds.get((net, width))
                rows.append(
                    {
                        "net": net,
                        "machine": data.machine(machine),
                        "width": width,
                        "threads": threads,
                        "speedup": e.value,
                        "low": e.low,
                        "high": e.high,
                        "coverage": e.coverage,
                        "samples": len(record.samples_s),
                        "brent": s / (1 + (s - 1) / threads) if s else "",
                    }
                )
    return rows


def parallelism(data):
    """T1 / Tinf by net, width and what is memoized."""
    return {
        (record.problem["net"], row["width"], tuple(row["memoize"])): row["work_flop"] / row["span_flop"]
        for record in data.select("scaling_theory")
        for row in record.metrics["rows"]
    }


def caption(rows):
    return (
        "Speedup over one worker of the same program, all convolutions by FFT, all transforms memoized. A "
        "round is backward(i) "
        "and forward(i+1). Bars: 95 % bootstrap intervals over paired interleaved rounds. Dashed: least "
        "speedup by Brent's "
        "theorem. Grey: linear."
    )


def draw(rows, plt):
    nets = [net for net in NETS if any(r["net"] == net for r in rows)]
    machines = sorted({r["machine"] for r in rows})
    figure, axes = plt.subplots(
        1, len(nets), figsize=(style.WIDE if len(nets) > 1 else 4.6, 3.0), squeeze=False
    )
    for axis, net in zip(axes[0], nets):
        mine = [r for r in rows if r["net"] == net]
        widths, most = sorted({r["width"] for r in mine}), max(r["threads"] for r in mine)
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
        ticks = sorted({r["threads"] for r in mine})
        axis.set(
            title=net,
            xlabel="worker threads",
            xticks=ticks if len(ticks) <= 12 else ticks[:: len(ticks) // 8],
        )
    axes[0, 0].set_ylabel("speedup over one worker")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color="0.3", ls="--", lw=0.7), plt.Line2D([], [], color="0.6", lw=0.8)]
    figure.legend(handles, [*labels, "Brent's bound", "linear"], loc="outside right center")
    style.name_machines(figure, machines, style.MARKER_NAMES)
    return figure
