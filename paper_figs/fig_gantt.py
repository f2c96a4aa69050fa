"""One round on all workers: who ran which phase when; white is idle."""

import style


def table(data):
    records = data.select("gantt")
    if not records:
        return []
    record = max(
        records, key=lambda r: (r.options.get("threads") or 0, r.problem.get("width") or 0, r.run_id)
    )
    data.used = {(record.machine_id, record.experiment, record.case_id): record}
    e = record.metrics["events"]
    names = e["names"]
    return [
        {
            "machine": data.machine(record.machine_id),
            "net": record.problem["net"],
            "width": record.problem.get("width"),
            "worker": w,
            "phase": names["phase"][p],
            "group": names["group"][g] if g >= 0 else "",
            "start_us": s,
            "duration_us": d,
        }
        for w, p, g, s, d in zip(e["worker"], e["phase"], e["group"], e["start_us"], e["duration_us"])
    ]


def caption(rows):
    end = max(r["start_us"] + r["duration_us"] for r in rows)
    workers = max(r["worker"] for r in rows) + 1
    busy = sum(r["duration_us"] for r in rows) / (end * workers)
    return (
        f"One traced round of {rows[0]['net']} at width {rows[0]['width']}: backward(i), then forward(i+1), "
        f"the updates of round i "
        f"in between. {len(rows)} events, {busy:.1%} of the workers' time in tasks. White is idle."
    )


def draw(rows, plt):
    workers = max(r["worker"] for r in rows) + 1
    figure, axis = plt.subplots(figsize=(style.WIDE, min(6.0, 1.1 + 0.35 * workers)))
    phases = list(dict.fromkeys(r["phase"] for r in rows))
    others = iter(c for c in style.COLOURS[3:])
    colours = {phase: style.PHASES.get(phase) or next(others) for phase in phases}
    for phase in sorted(phases, key=lambda p: (list(style.PHASES).index(p) if p in style.PHASES else 9, p)):
        for worker in range(workers):
            bars = [
                (r["start_us"] / 1e3, r["duration_us"] / 1e3)
                for r in rows
                if r["worker"] == worker and r["phase"] == phase
            ]
            axis.broken_barh(
                bars,
                (worker - 0.4, 0.8),
                facecolors=colours[phase],
                lw=0,
                label=phase if worker == 0 else None,
            )
    axis.set(
        xlabel="time (ms)", ylabel="worker", yticks=range(workers), xlim=(0, None), ylim=(workers - 0.5, -0.5)
    )
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5)
    return figure
