"Folders that nobody has checked: nothing may be lost, nothing may lie, nothing may run code from a file."
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus import blob, bombs, corpus, encoded, lay_out
from PIL import Image

import sft_course.tools.pixels as pixels_tool
from sft_course.tools.catalog import LEFT_OUT, printable
from sft_course.tools.decoding import read_picture
from sft_course.tools.intake import scan
from sft_course.tools.pixels import decode_once
from sft_course.tools.problems import describe, find_problems
from sft_course.tools.settings import SFTError

SIZE = 48
NOTES = {"1x1": ("small",), "animated": ("animated",), "EXIF broken": ("broken EXIF",)}  # what is said of images that were kept


def sentence(e):
    "The one sentence of an error, checked for its form."
    text = str(getattr(e, "value", e))
    assert text.isprintable() and text.endswith(".") and len(text) < 1000, text
    return text


def explore(root, cache, **how):
    "What a person gets: the decoded images and everything that is said about the folder."
    found = decode_once(scan(root, **how), SIZE, cache)
    problems = found.catalog.problems + find_problems(found)
    for line in describe(found.catalog, problems, most=10**6):
        assert line.isprintable()
        line.encode()
    json.loads(json.dumps([vars(p) for p in problems]))
    return found, problems


def said(problems, path):
    return " ".join(p.message for p in problems if p.path == path)


def check_one(bad, path, found, problems, like):
    "What is wrong with the way a bad file was treated; empty if nothing is."
    at = found.catalog.files.index(path) if path in found.catalog.files else None
    out = [p for p in problems if p.path == path and p.kind in LEFT_OUT]
    text = said(problems, path)
    if (at is None) != (len(out) == 1):
        return f"kept: {at is not None}, named as left out: {len(out)} times"
    if bad.fate == "kept" and at is None or bad.fate == "out" and at is not None:
        return f"should be {bad.fate}: {text}"
    allowed = {"whole": 0, "block": 16 * 16 / (96 * 80) * 1.5}.get(bad.fate, 1)
    if at is not None and bad.like and (found.pixels[at] != like[bad.like]).any(-1).mean() > allowed:
        return "another image than that it was made from"
    if bad.says not in text or (out and printable(path) not in text) or "/tmp" in text:
        return f"says {text!r}"
    return ""


@pytest.fixture(scope="module")
def bad_files(times):
    files = list(corpus(np.random.default_rng(100), times))
    assert sum(b.fate != "kept" for b in files) >= 200 and len({b.name for b in files}) == len(files)
    return files


def put(root, files):
    "Write the files into the class folder `left`; what the file system does not take is returned."
    refused = []
    for b in files:
        try:
            (root / "left" / b.name).write_bytes(b.data)
        except OSError as e:
            refused.append((b, e.strerror))
    return refused


@pytest.fixture(scope="module")
def swamp(bad_files, tmp_path_factory):
    "A folder of 32 sound images and all the bad ones, and the files that could not be written here."
    root = lay_out(tmp_path_factory.mktemp("swamp") / "swamp")
    return root, put(root, bad_files)


def test_every_bad_file_is_named_or_a_whole_picture(swamp, bad_files, tmp_path, fault, monkeypatch):
    root, refused = swamp
    monkeypatch.chdir(tmp_path)
    found, problems = explore(root, tmp_path / "cache")
    like = {b.name.split(".", 1)[1]: read_picture(root / "left" / b.name, SIZE) for b in bad_files if b.fault == "sound"}
    wrong = {}
    for b, why in refused:
        fault.skip(b.fault, f"{printable(b.name)[:20]}: {why}")
    for b in bad_files:
        if b in [r for r, _ in refused]:
            continue
        path = f"left/{b.name}"
        if complaint := check_one(b, path, found, problems, like):
            wrong[b.name] = complaint
        told = [p.message for p in problems if p.path == path and (p.kind in LEFT_OUT or p.kind in NOTES.get(b.fault, ()))]
        fault.count(b.fault, not complaint, told[0] if told and b.says in told[0] else "")
    assert wrong == {}
    good = [f for f in found.catalog.files if "/good" in f]
    assert len(good) == 32 and all((found.pixels[found.catalog.files.index(f)] == read_picture(root / f, SIZE)).all() for f in good)
    assert list(tmp_path.glob("EXECUTED*")) == []


