"""Single layers inside PyTorch: how many times faster than eager PyTorch."""

import style
from records import by, output_side, paired_ratio, spinning_note, stats

EAGER = "torch_layers"
ENGINES = {"torch_znn": "znn.torch", "torch_compiled": "torch.compile"}
PHASES = {"round": "training: forward, gradients, update", "forward": "inference"}
TICKS = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]


def name_of(record):
    """The adapter's short name: one that no sweep but this one uses is named by its module."""
    name = record.adapter_name.split(":")[0].split(".")[-1]
    return name.removesuffix("_adapter")


def table(data):
    rows = []
    problem = ("machine_id", "kernel", "width", "output", "phase")
    for _, records in by(data.select("torch_layers", status=None), *problem).items():
        good = {name_of(r): r for r in records if r.status == "ok"}
        for record in records:
            name, kernel = name_of(record), record.problem["kernel"]
            row = {
                "machine": data.machine(record.machine_id),
                "phase": record.problem.get("phase", "round"),
                "width": record.problem["width"],
                "kernel": kernel,
                "input_side": output_side(record) + kernel - 1,
                "adapter": name,
                "status": record.status,
                "reason": record.reason,
                "turn_s": record.protocol.get("turn_s", 0),
            }
            if record.status == "ok":
                e = stats.median(record.samples_s)
                row |= {"seconds": e.value, "low": e.low, "high": e.high, "samples": len(record.samples_s)}
                if EAGER in good and name != EAGER:
                    ratio = paired_ratio(good[EAGER], record)
                    row |= {"faster": ratio.value, "faster_low": ratio.low, "faster_high": ratio.high}
            rows.append(row)
    return sorted(
        rows,
        key=lambda r: (
            r["machine"],
            r["phase"] != "round",
            r["width"],
            r["kernel"],
            r["input_side"],
            r["adapter"],
        ),
    )


def caption(rows):
    """What is shown, and what is not."""
    text = (
        "Seconds of eager PyTorch, in the faster of its memory layouts, over those of znn.torch and of torch.compile, for "
        "one layer (a 3D convolution without padding, bias and ReLU) on the same threads in interleaved rounds: above one "
        "is faster, below one is slower than eager PyTorch. Training computes the gradients of input, kernels and biases and "
        "updates; inference is the forward pass. Bars are ratios of medians, whiskers their 95 % intervals. "
    ) + spinning_note(rows)
    losses = [r for r in rows if r["adapter"] == "torch_znn" and r.get("faster", 2) < 1]
    if losses:
        text += "znn.torch loses at " + "; ".join(f"{label(r)} ({PHASES[r['phase']].split(':')[0]})" for r in losses) + ". "
    reasons = sorted({f"{ENGINES.get(r['adapter'], r['adapter'])}: {r['reason']}" for r in rows if r["status"] != "ok"})
    return text + ("Missing: " + "; ".join(reasons) + "." if reasons else "")


def label(row):
    return f"{row['width']} maps, {row['kernel']}³ on {row['input_side']}³"


def draw(rows, plt):
    machines = sorted({r["machine"] for r in rows})
    problems = list(dict.fromkeys((r["width"], r["kernel"], r["input_side"]) for r in rows))
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDE, 0.9 + 0.24 * len(problems) * len(machines)), sharey=True)
    series = [(machine, name) for machine in machines for name in ENGINES]
    size, handles = 0.84 / len(series), []
    for i, (machine, name) in enumerate(series):
        look = {"color": style.COLOURS[list(ENGINES).index(name)], "hatch": ["", "//", ".."][machines.index(machine) % 3]}
        text = ENGINES[name] if len(machines) == 1 else f"{ENGINES[name]}, {machine}"
        handles.append(plt.Rectangle((0, 0), 1, 1, fc=look["color"], hatch=look["hatch"], label=text))
        for axis, phase in zip(axes, PHASES):
            for r in rows:
                if (r["machine"], r["adapter"], r["phase"]) != (machine, name, phase) or "faster" not in r:
                    continue
                y = problems.index((r["width"], r["kernel"], r["input_side"])) + (i + 0.5) * size - 0.42
                whiskers = [[max(0.0, r["faster"] - r["faster_low"])], [max(0.0, r["faster_high"] - r["faster"])]]
                axis.barh(y, r["faster"] - 1, size * 0.9, left=1, xerr=whiskers, error_kw={"lw": 0.7}, **look)
    for axis, title in zip(axes, PHASES.values()):
        style.plain_log(axis, "x", TICKS, base=10)
        axis.axvline(1, color="0.2", lw=0.8)
        axis.set(title=title, xlabel="times faster than eager PyTorch")
        axis.grid(axis="y", visible=False)
    names = [f"{width} maps, {kernel}³ on {side}³" for width, kernel, side in problems]
    axes[0].set_yticks(range(len(problems)), names)
    axes[0].invert_yaxis()
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure
