"""The report in a real browser: nothing loads, nothing is too wide or too small, hostile text is text.

axe is looked for where DPO_OPT_AXE names its ``axe.min.js`` (``npm install axe-core``).
"""

import itertools
import os
from pathlib import Path

import pytest
from chromium import BROWSER, chromium

from dpo_opt.analysis import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium (Debian: apt-get install chromium)"),
]

HOSTILE = "<script>document.title='owned'</script> ]]> [/foo] </div></main> \x1b[31mred \u202eabc\u2066"
SMALLEST = 9.0
"""In CSS pixels; the page's own text is 14."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(tmp_path, shards_writer, run_writer, texts):
    """A report of two runs on pairs with hostile texts, sources and names."""
    pairs = [(f"{p} {HOSTILE}", f"{c} {HOSTILE}", f"{r} {HOSTILE}") for p, c, r in texts(120, prompts=60)]
    made = shards_writer(tmp_path / "shards", pairs, sources=(HOSTILE.replace("/", ""), "other"))
    runs = [run_writer(tmp_path / name, tmp_path / "shards", made, steps=20) for name in ("[b]one", "two")]
    report(runs, tmp_path / "report.html")
    return tmp_path / "report.html"


def test_the_page_fits_and_reaches_for_nothing(browser, page):
    for width, scheme in itertools.product((390, 1280, 1920), ("light", "dark")):
        seen = browser.look(page, width=width, scheme=scheme)
        assert seen.problems == [], (width, scheme)
        assert seen.overflow <= 0, (width, scheme)
        assert seen.smallest_text >= SMALLEST, (width, scheme)


def test_hostile_text_is_shown_as_text(browser, page):
    seen = browser.look(page, width=1280)
    assert seen.scripts == 0
    for shown in ("<script>document.title='owned'</script>", "]]>", "[/foo]", "</div></main>", "[31mred"):
        assert shown in seen.text
    assert not {"\x1b", "\u202e", "\u2066"} & set(seen.text)


def test_axe_finds_no_serious_violation(browser, page):
    if not (axe := os.environ.get("DPO_OPT_AXE")):
        pytest.skip("DPO_OPT_AXE names no axe.min.js")
    source = Path(axe).read_text(encoding="utf-8")
    for scheme in ("light", "dark"):
        assert browser.look(page, width=1280, scheme=scheme, axe=source).violations == [], scheme


def test_faults_of_a_page_are_noticed(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body><p style='color:#bbb;width:3000px'>pale and wide</p>"
        "<figure><svg width='90' viewBox='0 0 900 90'><text font-size='20'>small</text></svg></figure>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.log('said'); nothing();</script></body>"
    )
    axe = os.environ.get("DPO_OPT_AXE")
    seen = browser.look(bad, width=390, axe=Path(axe).read_text(encoding="utf-8") if axe else None)
    found = " ".join(seen.problems)
    assert "request: http://127.0.0.1:9/x.png" in found
    assert "console: " in found
    assert "exception: " in found
    assert seen.overflow > 2000
    assert seen.smallest_text < SMALLEST
    assert seen.scripts == 1
    if axe:
        assert any(violation.startswith("color-contrast") for violation in seen.violations)
