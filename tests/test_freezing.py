import copy
import errno
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sft_course.backbones import new_head
from sft_course.core import what_moved
from sft_course.data import plain_view
from sft_course.loop import copy_state
from sft_course.tools import activations as cache_module
from sft_course.tools import heads
from sft_course.tools.activations import activations, lower_code, weights_key
from sft_course.tools.heads import choose_head, fit_head
from sft_course.tools.intake import scan
from sft_course.tools.opening import open_backbone
from sft_course.tools.pixels import decode_once
from sft_course.tools.settings import SFTError
from sft_course.tools.steps import train_epoch
from sft_course.tools.surgery import fold_batch_norms, split_at
from sft_course.tools.taps import EveryStage, stage_features

NATIVE = ("vit_tiny_patch16_224",)  # takes no other size
FAMILIES = ["lite0", "resnet18", "efficientnet_b0", "mobilenet_v3_small", "convnext_atto", "vit_tiny_patch16_224", "swin_t", "densenet121",
            "regnet_y_400mf"]
NORM = nn.modules.batchnorm._BatchNorm


def norms(net):
    return [m for m in net.modules() if isinstance(m, NORM)]


def lively(net, seed=0):
    "Batch norms that are not the identity, as after training."
    g = torch.Generator().manual_seed(seed)
    for m in norms(net):
        with torch.no_grad():
            for t, low, high in ((m.running_mean, -.1, .1), (m.running_var, .5, 2), (m.weight, .8, 1.2), (m.bias, -.1, .1)):
                t.uniform_(low, high, generator=g)
    return net


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    "A network with random weights, its lower part below the head, images, and their features and logits."
    b = new_head(open_backbone(request.param, None), 5)
    lively(b.model)
    lower, _ = split_at(b, len(b.stages) - 1)
    size = b.size if request.param in NATIVE else 64
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = lower.eval()(x)
        return b, lower, x, features, b.model.eval()(x)


def test_training_a_head_moves_the_head_and_nothing_else(family):
    b, _, _, features, _ = family
    _, upper = split_at(b, len(b.stages) - 1)
    before, y = copy_state(b.model), torch.tensor([0, 1, 2])
    sgd = torch.optim.SGD(upper.parameters(), lr=.1, momentum=.9, weight_decay=.1)
    train_epoch(upper.train(), features.__getitem__, y, [np.arange(3)] * 2, sgd, lambda step: 1., 0)
    head = b.stages[-1].modules[-1]
    assert what_moved(before, b.model.state_dict()) == [f"{head}.weight", f"{head}.bias"]
    b.model.load_state_dict(before)
    b.model.eval()


def test_frozen_features_do_not_depend_on_batch_mates(family):
    _, lower, x, features, _ = family
    with torch.no_grad():
        assert close(lower.eval()(x[:1]), features[:1])


def test_folded_equals_unfolded(family):
    _, lower, x, features, _ = family
    was, lower = copy_state(lower), lower.train()
    folded = fold_batch_norms(lower, x[:2])
    assert all(m.training for m in lower.modules()) and what_moved(was, lower.state_dict()) == []
    assert not any(m.training for m in folded.modules()) and not any(m._forward_hooks for m in folded.modules())
    with torch.no_grad():
        assert close(folded(x), features, 1e-3)
    before, after = len(norms(lower)), len(norms(folded))
    assert after == {121: 62}.get(before, 0)  # a norm before a convolution, as in DenseNet, has nothing to go into
    lower.eval()


def test_first_columns_are_what_the_head_sees(family):
    b, _, x, features, logits = family
    b.model.train()
    stages = stage_features(b)
    assert b.model.training and all(m.training for m in b.model.modules())
    with torch.no_grad():
        made = stages.eval()(x)
        assert made.dtype == torch.float32 and made.shape == (3, stages.columns) and made.isfinite().all()
        assert close(b.head(made[:, :stages.last]), logits) and stages.columns > 3 * stages.last
        assert close(stages(x[:1]), made[:1])
    b.model.eval()


def test_every_stage_comes_back_from_a_file(tmp_path):
    net = EveryStage(lively_backbone("resnet18"), 4).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = EveryStage(open_backbone("resnet18", None, seed=9), 4).eval()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(x), again(x)) and net(x).shape == (2, 4)
        assert torch.equal(net(x), net.features(x) @ net.linear.weight.T + net.linear.bias)
    assert not any(k.startswith("features.model.fc") for k in net.state_dict())


