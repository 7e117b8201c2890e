import os
import shutil
from time import process_time

import numpy as np
import pytest
from conftest import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sft_course.data import channel_stats, color_jitter, decoded_size, plain_view, random_colour, random_view, rotate, to_input
from sft_course.tools.copies import bits_apart, close_hashes, difference_hash
from sft_course.tools.decoding import read_picture
from sft_course.tools.intake import hold_back, scan
from sft_course.tools.pixels import decode_once
from sft_course.tools.problems import describe, find_problems
from sft_course.tools.settings import SFTError


def test_three_parts_of_a_folder_without_splits(stripes):
    c = scan(stripes, seed=3)
    assert sorted(set(c.part)) == ["test", "train", "val"] and len(c) == 24
    for part in ("train", "val", "test"):
        assert np.bincount(c.labels[c.rows(part)]).min() == np.bincount(c.labels[c.rows(part)]).max()
    again = scan(stripes, seed=3)
    assert (again.part == c.part).all() and (scan(stripes, seed=4).part != c.part).any()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "VAL"])
def test_the_users_split_is_the_one_to_report_on(tmp_path, name):
    draw(tmp_path / "train")
    draw(tmp_path / name, n=3)
    c = scan(tmp_path)
    assert all(f.startswith(name + "/") for f in np.array(c.files)[c.rows("test")]) and len(c.rows("test")) == 6
    assert len(c.rows("val")) == 4 and all(f.startswith("train/") for f in np.array(c.files)[c.rows("val")])


def test_with_val_and_test_val_is_to_choose_with(tmp_path):
    for name, n in (("train", 6), ("val", 2), ("test", 3)):
        draw(tmp_path / name, n=n)
    c = scan(tmp_path)
    assert [len(c.rows(p)) for p in ("train", "val", "test")] == [12, 4, 6]


def test_one_class_order_for_all_splits(tmp_path):
    draw(tmp_path / "train", classes=("b", "a", "c"))
    draw(tmp_path / "val", classes=("c", "a"), n=3)
    c = scan(tmp_path)
    assert c.classes == ("a", "b", "c")
    assert {f.split("/")[1]: c.classes[y] for f, y in zip(c.files, c.labels)} == {"a": "a", "b": "b", "c": "c"}


def test_an_empty_class_folder_is_named_and_left_out(stripes):
    (stripes / "dots").mkdir()
    c = scan(stripes)
    assert c.classes == ("stripes", "waves") and [p.kind for p in c.problems] == ["empty class"]


def test_hold_back_never_takes_all_of_a_class():
    assert hold_back(np.array([0, 0, 1, 1, 1]), .9, 0).tolist().count(False) == 2


