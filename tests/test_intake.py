"What a folder or a table means: splits in every usual spelling, formats, what is passed over, and sentences where it is unclear."
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, draw
from PIL import Image

import sft_course.tools.problems as problems_tool
from sft_course.tools.catalog import Catalog, require_parts, require_test
from sft_course.tools.folders import FORMATS, PICTURES, add_formats, split_named
from sft_course.tools.intake import scan
from sft_course.tools.pixels import decode_once
from sft_course.tools.problems import find_problems, leaks_between_parts
from sft_course.tools.settings import SFTError

CASES = REPO.parent / "shared" / "cases"


def case(name):
    "A folder or CSV of the small inputs, unless this checkout has none of them."
    if not (CASES / name).exists():
        pytest.skip("the small inputs are not here")
    return CASES / name


def parts(c):
    return tuple(len(c.rows(p)) for p in ("train", "val", "test"))


def kinds(c):
    return Counter(p.kind for p in c.problems)


def lay(root, *folders, n=4, seed=0):
    "Noise images in each of the folders; no two are alike."
    for k, folder in enumerate(folders):
        rng = np.random.default_rng((seed, k))
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / folder / f"{i}.jpg")
    return root


def refused(root, *words, **how):
    "The sentence with which `scan` stops."
    with pytest.raises(SFTError) as e:
        scan(root, **how)
    text = str(e.value)
    assert text.isprintable() and text.endswith(".") and len(text) < 1000
    for word in words:
        assert word in text, text
    return e.value


# names of splits

@pytest.mark.parametrize("name, part, rest", [
    ("train", "train", ""), ("Training", "train", ""), ("TRAIN", "train", ""), ("training_set", "train", ""), ("TrainSet", "train", ""),
    ("trainset", "train", ""), ("train_images", "train", ""), ("train2017", "train", ""), ("trainval", "train", ""), ("train_val", "train", ""),
    ("val", "val", ""), ("Valid", "val", ""), ("validation", "val", ""), ("Validation Set", "val", ""), ("dev", "val", ""),
    ("test", "test", ""), ("Testing", "test", ""), ("Test_Data", "test", ""), ("test1", "test", ""), ("testimages", "test", ""),
    ("seg_train", "train", "seg"), ("cats-train", "train", "cats"), ("rps-test-set", "test", "rps"), ("trainA", "train", "a"),
    ("validation-horse-or-human", "val", "horse or human"),
    ("train_test_split", "", ""), ("rose", "", "rose"), ("trainee", "", "trainee"), ("contest", "", "contest"), ("devil", "", "devil"),
    ("invalid", "", "invalid"), ("0", "", "")])
def test_a_name_is_taken_apart(name, part, rest):
    assert split_named(name) == (part, rest)


SPELLINGS = [("train", "test"), ("Training", "Testing"), ("train", "Testing"), ("TRAIN", "VAL"), ("training_set", "test_set"),
             ("seg_train", "seg_test"), ("cats-train", "cats-test"), ("rps", "rps-test-set"), ("train2017", "val2017"), ("train", "test_final"),
             ("horse-or-human", "validation-horse-or-human"), ("Train_Images", "Dev_Images")]


@pytest.mark.parametrize("train, test", SPELLINGS)
@pytest.mark.parametrize("doubled", ["", "inside", "outside"])
def test_splits_are_read_in_any_usual_spelling(tmp_path, train, test, doubled):
    inner = {"inside": lambda s: f"{s}/{s}", "outside": lambda s: f"set/set/{s}"}.get(doubled, str)
    lay(tmp_path, *(f"{inner(s)}/{c}" for s in (train, test) for c in ("ant", "bee")), n=5)
    c = scan(tmp_path)
    assert c.classes == ("ant", "bee") and parts(c) == (8, 2, 10) and not c.problems
    assert all(f.startswith(f"{inner(test)}/") for f in np.array(c.files)[c.rows("test")])


def test_three_splits_keep_their_meaning(tmp_path):
    lay(tmp_path, *(f"{s}/{c}" for s in ("Training", "Valid", "Test_Data") for c in "ab"), n=3)
    c = scan(tmp_path)
    assert parts(c) == (6, 6, 6) and all(f.startswith("Valid/") for f in np.array(c.files)[c.rows("val")])