def lively_backbone(name):
    b = open_backbone(name, None)
    lively(b.model)
    return b


def test_every_stage_can_train_on_pictures_of_one_colour():
    "The standard deviation of what does not vary is zero, and its gradient must not be infinite."
    net = EveryStage(open_backbone("resnet18", None), 3).train()
    F.cross_entropy(net(torch.zeros(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_what_comes_after_a_convolutional_head_is_no_stage():
    b = open_backbone("squeezenet1_1", None)
    stages = stage_features(b).eval()
    assert stages(torch.zeros(1, 3, 64, 64)).shape == (1, stages.columns) and stages.last == 512


class Odd(nn.Module):
    "Every way in which a convolution before a batch norm must be left alone, and one in which it need not."
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.norm2, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.read, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared = nn.BatchNorm2d(4)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.e, self.forgetful = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.normed, self.norm5 = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        self.flat, self.norm6 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.norm2(self.twice(x)) + self.norm3(self.twice(x.relu()))
        y = self.read(x)
        x = self.norm4(y) + y.abs()
        x = self.shared(self.c(x)) + self.shared(self.d(x))
        x = self.norm5(self.normed(self.forgetful(self.e(x))))
        return self.norm6(self.flat(x.mean((2, 3))))


def test_only_what_may_be_folded_is():
    net, x = lively_odd(), torch.randn(4, 3, 8, 8)
    folded = fold_batch_norms(net, x)
    left = {n for n, m in folded.named_modules() if isinstance(m, NORM)}
    assert left == {"norm2", "norm3", "norm4", "shared", "forgetful", "norm5"}
    with torch.no_grad():
        assert close(folded(x), net.eval()(x), 1e-3)


def lively_odd():
    net = Odd().eval()
    memory = [m for m in norms(net) if m.running_mean is not None]
    for m in memory:
        nn.init.uniform_(m.running_mean), nn.init.uniform_(m.running_var, .5, 2)
    return net


def test_weights_made_on_the_fly_are_not_folded():
    from timm.layers import BatchNormAct2d, StdConv2d
    net, x = nn.Sequential(StdConv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), BatchNormAct2d(4)).eval(), torch.randn(2, 3, 9, 9)
    lively(net)
    folded = fold_batch_norms(net, x)
    assert len(norms(folded)) == 1 and close(folded(x), net(x), 1e-3)


def test_a_network_that_answers_otherwise_than_with_a_tensor_is_left_alone():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x): return self.body(x), x
    assert len(norms(fold_batch_norms(Pair(), torch.randn(2, 3, 4, 4)))) == 1


@pytest.fixture
def kept(stripes, tmp_path):
    "`store(net, rows, **more)` and a small network that serves as the frozen part."
    pixels, b = decode_once(scan(stripes, 0), 40, tmp_path / "pixels"), open_backbone("resnet18", None)
    theta, net = plain_view(len(pixels.catalog), .8), nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
    lively(net)

    def store(net=net, rows=range(20), cache=tmp_path / "cache", size=32):
        return activations(net, b, pixels, theta, size, cache, np.array(rows, dtype=np.int64))
    return store, net, pixels, tmp_path / "cache"


def files(cache):
    return sorted(p.name for p in (cache / "activations").iterdir())


def test_activations_are_kept_and_found(kept, monkeypatch):
    store, net, pixels, cache = kept
    net.train()
    first = store()
    assert first.shape == (20, 4, 15, 15) and first.dtype == np.float16 and net.training and net[1].num_batches_tracked == 0
    monkeypatch.setattr(cache_module, "_compute", lambda *a: pytest.fail("computed twice"))
    assert np.array_equal(store(), first) and len(files(cache)) == 1


def test_other_weights_rows_sizes_and_layers_have_other_files(kept):
    store, net, _, cache = kept
    store(), store(rows=np.arange(5)), store(size=30), store(net[:2])
    assert store(rows=np.arange(0)).shape == (0, 4, 15, 15)
    with torch.no_grad():
        net[0].bias += 1
    store()
    assert len(files(cache)) == 6


DAMAGE = {"truncated": lambda b: b[:-7], "empty": lambda b: b"", "head only": lambda b: b[:128],
          "garbage": lambda b: b"x" * len(b), "longer": lambda b: b + b"\0\0",
          "other rows": lambda b: b.replace(b"(20,", b"(21,"), "other kind": lambda b: b.replace(b"<f2", b"<i2"),
          "by column": lambda b: b.replace(b"False", b"True ")}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_computed_anew(kept, how):
    store, _, _, cache = kept
    good = np.array(store())
    path, = (cache / "activations").iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[how](whole))
    assert path.read_bytes() != whole
    assert np.array_equal(store(), good) and path.read_bytes() == whole and len(files(cache)) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(kept, monkeypatch):
    store, _, _, cache = kept

    def full(*a):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SFTError, match="cannot be kept there .No space left on device.; make room, or set another `cache`"):
        store()
    assert files(cache) == []


