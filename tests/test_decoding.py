"Images are known by content, read from any source, scaled by one rule; copies are named in groups; the cache has a budget."
import errno
import json
import os
import shutil
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from conftest import REPO
from PIL import Image, ImageFile

import sft_course.tools.decoding as decoding_tool
import sft_course.tools.pixels as pixels_tool
import sft_course.tools.problems as problems_tool
from sft_course.tools.budget import cache_summary, clear_cache, evict, free_memory, require_memory
from sft_course.tools.catalog import LEFT_OUT, Catalog
from sft_course.tools.decoding import read_picture
from sft_course.tools.finder import FoundRate
from sft_course.tools.intake import scan
from sft_course.tools.pixels import PixelCache, decode_once
from sft_course.tools.problems import find_leaks, find_problems
from sft_course.tools.settings import SFTError

CASES = REPO.parent / "shared" / "cases"


@pytest.fixture
def case():
    def find(name):
        if not (CASES / name).is_dir():
            pytest.skip("the cases are not here")
        return CASES / name
    return find


# ---- what an image is read from


@pytest.fixture
def photo(case):
    return case("hard") / "a" / "0.jpg"


def test_every_source_gives_the_same_pixels(photo):
    want = read_picture(photo, 48)
    with Image.open(photo) as im, open(photo, "rb") as f:
        for source in (str(photo), photo.read_bytes(), BytesIO(photo.read_bytes()), f, im, np.asarray(im)):
            assert (read_picture(source, 48) == want).all(), type(source)


def test_an_image_that_was_given_stays_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60), "red").save(tmp_path / "turned.jpg", exif=exif)
    im = Image.open(tmp_path / "turned.jpg")
    seen = [read_picture(im, 32) for _ in range(2)]
    assert (seen[0] == seen[1]).all() and im.size == (40, 60) and im.getexif()[0x0112] == 6
    assert im.getpixel((0, 0))[0] > 200


def test_arrays_grey_rgb_and_rgba():
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    assert (read_picture(x[..., 0], 32) == x[..., :1]).all() and (read_picture(x[..., :3], 32) == x[..., :3]).all()
    clear = np.zeros((32, 32, 4), np.uint8)
    assert (read_picture(clear, 32) == 255).all()
    deep = np.linspace(100, 900, 32 * 32).reshape(32, 32)
    assert np.ptp(read_picture(deep.astype(np.uint16), 32)) == 255 == np.ptp(read_picture(deep.astype(np.float32), 32))
    for wrong in (x[..., :2], x[None], x[:0], x.astype(float), np.zeros((3, 3), object)):
        with pytest.raises(SFTError, match=r"is no image; give uint8 \(h, w\)"):
            read_picture(wrong, 32)


