"""Sums of converging edges: time of a round and share of time in critical sections, by width."""

import style
from records import by, paired_ratio, stats
from znn_bench.counters import lock_shares

SUMS = ("wait-free", "locked", "ordered")


def table(data):
    rows = []
    shares = {
        (r.machine_id, r.problem["width"], r.options["sum"]): stats.median(lock_shares(r.metrics))
        for r in data.select("sums", adapter="locks")
    }
    for (machine, width), records in by(data.select("sums", adapter="znn"), "machine_id", "width").items():
        base = next((r for r in records if r.options["sum"] == "wait-free"), None)
        for record in records if base else []:
            e, kind = paired_ratio(record, base), record.options["sum"]
            share = shares.get((machine, width, kind))
            rows.append(
                {
                    "machine": data.machine(machine),
                    "width": width,
                    "sum": kind,
                    "relative": e.value,
                    "low": e.low,
                    "high": e.high,
                    "lock_share": share.value if share else "",
                    "lock_low": share.low if share else "",
                    "lock_high": share.high if share else "",
                    "samples": len(record.samples_s),
                }
            )
    return sorted(rows, key=lambda r: (r["machine"], SUMS.index(r["sum"]), r["width"]))


def caption(rows):
    return (
        "Left: seconds per round over those with the almost wait-free sum, on all physical cores, with 95 % "
        "bootstrap intervals over paired rounds. Right: share of all workers' time in the critical sections of "
        "sums, waiting for them included, in traced interleaved rounds: medians with 95 % intervals."
    )


def draw(rows, plt):
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDE, 2.8))
    machines = sorted({r["machine"] for r in rows})
    for colour, kind in zip(style.COLOURS, SUMS):
        for marker, machine in zip(style.MARKERS, machines):
            line = [r for r in rows if r["sum"] == kind and r["machine"] == machine]
            look = {"color": colour, "marker": marker, "label": kind if machine == machines[0] else None}
            style.intervals(
                axes[0],
                [r["width"] for r in line],
                [(r["relative"], r["low"], r["high"]) for r in line],
                **look,
            )
            shared = [r for r in line if r["lock_share"] != ""]
            style.intervals(
                axes[1],
                [r["width"] for r in shared],
                [[100 * r[k] for k in ("lock_share", "lock_low", "lock_high")] for r in shared],
                **look,
            )
    axes[0].set(
        xlabel="width (feature maps per layer)", ylabel="seconds per round,\nrelative to the wait-free sum"
    )
    axes[1].set(
        xlabel="width (feature maps per layer)", ylabel="time in critical sections (%)", ylim=(0, None)
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    style.name_machines(figure, machines, style.MARKER_NAMES)
    return figure
