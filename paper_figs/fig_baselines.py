"""The same nets by other engines: seconds per training round."""

import style
from records import output_side, spinning_note, stats

TICKS = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]


def table(data):
    rows = []
    for record in data.select("baselines", status=None):
        row = {
            "net": record.problem["net"],
            "width": record.problem.get("width"),
            "output_side": output_side(record),
            "adapter": record.adapter_name,
            "engine": data.engine(record),
            "machine": data.machine(record.machine_id),
            "status": record.status,
            "reason": record.reason,
            "turn_s": record.protocol.get("turn_s", 0),
        }
        if record.status == "ok":
            e = stats.median(record.samples_s)
            row |= {
                "seconds": e.value,
                "low": e.low,
                "high": e.high,
                "coverage": e.coverage,
                "samples": len(record.samples_s),
                "peak_rss_bytes": record.peak_rss_bytes,
            }
        rows.append(row)
    return sorted(
        rows,
        key=lambda r: (
            r["net"],
            r["width"],
            r["output_side"],
            r["machine"],
            r["adapter"] != "znn",
            r["adapter"],
        ),
    )


def caption(rows):
    reasons = sorted({f"{r['engine']}: {r['reason']}" for r in rows if r["status"] != "ok"})
    text = (
        "Seconds per training round, all engines on the same problem, each checked against the float64 "
        "reference before it was "
        "timed. CPU engines use all physical cores. Bars are medians, whiskers their 95 % intervals. "
    )
    text += spinning_note(rows)
    return text + ("Missing bars: " + "; ".join(reasons) + "." if reasons else "")


def draw(rows, plt):
    problems = list(dict.fromkeys((r["net"], r["width"], r["output_side"]) for r in rows))
    machines = sorted({r["machine"] for r in rows})
    ordered = sorted(rows, key=lambda r: (r["machine"], r["adapter"] != "znn", r["adapter"]))
    engines = list(dict.fromkeys((r["adapter"], r["engine"], r["machine"]) for r in ordered))
    figure, axis = plt.subplots(figsize=(style.WIDE, 3.2))
    good = [r for r in rows if r["status"] == "ok"]
    floor = min((r["low"] for r in good), default=1e-3) / 3
    size, handles = 0.8 / len(engines), []
    for i, (adapter, engine, machine) in enumerate(engines):
        label = engine if len(machines) == 1 else f"{engine}\n{machine}"
        hatch = ["", "//", "..", "xx"][machines.index(machine) % 4]
        devices = [e for a, e, m in engines if (a, m) == (adapter, machine)]
        colour = (style.ENGINE_COLOURS.get(adapter, "0.5"), 0.4 ** devices.index(engine))  # a second device paler
        handles.append(plt.Rectangle((0, 0), 1, 1, fc=colour, hatch=hatch, label=label))
        for j, problem in enumerate(problems):
            row = next(
                (
                    r
                    for r in rows
                    if (r["net"], r["width"], r["output_side"]) == problem
                    and (r["adapter"], r["engine"], r["machine"]) == (adapter, engine, machine)
                ),
                None,
            )
            x = j + (i + 0.5) * size - 0.4
            if row and row["status"] == "ok":
                error = [[row["seconds"] - row["low"]], [row["high"] - row["seconds"]]]
                axis.bar(
                    x,
                    row["seconds"],
                    size * 0.95,
                    color=colour,
                    hatch=hatch,
                    yerr=error,
                    error_kw={"lw": 0.8},
                )
            elif row:
                axis.text(
                    x,
                    floor * 1.15,
                    _short(row),
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=5,
                    color="0.35",
                )
    style.plain_log(axis, "y", TICKS, base=10)
    axis.set(
        xticks=range(len(problems)),
        xticklabels=[f"{n}\nwidth {w}\noutput {o}" for n, w, o in problems],
        ylabel="seconds per round",
        ylim=(floor, None),
    )
    axis.grid(axis="x", visible=False)
    figure.legend(handles=handles, loc="outside upper center", ncols=4 if len(machines) == 1 else 3)
    return figure


def _short(row):
    words = {"oom": "out of memory", "timeout": "out of time", "failed": "failed"}
    return words.get(row["status"], "not available" if "not available" in row["reason"] else "too large")