def run(cli, *args, cwd, **env):
    done = cli(*args, cwd=cwd, env=os.environ | env)
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr, done.stderr
    return done


def one_sentence(done):
    lines = [x for x in done.stderr.splitlines() if not x.startswith("tempfile.tif")]  # libtiff speaks for itself
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("sft-course: "), (done.returncode, done.stderr)
    return lines[0].removeprefix("sft-course: ")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_check_counts_and_names_them_in_every_encoding(swamp, cli, tmp_path, fault, encoding):
    root, _ = swamp
    with fault("the command check, on all of these") as f:
        done = run(cli, "check", root, "--json", cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        lines, told = done.stderr.splitlines(), json.loads(done.stdout)
        there = sum(1 for p in root.rglob("*") if p.is_file())
        assert told["n"] + sum(p["kind"] in LEFT_OUT for p in told["problems"]) == there
        assert all(f"{kind}: {n}" in lines for kind, n in told["kinds"].items())
        f.said(next(x.strip() for x in lines if x.startswith("unreadable: ")))


def few_of_each(files, n=2):
    seen = Counter()
    return [b for b in files if not seen.update([b.fault]) and seen[b.fault] <= n]


@pytest.fixture(scope="module")
def pond(bad_files, tmp_path_factory):
    "As the swamp, with two files of each fault only, for what takes longer."
    root = lay_out(tmp_path_factory.mktemp("pond") / "pond")
    put(root, few_of_each(bad_files))
    return root


def test_fit_goes_on_without_them_and_says_so(pond, cli, tmp_path, fault):
    with fault("the command fit, on two of each") as f:
        done = run(cli, "fit", pond, "--image-size", "64", "--out", "model", "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        lost = [p for p in told["problems"] if p["kind"] in LEFT_OUT]
        assert told["n_train"] + told["n_test"] + len(lost) == sum(1 for p in pond.rglob("*") if p.is_file())
        named = [p["message"].encode("ascii", "backslashreplace").decode() for p in told["problems"][:10]]
        assert all(f"note: {text}" in done.stderr for text in named)
        card = json.loads((tmp_path / "model" / "card.json").read_text())
        assert card["problems"] == told["problems"]
        f.said(lost[0]["message"])


@pytest.mark.parametrize("command", ["check", "fit"])
def test_strict_stops_with_one_sentence(pond, cli, tmp_path, fault, command):
    with fault("--strict") as f:
        text = one_sentence(run(cli, command, pond, "--strict", cwd=tmp_path))
        assert "would be left out" in text and re.search(r"\d+ unreadable|\d+ not an image", text)
        assert not (tmp_path / "pond-model").exists()
        f.said(text.replace(str(pond.parent) + "/", ""))
        clean = lay_out(tmp_path / "clean")
        scan(clean, strict=True)
        assert decode_once(scan(clean, strict=True), SIZE, tmp_path / "cache").catalog.problems == ()


def test_strict_names_each_fault(bad_files, tmp_path, fault):
    root = lay_out(tmp_path / "one", n=4)
    for b in few_of_each([b for b in bad_files if b.fate == "out"], 1):
        path = root / "left" / b.name
        path.write_bytes(b.data)
        with fault("--strict"), pytest.raises(SFTError, match=re.escape(printable(b.name))) as e:
            decode_once(scan(root, strict=True), SIZE, tmp_path / "cache")
        assert "1 would be left out" in sentence(e) and printable(b.name) in sentence(e)
        path.unlink()


LOOK = """
found = sft_course.tools.pixels.decode_once(sft_course.tools.intake.scan(sys.argv[1]), 48, sys.argv[2])
problems = found.catalog.problems + sft_course.tools.problems.find_problems(found)
print("\\n".join(sft_course.tools.problems.describe(found.catalog, problems)))
"""


def test_bombs_do_not_eat_the_memory(tmp_path, measured, fault):
    root = lay_out(tmp_path / "bombs")
    put(root, bombs(np.random.default_rng(0)))
    with fault("decompression bombs: memory") as f:
        done = measured(LOOK, root, tmp_path / "cache")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        megabytes = int(done.stdout.split()[-1])
        assert megabytes < 250, megabytes
        f.said(f"memory grew by {megabytes} MB")


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, measured, fault):
    root = lay_out(tmp_path / "large")
    for k in range(6):  # 20 million pixels each: 80 MB in PIL, and as much again for every copy
        Image.new("RGB", (5000, 4000), (k, 99, 0)).save(root / "left" / f"large{k}.png", compress_level=1)
    Image.new("L", (12_000, 9_000)).save(root / "left" / "phone.jpg")  # 108 million pixels, as telephones make them
    with fault("large images") as f:
        done = measured(LOOK, root, tmp_path / "cache")
        assert done.returncode == 0 and done.stderr == "" and "39 images" in done.stdout, done.stdout + done.stderr
        megabytes = int(done.stdout.split()[-1])
        assert megabytes < 350, megabytes
        f.said(f"memory grew by {megabytes} MB")


def test_nothing_in_a_file_is_run(tmp_path, fault, monkeypatch):
    "PIL starts Ghostscript for PostScript, whatever the file is called: here a program of that name leaves a mark."
    programs, mark = tmp_path / "bin", tmp_path / "mark"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    root = lay_out(tmp_path / "ps")
    eps = next(b for b in corpus(np.random.default_rng(0)) if b.name == "eps.jpg")
    put(root, [eps])
    code = "import sys; from PIL import Image; Image.init(); Image.open(sys.argv[1]).load()"
    subprocess.run([sys.executable, "-c", code, root / "left" / "eps.jpg"], capture_output=True)
    if not mark.exists():
        fault.skip("PostScript runs a program", "this PIL does not start Ghostscript")
        return
    mark.unlink()
    with fault("PostScript runs a program") as f:
        _, problems = explore(root, tmp_path / "cache")
        f.said(said(problems, "left/eps.jpg"))
        assert not mark.exists() and "PostScript" in said(problems, "left/eps.jpg")
        with pytest.raises(OSError):
            read_picture(root / "left" / "eps.jpg", SIZE)
        assert not mark.exists()


@pytest.fixture
def root(tmp_path):
    return lay_out(tmp_path / "set", n=8)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def link(root): os.symlink(root, root / "left" / "down")
def link_class(root): os.symlink(root, root / "all")
def link_up(root): os.symlink("..", root / "up")
def link_top(root): os.symlink("/", root / "everything")
def link_self(root): os.symlink("self.jpg", root / "left" / "self.jpg")
def link_pair(root): os.symlink("b.jpg", root / "left" / "a.jpg"), os.symlink("a.jpg", root / "left" / "b.jpg")
def link_nowhere(root): os.symlink("nowhere.jpg", root / "left" / "gone.jpg")
def link_folder(root): os.symlink(root / "right", root / "left" / "folder.jpg")
def link_zero(root): os.symlink("/dev/zero", root / "left" / "zero.jpg")
def pipe(root): os.mkfifo(root / "left" / "pipe.jpg")


def plug(root):
    here = os.getcwd()
    os.chdir(root / "left")  # a socket's path may have 100 characters only
    try:
        socket.socket(socket.AF_UNIX).bind("plug.jpg")
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make, path", [
    (link, "left/down"), (link_class, "all"), (link_up, "up"), (link_top, "everything"), (link_self, "left/self.jpg"),
    (link_pair, "left/a.jpg"), (link_nowhere, "left/gone.jpg"), (link_folder, "left/folder.jpg"), (link_zero, "left/zero.jpg"),
    (pipe, "left/pipe.jpg"), (plug, "left/plug.jpg")], ids=lambda x: getattr(x, "__name__", ""))
