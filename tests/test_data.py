import numpy as np
import pytest
from conftest import draw
from PIL import Image

from sft_course.core import SFTError
from sft_course.data import decode_once, decoded_size, hold_back, look, plain_view, random_view, read_picture, scan


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
    Image.fromarray((grey.astype(np.uint16) * 257)).save(tmp_path / "deep.png")
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
    with pytest.raises(SFTError, match="class 'waves' holds no picture to train on .12 could not be read"):
        decode_once(scan(stripes), 64, cache)


@pytest.mark.parametrize("size", [64, 96, 160, 192, 224])
def test_the_plain_view_is_the_central_crop(size):
    big = decoded_size(size)
    x = np.random.default_rng(0).integers(0, 256, (2, big, big, 3), dtype=np.uint8)
    m = (big - size) // 2
    assert (big - size) % 2 == 0
    seen = look(x, plain_view(2, size / big), size, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(seen - x[:, m:big - m, m:big - m]).max() < .1
    mirrored = look(x, plain_view(2, size / big, flip=True), size, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(mirrored[:, :, ::-1] - seen).max() < .1


def test_random_views_stay_inside_the_picture_and_do_not_depend_on_the_batch():
    theta = random_view(500, seed=1)
    reach = np.abs(theta[:, 0, 0]) + np.abs(theta[:, 0, 2])
    assert reach.max() <= 1 + 1e-6 and (theta[:, 0, 0] < 0).mean() == pytest.approx(.5, abs=.1)
    x = np.random.default_rng(0).integers(0, 256, (4, 72, 72, 3), dtype=np.uint8)
    whole, alone = look(x, theta[:4], 64, (.5,) * 3, (.5,) * 3), look(x[2:3], theta[2:3], 64, (.5,) * 3, (.5,) * 3)
    assert np.allclose(whole[2], alone[0], atol=1e-6)


def test_few_keeps_all_of_test_and_a_share_of_each_class(tmp_path):
    draw(tmp_path / "train", n=20)
    draw(tmp_path / "test", n=5)
    c = scan(tmp_path).few(10)
    assert len(c.rows("test")) == 10 and len(c.rows("train")) == 16 and len(c.rows("val")) == 4


def test_the_gif_among_the_photographs_is_named_and_kept(photos):
    c = scan(photos)
    assert [p.path for p in c.problems] == ["train/ants/imageNotFound.gif"] and "train/ants/imageNotFound.gif" in c.files
    assert len(c) == 398 and len(c.rows("test")) == 153
