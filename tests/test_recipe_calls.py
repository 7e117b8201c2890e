"What a run may be called with, what it says, and what is left when it has ended."
import re
import sys
import types

import numpy as np
import pytest
import torch
from conftest import draw

from sft_course import FineTuner, Phase, fine_tune, load_artifact, load_settings
from sft_course.backbones import Backbone
from sft_course.recipe import default_phases
from sft_course.tools.artifact import every_stage
from sft_course.tools.checkpoints import read_checkpoint
from sft_course.tools.intake import scan
from sft_course.tools.opening import open_backbone
from sft_course.tools.phases import Candidate, Head, clearly_better
from sft_course.tools.settings import SFTError

SMALL = {"size": 48, "weights": None}
NETWORK = "test_efficientnet"
HEAD = Phase("head")


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    "Images whose labels mean nothing: no head is ever perfect, so every phase runs."
    folder = draw(tmp_path_factory.mktemp("hard") / "data", n=24)
    for i, p in enumerate(sorted((folder / "stripes").iterdir())[::2]):
        q = folder / "waves" / f"{2 * i:02}.jpg"
        p.rename(folder / "held"), q.rename(p), (folder / "held").rename(q)
    return folder


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- numbers that grow


@pytest.mark.parametrize("n", [1026, 1027, 5000, 200_000])
def test_any_number_of_images_that_differ_can_be_counted(n):
    right, than = np.arange(n) < n * .6, np.arange(n) >= n * .6
    assert clearly_better(right, than) and not clearly_better(than, right)
    half = np.arange(n) % 2 == 0
    assert not clearly_better(half, ~half)


def test_the_test_of_signs_is_the_exact_one():
    import math
    for won in range(8):
        for lost in range(8):
            right, than = np.arange(won + lost) < won, np.arange(won + lost) >= won
            tail = sum(math.comb(won + lost, k) for k in range(won, won + lost + 1))
            assert clearly_better(right, than) == (5 * tail < 2 ** (won + lost)), (won, lost)


# ---- the head is never lost


@pytest.mark.slow
def test_the_head_is_in_the_checkpoint_before_anything_is_chosen(hard, tmp_path, monkeypatch):
    from sft_course.tools import engine
    from sft_course.tools import phases as choosing
    phases = HEAD, Phase(2, epochs=1, views=1)
    fine_tune(hard, NETWORK, tmp_path / "whole", phases=phases, **SMALL)

    def fails(*_):
        raise OverflowError
    monkeypatch.setattr(choosing, "clearly_better", fails)
    with pytest.raises(OverflowError):
        fine_tune(hard, NETWORK, tmp_path / "out", phases=phases, **SMALL)
    monkeypatch.undo()
    more = read_checkpoint(tmp_path / "out" / "last.ckpt")["more"]
    assert more["also"]["done"] == 1 and more["also"]["head"]["weight"].shape[0] == 2

    monkeypatch.setattr(engine, "_fit_head", fails)  # it must not be fitted again
    fine_tune(hard, NETWORK, tmp_path / "out", phases=phases, resume=True, **SMALL)
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- a head on every stage


def test_the_head_of_a_result_is_there_also_on_every_stage(hard):
    tuner = FineTuner(hard, NETWORK, **SMALL)
    result = tuner.run(Phase("head", looks_at="every"))
    backbone = result.backbone
    assert result.card["head"] == "every" and backbone.head.out_features == 2
    assert {p for s in backbone.stages for p in s.parameters} == dict(backbone.model.named_parameters()).keys()
    assert all(backbone.model.get_submodule(m) is not None for s in backbone.stages for m in s.modules)


@pytest.mark.parametrize("looks_at", ["every", "last"])
def test_a_tuner_can_run_again_and_the_first_result_stays(hard, looks_at):
    tuner = FineTuner(hard, NETWORK, **SMALL)
    first = tuner.run(Phase("head", looks_at=looks_at))
    before = {k: v.clone() for k, v in first.backbone.model.state_dict().items()}
    assert tuner.measure().accuracy == pytest.approx(first.accuracy, abs=.11)
    second = tuner.run(Phase(2, epochs=1, views=1))
    assert [r["train"] for r in second.history] == ["head", 2] and len(first.history) == 1
    assert all(torch.equal(v, before[k]) for k, v in first.backbone.model.state_dict().items())
    assert np.isfinite(second.accuracy)


