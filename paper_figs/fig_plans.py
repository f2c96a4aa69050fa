"""Autotuned plans against all direct, all FFT and the cost model's."""

import style
from records import by, output_side, paired_ratio, stats

PLANS = ("autotune", "model", "direct", "fft")


def table(data):
    rows = []
    for (machine, net, width, _), records in by(
        data.select("plans"), "machine_id", "net", "width", "output"
    ).items():
        base = next((r for r in records if r.options["plan"] == "autotune"), None)
        for record in records if base else []:
            e, own = paired_ratio(record, base), stats.median(record.samples_s)
            rows.append(
                {
                    "machine": data.machine(machine),
                    "net": net,
                    "width": width,
                    "output_side": output_side(record),
                    "plan": record.options["plan"],
                    "relative": e.value,
                    "low": e.low,
                    "high": e.high,
                    "seconds": own.value,
                    "samples": len(record.samples_s),
                }
            )
    return sorted(
        rows, key=lambda r: (r["machine"], r["net"], r["width"], r["output_side"], PLANS.index(r["plan"]))
    )


def caption(rows):
    return (
        "Seconds per round by plan over those of the autotuned plan, on all physical cores, with 95 % "
        "bootstrap intervals over "
        "paired rounds; the figures on the bars are seconds per round."
    )


def draw(rows, plt):
    groups = list(dict.fromkeys((r["machine"], r["net"], r["width"], r["output_side"]) for r in rows))
    figure, axis = plt.subplots(figsize=(style.WIDE, 2.9))
    for i, plan in enumerate(PLANS):
        found = [
            (j, r)
            for j, g in enumerate(groups)
            for r in rows
            if (r["machine"], r["net"], r["width"], r["output_side"]) == g and r["plan"] == plan
        ]
        x = [j + (i - 1.5) * 0.2 for j, _ in found]
        axis.bar(x, [r["relative"] for _, r in found], 0.19, color=style.COLOURS[i], label=plan)
        style.intervals(
            axis, x, [(r["relative"], r["low"], r["high"]) for _, r in found], ls="none", color="0.2", lw=0.8
        )
        for at, (_, r) in zip(x, found):
            axis.text(
                at,
                r["high"] * 1.04,
                f"{r['seconds']:.3g} s",
                ha="center",
                va="bottom",
                fontsize=5.5,
                rotation=90,
            )
    top = max(r["high"] for r in rows)
    style.plain_log(axis, "y", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), base=10)
    axis.set(
        ylabel="relative to the autotuned plan", ylim=(0.5 * min(1, *(r["low"] for r in rows)), 2.5 * top)
    )
    style.group_ticks(axis, groups, [f"{n}\nwidth {w}\noutput {o}" for _, n, w, o in groups])
    axis.axhline(1, color="0.4", lw=0.8)
    figure.legend(loc="outside upper center", ncols=4)
    style.name_machines(figure, [r["machine"] for r in rows])
    return figure
