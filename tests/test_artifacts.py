"What is saved comes back as it was, and nothing is ever saved over what somebody else made."
import ast
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from conftest import REPO, draw
from safetensors.torch import load_file

from sft_course import FineTuner, Phase, fine_tune, load_artifact
from sft_course.tools.artifact import ARTIFACT, _value, every_stage, free_name, require_free
from sft_course.tools.settings import SFTError

HEAD = (Phase("head", looks_at="last"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    "A result whose head looks at every stage."
    return FineTuner(folder, size=64, out=tmp_path_factory.mktemp("wide")).run(Phase("head", looks_at="every"))


@pytest.fixture
def made(folder, tmp_path):
    return fine_tune(folder, out=tmp_path / "made", size=64, phases=HEAD)


def image(folder):
    return folder / "waves" / "00.jpg"


# ---- the history

def test_the_history_holds_numbers(folder, tmp_path):
    tuner = FineTuner(folder, size=64, out=tmp_path / "out")
    tuner.run_phase(Phase("head"))
    tuner.run_phase(Phase(3, epochs=1))
    result = tuner.run(Phase("all", epochs=1))
    again = load_artifact(tmp_path / "out")
    assert again.history == [{k: r.get(k) for k in again.history[0]} for r in result.history] and len(again.history) >= 2
    assert [type(r["epoch"]) for r in again.history] == [int] * len(again.history) and type(again.history[0]["val_loss"]) is float


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("0.25", .25), ("1e-05", 1e-5), ("head", "head"), ("", None), (None, None)])
def test_a_cell_of_the_history(text, value):
    assert _value(text) == value and type(_value(text)) is type(value)


@pytest.mark.parametrize("text", ["a,b\n1,2,3,4\n5\n", 'a,b\n"1', "a\n" + "x" * 200_000, "\0\n\0", ""], ids=["too long", "open", "huge", "zeros", "empty"])
def test_a_damaged_history_does_not_keep_the_network_from_loading(made, text, folder):
    (made.folder / "history.csv").write_text(text, encoding="utf-8")
    assert load_artifact(made.folder).predict(image(folder)).label == "waves"


# ---- saved again

def test_an_artifact_without_a_report_can_be_saved_again(made, folder, tmp_path):
    (made.folder / "report.html").unlink()
    (made.folder / "history.csv").unlink()
    again = load_artifact(made.folder)
    assert again.report == "" and again.history == []
    there = again.save(tmp_path / "copy")
    assert sorted(p.name for p in there.iterdir()) == ["card.json", "history.csv", "model.safetensors"]
    assert load_artifact(there).predict(image(folder)) == made.predict(image(folder))


def test_saving_again_into_its_own_folder(made, folder):
    want = made.predict(image(folder))
    assert made.save(made.folder) == made.folder
    again = load_artifact(made.folder)
    again.save(made.folder)
    with torch.no_grad():
        again.backbone.head.bias.add_(1)  # trained on by hand, and saved where it came from
    again.save(made.folder)
    bias = load_artifact(made.folder).backbone.head.bias
    assert torch.equal(bias, again.backbone.head.bias) and load_artifact(made.folder).predict(image(folder)).label == want.label


@pytest.mark.parametrize("name", ARTIFACT)
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_a_person_made_is_never_replaced(made, tmp_path, name, what):
    there = tmp_path / "proj" / name
    there.parent.mkdir()
    if what == "file":
        there.write_text("my own", encoding="utf-8")
    if what == "folder":
        there.mkdir()
    if what == "link":
        there.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SFTError, match=f"proj/{name}: this is there already and would be replaced; give another folder, such as .*proj-2"):
        made.save(tmp_path / "proj")
    assert os.listdir(tmp_path / "proj") == [name] and (what != "file" or there.read_text(encoding="utf-8") == "my own")


def test_another_model_is_never_replaced(made, folder, tmp_path):
    other = fine_tune(folder, out=tmp_path / "other", size=64, seed=1, phases=HEAD)
    before = {p.name: p.read_bytes() for p in other.folder.iterdir()}
    with pytest.raises(SFTError, match="model.safetensors: this is there already"):
        made.save(other.folder)
    assert {p.name: p.read_bytes() for p in other.folder.iterdir()} == before
    assert made.save(free_name(other.folder)).name == "other-2"