def test_splits_inside_the_class_folders(tmp_path):
    lay(tmp_path, "cat/train", "dog/train", n=6)
    lay(tmp_path, "cat/test", "dog/test", n=3, seed=1)
    c = scan(tmp_path)
    assert c.classes == ("cat", "dog") and parts(c) == (10, 2, 6)
    lay(tmp_path, "cow", n=5, seed=2)
    c = scan(tmp_path)
    assert c.classes == ("cat", "cow", "dog") and len(c) == 23 and "untested" not in kinds(c)


def test_a_test_folder_beside_the_class_folders(tmp_path):
    lay(tmp_path, "cat", "dog", "test/cat", "test/dog", n=4)
    c = scan(tmp_path)
    assert c.classes == ("cat", "dog") and parts(c) == (6, 2, 8) and not c.problems


def test_an_unlabelled_test_folder_among_classes_is_named_and_left_out(tmp_path):
    lay(tmp_path, "cat", "dog", "Test", n=4)
    c = scan(tmp_path)
    assert c.classes == ("cat", "dog") and len(c) == 8 and kinds(c) == {"split name": 1, "no class": 4}
    assert "rename it if it is one" in c.problems[0].message
    with pytest.raises(SFTError, match="would be left out"):
        scan(tmp_path, strict=True)


@pytest.mark.parametrize("folders", [("bus", "car", "train"), ("valid", "invalid")])
def test_a_class_may_have_the_name_of_a_split_and_that_is_said(tmp_path, folders):
    c = scan(lay(tmp_path, *folders))
    assert c.classes == tuple(sorted(folders)) and kinds(c) == {"split name": 1}


@pytest.mark.parametrize("folders", [("train me", "left"), ("crash test", "test tube"), ("freight train", "steam train"), ("contest", "devil")])
def test_names_that_only_hold_the_word_are_classes(tmp_path, folders):
    c = scan(lay(tmp_path, *folders))
    assert c.classes == tuple(sorted(folders)) and not c.problems


@pytest.mark.parametrize("folders", [
    ("train", "test"), ("Training", "Testing"), ("val", "test"), ("train", "val", "cat", "dog"), ("test", "cat"), ("train", "cat"), ("train",),
    ("cats-train", "cats-test"), ("cats", "cats-test"), ("cats-train", "cats-test", "dogs-train", "dogs-test"),
    ("trainA", "trainB", "testA", "testB"), ("train/images", "test/images"), ("data/train", "data/val")])
def test_what_looks_like_splits_and_has_no_classes_is_refused(tmp_path, folders):
    refused(lay(tmp_path, *folders), "look like splits, not classes", "one folder per class")


def test_several_data_sets_in_one_folder_are_refused(tmp_path):
    refused(lay(tmp_path / "a", *(f"{s}/{p}/{c}" for s in ("one", "two") for p in ("train", "test") for c in "ab")), "several data sets")
    refused(lay(tmp_path / "b", *(f"{s}_{p}/{c}" for s in ("one", "two") for p in ("train", "test") for c in "ab")), "several data sets")


def test_without_a_train_split_there_is_nothing_to_train_on_but_enough_to_ask_about(tmp_path):
    lay(tmp_path, "val/a", "val/b", "test/a", "test/b")
    refused(tmp_path, "no train split here (8 val, 8 test)")
    assert parts(scan(tmp_path, divide=False)) == (0, 8, 8)
    shutil.rmtree(tmp_path / "val")
    refused(tmp_path, "no train split here (8 test)")
    c = scan(tmp_path, divide=False)
    assert parts(c) == (0, 0, 8) and c.classes == ("a", "b")


def test_folders_inside_a_class_are_named_with_what_they_were_taken_for(tmp_path):
    lay(tmp_path, "animals/cat", "animals/dog", "plants", n=4)
    c = scan(tmp_path)
    assert c.classes == ("animals", "plants") and kinds(c) == {"nested": 2}
    assert c.problems[0].message == "animals/cat lies inside a class folder; its images were taken for class 'animals' (4 images)."
    lay(tmp_path / "many", *(f"{c}/images" for c in "abcd"))
    c = scan(tmp_path / "many")
    assert kinds(c) == {"nested": 1} and "and so on in 4 classes (16 images)" in c.problems[0].message