def test_odd_modes_are_read_as_they_look(tmp_path):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(np.stack([grey] * 3, -1)).convert("CMYK").save(tmp_path / "cmyk.tif")
    plain = read_picture(tmp_path / "grey.png", 64)
    for name in ("deep.png", "palette.gif", "cmyk.tif"):
        assert np.abs(read_picture(tmp_path / name, 64).astype(int) - plain).max() <= 2, name
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 64) == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    x = np.zeros((64, 64, 3), np.uint8)
    x[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = read_picture(tmp_path / "turned.jpg", 64)
    assert seen[32, 60].mean() > 200 and seen[60, 32].mean() < 50


def test_decoding_twice_gives_the_same_pictures_and_a_changed_file_is_seen(stripes, cache):
    one = decode_once(scan(stripes), 64, cache)
    two = decode_once(scan(stripes), 64, cache)
    assert one.key == two.key and isinstance(two.pixels, np.memmap) and (one.pixels == two.pixels).all()
    Image.new("RGB", (90, 80), "red").save(stripes / "waves" / "00.jpg")
    three = decode_once(scan(stripes), 64, cache)
    assert three.key != one.key and (three.pixels != one.pixels).any()


def test_unreadable_pictures_keep_their_neighbours_in_place(stripes, cache):
    (stripes / "stripes" / "03.jpg").write_bytes(b"nothing")
    c = decode_once(scan(stripes), 64, cache)
    assert len(c.pixels) == len(c.catalog) == 23 and [p.path for p in c.catalog.problems] == ["stripes/03.jpg"]
    for i in (0, 5, 22):
        assert (c.pixels[i] == read_picture(stripes / c.catalog.files[i], 64)).all()


def test_a_class_that_cannot_be_read_at_all(stripes, cache):
    for path in (stripes / "waves").glob("*"):
        path.write_text("x")
    with pytest.raises(SFTError, match="class 'waves' holds no image to train on .12 could not be read"):
        decode_once(scan(stripes), 64, cache)


@pytest.mark.parametrize("size", [64, 96, 160, 192, 224])
def test_the_plain_view_is_the_central_crop(size):
    big = decoded_size(size)
    x = np.random.default_rng(0).integers(0, 256, (2, big, big, 3), dtype=np.uint8)
    m = (big - size) // 2
    assert (big - size) % 2 == 0
    seen = to_input(x, plain_view(2, size / big), size, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(seen - x[:, m:big - m, m:big - m]).max() < .1
    mirrored = to_input(x, plain_view(2, size / big, flip=True), size, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(mirrored[:, :, ::-1] - seen).max() < .1


def test_random_views_stay_inside_the_picture_and_do_not_depend_on_the_batch():
    theta = random_view(500, seed=1)
    reach = np.abs(theta[:, 0, 0]) + np.abs(theta[:, 0, 2])
    assert reach.max() <= 1 + 1e-6 and (theta[:, 0, 0] < 0).mean() == pytest.approx(.5, abs=.1)
    x = np.random.default_rng(0).integers(0, 256, (4, 72, 72, 3), dtype=np.uint8)
    whole, alone = to_input(x, theta[:4], 64, (.5,) * 3, (.5,) * 3), to_input(x[2:3], theta[2:3], 64, (.5,) * 3, (.5,) * 3)
    assert np.allclose(whole[2], alone[0], atol=1e-6)


def test_few_keeps_all_of_test_and_a_share_of_each_class(tmp_path):
    draw(tmp_path / "train", n=20)
    draw(tmp_path / "test", n=5)
    c = scan(tmp_path).sample_per_class(10)
    assert len(c.rows("test")) == 10 and len(c.rows("train")) == 16 and len(c.rows("val")) == 4


def test_the_gif_among_the_photographs_is_named_and_kept(photos):
    c = scan(photos)
    assert [p.path for p in c.problems] == ["train/ants/imageNotFound.gif"] and "train/ants/imageNotFound.gif" in c.files
    assert len(c) == 398 and len(c.rows("test")) == 153


def table(root, lines, name="pictures.csv"):
    "A CSV of the given lines beside the images."
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def listed(root, header="path,label"):
    return [header] + [f"{p.relative_to(root).as_posix()},{p.parent.name}" for p in sorted(root.rglob("*.jpg"))]


def test_a_csv_is_the_same_catalog_as_the_folder(stripes, cache):
    a, b = scan(stripes, seed=5), scan(table(stripes, listed(stripes)), seed=5)
    assert a.files == b.files and a.classes == b.classes
    assert (a.labels == b.labels).all() and (a.part == b.part).all()
    assert decode_once(a, 64, cache).key == decode_once(b, 64, cache).key


def test_the_parts_of_a_csv_count(stripes):
    lines = listed(stripes, "path,label,part")
    lines[1:] = [f"{line},{'Validation' if i % 4 == 0 else 'train'}" for i, line in enumerate(lines[1:])]
    c = scan(table(stripes, lines))
    assert len(c.rows("test")) == 6 and len(c.rows("val")) > 0


def test_a_byte_order_mark_spaces_blank_lines_and_a_line_twice_do_no_harm(stripes):
    lines = listed(stripes)
    lines[0], lines[3] = "\ufeff" + lines[0], lines[3].replace(",", " , ")
    assert len(scan(table(stripes, [*lines[:5], "", *lines[5:], lines[5]]))) == 24


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd.jpg", "waves/../../x.jpg", "..\\x.jpg", "C:\\x.jpg"])
def test_a_path_that_leads_out_of_the_csvs_folder_is_refused(stripes, path):
    with pytest.raises(SFTError, match="line 2: .* leads out of the folder"):
        scan(table(stripes, ["path,label", f"{path},waves", *listed(stripes)[1:]]))


@pytest.mark.parametrize("change, sentence", [
    (lambda x: ["file,class", *x[1:]], "must name the columns path,label"),
    (lambda x: [], "must name the columns path,label"),
    (lambda x: [x[0], "waves/00.jpg,"], "line 2: path or label is empty"),
    (lambda x: [*x, x[1].replace(",stripes", ",waves")], "keep one line of the two"),
    (lambda x: [x[0] + ",part", *[y + ",train" for y in x[1:]], "waves/00.jpg,waves,later"], "part 'later' is unknown"),
    (lambda x: [x[0], "a.jpg,a", "b.jpg,b"], "none of its 2 paths is an image"),
    (lambda x: [x[0], *x[1:13]], "only one class"),
])
def test_a_csv_that_is_wrong_says_where(stripes, change, sentence):
    with pytest.raises(SFTError, match=sentence):
        scan(table(stripes, change(listed(stripes))))


def test_a_csv_in_another_encoding(stripes):
    (stripes / "x.csv").write_bytes("path,label\nä,b".encode("latin1"))
    with pytest.raises(SFTError, match="no CSV in UTF-8"):
        scan(stripes / "x.csv")


def test_what_a_csv_names_and_is_not_there_or_no_picture_is_named(stripes, cache):
    file = table(stripes, [*listed(stripes), "waves/gone.jpg,waves", "waves/notes.txt,waves"])
    named = [(p.path, p.kind) for p in scan(file).problems]
    assert named == [("waves/gone.jpg", "missing"), ("waves/notes.txt", "not an image")]
    for p in (stripes / "waves").glob("*.jpg"):
        p.write_text("x")
    with pytest.raises(SFTError, match="12 could not be read, the first is waves/00.jpg"):
        decode_once(scan(file), 64, cache)


def textured(folder, n, size=120, seed=0):
    "Images that all differ: smooth random blobs."
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        x = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        x.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg", quality=92)


@pytest.fixture
def blobs(tmp_path):
    for seed, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
        textured(tmp_path / "blobs" / name, 8, seed=seed)
    return tmp_path / "blobs"


def findings(folder, cache):
    return {(p.kind, p.path, p.other) for p in find_problems(decode_once(scan(folder), 72, cache))}


def test_pictures_that_differ_are_no_copies(blobs, cache):
    assert findings(blobs, cache) == set()


def test_each_kind_of_copy_is_named_with_both_files(blobs, cache):
    a = blobs / "train" / "a"
    shutil.copy(a / "00.jpg", a / "again.jpg")
    ImageOps.mirror(Image.open(a / "01.jpg")).resize((90, 90)).save(a / "mirrored.jpg", quality=50)
    Image.open(a / "02.jpg").save(blobs / "val" / "a" / "leak.png")
    shutil.copy(a / "03.jpg", blobs / "train" / "b" / "moved.jpg")
    found = {(k, *sorted((p, o))) for k, p, o in findings(blobs, cache)}
    assert ("leak", "train/a/02.jpg", "val/a/leak.png") in found  # other pairs may be leaks: some of train is held back
    assert {f[1:] for f in found} == {
        ("train/a/00.jpg", "train/a/again.jpg"), ("train/a/01.jpg", "train/a/mirrored.jpg"),
        ("train/a/02.jpg", "val/a/leak.png"), ("train/a/03.jpg", "train/b/moved.jpg")}
    assert ("two labels", "train/a/03.jpg", "train/b/moved.jpg") in found
    assert {f[0] for f in found} <= {"leak", "two labels", "duplicate", "near duplicate"}


def test_a_thousand_copies_of_one_picture_are_a_thousand_problems_not_a_million(blobs, cache):
    for i in range(300):
        os.link(blobs / "train" / "a" / "00.jpg", blobs / "train" / "a" / f"copy{i:03}.jpg")
    assert len([f for f in findings(blobs, cache) if "copy" in f[1]]) <= 600


def test_blank_small_elongated_rare_and_untested(tmp_path, cache):
    textured(tmp_path / "train" / "many", 40)
    textured(tmp_path / "train" / "rare", 3, seed=1)
    textured(tmp_path / "val" / "many", 3, seed=2)
    Image.new("RGB", (120, 120), (240, 240, 238)).save(tmp_path / "train" / "many" / "blank.png")
    Image.new("RGB", (120, 120), "white").save(tmp_path / "train" / "many" / "blank2.png")
    Image.effect_noise((20, 20), 80).save(tmp_path / "train" / "many" / "tiny.png")
    Image.effect_noise((400, 100), 80).save(tmp_path / "train" / "many" / "strip.png")
    assert {f[:2] for f in findings(tmp_path, cache)} == {
        ("blank", "train/many/blank.png"), ("blank", "train/many/blank2.png"), ("small", "train/many/tiny.png"),
        ("elongated", "train/many/strip.png"), ("imbalance", "rare"), ("untested", "rare")}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 11))
def test_close_hashes_finds_exactly_the_pairs_within_reach(seed, reach):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 1 << 63, 60, dtype=np.uint64)
    flips = [sum(1 << int(k) for k in rng.choice(64, rng.integers(0, 16), False)) for _ in a]
    b = a ^ np.array(flips, dtype=np.uint64)
    apart = np.array([[bin(int(x) ^ int(y)).count("1") for y in b] for x in a])
    assert (close_hashes(a, b, reach) == np.argwhere(apart <= reach)).all()
    assert (bits_apart(a, b) == apart.diagonal()).all()


