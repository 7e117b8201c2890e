"Evaluation: numbers against other implementations, maps against the grad-cam package, and a report that nothing breaks."

import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from sft_course.backbones import new_head
from sft_course.core import what_moved
from sft_course.evaluation import (
    COOLEST,
    HOTTEST,
    confused_pairs,
    confusion,
    ece,
    ece_by_luck,
    fit_temperature,
    mcnemar,
    mistakes,
    needed_pictures,
    per_class,
    reliability,
    wilson,
    with_temperature,
)
from sft_course.tools.cams import grad_cam, spatial_layer, spotlight
from sft_course.tools.charts import captions, center_crop, confusion_figure, gallery_figure, per_class_figure, reliability_figure
from sft_course.tools.intake import scan
from sft_course.tools.logits import Evaluation, evaluate
from sft_course.tools.neighbours import nearest
from sft_course.tools.opening import open_backbone
from sft_course.tools.pixels import decode_once
from sft_course.tools.report import report_html
from sft_course.tools.settings import SFTError

quick = settings(max_examples=40, deadline=None)


def drawn(seed, n=150, k=5, sure=1.5):
    "An evaluation with random logits that lean to the label."
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    z = rng.normal(size=(n, k)) * 2
    z[np.arange(n), y] += sure
    return Evaluation(tuple(f"class {i}" for i in range(k)), [f"{i}.jpg" for i in range(n)], y, z)


# ---- the record


def test_an_evaluation_takes_lists_and_tensors_and_refuses_what_does_not_fit():
    e = Evaluation(["a", "b"], ("x", "y"), torch.tensor([0, 1]), torch.tensor([[2.0, 0.0], [3.0, 1.0]]))
    assert e.classes == ("a", "b") and e.labels.dtype == np.int64 and e.logits.dtype == np.float32
    assert e.accuracy == 0.5 and e.right.tolist() == [True, False] and len(e.take([1])) == 1 and e.take([1]).paths == ["y"]
    for labels, logits in (([0, 2], np.zeros((2, 2))), ([0], np.zeros((1, 2))), ([0, -1], np.zeros((2, 2))), ([0, 1], np.zeros((2, 3)))):
        with pytest.raises(SFTError, match="do not fit"):
            Evaluation(("a", "b"), ["x", "y"], labels, logits)


def test_probabilities_are_those_of_torch_and_finite_where_logits_are_not():
    e = drawn(0)
    assert np.allclose(e.probabilities, torch.from_numpy(e.logits).double().softmax(1).numpy())
    bad = Evaluation(("a", "b"), ["x"] * 3, [0, 0, 0], [[np.nan, 1], [np.inf, 0], [np.nan, np.nan]])
    assert np.isfinite(bad.probabilities).all() and bad.predictions.tolist() == [1, 0, 0]


def test_evaluating_a_folder_of_fewer_classes_keeps_the_order_of_the_network(stripes, tmp_path):
    backbone = new_head(open_backbone("lite0", weights=None), 3)
    cache = decode_once(scan(stripes), 72, tmp_path / "cache")
    e = evaluate(backbone, cache, np.arange(4), 64, classes=("stripes", "tulips", "waves"))
    assert e.classes == ("stripes", "tulips", "waves") and set(e.labels) <= {0, 2} and e.logits.shape == (4, 3)
    with pytest.raises(SFTError, match="'waves' is none of the network's"):
        evaluate(backbone, cache, np.arange(4), 64, classes=("stripes", "tulips", "roses"))


# ---- counts


