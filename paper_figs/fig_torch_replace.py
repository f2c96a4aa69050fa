"""Small PyTorch models before and after replace_convs: seconds before over seconds after."""

import style
from records import by, paired_ratio, stats

BEFORE, AFTER = "torch_model", "torch_replaced"
PHASES = {"round": "training: forward, gradients, update", "forward": "inference"}
TICKS = [m * 10.0**e for e in range(-1, 3) for m in (1, 2, 5)]
ALLOWED = 1 / 1.05  # never more than 5 % slower


def table(data):
    rows = []
    for _, records in by(data.select("torch_replace", status=None), "machine_id", "net", "phase").items():
        found = {r.adapter_name: r for r in records}
        for record in records:
            row = {
                "machine": data.machine(record.machine_id),
                "model": record.problem["net"],
                "phase": record.problem.get("phase", "round"),
                "adapter": record.adapter_name,
                "status": record.status,
                "reason": record.reason,
            }
            if record.status == "ok":
                e = stats.median(record.samples_s)
                row |= {"seconds": e.value, "low": e.low, "high": e.high, "samples": len(record.samples_s)}
                row |= {"error": (record.check or {}).get("max_rel_err")}
            before = found.get(BEFORE)
            if record.adapter_name == AFTER and record.status == "ok" and before is not None and before.status == "ok":
                ratio = paired_ratio(before, record)
                row |= {"faster": ratio.value, "faster_low": ratio.low, "faster_high": ratio.high}
                row |= {"verdict": verdict(ratio)} | decisions(record)
            rows.append(row)
    return sorted(rows, key=lambda r: (r["machine"], r["phase"] != "round", r["model"], r["adapter"]))


def verdict(ratio):
    """Whether the model is more than 5 % slower: by the whole interval, or open."""
    return "no" if ratio.low >= ALLOWED else "yes" if ratio.high < ALLOWED else "open"


def decisions(record):
    """Which modules were exchanged, and of how many."""
    found = record.metrics.get("convolutions", [])
    names = [d["name"] for d in found if d["uses"] == "znn"]
    return {"replaced": " ".join(names), "replaced_count": len(names), "convolutions": len(found)}


def caption(rows):
    ratios = [r for r in rows if "faster" in r]
    text = (
        "Seconds of small whole models with PyTorch's convolutions, over their seconds after znn.torch.replace_convs, in processes "
        "of their own and interleaved rounds on the same threads: above one is faster. Beside each model: how many of its "
        "convolutions were exchanged. Dashed: 5 % slower. Points are ratios of medians, whiskers their 95 % intervals; output and "
        "gradients were compared with float64 before timing. "
    )
    if ratios:
        worst = min(ratios, key=lambda r: r["faster"])
        counts = {v: sum(r["verdict"] == v for r in ratios) for v in ("no", "yes", "open")}
        text += (
            f"The least is {worst['faster']:.3g} ({worst['faster_low']:.3g} to {worst['faster_high']:.3g}), {worst['model']} in "
            f"{PHASES[worst['phase']].split(':')[0]}. More than 5 % slower: {counts['yes']} of {len(ratios)}; open, as their "
            f"intervals reach across: {counts['open']}. "
        )
    reasons = sorted({f"{r['model']}, {r['adapter']}: {r['reason']}" for r in rows if r["status"] != "ok"})
    return text + ("Missing: " + "; ".join(reasons) + "." if reasons else "")


def draw(rows, plt):
    machines = sorted({r["machine"] for r in rows})
    models = sorted({r["model"] for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDE, 1.0 + 0.2 * len(models) * len(machines)), sharey=True)
    size = 0.7 / len(machines)
    for axis, (phase, title) in zip(axes, PHASES.items()):
        for row in rows:
            if row["phase"] != phase or "faster" not in row:
                continue
            i = machines.index(row["machine"])
            y = models.index(row["model"]) + (i + 0.5) * size - 0.35
            whiskers = [[row["faster"] - row["faster_low"]], [row["faster_high"] - row["faster"]]]
            look = {"color": style.COLOURS[i % len(style.COLOURS)], "mfc": None if row["replaced_count"] else "white"}
            axis.errorbar(row["faster"], y, xerr=whiskers, fmt="o", ms=4, lw=0.9, **look)
            axis.annotate(f"{row['replaced_count']} of {row['convolutions']}", (1, y), (-3, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", va="center", fontsize=6)
        style.plain_log(axis, "x", TICKS, base=10)
        axis.margins(x=0.15)
        axis.axvline(1, color="0.2", lw=0.8)
        axis.axvline(ALLOWED, color="0.2", lw=0.8, ls="--")
        axis.set(title=title, xlabel="times faster after replace_convs")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].invert_yaxis()
    if len(machines) > 1:
        handles = [plt.Line2D([], [], color=style.COLOURS[i % len(style.COLOURS)], marker="o", label=m) for i, m in enumerate(machines)]
        figure.legend(handles=handles, loc="outside upper center", ncols=1)
    return figure
