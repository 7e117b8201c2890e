"Chapter 21: the twin in Keras is the same function, and says so in one sentence where it cannot be."
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_course.backbones import new_head
from sft_course.data import decoded_size, plain_view, random_view, rotate, to_input
from sft_course.freezing import exact_head
from sft_course.keras_twin import keras_twin, port_weights, set_trainable, torch_state, twin_loop
from sft_course.tools import extras
from sft_course.tools.decoding import read_picture
from sft_course.tools.intake import scan
from sft_course.tools.keras_inputs import decode_square, keras_score, view_images
from sft_course.tools.keras_start import open_keras
from sft_course.tools.opening import open_backbone
from sft_course.tools.pixels import decode_once
from sft_course.tools.settings import SFTError
from sft_course.unfreezing import upper_loop

needs_keras = pytest.mark.skipif(not (find_spec("keras") and find_spec("tensorflow")), reason="the extra `tensorflow` is not installed")


def images(n, size, seed=0):
    "Noise as channels last, and the same for torch."
    x = np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)
    return x, torch.from_numpy(x).permute(0, 3, 1, 2)


def off(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def pair():
    "lite0 with a head of four classes, and its twin."
    net = new_head(open_backbone(), 4, 0)
    return net, keras_twin(net)


# ---- opening

def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match=r"pip install 'sft_course\[tensorflow\]'") as e:
        open_keras()
    assert "\n" not in str(e.value)


def test_tensorflow_before_timm_is_refused_and_not_tried(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "tensorflow", sys)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(SFTError, match="`import timm` first"):
        open_keras()


