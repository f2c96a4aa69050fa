"""Forward passes of the inference nets, next to the published Titan X times."""

import csv

import style
from records import output_side, spinning_note, stats

PUBLISHED = "published/titanx_forward.csv"


def table(data):
    rows = []
    for record in data.select("inference"):
        e = stats.median(record.samples_s)
        rows.append(
            {
                "net": record.problem["net"],
                "width": record.problem.get("width"),
                "kind": "measured",
                "engine": data.engine(record),
                "adapter": record.adapter_name,
                "machine": data.machine(record.machine_id),
                "output_side": output_side(record),
                "seconds": e.value,
                "low": e.low,
                "high": e.high,
                "samples": len(record.samples_s),
                "turn_s": record.protocol.get("turn_s", 0),
            }
        )
    path = data.root / PUBLISHED
    with open(path if path.exists() else data.fallback / PUBLISHED, newline="") as file:
        for row in csv.DictReader(file):
            if row["report_kind"] == "baseline":  # max-pooling, as in our strided nets
                side = int(row["output_patch"].split("x")[-1])
                rows.append(
                    {
                        "net": row["net"],
                        "width": 80,
                        "kind": "published",
                        "engine": "Titan X, cuDNN",
                        "adapter": "",
                        "machine": "",
                        "output_side": side,
                        "seconds": float(row["seconds_per_patch"]),
                        "low": "",
                        "high": "",
                        "samples": "",
                    }
                )
    return sorted(
        rows,
        key=lambda r: (
            r["net"],
            r["kind"],
            r["engine"],
            str(r["machine"]),
            str(r["width"]),
            r["output_side"],
        ),
    )


def caption(rows):
    return (
        "Forward pass only, strided (max-pooling) nets, one patch. Filled: measured, medians with 95 % intervals"
        f"{_width_note(rows)}. Hollow: published with ZNNi (seung-lab/ZNNi, 2016), Titan X with cuDNN, width 80, "
        "not measured by us; the reports name no date, driver or library version. "
        + spinning_note(rows)
        + " ".join(_ratios(rows))
    )


def _width_note(rows):
    others = sorted({r["width"] for r in rows if r["kind"] == "measured"} - {80})
    if not others:
        return ", width 80 as published"
    return f"; at width {', '.join(map(str, others))} they cannot be compared with the published ones at 80"


def _ratios(rows):
    """Published over measured seconds where net, width and patch are the same."""
    published = {(r["net"], r["width"], r["output_side"]): r["seconds"] for r in rows if r["kind"] == "published"}
    for r in rows:
        at = (r["net"], r["width"], r["output_side"])
        if r["kind"] == "measured" and at in published:
            yield (
                f"{r['net']}, output side {at[2]}: {r['engine']} takes {r['seconds'] / published[at]:.3g} times as "
                f"long ({r['low'] / published[at]:.3g} to {r['high'] / published[at]:.3g})."
            )


def draw(rows, plt):
    nets = sorted({r["net"] for r in rows})
    figure, axes = plt.subplots(1, len(nets), figsize=(style.WIDE, 2.9), sharey=True, squeeze=False)
    lines = sorted(
        {(r["engine"], r["machine"], r["width"], r["adapter"]) for r in rows if r["kind"] == "measured"}, key=str
    )
    several = len({machine for _, machine, _, _ in lines}) > 1
    for axis, net in zip(axes[0], nets):
        published = [r for r in rows if r["net"] == net and r["kind"] == "published"]
        axis.plot(
            [r["output_side"] for r in published],
            [r["seconds"] for r in published],
            ls="none",
            marker="o",
            mfc="none",
            mec="0.35",
            ms=3,
            label="Titan X, cuDNN (published, width 80)",
        )
        for marker, line in zip(style.MARKERS[1:], lines):
            mine = [r for r in rows if r["net"] == net and (r["engine"], r["machine"], r["width"], r["adapter"]) == line]
            label = (
                line[0]
                + ("" if line[2] == 80 else f", width {line[2]}")
                + (f"\n{line[1]}" if several else "")
            )
            style.intervals(
                axis,
                [r["output_side"] for r in mine],
                [(r["seconds"], r["low"], r["high"]) for r in mine],
                color=style.ENGINE_COLOURS.get(line[3], "0.5"),
                marker=marker,
                label=label,
            )
        axis.set(title=net, xlabel="output patch side (voxels)", yscale="log")
        style.plain_log(axis, "x", (1, 2, 4, 8, 16, 32))
    axes[0, 0].set_ylabel("seconds per forward pass")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
