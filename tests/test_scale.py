"Chapter 20 without a second process: the ring, what a step costs, batches on their way, prediction in shards."
import os
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sft_course.scale import Machine, one_ahead, ring_bytes, ring_steps, step_seconds, to_floats
from sft_course.tools.processes import Ranks, everywhere, from_first, in_turns, is_first, joined, launched, ranks, share, whole_batch
from sft_course.tools.settings import SFTError
from sft_course.tools.sharded_predict import ShardWriter, predict_ray, predict_shards, read_shards


@pytest.mark.parametrize(("processes", "numbers"), [(2, 1), (2, 7), (3, 3), (4, 10), (5, 3), (8, 64)])
def test_a_ring_adds_up_whatever_divides(processes, numbers):
    v = np.random.default_rng(0).normal(size=(processes, numbers))
    before = v.copy()
    states = list(ring_steps(v))
    assert len(states) == 2 * (processes - 1)
    np.testing.assert_allclose(states[-1], np.tile(v.sum(0), (processes, 1)))
    np.testing.assert_array_equal(v, before)


def test_bytes_of_a_ring_are_those_that_its_steps_send():
    assert ring_bytes(100, 4) == 2 * 3 * 25 * 4
    assert ring_bytes(100, 1) == 0


def test_one_process_sends_nothing_and_many_wait_for_the_largest_share():
    machine = Machine(speed=1e9, bandwidth=1e9, latency=.1)
    assert step_seconds(machine, 10, 1, 1e9, 10**9) == pytest.approx(10)
    assert step_seconds(machine, 10, 4, 1e9, 0) == pytest.approx(3 + 6 * .1)


def test_batches_arrive_in_their_order_also_where_there_are_none():
    images = torch.arange(5 * 2 * 2 * 3, dtype=torch.uint8).reshape(5, 2, 2, 3)
    order = [np.array([4, 0]), np.array([1])]
    assert all(torch.equal(x, images[rows]) for x, rows in zip(one_ahead(images, order, "cpu"), order, strict=True))
    assert list(one_ahead(images, [], "cpu")) == []


def test_bytes_become_what_the_network_wants():
    x = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    got = to_floats(x, torch.tensor([.5] * 3), torch.tensor([.5] * 3))
    torch.testing.assert_close(got, x.permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_alone_nothing_is_said():
    model = torch.nn.Linear(2, 1)
    assert ranks() == Ranks() and is_first() and not launched()
    assert share([1, 2, 3]) == [1, 2, 3]
    assert whole_batch(model, torch.tensor(3.), 2) == (3., 2) and model.weight.grad is None
    assert from_first(lambda: 3) == 3 and list(in_turns("ab", str.upper)) == ["A", "B"] and everywhere(True)
    with pytest.raises(ZeroDivisionError), joined():
        raise ZeroDivisionError
    assert ranks() == Ranks()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from conftest import draw

    from sft_course.recipe import fine_tune
    from sft_course.tools.settings import load_settings
    top = tmp_path_factory.mktemp("model")
    settings = load_settings(fit_image_size=32)
    return fine_tune(draw(top / "data", n=10), out=top / "out", settings=settings, train="head"), top


def images_of(folder, n=7):
    folder.mkdir()
    for i in range(n):
        Image.fromarray(np.full((9, 9, 3), i * 20, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_shards_hold_every_file_once_in_order_with_odd_names(model, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    images = images_of(tmp_path / "images")
    for name in ("a, \"b\".png", "nan.png", "Ω.png"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / name)
    (images / "broken.png").write_text("no image", encoding="utf-8")
    made = predict_shards(model[0], [images, images / "0.png"], tmp_path / "parts", shard_size=4, kind=kind)
    table = read_shards(tmp_path / "parts")
    assert (made.files, made.shards, made.wrote) == (11, 3, 3) and len(table) == 11
    assert sorted(table.path) == sorted(map(str, images.iterdir()))
    bad = table[table.path == str(images / "broken.png")].iloc[0]
    assert "cannot be read" in bad.error and np.isnan(bad.probability)
    assert set(table.label[table.path != bad.path]) <= set(model[0].classes)


def test_a_shard_that_is_gone_is_made_again_and_no_other(model, tmp_path):
    images, parts = images_of(tmp_path / "images"), tmp_path / "parts"
    predict_shards(model[0], images, parts, shard_size=3)
    first = read_shards(parts)
    times = {p.name: p.stat().st_mtime_ns for p in parts.iterdir()}
    (parts / "part-000001.csv").unlink()
    with pytest.raises(SFTError, match="1 of 3 shards are missing"):
        read_shards(parts)
    assert predict_shards(model[0], images, parts, shard_size=3).wrote == 1
    pd.testing.assert_frame_equal(read_shards(parts), first)
    changed = [p.name for p in parts.iterdir() if p.stat().st_mtime_ns != times[p.name]]
    assert changed == ["part-000001.csv"]


def test_other_files_or_other_weights_are_refused(model, tmp_path):
    images, parts = images_of(tmp_path / "images"), tmp_path / "parts"
    predict_shards(model[0], images, parts)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / "new.png")
    with pytest.raises(SFTError, match="of other files and other list"):
        predict_shards(model[0], images, parts)
    with pytest.raises(SFTError, match="not empty"):
        predict_shards(model[0], images, images)
    with pytest.raises(SFTError, match="has no path"):
        predict_shards(model[0], np.zeros((2, 9, 9, 3), np.uint8), tmp_path / "x")


@pytest.mark.skipif(os.name == "nt", reason="file names there are text")
def test_a_name_that_is_not_utf8_comes_back(model, tmp_path):
    images = images_of(tmp_path / "images", 1)
    os.rename(images / "0.png", os.fsencode(images) + b"/\xff.png")
    predict_shards(model[0], images, tmp_path / "parts")
    assert os.fsencode(read_shards(tmp_path / "parts").path[0]).endswith(b"/\xff.png")


def test_what_an_actor_of_ray_does(model, tmp_path):
    images = sorted(map(str, images_of(tmp_path / "images").iterdir()))
    ShardWriter(str(model[1] / "out"))({"file": [str(tmp_path / "a.csv")], "paths": [images]})
    assert pd.read_csv(tmp_path / "a.csv").path.tolist() == images


def test_without_ray_one_sentence_says_what_to_install(model, tmp_path):
    if find_spec("ray"):
        pytest.skip("Ray is installed")
    with pytest.raises(SFTError, match=r"sft_course\[scale\]"):
        predict_ray(model[1] / "out", images_of(tmp_path / "images"), tmp_path / "parts")


@pytest.mark.parametrize("spoken", [True, False])
def test_a_process_that_is_stopped_says_how_to_go_on_unless_another_has(spoken, monkeypatch, capsys):
    from sft_course.tools import cli
    monkeypatch.setattr(cli, "is_first", lambda: False)
    monkeypatch.setattr(cli, "wait_for_reason", lambda seconds: 75)
    monkeypatch.setattr(cli, "may_speak", lambda: not spoken)
    monkeypatch.setattr(cli, "_signals_do", lambda what: None)
    assert cli._stopped(cli._Ended(15, "stopped; go on")) == 143
    assert capsys.readouterr().err.count("go on") == (not spoken)
