# ruff: noqa: E501
"The same seed gives the same bytes, and a run leaves nothing changed but what it was asked to write."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import made

import sft_course  # noqa: F401


@pytest.fixture(scope="module")
def first(forks, data, tmp_path_factory):
    here = tmp_path_factory.mktemp("first")
    done = forks.run(data=data, out=here / "out", cache=here / "cache")
    assert done["ended"] == "done", done
    return done | {"made": made(here / "out"), "cache": here / "cache"}


STIR = "import random, numpy, torch; random.seed(3); numpy.random.seed(4); torch.manual_seed(5); torch.randn(100); numpy.random.rand(7)"
DOUBLE = "import torch; torch.backends.cudnn.benchmark = True; torch.randperm(1000); [torch.randn(9) for _ in range(99)]"


HOW = {"cold cache": {}, "warm cache": {}, "no room for a cache": {"settings": {"cache_gigabytes": 1e-9}}, "random generators used before": {"before": STIR},
       "other work before": {"before": DOUBLE}}


@pytest.mark.parametrize("how", HOW)
def test_the_same_seed_gives_the_same_bytes(fault, forks, data, first, tmp_path, how):
    more = HOW[how]
    with fault(f"same bytes: {how}"):
        done = forks.run(data=data, out=tmp_path / "out", cache=first["cache"] if how == "warm cache" else tmp_path / "cache", **more)
        assert done["ended"] == "done" and made(tmp_path / "out") == first["made"]


def test_another_process_and_twice_in_one(fault, data, first, tmp_path):
    "A process that was not forked from anything, and two runs in it."
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\nfrom forks import run\n"
        "for out in sys.argv[4:]: run({'data': sys.argv[2], 'cache': sys.argv[3], 'out': out})"
    )
    args = [Path(__file__).parent, data, tmp_path / "cache", tmp_path / "one", tmp_path / "two"]
    env = os.environ | {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env)
    for out in ("one", "two"):
        with fault("same bytes: another process, twice in it"):
            assert done.returncode == 0, done.stderr[-2000:]
            assert made(tmp_path / out) == first["made"]


def test_another_seed_gives_other_bytes(fault, forks, data, first, tmp_path):
    with fault("other seed, other bytes"):
        forks.run(data=data, out=tmp_path / "out", cache=tmp_path / "cache", seed=1)
        assert made(tmp_path / "out")[0] != first["made"][0]


def test_what_may_differ_differs_by_rounding(fault, forks, data, first, tmp_path):
    "Sums in another order: not the same bytes, but the same training, to one image of ten. So it is with another processor or a GPU."
    with fault("same to rounding: two threads"):
        done = forks.run(data=data, out=tmp_path / "out", cache=tmp_path / "cache", threads=2)
        assert done["ended"] == "done" and abs(done["accuracy"] - first["accuracy"]) <= 0.1 + 1e-9
        for was, now in zip(first["history"], done["history"], strict=True):
            assert now["val_loss"] == pytest.approx(was["val_loss"], rel=0.05)


# ---- no surprise

WATCHED = """
import sys, json, os, random, signal, warnings
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, matplotlib
def state():
    return {"torch": torch.get_rng_state().sum().item(), "torch seed": torch.initial_seed(), "numpy": hash(np.random.get_state()[1].tobytes()), "python": hash(random.getstate()),
            "dtype": str(torch.get_default_dtype()), "rc": hash(str(sorted(matplotlib.rcParams.items()))), "threads": torch.get_num_threads(),
            "filters": [str(f) for f in warnings.filters], "signals": [str(signal.getsignal(s)) for s in (2, 15, 13, 10)], "cwd": os.getcwd(), "env": sorted(os.environ.items()),
            "grad": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(), "hooks": [str(sys.excepthook), str(warnings.showwarning)],
            "locale": __import__("locale").setlocale(0), "print": str(np.get_printoptions()), "recursion": sys.getrecursionlimit(),
            "backend": matplotlib.rcParams._get("backend") is None}
import torchvision, timm, pandas, sklearn.metrics, seaborn   # what the libraries below it change at import is not ours
torch.manual_seed(1); np.random.seed(2); random.seed(3)
before = state()
import sft_course, sft_course.recipe, sft_course.evaluation, sft_course.tools.cli
imported = state()
from forks import run
if SOCKETS:
    import socket
    def no(*a, **k): raise RuntimeError("the network was asked for")
    socket.socket = socket.create_connection = socket.getaddrinfo = no
run({"data": sys.argv[2], "cache": sys.argv[3], "out": sys.argv[4], "plan": "short", "threads": before["threads"]})
after = state()
print(json.dumps([[k for k in before if before[k] != other[k]] for other in (imported, after)]))
"""


def tree(root):
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_nothing_else_is_changed_written_or_asked_for(fault, data, tmp_path):
    "Random generators, settings of libraries, signal handlers, files outside output, cache and temporary folder; and no network."
    home, here, temp = (tmp_path / n for n in ("home", "here", "temp"))
    for d in (home, here, temp):
        d.mkdir()
    (here / "mine.txt").write_text("mine")
    apart = (
        ["unshare", "-rn"]
        if shutil.which("unshare") and not subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode
        else []
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL", "TORCH_HOME", "HF_"))} | {
        "HOME": str(home),
        "TMPDIR": str(temp),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("PYTEST_CURRENT_TEST", None)
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    before = tree(here), tree(data), tree(Path(sys.modules["sft_course"].__file__).parent)
    code = WATCHED.replace("SOCKETS", str(not apart))
    args = [Path(__file__).parent, data, tmp_path / "cache", tmp_path / "out"]
    done = subprocess.run([*apart, sys.executable, "-c", code, *map(str, args)], cwd=here, env=env, capture_output=True, text=True)
    with fault("no network"):
        assert done.returncode == 0, done.stderr[-2000:]
    imported, ran = json.loads(done.stdout.strip().splitlines()[-1])
    with fault("state of the process after import"):
        assert imported == []
    with fault("state of the process after a run"):
        assert ran == []
    with fault("files outside output, cache and temp"):
        assert (tree(here), tree(data), tree(Path(sys.modules["sft_course"].__file__).parent)) == before
        assert [p for p in tree(home) if not p.startswith((".cache/matplotlib/", ".config/matplotlib/"))] == []  # its list of fonts
        assert tree(temp) == {}
        assert {p.name for p in tmp_path.iterdir()} == {"home", "here", "temp", "cache", "out"}
