"Several labels an image and numbers: the losses, heads, scores and intervals against the libraries, and tables with faults."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.linear_model import Ridge as TheirRidge
from sklearn.metrics import average_precision_score, f1_score

from sft_course.data import plain_view, random_view
from sft_course.targets import (
    average_precision,
    choose_thresholds,
    f1,
    fit_label_head,
    fit_ridge,
    interval,
    label_quality,
    move_lengths,
    number_loss,
    number_quality,
    several_label_loss,
)
from sft_course.tools.flower_targets import COLOURS, LABELS, colour_of
from sft_course.tools.photo_targets import covered, fingers, photo_targets
from sft_course.tools.settings import SFTError
from sft_course.tools.steps import add_summed_gradients
from sft_course.tools.target_tables import read_targets, task_of


def drawn(seed=0, n=60, d=200, k=4):
    "Features (n, d), labels (n, k), numbers (n, 2)."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    share = torch.tensor([.5, .3, .1, .7])[:k]
    return x, (torch.rand(n, k, generator=g) < share).float(), torch.randn(n, 2, generator=g)


# ---- losses

def test_the_losses_are_torchs_and_have_its_gradients():
    z = torch.tensor([[-90., -3., 0.], [2., 40., 1e4]], requires_grad=True)
    t = torch.tensor([[1., 0., .3], [0., 1., 1.]])
    value, count = several_label_loss(z, t)
    theirs = F.binary_cross_entropy_with_logits(z, t, reduction="sum")
    assert count == 6 and torch.allclose(value, theirs)
    ours, = torch.autograd.grad(value, z)
    assert torch.allclose(ours, z.sigmoid() - t, atol=1e-6)
    for delta in (None, .3, 2.):
        value, count = number_loss(z, t, delta)
        theirs = F.mse_loss(z, t, reduction="sum") / 2 if delta is None else F.huber_loss(z, t, reduction="sum", delta=delta)
        assert count == 6 and torch.allclose(value, theirs)


def test_half_precision_outputs_are_summed_in_single():
    z, t = torch.full((4000, 1), .1, dtype=torch.bfloat16), torch.zeros(4000, 1)
    assert several_label_loss(z, t)[0].dtype == number_loss(z, t)[0].dtype == torch.float32


