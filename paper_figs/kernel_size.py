"""What the two kernel-size figures share: seconds per round and voxels per second against the output
patch."""

import style
from records import output_side, spinning_note, stats, voxels

TICKS = ([m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)], [10.0**e for e in range(-2, 8)])
PLANS = {"direct": "ZNN direct", "fft": "ZNN FFT"}


def rows_of(data, experiment, phase="round"):
    rows = []
    for record in data.select(experiment, status=None, where=lambda r: r.problem.get("phase", "round") == phase):
        name = PLANS[record.options["plan"]] if record.adapter_name == "znn" else data.engine(record)
        row = {
            "net": record.problem["net"],
            "form": record.problem.get("form", ""),
            "width": record.problem.get("width"),
            "engine": name,
            "machine": data.machine(record.machine_id),
            "output_side": output_side(record),
            "status": record.status,
            "reason": record.reason,
            "turn_s": record.protocol.get("turn_s", 0),
        }
        if record.status == "ok":
            e, n = stats.median(record.samples_s), voxels(record)
            row |= {
                "seconds": e.value,
                "low": e.low,
                "high": e.high,
                "coverage": e.coverage,
                "voxels_per_s": n / e.value,
                "voxels_low": n / e.high,
                "voxels_high": n / e.low,
                "samples": len(record.samples_s),
            }
        rows.append(row)
    return sorted(
        rows,
        key=lambda r: (r["net"], r["form"], r["engine"], r["machine"], str(r["width"]), r["output_side"]),
    )


def caption_of(rows, what="training round (backward i, update, forward i+1)"):
    missing = sorted({f"{r['engine']}: {r['reason']}" for r in rows if r["status"] != "ok"})
    text = (
        f"Seconds per {what} and output voxels per second against the side of the output patch, one panel per "
        "kernel; strided: max-pooling, dense: max-filtering, every voxel. Markers are medians, bars their 95 % "
        "distribution-free intervals. "
    ) + spinning_note(rows)
    return text + ("Missing: " + "; ".join(missing[:6]) + "." if missing else "")


def draw_of(rows, plt, what="round"):
    good = [r for r in rows if r["status"] == "ok"]
    panels = sorted(
        {(r["net"], r["form"], r["width"]) for r in good},
        key=lambda p: (p[1] != "strided", int(p[0].split("_")[1]), p[2]),
    )
    lines = sorted({(r["engine"], r["machine"]) for r in good}, key=lambda p: (not p[0].startswith("ZNN"), p))
    machines, engines = sorted({m for _, m in lines}), list(dict.fromkeys(e for e, _ in lines))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(max(5.0, 1.7 * len(panels) + 1.2), 4.6), sharey="row", squeeze=False
    )
    for column, panel in enumerate(panels):
        for engine, machine in lines:
            mine = [
                r
                for r in good
                if (r["net"], r["form"], r["width"], r["engine"], r["machine"]) == (*panel, engine, machine)
            ]
            label = engine if len(machines) == 1 else f"{engine}\n{machine}"
            look = {
                "color": style.COLOURS[engines.index(engine) % len(style.COLOURS)],
                "ls": style.LINES[machines.index(machine) % len(style.LINES)],
                "marker": style.MARKERS[machines.index(machine) % len(style.MARKERS)],
                "label": label,
            }
            sides = [r["output_side"] for r in mine]
            style.intervals(
                axes[0, column], sides, [(r["seconds"], r["low"], r["high"]) for r in mine], **look
            )
            style.intervals(
                axes[1, column],
                sides,
                [(r["voxels_per_s"], r["voxels_low"], r["voxels_high"]) for r in mine],
                **look,
            )
        axes[0, column].set_title(f"{panel[0]}, width {panel[2]}\n{panel[1]}")
        axes[1, column].set_xlabel("output patch side (voxels)")
        ticks = sorted({r["output_side"] for r in good})
        for row in (0, 1):
            style.plain_log(axes[row, column], "x", ticks)
            style.plain_log(axes[row, column], "y", TICKS[row], base=10)
    axes[0, 0].set_ylabel(f"seconds per {what}")
    axes[1, 0].set_ylabel("output voxels per second")
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes[0]), key=lambda pair: len(pair[1])
    )
    columns = min(4, int(figure.get_figwidth() / 2.4))  # as many as the longest names leave room for
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure
