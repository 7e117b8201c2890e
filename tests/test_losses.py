"Losses agree with torch and torchmetrics to 1e-6 on random, extreme and ragged input."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.text import perplexity
from torchvision.ops import sigmoid_focal_loss

from sft_course.losses import (
    class_weights,
    cross_entropy,
    cross_entropy_gradient,
    log_softmax,
    soft_labels,
    softmax,
    squared_error,
)
from sft_course.tools.loss_lab import focal_loss, interpolate, mix
from sft_course.tools.settings import SFTError

quick = settings(max_examples=60, deadline=None)


def close(a, b):
    "Equal to 1e-6, relative where the numbers are large."
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@st.composite
def cases(draw, largest=1000., rows=40, classes=12):
    "Logits (n, K) in 64 bits, ordinary or up to ±largest, some of them tied, and labels (n,)."
    n, k = draw(st.integers(1, rows)), draw(st.integers(2, classes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.normal(size=(n, k)) * draw(st.sampled_from([0., 1e-3, 1., 30., largest]))
    if draw(st.booleans()):
        z = np.where(rng.random((n, k)) < .4, rng.choice([-largest, 0, largest], (n, k)), z)
    return torch.from_numpy(z.clip(-largest, largest)), torch.from_numpy(rng.integers(0, k, n))


@quick
@given(cases())
def test_softmax_and_its_logarithm(case):
    z, _ = case
    close(log_softmax(z), F.log_softmax(z, 1))
    close(softmax(z), F.softmax(z, 1))
    assert log_softmax(z).isfinite().all()
    close(softmax(z).sum(1), torch.ones(len(z)))


@quick
@given(cases())
def test_log_softmax_in_32_bits(case):
    z = case[0].float()
    torch.testing.assert_close(log_softmax(z), F.log_softmax(z, 1), rtol=1e-6, atol=1e-6)


@quick
@given(cases(), st.floats(0, 1), st.booleans())
def test_cross_entropy(case, smoothing, weighted):
    z, y = case
    weight = torch.linspace(.1, 2, z.shape[1], dtype=torch.float64) if weighted else None
    close(cross_entropy(z, y, weight, smoothing), F.cross_entropy(z, y, weight, label_smoothing=smoothing))


@quick
@given(cases(), st.floats(0, 1))
def test_cross_entropy_of_shares(case, smoothing):
    z, y = case
    close(cross_entropy(z, y, label_smoothing=smoothing), F.cross_entropy(z, soft_labels(y, z.shape[1], smoothing)))


@quick
@given(cases(largest=20.))
def test_cross_entropy_is_the_logarithm_of_torchmetrics_perplexity(case):
    z, y = case
    close(cross_entropy(z, y), perplexity(z[None], y[None]).double().log())


@quick
@given(cases(), st.integers(1, 9))
def test_a_mean_over_ragged_batches_weighted_by_size_is_the_mean(case, size):
    z, y = case
    for loss in (cross_entropy, focal_loss):
        parts = [(loss(a, b), len(b)) for a, b in zip(z.split(size), y.split(size))]
        close(sum(v * n for v, n in parts) / len(y), loss(z, y))


@quick
@given(cases(), st.floats(0, 1))
def test_gradient_is_autograds(case, smoothing):
    z, y = case
    q = soft_labels(y, z.shape[1], smoothing)
    x = z.clone().requires_grad_()
    for labels, target in ((y, y), (q, q)):
        want, = torch.autograd.grad(F.cross_entropy(x, target, reduction="sum"), x)
        close(cross_entropy_gradient(z, labels), want)
        assert cross_entropy_gradient(z, labels).abs().max() <= 1 + 1e-12


@quick
@given(cases())
def test_our_losses_can_be_differentiated(case):
    z, y = case
    x = z.clone().requires_grad_()
    ours, = torch.autograd.grad(cross_entropy(x, y), x)
    close(ours, cross_entropy_gradient(z, y) / len(y))


@quick
@given(cases())
def test_gradient_is_the_finite_difference(case):
    z, y = case
    step = torch.zeros_like(z)
    step[:, 0] = 1e-4
    differences = (F.cross_entropy(z + step, y, reduction="none") - F.cross_entropy(z - step, y, reduction="none")) / 2e-4
    torch.testing.assert_close(cross_entropy_gradient(z, y)[:, 0], differences, rtol=0, atol=1e-6)


@quick
@given(cases(), st.sampled_from([1., 2., 5.]))
def test_focal_loss_of_two_classes_is_torchvisions(case, gamma):
    z, y = case[0][:, 0], case[1] % 2
    close(focal_loss(torch.stack([torch.zeros_like(z), z], 1), y, gamma), sigmoid_focal_loss(z, y.double(), -1, gamma, "mean"))


@quick
@given(cases())
def test_focal_loss_without_focus_is_cross_entropy(case):
    close(focal_loss(*case, gamma=0.), F.cross_entropy(*case))
    assert focal_loss(*case).isfinite() and focal_loss(*case) <= F.cross_entropy(*case) + 1e-9


@quick
@given(cases())
def test_squared_error(case):
    z = case[0]
    other = z.flip(0)
    close(squared_error(z, other), F.mse_loss(z, other))
    torch.testing.assert_close(squared_error(z, other), mean_squared_error(z.flatten(), other.flatten()).double(), rtol=1e-6, atol=1e-6)


@quick
@given(cases())
def test_class_weights_give_every_class_the_same_say(case):
    z, y = case
    k = z.shape[1]
    y = torch.cat([y, torch.arange(k)])
    w = class_weights(y, k).double()
    each = torch.linspace(0, 1, len(y), dtype=torch.float64)
    close((w[y] * each).sum() / w[y].sum(), torch.stack([each[y == c].mean() for c in range(k)]).mean())
    close(w[y].mean(), 1.)


@quick
@given(st.floats(-2, 3))
def test_points_on_a_line(t):
    a, b = ({"w": torch.randn(3, 2, dtype=torch.float64), "n": torch.tensor(i)} for i in (4, 7))
    close(interpolate(a, b, t)["w"], a["w"] + t * (b["w"] - a["w"]))
    assert interpolate(a, b, t)["n"] == 4
    close(mix((a, b, a), (1 - t, t / 2, t / 2))["w"], a["w"] + t / 2 * (b["w"] - a["w"]))


def test_the_ends_of_a_line_are_exact_copies():
    a, b = ({"w": torch.randn(50), "n": torch.tensor(1)} for _ in range(2))
    for end, t in ((a, 0.), (b, 1.)):
        point = interpolate(a, b, t)
        assert torch.equal(point["w"], end["w"])
        point["w"].zero_()
        point["n"].zero_()
        assert end["w"].any() and a["n"] == 1


def test_what_naive_versions_cannot_do():
    z = torch.tensor([[1000., 0., -1000.]])
    assert cross_entropy(z, torch.tensor([2])) == 2000 and cross_entropy(z, torch.tensor([0])) == 0
    assert focal_loss(z, torch.tensor([2])) == 2000


@pytest.mark.parametrize("call, says", [
    (lambda: cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1])), "one label for each row"),
    (lambda: cross_entropy(torch.zeros(3), torch.tensor([0, 1, 2])), "one label for each row"),
    (lambda: cross_entropy(torch.zeros(2, 4), torch.tensor([0, 4])), "with 4 classes use 0 to 3"),
    (lambda: focal_loss(torch.zeros(1, 4), torch.tensor([-1])), "with 4 classes use 0 to 3"),
    (lambda: cross_entropy_gradient(torch.zeros(1, 4), torch.tensor([7])), "with 4 classes use 0 to 3"),
    (lambda: soft_labels(torch.tensor([0]), 2, 1.5), "from 0 to 1"),
    (lambda: squared_error(torch.zeros(3, 1), torch.zeros(3)), "give the same shape"),
    (lambda: class_weights(torch.tensor([0, 0]), 2), "class 1 has no label"),
    (lambda: mix(({}, {}), (.5, .6)), "summing to one"),
])
def test_faulty_input_is_a_sentence(call, says):
    with pytest.raises(SFTError, match=says):
        call()


def test_no_picture_has_no_mean():
    assert math.isnan(cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    assert math.isnan(F.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


def test_widget_follows_its_sliders_and_its_label():
    from sft_course.tools.widgets import Drawing, draw_logits, logits_widget
    *sliders, label, view = logits_widget(live=True).children
    before = view.value
    sliders[0].value = -5
    assert view.value != before and draw_logits([-5., 2., -1.], 0).svg in view.value
    label.value = 2
    assert "The label is class 3" in view.value
    assert isinstance(logits_widget(live=False), Drawing)


@quick
@given(cases(), st.integers(0, 11))
def test_any_logits_can_be_drawn(case, label):
    import xml.etree.ElementTree as ET

    from sft_course.tools.widgets import draw_logits
    z = case[0][0].tolist()
    label %= len(z)
    drawn = draw_logits(z, label, [f"a<{k}>" for k in range(len(z))])
    assert ET.fromstring(drawn.svg)[0].text == drawn.text
    assert f"loss is {F.cross_entropy(torch.tensor([z], dtype=torch.float64), torch.tensor([label])).item():.2f} nats" in drawn.text.replace("-0.00", "0.00")