def test_a_save_that_was_cut_off_can_be_done_again(made, tmp_path, monkeypatch):
    import sft_course.tools.artifact as artifact
    usual = artifact.whole_file
    def full(path):
        if path.name == "report.html":
            raise OSError(28, "No space left on device")
        return usual(path)
    other = load_artifact(made.folder)
    monkeypatch.setattr(artifact, "whole_file", full)
    with pytest.raises(SFTError, match="No space left on device"):
        other.save(tmp_path / "again")
    monkeypatch.setattr(artifact, "whole_file", usual)
    with pytest.raises(SFTError, match="not an artifact"):
        load_artifact(tmp_path / "again")
    other.save(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(ARTIFACT)


def test_the_next_free_name(tmp_path):
    want = tmp_path / "images-model"
    assert free_name(want) == want
    want.mkdir()
    assert free_name(want) == want, "an empty folder is free"
    (want / ".lock").touch()
    assert free_name(str(want)) == want, "and one where a run only began"
    (want / "last.ckpt").touch()
    (tmp_path / "images-model-2").write_text("", encoding="utf-8")
    (tmp_path / "images-model-3").symlink_to(tmp_path / "nowhere")
    assert free_name(want) == tmp_path / "images-model-4"
    require_free(want), require_free(tmp_path / "images-model-4")


def test_a_run_does_not_replace_what_a_person_made_and_says_so_before_it_trains(folder, tmp_path):
    proj = tmp_path / "proj"
    proj.mkdir()
    for name, text in (("history.csv", "my,own\n"), ("report.html", "mine\n")):
        (proj / name).write_text(text, encoding="utf-8")
    with pytest.raises(SFTError, match="proj/history.csv: this is there already"):
        fine_tune(folder, out=proj, size=64, phases=HEAD, watch=lambda row: pytest.fail("something was trained"))
    assert [(proj / n).read_text(encoding="utf-8") for n in ("history.csv", "report.html")] == ["my,own\n", "mine\n"]
    assert sorted(os.listdir(proj)) == ["history.csv", "report.html"]


def test_a_run_does_not_replace_another_runs_model_and_says_so_before_it_trains(folder, tmp_path):
    other = fine_tune(folder, out=tmp_path / "out", size=64, phases=HEAD)
    before = {p.name: p.read_bytes() for p in other.folder.iterdir()}
    with pytest.raises(SFTError, match="model.safetensors: this is there already .* such as .*out-2"):
        fine_tune(folder, out=tmp_path / "out", size=64, seed=1, phases=HEAD, watch=lambda row: pytest.fail("something was trained"))
    assert {p.name: p.read_bytes() for p in other.folder.iterdir()} == before


def test_one_tuner_may_run_again_into_its_folder(folder, tmp_path):
    tuner = FineTuner(folder, size=64, out=tmp_path / "out", weights=None)
    first = tuner.run(Phase(2, epochs=1))
    assert first.folder == tmp_path / "out"
    second = tuner.run(Phase("all", epochs=1))
    same = [torch.equal(a, b) for a, b in zip(load_artifact(tmp_path / "out").model.parameters(), second.model.parameters())]
    assert all(same) and len(load_artifact(tmp_path / "out").history) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_killed_run_whose_history_is_kept_goes_on_into_its_folder(folder, tmp_path, monkeypatch, rows):
    from sft_course.tools.watchers import _ToCsv
    usual = _ToCsv.__call__
    def dies(self, row):
        usual(self, row)
        if len(self.rows) == rows:
            raise KeyboardInterrupt
    phases = (Phase(1, epochs=1), Phase(2, epochs=1))
    how = {"out": tmp_path / "out", "size": 64, "weights": None, "phases": phases, "watch": "csv"}
    monkeypatch.setattr(_ToCsv, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(folder, **how)
    monkeypatch.setattr(_ToCsv, "__call__", usual)
    assert (tmp_path / "out" / "history.csv").exists()
    assert len(fine_tune(folder, resume=True, **how).history) == 2 == len(load_artifact(tmp_path / "out").history)


# ---- the network

def test_a_head_on_every_stage_is_a_backbone_like_any_other(wide, folder):
    for result in (wide, load_artifact(wide.folder)):
        b = result.backbone
        assert isinstance(b.head, torch.nn.Linear) and b.head.out_features == 2
        assert [n for s in b.stages for n in s.modules if not b.model.get_submodule(n)] == []
        named = [n for s in b.stages for n in s.parameters]
        assert len(named) == len(set(named)) and set(named) == {n for n, _ in b.model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_so_it_is_for_other_networks(name):
    from sft_course.tools.opening import open_backbone
    b = every_stage(open_backbone(name, weights=None), 3)
    assert b.head.out_features == 3
    assert sorted(n for s in b.stages for n in s.parameters) == sorted(n for n, _ in b.model.named_parameters())


def test_the_model_is_a_plain_module(made, wide):
    x = torch.randn(2, 3, 64, 64)
    for result in (made, wide, load_artifact(wide.folder)):
        assert isinstance(result.model, torch.nn.Module) and result.model is result.model
        own = [type(m).__module__ for m in result.model.modules() if type(m).__module__.startswith("sft_course")]
        assert own == [], "it needs nothing of ours"
        with torch.no_grad():
            want = result.backbone.model(x)
            assert torch.equal(result.model(x), want) and torch.equal(copy.deepcopy(result.model)(x), want) and want.shape == (2, 2)


def test_weights_have_timms_own_names(made, wide):
    network = timm.create_model("tf_efficientnet_lite0", num_classes=2).eval()
    network.load_state_dict(made.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network(x), made.model(x), atol=1e-5)
    found = network.load_state_dict(wide.state_dict(), strict=False)
    assert found.missing_keys == ["classifier.weight", "classifier.bias"]
    assert found.unexpected_keys == ["every_stage.weight", "every_stage.bias"]
    assert set(load_file(wide.folder / "model.safetensors")) == set(wide.state_dict())


def test_an_artifact_of_a_network_of_ones_own_is_loaded_with_that_network(made, folder):
    card = json.loads((made.folder / "card.json").read_text(encoding="utf-8"))
    (made.folder / "card.json").write_text(json.dumps(card | {"backbone": "MyNet (v2)"}), encoding="utf-8")
    with pytest.raises(SFTError, match=r"names a backbone that cannot be opened .*load_artifact\(folder, model=...\)"):
        load_artifact(made.folder)
    own = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    before = {k: v.clone() for k, v in own.state_dict().items()}
    again = load_artifact(made.folder, model=own)
    assert again.predict(image(folder)).probabilities == pytest.approx(made.predict(image(folder)).probabilities, abs=1e-5)
    assert all(torch.equal(before[k], v) for k, v in own.state_dict().items())


@pytest.mark.parametrize("levels", [[0], [3, 1], [1, 1], ["a", "b"], 3, [float("nan"), 1]], ids=str)
def test_levels_that_cannot_be_are_refused(made, levels):
    card = json.loads((made.folder / "card.json").read_text(encoding="utf-8"))
    card["preprocessing"]["levels"] = levels
    (made.folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(SFTError, match="no valid 'preprocessing'"):
        load_artifact(made.folder)


def test_rows_are_read_a_batch_at_a_time(made, folder):
    "The same logits, and never more than a batch of the decoded images at once."
    import numpy as np

    from sft_course.tools.logits import eval_logits
    asked = []
    class Watched:
        def __init__(self, x): self.x, self.shape = x, x.shape
        def __len__(self): return len(self.x)
        def __getitem__(self, at):
            asked.append(len(at))
            return self.x[at]
    x = np.random.default_rng(0).integers(0, 256, (90, 72, 72, 3), dtype=np.uint8)
    rows = np.arange(0, 90, 2)[::-1]
    assert torch.equal(eval_logits(made.backbone, Watched(x), 64, rows=rows), eval_logits(made.backbone, x[rows], 64))
    assert len(asked) > 2 and max(asked) < len(rows)


# ---- text

def test_every_text_file_is_read_and_written_in_utf8():
    "Whatever the locale: no `open` in text mode, `read_text` or `write_text` without an encoding."
    found = []
    for file in sorted((REPO / "sft_course").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and _is_text(call) and not _says_encoding(call):
                found.append(f"{file.name}:{call.lineno}")
    assert found == []


def _says_encoding(call):
    given = {k.arg for k in call.keywords}  # None stands for **options
    return bool(given & {"encoding", None}) or any(isinstance(a, ast.Constant) and a.value == "utf-8" for a in call.args)


def _is_text(call):
    if call.args and ast.unparse(call.args[0]) == "os.devnull":
        return False
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in ("read_text", "write_text"):
        return True
    if not (isinstance(call.func, ast.Name) and call.func.id == "open" or method == "open" and getattr(call.func.value, "id", "") not in ("Image", "os")):
        return False
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)]
    return not any(isinstance(m, str) and "b" in m for m in modes)


@pytest.mark.slow
def test_names_survive_a_locale_that_cannot_write_them(tmp_path, cache):
    draw(tmp_path / "data", classes=("a", "b"))
    rows = [f"data/{f.parent.name}/{f.name},{dict(a='müller', b='日本')[f.parent.name]}" for f in sorted((tmp_path / "data").rglob("*.jpg"))]
    (tmp_path / "data.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    code = ("from sft_course import fine_tune, load_artifact, Phase; import locale\n"
            "assert locale.getpreferredencoding(False).lower().replace('-', '') != 'utf8'\n"
            "result = fine_tune('data.csv', out='out', size=64, phases=(Phase('head'),))\n"
            "again = load_artifact('out')\n"
            "assert again.classes == result.classes == ['m\\u00fcller', '\\u65e5\\u672c'] and again.report == result.report\n"
            "assert again.predict('data/a/00.jpg').label == 'm\\u00fcller'\n")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "müller" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_results_can_be_compared(made):
    assert made == made and made != replace(made, html="x") and len({made, made}) == 1
