"Averages of weights, batch norms after them, corruptions, answers withheld, and a run that ends with an average."
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import update_bn
from typer.testing import CliRunner

from sft_course import Phase, fine_tune
from sft_course.robustness import average_states, coverage_curve, greedy_soup, interpolate, refresh_norms, selective
from sft_course.tools.artifact import load_artifact, read_card
from sft_course.tools.averages import fine_tune_average
from sft_course.tools.cli import app
from sft_course.tools.corruptions import CORRUPTIONS, corrupt
from sft_course.tools.logits import Evaluation
from sft_course.tools.predict import fitted_temperature
from sft_course.tools.settings import SFTError

RECIPE = Phase("head"), Phase(2, epochs=2, batch_size=8, views=2)


def states(n=3):
    return [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict() for _ in range(n)]


def evaluation(probabilities, labels):
    logits = np.log(np.asarray(probabilities))
    return Evaluation(tuple("abc"[:logits.shape[1]]), [str(i) for i in range(len(labels))], np.array(labels), logits)


# ---- averages

def test_average_is_torchs_own_mean_and_changes_nothing_it_was_given():
    given = states()
    before = [{k: v.clone() for k, v in s.items()} for s in given]
    mean = average_states(given)
    for k, v in mean.items():
        if v.is_floating_point():
            assert torch.allclose(v, torch.stack([s[k] for s in given]).mean(0), atol=1e-7)
        else:
            assert torch.equal(v, given[0][k])
        assert v.dtype == given[0][k].dtype and v.data_ptr() != given[0][k].data_ptr()
    assert all(torch.equal(s[k], b[k]) for s, b in zip(given, before) for k in s)


def test_the_ends_of_the_line_are_the_states_and_its_middle_torchs_lerp():
    a, b = states(2)
    assert all(torch.equal(v, a[k]) for k, v in interpolate(a, b, 0.).items())
    assert all(torch.equal(v, b[k]) for k, v in interpolate(a, b, 1.).items() if v.is_floating_point())
    assert torch.allclose(interpolate(a, b, .3)["0.weight"], torch.lerp(a["0.weight"], b["0.weight"], .3), atol=1e-7)


def test_half_precision_is_averaged_in_more_digits_than_it_has():
    many = [{"w": torch.full((1,), 1., dtype=torch.bfloat16)} for _ in range(1000)]
    assert average_states(many)["w"].item() == 1 and average_states(many)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("given, weights", [([], None), (states(2), [1.]), ([states(1)[0], nn.Linear(2, 2).state_dict()], None)],
                         ids=["none", "one weight for two", "two networks"])
def test_states_that_do_not_fit_are_refused_in_a_sentence(given, weights):
    with pytest.raises(SFTError, match="average_states"):
        average_states(given, weights)


def test_a_greedy_soup_begins_with_the_best_and_leaves_out_what_lowers_it():
    given = [{"w": torch.tensor([v])} for v in (0., 4., 2., 100.)]
    taken, soup = greedy_soup(given, lambda s: -abs(s["w"].item() - 3))  # 2 and 4 are alike, 3 is right
    assert taken == [1, 2] and soup["w"].item() == 3


def test_fresh_norms_are_those_of_torch_and_modes_and_momentum_stay():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=.3), nn.ReLU()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    shown = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    nets[0].eval()
    refresh_norms(nets[0], shown)
    update_bn(shown, nets[1])
    assert torch.allclose(nets[0][1].running_mean, nets[1][1].running_mean, atol=1e-6)
    assert torch.allclose(nets[0][1].running_var, nets[1][1].running_var, atol=1e-5)
    assert nets[0][1].momentum == .3 and not any(m.training for m in nets[0].modules())


def test_fresh_norms_leave_the_modes_alone_after_an_error_too():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    with pytest.raises(RuntimeError):
        refresh_norms(net, [torch.zeros(2, 5)])
    assert all(m.training for m in net.modules()) and net[1].momentum == .1


# ---- corruptions