def test_bytes_are_checked_as_files_are(photo):
    whole = photo.read_bytes()
    with pytest.raises(ValueError, match="cut off"):
        read_picture(whole[:len(whole) // 2] + b"\xff\xd9", 48)
    with pytest.raises(OSError):
        read_picture(b"", 48)
    Image.fromarray(np.asarray(Image.open(photo))).save(png := BytesIO(), "PNG")
    damaged = bytearray(png.getvalue())
    damaged[damaged.rindex(b"IEND") - 8] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        read_picture(bytes(damaged), 48)


def test_cut_files_are_errors_whatever_the_host_asked_for(stripes, tmp_path, monkeypatch):
    path = stripes / "waves" / "03.jpg"
    path.write_bytes(path.read_bytes()[:1200])
    sound = decode_once(scan(stripes), 48, tmp_path / "a")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    asked = decode_once(scan(stripes), 48, tmp_path / "b")
    assert asked.key == sound.key and [p.path for p in asked.catalog.problems] == ["waves/03.jpg"]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with pytest.raises(OSError):
        read_picture(path, 48)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_hosts_choice_comes_back_after_many_threads(stripes, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    file, seen = stripes / "waves" / "00.jpg", []

    def read():
        for _ in range(20):
            with decoding_tool._whole_images_only():
                seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)
                read_picture(file, 32)
                seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)
    threads = [threading.Thread(target=read) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert set(seen) == {False} and len(seen) == 160 and ImageFile.LOAD_TRUNCATED_IMAGES is True


# ---- greys of more than 8 bits


def deep_folder(root, save, n=4, top=4095):
    "Two classes of 12-bit greys that differ in exposure; the same in 8 bits beside them."
    rng = np.random.default_rng(0)
    for c, exposure in (("dark", .4), ("light", 1.)):
        for kind in ("deep", "flat"):
            (root / kind / c).mkdir(parents=True)
        for i in range(n):
            x = rng.random((40, 40)) * exposure
            x[0, 0], x[0, 1] = 0, exposure
            save(np.round(x * top), root / "deep" / c / f"{i}.{'png' if save is as_png else 'tif'}")
            Image.fromarray(np.round(x * 255).astype(np.uint8)).save(root / "flat" / c / f"{i}.png")
    return root


def as_png(x, path):
    Image.fromarray(x.astype(np.uint16)).save(path)


def as_int(x, path):
    Image.fromarray(x.astype(np.int32)).save(path)


def as_float(x, path):
    Image.fromarray(x.astype(np.float32)).save(path)


@pytest.mark.parametrize("save", [as_png, as_int, as_float])
def test_deep_greys_are_scaled_by_the_range_of_the_data_set(tmp_path, save):
    root = deep_folder(tmp_path, save)
    deep, flat = (decode_once(scan(root / k), 40, tmp_path / "cache") for k in ("deep", "flat"))
    assert deep.levels == (0., 4095.) and flat.levels is None
    assert np.abs(deep.pixels.astype(int) - flat.pixels).max() <= 1
    note, = deep.catalog.problems
    assert note.kind == "deep greys" and note.path == "dark/0." + ("png" if save is as_png else "tif")
    assert "one of 8 images" in note.message and "0 became black and 4095 white" in note.message
    assert note.kind not in LEFT_OUT and flat.catalog.problems == ()
    strict = decode_once(scan(root / "deep", strict=True), 40, tmp_path / "cache")
    assert strict.key == deep.key and strict.levels == deep.levels


def test_levels_that_are_given_count(tmp_path):
    root = deep_folder(tmp_path, as_png)
    shutil.copytree(root / "deep" / "dark", root / "asked" / "x")
    learned = decode_once(scan(root / "deep"), 40, tmp_path / "cache")
    asked = scan(root / "asked", divide=False)
    own = decode_once(asked, 40, tmp_path / "cache", to_learn=False)
    given = decode_once(asked, 40, tmp_path / "cache", to_learn=False, levels=learned.levels)
    rows = [learned.catalog.files.index(f"dark/{i}.png") for i in range(4)]
    assert own.levels != given.levels == learned.levels and own.key != given.key
    assert (given.pixels == learned.pixels[rows]).all() and (own.pixels > given.pixels).mean() > .9
    again = decode_once(asked, 40, tmp_path / "cache", to_learn=False)
    assert again.key == own.key and (again.pixels == own.pixels).all()
    assert (given.pixels[1] == read_picture(root / "asked" / "x" / "1.png", 40, learned.levels)).all()
    same = decode_once(scan(root / "deep"), 40, tmp_path / "cache", levels=learned.levels)
    assert same.key == learned.key
    flat = decode_once(scan(root / "flat"), 40, tmp_path / "cache", levels=(0, 9))
    assert flat.levels is None and flat.key == decode_once(scan(root / "flat"), 40, tmp_path / "cache").key


def test_a_deep_image_of_one_grey_and_one_without_numbers(tmp_path):
    Image.fromarray(np.full((30, 30), 700, np.uint16)).save(tmp_path / "even.png")
    Image.fromarray(np.full((30, 30), np.nan, np.float32)).save(tmp_path / "none.tif")
    assert (read_picture(tmp_path / "even.png", 20) == 0).all()
    for levels in (None, (0, 1)):
        with pytest.raises(ValueError, match="holds no number"):
            read_picture(tmp_path / "none.tif", 20, levels)


# ---- identity by content


def bitmaps(root, n=8):
    "Bitmaps of one size with one time, as an archive unpacks them: class red and class blue, the first two of each exchanged."
    for c, colour in (("blue", (0, 0, 220)), ("red", (220, 0, 0))):
        (root / c).mkdir(parents=True)
        for i in range(n):
            x = np.random.default_rng(i).integers(0, 30, (48, 48, 3)) + np.array(colour)
            Image.fromarray(x.astype(np.uint8)).save(root / c / f"{i}.bmp")
    for i in range(2):
        exchange(root, i)
    for f in root.rglob("*.bmp"):
        os.utime(f, (1_700_000_000,) * 2)
    return root


def exchange(root, i):
    (root / "red" / f"{i}.bmp").rename(root / "t")
    (root / "blue" / f"{i}.bmp").rename(root / "red" / f"{i}.bmp")
    (root / "t").rename(root / "blue" / f"{i}.bmp")


@pytest.mark.parametrize("settled", [True, False])
def test_files_exchanged_by_mv_are_other_data(tmp_path, monkeypatch, settled):
    monkeypatch.setattr(pixels_tool._Asked, "settled", settled)
    root = bitmaps(tmp_path / "bmp")
    before = decode_once(scan(root), 48, tmp_path / "cache")
    was = np.array(before.pixels)
    for i in range(2):
        exchange(root, i)
    after = decode_once(scan(root), 48, tmp_path / "cache")
    assert after.key != before.key and (after.pixels != was).any()
    assert (after.pixels == decode_once(scan(root), 48, tmp_path / "fresh").pixels).all()
    red = np.array([f.startswith("red") for f in after.catalog.files])
    assert (after.pixels[red][..., 0] > 200).all() and (after.pixels[~red][..., 0] < 100).all()


def test_a_copy_elsewhere_is_the_same_data_and_not_decoded_again(stripes, tmp_path, monkeypatch):
    here = decode_once(scan(stripes), 48, tmp_path / "cache")
    shutil.copytree(stripes, tmp_path / "moved")
    monkeypatch.setattr(pixels_tool, "read_picture", lambda *a: pytest.fail("decoded twice"))
    there = decode_once(scan(tmp_path / "moved"), 48, tmp_path / "cache")
    assert there.key == here.key and (there.pixels == here.pixels).all() and there.digests == here.digests
    for f in (tmp_path / "moved").rglob("*.jpg"):
        os.utime(f)
    assert decode_once(scan(tmp_path / "moved"), 48, tmp_path / "cache").key == here.key


def test_the_quick_check_reads_no_file(stripes, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels_tool._Asked, "settled", True)
    key = decode_once(scan(stripes), 48, tmp_path / "cache").key
    monkeypatch.setattr(pixels_tool, "_digest", lambda *a: pytest.fail("read again"))
    assert decode_once(scan(stripes), 48, tmp_path / "cache").key == key


def test_a_file_rewritten_in_place_with_its_old_time_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels_tool._Asked, "settled", True)
    root = bitmaps(tmp_path / "bmp")
    before = decode_once(scan(root), 48, tmp_path / "cache")
    path = root / "red" / "5.bmp"
    whole, s = path.read_bytes(), os.stat(path)
    path.write_bytes(whole[:-100] + bytes(100))
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert decode_once(scan(root), 48, tmp_path / "cache").key != before.key


def test_runs_that_lose_different_files_for_a_moment_have_different_keys(stripes, tmp_path, monkeypatch):
    keys = []
    for name in ("03.jpg", "05.jpg", None):
        def fails(path, size, levels=None, name=name):
            if path.name == name:
                raise OSError(errno.EIO, "Input/output error")
            return read_picture(path, size, levels)
        monkeypatch.setattr(pixels_tool, "read_picture", fails)
        found = decode_once(scan(stripes), 48, tmp_path / "cache")
        assert len(found.catalog) == (24 if name is None else 22)
        keys.append(found.key)
    assert len(set(keys)) == 3 and decode_once(scan(stripes), 48, tmp_path / "cache").key == keys[-1]


def test_a_cache_that_may_only_be_read_serves(stripes, tmp_path, monkeypatch):
    key = decode_once(scan(stripes), 48, tmp_path / "cache").key

    def refused(*a, **k):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(pixels_tool.os, "utime", refused)
    monkeypatch.setattr(Path, "touch", refused)
    assert decode_once(scan(stripes), 48, tmp_path / "cache").key == key


def test_catalogs_can_be_compared_and_hashed(stripes, tmp_path):
    a, b = scan(stripes), scan(stripes)
    pixels = decode_once(a, 48, tmp_path)
    assert a == a and a != b and len({a, b, a}) == 2
    assert pixels == pixels and pixels != decode_once(a, 48, tmp_path) and hash(pixels) == hash(pixels)


# ---- a budget


def test_what_was_not_used_for_longest_goes_first(stripes, tmp_path):
    c = scan(stripes)
    for k, size in enumerate((30, 31, 32)):
        found = decode_once(c, size, tmp_path)
        os.utime(tmp_path / "pixels" / found.key, (k, k))
    decode_once(c, 30, tmp_path)
    one = 32 * 32 * 3 * 24
    assert evict(tmp_path, 2.5 * one) > 0
    left = {np.load(f, mmap_mode="r").shape[1] for f in (tmp_path / "pixels").glob("*/pixels.npy")}
    assert left == {30, 32} and evict(tmp_path, 2.5 * one) == 0
    decode_once(c, 33, tmp_path, budget_bytes=1)
    left = {np.load(f, mmap_mode="r").shape[1] for f in (tmp_path / "pixels").glob("*/pixels.npy")}
    assert left == {33}  # what is in use stays, however small the budget


def test_the_summary_counts_and_clearing_spares_what_is_not_ours(stripes, tmp_path):
    decode_once(scan(stripes), 32, tmp_path)
    for place in ("pixels/mine", "activations", "blooms/garden"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "pixels" / "mine" / "a.txt").write_text("mine")
    (tmp_path / "activations" / ("0" * 24 + ".npy")).write_bytes(bytes(500))
    (tmp_path / "activations" / "thesis.npy").write_bytes(bytes(7))
    (tmp_path / "blooms" / "garden" / "a.png").write_bytes(bytes(9))
    (tmp_path / "pixels" / ".new-old").mkdir()
    rows = {r["kind"]: r for r in cache_summary(tmp_path)}
    assert set(rows) == {"pixels", "activations", "blooms"} and rows["activations"] == {"kind": "activations", "files": 2, "bytes": 507}
    before = sum(r["bytes"] for r in rows.values())
    freed = clear_cache(tmp_path)
    assert freed == before - 4 - 7 - 9 == before - sum(r["bytes"] for r in cache_summary(tmp_path))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(stripes)} == {"a.txt", "thesis.npy", "a.png"}
    assert not (tmp_path / "pixels" / ".new-old").exists() and cache_summary(tmp_path / "none") == [] and clear_cache(tmp_path / "none") == 0


