# ruff: noqa: E501
"Runs that are killed, stopped, starved of memory or of disk: what was learned is not lost, and what comes out is the same to the last byte."

import os
import random
import re
import signal
import subprocess
import time

import pytest
from forks import litter, made, used

from sft_course.tools.artifact import load_artifact
from sft_course.tools.checkpoints import read_checkpoint
from sft_course.tools.settings import SFTError


def sentence(text):
    "The one sentence of an error, checked for its form."
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text and len(text) < 1000, text
    return text


@pytest.fixture(scope="module")
def undisturbed(forks, data, tmp_path_factory):
    "For each plan: what came of a run that nothing happened to, its bytes, and the seconds of processor time it took."
    found = {}
    for plan in ("full", "short"):
        here = tmp_path_factory.mktemp(plan)
        done = forks.run(data=data, out=here / "out", cache=here / "cache", plan=plan, at=0, act="none")
        assert done["ended"] == "done" and len(done["history"]) == {"full": 6, "short": 3}[plan], done
        found[plan] = done | {"made": made(here / "out"), "cache": here / "cache"}
    return found


def sound_or_absent(out):
    "An artifact loads whole or not at all, and so does a checkpoint."
    if (out / "last.ckpt").exists():
        read_checkpoint(out / "last.ckpt")
    try:
        load_artifact(out)
    except SFTError as e:
        return sentence(str(e))


def goes_on(forks, whole, tmp_path, **spec):
    "The same run with resume=True ends in the same bytes and leaves nothing lying about in the output folder."
    again = forks.run(**spec, resume=True)
    assert again["ended"] == "done", again
    assert made(spec["out"]) == whole["made"]


# ---- killed


@pytest.mark.parametrize("part", range(5))
def test_kill_9_at_random_moments(fault, times, forks, data, undisturbed, tmp_path, part):
    "50 moments of processor time, spread over the whole run, scanning and decoding included; every fifth run is killed twice."
    rng, whole = random.Random(part), undisturbed["full"]
    for i in range(10 * times):
        where = tmp_path / str(i)
        spec = dict(data=data, out=where / "out", cache=where / "cache")
        with fault("kill -9 at a random moment"):
            share = rng.uniform(0.02, 0.98)
            while forks.killed_after(share * whole["seconds"], **spec)["ended"] != "killed":
                share *= 0.8  # it had ended before
            if i % 5 == 4:
                forks.killed_after(0.5 * whole["seconds"], **spec, resume=True)
            if (where / "out").exists():
                sound_or_absent(where / "out")
            goes_on(forks, whole, where, **spec)


@pytest.mark.parametrize("part", range(3))
def test_kill_9_inside_every_write(fault, times, forks, data, undisturbed, tmp_path, part):
    "At each place where anything is written: the file not begun, half full, full but not renamed, renamed. (Short form: a third of them.)"
    whole = undisturbed["short"]
    for at, what in list(enumerate(whole["points"], 1))[part :: 3 if times > 1 else 9]:
        where = tmp_path / str(at)
        spec = dict(data=data, out=where / "out", cache=where / "cache", plan="short")
        with fault("kill -9 inside a write"):
            assert forks.run(**spec, at=at, act="kill")["ended"] == "killed", what
            if (where / "out").exists():
                sound_or_absent(where / "out")
            goes_on(forks, whole, where, **spec)


def test_the_next_run_after_a_kill_is_not_in_the_way_of_a_second(fault, forks, data, undisturbed, tmp_path):
    "The second of two runs in one folder refuses; once the first was killed a third may start."
    spec, lock = dict(data=data, out=tmp_path / "out", cache=tmp_path / "cache"), tmp_path / "out" / ".lock"
    with fault("two runs in one folder") as f:
        first = forks.spawn(**spec, hold=600)
        while not lock.exists() and used(first[0]) is not None:
            time.sleep(0.05)
        said = forks.run(**spec)
        os.kill(first[0], signal.SIGKILL)
        assert forks.wait(first)["ended"] == "killed"
        assert said["ended"] == "SFTError" and "another run is writing there" in said["message"]
        f.said(sentence(said["message"]))
        goes_on(forks, undisturbed["full"], tmp_path, **spec)


