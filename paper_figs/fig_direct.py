"""Direct convolution on bundles: how much of a core's peak each pass of a layer reaches, by width."""

import style
from records import by, stats

ASKED = 0.85  # at widths that are multiples of the bundle


def table(data):
    rows = []
    for (machine, width), records in by(data.select("direct"), "machine_id", "width").items():
        layer = records[-1].metrics["layers"][0]
        for name in style.PHASES:
            share, seconds = stats.ratio(layer["peak_s"], layer[f"{name}_s"]), stats.median(layer[f"{name}_s"])
            rows.append(
                {
                    "machine": data.machine(machine),
                    "code_path": layer["code_path"],
                    "kernel": records[-1].problem["kernel"],
                    "output_side": records[-1].problem["output"][-1],
                    "width": width,
                    "bundle": records[-1].metrics.get("bundle", 8),  # the first records had no other
                    "pass": name,
                    "share_of_peak": share.value,
                    "low": share.low,
                    "high": share.high,
                    "seconds": seconds.value,
                    "gflop_per_s": 1e-9 * layer["flop"] / seconds.value,
                    "samples": len(layer["peak_s"]),
                }
            )
    return sorted(rows, key=lambda r: (r["machine"], r["width"], list(style.PHASES).index(r["pass"])))


def caption(rows):
    kernel, side = rows[0]["kernel"], rows[0]["output_side"] + rows[0]["kernel"] - 1
    text = (
        f"Direct convolution of bundles of eight maps (sixteen where the code path has them and they divide the width), {kernel}³ kernels "
        f"on {side}³ voxels, as many maps in as out, on one thread: "
        "its operations per second over those of multiplications and additions that wait for nothing but the core's arithmetic, "
        "measured in turns. Every pass is counted with all that it does besides: arranging kernels, padding the gradient, "
        "updating kernels. Bars are ratios of medians, whiskers their 95 % intervals (bootstrap over paired turns); the "
        f"line is at {100 * ASKED:.0f} %. "
    )
    return text + "".join(missed(machine, [r for r in rows if r["machine"] == machine]) for machine in dict.fromkeys(r["machine"] for r in rows))


def missed(machine, rows):
    """Which passes are below what is asked, with the whole interval."""
    below = {name: [r["width"] for r in rows if r["pass"] == name and r["high"] < ASKED] for name in style.PHASES}
    found = [f"{name} at width {', '.join(map(str, widths))}" for name, widths in below.items() if widths]
    return f"Below it on {machine} ({rows[0]['code_path']}): {'; '.join(found) or 'nothing'}. "


def draw(rows, plt):
    groups = list(dict.fromkeys((r["machine"], r["width"]) for r in rows))
    figure, axis = plt.subplots(figsize=(style.WIDE, 2.6))
    for i, (name, colour) in enumerate(style.PHASES.items()):
        found = [(groups.index((r["machine"], r["width"])), r) for r in rows if r["pass"] == name]
        x = [j + (i - 1) * 0.27 for j, _ in found]
        estimates = [[100 * r[key] for key in ("share_of_peak", "low", "high")] for _, r in found]
        axis.bar(x, [e[0] for e in estimates], 0.25, color=colour, label=name)
        style.intervals(axis, x, estimates, ls="none", color="0.2", lw=0.8)
    axis.axhline(100 * ASKED, color="0.3", lw=0.8, ls="--")
    axis.set(ylabel="share of the core's peak (%)", xlabel="width (feature maps in and out)", ylim=(0, 105))
    style.group_ticks(axis, groups, [str(width) for _, width in groups])
    figure.legend(loc="outside upper center", ncols=3)
    style.name_machines(figure, [r["machine"] for r in rows])
    return figure
