"""Speedup on many workers: measured where there are cores, simulated beyond."""

import style
from records import stats

DASHES = {"grows with cores": "--", "as on this machine": ":"}


def table(data):
    rows = []
    for record in data.select("many_cores"):
        common = {
            "machine": data.machine(record.machine_id),
            "net": record.problem["net"],
            "width": record.problem["width"],
        }
        validation = record.metrics["validation"]
        base = next(v for v in validation if v["workers"] == 1)["samples_s"]
        for v in validation:
            e = stats.ratio(base, v["samples_s"])
            rows.append(
                common
                | {
                    "kind": "measured",
                    "bandwidth": "",
                    "workers": v["workers"],
                    "speedup": e.value,
                    "low": e.low,
                    "high": e.high,
                    "error": v["error"],
                    "error_without_bandwidth": v.get("error_without_bandwidth", ""),
                }
            )
        rows += [
            common
            | {
                "kind": "simulated",
                "bandwidth": p["bandwidth"],
                "workers": p["workers"],
                "speedup": p["speedup"],
                "low": "",
                "high": "",
                "error": "",
            }
            for p in record.metrics["predicted"]
        ]
    return rows


def caption(rows):
    worst, without = (
        max((abs(r[key]) for r in rows if r["kind"] == "measured" and r[key] != ""), default=None)
        for key in ("error", "error_without_bandwidth")
    )
    return (
        "Filled markers with bars: measured, with 95 % bootstrap intervals. Hollow markers: SIMULATED, a "
        "discrete-event "
        "replay of the measured task durations on P workers as fast as one of this machine; dashed: memory "
        "bandwidth grows "
        "with the cores, dotted: it stays this machine's. Queue and lock times are not simulated. Largest "
        "error of the "
        f"simulated seconds per round against measured ones, at the thread counts at hand: {worst:.1%}"
    ) + ("." if without is None else f" ({without:.1%} without the model of memory bandwidth).")


def draw(rows, plt):
    figure, axis = plt.subplots(figsize=(4.8, 3.4))
    widths, machines = sorted({r["width"] for r in rows}), sorted({r["machine"] for r in rows})
    most = max(r["workers"] for r in rows)
    axis.plot([1, most], [1, most], color="0.6", lw=0.8, label="linear")
    for colour, width in zip(style.sequence(len(widths)), widths):
        for marker, machine in zip(style.MARKERS, machines):
            mine = [r for r in rows if r["width"] == width and r["machine"] == machine]
            measured = [r for r in mine if r["kind"] == "measured"]
            style.intervals(
                axis,
                [r["workers"] for r in measured],
                [(r["speedup"], r["low"], r["high"]) for r in measured],
                color=colour,
                marker=marker,
                ls="none",
                zorder=3,
            )
            for bandwidth, dash in DASHES.items():
                line = sorted((r for r in mine if r["bandwidth"] == bandwidth), key=lambda r: r["workers"])
                first = machine == machines[0] and bandwidth == "grows with cores"
                axis.plot(
                    [r["workers"] for r in line],
                    [r["speedup"] for r in line],
                    color=colour,
                    ls=dash,
                    marker=marker,
                    mfc="white",
                    lw=0.9,
                    label=f"width {width}" if first else None,
                )
    handles, labels = axis.get_legend_handles_labels()
    handles += [
        plt.Line2D([], [], color="0.3", marker="o", ls="none"),
        plt.Line2D([], [], color="0.3", marker="o", mfc="w", ls="--"),
        plt.Line2D([], [], color="0.3", marker="o", mfc="w", ls=":"),
    ]
    labels += ["measured", "simulated, bandwidth grows", "simulated, bandwidth fixed"]
    axis.legend(handles, labels, loc="upper left")
    for which in "xy":
        style.plain_log(axis, which, (1, 2, 4, 8, 18, 40, 60, 120, 240))
    axis.tick_params(axis="x", rotation=45)
    style.name_machines(figure, machines, style.MARKER_NAMES)
    axis.set(xlabel="workers", ylabel="speedup over one worker")
    return figure
