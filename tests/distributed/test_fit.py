"`fit` in several processes: the same numbers as in one, one voice, and no run that is lost."
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from .conftest import ARGS, card, children, history, ranks_of, weights


@pytest.fixture(scope="module")
def two(run, noise, tmp_path_factory):
    "The same by `--processes 2`."
    out = tmp_path_factory.mktemp("two") / "out"
    done = run("fit", noise, "--out", out, *ARGS, "--processes", 2)
    assert done.returncode == 0, done.stderr
    return out, done


def numbers(out):
    head, *rows = history(out)
    at = [head.index(name) for name in ("train_loss", "val_loss", "val_accuracy")]
    return np.array([[float(row[k]) for k in at] for row in rows])


def same_as(one, other):
    assert card(one)["metrics"] == pytest.approx(card(other)["metrics"], abs=1e-4)
    assert card(one)["chosen"] == card(other)["chosen"] and card(one)["data"] == card(other)["data"]
    a, b = numbers(one), numbers(other)
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)  # the head: before anything was trained by steps
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_two_processes_end_as_one_does(one, two):
    same_as(one[0], two[0])


def test_the_head_of_two_processes_is_that_of_one(one, two):
    a, b = weights(one[0]), weights(two[0])
    assert a.keys() == b.keys()
    if card(one[0])["chosen"] == "head":
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_one_process_speaks(one, two):
    assert len(two[1].stdout.splitlines()) == len(one[1].stdout.splitlines())
    assert two[1].stderr.count("phases:") == 1


def test_only_rank_0_writes(one, two):
    def names(out):
        return sorted(p.name for p in out.iterdir())
    assert names(one[0]) == names(two[0])


@pytest.mark.long
def test_torchrun_does_the_same(one, run, noise, tmp_path):
    done = run("fit", noise, "--out", tmp_path / "out", *ARGS, torchrun=2)
    assert done.returncode == 0, done.stderr
    same_as(one[0], tmp_path / "out")


@pytest.mark.long
def test_four_processes_end_as_one_does(one, run, noise, tmp_path):
    done = run("fit", noise, "--out", tmp_path / "out", *ARGS, "--processes", 4)
    assert done.returncode == 0, done.stderr
    same_as(one[0], tmp_path / "out")


def test_an_error_that_all_meet_is_one_sentence(run, tmp_path):
    done = run("fit", tmp_path / "nowhere", "--out", tmp_path / "out", "--processes", 2)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "nowhere" in done.stderr


@pytest.mark.slow
def test_what_one_rank_cannot_write_ends_all_with_one_sentence(run, noise, tmp_path):
    "Rank 0 alone writes the artifact, and a file lies where its folder should be made."
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = run("fit", noise, "--out", tmp_path / "file" / "out", *ARGS, "--processes", 2)
    said = [line for line in done.stderr.strip().splitlines() if "cannot be written" in line]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_the_same(two, begin, noise, tmp_path):
    if children(os.getpid()) is None:
        pytest.skip("this system does not say which processes a process has started")
    out = tmp_path / "out"
    process = begin(out, "fit", noise, "--out", out, *ARGS, "--processes", 2)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "a process was killed; attempt 2" in said[1] and "Traceback" not in said[1]
    np.testing.assert_array_equal(numbers(out), numbers(two[0]))
    assert not (out / "last.ckpt").exists()


@pytest.mark.long
def test_sigterm_to_one_rank_stops_all_after_the_same_step_and_resume_ends_the_same(two, begin, run, noise, tmp_path):
    if children(os.getpid()) is None:
        pytest.skip("this system does not say which processes a process has started")
    out = tmp_path / "out"
    process = begin(out, "fit", noise, "--out", out, *ARGS, "--processes", 2)
    time.sleep(.5)
    os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
    said = process.communicate(timeout=120)
    assert process.returncode == 143 and said[1].count("go on with: sft-course fit") == 1, said
    done = run("fit", noise, "--out", out, *ARGS, "--processes", 2, "--resume")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(numbers(out), numbers(two[0]))


@pytest.mark.long
def test_photographs_of_hands_end_at_the_same_accuracy_under_torchrun(run, tmp_path):
    hands = Path(__file__).parents[3] / "shared" / "data" / "hands"
    if not hands.is_dir():
        pytest.skip("the photographs are not here")
    words = ["fit", hands, "--image-size", 64, "--train", 2, "--epochs", 2, "--seed", 0]
    for name, processes in {"one": None, "two": 2}.items():
        done = run(*words, "--out", tmp_path / name, torchrun=processes)
        assert done.returncode == 0, done.stderr
    assert card(tmp_path / "one")["metrics"]["accuracy"] == card(tmp_path / "two")["metrics"]["accuracy"]