@quick
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n, share, level):
    s = round(share * n)
    theirs = binomtest(s, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(s, n, level) == pytest.approx(tuple(theirs), abs=1e-9)


def test_wilson_of_nothing_and_of_arrays():
    assert wilson(0, 0) == (0, 1) and wilson(0, 9)[0] == 0 and wilson(9, 9)[1] == 1
    low, high = wilson(np.array([0, 3]), np.array([0, 4]))
    assert low[0] == 0 and high[0] == 1 and (low[1], high[1]) == wilson(3, 4)


@quick
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 8))
def test_confusion_precision_and_recall_agree_with_sklearn(seed, n, k):
    e = drawn(seed, n, k)
    assert (confusion(e) == confusion_matrix(e.labels, e.predictions, labels=range(k))).all()
    table = per_class(e)
    theirs = precision_recall_fscore_support(e.labels, e.predictions, labels=range(k), zero_division=np.nan)
    assert np.allclose(table.precision, theirs[0], equal_nan=True) and np.allclose(table.recall, theirs[1], equal_nan=True)
    assert (table.images == theirs[3]).all() and (table["recall low"] <= table["recall high"]).all()
    assert confused_pairs(e, 100).images.sum() == (~e.right).sum()


def test_mistakes_come_in_the_order_of_confidence():
    e = drawn(1)
    rows = mistakes(e, 500)
    assert not e.right[rows].any() and len(rows) == (~e.right).sum() and (np.diff(e.confidence[rows]) <= 0).all()
    assert len(mistakes(e, 3)) == 3 and len(mistakes(e.take(np.flatnonzero(e.right)))) == 0


# ---- calibration


@quick
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(2, 8), st.sampled_from([5, 10, 15]))
def test_ece_agrees_with_torchmetrics(seed, n, k, bins):
    e = drawn(seed, n, k)
    theirs = MulticlassCalibrationError(k, n_bins=bins)(torch.from_numpy(e.probabilities), torch.from_numpy(e.labels)).item()
    on_an_edge = np.abs(e.confidence * bins - np.round(e.confidence * bins)).min() < 1e-4 or e.confidence.max() > 1 - 1e-6
    assert on_an_edge or ece(e, bins) == pytest.approx(theirs, abs=1e-5)


def test_a_confidence_of_one_belongs_to_the_last_bin():
    e = Evaluation(("a", "b"), ["x", "y"], [0, 1], [[99, 0], [99, 0]])
    r = reliability(e)
    assert r.images.tolist() == [0] * 9 + [2] and ece(e) == pytest.approx(0.5)
    assert ece(Evaluation(("a", "b"), [], [], np.zeros((0, 2)))) == 0


def test_luck_makes_an_error_that_shrinks_with_pictures():
    few, many = (ece_by_luck(drawn(0, n)).mean() for n in (30, 3000))
    assert few > 3 * many > 0
    e = drawn(3, 2000)
    rng = np.random.default_rng(0)
    true = replace(e, labels=np.array([rng.choice(5, p=p) for p in e.probabilities]))
    low, high = np.quantile(ece_by_luck(true), (0.001, 0.999))
    assert low <= ece(true) <= high


@quick
@given(st.integers(0, 2**31), st.floats(0.3, 4))
def test_temperature_agrees_with_a_general_minimiser(seed, factor):
    e = with_temperature(drawn(seed, 120), factor)

    def loss(t):
        return torch.nn.functional.cross_entropy(torch.from_numpy(e.logits).double() / t, torch.from_numpy(e.labels)).item()

    best = minimize_scalar(lambda log_t: loss(np.exp(log_t)), bounds=np.log((COOLEST, HOTTEST)), method="bounded").x
    assert loss(fit_temperature(e)) <= loss(np.exp(best)) + 1e-7


def test_temperature_agrees_with_sklearn():
    calibration = pytest.importorskip("sklearn.calibration")
    if not hasattr(calibration, "_TemperatureScaling"):
        pytest.skip("this sklearn has no temperature scaling")
    e = drawn(5, 400)
    theirs = 1 / calibration._TemperatureScaling().fit(e.logits.astype(np.float64), e.labels).beta_
    assert fit_temperature(e) == pytest.approx(theirs, rel=1e-3)


def test_temperature_of_odd_evaluations():
    e = drawn(0)
    assert fit_temperature(e.take(np.flatnonzero(e.right))) < 1
    sure = Evaluation(("a", "b"), ["x"], [0], [[5, 0]])
    assert fit_temperature(sure) == pytest.approx(COOLEST)
    assert fit_temperature(replace(sure, labels=np.array([1]))) == pytest.approx(HOTTEST)
    assert fit_temperature(replace(e, logits=np.full_like(e.logits, np.nan))) > 0
    with pytest.raises(SFTError, match="no validation images"):
        fit_temperature(e.take([]))