def test_every_stage_names_what_is_there():
    wide = every_stage(open_backbone("lite0", None), 3)
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert wide.model(x).shape == (1, 3) and wide.head is wide.model.linear
    assert [s.name for s in wide.stages[:-1]] == [s.name for s in open_backbone("lite0", None).stages[:-1]]


# ---- equality


def test_candidates_can_be_compared_and_put_into_sets():
    one, two = (Candidate(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), {}) for _ in range(2))
    assert one == one and one != two and len({one, two, one}) == 2
    head = Head(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), {}, weight=torch.zeros(2, 2))
    assert head == head and len({head}) == 1


# ---- room


@pytest.mark.slow
def test_the_head_phase_keeps_no_more_than_the_cache_may_hold(hard, tmp_path):
    def run(gigabytes):
        cache = tmp_path / str(gigabytes)
        tuner = FineTuner(hard, NETWORK, settings=load_settings(cache=str(cache), cache_gigabytes=gigabytes), **SMALL)
        tuner.run_phase(HEAD)
        return tuner.head, sum(f.stat().st_size for f in (cache / "activations").glob("*.npy"))
    kept, room = run(1)
    anew, none = run(1e-9)
    assert room > 0 and none <= 1
    assert torch.allclose(kept.weight, anew.weight, atol=1e-4) and torch.allclose(kept.test, anew.test, atol=1e-3)