@pytest.mark.slow
def test_hashing_a_hundred_thousand_pictures_is_not_quadratic():
    h = np.random.default_rng(0).integers(0, 1 << 63, 100_000, dtype=np.uint64)
    start = process_time()
    assert len(close_hashes(h, h)) >= 100_000
    assert process_time() - start < 60


def test_the_hash_of_a_mirror_image():
    x = np.random.default_rng(0).integers(0, 256, (5, 72, 72, 3), dtype=np.uint8)
    bits, mirrored = (np.unpackbits(difference_hash(v)[:, None].view(np.uint8), axis=1).reshape(5, 8, 8)
                      for v in (x, x[:, :, ::-1]))
    assert (mirrored == 1 - bits[:, :, ::-1]).all()
    assert difference_hash(x[:0]).shape == (0,)


def test_the_report_names_everything_and_is_short_where_there_is_much(blobs, cache):
    for i in range(30):
        (blobs / "train" / "a" / f"note{i}.txt").write_text("x")
    c = scan(blobs)
    lines = describe(c, c.problems, most=5)
    assert lines[0].startswith("32 images of 2 classes")
    assert "not an image: 30" in lines and lines[-1] == "  … and 25 more"
    assert describe(c)[-1] == "nothing was found wrong"


def test_the_photographs_hold_an_odd_gif_and_no_copies(photos, cache):
    c = decode_once(scan(photos), 110, cache)
    assert {(p.kind, p.path) for p in c.catalog.problems + find_problems(c)} == {
        ("odd format", "train/ants/imageNotFound.gif"), ("elongated", "train/ants/662541407_ff8db781e7.jpg")}