def test_links_in_circles_and_things_that_are_no_files(root, store, fault, make, path):
    make(root)
    with fault("symlink loops, dead links, pipes, sockets, devices") as f:
        found, problems = explore(root, store)
        assert len(found.catalog) == 16 and found.catalog.classes == ("left", "right")
        assert [p.kind for p in problems if p.path == path] == ["no file"], problems
        f.said(said(problems, path))
        with pytest.raises(SFTError, match="would be left out"):
            scan(root, strict=True)


def test_a_root_that_is_a_link_in_a_circle(tmp_path, fault):
    os.symlink("loop", tmp_path / "loop")
    with fault("symlink loops, dead links, pipes, sockets, devices") as f, pytest.raises(SFTError) as e:
        scan(tmp_path / "loop")
    f.said(sentence(e))


def test_links_to_files_and_class_folders_are_followed(root, tmp_path, store, fault):
    with fault("links that lead somewhere"):
        other = lay_out(tmp_path / "other", classes=("far",), n=5, seed=9)
        os.symlink(other / "far", root / "far")
        os.symlink(other / "far" / "good00.jpg", root / "left" / "linked.jpg")
        found, _ = explore(root, store)
        assert Counter(found.catalog.labels.tolist()) == {0: 5, 1: 9, 2: 8} and not any(p.kind in LEFT_OUT for p in found.catalog.problems)


