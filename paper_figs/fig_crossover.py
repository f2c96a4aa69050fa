"""Direct over FFT: where the crossover is, measured and by the cost model."""

import style
from records import by, output_side, paired_ratio


def table(data):
    rows, pairs = [], {}
    for experiment in ("kernel_size_3d", "kernel_size_2d"):
        rounds = lambda r: r.problem.get("phase", "round") == "round"  # noqa: E731
        records = data.select(experiment, adapter="znn", form="strided", where=rounds)
        for (machine, net, width, output), mine in by(
            records, "machine_id", "net", "width", "output"
        ).items():
            methods = {r.options["plan"]: r for r in mine}
            if {"direct", "fft"} <= set(methods):
                e = paired_ratio(methods["direct"], methods["fft"])
                rows.append(_row(mine[0], "measured", data.machine(machine), width, e.value, e.low, e.high))
                pairs[net, width, output_side(mine[0])] = mine[0]
    model = {}
    for record in data.select("crossover_theory"):
        for row in record.metrics["rows"]:
            model[record.problem["net"], row["width"], row["output"][-1], row["method"]] = row["work_flop"]
    for (net, width, side), record in pairs.items():
        if (net, width, side, "direct") in model:
            ratio = model[net, width, side, "direct"] / model[net, width, side, "fft"]
            rows.append(_row(record, "cost model", "", width, ratio, ratio, ratio))
    return rows


def _row(record, kind, machine, width, ratio, low, high):
    net = record.problem["net"]
    return {
        "dims": net[:2],
        "net": net,
        "kernel": int(net.split("_")[1]),
        "output_side": output_side(record),
        "kind": kind,
        "machine": machine,
        "width": width,
        "direct_over_fft": ratio,
        "low": low,
        "high": high,
    }


def caption(rows):
    return (
        "Seconds of a training round with every layer direct over every layer FFT; above 1 FFT is ahead. "
        "Solid: measured, with "
        "95 % bootstrap intervals over paired rounds. Dashed: ratio of operations by the cost model, which "
        "knows nothing of "
        "how fast either method runs."
    )


def draw(rows, plt):
    dims = sorted({r["dims"] for r in rows}, reverse=True)
    figure, axes = plt.subplots(
        1, len(dims), figsize=(style.WIDE if len(dims) > 1 else 4.2, 3.0), squeeze=False
    )
    machines = sorted({r["machine"] for r in rows if r["machine"]})  # one marker per machine in all panels
    for axis, dim in zip(axes[0], dims):
        mine = [r for r in rows if r["dims"] == dim]
        sides, first = sorted({r["output_side"] for r in mine}), min(r["machine"] for r in mine if r["machine"])
        for colour, side in zip(style.sequence(len(sides)), sides):
            for marker, machine in zip(style.MARKERS, machines):
                line = sorted(
                    (r for r in mine if r["output_side"] == side and r["machine"] == machine),
                    key=lambda r: r["kernel"],
                )
                if not line:
                    continue
                style.intervals(
                    axis,
                    [r["kernel"] for r in line],
                    [(r["direct_over_fft"], r["low"], r["high"]) for r in line],
                    color=colour,
                    marker=marker,
                    label=f"output side {side}" if machine == first else None,
                )
            model = sorted(
                (r for r in mine if r["output_side"] == side and r["kind"] == "cost model"),
                key=lambda r: r["kernel"],
            )
            axis.plot(
                [r["kernel"] for r in model],
                [r["direct_over_fft"] for r in model],
                color=colour,
                ls="--",
                lw=0.8,
                label="cost model" if side == sides[-1] else None,
            )
        axis.axhline(1, color="0.4", lw=0.8)
        axis.set(
            title=f"{dim.upper()} comparison nets",
            xlabel="kernel side (voxels)",
            xticks=sorted({r["kernel"] for r in mine}),
        )
        style.plain_log(axis, "y", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50), base=10)
        axis.legend(loc="best")
    axes[0, 0].set_ylabel("direct over FFT, seconds per round")
    style.name_machines(figure, machines, style.MARKER_NAMES)
    return figure
