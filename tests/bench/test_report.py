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


def test_a_browser_runs_it_without_errors_or_requests(page):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    script = (
        page[0]
        .read_text()
        .replace(
            "</body>",
            "<script>document.querySelector('th').click();"
            "document.title = 'sorted ' + document.querySelectorAll('th[data-up]').length</script></body>",
        )
    )
    clicked = page[0].with_name("clicked.html")
    clicked.write_text(script)
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            "--virtual-time-budget=3000",
            clicked.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<title>sorted 1</title>" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
