"Data that are in a program already: tables, lists, arrays, and the data sets of torch, torchvision and Hugging Face."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import draw
from PIL import Image

from sft_course.tools.decoding import read_picture
from sft_course.tools.given import open_data
from sft_course.tools.intake import scan
from sft_course.tools.pixels import decode_once
from sft_course.tools.settings import SFTError


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def pixels_of(c):
    return [np.asarray(Image.open(c.root / f)) for f in c.files]


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "set", ("ant", "bee"), n=10, size=32)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def same(a, b):
    return a.classes == b.classes and (a.labels == b.labels).all() and (a.part == b.part).all() and a.files == b.files


def test_a_folder_a_csv_and_a_catalog(folder, store):
    c = scan(folder, seed=3)
    assert same(open_data(folder, seed=3), c) and same(open_data(str(folder), seed=3), c) and same(open_data(c), c)
    (folder / "set.csv").write_text("path,label\n" + "".join(f"{f},{f[:3]}\n" for f in c.files))
    assert same(open_data(folder / "set.csv", seed=3), c) and open_data(c, strict=True).strict
    assert not store.exists()
    with pytest.raises(SFTError, match="has its splits already"):
        open_data(c, val=folder)


def test_a_table_of_pandas_with_files_anywhere(folder, tmp_path, store, monkeypatch):
    c = scan(folder)
    frame = pd.DataFrame({"path": [str(folder / f) for f in c.files], "label": [c.classes[y] for y in c.labels]})
    assert same(open_data(frame, cache_dir=store), c) and open_data(frame, cache_dir=store).root == folder
    monkeypatch.chdir(tmp_path)
    assert same(open_data(frame.assign(path=[f"set/{f}" for f in c.files])), c)
    split = open_data(frame.assign(Split=["Training" if k % 5 else "Testing" for k in range(20)], width=9))
    assert len(split.rows("test")) == 4 and [p.kind for p in split.problems] == ["ignored column"]
    lost = open_data(pd.concat([frame, pd.DataFrame({"path": ["/nowhere/x.jpg"], "label": ["ant"]})]))
    assert len(lost) == 20 and [p.kind for p in lost.problems] == ["missing"]
    assert len(decode_once(lost, 32, store).pixels) == 20


@pytest.mark.parametrize("change, words", [
    (lambda f: f.rename(columns={"path": "file"}), "DataFrame: the first line reads file,label"),
    (lambda f: f.assign(label=[None] + ["a"] * (len(f) - 1)), "DataFrame, row 0: path or label is empty"),
    (lambda f: f.assign(label="a|b"), "looks like several labels"), (lambda f: f.iloc[:0], "DataFrame: holds no row"),
    (lambda f: f.assign(split="later"), "split 'later' is unknown"), (lambda f: f.assign(path="gone.jpg"), "gone.jpg stands there as"),
    (lambda f: f.assign(path=[f"gone{k}.jpg" for k in range(len(f))]), "none of its 20 paths is an image: ")])
def test_a_table_that_is_wrong_says_where(folder, change, words):
    c = scan(folder)
    frame = pd.DataFrame({"path": [str(folder / f) for f in c.files], "label": [c.classes[y] for y in c.labels]})
    with pytest.raises(SFTError) as e:
        open_data(change(frame))
    assert words in str(e.value)


def test_lists_of_paths_and_labels(folder, store):
    c = scan(folder)
    paths = [folder / f for f in c.files]
    assert same(open_data((paths, [c.classes[y] for y in c.labels]), cache_dir=store), c)
    numbered = open_data((list(map(str, paths)), c.labels.tolist()), cache_dir=store)
    assert numbered.classes == ("0", "1") and (numbered.labels == c.labels).all() and not store.exists()


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3), (20, 24, 4), (20, 24, 1)])
def test_arrays_are_written_without_loss(shape, store):
    x, y = noise(24, *shape), np.arange(24) % 12
    c = open_data((x, y), cache_dir=store)
    assert c.classes == tuple(map(str, range(12))) and (c.labels == y).all() and c.root.parent == store / "given"
    assert all((a == b.squeeze()).all() for a, b in zip(pixels_of(c), x, strict=True))
    written = {f: f.stat().st_mtime_ns for f in c.root.glob("*.png")}
    again = open_data((x.copy(), y[::-1].copy()), cache_dir=store)
    assert again.root == c.root and {f: f.stat().st_mtime_ns for f in c.root.glob("*.png")} == written
    x[3] = 0
    assert open_data((x, y), cache_dir=store).root != c.root and not list((store / "given").glob(".new-*"))


def test_deep_greys_and_images_of_pil(store):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 9, 9)).astype(np.uint16)
    assert all((a == b).all() for a, b in zip(pixels_of(open_data((deep, [0, 1] * 4), cache_dir=store)), deep, strict=True))
    images = [Image.fromarray(x).convert(m) for x, m in zip(noise(8, 9, 9, 3), ["RGB", "L", "CMYK", "1", "RGBA", "LA", "P", "YCbCr"], strict=True)]
    c = open_data((images, ["a", "b"] * 4), cache_dir=store)
    assert c.classes == ("a", "b") and len(decode_once(c, 32, store).pixels) == 8


