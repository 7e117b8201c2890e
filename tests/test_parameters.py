"Searches: draws by number, what k trials choose, and `tune` from the library and the command line, stopped and shared."
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from sft_course.parameters import expected_choice, explained, importance
from sft_course.tools.blooms import write_blooms
from sft_course.tools.intake import scan
from sft_course.tools.phases import Phase
from sft_course.tools.search_space import BLOCK, SPACE, Range, draw
from sft_course.tools.settings import SFTError

optuna = pytest.importorskip("optuna")

from sft_course.tools import tune_command, tuning  # noqa: E402
from sft_course.tools.tuning import tune  # noqa: E402

REPO = Path(__file__).parent.parent
PHOTOS = Path(os.environ.get("SFT_PHOTOS", REPO.parent / "shared" / "data"))
SMALL = {"lr": Range(1e-4, 1e-2, log=True), "train": (1, 2)}
START = Phase(1, epochs=2, views=1, batch_size=16)
SAME = ["trial", "lr", "train", "val_loss", "val_accuracy", "epochs_run", "state"]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return write_blooms(tmp_path_factory.mktemp("tune") / "flowers", train_per_species=10, test_per_species=5, size=64)


@pytest.fixture(scope="module")
def whole(flowers):
    "A search of five trials that nobody stopped."
    return tune(flowers, trials=5, space=SMALL, start=START, size=64, prune=True)


def quick(flowers, out, **how):
    return tune(flowers, out=out, **{"trials": 5, "space": SMALL, "start": START, "size": 64, "prune": True} | how)


# ---- draws

@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_each_block_of_trials_covers_every_axis(block, seed):
    space = {"lr": tuple(range(BLOCK)), "weight_decay": tuple(range(BLOCK))}
    drawn = [draw(space, number, seed) for number in range(block * BLOCK, (block + 1) * BLOCK)]
    for name in space:
        assert sorted(d[name] for d in drawn) == list(range(BLOCK))


def test_a_knob_that_joins_leaves_the_others_as_they_were():
    assert all(draw(SPACE, n)["lr"] == draw({"lr": SPACE["lr"]}, n)["lr"] for n in range(40))


# ---- what k trials choose

@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_expected_choice_is_the_mean_over_all_draws(k, ties):
    rng = np.random.default_rng(3)
    val = rng.integers(0, 3, 7).astype(float) if ties else rng.random(7)
    test = rng.random(7)
    means = []
    for some in itertools.combinations(range(7), k):
        some = np.array(some)
        means.append(test[some[val[some] == val[some].max()]].mean())
    assert np.isclose(expected_choice(val, test, k), np.mean(means))


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_trials_that_there_are_not_is_an_error(k):
    with pytest.raises(ValueError, match="use 1 to 3"):
        expected_choice([1, 2, 3], [1, 2, 3], k)


def test_importance_finds_the_knob_and_no_other():
    settings = pd.DataFrame([draw(SPACE, n) for n in range(48)])
    scores = np.log(settings.lr.to_numpy())[:, None] + np.zeros((48, 3))
    table = importance(settings, scores, times=40)
    assert table.explained["lr"] > .9 > .4 > table.explained.drop("lr").max()
    assert table["by luck"].between(0, .2).all()


def test_explained_takes_the_groups_as_they_are_or_cuts_into_four():
    assert explained(np.arange(8), np.repeat(range(4), 2)) == 1
    assert explained(["a", "b"] * 4, [0, 1] * 4) == 1


# ---- tune

def test_trial_0_is_the_default_and_the_chosen_one_has_the_lowest_loss(whole):
    t = whole.trials
    assert t.lr[0] == START.lr and t.train[0] == START.train
    done = t[t.state == "complete"]
    assert whole.chosen == dict(done.loc[done.val_loss.idxmin(), ["lr", "train"]])
    assert whole.result.card["phases"][1]["lr"] == whole.chosen["lr"] or whole.result.card["chosen"] == "head"


@pytest.mark.slow
@pytest.mark.long
def test_a_search_in_pieces_is_the_search_in_one(flowers, whole, tmp_path):
    out = tmp_path / "search"
    for trials in (1, 3, 5):
        found = quick(flowers, out, trials=trials)
    assert found.trials[SAME].equals(whole.trials[SAME]) and found.chosen == whole.chosen
    assert found.result.accuracy == whole.result.accuracy
    assert pd.read_csv(out / "trials.csv").trial.tolist() == [0, 1, 2, 3, 4]


