"Every solution in the notebooks passes; every blank and every tempting wrong answer does not."
import ast
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import sft_course.tools.exercises
from sft_course.tools.exercises import EXERCISES, check, progress

NBS = Path(__file__).parent.parent / "nbs"
ROOMS = [importlib.import_module(f"sft_course.tools.{f.stem}")  # one for Parts I and II, then one a chapter
         for f in sorted(Path(sft_course.tools.exercises.__file__).parent.glob("exercises*.py"))]
NAMES = sorted(EXERCISES)


def sources(kind):
    for path in sorted(NBS.glob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == kind:
                yield path, "".join(cell["source"])


SOLUTIONS = {m[1]: m[2] for _, text in sources("markdown")
             for m in re.finditer(r"Solution of (\d\d\.\d)</summary>\s+```python\n(.*?)```", text, re.S)}
ASKED = {m[1]: text for _, text in sources("code") for m in re.finditer(r'check\("(\d\d\.\d)"', text)}
BLANK = re.compile(r"^\w+ = \.\.\.\n(?:.*\n)*?(?=check)", re.M)  # what the solution is pasted over


def test_every_exercise_is_asked_and_solved():
    assert sorted(ASKED) == sorted(SOLUTIONS) == NAMES


def test_every_chapter_has_three_or_more_one_of_them_a_bug_to_find():
    bugs = {m[1] for _, text in sources("markdown") for m in re.finditer(r"\*\*(\d\d)\.\d, find the bug", text)}
    for path in sorted(NBS.glob("[0-9][0-9]_*.ipynb")):
        assert sum(n.startswith(path.name[:2]) for n in NAMES) >= 3, path.name
        assert path.name[:2] in bugs, path.name


@pytest.mark.parametrize("module", ROOMS, ids=lambda m: m.__name__.split(".")[-1])
def test_no_helper_of_one_chapter_replaces_that_of_another(module):
    tree = ast.parse(Path(module.__file__).read_text())
    names = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names += [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    assert [n for n, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name):
    "Pasted over the blank, as a reader would do it."
    import numpy as np
    import torch

    assert BLANK.search(ASKED[name]), ASKED[name]
    said = []
    scope = {k: v for room in ROOMS for k, v in vars(room).items() if not k.startswith("_")}
    scope |= {"np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "check": lambda *a: said.append(check(*a))}
    exec(BLANK.sub(lambda m: SOLUTIONS[name], ASKED[name]), scope)
    assert said and said[-1], said[-1].text
    assert said[-1].text == EXERCISES[name].why


@pytest.mark.parametrize("name", NAMES)
def test_blank_does_not_pass(name):
    verdict = check(name, ...)
    assert not verdict and "..." in verdict.text


@pytest.mark.parametrize("name", NAMES)
def test_somebody_is_tempted(name):
    assert EXERCISES[name].tempting


def called(wrong):
    "A short name for a wrong answer, to tell the tests by."
    return getattr(wrong, "__name__", "").strip("_<>") or re.sub(r"[^\w.,-]+", " ", str(wrong)).strip()[:30]


TEMPTING = [pytest.param(n, w, id=f"{n}-{i}-{called(w)}") for n in NAMES for i, w in enumerate(EXERCISES[n].tempting)]


@pytest.mark.parametrize("name, wrong", TEMPTING)
def test_tempting_wrong_answer_does_not_pass_and_gets_a_hint(name, wrong):
    verdict = check(name, wrong)
    assert not verdict and verdict.text not in ("", EXERCISES[name].why)


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_does_not_pass_or_raise(name):
    for nonsense in (None, "no idea", object(), lambda *a, **k: 1 / 0):
        assert not check(name, nonsense)


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="there is no exercise '99.9'"):
        check("99.9", 1)


# ---- what is remembered

@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "progress.json"


def test_progress_knows_right_tried_and_open(notes):
    assert set(progress().right) == {""}
    for answer in (1, 2, 1):  # wrong, right, and wrong again, which takes nothing back
        check("00.1", answer, remember=True)
    check("00.2", {}, remember=True)
    check("00.3", ..., remember=True)
    row = progress().loc["00"]
    assert (row["right"], row["tried"]) == ("00.1", "00.2") and row["open"].startswith("00.3")
    assert json.loads(notes.read_text())["exercises"]["00.1"] == {"tries": 3, "right": True}
    assert [p.name for p in notes.parent.iterdir()] == ["progress.json"]


def test_tests_are_not_remembered_unless_they_ask(notes, monkeypatch):
    check("00.1", 2)
    assert not notes.exists()
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setenv("SFT_STRICT", "1")
    check("00.1", 2)
    assert not notes.exists()
    monkeypatch.delenv("SFT_STRICT")
    check("00.1", ...)
    assert not notes.exists()
    check("00.1", 2)
    assert notes.exists()


@pytest.mark.parametrize("damaged", [
    "", "{", "[1]", '{"exercises": 3}', '{"exercises": {"00.1": {"tries": "x"}, "00.2": null}}', "\x00\xff"])
def test_damaged_notes_break_nothing_and_are_written_anew(notes, damaged):
    notes.parent.mkdir()
    notes.write_bytes(damaged.encode("latin-1"))
    assert set(progress().right) == {""}
    assert check("00.1", 2, remember=True)
    assert progress().right["00"] == "00.1"


def test_notes_that_cannot_be_written_break_nothing(notes, monkeypatch, tmp_path):
    notes.mkdir(parents=True)
    assert check("00.1", 2, remember=True) and set(progress().right) == {""}
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SFT_COURSE_CACHE", str(tmp_path / "file"))
    assert check("00.1", 2, remember=True) and set(progress().right) == {""}
    monkeypatch.setenv("SFT_COURSE_PROFILE", "no such profile")
    assert check("00.1", 2, remember=True)