# ---- stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_lets_the_step_end(fault, times, forks, data, undisturbed, tmp_path, number):
    whole, rng = undisturbed["full"], random.Random(int(number))
    for step in rng.sample(range(1, whole["steps"] + 1), min(5 * times, whole["steps"])):
        out = tmp_path / str(step)
        spec = dict(data=data, out=out, cache=whole["cache"])
        with fault("SIGINT or SIGTERM at a random step") as f:
            said = forks.run(**spec, signal=[int(number), step])
            assert (
                said["ended"] == "Stopped" and said["checkpoint"] == str(out / "last.ckpt") and str(out / "last.ckpt") in said["message"]
            ), said
            f.said(said["message"])
            assert not litter(out)
            goes_on(forks, whole, tmp_path, **spec)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_the_command_says_how_to_go_on(fault, forks, data, undisturbed, tmp_path, number, code):
    whole, rng = undisturbed["short"], random.Random(code)
    spec = dict(
        data=data, out=tmp_path / "out", cache=str(whole["cache"]), plan="short", cwd=tmp_path, cli=["fit", str(data), "--out", "out"]
    )
    with fault("signal to sft-course fit") as f:
        said = forks.run(**spec, signal=[int(number), rng.randint(1, whole["steps"])])
        last = said["log"].strip().splitlines()[-1]
        assert said["code"] == code and last.endswith(f"go on with: sft-course fit {data} --out out --resume"), said
        f.said(last)
        again = forks.run(**spec | {"cli": [*spec["cli"], "--resume"]})
        assert again["code"] == 0, again
        assert made(tmp_path / "out") == whole["made"]


# ---- a loss that is not finite, and too little memory


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite(fault, times, forks, data, undisturbed, tmp_path, value):
    whole, rng = undisturbed["full"], random.Random(value)
    for step in rng.sample(range(1, whole["steps"] + 1), min(2 * times, whole["steps"])):
        with fault("a loss that is not finite") as f:
            said = forks.run(data=data, out=tmp_path / str(step), cache=whole["cache"], loss=[value, step])
            phase, steps = (2, step) if step <= 3 * whole["steps"] // 5 else (3, step - 3 * whole["steps"] // 5)
            note = next(n for n in said["notes"] if "ended early" in n)
            assert said["ended"] == "done" and said["finite"] and note in said["warnings"], said
            assert re.search(
                rf"phase {phase} \(train = .*\) ended early: the loss became {value} at step {steps}, at a rate of [\d.e-]+; use", note
            ), note
            f.said(sentence(note))
            load_artifact(tmp_path / str(step))


@pytest.mark.parametrize("kind", ["MemoryError", "OutOfMemoryError", "RuntimeError"])
def test_memory_is_short(fault, forks, data, undisturbed, tmp_path, kind):
    "Half as many images at a time until they fit; batch statistics are those of smaller batches then, so the last phase may differ a little."
    whole = undisturbed["full"]
    with fault("memory is short") as f:
        said = forks.run(data=data, out=tmp_path / "some", cache=whole["cache"], memory=[kind, 3])
        assert said["ended"] == "done" and said["finite"]
        f.said(sentence(next(w for w in said["warnings"] if "memory is short" in w)))
        for was, now in zip(whole["history"][:4], said["history"][:4], strict=True):
            assert now["val_loss"] == pytest.approx(was["val_loss"], rel=1e-2) and now["val_accuracy"] == pytest.approx(
                was["val_accuracy"], abs=0.13
            )
    with fault("no memory for one image") as f:
        said = forks.run(data=data, out=tmp_path / "none", cache=whole["cache"], memory=[kind, 0])
        assert said["ended"] == "SFTError"
        f.said(sentence(said["message"]))


# ---- a full disk


