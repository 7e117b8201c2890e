"The page of `sft-course serve` in a real browser: an image goes in, an answer comes out, on a telephone and on a desk."
import io

import numpy as np
import pytest
from PIL import Image

CLASSES = ["<img src=x onerror=alert(1)>", "an ordinary class with a name that is rather long for a telephone", "bee"]


def a_predictor(**more):
    from sft_course.tools.serving import Predictor, read_upload

    def read(data, limits):
        return read_upload(data, limits, 32)

    def run(items):
        return np.tile(np.float32([.6, .3, .1]), (len(items), 1))

    about = {"model": "insects", "kind": "image", "classes": CLASSES, "calibrated": True, "accuracy": .91, "n_test": 70}
    return Predictor("image", CLASSES, read, run, about, **more)


@pytest.fixture(scope="module")
def url():
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(bytes=200_000)) as url:
        yield url


@pytest.fixture(scope="module")
def url_with_images():
    "A server that was given labelled images; their labels are as odd as the classes."
    from sft_course.tools.serving import Limits, serving

    def nearest(items):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(file, "JPEG")
        rows = zip(CLASSES, (.987, .8, -.2))
        found = [{"label": label, "similarity": likeness, "image": file.getvalue()} for label, likeness in rows]
        return [found for _ in items]

    with serving(a_predictor(nearest=nearest), Limits(bytes=200_000)) as url:
        yield url


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page(browser, url, image, shot, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, asked, complaints = context.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("dialog", lambda d: (complaints.append(f"a script ran: {d.message}"), d.dismiss()))
    page.goto(url)
    page.set_input_files("input[type=file]", image)
    page.get_by_text("60.0 % sure").wait_for()
    assert page.locator(".label").inner_text() == CLASSES[0] and page.locator("#said img").count() == 0
    assert page.locator("#seen").evaluate("i => i.complete && i.naturalWidth === 120")
    page.screenshot(path=shot(f"serve-{width}-{scheme}"), full_page=True)
    inner, wide = page.evaluate("() => [document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert wide <= inner == width, "the page scrolls sideways"
    assert complaints == [] and not [a for a in asked if not a.startswith((url, "blob:", "data:"))]
    context.close()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_the_nearest_images(browser, url_with_images, image, shot, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("dialog", lambda d: (complaints.append(f"a script ran: {d.message}"), d.dismiss()))
    page.goto(url_with_images)
    assert not page.get_by_text("Nearest training images").is_visible()
    page.set_input_files("input[type=file]", image)
    page.get_by_text("60.0 % sure").wait_for()
    page.get_by_text("similarity 0.99").wait_for()
    figures = page.locator("#near figure")
    assert [t.split("\n")[0] for t in figures.all_inner_texts()] == CLASSES
    page.wait_for_function("() => [...document.querySelectorAll('#near img')].every(i => i.complete && i.naturalWidth === 112)")
    assert page.locator("#near img").first.get_attribute("alt") == f"A training image of {CLASSES[0]}"
    page.screenshot(path=shot(f"serve-nearest-{width}-{scheme}"), full_page=True)
    inner, wide = page.evaluate("() => [document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert wide <= inner == width, "the page scrolls sideways"
    page.locator("input[type=file]").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"<svg></svg>"})
    page.get_by_text("SVG drawing").wait_for()
    assert not page.get_by_text("Nearest training images").is_visible()
    assert [c for c in complaints if "422" not in c] == []
    context.close()


def test_an_image_is_dropped(browser, url, image):
    page = browser.new_page()
    page.goto(url)
    file = page.evaluate_handle("""bytes => { const d = new DataTransfer();
        d.items.add(new File([new Uint8Array(bytes)], 'x.png', { type: 'image/png' })); return d; }""", list(image.read_bytes()))
    page.dispatch_event("body", "drop", {"dataTransfer": file})
    page.get_by_text("60.0 % sure").wait_for()
    page.close()


def test_what_is_wrong_is_said(browser, url):
    page = browser.new_page()
    page.goto(url)
    choose = page.locator("input[type=file]")
    choose.set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"<svg></svg>"})
    page.get_by_text("SVG drawing").wait_for()
    choose.set_input_files({"name": "y.png", "mimeType": "image/png", "buffer": bytes(300_000)})
    page.get_by_text("larger than 0.2 MB").wait_for()
    large = io.BytesIO()
    Image.new("RGB", (64, 64)).save(large, "PNG")
    choose.set_input_files({"name": "z.png", "mimeType": "image/png", "buffer": large.getvalue()})
    page.get_by_text("60.0 % sure").wait_for()
    page.close()
