"""One self-contained HTML page: claims, figures, machines and records; tables sort and filter; nothing is
fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import stats, store
from .claims import Verdict

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-size:13px}td,th{border-bottom:1px solid
#ddd;padding:.25rem .6rem;
text-align:left;vertical-align:top}th{cursor:pointer;background:#f4f4f4;position:sticky;top:0}th[data-up]::after{content:" \\2191"}
th[data-down]::after{content:" \\2193"}figure{margin:1.5rem 0}figure
img{max-width:100%;height:auto}figcaption{font-size:13px;color:#444;
white-space:pre-line}input{font:inherit;padding:.2rem
.5rem;width:20rem;max-width:100%}.reproduced{color:#00704a}
.not-reproduced{color:#b03000}.only-simulated,.not-testable-here{color:#666}.wide{overflow-x:auto;max-height:40rem}
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const body = table.tBodies[0];
  const filter = table.closest("section").querySelector("input");
  if (filter) filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\\s+/);
    for (const row of body.rows) row.hidden = !words.every(w => row.textContent.toLowerCase().includes(w));
  });
  [...table.tHead.rows[0].cells].forEach((head, column) => head.addEventListener("click", () => {
    const down = head.hasAttribute("data-up");
    for (const other of head.parentNode.cells) { other.removeAttribute("data-up");
    other.removeAttribute("data-down"); }
    head.setAttribute(down ? "data-down" : "data-up", "");
    const key = row => row.cells[column].textContent;
    const compare = (a, b) => { const x = parseFloat(key(a)), y = parseFloat(key(b));
      return isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y; };
    [...body.rows].sort((a, b) => down ? compare(b, a) : compare(a, b)).forEach(row => body.append(row));
  }));
}
"""


def page(loaded: store.Loaded, verdicts: Sequence[Verdict], figures: Path) -> str:
    """The HTML text. figures: folder with NAME.png and NAME.txt."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
        "content='width=device-width'>",
        f"<title>ZNN: measurements</title><link rel=icon href='data:,'><style>{STYLE}</style></head><body>",
        "<h1>ZNN: measurements</h1>",
        _claims(verdicts),
        _figures(figures),
        _machines(loaded),
        _records(loaded),
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _claims(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (v.claim, v.text, f"<b class={v.verdict.replace(' ', '-')}>{v.verdict}</b>", html.escape(v.reason))
        for v in verdicts
    ]
    tests = [
        (
            v.claim,
            html.escape(t.what),
            html.escape(t.machine),
            f"{t.value:.4g}",
            f"{t.low:.4g} to {t.high:.4g}" if t.low is not None else "",
            html.escape(t.threshold),
            {True: "yes", False: "no", None: ""}[t.passed],
            "simulated" if t.simulated else "",
        )
        for v in verdicts
        for t in v.tests
    ]
    return (
        "<section><h2>Claims</h2>" + _table(("claim", "the paper", "verdict", "why"), rows) + "</section>"
        "<section><h3>Numbers behind the verdicts</h3>"
        + _filter()
        + _table(("claim", "number", "machine", "value", "95 % interval", "threshold", "passed", ""), tests)
        + "</section>"
    )


def _figures(folder: Path) -> str:
    parts = ["<section><h2>Figures</h2>"]
    for path in sorted(folder.glob("*.png")):
        image = base64.b64encode(path.read_bytes()).decode()
        caption = html.escape(path.with_suffix(".txt").read_text().strip())
        parts.append(
            f"<figure id={path.stem}><img alt='{path.stem}' src='data:image/png;base64,{image}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(parts) + "</section>"


def _machines(loaded: store.Loaded) -> str:
    rows = []
    for run in sorted(loaded.runs.values(), key=lambda run: (run.machine_id, run.started)):
        m, end = run.machine, loaded.ends.get(run.run_id, {})
        source = m.get("source") or {}
        facts = (
            run.machine_id,
            m.get("cpu"),
            m.get("physical_cores"),
            f"{(m.get('memory_bytes') or 0) / 2**30:.0f} GiB",
            run.started,
            run.settings.get("tier"),
            (source.get("commit") or "")[:10] + (" (changed)" if source.get("dirty") else ""),
            f"{end['wall_s']:.0f} s" if "wall_s" in end else "interrupted",
            "; ".join(run.warnings),
        )
        rows.append([html.escape(str(f if f is not None else "")) for f in facts])
    return (
        "<section><h2>Machines and runs</h2>"
        + _table(
            ("machine", "CPU", "physical cores", "memory", "started", "tier", "commit", "took", "warnings"),
            rows,
        )
        + "</section>"
    )


def _records(loaded: store.Loaded) -> str:
    rows = []
    for r in loaded.latest():
        e = stats.median(r.samples_s) if r.samples_s else None
        described = " ".join(f"{k}={_plain(v)}" for k, v in (r.problem | r.options).items())
        facts = (
            r.experiment,
            r.machine_id,
            r.adapter_name,
            described,
            r.status,
            f"{e.value:.5g}" if e else "",
            f"{e.low:.5g} to {e.high:.5g}" if e else "",
            len(r.samples_s) or "",
            f"{r.peak_rss_bytes / 2**20:.0f}" if r.peak_rss_bytes else "",
            r.reason,
            r.case_id,
        )
        rows.append([html.escape(str(f)) for f in facts])
    return (
        "<section><h2>Records</h2>"
        + _filter()
        + _table(
            (
                "experiment",
                "machine",
                "adapter",
                "case",
                "status",
                "median s",
                "95 % interval",
                "samples",
                "peak MiB",
                "reason",
                "id",
            ),
            rows,
        )
        + "</section>"
    )


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _filter() -> str:
    return "<p><input type=search placeholder='filter: words that must occur' aria-label=filter></p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<div class=wide><table class=sort><thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead>"
        f"<tbody>{cells}</tbody></table></div>"
    )
