"""Scheduling policies: time of a round and cache misses, relative to the paper's order."""

import style
from records import by, paired_ratio, stats
from znn_bench.counters import misses

POLICIES = ("priority", "fifo", "lifo", "stealing")


def table(data):
    rows = []
    for (machine, width), records in by(
        data.select("policies", adapter="znn"), "machine_id", "width"
    ).items():
        base = next((r for r in records if r.options["policy"] == "priority"), None)
        for record in records if base else []:
            e = paired_ratio(record, base)
            rows.append(
                {
                    "measure": "time",
                    "machine": data.machine(machine),
                    "width": width,
                    "policy": record.options["policy"],
                    "relative": e.value,
                    "low": e.low,
                    "high": e.high,
                    "absolute": "",
                    "samples": len(record.samples_s),
                }
            )
    for (machine, width), records in by(
        data.select("policies", adapter="valgrind"), "machine_id", "width"
    ).items():
        counted = {r.options["policy"]: misses(r.metrics) for r in records}
        for policy, counts in counted.items() if "priority" in counted else ():
            e = stats.unpaired_ratio(counts, counted["priority"])
            rows.append(
                {
                    "measure": "misses",
                    "machine": data.machine(machine),
                    "width": width,
                    "policy": policy,
                    "relative": e.value,
                    "low": e.low,
                    "high": e.high,
                    "absolute": stats.median(counts).value,
                    "samples": len(counts),
                }
            )
    return sorted(rows, key=lambda r: (r["measure"], r["machine"], r["width"], POLICIES.index(r["policy"])))


def caption(rows):
    return (
        "Left: seconds per round on all physical cores over those of the paper's priority order, with 95 % "
        "bootstrap intervals over paired rounds. Right: last-level cache misses of a round over the same, counted "
        "by valgrind on one worker (32 KiB first level, 1 MiB last level, both simulated), with 95 % bootstrap "
        "intervals over rounds; one worker has nobody to steal from."
    )


def draw(rows, plt):
    titles = {"time": "seconds per round", "misses": "last-level misses per round"}
    shown = [m for m in titles if any(r["measure"] == m for r in rows)]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(style.WIDE if len(shown) > 1 else 4.2, 2.8), squeeze=False
    )
    for axis, measure in zip(axes[0], shown):
        mine = [r for r in rows if r["measure"] == measure]
        groups = sorted({(r["machine"], r["width"]) for r in mine})
        for i, policy in enumerate(POLICIES):
            bars = {(r["machine"], r["width"]): r for r in mine if r["policy"] == policy}
            x = [j + (i - 1.5) * 0.2 for j, g in enumerate(groups) if g in bars]
            found = [bars[g] for g in groups if g in bars]
            axis.bar(x, [r["relative"] for r in found], 0.19, color=style.COLOURS[i], label=policy)
            style.intervals(
                axis,
                x,
                [(r["relative"], r["low"], r["high"]) for r in found],
                ls="none",
                color="0.2",
                lw=0.8,
            )
        axis.axhline(1, color="0.4", lw=0.8)
        axis.set(
            title=titles[measure],
            ylabel="relative to the paper's order",
            xlabel="width (feature maps per layer)",
        )
        style.group_ticks(axis, groups, [f"{w}" for _, w in groups])
        axis.set_ylim(0, 1.15 * max(max(r["relative"], r["high"] or 0) for r in mine))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    style.name_machines(figure, [r["machine"] for r in rows])
    return figure
