"""Speedup at all physical cores against width, with transforms of kernels memoized and recomputed."""

import style
from fig_scaling_threads import MEMOIZED, NETS, parallelism
from records import by, paired_ratio

SETTINGS = {tuple(MEMOIZED): "all memoized", ("images", "gradients"): "kernel transforms recomputed"}


def table(data):
    bounds, rows = parallelism(data), []
    for net in NETS:
        for (machine, memoize, width), records in by(
            data.select(net), "machine_id", "memoize", "width"
        ).items():
            cores = data.physical_cores(records[0])
            base, full = (next((r for r in records if r.options["threads"] == n), None) for n in (1, cores))
            if base and full and memoize in SETTINGS and cores > 1:
                e, s = paired_ratio(base, full), bounds.get((net, width, memoize))
                rows.append(
                    {
                        "net": net,
                        "machine": data.machine(machine),
                        "cores": cores,
                        "kernels": SETTINGS[memoize],
                        "width": width,
                        "speedup": e.value,
                        "low": e.low,
                        "high": e.high,
                        "coverage": e.coverage,
                        "samples": len(full.samples_s),
                        "brent": s / (1 + (s - 1) / cores) if s else "",
                    }
                )
    return rows


def caption(rows):
    return (
        "Speedup over one worker with a worker on every physical core, against width. Bars: 95 % bootstrap "
        "intervals over "
        "paired interleaved rounds. Dashed: least speedup by Brent's theorem. Grey: the number of physical "
        "cores."
    )


def draw(rows, plt):
    nets = [net for net in NETS if any(r["net"] == net for r in rows)]
    machines, settings = sorted({r["machine"] for r in rows}), list(SETTINGS.values())
    figure, axes = plt.subplots(
        1, len(nets), figsize=(style.WIDE if len(nets) > 1 else 4.6, 3.0), squeeze=False
    )
    for axis, net in zip(axes[0], nets):
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
    axes[0, 0].set_ylabel("speedup at all physical cores")
    axes[0, 0].legend(loc="lower right")
    return figure
