"dataset = flowers102 and oxford_pets: torchvision reads them, we arrange them. With stand-ins of the same layout, without a network."
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Flowers102, OxfordIIITPet

from sft_course.tools import datasets
from sft_course.tools.datasets import open_dataset
from sft_course.tools.intake import scan
from sft_course.tools.settings import SFTError, load_settings


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Whoever asks the network for something hears that there is none."
    def refuse(*_, **__):
        raise urllib.request.URLError("there is no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def settings(tmp_path):
    return lambda name: load_settings(dataset=name, cache=str(tmp_path))


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)).save(path)


def flowers(place, monkeypatch):
    "Twelve images of three classes, the labels and splits in MATLAB's format as in the original."
    from scipy.io import savemat
    base = place / "flowers-102"
    for i in range(1, 13):
        picture(base / "jpg" / f"image_{i:05}.jpg", i)
    savemat(base / "imagelabels.mat", {"labels": np.array([[1 + i % 3 for i in range(12)]])})
    savemat(base / "setid.mat", {"trnid": np.array([[1, 2, 3, 4, 5, 6]]), "valid": np.array([[7, 8, 9]]),
                                 "tstid": np.array([[10, 11, 12]])})
    md5 = {k: hashlib.md5((base / f).read_bytes()).hexdigest() for k, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    known = {k: (f, md5.get(k, old)) for k, (f, old) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", known)
    return base


def pets(place, monkeypatch=None):
    "Ten images of two breeds, one of them with an underscore in its name, and the two lists of the original."
    base = place / "oxford-iiit-pet"
    lines = {"trainval": [], "test": []}
    for number, (breed, kind) in enumerate((("Abyssinian", 1), ("american_bulldog", 2)), 1):
        for i in range(5):
            picture(base / "images" / f"{breed}_{i}.jpg", 10 * number + i)
            lines["test" if i > 2 else "trainval"].append(f"{breed}_{i} {number} {kind} {number}")
    (base / "annotations").mkdir()
    for split, some in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(some) + "\n")
    return base


def test_flowers_keep_their_three_splits_and_their_names(settings, tmp_path, monkeypatch):
    flowers(tmp_path / "public" / "flowers102", monkeypatch)
    folder = open_dataset(settings("flowers102"))
    c = scan(folder)
    assert {p: len(c.rows(p)) for p in ("train", "val", "test")} == {"train": 6, "val": 3, "test": 3}
    assert c.classes == ("canterbury bells", "hard-leaved pocket orchid", "pink primrose")
    of = {Path(f).name: c.classes[y] for f, y in zip(c.files, c.labels, strict=True)}
    assert of["image_00001.jpg"] == "pink primrose" and of["image_00011.jpg"] == "hard-leaved pocket orchid"
    assert not c.problems


def test_pets_keep_their_test_split_and_a_part_of_the_rest_is_held_back(settings, tmp_path):
    pets(tmp_path / "public" / "oxford_pets")
    c = scan(open_dataset(settings("oxford_pets")))
    assert c.classes == ("Abyssinian", "american_bulldog") and len(c) == 10
    assert len(c.rows("test")) == 4 and len(c.rows("val")) >= 1
    assert all(Path(f).name.rsplit("_", 1)[0] == c.classes[y] for f, y in zip(c.files, c.labels, strict=True))


def test_what_is_arranged_once_is_found_again_and_takes_no_room(settings, tmp_path, monkeypatch):
    base = pets(tmp_path / "public" / "oxford_pets")
    folder = open_dataset(settings("oxford_pets"))
    monkeypatch.setattr(datasets, "_listed", None)  # nobody may call it
    assert open_dataset(settings("oxford_pets")) == folder
    assert os.path.samefile(next(folder.rglob("Abyssinian_0.jpg")), base / "images" / "Abyssinian_0.jpg")


def test_without_hard_links_pictures_are_copied(settings, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")
    pets(tmp_path / "public" / "oxford_pets")
    monkeypatch.setattr(os, "link", refuse)
    assert len(scan(open_dataset(settings("oxford_pets")))) == 10


@pytest.mark.parametrize("name", ["flowers102", "oxford_pets"])
def test_offline_it_is_one_sentence_and_nothing_is_left(settings, tmp_path, name):
    with pytest.raises(SFTError) as e:
        open_dataset(settings(name))
    said = str(e.value)
    assert said.startswith(f"argument dataset = {name}: it is not in ") and "no network in this test" in said and "\n" not in said
    assert said.endswith("use blooms, flowers102, oxford_pets, or the path of a folder of labelled images.")
    assert not [p for p in (tmp_path / "public" / name).iterdir()]


def test_settings_name_them_without_making_a_path_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[course]\ndataset = flowers102\n")
    assert load_settings().dataset == "flowers102"
    (tmp_path / "settings.ini").write_text("[course]\ndataset = ./flowers102\n")
    assert Path(load_settings().dataset) == tmp_path / "flowers102"


@pytest.mark.parametrize("make, name, download", [
    (flowers, "flowers102", Flowers102.download), (pets, "oxford_pets", OxfordIIITPet._download)])
def test_a_download_is_whole_or_not_there(settings, tmp_path, monkeypatch, make, name, download):
    "torchvision is asked to download, in a place aside; what it leaves is moved at the end, without the archives."
    asked, kind = [], download.__qualname__.split(".")
    def fake(self):
        asked.append(Path(self.root))
        if len(asked) == 1:
            (Path(self.root) / datasets.PUBLIC[name]).mkdir(parents=True)
            raise KeyboardInterrupt
        base = make(Path(self.root), monkeypatch)
        (base / "images.tar.gz").write_text("an archive")
    monkeypatch.setattr({"Flowers102": Flowers102, "OxfordIIITPet": OxfordIIITPet}[kind[0]], kind[1], fake)
    home = tmp_path / "public" / name
    with pytest.raises(KeyboardInterrupt):
        open_dataset(settings(name))
    assert not list(home.iterdir())
    c = scan(open_dataset(settings(name)))
    assert len(c.classes) >= 2 and len(asked) == 2
    assert sorted(p.name for p in home.iterdir()) == sorted([datasets.PUBLIC[name], "pictures"])
    assert not list(home.rglob("*.tar.gz")) and not (home / datasets.PUBLIC[name] / datasets.PUBLIC[name]).exists()


def test_damaged_data_is_named_with_what_to_do(settings, tmp_path):
    base = pets(tmp_path / "public" / "oxford_pets")
    (base / "images" / "Abyssinian_0.jpg").unlink()
    with pytest.raises(SFTError, match="what lies there cannot be read .*; delete that folder to download oxford_pets again"):
        open_dataset(settings("oxford_pets"))
    assert not (tmp_path / "public" / "oxford_pets" / "pictures").exists()
