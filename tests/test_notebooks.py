"The form of the chapters: small cells, lessons that assert, links that lead somewhere, figures that can be heard."
import ast
import json
import re
from pathlib import Path
from statistics import median

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).parent.parent
NBS = REPO / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
TOOLS = sorted(NBS.glob("tools/*.ipynb"))
ALL = sorted(NBS.glob("*.ipynb")) + TOOLS


def cells(path, kind):
    "The code or markdown cells of a notebook."
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def lines(cell):
    "Lines of code, without directives and blanks."
    return [line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")]


def whole():
    "Chapters that are written out: those with exercises."
    return [p for p in CHAPTERS if any(re.search(r"^## Exercises", source(c), re.M) for c in cells(p, "markdown"))]


def is_export(cell):
    return source(cell).startswith("#| export")


def asserts(cell):
    return bool(re.search(r"^\s*(assert|with expect_fail|test_\w+\()|:\s*assert ", source(cell), re.M))


def numbers(path):
    "Median lines of a code cell, the ninth decile, and the share of lesson cells (imports and exports apart) that assert."
    code = [c for c in cells(path, "code") if lines(c)]
    sizes = sorted(len(lines(c)) for c in code)
    working = [c for c in code if not all(re.match(r"(import|from)\s", x) or x.startswith((" ", ")")) for x in lines(c))]
    lessons = [c for c in working if not is_export(c)]
    return median(sizes), sizes[int(.9 * (len(sizes) - 1))], sum(map(asserts, lessons)) / len(lessons)


def test_cells_are_small_and_assert():
    table = {p.stem: numbers(p) for p in whole()}
    print("\n" + "\n".join(f"{name:16} median {m:4.1f}  ninth decile {d:3}  assert {a:.0%}" for name, (m, d, a) in table.items()))
    assert all(m <= 5 and d <= 15 for m, d, _ in table.values()), table
    assert all(a >= 3 / 8 for *_, a in table.values()), table


def public(cell):
    tree = ast.parse("\n".join(x for x in source(cell).splitlines() if not x.startswith(("%", "!"))))
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@pytest.mark.parametrize("path", whole() + [p for p in TOOLS if not p.stem.startswith("exercises") and p.stem != "cli"], ids=lambda p: p.stem)
def test_every_exported_function_has_a_lesson_after_it(path):
    code = cells(path, "code")
    for i, cell in enumerate(code):
        names = "|".join(public(cell)) if is_export(cell) else ""
        if names:
            shown = [c for j, c in enumerate(code) if (j > i or is_export(c)) and j != i and re.search(rf"\b({names})\b", source(c))]
            assert shown, f"{names}: neither shown nor used"
    assert not any(is_export(c) for c in code) or any(asserts(c) for c in code)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_links_lead_to_files(path):
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", [*whole(), *TOOLS], ids=lambda p: p.stem)
def test_badge_opens_this_chapter(path):
    home = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    assert f"https://colab.research.google.com/github/{home}/blob/main/{path.relative_to(REPO).as_posix()}" in text


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_figures_have_alt_text(path):
    for cell in cells(path, "code"):
        for out in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & set(out.get("data", {})):
                alt = out.get("metadata", {}).get(kind, {}).get("alt", "")
                assert len(alt) > 15, f"{path.name}: a figure without alt text: {source(cell)[:80]}"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_outputs_are_those_of_a_full_run_and_hold_nothing_of_a_machine(path):
    assert path.stat().st_size < 1.5e6
    outputs = [o for c in cells(path, "code") for o in c.get("outputs", [])]
    assert not any(o["output_type"] == "error" for o in outputs)
    assert path.stem == "index" or outputs
    text = json.dumps([{k: v for k, v in o.get("data", {}).items() if k.startswith("text")} | {"text": o.get("text", "")} for o in outputs])
    assert not re.search(r"/(home|root|work|tmp|Users)/|\d\d:\d\d:\d\d", text)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_nothing_is_left_to_be_filled_in_and_nothing_leads_out(path):
    text = "\n".join(source(c) for kind in ("code", "markdown") for c in cells(path, kind))
    assert not re.search(r"\b(TODO|FIXME|MINUTES|SECONDS|XXX)\b|/(home|root|work|tmp|Users)/|<!-- widget", text)
    assert "exec(open" not in text and "exec(" not in re.sub(r"\.exec\(", "", text)
