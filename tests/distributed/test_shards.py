"Predictions in shards: a run that is killed goes on, and every file is there exactly once."
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from sft_course.tools.sharded_predict import read_shards

from .conftest import command


@pytest.fixture
def model(one):
    return one[0]


def draw_many(folder, n):
    folder.mkdir()
    first = folder / "000000.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(first)
    for i in range(1, n):
        os.link(first, folder / f"{i:06}.png")
    return folder


def killed_and_resumed(model, place, run, tmp_path, n, size, *words):
    "Kill the whole run as soon as some shards are there, run the same again, and read what came out."
    images, parts = draw_many(tmp_path / "images", n), tmp_path / "parts"
    words = ["predict", model, images, "--shards", parts, "--shard-size", size, *words]
    process = subprocess.Popen(command(*words), env=place, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    kind = "parquet" if "--parquet" in words else "csv"
    until = time.monotonic() + 200
    while len(list(parts.glob(f"part-*.{kind}"))) < 2 and time.monotonic() < until:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done_before = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*")}
    assert 0 < len(done_before) < -(-n // size)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert f"{n} predictions in {-(-n // size)} shards" in done.stdout and "were there before" in done.stdout
    assert all((parts / name).stat().st_mtime_ns == t for name, t in done_before.items())
    table = read_shards(parts)
    assert table.path.tolist() == sorted(str(p) for p in images.iterdir())
    assert table.path.is_unique and len(table) == n and (table.label != "").all()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_a_killed_prediction_goes_on_with_every_file_once(model, place, run, tmp_path):
    killed_and_resumed(model, place, run, tmp_path, 305, 10)


@pytest.mark.long
def test_20_000_files_by_two_processes_killed_and_resumed(model, place, run, tmp_path):
    pytest.importorskip("pyarrow")
    killed_and_resumed(model, place, run, tmp_path, 20_000, 500, "--parquet", "--processes", 2)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(model, run, tmp_path):
    images = draw_many(tmp_path / "images", 23)
    for name, words in {"one": [], "two": ["--processes", 2]}.items():
        done = run("predict", model, images, "--shards", tmp_path / name, "--shard-size", 5, *words)
        assert done.returncode == 0 and done.stdout.count("23 predictions in 5 shards") == 1, done.stderr
    one, two = read_shards(tmp_path / "one"), read_shards(tmp_path / "two")
    assert one.equals(two) and len(two) == 23


def test_options_that_do_not_fit_are_said(model, run, noise, tmp_path):
    done = run("predict", model, noise, "--processes", 2)
    assert done.returncode == 1 and "--shards PARTS" in done.stderr
    done = run("predict", model, noise, "--shards", noise)
    assert done.returncode == 1 and "not empty" in done.stderr and len(done.stderr.strip().splitlines()) == 1