def test_a_cache_that_is_no_folder_is_one_sentence(kept, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SFTError, match="file/activations: .*settings.ini"):
        kept[0](cache=tmp_path / "file")


def test_an_interrupted_run_leaves_nothing(kept, monkeypatch):
    store, _, _, cache = kept
    calls = []

    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return to_input(*a, **k)
    to_input = cache_module.to_input
    monkeypatch.setattr(cache_module, "to_input", stop)
    monkeypatch.setattr(cache_module, "pictures_at_once", lambda *_: 2)
    with pytest.raises(KeyboardInterrupt):
        store()
    assert files(cache) == []


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x):
        return x.mean((2, 3)) * self.factor


def test_values_beyond_16_bits_are_kept_in_32(kept):
    store, _, _, cache = kept
    large, small = store(Scaled(1e7)), store(Scaled(1.))
    assert large.dtype == np.float32 and np.isfinite(large).all() and np.abs(large).max() > 65504 and small.dtype == np.float16
    assert np.allclose(large / 1e7, small, atol=1e-3) and store(Scaled(1e7)).dtype == np.float32 and len(files(cache)) == 2


def test_values_that_are_not_finite_name_the_picture(kept):
    store, _, pixels, cache = kept
    with pytest.raises(SFTError, match=f"{pixels.catalog.files[3]}: resnet18 makes values of this image that are not finite"):
        store(Scaled(float("nan")), rows=np.arange(3, 9))
    assert files(cache) == []


def test_features_of_every_stage_have_their_own_key_and_a_new_head_keeps_it():
    b = open_backbone("resnet18", None)
    stages, (lower, _) = stage_features(b), split_at(b, len(b.stages) - 1)
    assert lower_code(stages) != lower_code(lower) != lower_code(split_at(b, 2)[0])
    before = weights_key(stages), lower_code(stages)
    new_head(b, 7)
    assert (weights_key(stage_features(b)), lower_code(stage_features(b))) == before
    with torch.no_grad():
        b.model.conv1.weight += 1
    assert weights_key(stages) != before[0]  # the weights are shared


def blobs(n=240, d=12, classes=3, seed=0, signal=slice(0, 3)):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, d, generator=g)
    x[:, signal] += 1.5 * F.one_hot(y, classes)
    return x, y


def probabilities(head, x):
    return (x @ head[0].T + head[1]).softmax(1).numpy()


@pytest.mark.parametrize("standardise", [False, True])
def test_fit_head_finds_the_minimum_that_scikit_learn_finds(standardise):
    x, y = blobs()
    x = x * torch.logspace(-1, 1, 12) + 3
    logistic = LogisticRegression(C=1 / (.01 * len(y)), tol=1e-9, max_iter=5000)
    theirs = (make_pipeline(StandardScaler(), logistic) if standardise else logistic).fit(x.numpy(), y.numpy())
    head = fit_head(x, y, 3, .01, standardise=standardise, max_iter=1000)
    assert np.allclose(probabilities(head, x), theirs.predict_proba(x.numpy()), atol=5e-3)


