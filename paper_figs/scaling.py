"""What the two scaling figures share: speedups over one worker, with Brent's bound."""

import style
from records import by, paired_ratio

NETS = ("scaling_3d", "scaling_2d")
MEMOIZED = ("kernels", "images", "gradients")


def speedups(data):
    """A row for each net, machine, setting of memoization, width and thread count, where one worker was measured."""
    bounds, rows = parallelism(data), []
    for net in NETS:
        for (machine, memoize, width), records in by(
            data.select(net), "machine_id", "memoize", "width"
        ).items():
            base = next((r for r in records if r.options["threads"] == 1), None)
            for record in sorted(records if base else [], key=lambda r: r.options["threads"]):
                threads, e, s = record.options["threads"], paired_ratio(base, record), bounds.get((net, width, memoize))
                rows.append(
                    {
                        "net": net,
                        "machine": data.machine(machine),
                        "cores": data.physical_cores(record),
                        "memoize": memoize,
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


def panels(plt, rows):
    """A figure with a panel for each net that was measured, and (panel, net) pairs."""
    nets = [net for net in NETS if any(r["net"] == net for r in rows)]
    figure, axes = plt.subplots(
        1, len(nets), figsize=(style.WIDE if len(nets) > 1 else 4.6, 3.0), squeeze=False
    )
    return figure, list(zip(axes[0], nets))