def test_what_a_killed_run_left_goes_after_a_day(tmp_path):
    for name, age in ((".new-old", 1), (".new-now", None)):
        (tmp_path / "pixels" / name).mkdir(parents=True)
        (tmp_path / "pixels" / name / "raw").write_bytes(bytes(100))
        if age:
            os.utime(tmp_path / "pixels" / name, (age, age))
    assert evict(tmp_path, 1e9) == 100 and [p.name for p in (tmp_path / "pixels").iterdir()] == [".new-now"]


def test_a_disk_or_a_memory_that_is_too_small_is_refused_by_arithmetic(stripes, tmp_path, monkeypatch):
    with pytest.raises(SFTError, match="size = 1000000: 1 images .* need 12000.0 GB of memory, and .*; use a smaller size"):
        require_memory(1, 1_000_000)
    assert require_memory(1, 192) is None and 1e6 < free_memory() < 1e15
    with pytest.raises(SFTError, match="need 20.0 GB"):
        require_memory(10, 64, bytes_each=2e9, free=16e9)
    monkeypatch.setattr(pixels_tool, "read_picture", lambda *a: pytest.fail("tried"))
    with pytest.raises(SFTError, match="No space left on device: they take 144.00 GB .*; make room"):
        monkeypatch.setattr(pixels_tool.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**12, 0, 10**9))
        decode_once(scan(stripes), 31623, tmp_path)
    with pytest.raises(SFTError, match="size = 0: not allowed"):
        decode_once(scan(stripes), 0, tmp_path)


