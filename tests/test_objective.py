"Losses, samplers and views of a phase: by name and of one's own, resumable, refused in a sentence; and the trick lab."
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PHOTOS, REPO, draw
from torch import nn

from sft_course import FineTuner, Phase, load_settings
from sft_course.objective import SAM, TailAverage, holm, paired_difference, pull_to_start
from sft_course.tools.datasets import open_dataset
from sft_course.tools.intake import scan
from sft_course.tools.objectives import AUGMENTS, LOSSES, SAMPLERS, make_loss, require_loss, summed
from sft_course.tools.phases import with_objective
from sft_course.tools.settings import SFTError

SMALL = {"size": 64}
SHORT = {"epochs": 2, "batch_size": 8, "views": 3}


def named(value):
    "An id for a test that is the same in every process: no addresses."
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def squared(logits, labels):
    "A loss of one's own: the squared error of the probabilities (Brier)."
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).square().sum(1)


def as_sum(logits, labels):
    return squared(logits, labels).sum(), len(labels)


def state_after(folder, **objective):
    tuner = FineTuner(folder, "lite0", weights=None, **SMALL).run_phase(Phase(3, **SHORT, **objective))
    return tuner.backbone.model.state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    "Images whose labels mean little, of two classes of unequal size."
    folder = draw(tmp_path_factory.mktemp("hard") / "data", n=24)
    for p in sorted((folder / "waves").iterdir())[12:]:
        p.unlink()
    return folder


