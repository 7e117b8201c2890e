import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from turns import by_turns
from warm import Warm

REPO = Path(__file__).parent.parent
PHOTOS = REPO.parent / "shared" / "data" / "ants_bees"


def pytest_collection_modifyitems(config, items):
    "Under TURNS, as `make test` sets it: a third of the tests marked `slow`, and others after another commit."
    if not os.environ.get("TURNS"):
        return
    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=lambda item: item.nodeid)
    now = {item.nodeid for item in by_turns(slow, -(-len(slow) // 3))} if slow else set()
    later = [item for item in slow if item.nodeid not in now]
    config.hook.pytest_deselected(items=later)
    items[:] = [item for item in items if item not in later]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    "One cache for the whole run of the tests, not the user's."
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def photos():
    "Real photographs of ants and bees; a clone without them skips what needs them."
    if not PHOTOS.is_dir():
        pytest.skip("the photographs are not here")
    return PHOTOS


def draw(folder, classes=("stripes", "waves"), n=12, size=72, seed=0):
    "An image folder that is easy to learn: the direction of stripes is the class."
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            x = np.sin(np.arange(size) * rng.uniform(.3, .6) + rng.uniform(0, 6))
            grey = np.broadcast_to(x if c % 2 else x[:, None], (size, size)) * 90 + 128 + rng.normal(0, 12, (size, size))
            Image.fromarray(np.stack([grey] * 3, -1).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:02}.jpg")
    return folder


def draw_flowers(n, size=64):
    "Drawn flowers with masks and boxes, of two species in turn, one and two in an image."
    from sft_course.tools.blooms import draw_bloom
    return [draw_bloom(("pointed5", "round5")[i % 2], i, size, flowers=1 + i % 2) for i in range(n)]


@pytest.fixture
def stripes(tmp_path):
    return draw(tmp_path / "stripes")


@pytest.fixture(scope="session")
def cli():
    "Run `sft-course` as a stranger would, and return what came back."
    warm = Warm()

    def run(*args, cwd=None, env=None, timeout=300, load=()):
        args = list(map(str, args))
        if warm.takes(env):
            return warm.run(args, cwd, env, timeout, load)
        command = [Path(sys.executable).parent / "sft-course", *args]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)

    yield run
    warm.close()
