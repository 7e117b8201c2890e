"The report in a real browser: nothing is fetched, nothing runs, it fits a telephone, by day and by night."
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

HOSTILE = ("<script>alert(1)", "<img src=x onerror=alert(2)>", "an ordinary class with a name that is rather long for a telephone")
WAYS = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]


def draw(folder):
    "Pictures of noise, a folder a class: nothing can be learned from them, so that there are mistakes to show."
    rng = np.random.default_rng(0)
    for name in HOSTILE:
        (folder / name).mkdir(parents=True)
        for i in range(14):
            Image.fromarray(rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(folder / name / f"{i:02}.png")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "The reports of a fit on a tiny folder whose classes have hostile names, and of `sft-course evaluate` on the same."
    from sft_course import Phase, fine_tune
    top = tmp_path_factory.mktemp("report")
    draw(top / "data")
    with patch.dict(os.environ, XDG_CACHE_HOME=str(top / "cache")):
        fine_tune(top / "data", out=top / "out", size=64, phases=(Phase("head"), Phase(2, epochs=2, views=2)))
        command = [Path(sys.executable).with_name("sft-course"), "evaluate", top / "out", top / "data"]
        subprocess.run([*command, "--report", top / "other.html"], check=True, stdout=subprocess.DEVNULL)
    assert json.loads((top / "out" / "card.json").read_text())["classes"] == sorted(HOSTILE)
    return {"fit": top / "out" / "report.html", "evaluate": top / "other.html"}


@pytest.mark.parametrize("made_by", ["fit", "evaluate"])
@pytest.mark.parametrize("width, scheme", WAYS, ids=[f"{w}-{s}" for w, s in WAYS])
def test_the_report(browser, reports, shot, width, scheme, made_by):
    report = reports[made_by]
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=False)
    page, asked, complaints = context.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("dialog", lambda d: (complaints.append(f"a script ran: {d.message}"), d.dismiss()))
    page.goto(report.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    page.screenshot(path=shot(f"report-{made_by}-{width}-{scheme}"), full_page=True)
    assert complaints == []
    assert [u for u in asked if not u.startswith(("file://", "data:"))] == []
    inner, wide = page.evaluate("() => [document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert wide <= inner == width, "the page scrolls sideways"
    paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper[:3]) > 3 * 128) == (scheme == "light")
    for name in HOSTILE:
        assert page.get_by_text(name, exact=True).count() > 0, f"{name} does not show as text"
    assert page.locator("script, iframe, img[src=x]").count() == 0
    context.close()


@pytest.mark.parametrize("made_by", ["fit", "evaluate"])
def test_images_of_the_report_are_drawn_and_have_words(browser, reports, made_by):
    page = browser.new_page()
    page.goto(reports[made_by].as_uri())
    for image in page.locator("img").all():
        assert image.evaluate("i => i.complete && i.naturalWidth > 0") and len(image.get_attribute("alt")) > 15
    for drawing in page.locator("svg").all():
        assert drawing.get_attribute("aria-label")
    page.close()
