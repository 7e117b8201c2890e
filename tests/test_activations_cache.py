"A cache of activations answers only for the same code, versions and threads, and keeps to its budget."
import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import fx, nn

from sft_course.data import plain_view
from sft_course.tools import activations as cache_module
from sft_course.tools.activations import Recomputed, activations, lower_code, weights_key
from sft_course.tools.heads import Rows, fit_head
from sft_course.tools.intake import scan
from sft_course.tools.opening import open_backbone
from sft_course.tools.pixels import decode_once
from sft_course.tools.settings import SFTError
from sft_course.tools.surgery import split_at
from sft_course.tools.taps import stage_features


@pytest.fixture
def store(stripes, tmp_path):
    "`store(net, …)`: activations of 20 images."
    pixels, b = decode_once(scan(stripes, 0), 40, tmp_path / "cache"), open_backbone("resnet18", None)
    theta = plain_view(len(pixels.catalog), .8)
    return lambda net, **more: activations(net, b, pixels, theta, 32, tmp_path / "cache", np.arange(20), **more)


@pytest.fixture
def files(tmp_path):
    return lambda: len(list((tmp_path / "cache" / "activations").glob("*.npy")))


def pooled(x):
    return x.mean((2, 3))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Calls(nn.Module):
    "What it does stands elsewhere."

    def __init__(self, how=None):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x) if self.how else pooled(x)


def mean(x):
    return x.mean((2, 3))


def largest(x):
    return x.amax((2, 3))


def test_another_forward_is_another_key(store, files, monkeypatch):
    net = nn.Sequential(nn.Identity(), Pool())
    before = np.array(store(net))
    monkeypatch.setattr(Pool, "forward", lambda self, x: x.amax((2, 3)))
    after = store(net)
    assert (np.array(after) > before).all() and files() == 2


def test_another_forward_of_a_leaf_in_a_traced_network(store, files, monkeypatch):
    class Whole(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Pool)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Pool())
    traced = fx.GraphModule(net, Whole().trace(net))
    before = np.array(store(traced))
    monkeypatch.setattr(Pool, "forward", lambda self, x: x.amax((2, 3)))
    assert (np.array(store(traced)) != before).any() and files() == 2


def scaled_mean(k):
    "A function that captures `k`."
    return lambda x: x.mean((2, 3)) * k


def with_hook(net):
    net = copy.deepcopy(net)
    net[0].register_forward_hook(lambda m, args, out: out * 2)
    return net


def with_own_forward(net):
    net = copy.deepcopy(net)
    net[0].forward = lambda x: x * 2
    return net


CHANGES = {
    "stride": (nn.Conv2d(3, 4, 3, stride=1), nn.Conv2d(3, 4, 3, stride=2)),
    "an attribute": (Calls(), Calls(mean)),
    "a function it calls": (Calls(mean), Calls(largest)),
    "what a partial fixes": (Calls(partial(torch.amax, dim=(2, 3))), Calls(partial(torch.mean, dim=(2, 3)))),
    "what a lambda captures": (Calls(scaled_mean(1)), Calls(scaled_mean(2))),
    "a constant": (Calls(lambda x: x.mean((2, 3)) * 3), Calls(lambda x: x.mean((2, 3)) * 4)),
    "a hook": (nn.Sequential(nn.ReLU(), Pool()), with_hook(nn.Sequential(nn.ReLU(), Pool()))),
    "a forward of one instance": (nn.Sequential(nn.ReLU(), Pool()), with_own_forward(nn.Sequential(nn.ReLU(), Pool()))),
    "a leaf's settings": (nn.LeakyReLU(.1), nn.LeakyReLU(.2)),
    "order": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_what_is_computed_changes_the_key(what):
    a, b = CHANGES[what]
    assert lower_code(a) != lower_code(b)
    assert lower_code(a) == lower_code(copy.deepcopy(a)) == lower_code(a.train()) == lower_code(a.eval())


def test_a_function_that_forward_calls_by_name(monkeypatch):
    before = lower_code(Calls())
    monkeypatch.setattr(sys.modules[__name__], "pooled", largest)
    assert lower_code(Calls()) != before


def test_buffers_that_no_file_keeps_types_and_shapes_count():
    net = nn.Module()
    net.register_buffer("table", torch.zeros(2, 3), persistent=False)
    keys = [weights_key(net)]
    for t in (torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.int32)):
        net.table = t
        keys.append(weights_key(net))
    assert len(set(keys)) == 5


