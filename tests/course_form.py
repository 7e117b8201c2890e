"""The form of the course in numbers: a row for each chapter, then one for each tool.

    python tests/course_form.py            print the table, and what is above a limit
    python tests/course_form.py --update   write what is above a limit today into ALLOWED, below

Where a limit does not hold yet, nothing may become worse: ALLOWED keeps the values that a notebook may have.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

NBS = Path(__file__).resolve().parent.parent / "nbs"


LINE = 110  # characters


@dataclass(frozen=True)
class Form:
    "What is counted in one notebook."
    cells: int       # code and text
    words: int       # of prose: no code, formulas, addresses
    exported: int    # lines of code that go into the library
    share: float     # of all lines of code, the exported ones
    line: int        # characters of the longest line of code
    long: int        # lines of code that are longer than LINE
    median: float    # lines of code in a cell
    ninth: int       # lines of code in the cell that nine in ten are no longer than
    asserts: float   # share of the lesson cells that assert
    exercises: int
    figures: int
    alt: int         # figures that have words for those who cannot see them


# Of chapters: at most, and at least. Of tools: at most.
MOST = {"cells": 110, "words": 3000, "exported": 120, "line": LINE, "long": 0, "median": 5, "ninth": 15}
LEAST = {"asserts": .33, "exercises": 3}
TOOLS_MOST = {"line": LINE, "long": 0}

# What is above a limit and may stay for now. Written by --update; a value may be lowered at any time.
ALLOWED: dict[str, dict[str, float]] = {
}


def chapters() -> list[Path]:
    "The notebooks of the chapters, in reading order."
    return sorted(NBS.glob("[0-9][0-9]_*.ipynb"))


def tools() -> list[Path]:
    "The other notebooks that export a module: how the library does it."
    return sorted(NBS.glob("tools/*.ipynb"))


def name_of(path: Path) -> str:
    "What a notebook is called in the tables."
    return path.relative_to(NBS).with_suffix("").as_posix()


def source(cell: dict) -> str:
    "The text of a cell."
    return "".join(cell["source"])


def code_lines(cell: dict) -> list[str]:
    "The lines of a code cell, without directives and blank lines."
    return [line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")]


def is_export(cell: dict) -> bool:
    "Whether a code cell goes into the library."
    return source(cell).startswith("#| export")


def only_imports(cell: dict) -> bool:
    "Whether a code cell does nothing but import."
    return all(re.match(r"(import|from)\s|\s|\)", line) for line in code_lines(cell))


def asserts(cell: dict) -> bool:
    "Whether a code cell checks something, by an assert or by one of fastcore's tests."
    return bool(re.search(r"^\s*(assert|with expect_fail|test_\w+\()|:\s*assert ", source(cell), re.M))


def words(text: str) -> int:
    "How many words of prose stand in a markdown text."
    text = re.sub(r"```.*?```", " ", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def figures(code: list[dict]) -> list[bool]:
    "For each figure among the saved outputs, whether it has words."
    found = []
    for cell in code:
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    found.append(bool(output.get("metadata", {}).get(kind, {}).get("alt")))
    return found


def measure(path: Path) -> Form:
    "Count what is in a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = [source(c) for c in cells if c["cell_type"] == "markdown"]
    code = [c for c in cells if c["cell_type"] == "code" and code_lines(c)]
    sizes = sorted(len(code_lines(c)) for c in code)
    exported = sum(len(code_lines(c)) for c in code if is_export(c))
    lessons = [c for c in code if not is_export(c) and not only_imports(c)]
    widths = [len(line) for c in code for line in code_lines(c)]
    described = figures(code)
    return Form(
        cells=len(prose) + len(code),
        words=sum(map(words, prose)),
        exported=exported,
        share=exported / max(1, sum(sizes)),
        line=max(widths, default=0),
        long=sum(width > LINE for width in widths),
        median=median(sizes or [0]),
        ninth=sizes[int(.9 * (len(sizes) - 1))] if sizes else 0,
        asserts=sum(map(asserts, lessons)) / max(1, len(lessons)),
        exercises=len({number for c in code for number in re.findall(r'check\("(\d\d\.\d+)"', source(c))}),
        figures=len(described),
        alt=sum(described),
    )


def beyond(form: Form, is_chapter: bool) -> dict[str, float]:
    "What of a notebook lies on the wrong side of a limit, and its value."
    most, least = (MOST, LEAST) if is_chapter else (TOOLS_MOST, {})
    above = {what: getattr(form, what) for what, limit in most.items() if getattr(form, what) > limit}
    below = {what: getattr(form, what) for what, limit in least.items() if getattr(form, what) < limit}
    return above | below


def worse(name: str, form: Form, is_chapter: bool) -> list[str]:
    "A sentence for each limit that a notebook breaks and may not."
    sentences = []
    for what, value in beyond(form, is_chapter).items():
        allowed = ALLOWED.get(name, {}).get(what)
        at_least = is_chapter and what in LEAST
        if allowed is None or (value < allowed if at_least else value > allowed):
            limit = (LEAST if at_least else MOST)[what] if allowed is None else allowed
            side = "at least" if at_least else "at most"
            sentences.append(f"{name}: {what} is {value:.4g}; {side} {limit:.4g}")
    if form.alt < form.figures:
        sentences.append(f"{name}: figures without alt text: {form.figures - form.alt}")
    return sentences


def table() -> str:
    "All rows, the tools apart; a star marks what is beyond a limit."
    titles = ("notebook", "cells", "words", "exported", "share", "line", "long", "median", "ninth",
              "asserts", "exercises", "figures", "with alt")
    rows = [f"{titles[0]:22}" + "".join(f"{t:>10}" for t in titles[1:])]
    for heading, paths in (("chapters", chapters()), ("tools", tools())):
        rows.append(f"-- {heading}")
        for path in paths:
            form = measure(path)
            starred = beyond(form, heading == "chapters")
            row = f"{name_of(path):22}"
            for what, value in vars(form).items():
                text = f"{value:.0%}" if what in ("share", "asserts") else f"{value:g}"
                row += f"{text + '*' * (what in starred):>10}"
            rows.append(row)
    return "\n".join(rows)


def allowed_today() -> dict[str, dict[str, float]]:
    "What ALLOWED has to say for the notebooks as they are."
    found = {}
    for path in chapters() + tools():
        if far := beyond(measure(path), path in chapters()):
            found[name_of(path)] = {what: round_down(value) for what, value in far.items()}
    return found


def round_down(value: float) -> float:
    "Shares to a hundredth; what is counted stays as it is."
    return int(100 * value) / 100 if isinstance(value, float) else value


def update() -> None:
    "Write `allowed_today` into this file."
    here = Path(__file__)
    entries = ""
    for name, values in allowed_today().items():
        entries += f"    {json.dumps(name)}: {json.dumps(values)},\n"
    text = here.read_text(encoding="utf-8")
    old = re.search(r"^ALLOWED: [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    here.write_text(text[:old.start(1)] + entries + text[old.end(1):], encoding="utf-8")


def main() -> int:
    "Print the table and what is above a limit; the exit status says whether something became worse."
    parser = argparse.ArgumentParser(description="The form of the course in numbers.")
    parser.add_argument("--update", action="store_true", help="allow what is above a limit today")
    if parser.parse_args().update:
        update()
        return 0
    print(table())
    print(f"\nLimits of a chapter: at most {MOST}, at least {LEAST}.\nOf a tool: at most {TOOLS_MOST}.\n")
    bad = []
    for path in chapters() + tools():
        name, form, is_chapter = name_of(path), measure(path), path in chapters()
        if far := beyond(form, is_chapter):
            print(f"{name} is beyond: {', '.join(far)}")
        bad += worse(name, form, is_chapter)
    print("\nBecame worse:\n" + "\n".join(bad) if bad else "\nNothing became worse.")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