@pytest.fixture
def shared():
    "A folder that another user may enter; pytest's own are closed to others."
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    (place / "store").mkdir()
    (place / "store").chmod(0o777)
    yield place
    subprocess.run(["chmod", "-R", "u+rwX", place])
    shutil.rmtree(place)


def test_permissions(shared, measured, fault):
    root, user = lay_out(shared / "set"), 65534 if os.getuid() == 0 else None
    (root / "closed").mkdir()
    for p, mode in ((root / "left" / "good03.jpg", 0), (root / "left" / "inner", 0o700), (root / "closed", 0)):
        if p.name == "inner":
            p.mkdir()
            shutil.copy(root / "left" / "good00.jpg", p / "hidden.jpg")
        p.chmod(mode)
    (root / "left" / "inner").chmod(0)
    with fault("no permission to read") as f:
        done = measured(LOOK, root, shared / "store", user=user)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        for text in ("left/good03.jpg cannot be read as an image (Permission denied)", "left/inner cannot be listed (Permission denied)",
                     "closed cannot be listed (Permission denied)", "31 images of 2 classes"):
            assert text in done.stdout, done.stdout
        f.said(next(x.strip() for x in done.stdout.splitlines() if "good03" in x))
    (root / "left" / "good03.jpg").chmod(0o644)
    with fault("no permission, then given: looked at again"):
        done = measured(LOOK, root, shared / "store", user=user)
        assert "32 images of 2 classes" in done.stdout and "good03" not in done.stdout, done.stdout + done.stderr
    (shared / "set.csv").write_text("path,label\n")
    for path in (shared / "set.csv", root):
        path.chmod(0)
        with fault("no permission to read") as f:
            done = measured("try: sft_course.tools.intake.scan(sys.argv[1])\nexcept sft_course.tools.settings.SFTError as e: print(e)", path, user=user)
            assert done.stderr == "" and "(Permission denied)" in done.stdout, done.stderr
            f.said(done.stdout.splitlines()[0].replace(str(shared) + "/", ""))