def test_a_turned_photograph_is_written_upright(store, tmp_path):
    x = np.zeros((64, 64, 3), np.uint8)
    x[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    c = open_data(([Image.open(tmp_path / "turned.jpg")] * 4, [0, 1, 0, 1]), cache_dir=store)
    assert (read_picture(c.root / c.files[0], 64) == read_picture(tmp_path / "turned.jpg", 64)).all()


class Colours(torch.utils.data.Dataset):
    "A map-style data set whose iteration by itself never ends."
    classes = ["red", "green", "blue"]

    def __init__(self, n=18, transform=None):
        self.n, self.transform = n, transform or (lambda x: x)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = np.zeros((12, 10, 3), np.uint8)
        x[..., i % 3] = 200
        x[0, 0] = i
        return self.transform(Image.fromarray(x)), i % 3


@pytest.mark.parametrize("transform", [None, torchvision.transforms.ToTensor(), torchvision.transforms.PILToTensor(), np.asarray])
def test_data_sets_of_torch_with_their_class_names(transform, store):
    c = open_data(Colours(transform=transform), cache_dir=store)
    assert c.classes == ("red", "green", "blue") and c.labels.tolist() == [0, 1, 2] * 6
    assert [x[0, 0].tolist() for x in pixels_of(c)] == [[i] * 3 for i in range(18)]
    assert {p: len(c.rows(p)) for p in ("train", "val", "test")} == {"train": 12, "val": 3, "test": 3}


def test_a_part_of_a_data_set_and_one_without_names(store):
    part = torch.utils.data.Subset(Colours(), range(0, 12))
    assert open_data(part, cache_dir=store).classes == ("red", "green", "blue")
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(noise(12, 3, 9, 8)), torch.arange(12) % 2 + 7)
    c = open_data(tensors, cache_dir=store)
    assert c.classes == ("7", "8") and c.labels.tolist() == [0, 1] * 6
    assert open_data(((x, y) for x, y in zip(noise(12, 9, 8), [0, 1] * 6, strict=True)), cache_dir=store).classes == ("0", "1")


def test_torchvisions_image_folder(folder, store):
    c = open_data(torchvision.datasets.ImageFolder(folder), cache_dir=store)
    assert c.classes == ("ant", "bee") and len(c) == 20
    assert (pixels_of(c)[7] == np.asarray(Image.open(folder / "ant" / "07.jpg"))).all()


def hugging(n=12, key="image", seed=0):
    "What a data set of Hugging Face shows of itself: a length, items that are dictionaries, and features."
    rows = [{key: Image.fromarray(x), "label": k % 2, "id": k} for k, x in enumerate(noise(n, 9, 8, 3, seed=seed))]

    class Dataset(list):
        features = {key: object(), "label": SimpleNamespace(names=["cat", "dog"])}
    return Dataset(rows)


@pytest.mark.parametrize("key", ["image", "img"])
def test_data_sets_of_hugging_face(key, store):
    c = open_data(hugging(key=key), cache_dir=store)
    assert c.classes == ("cat", "dog") and c.labels.tolist() == [0, 1] * 6


def test_splits_by_name(store, tmp_path):
    c = open_data({"train": hugging(12), "validation": hugging(4, seed=1), "test": hugging(6, seed=2)}, cache_dir=store)
    assert [len(c.rows(p)) for p in ("train", "val", "test")] == [12, 4, 6] and c.classes == ("cat", "dog")
    assert len(decode_once(c, 32, store).pixels) == 22
    c = open_data({"image": noise(8, 9, 9), "label": [0, 1] * 4}, cache_dir=store)
    assert len(c) == 8
    with pytest.raises(SFTError, match="'unsupervised' names no split"):
        open_data({"unsupervised": hugging()}, cache_dir=store)


def test_further_folders_beside_arrays(store, folder):
    names = np.array(["ant", "bee"])
    c = open_data((noise(12, 32, 32, 3), names[np.arange(12) % 2]), cache_dir=store, val=folder)
    assert [len(c.rows(p)) for p in ("train", "val", "test")] == [10, 20, 2] and c.classes == ("ant", "bee")
    assert len(decode_once(c, 32, store).pixels) == 32


class Broken(Colours):
    def __getitem__(self, i):
        if i == 5:
            raise OSError("image file is truncated")
        return super().__getitem__(i)


@pytest.mark.parametrize("data, words", [
    (42, "data: int cannot be read"), ((noise(6, 9, 9), [0, 1]), "6 images and 2 labels"), ((noise(6, 9, 9, 7), [0, 1] * 3), "image 0: an array of shape"),
    ((noise(6, 9, 9) / 100. - 1, [0, 1] * 3), "image 0: numbers of type float64"), (((["a.jpg", "b.jpg"]), ["x"]), "2 images and 1 labels"),
    ((noise(4, 9, 9), [[0], [1], [0], [1]]), "a label must be a whole number or a name"), ((noise(4, 9, 9), [0, 1, 0, .5]), "label '0.5'"),
    ([1, 2, 3], "item 0 of the data is int"), (Broken(), "item 5 of the data cannot be read (OSError: image file is truncated)"),
    ((noise(4, 9, 9), [0] * 4), "only one class"), (([], []), "the list: holds no row"),
    (Colours(transform=lambda x: torchvision.transforms.functional.to_tensor(x) * 3 - 1), "image 0: numbers of type float32")])
def test_what_cannot_be_taken_is_said(data, words, store):
    with pytest.raises(SFTError) as e:
        open_data(data, cache_dir=store)
    assert words in str(e.value) and not list(Path(store).glob("given/.new-*"))


def test_labels_beyond_the_names_are_refused(store):
    data = Colours()
    data.classes = ["red", "green"]
    with pytest.raises(SFTError, match="label 2 is none of the 2 classes"):
        open_data(data, cache_dir=store)


def test_the_cache_of_the_settings_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_COURSE_CACHE", str(tmp_path / "mine"))
    assert open_data((noise(8, 9, 9), [0, 1] * 4)).root.parent == tmp_path / "mine" / "given"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "store").write_text("x")
    with pytest.raises(SFTError, match="images cannot be kept there"):
        open_data((noise(8, 9, 9), [0, 1] * 4), cache_dir=tmp_path / "store")
