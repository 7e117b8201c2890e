"The chapters in JupyterLab, in a real browser: all cells run, widgets answer to the keyboard, exercises say what was wrong."
import os
import re
import time
from pathlib import Path

import pytest
from turns import by_turns

NBS = Path(__file__).parent.parent.parent / "nbs"
ALWAYS = ["00_concepts", "tools/widgets"]  # what the tests below go on in
OTHERS = [p.stem for p in sorted(NBS.glob("[0-9][0-9]_*.ipynb")) if p.stem not in ALWAYS]
FEW = os.environ.get("BROWSER_CHAPTERS") == "turns"
NAMES = ALWAYS[:1] + (by_turns(OTHERS, 3) if FEW else OTHERS) + ALWAYS[1:]

EXERCISE = 'check("00.1"'


VERDICTS = [("1", "Not yet. A linear layer has a weight and one thing more."), ("...", "Not yet. Put your answer in place of"),
            ("2", "Right. A linear head is a matrix and a vector.")]


@pytest.mark.parametrize("answer, verdict", VERDICTS, ids=["wrong", "blank", "right"])
def test_an_exercise_says_what_is_wrong_and_what_is_right(visit, shot, answer, verdict):
    seen = visit("00_concepts")
    cell = seen.cell(EXERCISE)
    seen.type_into(cell, f'answer = {answer}\ncheck("00.1", answer)')
    cell.locator(".jp-OutputArea").get_by_text(re.compile(re.escape(verdict))).wait_for(timeout=60_000)
    cell.screenshot(path=shot(f"exercise-{verdict.split()[0].lower().rstrip('.')}-{len(answer)}"))


# one control of each kind in each widget: (name, a text that only its output holds, which slider, key)
WIDGETS = [("logits", "logit, class 2", 1, "ArrowRight"), ("stages", "stages that train", 0, "ArrowRight"),
           ("schedule", "decay by depth", 1, "ArrowRight"), ("browse", "prediction", 3, "ArrowRight")]


def output_of(seen, text):
    "The last output with controls that holds a text."
    return seen.page.locator(".jp-OutputArea-output").filter(has=seen.page.locator(".widget-label", has_text=text)).last


def changed(seen, out, act):
    "Milliseconds from an act until the figure is another, and its sentence before and after."
    figure, sentence = out.locator("svg[role]").last, out.locator("p[role=status]")
    before, said = figure.evaluate("e => e.outerHTML"), sentence.inner_text()
    start = time.perf_counter()
    act()
    handle = out.element_handle()
    drawn = "([out, was]) => { const now = [...out.querySelectorAll('svg[role]')].pop(); return now && now.outerHTML !== was; }"
    seen.page.wait_for_function(drawn, arg=[handle, before], polling=5, timeout=20_000)
    return 1000 * (time.perf_counter() - start), said, sentence.inner_text()


# the chapter that uses a widget, and a text that only its output holds
IN_CHAPTER = {"03_loss": "logit, class 2", "06_unfreezing": "stages that train", "07_schedules": "decay by depth", "08_evaluation": "prediction"}


@pytest.mark.parametrize("name", NAMES)
def test_all_cells_run(visit, note, shot, name):
    start = time.perf_counter()
    seen = visit(name)
    note(f"{name}: {time.perf_counter() - start:.0f} s")
    errors = seen.errors()
    if errors:
        seen.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").first.scroll_into_view_if_needed()
        seen.page.screenshot(path=shot(f"{name}-error"))
    assert errors == []
    assert seen.page.get_by_text("Error displaying widget").count() == 0
    assert [u for u in seen.foreign if "colab-badge.svg" not in u] == [], "asked for over the network"
    if name in IN_CHAPTER:
        out = output_of(seen, IN_CHAPTER[name])
        out.scroll_into_view_if_needed()
        out.locator(".noUi-handle").last.focus()
        took, said, now = changed(seen, out, lambda: seen.page.keyboard.press("ArrowRight"))
        assert said != now
        note(f"{name}, its widget: {took:.0f} ms from key to figure")
        out.screenshot(path=shot(f"{name}-widget"))


@pytest.mark.parametrize("name, text, slider, key", WIDGETS, ids=[w[0] for w in WIDGETS])
def test_a_slider_moves_by_the_keyboard_and_the_figure_follows(visit, note, shot, name, text, slider, key):
    seen = visit("tools/widgets")
    out = output_of(seen, text)
    out.scroll_into_view_if_needed()
    out.screenshot(path=shot(f"widget-{name}-before"))
    handle = out.locator(".noUi-handle").nth(slider)
    handle.focus()
    took, said, now = changed(seen, out, lambda: seen.page.keyboard.press(key))
    assert said != now, "the figure changed, but not the sentence that says what it shows"
    out.screenshot(path=shot(f"widget-{name}-after"))
    note(f"widget {name}: {took:.0f} ms from key to figure")


def test_choices_answer_to_the_keyboard(visit, shot):
    seen = visit("tools/widgets")
    rates = output_of(seen, "decay by depth")
    rates.locator(".noUi-handle").first.focus()
    _, _, now = changed(seen, rates, lambda: seen.page.keyboard.press("ArrowRight"))
    assert now.startswith("one_cycle")
    pictures = output_of(seen, "prediction")
    pictures.get_by_role("button", name="right", exact=True).focus()
    _, _, now = changed(seen, pictures, lambda: seen.page.keyboard.press("Space"))
    assert "right images" in now and pictures.locator("svg image").count() == 12
    pictures.screenshot(path=shot("widget-browse-right"))


def test_everything_in_a_widget_can_be_reached_by_tab(visit):
    seen = visit("tools/widgets")
    out = output_of(seen, "decay by depth")
    handles = out.locator(".noUi-handle")
    handles.first.focus()
    reached = 1
    for _ in range(2 * handles.count()):
        seen.page.keyboard.press("Tab")
        reached += seen.page.evaluate("() => document.activeElement.classList.contains('noUi-handle')")
    assert reached >= handles.count(), "sliders that Tab does not reach"
    assert out.locator("select").count() == 0, "JupyterLab keeps the arrow keys that a list needs"


def test_a_widget_fits_a_narrow_window(visit, shot):
    seen = visit("tools/widgets")
    for text in ("stages that train", "prediction"):
        out = output_of(seen, text)
        box, figure = out.bounding_box(), out.locator("svg[role]").last.bounding_box()
        assert figure["x"] + figure["width"] <= box["x"] + box["width"] + 1


def test_the_curve_of_a_fit_grows_while_it_runs(visit, shot):
    seen = visit("tools/widgets")
    cell = seen.cell("live = LiveCurve()")
    code = "import time\nlive = LiveCurve()\nfor row in history: live(row); time.sleep(.7)"
    seen.type_into(cell, code)
    counts, sentences = set(), set()
    for _ in range(200):
        circles = cell.locator(".jp-OutputArea svg[role=img] circle").count()
        counts.add(circles)
        sentences |= set(cell.locator(".jp-OutputArea p[role=status]").all_inner_texts())
        if circles == 21 and len(counts) > 3:
            break
        time.sleep(.1)
    assert len(counts - {0}) >= 3 and max(counts) == 21, counts
    assert cell.locator(".jp-OutputArea svg[role=img]").count() == 1, "one figure that changes, not one an epoch"
    assert any("epoch 6" in s for s in sentences)
    cell.screenshot(path=shot("widget-live"))