def deep(root, length):
    "An image at the end of folders whose names together are longer than `length`; made step by step, for no call takes such a path whole."
    fd, names = os.open(root / "left", os.O_RDONLY), []
    while sum(map(len, names)) < length:
        names.append("d" * 200)
        os.mkdir(names[-1], dir_fd=fd)
        fd, old = os.open(names[-1], os.O_RDONLY, dir_fd=fd), fd
        os.close(old)
    out = os.open("deep.jpg", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(out, encoded(blob(np.random.default_rng(5)), "JPEG"))
    os.close(out), os.close(fd)
    return "/".join(["left", *names, "deep.jpg"])


def test_paths_beyond_255_characters(root, store, fault):
    with fault("paths beyond 255 characters"):
        path = deep(root, 1000)
        found, _ = explore(root, store)
        assert path in found.catalog.files and len(found.catalog) == 17


def test_paths_that_no_call_takes(root, store, fault):
    with fault("paths beyond 4096 characters") as f:
        deep(root, 5000)
        found, problems = explore(root, store)
        assert len(found.catalog) == 16
        lost = [p for p in problems if p.kind in LEFT_OUT]
        assert len(lost) == 1 and "too long" in lost[0].message
        f.said(re.sub("d{50,}", "d…", lost[0].message.replace("/" + "d" * 200, "/d…", 1).replace("/" + "d" * 200, "")))


def test_class_folders_with_odd_names(tmp_path, store, fault):
    names = ["two\nlines", "🌻", "x" * 255, "with space", "-rf", os.fsdecode(b"\xff\xfe"), "train me", "\x1b[2J"]
    for k, name in enumerate(names):
        with fault("odd class names"):
            root = lay_out(tmp_path / str(k), classes=("left", name), n=3)
            found, problems = explore(root, store)
            assert set(found.catalog.classes) == {"left", name} and len(found.catalog) == 6
            assert not [p for p in problems if p.kind in LEFT_OUT]


def test_odd_class_names_and_roots_on_the_command_line(tmp_path, cli, fault):
    for name in (os.fsdecode(b"\xff\xfe set"), "two\nlines"):
        with fault("odd class names"):
            lay_out(tmp_path / name, classes=("left", name), n=3)
            for encoding in ("ascii", "utf-8"):
                done = run(cli, "check", tmp_path / name, "--json", cwd=tmp_path, PYTHONIOENCODING=encoding)
                assert done.returncode == 0 and name in json.loads(done.stdout.splitlines()[-1])["classes"]
        with fault("odd class names") as f:
            shutil.rmtree(tmp_path / name / "left")
            f.said(one_sentence(run(cli, "check", tmp_path / name, cwd=tmp_path)).replace(str(tmp_path) + "/", ""))


@pytest.mark.parametrize("pair", [("Ants", "ants"), tuple(unicodedata.normalize(f, "é") for f in ("NFC", "NFD")), ("STRASSE", "straße")])
def test_classes_that_differ_only_in_case(tmp_path, store, fault, pair):
    root = lay_out(tmp_path / "set", classes=(*pair, "bees"), n=4)
    if len(list(root.iterdir())) == 2:
        fault.skip("classes that differ only in case", "this file system takes them for one")
        return
    with fault("classes that differ only in case") as f:
        found, problems = explore(root, store)
        assert len(found.catalog.classes) == 3 and [p.kind for p in found.catalog.problems] == ["alike classes"]
        f.said(found.catalog.problems[0].message)
    shutil.rmtree(root)
    lay_out(root / "train", classes=(pair[0], "bees"), n=6)
    lay_out(root / "val", classes=(pair[1], "bees"), n=3, seed=1)
    with fault("classes that differ only in case, one in train, one in val") as f:
        found, problems = explore(root, store)
        assert len(found.catalog) == 15 and Counter(p.kind for p in problems) == {"untrained class": 3, "untested": 1}
        f.said(next(p.message for p in problems))
        assert "(is it " in problems[0].message
        with pytest.raises(SFTError, match="3 untrained class"):
            scan(root, strict=True)


def test_a_class_missing_from_one_split(tmp_path, store, fault):
    lay_out(tmp_path / "a" / "train", classes=("ants", "bees", "wasps"), n=6)
    lay_out(tmp_path / "a" / "val", classes=("ants", "bees"), n=3, seed=1)
    with fault("a class missing from val") as f:
        found, problems = explore(tmp_path / "a", store)
        assert found.catalog.classes == ("ants", "bees", "wasps") and [p.kind for p in problems] == ["untested"]
        f.said(problems[0].message)
    lay_out(tmp_path / "b" / "train", classes=("ants", "bees"), n=6)
    lay_out(tmp_path / "b" / "val", classes=("ants", "bees", "wasps"), n=3, seed=1)
    with fault("a class missing from train") as f:
        found, problems = explore(tmp_path / "b", store)
        assert found.catalog.classes == ("ants", "bees") and len(found.catalog) == 18
        assert {(p.kind, Path(p.path).parent.name) for p in problems} == {("untrained class", "wasps")} and len(problems) == 3
        f.said(problems[0].message)


def test_pictures_in_no_class_and_folders_beside_the_parts(tmp_path, store, fault):
    lay_out(tmp_path / "train", classes=("ants", "bees"), n=6)
    lay_out(tmp_path / "extra", classes=("ants",), n=1)
    for place in (tmp_path, tmp_path / "train"):
        shutil.copy(tmp_path / "extra" / "ants" / "good00.jpg", place / "loose.jpg")
    (tmp_path / "README.md").write_text("what this is")
    with fault("images in no class folder") as f:
        found, problems = explore(tmp_path, store)
        assert {p.path for p in problems} == {"loose.jpg", "train/loose.jpg", "extra"} and {p.kind for p in problems} == {"no class"}
        f.said(problems[0].message)


def remove(path): path.unlink()
def cut(path): path.write_bytes(path.read_bytes()[:-400])
def empty(path): path.write_bytes(b"")
def to_folder(path): path.unlink(), path.mkdir()
def to_pipe(path): path.unlink(), os.mkfifo(path)
def to_text(path): path.write_text("nothing")
def to_link(path): path.unlink(), path.symlink_to(path.name)


@pytest.mark.parametrize("change", [remove, cut, empty, to_folder, to_pipe, to_text, to_link], ids=lambda c: c.__name__)
def test_a_file_changes_between_scan_and_decode(root, store, fault, change):
    catalog = scan(root)
    change(root / "left" / "good03.jpg")
    with fault("changed or gone between scan and decode") as f:
        found = decode_once(catalog, SIZE, store)
        find_problems(found)
        assert len(found.catalog) == 15 and [p.path for p in found.catalog.problems] == ["left/good03.jpg"]
        f.said(found.catalog.problems[0].message)
        with pytest.raises(SFTError, match="good03.jpg"):
            decode_once(replace(catalog, strict=True), SIZE, store)


def test_a_file_becomes_another_picture_between_scan_and_decode(root, store, fault):
    catalog, path = scan(root), root / "left" / "good03.jpg"
    decode_once(catalog, SIZE, store)
    with fault("changed or gone between scan and decode"):
        path.write_bytes(encoded(Image.new("RGB", (90, 90), "red"), "JPEG"))
        found = decode_once(catalog, SIZE, store)
        assert (found.pixels[catalog.files.index("left/good03.jpg")] == read_picture(path, SIZE)).all()


@pytest.mark.parametrize("change", [remove, cut, empty, to_folder, to_text], ids=lambda c: c.__name__)
def test_a_file_changes_while_it_is_decoded(root, store, fault, monkeypatch, change):
    path = root / "left" / "good03.jpg"
    whole = path.read_bytes()

    def meanwhile(p, size, levels=None):
        x = read_picture(p, size)
        if p == path:
            change(p)
        return x

    monkeypatch.setattr(pixels_tool, "read_picture", meanwhile)
    with fault("changed or gone while it is decoded") as f:
        found = decode_once(scan(root), SIZE, store)
        assert len(found.catalog) == 15 and [p.kind for p in found.catalog.problems] == ["changed"]
        f.said(found.catalog.problems[0].message)
        monkeypatch.undo()
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
        assert len(decode_once(scan(root), SIZE, store).catalog) == 16


@pytest.mark.parametrize("change", [remove, cut, empty, to_folder, to_pipe, to_text], ids=lambda c: c.__name__)
def test_a_file_changes_after_it_was_decoded(root, store, fault, change):
    found = decode_once(scan(root), SIZE, store)
    change(root / "left" / "good03.jpg")
    with fault("changed or gone after it was decoded") as f:
        problems = find_problems(found)
        describe(found.catalog, problems)
        assert change is cut or [(p.path, p.kind) for p in problems] == [("left/good03.jpg", "changed")]
        f.said(problems[0].message if problems else "")


def test_everything_vanishes(root, store, fault):
    catalog = scan(root)
    shutil.rmtree(root)
    with fault("the whole folder gone") as f, pytest.raises(SFTError, match="none of the images can be read .16 .jpg.: left/good00.jpg") as e:
        decode_once(catalog, SIZE, store)
    f.said(sentence(e).replace(str(root.parent) + "/", ""))
    lay_out(root, n=8)
    found = decode_once(scan(root), SIZE, store)
    shutil.rmtree(root)
    with fault("the whole folder gone"):
        assert Counter(p.kind for p in find_problems(found)) == {"changed": 16}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"), MemoryError()],
                         ids=["disk", "open files", "memory"])