# ---- copies, in groups


def shown(kind, n, seed=0):
    "n images of 64 × 64 that look alike (aligned radiographs), of which each tenth of the last hundred is a copy."
    rng = np.random.default_rng(seed)
    def smooth(cells, top):
        return np.asarray(Image.fromarray(rng.integers(0, top, (cells, cells), dtype=np.uint8)).resize((64, 64), Image.BICUBIC)).astype(float)
    base = smooth(6, 200)
    x = np.stack([base + (smooth(9, 50) if kind == "tissue" else rng.normal(0, 25, (64, 64))) for _ in range(n)])
    x[n - 100::10] = x[:10] + 3
    return np.repeat(x.clip(0, 255).astype(np.uint8)[..., None], 3, 3)


@pytest.mark.parametrize("kind", ["tissue", "noise"])
def test_three_thousand_aligned_look_alikes(kind):
    n = 3000
    c = Catalog(Path("nowhere"), ("a", "b"), tuple(f"{k}.png" for k in range(n)), np.arange(n) % 2, np.array(["train", "val", "test"])[np.arange(n) % 3])
    cache = PixelCache(c, shown(kind, n), "", digests=tuple(map(str, range(n))))
    start = process_time()
    found = problems_tool._copies(cache)
    assert process_time() - start < 20
    assert len(found) < 50 and len(json.dumps([vars(p) for p in found])) < 50_000
    crowd, = (p for p in found if p.kind == "look-alikes")
    assert "is one of 3000 images that look much alike (1000 train, 1000 val, 1000 test)" in crowd.message
    pairs = {(p.other, p.path) for p in found if p.kind in ("leak", "two labels", "near duplicate")}
    assert {(f"{k}.png", f"{n - 100 + 10 * k}.png") for k in range(10)} == pairs


