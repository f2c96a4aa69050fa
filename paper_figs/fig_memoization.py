"""Memoization: time, transforms counted and memory, by what is kept between the phases."""

import style
from records import by, paired_ratio
from znn_bench.counters import transforms

NAMES = {
    ("kernels", "images", "gradients"): "all kept",
    ("images", "gradients"): "kernels recomputed",
    ("kernels",): "only kernels kept",
    (): "nothing kept",
}
PANELS = (
    ("time", "seconds per round,\nrelative to nothing kept"),
    ("transforms", "transforms per round,\nrelative to nothing kept"),
    ("memory", "peak memory (GB)"),
)


def table(data):
    rows = []
    for (machine, width), records in by(data.select("memoization"), "machine_id", "width").items():
        base = next((r for r in records if not r.options["memoize"]), None)
        for record in records if base else []:
            e = paired_ratio(record, base)
            counted, most = transforms(record.metrics), transforms(base.metrics)
            rows.append(
                {
                    "machine": data.machine(machine),
                    "width": width,
                    "kept": NAMES[tuple(record.options["memoize"])],
                    "time": e.value,
                    "low": e.low,
                    "high": e.high,
                    "transforms_counted": counted,
                    "transforms": counted / most if most else "",
                    "memory": record.peak_rss_bytes / 1e9,
                    "samples": len(record.samples_s),
                }
            )
    return sorted(rows, key=lambda r: (r["machine"], r["width"], list(NAMES.values()).index(r["kept"])))


def caption(rows):
    return (
        "What is kept in the frequency domain between forward, backward and update, on all physical cores. "
        "Time with 95 % "
        "bootstrap intervals over paired rounds; transforms as counted by the engine, the line at 2/3 is the "
        "paper's saving; "
        "memory is the peak resident size of the process."
    )


def draw(rows, plt):
    figure, axes = plt.subplots(1, 3, figsize=(style.WIDE, 2.8))
    groups = sorted({(r["machine"], r["width"]) for r in rows})
    kept = [name for name in NAMES.values() if any(r["kept"] == name for r in rows)]
    for axis, (measure, label) in zip(axes, PANELS):
        for i, name in enumerate(kept):
            found = [
                (j, r)
                for j, g in enumerate(groups)
                for r in rows
                if (r["machine"], r["width"]) == g and r["kept"] == name and r[measure] != ""
            ]
            x = [j + (i - (len(kept) - 1) / 2) * 0.8 / len(kept) for j, _ in found]
            axis.bar(x, [r[measure] for _, r in found], 0.76 / len(kept), color=style.COLOURS[i], label=name)
            if measure == "time":
                style.intervals(
                    axis,
                    x,
                    [(r["time"], r["low"], r["high"]) for _, r in found],
                    ls="none",
                    color="0.2",
                    lw=0.8,
                )
        axis.set(ylabel=label, xlabel="width (feature maps per layer)")
        style.group_ticks(axis, groups, [f"{w}" for _, w in groups])
    axes[1].axhline(2 / 3, color="0.4", lw=0.8, ls="--")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    style.name_machines(figure, [r["machine"] for r in rows])
    return figure