@pytest.mark.parametrize("loss", [several_label_loss, number_loss])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(loss):
    x, t, _ = drawn(d=5)
    grads = []
    for micro in (None, 7):
        torch.manual_seed(0)
        net = torch.nn.Linear(5, 4)
        add_summed_gradients(net, lambda rows: x[rows], t, np.arange(60), loss, micro)
        grads.append(net.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("what", [several_label_loss, number_loss, f1, average_precision, choose_thresholds, label_quality])
def test_unequal_shapes_are_refused(what):
    with pytest.raises(SFTError, match=r"\(5, 1\), targets \(5,\): give one shape"):
        what(torch.zeros(5, 1), torch.zeros(5))


# ---- heads

@pytest.mark.parametrize("n, d", [(60, 200), (60, 10)])
def test_label_head_is_scikit_learns_logistic_regression(n, d):
    x, t, _ = drawn(n=n, d=d)
    W, b = fit_label_head(x, t, .1, max_iter=1000)
    for k in range(4):
        theirs = LogisticRegression(C=1 / (.1 * n), max_iter=5000, tol=1e-9).fit(x.numpy(), t[:, k].numpy())
        assert np.allclose(theirs.coef_[0], W[k], atol=1e-3) and np.allclose(theirs.intercept_, b[k], atol=1e-3)


@pytest.mark.parametrize("n, d", [(60, 200), (60, 10)])
def test_ridge_is_scikit_learns(n, d):
    x, _, y = drawn(n=n, d=d)
    head = fit_ridge(x, y, (.1,))
    theirs = TheirRidge(alpha=.1 * n).fit(x.double().numpy(), y.double().numpy())
    assert np.allclose(theirs.coef_, head.W, atol=1e-5) and np.allclose(theirs.intercept_, head.b, atol=1e-5)
    assert np.allclose(theirs.predict(x.numpy()), head(x), atol=1e-4)


def test_errors_of_images_left_out_are_those_of_heads_fitted_without_them():
    x, _, y = drawn(n=20)
    head = fit_ridge(x, y, (.1,))
    for i in range(20):
        rest = np.delete(np.arange(20), i)
        alpha = .1 * 20  # the same amount of decay, though one image is missing
        theirs = TheirRidge(alpha=alpha).fit(x[rest].double().numpy(), y[rest].double().numpy())
        assert np.allclose(y[i] - theirs.predict(x[[i]].numpy())[0], head.left_out[i], atol=1e-4)


def test_the_decay_is_that_of_ridge_cv():
    decays = (1e-3, .1, 1., 10.)
    for seed in range(5):
        x, _, y = drawn(seed, n=40)
        y = y[:, :1] + x[:, :3].sum(1, keepdim=True)
        theirs = RidgeCV(alphas=[40 * d for d in decays]).fit(x.double().numpy(), y.double().numpy())
        assert theirs.alpha_ == pytest.approx(40 * fit_ridge(x, y, decays).weight_decay)


def test_ridge_refuses_targets_that_are_no_finite_rows():
    x, _, y = drawn(n=20)
    for wrong in (y[:, 0], y[:5], y / 0):
        with pytest.raises(SFTError, match="give finite rows"):
            fit_ridge(x, wrong)


def test_columns_that_never_vary_do_no_harm():
    x, t, y = drawn(n=30, d=8)
    x = torch.cat([x, torch.ones(30, 3)], 1)
    head = fit_ridge(x, y)
    assert head.W.isfinite().all() and head.W[:, 8:].abs().max() < 1e-4
    assert fit_label_head(x, t, .1)[0].isfinite().all()


# ---- scores

def test_f1_is_scikit_learns():
    for seed in range(5):
        _, t, _ = drawn(seed)
        said = drawn(seed + 100)[1]
        said[:, 2] = 0
        for average in ("macro", "micro", None):
            assert np.allclose(f1(said, t, average), f1_score(t, said, average=average, zero_division=0))


def test_average_precision_is_that_of_the_libraries_ties_too():
    from torchmetrics.functional.classification import multilabel_average_precision
    for seed in range(5):
        _, t, _ = drawn(seed)
        g = torch.Generator().manual_seed(seed)
        for p in (torch.rand(60, 4, generator=g), torch.rand(60, 4, generator=g).round(decimals=1)):
            ours = average_precision(p, t)
            assert np.allclose(ours, [average_precision_score(t[:, k], p[:, k]) for k in range(4)])
            theirs = multilabel_average_precision(p, t.int(), 4, average=None)
            assert torch.allclose(ours.float(), theirs, atol=1e-5)
    assert average_precision(p[:, :1], torch.zeros(60, 1)).isnan()


@pytest.mark.slow
def test_no_threshold_is_better_than_the_chosen_one():
    for seed in range(5):
        _, t, _ = drawn(seed)
        g = torch.Generator().manual_seed(seed)
        for p in (torch.rand(60, 4, generator=g), torch.rand(60, 4, generator=g).round(decimals=1)):
            ours = f1((p > choose_thresholds(p, t)).float(), t, None)
            tried = [[f1_score(t[:, k], p[:, k] > c) for c in (-1., *p[:, k].tolist())] for k in range(4)]
            assert np.allclose(ours, np.max(tried, 1))


def test_a_label_that_none_or_all_have_keeps_one_half():
    p = torch.rand(10, 2)
    t = torch.stack([torch.zeros(10), torch.ones(10)], 1)
    assert choose_thresholds(p, t).tolist() == [.5, .5]


def test_qualities_lie_between_0_and_1_and_are_one_where_all_is_right():
    x, t, y = drawn()
    q = label_quality(x[:, :4], t)
    assert q.shape == (60,) and 0 <= q.min() and q.max() <= 1
    rows = [f1_score(t[i], (x[i, :4] > 0).float(), zero_division=1.) for i in range(60)]
    assert np.allclose(q, rows)
    assert (label_quality(20 * t - 10, t) == 1).all() and (number_quality(y, y, 1.) == 1).all()
    q = number_quality(y + 3, y, 2.)
    assert q.shape == (60,) and (q == 0).all()


# ---- intervals and views

def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(0)
    for level in (.5, .8, .9):
        inside = []
        for _ in range(2000):
            e = torch.from_numpy(rng.standard_cauchy(40))  # of no distribution that one would assume
            inside.append((e[30:].abs() <= interval(e[:30], level)).double().mean())
        low, high = level, level + 1 / 31
        assert low - .01 < np.mean(inside) < high + .01


def test_an_interval_takes_the_rank_of_the_next_image():
    e = torch.arange(1., 20.)
    assert interval(e, .9) == 18 and interval(-e, .95) == 19 and interval(e[:9], .9) == 9
    with pytest.raises(SFTError, match="8 errors are too few for a level of 0.9; give 9 or more"):
        interval(e[:8], .9)
    for level in (0, 1, 90):
        with pytest.raises(SFTError, match="use a share between 0 and 1"):
            interval(e, level)


def test_lengths_follow_the_view():
    d, view = torch.full((50, 2), .5), random_view(50, 0)
    side = torch.from_numpy(view[:, 1, 1].copy())
    assert torch.allclose(move_lengths(d, view), d / side[:, None])
    assert torch.allclose(move_lengths(d, plain_view(50, .5, flip=True)), 2 * d)


# ---- tables

@pytest.fixture
def table(tmp_path):
    for k in range(30):
        Image.new("RGB", (4, 4), (8 * k, 0, 0)).save(tmp_path / f"{k}.png")

    def read(*lines, **how):
        (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
        return read_targets(tmp_path / "t.csv", **how)
    return read


NUMBERS = [f"{k}.png,{k / 10}" for k in range(29)]


def test_three_forms(table):
    flags = table("path,red,round", "0.png,1,0", "1.png,0,1", "2.png,yes,true", "3.png,no,false")
    cells = table("path,labels", "0.png,red", "1.png,round", '2.png," round | red"', "3.png,")
    assert flags.kind == cells.kind == "labels" and flags.names == cells.names == ("red", "round")
    assert np.array_equal(flags.targets, cells.targets)
    number = table("path,width", *NUMBERS)
    assert number.kind == "number" and number.targets.shape == (29, 1) and number.targets.dtype == np.float32
    assert table("path,digit", *(f"{k}.png,{k % 10}" for k in range(30))).kind == "class"
    several = table("path,w,h", *(f"{k}.png,{k},{2 * k}" for k in range(30)))
    assert several.kind == "number" and several.targets.shape == (30, 2)


def test_columns_and_splits(table):
    lines = ["path,width,split,round", "0.png,3,train,1", "1.png,4,val,0", "2.png,5,test,1"]
    read = table(*lines, columns=["round"], task="labels")
    assert read.names == ("round",) and read.part.tolist() == ["train", "val", "test"]
    read = table(*lines, columns=["Width"], task="number")
    assert read.targets.ravel().tolist() == [3, 4, 5]
    with pytest.raises(SFTError, match="there is no column 'depth'; it has path, width, split, round"):
        table(*lines, columns=["depth"])


def test_dividing_leaves_the_test_part_alone(table):
    read = table("path,width,split", *(f"{k}.png,{k},{'test' if k % 3 == 0 else 'train'}" for k in range(30)))
    a, b = read.divide(.25, 0), read.divide(.25, 1)
    assert np.array_equal(a.rows("test"), read.rows("test")) and len(a.rows("val")) == len(b.rows("val")) == 5
    assert not np.array_equal(a.part, b.part) and np.array_equal(a.part, read.divide(.25, 0).part)


@pytest.mark.parametrize("lines, says", [
    (["path,width", *NUMBERS, "29.png,wide"], "line 31: width: 'wide' is not a number"),
    (["path,width", *NUMBERS, "29.png,"], "line 31: width: the cell is empty"),
    (["path,width", *NUMBERS, "29.png,nan"], "line 31: width: 'nan' is no finite number"),
    (["path,width", *NUMBERS, "29.png,-inf"], "line 31: width: '-inf' is no finite number"),
    (["path,width", *NUMBERS, "29.png,1e39"], "line 31: width: '1e39' is no finite number"),
    (["path,a,b,c", "0.png,1,0,1", "1.png,0,2,1"], "line 3: b: '2' is neither 0 nor 1"),
    (["path,a,b,c", "0.png,1,0,1", "1.png,0,,1"], "line 3: b: the cell is empty"),
    (["path,a,b", "0.png,1,0", "1.png,0,0"], "no image has the label 'b'"),
    (["path,labels", "0.png,a|b", "1.png,a"], "every image has the label 'a'"),
    (["path,label", "0.png,a", "1.png,a"], "all images have one and the same label"),
    (["path,a,b", "0.png,1,0", "0.png,0,1"], "line 3: 0.png stands there a second time"),
    (["path,a,b", "0.png,1,0", "no.png,0,1"], "line 3: no.png"),
    (["path,a,b", "0.png,1,0", "../1.png,0,1"], "leads out of the folder"),
    (["path"], "no column beside path"),
    (["path,a,b"], "no line below the first"),
    (["file,a,b", "0.png,1,0"], "it must name each column once, one of them path"),
    (["path,a,A", "0.png,1,0"], "it must name each column once"),
    (["path,a,b", "0.png,1,0,1"], "has 4 cells where the first line has 3"),
])
def test_a_fault_is_one_sentence_with_its_place(table, lines, says):
    with pytest.raises(SFTError) as e:
        table(*lines)
    assert says in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_constant_number_and_a_wrong_task_are_refused(table, tmp_path):
    with pytest.raises(SFTError, match="all images have the same width"):
        table("path,width", "0.png,3", "1.png,3", task="number")
    with pytest.raises(SFTError, match="use 'labels', 'number' or 'class'"):
        table("path,width", "0.png,3", "1.png,4", task="regression")
    with pytest.raises(SFTError, match="there is no such file"):
        read_targets(tmp_path / "none.csv")


def test_more_than_twenty_numbers_are_a_quantity():
    assert task_of([[str(k) for k in range(20)] * 3]) == "class"
    assert task_of([[str(k) for k in range(21)]]) == "number"
    assert task_of([["a", "b"] * 40]) == "class"


# ---- flowers and hands

def test_colours_and_labels_of_flowers():
    assert len(LABELS) == 13 and {colour_of(s) for s in range(60)} == set(COLOURS)
    assert colour_of(7) == colour_of(7)


def test_fingers_and_covered_squares():
    assert fingers(3).tolist() == [1, 1, 1, 0, 0] and fingers(0).sum() == 0
    assert covered(np.zeros((0, 4)), 10, 20) == 0
    assert covered(np.array([[0, 0, 10, 20]]), 10, 20) == 1
    assert covered(np.array([[0, 5, 10, 5]]), 10, 20) == pytest.approx(.5)


def test_missing_photographs_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SFT_PHOTOS", raising=False)
    with pytest.raises(SFTError, match="set SFT_PHOTOS"):
        photo_targets("fingers")
    monkeypatch.setenv("SFT_PHOTOS", str(tmp_path))
    with pytest.raises(SFTError, match="with raccoon in it"):
        photo_targets("share")
