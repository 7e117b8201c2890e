import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw

from sft_course import FineTuner, Phase, fine_tune, load_artifact, load_settings
from sft_course.core import what_moved
from sft_course.recipe import scratch_phase
from sft_course.tools.phases import clearly_better
from sft_course.tools.resume import claimed
from sft_course.tools.settings import SFTError

SMALL = {"size": 64}


@pytest.fixture
def tuner(stripes):
    return FineTuner(stripes, "lite0", **SMALL)


def state(tuner):
    return {k: v.clone() for k, v in tuner.backbone.model.state_dict().items()}


def test_the_head_phase_moves_the_head_alone(tuner):
    before = state(tuner)
    tuner.run_phase(Phase("head"))
    assert what_moved(before, state(tuner)) == ["classifier.weight", "classifier.bias"]


def test_upper_stages_move_and_what_is_below_keeps_every_bit(tuner):
    before = state(tuner.run_phase(Phase("head")))
    tuner.run_phase(Phase(3, epochs=1, warmup=0, schedule="constant"))
    moved = what_moved(before, state(tuner))
    allowed = {n for s in tuner.backbone.stages[-3:] for n in s.parameters}
    assert set(moved) == allowed and not any("running" in n or "num_batches" in n for n in moved)


def test_batch_statistics_move_only_where_they_are_asked_to(tuner):
    before = state(tuner)
    tuner.run_phase(Phase("all", epochs=1, views=0, batch_stats=True))
    assert any("running_mean" in n for n in what_moved(before, state(tuner)))


def test_training_is_the_same_with_and_without_kept_activations(stripes):
    "To 16-bit rounding: the same views, once kept and once computed anew because they would not fit."
    def after(gigabytes):
        tuner = FineTuner(stripes, "lite0", settings=load_settings(cache_gigabytes=gigabytes), **SMALL)
        tuner.run_phase(Phase("head"))
        tuner.run_phase(Phase(3, epochs=2, lr=1e-3))
        return tuner.history[-1]["val_loss"]
    kept = after(4)
    with pytest.warns(UserWarning, match="more than cache_gigabytes"):
        anew = after(1e-6)
    assert kept == pytest.approx(anew, rel=.02, abs=1e-4)


def test_the_head_stays_where_nothing_is_clearly_better(stripes):
    result = fine_tune(stripes, **SMALL)
    assert result.card["chosen"] == "head" and result.accuracy == result.card["metrics"]["head_accuracy"]


def test_clearly_better_counts_pictures_and_not_points():
    base = np.arange(100) < 80
    assert not clearly_better(np.arange(100) < 81, base) and clearly_better(np.arange(100) < 90, base)
    mixed = np.r_[np.zeros(9, bool), np.ones(83, bool), np.zeros(8, bool)]  # 12 won, 9 lost
    assert not clearly_better(mixed, base)


def test_an_artifact_comes_back_as_it_was(stripes, tmp_path):
    result = fine_tune(stripes, out=tmp_path / "a", **SMALL)
    again = load_artifact(tmp_path / "a")
    path = stripes / "waves" / "00.jpg"
    assert again.predict(path).probabilities == result.predict(path).probabilities
    assert again.predict([path, path])[1].label == "waves" and again.classes == ["stripes", "waves"]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {".lock", "card.json", "history.csv", "model.safetensors", "report.html"}
    assert again.report == result.report and "stripes" in again.report


def test_a_damaged_artifact_is_refused_in_a_sentence(stripes, tmp_path):
    fine_tune(stripes, out=tmp_path / "a", phases=(Phase("head"),), **SMALL)
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    (tmp_path / "a" / "card.json").write_text(json.dumps(card | {"classes": ["x", "y", "z"]}))
    with pytest.raises(SFTError, match="does not fit card.json"):
        load_artifact(tmp_path / "a")
    (tmp_path / "a" / "card.json").write_text(json.dumps(card))
    whole = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SFTError, match="damaged"):
        load_artifact(tmp_path / "a")
    (tmp_path / "a" / "card.json").write_text("{")
    with pytest.raises(SFTError, match="not an artifact"):
        load_artifact(tmp_path / "a")