@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_a_corruption_depends_on_the_image_alone_and_grows_with_its_strength(kind):
    images = np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3), dtype=np.uint8)
    for strength in (1, 5):
        together = corrupt(images, kind, strength)
        assert together.shape == images.shape and together.dtype == np.uint8
        assert all((corrupt(images[i:i + 1], kind, strength)[0] == together[i]).all() for i in range(3))
    changed = [np.abs(corrupt(images, kind, s).astype(int) - images).mean() for s in (1, 3, 5)]
    assert changed[0] < changed[1] < changed[2]


@pytest.mark.parametrize("kind, strength", [("fog", 1), ("noise", 0), ("noise", 6), ("noise", 1.5)])
def test_an_unknown_corruption_is_refused(kind, strength):
    with pytest.raises(SFTError, match="use one of noise"):
        corrupt(np.zeros((1, 4, 4, 3), np.uint8), kind, strength)


# ---- answers withheld

def test_selective_by_threshold_and_by_coverage():
    p = np.array([[.9, .1], [.6, .4], [.2, .8], [.5, .5]])
    assert selective(p, threshold=.8).tolist() == [True, False, True, False]
    assert selective(p, coverage=.75).tolist() == [True, True, True, False]
    assert not selective(p, coverage=0).any() and selective(p, coverage=1).all()


@pytest.mark.parametrize("how", [{}, {"threshold": .5, "coverage": .5}, {"coverage": 1.5}], ids=["neither", "both", "above 1"])
def test_selective_refuses_what_cannot_be(how):
    with pytest.raises(SFTError, match="selective"):
        selective(np.ones((2, 2)) / 2, **how)


def test_the_curve_of_coverage_ends_at_the_accuracy_of_all():
    e = evaluation([[.9, .1], [.6, .4], [.2, .8], [.55, .45]], [0, 1, 1, 0])
    coverage, right = coverage_curve(e)
    assert coverage.tolist() == [.25, .5, .75, 1.] and right.tolist() == [1., 1., 2 / 3, .75]


def test_where_all_validation_images_are_right_nothing_is_made_surer():
    assert fitted_temperature(evaluation([[.9, .1]] * 5, [0] * 5)) == 1
    assert fitted_temperature(evaluation([[.9, .1]] * 5, [0, 0, 1, 1, 0])) > 1


