"""The same net trained by ZNN and by PyTorch on the same cores: error and loss against wall-clock time."""

import json

import style

NAMES = {"znn": "ZNN", "torch": "PyTorch, CPU"}
COLOURS = {"znn": style.ENGINE_COLOURS["znn"], "torch": style.ENGINE_COLOURS["torch_cpu"]}


def table(data):
    rows = []
    for path in sorted(data.root.glob("*/learning_curves/*.jsonl")):
        run, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        facts = run["machine"]
        for line in lines:
            rows.append(
                {
                    "task": run["name"],
                    "engine": run["engine"],
                    "version": run["how"]["version"],
                    "kind": line["kind"],
                    "round": line["round"],
                    "seconds": line["seconds"],
                    "loss": line["loss"],
                    "pixel_error": line.get("pixel_error"),
                    "standard_error": line.get("standard_error"),
                    "trivial_error": line.get("trivial_error"),
                    "machine": f"{facts.get('cpu')}, {run['threads']} threads",
                    "commit": str((facts.get("source") or {}).get("commit"))[:10],
                    "command": run["command"],
                }
            )
    # One task and machine to a figure: the first by name, unless only others have both engines.
    groups = {}
    for row in rows:
        groups.setdefault((row["task"], row["machine"]), []).append(row)
    complete = [group for group in groups.values() if len({row["engine"] for row in group}) == len(NAMES)]
    return (complete or list(groups.values()) or [[]])[0]


def caption(rows):
    first = rows[0]
    versions = ", ".join(f"{NAMES[e]} {v}" for e, v in sorted({(r["engine"], r["version"]) for r in rows}, reverse=True))
    text = (
        f"Training the same net for the task '{first['task']}' on the same cores ({first['machine']}) with the same initial "
        "parameters, patches in the same order, optimiser and learning rate. Left: share of wrong voxels on held-out "
        "sections, the band is twice its standard error over tiles, the dashed line what calling everything one class "
        "gives. Right: the same against rounds of training, where the curves agree. Time includes validation. "
    )
    return f"{text}{versions}; commit {first['commit']}. Repeat: {first['command']}"


def draw(rows, plt):
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.WIDE, 2.8), sharey=True)
    good = [r for r in rows if r["kind"] == "validation"]
    for engine in NAMES:
        mine = [r for r in good if r["engine"] == engine]
        if not mine:
            continue
        error = [100 * r["pixel_error"] for r in mine]
        low, high = ([e + side * 200 * r["standard_error"] for e, r in zip(error, mine)] for side in (-1, 1))
        for axis, x in ((left, [r["seconds"] / 60 for r in mine]), (right, [r["round"] for r in mine])):
            axis.plot(x, error, color=COLOURS[engine], label=NAMES[engine])
            axis.fill_between(x, low, high, color=COLOURS[engine], alpha=0.2, lw=0)
    for axis, label in ((left, "training time (min)"), (right, "rounds")):
        axis.axhline(100 * good[-1]["trivial_error"], color="0.4", ls="--", lw=1)
        axis.set(xlabel=label, ylim=(0, None), xlim=(0, None))
    left.set_ylabel("pixel error, held-out sections (%)")
    left.legend(loc="lower left")
    return figure