# ---- comparison


@quick
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_mcnemar_agrees_with_scipy(seed, n):
    a, b = drawn(seed, n, sure=1.0), drawn(seed, n, sure=1.0)
    b = replace(b, logits=b.logits + np.random.default_rng(seed).normal(size=b.logits.shape))
    test = mcnemar(a, b)
    m = test.only_a + test.only_b
    assert test.p == pytest.approx(binomtest(test.only_a, m).pvalue if m else 1, abs=1e-9)
    assert test.difference == pytest.approx(a.accuracy - b.accuracy)


def test_mcnemar_wants_the_same_pictures_and_bears_many():
    a = drawn(0)
    with pytest.raises(SFTError, match="same images"):
        mcnemar(a, a.take(np.arange(149)))
    many = drawn(0, 50_000, sure=0)
    assert mcnemar(many, many).p == 1
    assert 0 <= mcnemar(many, replace(many, logits=many.logits[:, ::-1])).p <= 1


def test_needed_pictures_give_the_power_they_promise():
    rng, n = np.random.default_rng(0), needed_pictures(0.06, 0.2)
    won, lost, _ = rng.multinomial(n, [0.13, 0.07, 0.8], 600).T
    power = np.mean([binomtest(int(w), int(w + x)).pvalue < 0.05 for w, x in zip(won, lost, strict=True)])
    assert 0.72 < power < 0.86
    assert needed_pictures(0.01, 0.1) > needed_pictures(0.02, 0.1) > needed_pictures(0.02, 0.05)
    for difference, disagree in ((0, 0.1), (0.2, 0.1), (0.1, 1.1)):
        with pytest.raises(SFTError, match="difference"):
            needed_pictures(difference, disagree)


def test_nearest_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    f, q = rng.normal(size=(80, 16)), rng.normal(size=(7, 16))
    order, cosine = nearest(f, q, 4)
    distance, theirs = NearestNeighbors(n_neighbors=4, metric="cosine").fit(f).kneighbors(q)
    assert (order == theirs).all() and np.allclose(cosine, 1 - distance, atol=1e-5)
    assert nearest(f[:2], q, 5)[0].shape == (7, 2)


# ---- Grad-CAM


def same_maps(backbone, layer, size, reshape=None, seed=0):
    "Correlation of each of our maps with that of the grad-cam package."
    import pytorch_grad_cam as package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8), size=(size, size), mode="bicubic")
    labels = [0, 1, 2, 3]
    with package.GradCAM(backbone.model, [layer], reshape_transform=reshape) as theirs:
        want = theirs(input_tensor=x, targets=[ClassifierOutputTarget(k) for k in labels])
    mine = grad_cam(backbone, x, labels)
    assert mine.shape == want.shape == (4, size, size) and 0 <= mine.min() and mine.max() <= 1 + 1e-6
    return [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(mine, want, strict=True) if a.std() > 0 or b.std() > 0]


@pytest.mark.parametrize("size", [96, 224])
def test_maps_of_lite0_are_those_of_the_package(size):
    backbone = open_backbone("lite0")
    found = same_maps(backbone, backbone.model.bn2, size)
    assert found and min(found) >= 0.99


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_maps_of_a_resnet_are_those_of_the_package(name):
    backbone = open_backbone(name, weights=None)
    found = same_maps(backbone, backbone.model.layer4[-1], 128)
    assert found and min(found) >= 0.99


def test_maps_of_a_transformer_are_those_of_the_package():
    backbone = open_backbone("vit_tiny_patch16_224", weights=None)

    def grid(t):
        return t[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)

    found = same_maps(backbone, backbone.model.blocks[-1].norm1, 224, grid)
    assert found and min(found) >= 0.99