def test_a_size_that_needs_more_than_there_is_memory_for_is_refused_before_it_is_tried(stripes, monkeypatch):
    import sft_course.tools.budget as budget
    import sft_course.tools.tuner as tuner
    monkeypatch.setattr(budget, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(tuner, "decode_once", lambda *_, **__: pytest.fail("it began to decode"))
    with pytest.raises(SFTError, match=r"size = 1024: .* GB of memory, and 0.0 GB are free"):
        FineTuner(stripes, NETWORK, size=1024, weights=None)


# ---- parts that are empty


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_part_without_images_is_said_before_training(tmp_path, part):
    draw(tmp_path / "train")
    for other in {"test", "val"} - {part}:
        draw(tmp_path / other, n=3, seed=1)
    for c in ("stripes", "waves"):
        (tmp_path / part / c).mkdir(parents=True)
        for i in range(3):
            (tmp_path / part / c / f"{i}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    with pytest.raises(SFTError, match=f"none of the 6 {part} images can be read"):
        fine_tune(tmp_path, NETWORK, **SMALL)


def test_a_catalog_without_a_test_part_is_refused(stripes):
    catalog = scan(stripes)
    with pytest.raises(SFTError, match="none is left to test with"):
        FineTuner(catalog.keep(catalog.part != "test"), NETWORK, **SMALL)


@pytest.mark.slow
def test_copies_between_parts_are_in_the_card(tmp_path):
    import shutil
    draw(tmp_path / "train")
    draw(tmp_path / "test", n=3, seed=5)
    shutil.copy(tmp_path / "train" / "waves" / "00.jpg", tmp_path / "test" / "waves" / "copy.jpg")
    said = []
    result = fine_tune(tmp_path, NETWORK, phases=HEAD, say=said.append, **SMALL)
    assert [p["kind"] for p in result.card["problems"]] == ["leak"]
    assert any("lie in two parts" in s and "copy.jpg" in s for s in said)


# ---- arguments


@pytest.mark.parametrize(("given", "says"), [
    ({"size": 0}, "argument size = 0: not allowed; use a whole number from 32 to 1024"),
    ({"size": 7}, "argument size = 7: not allowed"),
    ({"size": -64}, "argument size = -64: not allowed"),
    ({"size": 64.5}, "argument size = 64.5: not allowed"),
    ({"seed": -1}, "argument seed = -1: not allowed; use a whole number from 0"),
    ({"lr": -1}, "Phase: lr = -1 is out of range"),
    ({"lr": "fast"}, "Phase: lr = fast is out of range"),
    ({"epochs": 0}, "Phase: epochs = 0 is out of range"),
    ({"epochs": 1.5}, "Phase: epochs = 1.5 is out of range"),
    ({"batch_size": 1}, "Phase: batch_size = 1 is out of range"),
    ({"train": 99}, "train = 99: use 'head', 'all', or a number of stages"),
    ({"train": "body"}, "train = 'body': use 'head', 'all', or a number of stages"),
    ({"train": "head", "lr": 1e-3}, "lr would change nothing"),
    ({"phases": (HEAD,), "epochs": 3}, "epochs and phases are given"),
    ({"phases": ()}, "there is no phase"),
    ({"phases": ("head",)}, "str is no Phase"),
    ({"watch": "paper"}, "use a function of an epoch's row, or one of csv, tensorboard, wandb"),
    ({"watch": "csv"}, "give `out`"),
    ({"out": ""}, "give the name of a folder"),
    ({"backbone": 3}, "give a name, a Backbone, or an nn.Module"),
])
def test_a_value_that_cannot_be_gets_its_sentence_before_any_work(stripes, monkeypatch, given, says):
    import sft_course.tools.engine as engine
    monkeypatch.setattr(engine, "_fit_head", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(SFTError) as e:
        fine_tune(stripes, **({"backbone": NETWORK, "size": 64, "weights": None} | given))
    assert says in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")


def test_a_single_phase_is_a_recipe(stripes):
    assert len(fine_tune(stripes, NETWORK, phases=HEAD, **SMALL).history) == 1


def test_what_people_change_changes_the_tuning(hard):
    result = fine_tune(hard, NETWORK, train="2", epochs=1, lr=1e-4, batch_size=16, **SMALL)
    assert [p["train"] for p in result.card["phases"]] == ["head", 2]
    tuning = result.card["phases"][1]
    assert (tuning["epochs"], tuning["lr"], tuning["batch_size"]) == (1, 1e-4, 16)
    assert [p.train for p in default_phases(load_settings(), train="all")] == ["head", "all"]


def test_a_network_of_ones_own_is_copied_and_gives_the_same_result(stripes):
    opened = open_backbone(NETWORK, None, 0, 48)
    before = {k: v.clone() for k, v in opened.model.state_dict().items()}
    by_name = fine_tune(stripes, NETWORK, phases=HEAD, **SMALL)
    given = fine_tune(stripes, opened, phases=HEAD, **SMALL)
    assert same(by_name.backbone.model, given.backbone.model)
    assert all(torch.equal(v, before[k]) for k, v in opened.model.state_dict().items())
    module = fine_tune(stripes, opened.model, phases=HEAD, **SMALL)
    assert isinstance(module.backbone, Backbone) and module.accuracy == given.accuracy


def test_weights_from_a_file_are_loaded_and_what_fitted_is_said(stripes, tmp_path):
    trained = open_backbone(NETWORK, None, 5, 48)
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.model.state_dict().items()}}, tmp_path / "w.pt")
    said = []
    by_name = fine_tune(stripes, NETWORK, phases=HEAD, weights=tmp_path / "w.pt", say=said.append, size=48)
    assert "w.pt" in said[0] and "tensors fit" in said[0]
    given = fine_tune(stripes, open_backbone(NETWORK, None, 1, 48), phases=HEAD, weights=tmp_path / "w.pt", size=48)
    assert same(by_name.backbone.model, given.backbone.model)


# ---- the host's torch

HOST = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "no_grad": lambda: torch.set_grad_enabled(False),
    "inference_mode": lambda: None,
}


@pytest.mark.parametrize("host", HOST)
def test_what_the_host_has_set_does_not_matter(hard, tmp_path, host):
    phases = HEAD, Phase(2, epochs=1, views=1)
    plain = fine_tune(hard, NETWORK, tmp_path / "plain", phases=phases, **SMALL)
    try:
        HOST[host]()
        with torch.inference_mode(host == "inference_mode"):
            set_here = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            other = fine_tune(hard, NETWORK, tmp_path / "other", phases=phases, **SMALL)
            tuner = FineTuner(hard, NETWORK, **SMALL).run_phase(HEAD)
            assert np.isfinite(tuner.measure().loss)
            assert set_here == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert same(plain.backbone.model, other.backbone.model) and other.history == plain.history


# ---- when it has ended