def test_what_systems_and_tools_leave_is_passed_over(tmp_path):
    lay(tmp_path, "a", "b", "a/@eaDir/0.jpg", "__MACOSX/a", "b/thumbnails", "runs/classify/train", "$RECYCLE.BIN/x", "lightning_logs/v0")
    for name in ("a/Thumbs.db", "a/desktop.ini", "b/.DS_Store", "a/._0.jpg"):
        (tmp_path / name).write_bytes(b"x")
    lay(tmp_path, "model/stages")
    (tmp_path / "model" / "card.json").write_text("{}")
    c = scan(tmp_path)
    assert c.classes == ("a", "b") and len(c) == 8
    assert {p.path for p in c.problems} == {"b/thumbnails", "runs", "lightning_logs", "model"} and kinds(c) == {"passed over": 4}
    assert scan(tmp_path, strict=True).files == c.files


def test_a_class_may_have_the_name_of_a_tools_folder(tmp_path):
    assert scan(lay(tmp_path, "logs", "planks")).classes == ("logs", "planks")


def test_folders_without_images_do_not_hide_where_the_data_lie(tmp_path):
    lay(tmp_path, "images/a", "images/b")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "list.txt").write_text("x")
    c = scan(tmp_path)
    assert c.classes == ("a", "b") and c.files[0] == "images/a/0.jpg"


# formats

def test_every_extension_of_a_format_is_known():
    add_formats()
    known = {ext for ext, name in Image.registered_extensions().items() if name in FORMATS}
    assert known <= PICTURES and {".jfif", ".avif", ".heic", ".hif"} <= PICTURES


def test_files_without_extension_are_known_by_their_content(tmp_path):
    lay(tmp_path, "a", "b")
    for f in tmp_path.glob("*/*.jpg"):
        f.rename(f.with_name({"0": "IMG", "1": "scan.0001"}.get(f.stem, f.stem)))
    (tmp_path / "a" / "README").write_text("what this is")
    c = scan(tmp_path)
    assert len(c) == 8 and [(p.path, p.kind) for p in c.problems] == [("a/README", "not an image")]
    assert len(decode_once(c, 48, tmp_path / "cache").pixels) == 8


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)


WITHOUT = """
import sys
sys.modules["pillow_heif"] = None
from sft_course.tools.settings import SFTError
from sft_course.tools.pixels import decode_once
from sft_course.tools.intake import scan
try: found = decode_once(scan(sys.argv[1]), 48, sys.argv[2]).catalog
except SFTError as e: print(e)
else: print(len(found), *(p.message for p in found.problems), sep="\\n")
"""


def decoded_without_heif(folder, cache):
    "Lines that say what a process without pillow-heif makes of a folder: how many images are left, and the problems; or the error."
    done = subprocess.run([sys.executable, "-c", WITHOUT, folder, cache], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_heic_without_its_library_names_the_extra(tmp_path):
    lay(tmp_path / "set", "a", "b")
    for name in ("a/IMG_1.HEIC", "a/IMG_2", "b/IMG_3.jpg"):
        (tmp_path / "set" / name).write_bytes(HEIC)
    left, *said = decoded_without_heif(tmp_path / "set", tmp_path / "cache")
    assert left == "8" and len(said) == 3 and all("sft_course[heic]" in line for line in said)


def test_damaged_heic_is_not_blamed_on_a_missing_library(tmp_path):
    pytest.importorskip("pillow_heif")
    lay(tmp_path, "a", "b")
    (tmp_path / "a" / "IMG_1.HEIC").write_bytes(HEIC)
    found = decode_once(scan(tmp_path), 48, tmp_path / "cache").catalog
    assert len(found) == 8 and "damaged" in found.problems[0].message


def test_heic_with_its_library_is_registered(monkeypatch):
    called = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: called.append(1)))
    assert add_formats.__wrapped__() and called == [1]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not add_formats.__wrapped__()


