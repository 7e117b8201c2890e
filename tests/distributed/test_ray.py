"Prediction in shards by a local Ray: every file once, killed and resumed, and faults in one sentence. Without Ray it skips."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sft_course.tools.artifact import load_artifact
from sft_course.tools.settings import SFTError
from sft_course.tools.sharded_predict import predict_ray, predict_shards, read_shards

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.long

BY_RAY = """
import sys, ray
from sft_course.tools.sharded_predict import predict_ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
predict_ray(*sys.argv[1:], shard_size=2)
"""


@pytest.fixture(scope="module", autouse=True)
def local():
    "One Ray of two processors for all tests here."
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "200 small images, of which one is none and one has a name that is not UTF-8."
    folder, rng = tmp_path_factory.mktemp("ray") / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(199):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(folder / f"{i:03}.png")
    (folder / "odd.png").write_text("no image", encoding="utf-8")
    os.rename(folder / "007.png", os.fsencode(folder) + b"/\xff.png")
    return folder


@pytest.fixture(scope="module")
def alone(one, images, tmp_path_factory):
    "What this process writes without Ray."
    parts = tmp_path_factory.mktemp("alone") / "parts"
    predict_shards(load_artifact(one[0]), images, parts, shard_size=2)
    return read_shards(parts)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_file_once_and_as_without_ray(one, images, alone, tmp_path, kind):
    made = predict_ray(one[0], images, tmp_path / "parts", shard_size=30, kind=kind)
    table = read_shards(tmp_path / "parts")
    assert (made.files, made.shards, made.wrote) == (200, 7, 7) and len(table) == 200
    assert table.path.is_unique and table.label.tolist() == alone.label.tolist()
    np.testing.assert_allclose(table.probability, alone.probability, rtol=1e-5)
    assert (table.error != "").sum() == 1


def test_only_what_is_missing_is_made_again(one, images, tmp_path):
    parts = tmp_path / "parts"
    predict_ray(one[0], images, parts, shard_size=30)
    times = {p.name: p.stat().st_mtime_ns for p in parts.iterdir()}
    (parts / "part-000003.csv").unlink()
    assert predict_ray(one[0], images, parts, shard_size=30, actors=1).wrote == 1
    assert [p.name for p in parts.iterdir() if p.stat().st_mtime_ns != times[p.name]] == ["part-000003.csv"]
    assert len(read_shards(parts)) == 200


def test_a_run_that_is_killed_goes_on_by_ray(one, images, alone, tmp_path):
    parts, words = tmp_path / "parts", [sys.executable, "-c", BY_RAY, str(one[0]), str(images)]
    process = subprocess.Popen([*words, str(parts)], start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"RAY_ADDRESS": "local"})
    until = time.monotonic() + 120
    while len(list(parts.glob("part-*.csv"))) < 5 and time.monotonic() < until:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there, before = -1, 0
    while there != before:  # actors may end what they have begun
        there, before = before, len(list(parts.glob("part-*.csv")))
        time.sleep(2)
    assert 5 <= there < 100
    assert predict_ray(one[0], images, parts, shard_size=2).wrote == 100 - there
    assert read_shards(parts).equals(alone)


def test_a_shard_that_cannot_be_written_is_said_and_the_others_are_there(one, images, tmp_path, monkeypatch):
    parts, files = tmp_path / "parts", sorted(map(str, images.iterdir()))[:4]
    jobs = [(tmp_path / "nowhere" / "part-000000.csv", files[:2]), (parts / "part-000001.csv", files[2:])]
    monkeypatch.setattr("sft_course.tools.sharded_predict._missing", lambda *_: jobs)
    with pytest.raises(SFTError, match="nowhere.*cannot be written") as said:
        predict_ray(one[0], images, parts, shard_size=2)
    assert len(str(said.value).splitlines()) == 1
    assert [p.name for p in parts.glob("part-*")] == ["part-000001.csv"]