@pytest.mark.slow
def test_the_checkpoint_goes_when_a_run_has_ended_well(hard, tmp_path):
    phases = HEAD, Phase(2, epochs=1, views=1)
    fine_tune(hard, NETWORK, tmp_path / "a", phases=phases, **SMALL)
    fine_tune(hard, NETWORK, tmp_path / "b", phases=phases, keep_checkpoint=True, **SMALL)
    assert not (tmp_path / "a" / "last.ckpt").exists() and (tmp_path / "b" / "last.ckpt").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_has_ended_is_not_run_again(hard, tmp_path, monkeypatch, keep):
    import sft_course.tools.engine as engine
    phases = HEAD, Phase(2, epochs=1, views=1)
    how = {"phases": phases, "keep_checkpoint": keep, **SMALL}
    done = fine_tune(hard, NETWORK, tmp_path / "a", **how)
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    monkeypatch.setattr(engine, "_run_phase", lambda *_: pytest.fail("it was run again"))
    with pytest.warns(UserWarning, match="has ended already"):
        again = fine_tune(hard, NETWORK, tmp_path / "a", resume=True, **how)
    assert again.accuracy == done.accuracy and (tmp_path / "a" / "model.safetensors").read_bytes() == weights
    said = []
    fine_tune(hard, NETWORK, tmp_path / "a", resume=True, say=said.append, **how)
    assert any("has ended already" in s for s in said)
    for other in ({"seed": 3}, {"size": 96}, {"phases": (HEAD,)}):
        with pytest.raises(SFTError, match="that ended there had other"):
            fine_tune(hard, NETWORK, tmp_path / "a", resume=True, **(how | other))


@pytest.mark.slow
def test_the_command_with_resume_gives_back_what_has_ended(cli, stripes, tmp_path):
    command = ("fit", "stripes", "--image-size", "64", "--train", "head", "--out", "model")
    cli(*command, cwd=tmp_path)
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    again = cli(*command, "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "has ended already" in again.stderr
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_what_somebody_else_made_is_not_replaced_and_that_is_said_before_training(hard, tmp_path, monkeypatch):
    import sft_course.tools.engine as engine
    phases = HEAD, Phase(2, epochs=1, views=1)
    fine_tune(hard, NETWORK, tmp_path / "model", phases=phases, **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("my report")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "last.ckpt").write_bytes(b"of a run that was stopped")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"}
    monkeypatch.setattr(engine, "_fit_head", lambda *_: pytest.fail("it began to train"))
    for name, says in (("model", "would be replaced"), ("mine", "report.html: this is there already"), ("stopped", "an unfinished run lies there")):
        with pytest.raises(SFTError, match=says):
            fine_tune(hard, NETWORK, tmp_path / name, phases=phases, **SMALL)
        with pytest.raises(SFTError, match=says):
            FineTuner(hard, NETWORK, tmp_path / name, **SMALL).run_phase(HEAD)
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"}


def test_a_tuner_may_replace_what_it_made_itself(hard, tmp_path):
    tuner = FineTuner(hard, NETWORK, tmp_path / "a", watch="csv", **SMALL)
    tuner.run(HEAD)
    second = tuner.run(Phase(2, epochs=1, views=1))
    assert load_artifact(tmp_path / "a").card["phases"] == second.card["phases"] and len(second.card["phases"]) == 2


# ---- who looks on


def test_every_row_is_given_once_and_again_to_who_comes_after_a_stop(hard, tmp_path):
    phases = HEAD, Phase(2, epochs=2, views=1), Phase(3, epochs=1, views=1)

    def run(stop=None, **how):
        seen = []

        def watch(row):
            seen.append(row)
            if len(seen) == stop:
                raise ZeroDivisionError
        try:
            return seen, fine_tune(hard, NETWORK, tmp_path / "a", phases=phases, watch=watch, **how, **SMALL)
        except ZeroDivisionError:
            return seen, None
    first, _ = run(stop=3)
    assert [r["epoch"] for r in first] == [1, 1, 2]
    seen, result = run(resume=True)
    assert seen == result.history and seen[:3] == first and [r["phase"] for r in seen] == [1, 2, 2, 3]


def test_a_table_is_kept_up_to_date(hard, tmp_path):
    lines = []
    from sft_course.tools.artifact import _table
    phases = HEAD, Phase(2, epochs=1, views=1)
    tuner = FineTuner(hard, NETWORK, tmp_path / "a", watch="csv", **SMALL)
    write = tuner.watch

    def counted(row):
        write(row)
        lines.append((tmp_path / "a" / "history.csv").read_text().count("\n"))
    tuner.watch = counted
    result = tuner.run(*phases)
    assert lines == [2, 3] and (tmp_path / "a" / "history.csv").read_text() == _table(result.history)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_not_installed_is_named(stripes, tmp_path, monkeypatch, name):
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SFTError, match=f"watch = '{name}': the package {name} is not installed; install it, or leave watch out"):
        FineTuner(stripes, NETWORK, tmp_path / "a", watch=name, **SMALL)