def script(flowers, out, more=""):
    "A process that runs the same search; `more` comes before it."
    text = f"""
        import os, torch
        torch.set_num_threads(1)
        from sft_course.tools import tuning
        from sft_course.tools.search_space import Range
        from sft_course.tools.phases import Phase
        {more}
        found = tuning.tune({str(flowers)!r}, out={str(out)!r}, trials=5, size=64, prune=True,
                            space={{"lr": Range(1e-4, 1e-2, log=True), "train": (1, 2)}},
                            start=Phase(1, epochs=2, views=1, batch_size=16))
        print("accuracy", found.result and found.result.accuracy)
    """
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trial_it_died_in(flowers, whole, tmp_path):
    out = tmp_path / "search"
    die = """
        real = tuning._try
        def dies(s, trial, phase):
            if trial.number == 2: os.kill(os.getpid(), 9)
            return real(s, trial, phase)
        tuning._try = dies
    """
    died = script(flowers, out, textwrap.indent(textwrap.dedent(die), "        ").strip())
    died.communicate(timeout=300)
    assert died.returncode == -9
    found = quick(flowers, out)
    # number 2 died and was tried again as the next number that was free
    assert sorted(found.trials.trial) == [0, 1, 3, 4, 5]
    drawn = {(r.lr, r.train) for r in found.trials.itertuples()}
    assert drawn == {(r.lr, r.train) for r in whole.trials.itertuples()}


@pytest.mark.slow
def test_two_processes_share_one_search(flowers, whole, tmp_path):
    out = tmp_path / "search"
    workers = [script(flowers, out) for _ in range(2)]
    said = [w.communicate(timeout=300) for w in workers]
    assert [w.returncode for w in workers] == [0, 0], said
    table = pd.read_csv(out / "trials.csv")
    assert sorted(table.trial) == [0, 1, 2, 3, 4]
    assert {*table.lr} == {*whole.trials.lr}
    assert any("accuracy 0." in text or "accuracy 1." in text for text, _ in said)
    assert len([p for p in out.iterdir() if p.is_dir()]) == 1


@pytest.mark.slow
@pytest.mark.long
def test_a_database_serves_as_well(flowers, whole, tmp_path):
    address = f"sqlite:///{tmp_path / 'study.db'}"
    quick(flowers, None, storage=address, trials=2)
    found = quick(flowers, None, storage=address)
    assert found.trials[["trial", "lr", "train"]].equals(whole.trials[["trial", "lr", "train"]])


def test_a_sampler_of_optuna(flowers):
    found = quick(flowers, None, trials=2, sampler=optuna.samplers.TPESampler(seed=0))
    assert len(found.trials) == 2


def test_pruning_ends_some_and_not_the_first_four(whole):
    assert (whole.trials.state[:4] == "complete").all()


@pytest.mark.slow
def test_trials_run_to_their_end_unless_pruning_is_asked_for(flowers):
    how = {"trials": 9, "space": {"lr": Range(1e-4, 1e-1, log=True)}}
    states = [set(quick(flowers, None, prune=prune, **how).trials.state) for prune in (False, True)]
    assert states == [{"complete"}, {"complete", "ended early"}]


@pytest.mark.parametrize("how, sentence", [
    ({"trials": 0}, "trials = 0: give a whole number"),
    ({"trials": 2.5}, "give a whole number"),
    ({"minutes": -1}, "minutes = -1: give a number above 0"),
    ({"minutes": float("nan")}, "give a number above 0"),
    ({"choose": "f1"}, "use one of loss, accuracy"),
    ({"space": {"learning_rate": (1e-3,)}}, "is no field of Phase"),
    ({"space": {"lr": Range(1e-2, 1e-4, log=True)}}, "low must be below high"),
    ({"space": {}}, "at least one entry"),
    ({"space": {"train": (2, 99)}}, "from 1 to 10"),
    ({"space": {"train": ("head", 2)}}, "starts from the fitted head"),
    ({"space": {"epochs": Range(1, 4)}}, "no numbers in between"),
    ({"start": Phase("head")}, "a Phase that tunes stages"),
    ({"storage": "nonsense://x"}, "Optuna cannot open it"),
])
def test_what_cannot_be_is_one_sentence(flowers, how, sentence):
    with pytest.raises(SFTError, match=sentence) as e:
        quick(flowers, None, **how)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_another_search_in_the_folder_is_refused(flowers, tmp_path):
    quick(flowers, tmp_path / "s", trials=1)
    with pytest.raises(SFTError, match="other size"):
        quick(flowers, tmp_path / "s", trials=1, size=96)
    (tmp_path / "s" / "study.journal").write_text("no journal\n")
    with pytest.raises(SFTError, match="cannot be read"):
        quick(flowers, tmp_path / "s", trials=1)