def test_importing_the_modules_imports_no_keras():
    code = ("import sys, sft_course, sft_course.keras_twin, sft_course.tools.keras_inputs, sft_course.tools.exercises_21\n"
            "assert not {'keras', 'tensorflow'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@needs_keras
def test_opening_is_silent():
    code = "from sft_course.tools.keras_start import open_keras; open_keras(); import tensorflow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- the same function

@needs_keras
@pytest.mark.parametrize("size", [64, 97])
def test_even_and_odd_sizes_give_the_same_logits(pair, size):
    net, twin = pair
    x, t = images(3, size)
    with torch.no_grad():
        assert off(twin(x, training=False), net.model.eval()(t)) < 1e-5


@pytest.mark.slow
@needs_keras
@pytest.mark.parametrize("name", ["tf_efficientnet_lite1", "mobilenetv2_100"])
def test_relatives_of_lite0_have_twins_whichever_way_they_pad(name):
    net = open_backbone(name, weights=None, seed=1)
    x, t = images(2, 64)
    with torch.no_grad():
        want = net.model.eval()(t)
    assert off(keras_twin(net)(x, training=False), want) < 1e-4
    if name == "mobilenetv2_100":
        assert off(keras_twin(net, symmetric=False)(x, training=False), want) > 1e-3


@needs_keras
def test_other_networks_are_refused():
    with pytest.raises(SFTError, match="only networks of lite0's kind"):
        keras_twin(open_backbone("resnet18", weights=None))
    with pytest.raises(SFTError, match="^bn1: BatchNormAct2d has no twin; use lite0.$"):
        keras_twin(open_backbone("tf_efficientnet_b0", weights=None))


@needs_keras
def test_weights_travel_there_and_back_bit_for_bit(pair):
    net, twin = pair
    ours, theirs = net.model.state_dict(), torch_state(twin)
    assert {k for k in ours if k not in theirs} == {k for k in ours if k.endswith("num_batches_tracked")}
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@needs_keras
def test_weights_of_another_network_are_refused(pair):
    net, twin = pair
    with pytest.raises(SFTError, match=r"classifier.weight: \(1280, 7\), not \(1280, 4\)"):
        port_weights(twin, new_head(open_backbone(), 7).model)
    with pytest.raises(SFTError, match="conv_stem.weight"):
        port_weights(twin, open_backbone("resnet18", weights=None).model)
    port_weights(twin, net.model)


@needs_keras
@pytest.mark.parametrize("train", [1, "head", 3, 6, "all"])
def test_what_trains_is_what_trains_in_torch(pair, train):
    net, twin = pair
    set_trainable(twin, net, train)
    count = {"head": 1, "all": len(net.stages)}.get(train, train)
    assert len(twin.trainable_variables) == sum(len(s.parameters) for s in net.stages[-count:])
    set_trainable(twin, net, "all")


@needs_keras
@pytest.mark.parametrize("train", [0, 99, "some"])
def test_what_cannot_train_is_one_sentence(pair, train):
    with pytest.raises(SFTError, match="use 'head', 'all', or a number"):
        set_trainable(pair[1], pair[0], train)


# ---- the same pixels

@needs_keras
def test_photographs_are_read_alike(photos):
    files = sorted((photos / "val").rglob("*.jpg"))[::12]
    for f in files:
        assert np.abs(decode_square(f, 110).astype(int) - read_picture(f, 110)).max() <= 2, f.name  # two JPEG decoders


@needs_keras
def test_what_is_no_image_is_named(tmp_path):
    for name, data in {"a.jpg": b"", "b.png": b"text", "c.jpg": b"\xff\xd8 cut off"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SFTError, match=name):
            decode_square(tmp_path / name, 32)


@needs_keras
def test_views_are_those_of_to_input():
    x = np.random.default_rng(0).integers(0, 256, (6, 50, 50, 3), dtype=np.uint8)
    mean, std = (.4, .5, .6), (.2, .25, .3)
    for theta in (plain_view(6, .8), random_view(6, 3), rotate(random_view(6, 4), np.arange(6) * 30.)):
        want = to_input(x, theta, 40, mean, std).permute(0, 2, 3, 1).numpy()
        assert np.abs(view_images(x, theta, 40, mean, std) - want).max() < 2e-4


# ---- the same training

@pytest.fixture
def decoded(stripes, tmp_path):
    return decode_once(scan(stripes), decoded_size(64), tmp_path)


@pytest.mark.slow
@needs_keras
def test_an_epoch_ends_where_torch_ends_and_leaves_the_frozen_part_alone(decoded, monkeypatch):
    net, history = upper_loop(decoded, .003, 0, 2, 64)
    start = exact_head(decoded, new_head(open_backbone(), 2, 0), 64)
    twin, theirs = twin_loop(decoded, start, 6, .003, 0, 2, 64)
    for a, b in zip(history, theirs):
        assert abs(a["val_loss"] - b["val_loss"]) < .02 and a["val_accuracy"] == b["val_accuracy"]
    before, after = start.model.state_dict(), torch_state(twin)
    trained = {name for s in start.stages[-6:] for name in s.parameters}
    same = {k for k in after if torch.equal(before[k], after[k])}
    assert set(after) - trained <= same, "the frozen part moved"
    assert len(same & trained) < .1 * len(trained), same & trained


@pytest.mark.slow
@needs_keras
def test_the_best_epoch_is_what_comes_back(decoded):
    start = new_head(open_backbone(), 2, 0)
    twin, history = twin_loop(decoded, start, "head", .5, 0, 3, 64)  # jumps about
    val = decoded.catalog.rows("val")
    view = plain_view(len(decoded.pixels), 64 / decoded.pixels.shape[1])
    x = view_images(decoded.pixels[val], view[val], 64, start.mean, start.std)
    assert keras_score(twin, x, decoded.catalog.labels[val]).loss == pytest.approx(min(h["val_loss"] for h in history), abs=1e-5)


# ---- another backend

@pytest.mark.slow
@needs_keras
def test_the_twin_and_its_views_on_the_torch_backend(tmp_path, monkeypatch):
    code = """
import sys, numpy as np, torch
from sft_course.data import random_view, to_input
from sft_course.keras_twin import keras_twin
from sft_course.tools.keras_inputs import view_images
from sft_course.tools.opening import open_backbone
net, pixels = open_backbone(), np.random.default_rng(0).integers(0, 256, (2, 70, 70, 3), dtype=np.uint8)
t, x = to_input(pixels, random_view(2, 0), 64, net.mean, net.std), view_images(pixels, random_view(2, 0), 64, net.mean, net.std)
assert np.abs(x - t.permute(0, 2, 3, 1).numpy()).max() < 2e-4
with torch.no_grad(): assert (keras_twin(net)(x, training=False).cpu() - net.model(t)).abs().max() < 1e-3
assert "tensorflow" not in sys.modules
"""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(tmp_path))
    assert done.returncode == 0, done.stderr[-800:]
