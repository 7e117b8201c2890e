"No notebook of the course becomes longer, denser or less tested than it is: see course_form.py."
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import course_form as cf
import pytest

NOTEBOOKS = cf.chapters() + cf.tools()


def notebook(path, *cells):
    "Write a notebook of (kind, text) cells."
    made = []
    for kind, text in cells:
        made.append({"cell_type": kind, "source": text.splitlines(keepends=True), "outputs": []})
    path.write_text(json.dumps({"cells": made}))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=cf.name_of)
def test_nothing_became_worse(path):
    said = cf.worse(cf.name_of(path), cf.measure(path), path in cf.chapters())
    assert said == [], "\n".join(said)


def test_what_is_allowed_is_still_needed():
    "A limit that holds by now is enforced from now on."
    today = cf.allowed_today()
    spent = [(name, what) for name, values in cf.ALLOWED.items() for what in values
             if what not in today.get(name, {})]
    assert spent == [], "run `python tests/course_form.py --update`"


def test_what_is_counted(tmp_path):
    path = notebook(
        tmp_path / "x.ipynb",
        ("markdown", "# Two words\n\n[a link](http://not.counted) and $x + y$.\n\n```python\nnot = this\n```"),
        ("code", "import torch\nfrom pathlib import Path"),
        ("code", "#| export\ndef f(x):\n    return x\n\ndef g(x): return x"),
        ("code", "assert f(1) == 1"),
        ("code", "f(2)" + " " * 120 + "# wide\ncheck(\"00.1\", answer)\n"),
    )
    form = cf.measure(path)
    assert (form.cells, form.words, form.exported, form.exercises, form.long) == (5, 5, 3, 1, 1)
    assert form.share == 3 / 8 and form.asserts == 1 / 2 and form.line == 130 and form.median == 2


def test_a_figure_without_words_is_found(tmp_path):
    path = notebook(tmp_path / "x.ipynb", ("code", "plot()"))
    content = json.loads(path.read_text())
    with_words = {"image/png": {"alt": "a curve that falls"}}
    content["cells"][0]["outputs"] = [{"data": {"image/png": ""}, "metadata": {}},
                                      {"data": {"image/png": ""}, "metadata": with_words}]
    path.write_text(json.dumps(content))
    form = cf.measure(path)
    assert (form.figures, form.alt) == (2, 1)
    assert cf.worse("x", form, False) == ["x: figures without alt text: 1"]


def test_what_grows_beyond_what_is_allowed_is_named():
    form = cf.measure(cf.chapters()[0])
    grown = dataclasses.replace(form, cells=9999, asserts=.01)
    said = "\n".join(cf.worse(cf.name_of(cf.chapters()[0]), grown, True))
    assert "cells is 9999; at most" in said and "asserts is 0.01; at least" in said


def test_the_table_is_printed():
    script = Path(cf.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for path in NOTEBOOKS:
        assert f"\n{cf.name_of(path)} " in done.stdout
    assert done.stdout.index("-- chapters") < done.stdout.index("-- tools")