def test_what_fails_for_a_moment_is_not_remembered(root, store, fault, monkeypatch, error):
    def fails(p, size, levels=None):
        if p.name == "good03.jpg":
            raise error
        return read_picture(p, size)

    monkeypatch.setattr(pixels_tool, "read_picture", fails)
    with fault("fails for a moment (disk, memory, open files)") as f:
        found = decode_once(scan(root), SIZE, store)
        assert len(found.catalog) == 14 and {p.kind for p in found.catalog.problems} == {"unreadable"}
        f.said(found.catalog.problems[0].message)
        monkeypatch.undo()
        assert decode_once(scan(root), SIZE, store).catalog.problems == ()


def spoil_pixels(folder): cut(folder / "pixels.npy")
def spoil_list(folder): (folder / "left_out.json").write_text("{")
def spoil_kind(folder): (folder / "left_out.json").write_text('{"problems": [{"path": 1}], "passing": false}')
def spoil_type(folder): (folder / "left_out.json").write_text("[]")
def spoil_shape(folder): np.save(folder / "pixels.npy", np.zeros((3, 3)))
def spoil_code(folder): np.save(folder / "pixels.npy", np.array([{}], dtype=object), allow_pickle=True)
def spoil_all(folder): [p.unlink() for p in folder.iterdir()]
def spoil_empty(folder): (folder / "pixels.npy").write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_pixels, spoil_list, spoil_kind, spoil_type, spoil_shape, spoil_code, spoil_all, spoil_empty],
                         ids=lambda c: c.__name__)