def blobs(folder, n, seed=0):
    "Images that all differ, of the classes stripes and waves."
    rng = np.random.default_rng(seed)
    for name in ("stripes", "waves"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            x = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            x.resize((80, 80), Image.BICUBIC).save(folder / name / f"{i:02}.jpg", quality=92)


def test_a_group_is_one_problem_of_each_kind(tmp_path):
    blobs(tmp_path / "train", n=3)
    blobs(tmp_path / "val", n=3, seed=1)
    for i in range(5):
        shutil.copy(tmp_path / "train" / "waves" / "00.jpg", tmp_path / "train" / "waves" / f"copy{i}.jpg")
    shutil.copy(tmp_path / "train" / "waves" / "00.jpg", tmp_path / "val" / "stripes" / "moved.jpg")
    found = decode_once(scan(tmp_path), 48, tmp_path / "cache")
    told = [p for p in find_problems(found) if p.other]
    assert Counter(p.kind for p in told) == {"leak": 1, "two labels": 1}
    labels = next(p for p in told if p.kind == "two labels")
    assert labels.path == "val/stripes/moved.jpg" and "5 more are alike" in labels.message and "is the same file as" in labels.message
    assert {p.kind for p in find_leaks(found)} == {"leak", "two labels"}


def test_copies_within_training_are_no_leak(tmp_path):
    blobs(tmp_path / "train", n=6)
    blobs(tmp_path / "val", n=3, seed=1)
    blobs(tmp_path / "test", n=3, seed=2)
    shutil.copy(tmp_path / "train" / "waves" / "00.jpg", tmp_path / "train" / "waves" / "again.jpg")
    found = decode_once(scan(tmp_path), 48, tmp_path / "cache")
    assert [p.kind for p in find_problems(found) if p.other] == ["duplicate"] and find_leaks(found) == ()


# ---- what is true of all is said once


def test_panoramas_are_named_once(case, tmp_path):
    root = case("panorama")
    found = find_problems(decode_once(scan(root), 72, tmp_path))
    long = [p for p in found if p.kind == "elongated"]
    assert len(long) == 1 and "so it is with 16 of the 16 images" in long[0].message and "central square" in long[0].message


def test_where_all_are_small_none_is_smaller_than_the_others(case, tmp_path):
    root = case("mnist28")
    small = [p for p in find_problems(decode_once(scan(root), 72, tmp_path)) if p.kind == "small"]
    assert len(small) == 1 and "far less" not in small[0].message and "28 × 28" in small[0].message


def test_the_hard_images_are_read_and_hold_no_copies(case, tmp_path):
    found = decode_once(scan(case("hard")), 72, tmp_path)
    assert len(found.catalog) == 60 and found.levels is None and find_leaks(found) == ()
    assert not [p for p in find_problems(found) if p.kind in ("small", "elongated", "blank", "changed")]


def test_a_rate_that_was_found_can_be_compared_and_hashed():
    a, b = (FoundRate(np.arange(3.), np.arange(3.), 1., "by hand") for _ in range(2))
    assert a == a and a != b and len({a, b, a}) == 2