NETWORKS = ["densenet121", "squeezenet1_1", "mobilenet_v3_small", "convnext_atto", "swin_t", "vit_b_32", "deit_tiny_patch16_224",
            "regnetx_002", "mixer_s32_224"]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_has_a_map(name):
    backbone = new_head(open_backbone(name, weights=None), 5)  # some begin with a head of zeros, whose gradient is zero
    maps = grad_cam(backbone, torch.randn(2, 3, 224, 224), [0, 1])
    assert maps.shape == (2, 224, 224) and np.isfinite(maps).all()


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Closed(Wrapped):
    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


def test_grad_cam_leaves_the_network_as_it_was():
    backbone = open_backbone("lite0")
    model = backbone.model.train()
    model.bn1.eval()
    model.conv_stem.weight.requires_grad_(False)
    before = ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()])
    wanted = [p.requires_grad for p in model.parameters()]
    grad_cam(backbone, torch.randn(2, 3, 64, 64), 3)
    assert what_moved(before[0], model.state_dict()) == [] and [m.training for m in model.modules()] == before[1]
    assert [p.requires_grad for p in model.parameters()] == wanted and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_wrapped_network_has_the_same_maps_and_a_closed_one_says_so():
    backbone = open_backbone("lite0")
    x = torch.randn(2, 3, 64, 64)
    want = grad_cam(backbone, x, 0)
    assert np.array_equal(grad_cam(replace(backbone, model=Wrapped(backbone.model)), x, 0), want)
    for p in backbone.model.parameters():
        p.requires_grad_(False)
    assert np.array_equal(grad_cam(backbone, x, 0), want)
    with pytest.raises(SFTError, match="no module"):
        spatial_layer(Closed(backbone.model), x[:1], 0)
    assert not any(m._forward_hooks for m in backbone.model.modules())


# ---- figures