def test_heic_is_read(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(4):
            x = np.random.default_rng((ord(c), i)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            pillow_heif.from_pillow(Image.fromarray(x)).save(tmp_path / c / f"{i}.HEIC")
    assert len(decode_once(scan(tmp_path), 48, tmp_path / "cache").pixels) == 8


# nothing, or too little, is left

def test_where_nothing_was_found_the_error_says_what_was_found_instead(tmp_path):
    for name in ("a/1.txt", "a/2.txt", "b/3.pdf", "b/4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    error = refused(tmp_path, "2 .txt", "1 .pdf", "1 without extension", "a/1.txt is not an image by its name")
    assert len(error.problems) == 6
    lay(tmp_path / "flat", ".")
    assert "found: 4 .jpg; 0.jpg lies in no class folder" in str(refused(tmp_path / "flat"))


def test_where_nothing_can_be_read_the_first_reasons_are_said(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    for learn in (True, False):
        with pytest.raises(SFTError, match="3 .jpg, 1 .png") as e:
            decode_once(scan(tmp_path), 48, tmp_path / "cache", to_learn=learn)
        assert str(e.value).count("Git LFS") == 3 and len(e.value.problems) >= 4


@pytest.mark.parametrize("part, lost", [("test", 6), ("val", 4)])
def test_a_part_that_loses_all_of_its_images_stops_before_training(tmp_path, part, lost):
    lay(tmp_path, *(f"{p}/{c}" for p in ("train", "val", "test") for c in "ab"), n=6)
    for f in sorted((tmp_path / part).rglob("*.jpg")):
        f.write_text("x")
    with pytest.raises(SFTError, match=f"none of the 12 {part} images can be read.*{part}/a/0.jpg cannot be read"):
        decode_once(scan(tmp_path), 48, tmp_path / "cache")
    assert len(decode_once(scan(tmp_path), 48, tmp_path / "cache", to_learn=False).pixels) == 24


def test_require_parts_asks_only_for_what_was_there():
    before = Catalog(REPO, ("a",), ("1", "2"), np.zeros(2, int), np.array(["train", "test"]))
    require_parts(before, before)
    require_parts(before.keep(before.part == "train"), before.keep(before.part == "train"))
    with pytest.raises(SFTError, match="none of the 1 test images"):
        require_parts(before.keep(before.part == "train"), before)


def test_a_class_of_two_images_is_trained_on_and_said_to_be_untested(tmp_path):
    lay(tmp_path, "a", "b", n=10)
    lay(tmp_path, "c", n=2, seed=1)
    c = scan(tmp_path)
    rare = c.labels == 2
    assert sorted(c.part[rare]) == ["train", "val"] and [p.path for p in c.problems] == ["c"] and kinds(c) == {"untested": 1}
    found = decode_once(c, 48, tmp_path / "cache")
    assert [p.kind for p in find_problems(found)] == [] or "untested" not in Counter(p.kind for p in find_problems(found))
    (tmp_path / "c" / "1.jpg").unlink()
    refused(tmp_path, "class 'c' holds a single image")


def test_where_every_class_has_two_images_nothing_is_left_to_test_with(tmp_path):
    c = scan(lay(tmp_path, "a", "b", n=2))
    assert parts(c) == (2, 2, 0) and kinds(c) == {"untested": 2}
    with pytest.raises(SFTError, match="no class has three images"):
        require_test(c)
    require_test(scan(lay(tmp_path, "a", "b", n=3)))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 10, 15])
def test_few_keeps_so_many_of_each_class(tmp_path, k):
    draw(tmp_path / "train", n=15, size=16)
    draw(tmp_path / "test", n=3, size=16)
    c = scan(tmp_path).sample_per_class(k)
    mine = c.labels[c.part != "test"]
    assert np.bincount(mine).tolist() == [k, k] and len(c.rows("test")) == 6
    assert k == 1 or np.bincount(c.labels[c.rows("val")]).tolist() == [max(1, round(k / 5))] * 2
    assert len(scan(tmp_path).sample_per_class(100)) == 36


# false statements

def test_where_all_images_are_small_none_is_said_to_be_smaller_than_the_others(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(12):
            x = np.random.default_rng((ord(c), i)).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(x).save(tmp_path / c / f"{i}.png")
    small = [p for p in find_problems(decode_once(scan(tmp_path), 32, tmp_path / "cache")) if p.kind == "small"]
    assert len(small) == 1 and "23 more of 24 images are smaller than 32 pixels" in small[0].message


def test_small_images_are_compared_with_the_others():
    sizes = [(f"{k}.jpg", 400, 300) for k in range(9)]
    assert ["far less" in p.message for p in problems_tool._small([*sizes, ("x", 60, 60)])] == [True]
    assert ["far less" in p.message for p in problems_tool._small([(n, 40, 40) for n, _, _ in sizes] + [("x", 30, 30)])] == [False]
    assert problems_tool._small([]) == []


def test_folders_beside_the_splits_are_counted(tmp_path):
    lay(tmp_path, "train/a", "train/b", "val/a", "val/b", "extra/a", "extra/c", n=3)
    assert [p.message for p in scan(tmp_path).problems] == ["extra lies beside the splits; it was left out, with 6 images."]


# copies between the parts

def test_the_same_file_in_two_parts_is_found_without_decoding(tmp_path, monkeypatch):
    lay(tmp_path, "train/a", "train/b", "val/a", "val/b", "test/a", "test/b", n=4)
    assert leaks_between_parts(scan(tmp_path)) == ()
    shutil.copy(tmp_path / "train/a/0.jpg", tmp_path / "test/a/copy.jpg")
    shutil.copy(tmp_path / "train/a/1.jpg", tmp_path / "train/a/again.jpg")
    hashed = []
    digest = problems_tool._digest
    monkeypatch.setattr(problems_tool, "_digest", lambda p, *rest: hashed.append(p) or digest(p, *rest))
    found = leaks_between_parts(scan(tmp_path))
    assert [(p.kind, {p.path, p.other}) for p in found] == [("leak", {"train/a/0.jpg", "test/a/copy.jpg"})]
    assert 4 <= len(hashed) < 26


# further folders, and the classes of an artifact

def test_further_folders_are_the_parts_that_they_are_given_as(tmp_path):
    lay(tmp_path / "train", "a", "b", n=5)
    lay(tmp_path / "elsewhere", "a", "b", n=2, seed=1)
    lay(tmp_path / "more", "a", "b", "c", n=3, seed=2)
    c = scan(tmp_path / "train", val=tmp_path / "elsewhere", test=tmp_path / "more")
    assert parts(c) == (10, 4, 6) and c.classes == ("a", "b") and kinds(c) == {"untrained class": 3}
    assert c.files[c.rows("val")[0]] == "../elsewhere/a/0.jpg"
    assert len(decode_once(c, 48, tmp_path / "cache").pixels) == 20
    only_val = scan(tmp_path / "train", val=str(tmp_path / "elsewhere"))
    assert parts(only_val) == (8, 4, 2) and all("elsewhere" in f for f in np.array(only_val.files)[only_val.rows("val")])
    assert parts(scan(tmp_path / "train", test=tmp_path / "more")) == (8, 2, 6)


def test_a_further_folder_may_lie_inside_and_counts_once(tmp_path):
    lay(tmp_path, "train/a", "train/b", "val/a", "val/b", n=5)
    c = scan(tmp_path, val=tmp_path / "val")
    assert parts(c) == (8, 10, 2)
    lay(tmp_path, "test/a", "test/b")
    refused(tmp_path, "has a test split already", test=lay(tmp_path / "other", "a", "b"))
    refused(tmp_path, "there is no such folder", test=tmp_path / "nowhere")
    refused(tmp_path / "val", "holds splits itself", test=tmp_path)


def test_a_link_as_root_does_not_mislead_further_folders(tmp_path):
    lay(tmp_path / "disk" / "train", "a", "b", n=5)
    lay(tmp_path / "val", "a", "b", n=2)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "train")
    c = scan(tmp_path / "link", val=tmp_path / "val")
    assert all((c.root / f).is_file() for f in c.files)


def test_the_classes_of_an_artifact_are_those_of_the_catalog(tmp_path):
    lay(tmp_path, "train/a", "train/b", "test/a", "test/b", "test/c", n=3)
    c = scan(tmp_path, divide=False, classes=["c", "b", "a"])
    assert c.classes == ("c", "b", "a") and parts(c) == (6, 0, 9) and not c.problems
    assert {c.files[i].split("/")[1]: int(c.labels[i]) for i in range(len(c))} == {"c": 0, "b": 1, "a": 2}
    shutil.rmtree(tmp_path / "train")
    assert parts(scan(tmp_path, divide=False, classes=["a", "b", "c", "d"])) == (0, 0, 9)
    refused(tmp_path, "'b' is unknown here", "(is it 'B'?)", divide=False, classes=["a", "B", "c"])


def test_paths_are_expanded_and_empty_ones_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lay(tmp_path / "set", "a", "b")
    assert len(scan("~/set")) == 8
    refused("", "the path is empty")


# the small inputs

READ = {"training_testing": (("glioma", "notumor"), (20, 4, 10)), "train_Testing": (("cats", "dogs"), (12, 4, 8)),
        "synology": (("elm", "oak"), (10, 2, 4)), "runs_dir": (("a", "b"), (10, 2, 4)), "mac_zip": (("a", "b"), (10, 2, 4)),
        "jfif": (("a", "b"), (10, 2, 4)), "avif": (("a", "b"), (8, 2, 2)), "noext": (("a", "b"), (2, 2, 0)), "heic": (("a", "b"), (2, 2, 0)),
        "mixed_heic": (("a", "b"), (26, 6, 8)), "mnist28": (("0", "1", "2"), (39, 9, 12)), "double_nested": (("a", "b"), (10, 2, 4)),
        "hard": (("a", "b", "c"), (39, 9, 12)), "nfd": (("café", "tea"), (12, 4, 4)), "tiny_imagenet": (("n01", "n02"), (10, 2, 4)),
        "numeric_classes": (("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"), (36, 12, 12)),
        "val_extra": (("a", "b"), (12, 4, 8)), "val_lacks": (("0", "180", "270", "90"), (24, 8, 12)),
        "test_unknown": (("a", "b"), (12, 4, 4)), "test_unlabelled": (("a", "b"), (12, 4, 4))}
SAID = {"runs_dir": {"passed over": 1}, "noext": {"untested": 2}, "heic": {"untested": 2}, "nfd": {"untrained class": 4},
        "tiny_imagenet": {"not an image": 1, "nested": 1, "no class": 6}, "val_extra": {"untrained class": 4},
        "test_unknown": {"untrained class": 5}, "test_unlabelled": {"no class": 5}}


@pytest.mark.parametrize("name", READ)
def test_small_inputs_are_read(name):
    c = scan(case(name))
    assert (c.classes, parts(c)) == READ[name] and kinds(c) == SAID.get(name, {})


@pytest.mark.parametrize("name, words", [
    ("dogs_vs_cats_flat", "look like splits, not classes"), ("val_only_no_train", "no train split here (16 val, 16 test)"),
    ("one_pic", "class 'c' holds a single image"), ("csv_inside_dir", "if labels.csv, which lies there, holds the labels, give that file")])
def test_small_inputs_are_refused_with_a_sentence(name, words):
    refused(case(name), words)


@pytest.mark.parametrize("name, left", [("noext", 4), ("avif", 12), ("jfif", 16), ("mac_zip", 16)])
def test_small_inputs_are_decoded(name, left, tmp_path):
    assert len(decode_once(scan(case(name)), 48, tmp_path).pixels) == left


def test_telephones_folders_without_the_extra(tmp_path):
    error = decoded_without_heif(case("heic"), tmp_path)
    assert len(error) == 1 and "4 .heic" in error[0] and error[0].count("sft_course[heic]") == 3
    left, *said = decoded_without_heif(case("mixed_heic"), tmp_path)
    assert left == "16" and len(said) == 24 and all("sft_course[heic]" in line for line in said)


def test_small_images_of_digits(tmp_path):
    found = find_problems(decode_once(scan(case("mnist28")), 48, tmp_path))
    assert Counter(p.kind for p in found)["small"] == 1


@pytest.mark.parametrize("name, text, says", [
    ("t.jsonl", "", "t.jsonl: there is nothing in it"),
    ("t.tsv", "a\tb\n1\t2\n", "t.tsv: its first line names no field text"),
    ("t.csv", "a,b\n1,2\n", "for texts, text,label"),
    ("t.xlsx", "PK", "t.xlsx: this is a file.*texts or chats as .csv")], ids=["empty", "no text", "other columns", "another kind"])
def test_a_file_that_holds_no_texts_is_told_what_it_should_hold(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SFTError, match=says):
        scan(tmp_path / name)