@pytest.mark.slow
def test_a_journal_that_was_cut_in_a_line_goes_on(flowers, tmp_path):
    quick(flowers, tmp_path / "s", trials=2)
    journal = tmp_path / "s" / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if b'"op_code":6' in line)  # the second trial's end
    journal.write_bytes(b"".join(lines[:last]) + lines[last][:len(lines[last]) // 2])
    found = quick(flowers, tmp_path / "s", trials=2)
    assert len(found.trials) == 2 and found.trials.state.eq("complete").all()
    assert found.trials.epochs_run.notna().all()


@pytest.mark.parametrize("place, sentence", [("study.journal", "cannot be read"), ("trials.csv", "a folder lies")])
def test_a_folder_where_a_file_of_the_search_goes(flowers, tmp_path, place, sentence):
    (tmp_path / "s" / place).mkdir(parents=True)
    with pytest.raises(SFTError, match=sentence):
        quick(flowers, tmp_path / "s")


@pytest.mark.parametrize("text", [b"shopping: milk", b"\xff\xfe\x00", b'{"op_code": 99}\n'])
def test_another_file_in_the_place_of_the_study_is_left_alone(flowers, tmp_path, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.journal").write_bytes(text)
    with pytest.raises(SFTError, match="cannot be read"):
        quick(flowers, tmp_path / "s")
    assert (tmp_path / "s" / "study.journal").read_bytes() == text


def test_the_table_says_how_many_epochs_the_default_has(flowers):
    found = quick(flowers, None, trials=2, start=Phase(1, views=1, batch_size=32), space={"epochs": (1,)})
    assert found.trials.epochs.to_list() == found.trials.epochs_run.to_list() == [6, 1]


def test_without_optuna_one_sentence_says_what_to_install(flowers, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SFTError, match=r"pip install 'sft_course\[tune\]'"):
        quick(flowers, None)


# ---- the command

@pytest.fixture(scope="module")
def app():
    made = typer.Typer(rich_markup_mode=None)
    made.command()(tune_command.tune)
    made.callback()(lambda: None)
    return made


def run(app, *words):
    return CliRunner().invoke(app, ["tune", *map(str, words)])


@pytest.mark.slow
def test_the_command_on_flowers(app, flowers, tmp_path):
    words = (flowers, "--out", tmp_path / "s", "--trials", 2, "--image-size", 64, "--json",
             "--search", "train=1,2", "--search", "epochs=1,2")
    for _ in range(2):  # the second time there is nothing left to do
        ran = run(app, *words)
        assert ran.exit_code == 0, ran.output
        told = json.loads(ran.stdout)
        assert len(told["trials"]) == 2 and Path(told["artifact"]).is_dir()


def test_ctrl_c_says_how_to_go_on(app, flowers, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(tuning, "tune", stopped)
    ran = run(app, flowers, "--out", tmp_path / "s")
    assert ran.exit_code == 130 and "the same command goes on" in ran.output


@pytest.mark.slow
@pytest.mark.skipif(not (PHOTOS / "hands").is_dir(), reason="the photographs are not here")
@pytest.mark.long
def test_tune_on_photographs_of_hands(tmp_path):
    catalog = scan(PHOTOS / "hands", 0).sample_per_class(8)
    found = tune(catalog, out=tmp_path / "s", trials=2, space=SMALL, start=START, size=64)
    assert len(found.trials) == 2 and found.result.accuracy > .3


@pytest.mark.parametrize("words, sentence", [
    (["--search", "lrs=1,2"], "did you mean lr"),
    (["--search", "lr"], "write lr=1e-4:1e-2"),
    (["--search", "lr=1:2:3"], "a range has two numbers"),
    (["--trials", "0"], "1 or more"),
    (["--minutes", "0"], "above 0"),
    (["--choose", "f1"], "loss, accuracy"),
])
def test_wrong_words_are_one_sentence(app, flowers, tmp_path, words, sentence):
    ran = run(app, flowers, "--out", tmp_path / "s", *words)
    assert isinstance(ran.exception, SFTError) and sentence in str(ran.exception)


def test_places_that_cannot_be(app, flowers, tmp_path):
    assert "no such folder" in str(run(app, tmp_path / "none").exception)
    assert "lies inside" in str(run(app, flowers, "--out", flowers / "search").exception)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    assert "holds no search" in str(run(app, flowers, "--out", tmp_path / "mine").exception)