def test_tensorboard_gets_the_numbers_of_every_epoch(hard, tmp_path, monkeypatch):
    got = []

    class SummaryWriter:
        def __init__(self, folder):
            got.append(folder)

        def add_scalar(self, name, value, step):
            got.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            got.append("closed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    result = fine_tune(hard, NETWORK, tmp_path / "a", phases=(HEAD, Phase(2, epochs=1, views=1)), watch="tensorboard", **SMALL)
    assert got[0] == str(tmp_path / "a" / "tensorboard") and got[-1] == "closed"
    assert [g for g in got[1:-1] if g[0] == "val_loss"] == [("val_loss", r["val_loss"], i + 1) for i, r in enumerate(result.history)]
    assert {g[0] for g in got[1:-1]} >= {"lr", "train_loss", "val_accuracy"}


def fake_wandb(got):
    run = types.SimpleNamespace(log=lambda row: got.append(row), finish=lambda: got.append("finished"))

    def init(project, name):
        got.append((project, name))
        return run
    return types.SimpleNamespace(init=init)


def test_weights_and_biases_gets_the_rows(hard, tmp_path, monkeypatch):
    got = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(got))
    result = fine_tune(hard, NETWORK, tmp_path / "a", phases=(HEAD, Phase(2, epochs=1, views=1)), watch="wandb", **SMALL)
    assert got[0] == ("sft_course", "a") and got[-1] == "finished"
    assert [r["val_loss"] for r in got[1:-1]] == [r["val_loss"] for r in result.history]


def test_weights_and_biases_that_cannot_begin_ends_the_run_before_training(hard, tmp_path, monkeypatch):
    import sft_course.tools.engine as engine

    def init(**_):
        raise RuntimeError("api_key not configured")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(engine, "_fit_head", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(SFTError, match="no run could be begun there"):
        fine_tune(hard, NETWORK, tmp_path / "a", phases=HEAD, watch="wandb", **SMALL)


# ---- what is said


def test_a_run_says_what_it_will_do_and_what_it_chose_and_why(hard, capsys):
    said = []
    result = fine_tune(hard, NETWORK, phases=(HEAD, Phase(2, epochs=1, views=1)), say=said.append, **SMALL)
    n = {p: len(scan(hard).rows(p)) for p in ("train", "val", "test")}
    assert said[0].startswith(f"48 images of 2 classes ({n['train']} to train on, {n['val']} for validation, {n['test']} for the test)")
    assert "phases: head, upper 2 stages for 1 epochs; this takes about" in said[0]
    assert said[1].startswith("phase 1 of 2, head; about") and said[3].startswith("phase 2 of 2, upper 2 stages; about")
    assert re.fullmatch(rf"a first head gets \d+ of {n['val']} validation images right", said[2])
    assert f"the {'head is' if result.card['chosen'] == 'head' else 'tuned weights are'} returned: of {n['val']} validation images" in said[4]
    assert said[4].endswith(f"accuracy {result.accuracy:.3f} on {n['test']} test images")
    assert capsys.readouterr() == ("", "")


def test_whether_somebody_listens_changes_nothing(hard):
    how = {"phases": (HEAD, Phase(2, epochs=1, views=1)), **SMALL}
    quiet, loud = fine_tune(hard, NETWORK, **how), fine_tune(hard, NETWORK, say=lambda _: None, **how)
    assert same(quiet.backbone.model, loud.backbone.model) and quiet.history == loud.history