@pytest.mark.parametrize("n", [1, 3, 300])
def test_channel_stats_are_exact(n):
    x = np.random.default_rng(n).integers(0, 256, (n, 7, 7, 3), dtype=np.uint8)
    mean, std = channel_stats(x)
    assert np.allclose(mean, (x / 255).mean((0, 1, 2)), atol=1e-12)
    assert np.allclose(std, (x / 255).std((0, 1, 2)), atol=1e-12)


def test_turning_twice_by_a_half_is_nothing_and_colours_do_not_depend_on_the_batch():
    theta = random_view(50, 0)
    assert np.allclose(rotate(rotate(theta, np.full(50, 180.)), np.full(50, 180.)), theta, atol=1e-5)
    x = np.random.default_rng(0).integers(0, 256, (4, 72, 72, 3), dtype=np.uint8)
    mean, std, colour = (.4, .5, .6), (.2, .3, .2), random_colour(4, 1)
    whole = color_jitter(to_input(x, plain_view(4, 1.), 64, mean, std), colour, mean, std)
    alone = color_jitter(to_input(x[2:3], plain_view(1, 1.), 64, mean, std), colour[2:3], mean, std)
    assert np.allclose(whole[2], alone[0], atol=1e-5)
    shown = whole.numpy() * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
    assert shown.min() >= -1e-5 and shown.max() <= 1 + 1e-5
