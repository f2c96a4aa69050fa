"""Brent's bound on the speedup against width, from the task graph."""

import style

WORKERS = (8, 18, 40, 60, 120, 240)


def table(data):
    rows = []
    for record in data.select("theory"):
        for row in record.metrics["rows"]:
            parallelism = row["work_flop"] / row["span_flop"]
            rows += [
                {
                    "method": row["method"],
                    "depth": record.problem["depth"],
                    "width": row["width"],
                    "workers": p,
                    "work_flop": row["work_flop"],
                    "span_flop": row["span_flop"],
                    "bound": parallelism / (1 + (parallelism - 1) / p),
                }
                for p in WORKERS
            ]
    distinct = {tuple(row.items()): row for row in rows}  # every machine computes the same
    return sorted(distinct.values(), key=lambda r: (r["method"], r["depth"], r["width"], r["workers"]))


def caption(rows):
    depths = sorted({row["depth"] for row in rows})
    return (
        "Speedup that Brent's theorem promises, S_P >= S_inf / (1 + (S_inf - 1) / P), for chains of fully "
        "connected 5^3 "
        f"convolution layers; bands span depths {depths[0]} to {depths[-1]}. Computed from the task graph, "
        f"not measured."
    )


def draw(rows, plt):
    methods = sorted({row["method"] for row in rows})
    figure, axes = plt.subplots(1, len(methods), figsize=(style.WIDE, 2.8), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods):
        for colour, workers, marker in zip(style.sequence(len(WORKERS)), WORKERS, style.MARKERS):
            mine = [r for r in rows if r["method"] == method and r["workers"] == workers]
            widths = sorted({r["width"] for r in mine})
            bounds = [[r["bound"] for r in mine if r["width"] == w] for w in widths]
            axis.fill_between(
                widths, [min(b) for b in bounds], [max(b) for b in bounds], color=colour, alpha=0.35, lw=0
            )
            axis.plot(
                widths, [sum(b) / len(b) for b in bounds], color=colour, marker=marker, label=f"P = {workers}"
            )
        axis.set(title=f"all {method}", xlabel="width (feature maps per layer)")
        style.plain_log(axis, "y", (1, 2, 5, 10, 20, 50, 100, 200), base=10)
    axes[0, 0].set_ylabel("least speedup by Brent's theorem")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