@pytest.fixture(scope="module")
def usual(hard, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return state_after(hard)


@pytest.mark.parametrize("given", [{"loss": "weighted"}, {"loss": "focal"}, {"loss": "logit_adjusted"}, {"loss": squared},
                                   {"sampler": "balanced"}, {"augment": "strong"}, {"augment": "plain"},
                                   {"augment": "mixup"}, {"augment": "cutmix"}], ids=named)
def test_every_name_changes_what_is_learned_and_the_same_again_does_not(hard, usual, given):
    one = state_after(hard, **given)
    assert not same(one, usual) and same(one, state_after(hard, **given))


def test_defaults_change_nothing(hard, usual):
    assert same(usual, state_after(hard, loss="cross_entropy", sampler="shuffle", augment="crops"))


def test_a_loss_for_each_image_and_its_sum_are_the_same_loss(hard):
    assert same(state_after(hard, loss=squared), state_after(hard, loss=as_sum))


def test_own_samplers_and_views_are_used(hard):
    def reversed_order(labels, rng): return np.arange(len(labels))[::-1]
    def still(n, seed): return np.tile(np.float32([[.5, 0, 0], [0, .5, 0]]), (n, 1, 1))
    assert not same(state_after(hard, sampler=reversed_order), state_after(hard, augment=still))


@pytest.mark.parametrize("wrong, says", [
    ({"loss": "focsl"}, "loss = 'focsl': use one of cross_entropy"), ({"loss": 3}, "give a name, or a function"),
    ({"sampler": "even"}, "use one of shuffle, balanced"), ({"augment": "flip"}, "use one of crops, strong"),
    ({"loss": None}, "give a name"), ({"loss": "focal", "label_smoothing": .1}, "label_smoothing is for cross_entropy")], ids=named)
def test_what_cannot_be_is_refused_where_it_is_written(wrong, says):
    with pytest.raises(SFTError, match=says) as e:
        Phase(3, **wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["loss", "sampler", "augment"])
def test_the_exact_head_takes_none_of_them(name):
    with pytest.raises(SFTError, match=f"{name} = .* would change nothing"):
        Phase("head", **{name: {"loss": "focal", "sampler": "balanced", "augment": "strong"}[name]})


@pytest.mark.parametrize("loss, says", [
    (nn.CrossEntropyLoss(), "give a loss for each"), (lambda z: z, "failed on logits"), (lambda z, y: 1., "gave float"),
    (lambda z, y: (z.argmax(1) != y).float(), "has no gradient"), (lambda z, y: z, "give a loss for each")], ids=range(5))
def test_a_loss_that_cannot_be_used_is_refused_before_training(hard, loss, says):
    tuner = FineTuner(hard, "lite0", weights=None, **SMALL)
    before = {k: v.clone() for k, v in tuner.backbone.model.state_dict().items()}
    with pytest.raises(SFTError, match=says) as e:
        tuner.run_phase(Phase(3, loss=loss))
    assert "\n" not in str(e.value) and same(before, tuner.backbone.model.state_dict())


def test_a_sampler_or_views_that_cannot_be_used_are_refused(hard):
    with pytest.raises(SFTError, match="positions from 0 to"):
        state_after(hard, sampler=lambda labels, rng: np.arange(3))
    with pytest.raises(SFTError, match="give views"):
        state_after(hard, augment=lambda n, seed: np.zeros((n, 4)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("given", [{"loss": squared, "sampler": "balanced"}, {"loss": "focal", "augment": "mixup"}], ids=named)
def test_a_run_with_its_own_objective_goes_on_to_the_same_bytes_and_with_no_other(hard, tmp_path, given):
    def run(out, stop_at=None, **how):
        rows = []

        def watch(row):
            rows.append(row)
            if len(rows) == stop_at:
                raise Killed
        chosen = how.pop("given", given)
        return FineTuner(hard, "lite0", out=out, weights=None, watch=watch, **SMALL).run(Phase(3, **SHORT, **chosen), **how)
    with pytest.raises(Killed):
        run(tmp_path / "a", 1)
    with pytest.raises(SFTError, match="that run had other phases"):
        run(tmp_path / "a", resume=True, given={"loss": lambda z, y: 2 * squared(z, y)})
    run(tmp_path / "a", resume=True)
    result = run(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert result.card["phases"][0]["loss"].startswith("squared " if given["loss"] is squared else "focal")
    assert run(tmp_path / "b", resume=True).accuracy == result.accuracy  # it has ended already


def test_a_recipe_gets_its_objective_where_stages_train():
    phases = with_objective((Phase("head"), Phase(6)), loss="focal", sampler=None, augment=None)
    assert phases == (Phase("head"), Phase(6, loss="focal"))
    assert with_objective((Phase("head"),), loss=None) == (Phase("head"),)
    with pytest.raises(SFTError, match="so loss would change nothing"):
        with_objective((Phase("head"),), loss="focal")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["blooms", "hands"])
def test_an_own_loss_learns_on_flowers_and_on_hands(data, cache):
    if data == "hands":
        folder = PHOTOS.parent / "hands"
        if not folder.is_dir():
            pytest.skip("the photographs are not here")
    else:
        folder = open_dataset(load_settings(dataset="blooms", blooms_train=10, blooms_test=10))
    tuner = FineTuner(scan(folder).sample_per_class(10), size=64)
    tuner.run_phase(Phase("head", looks_at="last"))
    tuner.run_phase(Phase(3, epochs=2, batch_size=8, views=2, loss=squared))
    losses = [row["train_loss"] for row in tuner.history if row["train"] == 3]
    assert np.isfinite(losses).all() and tuner.measure().accuracy > 1.5 / len(tuner.catalog.classes)


def test_every_name_makes_a_loss_that_can_be_used():
    for name in LOSSES:
        require_loss(make_loss(name, torch.tensor([5, 2, 1])), 3)
    assert set(SAMPLERS) == {"shuffle", "balanced"} and "crops" in AUGMENTS


def test_the_pull_is_that_of_the_formula_and_counts_once_in_parts():
    line = nn.Linear(3, 2)
    total = pull_to_start(line, summed(squared), .5)
    with torch.no_grad():
        line.bias += 2
    z, y = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    parts = [total(z[i:i + 2], y[i:i + 2]) for i in (0, 2, 4)]
    whole, count = total(z, y)
    assert torch.isclose(sum(v for v, _ in parts) / 6, whole / count) and count == 6
    assert torch.isclose(whole / count, squared(z, y).mean() + .25 * 8)


def test_sam_with_no_radius_is_adamw_on_every_second_call():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    sam, adam = SAM([{"params": a.parameters(), "lr": .1}], rho=1e-12), torch.optim.AdamW(b.parameters(), .1)
    x = torch.ones(1, 2)
    for net, optimizer, calls in ((a, sam, 6), (b, adam, 3)):
        for _ in range(calls):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-5)


def test_a_tail_average_is_the_mean_of_the_tail():
    net = nn.Linear(1, 1)
    average = TailAverage(net, 2)
    for v in range(5):
        nn.init.constant_(net.weight, v)
        average.update_parameters(net)
    assert average.module.weight.item() == 3


def test_statistics_agree_with_scipy():
    from scipy.stats import ttest_1samp
    d = np.random.default_rng(0).normal(.2, 1, 30)
    mine, theirs = paired_difference(d), ttest_1samp(d, 0)
    assert np.isclose(mine.p, theirs.pvalue) and np.allclose((mine.low, mine.high), theirs.confidence_interval())
    assert paired_difference([1, 1]).p == 0 and paired_difference([0, 0]).p == 1
    with pytest.raises(SFTError, match="give two differences or more"):
        paired_difference([1.])
    assert np.allclose(holm([.04, .01, .03, 1]), [.09, .04, .09, 1]) and len(holm([])) == 0


def test_a_race_is_refused_where_the_table_has_no_such_case():
    from sft_course.tools.trick_lab import Trick, race
    with pytest.raises(SFTError, match="images a class"):
        race(Trick(), cases=(("garden", 7),))
    with pytest.raises(SFTError, match="cross_entropy"):
        race(Trick(loss="focsl"))


def test_the_recorded_table_is_whole_and_small(monkeypatch):
    from sft_course.tools.trick_lab import trick_runs
    monkeypatch.setenv("SFT_STRICT", "1")  # missing rows, or those of other code, are an error
    table = trick_runs()
    assert (table.groupby(["data", "n", "trick"]).seed.nunique() == 3).all()
    assert set(zip(table.data, table.n)) == {(d, n) for d in ("garden", "night", "ants_bees", "hands") for n in (10, 40)}
    assert (REPO / "nbs" / "runs" / "11_tricks.csv").stat().st_size < 300_000
