"""Writes the sources of the site: cleaned copies of the notebooks, the landing page and the lists of chapters and tools.

Nothing is executed: the outputs are those that the notebooks were committed with. The copies differ from the notebooks in what a reader of a
web page has no use for: directives of nbdev go, cells marked `#| hide` are folded, and links lead to pages of the site.
"""
import base64
import json
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import reference

REPO = Path(__file__).resolve().parent.parent
NBS = REPO / "nbs"
PARTS = {  # the first chapter of each part
    0: "Foundations",
    5: "Step by step",
    10: "How to do it well",
    15: "Other tasks",
    20: "Beyond",
}
PAGES = {  # what is written for readers of the repository, and its place in the site
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "tests/faults/README.md": "project/promises.md",
    "tests/benchmarks/README.md": "project/benchmarks.md",
}
WIDE = 640  # pixels: a wider figure is scrolled on a phone, and not made too small to read
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def repository() -> str:
    "The public address, from pyproject.toml."
    return re.search(r'^Repository = "(.*)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@dataclass(frozen=True)
class Notebook:
    "A notebook and what its first cell says."
    file: Path
    title: str
    subtitle: str
    module: str  # what it exports, `freezing` or `tools.heads`, or ""

    @property
    def page(self) -> str:
        "Where it stands in the site, without a suffix."
        return self.file.relative_to(NBS).with_suffix("").as_posix()

    @property
    def number(self) -> str:
        "The number of a chapter, or nothing."
        return self.file.stem[:2] if re.match(r"\d\d_", self.file.stem) else ""

    @property
    def name(self) -> str:
        return f"{self.number} {self.title}".strip()


def read(file: Path) -> Notebook:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    title = re.search(r"^# (.*)", first, re.MULTILINE)
    subtitle = re.search(r"^> (.*)", first, re.MULTILINE)
    module = re.search(r"^#\|\s*default_exp (\S+)", code, re.MULTILINE)
    exports = re.search(r"^#\|\s*export\b", code, re.MULTILINE)
    return Notebook(file, title[1] if title else file.stem, subtitle[1] if subtitle else "", module[1] if module and exports else "")


def notebooks() -> tuple[list[Notebook], list[Notebook]]:
    "Chapters in their order, and tools by name: whatever is there."
    chapters = [read(f) for f in sorted(NBS.glob("[0-9][0-9]_*.ipynb"))]
    tools = [read(f) for f in sorted((NBS / "tools").glob("*.ipynb"))]
    return chapters, sorted(tools, key=lambda n: n.title.lower())


# Links

def place_of(target: str, folder: Path, page: str) -> str:
    "A link as it stands in a file of `folder`, for a page of the site."
    if re.match(r"[a-z]+:|#|/", target):
        return target
    path, hash_, anchor = target.partition("#")
    there = (folder / path).resolve()
    if not there.is_relative_to(REPO) or not there.exists():
        return target  # Sphinx says that it leads nowhere
    inside = there.relative_to(REPO).as_posix()
    if inside in PAGES:
        new = PAGES[inside]
    elif inside == "nbs/tools":
        new = "tools/index.md"
    elif inside == "nbs/index.ipynb":
        new = "index.md"
    elif there.suffix == ".ipynb" and there.is_relative_to(NBS):
        new = there.relative_to(NBS).as_posix()
    elif there.is_relative_to(REPO / "images"):
        new = inside
    elif there.suffix == ".png":  # it is copied beside the page
        return there.name
    else:
        return f"{repository()}/{'tree' if there.is_dir() else 'blob'}/main/{inside}"
    return "../" * page.count("/") + new + hash_ + anchor


def relink(text: str, folder: Path, page: str) -> str:
    "Markdown whose links lead to pages of the site; code stays as it is."
    pieces = FENCE.split(text)
    pieces[::2] = [LINK.sub(lambda m: m[1] + place_of(m[2], folder, page) + m[3], piece) for piece in pieces[::2]]
    return "".join(pieces)


def name_pages(text: str, page: str) -> str:
    "Makes a link of the file that a text names in code, where it is a page of the site."
    for file, new in PAGES.items():
        text = text.replace(f"`{file}`", f"[`{file}`]({'../' * page.count('/')}{new})")
    return text


# Notebooks

def heading_links(notebook: Notebook, colab: str) -> str:
    "What stands below the title: where the chapter can be run, and where its code stands."
    up = "../" * notebook.page.count("/")
    source = f"{repository()}/blob/main/nbs/{notebook.page}.ipynb"
    links = [f"[Open in Colab]({colab})", f"[The notebook]({source})"]
    if notebook.module:
        links.append(f"[`sft_course.{notebook.module}`]({up}api/{notebook.module}.md)")
    return "::::{container} chapter-links\n" + " ".join(links) + "\n::::"


def clean_text(cell: dict, notebook: Notebook) -> dict:
    text = relink("".join(cell["source"]), notebook.file.parent, notebook.page)
    if notebook.number and BADGE.search(text):  # the first cell: the title gets its number
        text = re.sub(r"^# (?=\S)", f"# [{notebook.number}]{{.number}} ", text, count=1, flags=re.MULTILINE)
    text = BADGE.sub(lambda m: heading_links(notebook, m[1]), text)
    return {**cell, "source": text}


def only_imports(code: str) -> bool:
    return all(re.match(r"(import|from)\s|\s|\)|#|$", line) for line in code.splitlines())


def clean_code(cell: dict) -> dict | None:
    "A code cell without directives, folded where a reader need not see it; None where nothing is left."
    text = "".join(cell["source"])
    hidden = re.search(r"^#\|\s*hide\b", text, re.MULTILINE)
    code = DIRECTIVE.sub("", text).strip("\n")
    outputs = [clean_output(o) for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    if not code or "google.colab" in code and hidden:
        return None
    options = {}
    tags = []
    if hidden or only_imports(code):
        tags = ["hide-input"]
        options["code_prompt_show"] = "Imports" if only_imports(code) else "Code behind this"
        options["code_prompt_hide"] = options["code_prompt_show"]
    words = next(filter(None, map(words_for, outputs)), None)
    if words:
        options["image"] = {"alt": words}
        if max(map(width_of, outputs)) > WIDE:
            options["image"]["classes"] = "wide"
    return {**cell, "source": code, "outputs": outputs, "execution_count": None, "metadata": {"tags": tags, "mystnb": options}}


def join_imports(cells: list[dict]) -> list[dict]:
    "Imports that follow one another become one fold."
    def imports(cell):
        return cell["cell_type"] == "code" and not cell["outputs"] and only_imports(cell["source"])
    joined = []
    for cell in cells:
        if joined and imports(cell) and imports(joined[-1]):
            known = joined[-1]["source"].splitlines()
            whole = re.compile(r"(import|from)\b[^(]*$")
            new = [line for line in cell["source"].splitlines() if not (line in known and whole.match(line))]
            joined[-1] = {**joined[-1], "source": "\n".join(known + new)}
        else:
            joined.append(cell)
    return joined


def clean_output(output: dict) -> dict:
    "An output without the style that pandas adds to each table: the site has its own."
    data = dict(output.get("data", {}))
    if "text/html" in data:
        data["text/html"] = re.sub(r"<style scoped>.*?</style>\n?", "", "".join(data["text/html"]), flags=re.DOTALL).replace(' border="1"', "")
    return {**output, "data": data} if data else output


def words_for(output: dict) -> str | None:
    "What a screen reader says of an image: the metadata has it, or the title in an SVG."
    data = output.get("data", {})
    for kind in (k for k in data if k.startswith("image/")):
        alt = output.get("metadata", {}).get(kind, {}).get("alt")
        title = re.search(r"<title>(.*?)</title>", "".join(data[kind]), re.DOTALL) if kind == "image/svg+xml" else None
        return alt or (title[1] if title else f"A drawing made by the cell above ({kind.partition('/')[2].partition('+')[0].upper()})")
    return None


def width_of(output: dict) -> int:
    "Pixels from left to right of a PNG, which its header tells; 0 for what is none."
    png = "".join(output.get("data", {}).get("image/png", ""))
    return struct.unpack(">I", base64.b64decode(png[:32])[16:20])[0] if png else 0


def copy_notebook(notebook: Notebook, out: Path) -> None:
    content = json.loads(notebook.file.read_text(encoding="utf-8"))
    cells = [clean_text(c, notebook) if c["cell_type"] == "markdown" else clean_code(c) for c in content["cells"]]
    content["cells"] = join_imports([c for c in cells if c])
    content["metadata"].pop("widgets", None)  # their state needs a script from elsewhere; the figure below them stays
    write(out / f"{notebook.page}.ipynb", json.dumps(content, ensure_ascii=False))


# Pages

def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def toctree(entries: list[tuple[str, str]], caption: str = "", hidden: bool = True) -> str:
    options = [f":caption: {caption}"] if caption else []
    options += [":hidden:"] if hidden else []
    return "\n".join(["```{toctree}", *options, "", *(f"{name} <{page}>" for name, page in entries), "```", ""])


def parts_of(chapters: list[Notebook]) -> dict[str, list[Notebook]]:
    "The chapters of each part that has any."
    parts = {}
    for chapter in chapters:
        first = max(n for n in PARTS if n <= int(chapter.number))
        parts.setdefault(PARTS[first], []).append(chapter)
    return parts


def card(notebook: Notebook) -> str:
    number = f"[{notebook.number}]{{.number}} " if notebook.number else ""
    return f":::{{container}} card\n{number}[{notebook.title}]({notebook.file.name})\n\n{notebook.subtitle}\n:::\n"


def cards(listed: list[Notebook]) -> str:
    return "::::{container} cards\n" + "\n".join(map(card, listed)) + "::::\n"


def landing_page(chapters: list[Notebook]) -> str:
    "nbs/index.ipynb, with ways in below the first example, and a card for each chapter instead of the table."
    cells = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = name_pages(relink(text, NBS, "index"), "index")
    begin = f"[Begin with chapter {chapters[0].number}]({chapters[0].file.name})"
    ways = f"::::{{container}} ways\n{begin} [All chapters](#the-chapters) [The repository]({repository()})\n::::"
    first, fence, rest = re.split(r"(^```\n\n)", text, maxsplit=1, flags=re.MULTILINE)
    parts = "\n".join(f"### {name}\n\n{cards(listed)}" for name, listed in parts_of(chapters).items())
    rest = re.sub(r"(?:^\|.*\n?)+", lambda _: parts, rest, count=1, flags=re.MULTILINE)
    trees = [toctree([(c.name, c.page) for c in listed], name) for name, listed in parts_of(chapters).items()]
    trees.append(toctree([("The tools", "tools/index"), ("The library, name by name", "api/index")], "How the library does it"))
    names = {"contributing": "Contributing", "benchmarks": "How fast", "promises": "What is promised", "changelog": "Changelog",
             "security": "Security"}
    present = [Path(new).stem for file, new in PAGES.items() if (REPO / file).is_file()]
    trees.append(toctree([(names[p], f"project/{p}") for p in names if p in present], "The project"))
    return "\n\n".join([first + fence.strip(), ways, rest, *trees])


def tools_page(tools: list[Notebook]) -> str:
    rows = "\n".join(f"[{t.title}]({t.file.name})\n: {t.subtitle or t.file.stem}\n" for t in tools)
    about = "How the library does it. Each notebook explains itself and tests what it exports; a learner may skip them all."
    return f"# The tools\n\n{about}\n\n{rows}\n{toctree([(t.title, t.file.stem) for t in tools])}"


def write_all(out: Path) -> None:
    "Writes all sources of the site into the folder `out`, which is made anew."
    shutil.rmtree(out, ignore_errors=True)
    chapters, tools = notebooks()
    for notebook in chapters + tools:
        copy_notebook(notebook, out)
    shutil.copytree(REPO / "images", out / "images")
    write(out / "index.md", landing_page(chapters))
    write(out / "tools" / "index.md", tools_page(tools))
    for file, new in PAGES.items():
        if (REPO / file).is_file():
            write(out / new, relink((REPO / file).read_text(encoding="utf-8"), (REPO / file).parent, new))
            for image in (REPO / file).parent.glob("*.png"):
                shutil.copy(image, (out / new).parent)
    for page, text in reference.pages(chapters, tools):
        write(out / "api" / f"{page}.md", text)