def test_test_pictures_are_not_learned_from(tmp_path):
    "With the labels of the test split turned round, the same weights come out."
    draw(tmp_path / "one" / "train")
    draw(tmp_path / "one" / "val", n=4, seed=9)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "train").rename(tmp_path / "two" / "train")
    kept = fine_tune(draw_swapped(tmp_path / "two", tmp_path / "one" / "val"), **SMALL)
    (tmp_path / "two" / "train").rename(tmp_path / "one" / "train")
    plain = fine_tune(tmp_path / "one", **SMALL)
    assert plain.accuracy == pytest.approx(1 - kept.accuracy)
    assert what_moved(plain.backbone.model.state_dict(), kept.backbone.model.state_dict()) == []


def draw_swapped(root, val):
    import shutil
    shutil.copytree(val / "stripes", root / "val" / "waves")
    shutil.copytree(val / "waves", root / "val" / "stripes")
    return root


def test_no_global_state_is_left_changed(stripes):
    torch.manual_seed(5)
    np.random.seed(5)
    mine, theirs, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    fine_tune(stripes, **SMALL)
    assert torch.equal(mine, torch.get_rng_state()) and (theirs == np.random.get_state()[1]).all()
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32


def test_from_scratch_runs_without_a_head_phase(stripes):
    tuner = FineTuner(stripes, "lite0", weights=None, **SMALL)
    result = tuner.run(replace(scratch_phase(tuner.settings), epochs=1))
    assert result.card["metrics"]["head_accuracy"] is None and result.card["chosen"] == "tuned"


@pytest.mark.parametrize("wrong", [{"lr": 0.}, {"epochs": 0}, {"batch_size": 1}, {"depth_decay": 2.}, {"warmup": 1.}])
def test_a_phase_out_of_range_is_refused(wrong):
    with pytest.raises(SFTError, match=f"Phase: {next(iter(wrong))} = "):
        Phase("head", **wrong)


@pytest.mark.parametrize("train", ["body", 0, 11, 2.5])
def test_what_trains_must_be_known(tuner, train):
    with pytest.raises(SFTError, match="use 'head', 'all', or a number of stages from 1 to 10"):
        tuner.run_phase(Phase(train))


def test_a_loss_that_is_not_finite_ends_the_phase_and_what_was_good_is_kept(tuner):
    before = state(tuner.run_phase(Phase("head")))
    with pytest.warns(UserWarning, match=r"phase 2 \(train = 'all'\) ended early: the (validation loss became nan after epoch 1|loss became \w+ at step \d+)"):
        tuner.run_phase(Phase("all", epochs=3, lr=1e18, warmup=0))
    assert what_moved(before, state(tuner)) == [] and len(tuner.history) == 1


def test_a_loss_that_is_not_finite_from_the_start_is_an_error_where_nothing_else_is_there(stripes):
    tuner = FineTuner(stripes, "lite0", weights=None, **SMALL)
    with pytest.raises(SFTError, match="use a smaller learning rate"):
        tuner.run(Phase("all", epochs=1, lr=1e30, warmup=0))


# ---- stopped, and gone on

LONG = (Phase("head", looks_at="last"), Phase(3, epochs=2, views=2), Phase("all", epochs=2, views=0, batch_stats=True))


class Killed(Exception):
    pass


def start(folder, out, stop_at=None, resume=False, **more):
    "A run that dies when the history has `stop_at` rows."
    seen = []

    def watch(row):
        seen.append(row)
        if len(seen) == stop_at:
            raise Killed
    tuner = FineTuner(folder, "lite0", out=out, weights=None, watch=watch, **(SMALL | more))
    return tuner.run(*LONG, resume=resume)


def weights(out):
    return (out / "model.safetensors").read_bytes(), (out / "history.csv").read_bytes()


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    "Pictures whose labels mean nothing: no head is ever perfect, so every phase runs."
    folder = draw(tmp_path_factory.mktemp("hard") / "data", n=24)
    for i, p in enumerate(sorted((folder / "stripes").iterdir())[::2]):
        q = folder / "waves" / f"{2 * i:02}.jpg"
        p.rename(folder / "held"), q.rename(p), (folder / "held").rename(q)
    return folder


@pytest.fixture(scope="module")
def never_stopped(hard, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert len(start(hard, out).history) == 5
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(1, 6))
def test_a_run_killed_after_any_epoch_of_any_phase_goes_on_to_the_same_bytes(hard, never_stopped, tmp_path, rows):
    with pytest.raises(Killed):
        start(hard, tmp_path, rows)
    assert not (tmp_path / "card.json").exists()
    start(hard, tmp_path, resume=True)
    assert weights(tmp_path) == never_stopped