# ---- a run

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Images that hold no class at all: a head cannot be perfect, so stages are tuned."
    folder, rng = tmp_path_factory.mktemp("data") / "data", np.random.default_rng(0)
    for name in ("stripes", "waves"):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def wise(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("wise") / "net"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return fine_tune_average(data, "wise", "lite0", out, phases=RECIPE, size=48)


def test_the_card_tells_the_average_and_the_temperature_and_survives_a_round_trip(wise):
    card = read_card(wise.folder)
    assert card["temperature"] == wise.temperature > 0
    assert card["average"]["kind"] == "wise" and 0 <= card["average"]["weight"] <= 1
    loaded = load_artifact(wise.folder)
    assert loaded.temperature == wise.temperature
    assert all(torch.equal(v, wise.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_a_run_that_ended_with_another_average_is_not_taken_for_this_one(wise, data):
    again = {"phases": RECIPE, "size": 48, "resume": True}
    with pytest.raises(SFTError, match="had average = 'wise'"):
        fine_tune_average(data, "soup", "lite0", wise.folder, **again)
    with pytest.warns(UserWarning, match="has ended already"):
        assert fine_tune_average(data, "wise", "lite0", wise.folder, **again).card["sha256"]


# Without a head of its own what is saved is the average; only `wise` needs one, to go back to.
PHASES = {"wise": RECIPE, "soup": RECIPE[1:], "ema": RECIPE[1:]}

KILLED = """
import os, sys
from sft_course import Phase
from sft_course.tools import averages

def die(*_): os.kill(os.getpid(), 9)

data, out, average, moment = sys.argv[1:]
if moment == "before the average": averages._candidate = die  # for a soup, its other runs have ended by then
def watch(row): moment == "in the run" and row["epoch"] == 1 and die()
phases = Phase("head"), Phase(2, epochs=2, batch_size=8, views=2)
averages.fine_tune_average(data, average, "lite0", out, phases=phases if average == "wise" else phases[1:], size=48, watch=watch)
"""


@pytest.fixture(scope="module")
def never_killed(data, tmp_path_factory):
    "The folders of runs that were left alone, by their average; each is made once."
    made = {}

    def folder(average):
        if average not in made:
            made[average] = tmp_path_factory.mktemp(average) / "net"
            fine_tune_average(data, average, "lite0", made[average], phases=PHASES[average], size=48)
        return made[average]
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("average", sorted(PHASES))
@pytest.mark.parametrize("moment", ["in the run", "before the average"])
def test_killed_and_resumed_the_average_is_the_same_bytes(never_killed, data, tmp_path, average, moment):
    out, whole = tmp_path / "net", never_killed(average)
    run = [sys.executable, "-c", KILLED, str(data), str(out), average, moment]
    assert subprocess.run(run, timeout=300).returncode == -signal.SIGKILL
    assert (out / "last.ckpt").exists() and not (out / "card.json").exists()
    resumed = fine_tune_average(data, average, "lite0", out, phases=PHASES[average], size=48, resume=True)
    assert resumed.card["average"] == read_card(whole)["average"] and resumed.card["average"]["kind"] == average
    assert average == "wise" or resumed.card["chosen"] == "tuned"
    for name in ("model.safetensors", "history.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_predict_abstains_at_the_calibrated_confidence(wise, data):
    plain, careful = wise.predict(data), wise.predict(data, abstain=.95)
    for p, q in zip(plain, careful):
        assert q.unsure == (q.probability < .95) and q.label in (None, p.label) and not p.unsure
        assert max(q.probabilities, key=q.probabilities.get) == p.label
    assert all(p.unsure for p in wise.predict(data, abstain=1.) if p.probability < 1)


@pytest.mark.parametrize("wrong", [0, -1, 90, "0.9", True, float("nan")])
def test_a_confidence_that_cannot_be_is_refused(wise, data, wrong):
    with pytest.raises(SFTError, match="abstain = .* use a confidence above 0"):
        wise.predict(data, abstain=wrong)


def test_an_artifact_without_a_temperature_still_predicts_and_does_not_abstain(wise, data, tmp_path):
    old = load_artifact(wise.folder)
    old.card.pop("temperature")
    assert old.predict(data)[0].label
    with pytest.raises(SFTError, match="has no temperature"):
        old.predict(data, abstain=.9)


def test_the_command_abstains_in_lines_json_and_tables(wise, data, tmp_path):
    def said(*more):
        result = CliRunner().invoke(app, ["predict", str(wise.folder), str(data), *more])
        assert result.exit_code == 0, result.output
        return result.stdout
    n = sum(p.unsure for p in wise.predict(data, abstain=1.))
    assert said("--abstain", "1").count("unsure, perhaps") == n
    rows = json.loads(said("--abstain", "1", "--json"))["predictions"]
    assert sum(r["label"] is None for r in rows) == n
    said("--abstain", "1", "--csv", str(tmp_path / "table.csv"))
    lines = (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert sum(",," in line for line in lines) == n


@pytest.mark.slow
def test_a_soup_says_what_it_is_made_of(data):
    card = fine_tune_average(data, "soup", "lite0", phases=RECIPE, size=48).card
    assert card["average"]["kind"] == "soup" and set(card["average"]["of"]) <= {1., .5, 2.}


def test_an_average_needs_a_known_name_and_a_start(data):
    with pytest.raises(SFTError, match="use one of wise, soup, ema"):
        fine_tune_average(data, "swa")
    with pytest.raises(SFTError, match="begin with Phase"):
        fine_tune_average(data, "wise", "lite0", phases=RECIPE[1], size=48)


def test_without_an_average_the_card_says_so(data):
    assert fine_tune(data, "lite0", phases=Phase("head"), size=48).card["average"] is None
