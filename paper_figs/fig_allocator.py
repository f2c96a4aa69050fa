"""Pools against malloc: time of a round and peak memory."""

import style
from records import by, paired_ratio


def table(data):
    rows = []
    for (machine, width), records in by(data.select("allocator"), "machine_id", "width").items():
        base = next((r for r in records if r.options["allocator"] == "pools"), None)
        for record in records if base else []:
            e = paired_ratio(record, base)
            rows.append(
                {
                    "machine": data.machine(machine),
                    "width": width,
                    "allocator": record.options["allocator"],
                    "relative": e.value,
                    "low": e.low,
                    "high": e.high,
                    "memory_gb": record.peak_rss_bytes / 1e9,
                    "samples": len(record.samples_s),
                }
            )
    return sorted(rows, key=lambda r: (r["machine"], r["width"], r["allocator"] != "pools"))


def caption(rows):
    return (
        "Power-of-two pools against the C library's malloc. Left: seconds per round over those with pools, on "
        "all physical "
        "cores, with 95 % bootstrap intervals over paired rounds. Right: peak resident memory of the process."
    )


def draw(rows, plt):
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDE, 2.6))
    groups = sorted({(r["machine"], r["width"]) for r in rows})
    for i, kind in enumerate(("pools", "malloc")):
        found = [
            (j, r)
            for j, g in enumerate(groups)
            for r in rows
            if (r["machine"], r["width"]) == g and r["allocator"] == kind
        ]
        x = [j + (i - 0.5) * 0.4 for j, _ in found]
        axes[0].bar(x, [r["relative"] for _, r in found], 0.38, color=style.COLOURS[i], label=kind)
        style.intervals(
            axes[0],
            x,
            [(r["relative"], r["low"], r["high"]) for _, r in found],
            ls="none",
            color="0.2",
            lw=0.8,
        )
        axes[1].bar(x, [r["memory_gb"] for _, r in found], 0.38, color=style.COLOURS[i])
    for axis, label in zip(axes, ("seconds per round,\nrelative to pools", "peak memory (GB)")):
        axis.set(ylabel=label, xlabel="width (feature maps per layer)")
        style.group_ticks(axis, groups, [f"{w}" for _, w in groups])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    style.name_machines(figure, [r["machine"] for r in rows])
    return figure
