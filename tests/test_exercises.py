"Every solution in the notebooks passes; every blank and every tempting wrong answer does not."
import json
import re
from pathlib import Path

import pytest

from sft_course.exercises import EXERCISES, check

NBS = Path(__file__).parent.parent / "nbs"
NAMES = sorted(EXERCISES)


def sources(kind):
    for path in sorted(NBS.glob("0*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == kind:
                yield path, "".join(cell["source"])


SOLUTIONS = {m[1]: m[2] for _, text in sources("markdown")
             for m in re.finditer(r"Solution of (\d\d\.\d)</summary>\s+```python\n(.*?)```", text, re.S)}
ASKED = {m[1]: path for path, text in sources("code") for m in re.finditer(r'check\("(\d\d\.\d)"', text)}


def test_every_exercise_is_asked_and_solved():
    assert sorted(ASKED) == sorted(SOLUTIONS) == NAMES


def test_chapters_that_have_exercises_have_three_or_more():
    for chapter in {n[:2] for n in NAMES}:
        assert sum(n.startswith(chapter) for n in NAMES) >= 3, chapter


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name):
    import numpy as np
    import torch
    scope = {"np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(SOLUTIONS[name], scope)
    verdict = check(name, scope["answer"])
    assert verdict, verdict.text
    assert verdict.text == EXERCISES[name].why


@pytest.mark.parametrize("name", NAMES)
def test_blank_does_not_pass(name):
    verdict = check(name, ...)
    assert not verdict and "..." in verdict.text


@pytest.mark.parametrize("name", NAMES)
def test_tempting_wrong_answers_do_not_pass_and_get_a_hint(name):
    assert EXERCISES[name].tempting
    for wrong in EXERCISES[name].tempting:
        verdict = check(name, wrong)
        assert not verdict and verdict.text not in ("", EXERCISES[name].why)


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_does_not_pass_or_raise(name):
    for nonsense in (None, "no idea", object(), lambda *a, **k: 1 / 0):
        assert not check(name, nonsense)


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="there is no exercise '99.9'"):
        check("99.9", 1)