def test_a_damaged_cache_is_made_anew(root, store, fault, spoil):
    (root / "left" / "text.jpg").write_text("nothing")
    one = decode_once(scan(root), SIZE, store)
    pixels = np.array(one.pixels)
    spoil(store / "pixels" / one.key)
    with fault("damaged cache of decoded images"):
        two = decode_once(scan(root), SIZE, store)
        assert (two.pixels == pixels).all() and two.catalog.problems == one.catalog.problems


def table(root, *paths, name="set.csv", label="left"):
    "A CSV of all images, and of `paths` besides."
    lines = [f'"{p.relative_to(root).as_posix()}",{p.parent.name}' for p in sorted(root.rglob("good*.jpg"))]
    (root / name).write_text("\n".join(["path,label", *lines, *(f'"{p}",{label}' for p in paths)]) + "\n")
    return root / name


SECRET = "a path in a CSV that leads out of its folder"


@pytest.mark.parametrize("path", ["../secret.jpg", "left/../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg", "C:\\secret.jpg",
                                  "\\\\host\\secret.jpg", "left/..", "./../secret.jpg", "~root/../../secret.jpg"])
def test_a_csv_cannot_name_what_lies_outside(root, fault, path):
    with fault(SECRET) as f, pytest.raises(SFTError, match="leads out of the folder of the CSV") as e:
        scan(table(root, path))
    f.said(sentence(e).replace(str(root.parent) + "/", ""))


@pytest.mark.parametrize("how", ["file", "folder", "chain"])
def test_a_csv_cannot_reach_outside_by_a_link(root, store, fault, how):
    outside = lay_out(root.parent / "outside", classes=("x",), n=1, seed=3) / "x"
    os.symlink(*{"file": (outside / "good00.jpg", root / "left" / "link.jpg"), "folder": (outside, root / "link"),
                 "chain": ("../inner/good00.jpg", root / "left" / "link.jpg")}[how])
    if how == "chain":
        os.symlink(outside, root / "inner")
    path = "link/good00.jpg" if how == "folder" else "left/link.jpg"
    with fault(SECRET) as f:
        found, problems = explore(table(root, path), store)
        assert [(p.path, p.kind) for p in problems] == [(path, "outside")] and len(found.catalog) == 16
        f.said(problems[0].message)


