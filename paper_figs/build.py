#!/usr/bin/env python3
"""Rebuild figures, claims and report from the records of a results folder. Needs NumPy and matplotlib, no
engine.

    python paper_figs/build.py                     results/ -> paper_figs/built/, results/claims.*,
    paper_figs/built/report.html
A figure is drawn again only when its data, its script or the style has changed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import style  # noqa: E402
from records import ROOT, Data  # noqa: E402
from znn_bench import claims, report, whole_nets  # noqa: E402

SUFFIXES = (".pdf", ".png", ".csv", ".txt")
DIGESTS = "digests.json"


def names() -> list[str]:
    """Every figure, by the name of its script without `fig_`."""
    return sorted(path.stem.removeprefix("fig_") for path in HERE.glob("fig_*.py"))


def build(data: Data, out: Path, only: list[str] | None = None) -> dict[str, str]:
    """Build figures; returns for each "drawn", "unchanged" or "no records"."""
    out.mkdir(parents=True, exist_ok=True)
    digests = json.loads((out / DIGESTS).read_text()) if (out / DIGESTS).exists() else {}
    results = {}
    for name in only or names():
        results[name] = _build_one(name, data, out, digests)
    write(out / DIGESTS, json.dumps(digests, indent=1, sort_keys=True) + "\n")
    return results


def _build_one(name: str, data: Data, out: Path, digests: dict[str, str]) -> str:
    script = importlib.import_module(f"fig_{name}")
    data.used = {}
    rows = script.table(data)
    if not _drawable(rows):
        for suffix in SUFFIXES:
            (out / f"{name}{suffix}").unlink(missing_ok=True)
        digests.pop(name, None)
        return "no records"
    table, caption = as_csv(rows), f"{script.caption(rows)}\n{data.provenance()}\n"
    digest = hashlib.sha256("\0".join([table, caption, *_sources(script)]).encode()).hexdigest()
    if digests.get(name) == digest and all((out / f"{name}{suffix}").exists() for suffix in SUFFIXES):
        return "unchanged"
    plt = style.pyplot()
    figure = script.draw(rows, plt)
    style.save(figure, str(out / name))
    plt.close(figure)
    write(out / f"{name}.csv", table)
    write(out / f"{name}.txt", caption)
    digests[name] = digest
    return "drawn"


def _drawable(rows: list[dict[str, Any]]) -> bool:
    """Whether there is anything but skipped cases (and published numbers) to draw."""
    return any(
        row.get("status", "ok") == "ok" and row.get("kind") not in ("published", "cost model") for row in rows
    )


def _sources(script: ModuleType) -> list[str]:
    shared = [path for path in sorted(HERE.glob("*.py")) if not path.name.startswith(("fig_", "build"))]
    return [path.read_text() for path in [Path(script.__file__), *shared]]


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, text: str) -> None:
    """Replace a file atomically, and only when it changes."""
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=HERE / "built")
    parser.add_argument("--only", help="these figures, separated by commas")
    options = parser.parse_args()
    data = Data(options.results)
    for problem in data.loaded.problems:
        print(f"note: {problem}", file=sys.stderr)
    only = options.only.split(",") if options.only else None
    if only and (unknown := sorted(set(only) - set(names()))):
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(names())}")
    for name, result in build(data, options.out, only).items():
        print(f"{name:<20}{result}")
    judge(data, options.results, options.out)
    return 0


def judge(data: Data, results: Path, out: Path) -> None:
    """Write the verdicts beside the records and the report beside the figures."""
    verdicts = claims.evaluate(data.loaded)
    machines = {r.machine_id: data.machine(r.machine_id) for r in data.records}
    results.mkdir(parents=True, exist_ok=True)
    write(results / "claims.md", claims.to_markdown(verdicts, machines))
    write(results / "claims.json", claims.to_json(verdicts))
    if found := whole_nets.rows(data.records):
        write(results / "whole_nets.md", whole_nets.to_markdown(found, machines))
        write(results / "whole_nets.csv", whole_nets.to_csv(found))
    write(out / "report.html", report.page(data.loaded, verdicts, out))
    for v in verdicts:
        print(f"{v.claim}  {v.verdict:<18}{v.reason[:120]}")


if __name__ == "__main__":
    sys.exit(main())