@pytest.mark.slow
def test_a_run_killed_again_and_again_gets_there_too(hard, never_stopped, tmp_path):
    for rows in (2, 3, 4, 5):
        with pytest.raises(Killed):
            start(hard, tmp_path, rows, resume=True)
    start(hard, tmp_path, resume=True)
    assert weights(tmp_path) == never_stopped


def test_a_run_with_another_plan_is_not_gone_on_with(hard, tmp_path):
    with pytest.raises(Killed):
        start(hard, tmp_path, 2)
    with pytest.raises(SFTError, match="that run had other seed"):
        start(hard, tmp_path, resume=True, seed=7)
    with pytest.raises(SFTError, match="give `out`"):
        start(hard, None, resume=True)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_stop_signal_lets_the_step_end_and_the_run_goes_on_from_there(hard, tmp_path, monkeypatch, step):
    "With a batch of 8 an epoch has four steps: in the middle of it, at its end, in the next."
    import signal

    import sft_course.tools.steps as module
    from sft_course.tools.training import Stopped
    steps, usual = [], module.add_gradients

    def counted(*args, **how):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return usual(*args, **how)
    monkeypatch.setattr(module, "add_gradients", counted)
    def run(out, **how):
        FineTuner(hard, "lite0", out=out, weights=None, **SMALL).run(Phase(3, epochs=2, batch_size=8, views=2), **how)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "a")
    assert stopped.value.signal == signal.SIGTERM and stopped.value.checkpoint == tmp_path / "a" / "last.ckpt"
    run(tmp_path / "a", resume=True)
    monkeypatch.setattr(module, "add_gradients", usual)
    run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


TRIED = (Phase("head", looks_at="last"), Phase(3, epochs=2, batch_size=8, views=2, lr=.03, warmup=0, trial=True), Phase(3, epochs=2, views=2))


@pytest.mark.slow
def test_after_a_trial_in_vain_no_more_is_tuned_and_a_stopped_run_ends_in_the_same_place(hard, tmp_path):
    said = []

    def run(out, stop_at=None, resume=False):
        def watch(row):
            if row["phase"] == 2 and row["epoch"] == stop_at:
                raise Killed
        return FineTuner(hard, "lite0", out=out, weights=None, watch=watch, say=said.append, **SMALL).run(*TRIED, resume=resume)
    result = run(tmp_path / "whole")
    assert [row["phase"] for row in result.history] == [1, 2, 2] and result.card["chosen"] == "head"
    assert [phase["trial"] for phase in result.card["phases"]] == [False, True]
    assert any("the trial did harm" in sentence for sentence in said)
    assert run(tmp_path / "whole", resume=True).accuracy == result.accuracy
    for epoch in (1, 2):
        with pytest.raises(Killed):
            run(tmp_path / str(epoch), stop_at=epoch)
        run(tmp_path / str(epoch), resume=True)
        assert weights(tmp_path / str(epoch)) == weights(tmp_path / "whole")


def test_after_a_trial_that_helps_the_next_phase_runs(stripes):
    "From random weights, where nothing is known yet."
    phase = Phase("all", epochs=2, lr=1e-3, views=0, batch_stats=True, trial=True)
    result = FineTuner(stripes, "lite0", weights=None, **SMALL).run(phase, replace(phase, trial=False))
    losses = [row["val_loss"] for row in result.history]
    assert len(losses) == 4 and losses[1] < np.log(2)


def test_two_runs_do_not_share_a_folder(hard, tmp_path):
    with claimed(tmp_path), pytest.raises(SFTError, match="another run is writing there"):
        start(hard, tmp_path)


def test_a_head_on_every_stage_is_saved_and_opened(hard, tmp_path):
    tuner = FineTuner(hard, "lite0", out=tmp_path, **SMALL)
    result = tuner.run(Phase("head", looks_at="every"))
    again = load_artifact(tmp_path)
    path = sorted((hard / "waves").iterdir())[0]
    assert result.card["head"] == "every" and again.predict(path).probabilities == result.predict(path).probabilities
    assert result.test.accuracy == result.accuracy == pytest.approx(tuner.measure().accuracy, abs=.1)