@pytest.mark.parametrize("k", [2, 40])
def test_figures_can_be_drawn_for_any_evaluation(k, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = np.zeros((150, 20, 20, 3), np.uint8)
    e = drawn(0, 150, k)
    for one in (e, e.take(np.flatnonzero(e.right)), e.take([0])):
        rows = mistakes(one)
        cams = np.zeros((len(rows), 16, 16))
        figures = [confusion_figure(one), per_class_figure(one), reliability_figure(one, 2.0), reliability_figure(one),
                   gallery_figure(spotlight(center_crop(pictures[rows], 16), cams), captions(one, rows))]  # fmt: skip
        for f in figures:
            f.savefig(tmp_path / "f.png")
            plt.close(f)


# ---- the report


class Tags(HTMLParser):
    "Open tags, and everything that could reach outside."

    VOID = {"meta", "link", "img", "br", "path", "rect", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.outside, self.mute = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        at = dict(attrs)
        self.outside += [v for k, v in attrs if k in ("src", "href", "srcset") and not v.startswith("data:")]
        self.outside += [k for k in at if k.startswith("on")]
        self.mute += (tag == "img" or tag == "svg") and not (at.get("alt") or at.get("aria-label"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(page):
    "The parsed report, after the checks that every report must pass."
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.outside == [] and tags.mute == 0
    assert not {"script", "iframe", "object", "base", "form"} & set(tags.seen)
    assert "http" not in page and "url(" not in page and "@import" not in page
    page.encode("utf-8")
    return tags


@pytest.fixture(scope="module")
def network():
    return new_head(open_backbone("lite0"), 5)


CARD = {"classes": [], "backbone": "lite0", "weights": "pretrained", "metrics": {"n_train": 10, "head_accuracy": None},
        "preprocessing": {"size": 64, "mean": [0.5] * 3}, "phases": [{"train": "head", "lr": 3e-4}], "seed": 0, "chosen": "tuned",
        "problems": [{"path": "a", "kind": "blank", "message": "a is blank", "other": ""}],
        "versions": {"torch": "2"}, "seconds": 1.5}  # fmt: skip
HISTORY = [{"phase": 1, "train": "head", "epoch": 1, "lr": None, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5},
           {"phase": "2", "train": "6", "epoch": "1", "lr": "", "train_loss": "nan", "val_loss": ".3", "val_accuracy": "0.75"}]  # fmt: skip
PIXELS = np.random.default_rng(0).integers(0, 255, (150, 72, 72, 3), dtype=np.uint8)
HOSTILE = ("<script>alert(1)</script>", "Ünïcode 花 \u202e", '"quoted" & <b>', "x\x00y\nz", "bad\udcff")


def test_the_report_holds_what_it_must(network):
    e = drawn(0)
    started = time.process_time()
    page = report_html(CARD, HISTORY, e, drawn(1), network, PIXELS)
    assert time.process_time() - started < 6
    tags = read(page)
    assert tags.seen.count("img") == 16 and "a is blank" in page
    assert f"{100 * e.accuracy:.1f}" in page and "prefers-color-scheme: dark" in page
    for part in ("Data", "Recipe", "Each class", "Confusion", "Calibration", "Mistakes", "Use it", "Where it comes from"):
        assert f"<h2>{part}</h2>" in page


def odd():
    e = drawn(0)
    absent = e.take(np.flatnonzero(e.labels != 2))
    broken = replace(e, logits=np.where(np.arange(150)[:, None] % 3, e.logits, np.nan))
    right = e.take(np.flatnonzero(e.right))
    yield "one", e.take(mistakes(e, 1)), e.take([0])
    yield "none", e.take([]), e.take([])
    yield "no mistakes", right, right
    yield "nothing right", e.take(np.flatnonzero(~e.right)), None
    yield "a class absent", absent, None
    yield "not a number", broken, broken
    paths = [f'</figure><script>alert({i})</script>" onload="alert(1).jpg' for i in range(150)]
    yield "hostile", replace(e, classes=HOSTILE, paths=paths), drawn(1)


@pytest.mark.parametrize("name, test, held", list(odd()), ids=[o[0] for o in odd()])
@pytest.mark.parametrize("card, history", [({}, []), (CARD, HISTORY)])
@pytest.mark.filterwarnings("error")
def test_no_evaluation_breaks_the_report(network, name, test, held, card, history):
    read(report_html(card, history, test, held, network, PIXELS[: len(test)]))


def test_names_are_text(network):
    problem = {"kind": "<script>", "message": "<img src=x onerror=alert(1)>"}
    card = CARD | {"backbone": "<script>", "chosen": "<i>", "problems": [problem] * 60}
    test = replace(drawn(0), classes=HOSTILE, paths=["<script>"] * 150)
    page = report_html(card, [r | {"train": "<script>"} for r in HISTORY], test, None, network, PIXELS)
    read(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "花" in page and "and 10 more" in page


def test_a_hundred_classes_are_shown_by_their_confusions():
    e = drawn(0, 150, 100)
    page = report_html(CARD, HISTORY, e, None, new_head(open_backbone("lite0"), 100), PIXELS)
    read(page)
    assert "the pairs most often confused" in page and "The other 80 classes" in page and 'class="wide matrix"' not in page


def test_the_report_steps_aside_where_there_is_no_map(network):
    page = report_html(CARD, HISTORY, drawn(0), None, replace(network, model=Closed(network.model)), PIXELS)
    assert read(page).seen.count("img") == 8 and "cannot be shown" in page
    page = report_html(CARD, HISTORY, drawn(0), None, replace(network, model=Wrapped(network.model)), PIXELS)
    assert read(page).seen.count("img") == 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_in_a_browser(network, tmp_path, width, scheme):
    "No scrolling sideways, nothing in the console, nothing fetched."
    browsers = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("there is no chromium here")
    file = tmp_path / "report.html"
    test = replace(drawn(0), classes=("a" * 150, *HOSTILE[1:]), paths=["b" * 200] * 150)
    file.write_text(report_html(CARD, HISTORY, test, drawn(1), network, PIXELS), encoding="utf-8")
    said = []
    with browsers.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda m: said.append(m.text))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width and said == []
        browser.close()