@pytest.mark.parametrize("module", [torch, timm])
def test_another_version_is_another_file(store, files, monkeypatch, module):
    first = np.array(store(Pool()))
    monkeypatch.setattr(module, "__version__", "99.0")
    assert np.array_equal(store(Pool()), first) and files() == 2


def test_another_number_of_threads_is_another_file(store, files):
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            store(Pool())
    finally:
        torch.set_num_threads(threads)
    assert files() == 2


KEYS = """
from sft_course.tools.opening import open_backbone
from sft_course.tools.activations import lower_code
from sft_course.tools.surgery import split_at
from sft_course.tools.taps import stage_features
b = open_backbone("resnet10t", None)
print(lower_code(stage_features(b)), lower_code(split_at(b, 2)[0]), lower_code(b.model))
"""


@pytest.mark.slow
def test_the_key_is_the_same_in_every_process_and_after_use(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    there = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True, check=True).stdout.split()
    b = open_backbone("resnet10t", None, seed=1)
    stages, lower = stage_features(b), split_at(b, 2)[0]
    assert [lower_code(m) for m in (stages, lower, b.model)] == there
    with torch.no_grad():
        stages.eval()(torch.zeros(2, 3, 64, 64)), lower.eval()(torch.zeros(2, 3, 64, 64))
    assert [lower_code(m) for m in (stages, lower, b.model)] == there


# ---- a budget


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()).train()


def test_what_does_not_fit_is_held_in_memory_with_the_same_values(store, files, net):
    kept = np.array(store(net))
    net[0].weight.data += 1
    held = store(net, budget_bytes=100)
    assert files() == 1 and type(held) is np.ndarray and held.dtype == np.float16 and held.shape == kept.shape
    assert np.array_equal(held, store(net, budget_bytes=10**9)) and files() == 2
    assert np.array_equal(held, store(net, budget_bytes=100))  # what is there already is used
    assert net.training and net[1].num_batches_tracked == 0


def test_what_fits_nowhere_is_computed_again_in_pieces(store, files, net, monkeypatch):
    want = np.array(store(net))
    net[0].weight.data += 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cache_module, "free_memory", lambda: 1000)
        again = store(net, budget_bytes=100)
    assert isinstance(again, Recomputed) and files() == 1
    want = np.array(store(net))
    assert again.shape == want.shape == (20, 4, 15, 15) and len(again) == 20 and again.dtype == want.dtype
    for at in (slice(None), slice(3, 9), np.array([7, 2, 7, 19]), -1, (slice(2, 5), slice(2)), (np.array([9, 1]), slice(1, 3)), (4, 2), np.arange(0)):
        assert np.array_equal(again[at], want[at]), at


def test_a_head_can_be_fitted_on_features_that_are_nowhere(store, monkeypatch):
    kept = store(Pool())
    monkeypatch.setattr(cache_module, "free_memory", lambda: 0)
    monkeypatch.setattr(torch, "__version__", "99.0")
    again = store(Pool(), budget_bytes=1)
    assert isinstance(again, Recomputed)
    y = torch.arange(20) % 2
    heads = [fit_head(Rows([f], np.arange(20)), y, 2, chunk=12) for f in (kept, again)]
    assert torch.equal(heads[0][0], heads[1][0]) and torch.equal(heads[0][1], heads[1][1])


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x):
        return x.mean((2, 3)) * self.factor


@pytest.mark.parametrize("free", [10**9, 0])
def test_large_and_infinite_values_without_a_file(store, files, monkeypatch, free):
    monkeypatch.setattr(cache_module, "free_memory", lambda: free)
    large = store(Scaled(1e7), budget_bytes=1)
    assert large.dtype == np.float32 and np.array_equal(large[:], store(Scaled(1e7)))
    with pytest.raises(SFTError, match="that are not finite"):
        store(Scaled(float("nan")), budget_bytes=1)


def test_older_activations_make_room_and_the_pixels_stay(store, files, net, tmp_path):
    room = 40 * 40 * 3 * 24 + 20_000 + 2 * 20 * 4 * 15 * 15
    for _ in range(3):
        net[0].weight.data += 1
        store(net, budget_bytes=room)
        assert files() == 1 and len(list((tmp_path / "cache" / "pixels").iterdir())) == 1


def test_several_views_count_together(store, files, net):
    budget = 40 * 40 * 3 * 24 + 3 * (20 * 4 * 15 * 15)
    store(net, budget_bytes=budget, views=2)
    assert not files()
    store(net, budget_bytes=budget)
    assert files() == 1
