"Runs of several processes on tiny images: each starts interpreters that import torch, so they are few and shared."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ARGS = ["--image-size", 32, "--train", 3, "--epochs", 6, "--batch-size", 8, "--seed", 0]


def draw_noise(folder, per_class=31):
    "Images that show nothing: no head is right on all of them, so the upper stages are tuned. 31 divides by nothing."
    rng = np.random.default_rng(0)
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    return draw_noise(tmp_path_factory.mktemp("data") / "noise")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    "One cache, one thread for every process, so that features are computed in the same order everywhere."
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1",
                         "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "SFT_COURSE_DEVICE": "cpu"}


def command(*words, torchrun=None):
    "The command line of `sft-course`, by itself or in so many processes of torchrun on a free port."
    start = [sys.executable, "-m", "sft_course"]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", torchrun, "-m", "sft_course"]
    return [str(w) for w in [*start, *words]]


@pytest.fixture(scope="session")
def run(place, cli):
    "Run `sft-course` to its end; where it starts others in an interpreter of its own, else in a warm one."
    def of(*words, torchrun=None, cwd=None, **more):
        if not torchrun and "--processes" not in words:
            return cli(*words, cwd=cwd, env=place | more)
        return subprocess.run(command(*words, torchrun=torchrun), env=place | more, cwd=cwd, capture_output=True, text=True,
                              timeout=300)
    return of


@pytest.fixture(scope="session")
def one(run, noise, tmp_path_factory):
    "A run of one process, and its lines."
    out = tmp_path_factory.mktemp("one") / "out"
    done = run("fit", noise, "--out", out, *ARGS)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def begin(place):
    "Begin `sft-course fit` and wait until the head is saved, so that the upper stages are being tuned."
    started = []

    def of(out, *words, torchrun=None, **more):
        process = subprocess.Popen(command(*words, torchrun=torchrun), env=place | more, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        until = time.monotonic() + 240
        while not (Path(out) / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "no checkpoint came"
            time.sleep(.02)
        return process
    yield of
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def children(pid):
    "Processes that `pid` started, the oldest first; None where the system does not say."
    try:
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text(encoding="ascii").split()]
    except OSError:
        return None


def ranks_of(pid):
    "The ranks among the processes below `pid`: {rank: process}."
    found = {}
    for child in children(pid) or []:
        try:
            said = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        number = [int(v[5:]) for v in said if v.startswith(b"RANK=")]
        if number:
            found[number[0]] = child
        else:
            found |= ranks_of(child)
    return found


def card(out):
    return json.loads((Path(out) / "card.json").read_text(encoding="utf-8"))


def history(out):
    "The rows of the history, without what a clock decides."
    return [line.split(",") for line in (Path(out) / "history.csv").read_text(encoding="utf-8").splitlines()]


def weights(out):
    from safetensors.numpy import load_file
    return load_file(Path(out) / "model.safetensors")
