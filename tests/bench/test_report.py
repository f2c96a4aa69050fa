import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "paper_figs"))
import synthetic  # noqa: E402

from znn.bench import claims, report, store  # noqa: E402

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Balanced(HTMLParser):
    """Counts tags and complains about wrong nesting; void elements have no end."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.counts, self.urls = [], {}, []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.urls += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    path = synthetic.write(root, "smoke", cores=2, change=lambda r: r if r.experiment != "sums" else None)
    figures = root / "figures"
    figures.mkdir()
    (figures / "one.png").write_bytes(PIXEL)
    (figures / "one.txt").write_text("A <caption> & more\n")
    loaded = store.load(root)
    target = root / "report.html"
    target.write_text(report.page(loaded, claims.evaluate(loaded), figures))
    assert path.exists()
    return target, loaded


def test_the_page_is_well_formed_and_fetches_nothing(page):
    text, parser = page[0].read_text(), Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.urls and all(url.startswith("data:") for url in parser.urls)
    assert not re.search(r"https?://|@import|url\(", text)


def test_it_holds_every_record_claim_and_figure(page):
    text, loaded = page[0].read_text(), page[1]
    assert all(record.case_id in text for record in loaded.latest())
    assert all(f"<td>C{i}</td>" in text for i in range(1, 9))
    assert "A &lt;caption&gt; &amp; more" in text and "<caption>" not in text
    assert text.count("type=search") == 2


PROBE = """
<script>
const probe = {};
const sections = [...document.querySelectorAll("section")];
const records = sections.find(s => s.querySelector("h2")?.textContent === "Records");
const table = records.querySelector("table"), heads = [...table.tHead.rows[0].cells];
const column = name => heads.findIndex(h => h.textContent === name);
const shown = name => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[column(name)].textContent);
probe.before = shown("median s");
heads[column("median s")].click();
probe.up = shown("median s");
heads[column("median s")].click();
probe.down = shown("median s");
heads[column("experiment")].click();
probe.experiments = shown("experiment");
const input = records.querySelector("input");
input.value = "POLICY=fifo znn";
input.dispatchEvent(new Event("input"));
probe.filtered = shown("case").map((text, i) => shown("experiment")[i] + " " + text);
input.value = "";
input.dispatchEvent(new Event("input"));
probe.all = shown("experiment").length;
probe.images = [...document.images].map(image => image.naturalWidth);
probe.marks = document.querySelectorAll("th[data-up], th[data-down]").length;
const note = document.createElement("pre");
note.id = "probe";
note.textContent = JSON.stringify(probe);
document.body.append(note);
</script>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in a headless browser; returns its DOM, what it printed and the requests that pages made."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: sudo apt-get install chromium")

    def go(path):
        folder = tmp_path_factory.mktemp("browser")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
        command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += [f"--user-data-dir={folder}/profile", f"--log-net-log={folder}/net.json", "--dump-dom"]
        command += ["--virtual-time-budget=5000", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        log = json.loads((folder / "net.json").read_text())
        start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        requests = [event["params"] for event in log["events"] if event["type"] == start and "url" in event.get("params", {})]
        # What the browser asks for on its own has no page as its initiator.
        urls = [request["url"] for request in requests if request.get("initiator") != "not an origin"]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], urls

    return go


def test_a_browser_shows_errors_and_requests_where_there_are_some(browse, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><title>x</title><body><script>fetch('http://example.com/x'); nothing()</script>")
    _, console, urls = browse(page)
    assert any("nothing" in line for line in console) and urls == ["http://example.com/x"]


def test_a_browser_runs_it_without_errors_or_requests_and_tables_sort_and_filter(browse, page):
    probed = page[0].with_name("probed.html")
    probed.write_text(page[0].read_text().replace("</body>", PROBE + "</body>"))
    dom, console, urls = browse(probed)
    assert console == [] and urls == []
    probe = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))
    records = page[1].latest()
    numbers = lambda texts: [float(text) for text in texts if text]  # noqa: E731
    assert probe["all"] == len(records) == len(probe["before"])
    assert numbers(probe["up"]) == sorted(numbers(probe["before"])) != numbers(probe["before"])
    assert numbers(probe["down"]) == sorted(numbers(probe["before"]), reverse=True)
    assert probe["experiments"] == sorted(r.experiment for r in records) and probe["marks"] == 1
    wanted = [r for r in records if r.options.get("policy") == "fifo" and r.adapter_name == "znn"]
    assert len(probe["filtered"]) == len(wanted) > 0 and all("policy=fifo" in text for text in probe["filtered"])
    assert probe["images"] == [1]