def test_a_csv_may_follow_links_inside_its_folder_and_lie_in_a_linked_one(root, store, fault):
    with fault("links that lead somewhere"):
        os.symlink("good00.jpg", root / "left" / "link.jpg")
        os.symlink(root, root.parent / "elsewhere")
        found, problems = explore(table(root.parent / "elsewhere", "left/link.jpg"), store)
        assert len(found.catalog) == 17 and not [p for p in problems if p.kind in LEFT_OUT]


@pytest.mark.parametrize("path, kind", [
    ("left/" + "x" * 300 + ".jpg", "missing"), ("left/a\nb.jpg", "missing"), ("d/" * 3000 + "x.jpg", "missing"),
    ("left/\U0001f33b.jpg", "missing"), ("left", "not an image"), ("left.jpg", "missing"), ("pipe.jpg", "missing"),
    ("left/good00.txt", "not an image"), ("left/nul\0.jpg", "missing")])
def test_odd_paths_in_a_csv(root, store, fault, path, kind):
    os.mkfifo(root / "pipe.jpg")
    (root / "left.jpg").mkdir()
    with fault("odd paths in a CSV") as f:
        try:
            found, problems = explore(table(root, path), store)
        except SFTError as e:  # before Python 3.11 a zero byte made the whole table unreadable
            assert "\0" in path and "no CSV" in sentence(e)
            return
        assert [p.kind for p in problems] == [kind] and len(found.catalog) == 16
        f.said(problems[0].message if len(problems[0].message) < 200 else "")


@pytest.mark.parametrize("content", [
    b"", b"\0" * 100, b"\xff\xfepath,label\n", b'path,label\n"left/good00.jpg,left\n', b"path,label\n" + b"x" * 200_000,
    b"path;label\nleft/good00.jpg;left\n", b"path,label\n,\n", b"\x89PNG\r\n\x1a\n", b"path,label\n" * 3], ids=range(9))
def test_a_csv_that_is_none(root, fault, content):
    (root / "set.csv").write_bytes(content)
    with fault("a file named .csv that is none") as f, pytest.raises(SFTError, match="set.csv") as e:
        scan(root / "set.csv")
    f.said(sentence(e).replace(str(root.parent) + "/", ""))


def test_roots_that_are_none(tmp_path, fault):
    os.mkfifo(tmp_path / "pipe"), os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe", "pipe.csv", "no\nwhere", "x" * 300, os.fsdecode(b"\xff"), "nul\0"):
        with fault("no folder at all") as f, pytest.raises(SFTError) as e:
            scan(tmp_path / name)
        f.said(sentence(e).replace(str(tmp_path) + "/", ""))


BIG = """
import time
start = time.perf_counter()
c = sft_course.tools.intake.scan(sys.argv[1])
print(len(c), len(c.problems), f"{time.perf_counter() - start:.2f}")
"""


def test_a_hundred_thousand_files(tmp_path, measured, fault, times):
    for c in "ab":
        (tmp_path / "many" / c).mkdir(parents=True)
    here = os.open(tmp_path / "many", os.O_RDONLY)
    for i in range(100_000):
        os.close(os.open(f"{'ab'[i % 2]}/IMG_{i:08}.{'txt' if i % 100 == 0 else 'jpg'}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    with fault("a folder of 100,000 files") as f:
        start = time.perf_counter()
        done = measured(BIG, tmp_path / "many")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        n, problems, seconds, megabytes = done.stdout.split()
        assert (n, problems) == ("99000", "1000") and float(seconds) < 30 and int(megabytes) < 200, done.stdout
        f.said(f"scanned in {seconds} s, memory grew by {megabytes} MB ({time.perf_counter() - start:.1f} s with Python's start)")