@pytest.mark.parametrize("standardise", [False, True])
def test_pieces_and_16_bit_files_give_the_same_head(tmp_path, standardise):
    x, y = blobs()
    np.save(tmp_path / "x.npy", x.numpy().astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = fit_head(x.half(), y, 3, .01, standardise=standardise)
    for features, chunk in ((mapped, 1 << 24), (mapped, 100), (x.half(), 100), (x.half().float(), 7)):
        assert torch.allclose(fit_head(features, y, 3, .01, standardise=standardise, chunk=chunk)[0], whole[0], atol=2e-3)


def test_a_start_shortens_the_way_and_does_not_change_the_end():
    x, y = blobs()
    end = fit_head(x, y, 3, .01, max_iter=1000)
    again = fit_head(x, y, 3, .01, start=end, max_iter=1, standardise=False)
    assert torch.allclose(again[0], end[0], atol=1e-3) and not torch.allclose(fit_head(x, y, 3, .01, max_iter=1)[0], end[0], atol=1e-2)
    scaled = fit_head(x * 9, y, 3, .01, max_iter=1000, standardise=True)
    assert torch.allclose(fit_head(x * 9, y, 3, .01, start=scaled, max_iter=1, standardise=True)[0], scaled[0], atol=1e-3)


def test_a_column_that_does_not_vary_counts_for_nothing():
    x, y = blobs()
    more = torch.cat([x, torch.full((len(x), 2), 7.)], 1)
    head = fit_head(more, y, 3, .01, standardise=True, start=(torch.ones(3, 14), torch.zeros(3)))
    assert (head[0][:, 12:] == 0).all() and all(t.isfinite().all() for t in head)
    assert np.allclose(probabilities(head, more), probabilities(fit_head(x, y, 3, .01, standardise=True), x), atol=1e-2)


def test_fitting_on_fewer_columns_gives_the_same_head_and_leaves_the_features_as_they_were():
    x, y = blobs(n=60, d=200)
    x += 3
    before = x.clone()
    plain, wide = fit_head(x, y, 3, .1, max_iter=1000), heads.fit_wide_head(x, y, 3, .1, max_iter=1000)
    assert torch.equal(x, before)
    assert np.allclose(probabilities(wide, x), probabilities(plain, x), atol=2e-3)


def test_labels_that_do_not_fit_are_one_sentence():
    x, y = blobs()
    for wrong in (y[:-1], y + 1, y - 1):
        with pytest.raises(SFTError, match="give one label from 0 to 2 for each row"):
            fit_head(x, wrong, 3)


def test_the_head_that_the_pictures_ask_for_is_chosen():
    near, y = blobs(d=40, signal=slice(0, 3))
    far, _ = blobs(d=40, signal=slice(30, 33))
    assert not choose_head([near], 10, y, 3).every_stage
    choice = choose_head([far], 10, y, 3)
    assert choice.every_stage and choice.gain > choice.error > 0 and len(choice.scores) == 6
    assert choice == choose_head(far[None], 10, y, 3) and choose_head(far.half().numpy()[None], 10, y, 3).every_stage


def test_the_scores_are_those_of_plain_cross_validation():
    "Products of rows instead of columns, and averaged views instead of averaged logits, are shortcuts and change nothing."
    x, y = blobs(n=90, d=60)
    views = [x, x + .3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))]
    found = choose_head(views, 20, y, 3, decays=(.03, .3), max_iter=300)
    mean, fold = sum(views) / 2, heads._folds(y.numpy(), 3, 0)
    for row in found.scores:
        columns, logits = slice(0, None if row["every_stage"] else 20), torch.zeros(90, 3)
        for k in range(3):
            head = fit_head(mean[fold != k, columns], y[fold != k], 3, row["weight_decay"], max_iter=300)
            logits[fold == k] = sum(v[fold == k, columns] @ head[0].T + head[1] for v in views) / 2
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=.01)
        assert row["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item(), abs=.015)


def test_folds_are_even_and_a_sample_keeps_the_shares():
    y = np.repeat(np.arange(3), (10, 20, 31))
    fold = heads._folds(y, 3, 0)
    for k in range(3):
        counts = np.bincount(fold[y == k], minlength=3)
        assert np.ptp(counts) <= 1
    rows = heads._few(y, 30, 0)
    assert len(rows) == 30 == len(set(rows)) and abs(np.bincount(y[rows]) - np.array([5, 10, 15])).max() <= 1
    assert np.array_equal(heads._few(y, 100, 0), np.arange(61))


def test_choosing_survives_few_pictures_and_a_lonely_class():
    x, y = blobs(n=7)
    y[y == 2] = 1
    y[0] = 2
    choice = choose_head([x, x], 4, y, 3, most=6)
    assert choice.weight_decay in (.01, .1, 1.) and all(np.isfinite(r["loss"]) for r in choice.scores)


def test_a_copy_of_stage_features_is_its_own():
    "Hooks are set while it runs, so a deep copy, as folding makes one, reads its own modules."
    stages = stage_features(lively_backbone("resnet18")).eval()
    twin, x = copy.deepcopy(stages), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = stages(x)
        stages.model.conv1.weight.zero_()
        assert torch.equal(twin(x), before) and not torch.equal(stages(x), before)