@pytest.mark.parametrize("part", range(3))
def test_the_disk_is_full_at_every_write(fault, times, forks, data, undisturbed, tmp_path, part):
    "Decoded images, activations, checkpoints, artifact: the n-th write fails, for every n. (Short form: every second.)"
    whole, lost = undisturbed["short"], []
    for at, what in list(enumerate(whole["points"], 1))[part :: 3 if times > 1 else 6]:
        where = tmp_path / str(at)
        spec = dict(data=data, out=where / "out", cache=where / "cache", plan="short")
        said = forks.run(**spec, at=at, act="full")
        try:
            assert said["ended"] == "SFTError", (said["ended"], said["message"])
            sentence(said["message"])
            assert litter(where) == []
            if (where / "out").exists():
                assert sound_or_absent(where / "out")
            goes_on(forks, whole, where, **spec)
        except (AssertionError, SFTError) as e:
            lost.append((at, what, str(e)[:300]))
        fault.count("disk full at the n-th write", not lost or lost[-1][0] != at, said["message"])
    assert not lost, lost


def test_a_small_disk(fault, times, forks, data, undisturbed, tmp_path):
    "A real one, of growing size, that holds output and cache; then room is made."
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        fault.skip("a small disk", "only root can mount one")
        pytest.skip("only root can mount a file system")
    subprocess.run(["umount", tmp_path], check=True)
    whole, lost = undisturbed["short"], []
    for kb in [32, 200, 500, 700, 1000, 1300, 1600, 2200][:: 1 if times > 1 else 2]:
        where = tmp_path / str(kb)
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kb}k", "none", where], check=True)
        try:
            spec = dict(data=data, out=where / "out", cache=where / "cache", plan="short")
            said = forks.run(**spec)
            if said["ended"] != "done":
                assert said["ended"] == "SFTError", (said["ended"], said["message"])
                sentence(said["message"])
                assert litter(where) == []
                if (where / "out").exists():
                    sound_or_absent(where / "out")
            subprocess.run(["mount", "-o", "remount,size=64m", where], check=True)
            goes_on(forks, whole, where, **spec)
        except (AssertionError, SFTError) as e:
            lost.append((kb, str(e)[:300]))
        finally:
            subprocess.run(["umount", "-l", where], check=True)
        fault.count("a small disk", not lost or lost[-1][0] != kb, said["message"])
    assert not lost, lost


# ---- a cache that is not what it was


def emptied(b):
    return b""


def truncated(b):
    return b[: len(b) // 2]


def zeros(b):
    return bytes(len(b))


def longer(b):
    return b + b"x"


def older(b):
    return b.replace(b"'<f2'", b"'<i2'").replace(b"'|u1'", b"'|i1'").replace(b'"passing"', b'"passed"')


def pickled(b):
    return b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02:;\x85R."


def zeros_inside(b):
    return b[: len(b) // 2] + bytes(len(b) - len(b) // 2)


@pytest.mark.parametrize(
    "damage",
    [
        emptied,
        truncated,
        zeros,
        longer,
        older,
        pickled,
        pytest.param(
            zeros_inside,
            marks=pytest.mark.xfail(strict=True, reason="a cache holds no checksum: a sound head over damaged numbers is not seen"),
        ),
    ],
    ids=lambda d: d.__name__,
)
def test_a_damaged_cache_is_made_again(fault, forks, data, undisturbed, tmp_path, damage):
    whole = undisturbed["short"]
    spec = dict(data=data, cache=tmp_path / "cache", plan="short")
    assert forks.run(**spec, out=tmp_path / "one")["ended"] == "done"
    for f in (tmp_path / "cache").rglob("*.*"):
        if f.is_file():
            f.write_bytes(damage(f.read_bytes()))
    again = forks.run(**spec, out=tmp_path / "two")
    ok = again["ended"] == "done" and made(tmp_path / "two") == whole["made"]
    if damage is not zeros_inside:
        fault.count("a damaged cache", ok)
    else:
        fault.skip("a cache with zeros inside", "expected to fail: there is no checksum yet")
    assert ok, again


def test_the_cache_of_other_weights_is_not_used(fault, forks, data, undisturbed, tmp_path):
    with fault("a cache of other weights"):
        spec = dict(data=data, cache=tmp_path / "cache", plan="short")
        assert forks.run(**spec, out=tmp_path / "one", seed=5)["ended"] == "done"
        assert forks.run(**spec, out=tmp_path / "two")["ended"] == "done"
        assert made(tmp_path / "two") == undisturbed["short"]["made"] != made(tmp_path / "one")
