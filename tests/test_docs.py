"""The site: built without a warning, every link and anchor leads somewhere, and no page loads anything from elsewhere.

`make docs` builds the site and runs these on it (DOCS_HTML names the folder); by themselves they build it into a temporary folder.
Where Sphinx and the other packages of the extra `docs` are not installed they are skipped.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

REPO = Path(__file__).parent.parent
NEEDED = ("sphinx", "myst_nb", "furo", "mathjax")
pytestmark = pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="the extra docs is not installed")

NOTEBOOKS = sorted(f for f in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts and f.name != "index.ipynb")
CHAPTERS = [f for f in NOTEBOOKS if f.parent.name == "nbs"]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data"}
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}


@dataclass
class Page(HTMLParser):
    "What a page links to, what it loads, and the places in it that can be linked to."
    file: Path
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    images: list[dict] = field(default_factory=list)
    summaries: int = 0

    def __post_init__(self):
        super().__init__()
        self.text = self.file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append(attrs)
        if attrs.get(LOADS.get(tag)):
            self.loads.append(attrs[LOADS[tag]])
        if tag == "link" and FETCHED & set((attrs.get("rel") or "").split()):
            self.loads.append(attrs["href"])
        if tag == "summary":
            self.summaries += 1


@pytest.fixture(scope="session")
def html(tmp_path_factory):
    "The folder of the site."
    if os.environ.get("DOCS_HTML"):
        return Path(os.environ["DOCS_HTML"]).resolve()
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run([sys.executable, REPO / "docs" / "build.py", "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out / "html"


@pytest.fixture(scope="session")
def pages(html):
    return {f.relative_to(html).as_posix(): Page(f) for f in sorted(html.rglob("*.html"))}


def page_of(notebook):
    return notebook.relative_to(REPO / "nbs").with_suffix(".html").as_posix()


def cells(notebook, kind):
    return ["".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def remote(address):
    return re.match(r"(?:[a-z+]+:)?//", address)


def broken(pages, html):
    "Links and loads that lead to no file or to no place in it: (page, target)."
    for name, page in pages.items():
        for target in page.links + page.loads:
            if remote(target) or target.startswith(("mailto:", "data:")):
                continue
            path, anchor = urldefrag(unquote(target))
            path = path.partition("?")[0]
            file = (html / name).parent / path if path else html / name
            if not file.resolve().is_file():
                yield name, target
            elif anchor and file.suffix == ".html" and anchor not in pages[file.resolve().relative_to(html.resolve()).as_posix()].anchors:
                yield name, target


def test_every_notebook_has_a_page_and_stands_in_a_list(pages):
    assert {page_of(n) for n in NOTEBOOKS} <= set(pages)
    assert {page_of(n) for n in CHAPTERS} <= set(pages["index.html"].links)
    assert {page_of(n).removeprefix("tools/") for n in NOTEBOOKS if n not in CHAPTERS} <= set(pages["tools/index.html"].links)


def test_every_link_and_anchor_leads_somewhere(pages, html):
    assert list(broken(pages, html)) == []


def test_a_broken_link_would_be_seen(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">there</a><a href="b.html#no">no</a><a href="c.html">no</a><img src="d.png"><p id="x">')
    (tmp_path / "b.html").write_text('<a href="a.html#x">there</a><a href="#y">no</a>')
    pages = {f.name: Page(f) for f in sorted(tmp_path.glob("*.html"))}
    assert list(broken(pages, tmp_path)) == [("a.html", "b.html#no"), ("a.html", "c.html"), ("a.html", "d.png"), ("b.html", "#y")]


def test_no_page_loads_anything_from_elsewhere(pages, html):
    assert [(name, load) for name, page in pages.items() for load in page.loads if remote(load)] == []
    styles = {f.name: f.read_text(encoding="utf-8") for f in html.rglob("*.css")}
    assert [name for name, text in styles.items() if re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text)] == []
    scripts = r"<script[^>]*>[^<]*https?://[^<]*</script>|<style[^>]*>[^<]*url\(['\"]?(https?:)?//"
    assert [name for name, page in pages.items() if re.search(scripts, page.text)] == []


def test_no_page_names_a_place_on_this_machine(pages, html):
    places = [str(REPO), str(html), sys.prefix]
    assert [(name, place) for name, page in pages.items() for place in places if place in page.text] == []


def test_formulas_are_set_by_a_script_that_lies_beside_the_pages(pages, html):
    assert (html / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    assert (html / "_static" / "mathjax" / "LICENSE").is_file()
    with_formula = [n for n in CHAPTERS if any(re.search(r"\$[^$`]+\$", re.sub(r"`[^`]*`", "", t)) for t in cells(n, "markdown"))]
    assert with_formula
    for notebook in with_formula:
        assert any("mathjax" in load for load in pages[page_of(notebook)].loads), notebook.name


def test_every_image_has_words(pages):
    bare = [(name, image.get("src")) for name, page in pages.items() for image in page.images if not (image.get("alt") or "").strip()]
    assert bare == []
    named = re.compile(r"\.(png|jpe?g|svg)$")
    assert [(name, i["alt"]) for name, page in pages.items() for i in page.images if named.search(i["alt"])] == []


def test_figures_say_what_the_notebook_says_of_them(pages):
    for notebook in CHAPTERS:
        outputs = [o for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
        alts = {m["alt"] for o in outputs for m in o.get("metadata", {}).values() if isinstance(m, dict) and m.get("alt")}
        assert alts <= {i["alt"] for i in pages[page_of(notebook)].images}, notebook.name


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda n: n.stem)
def test_a_chapter_shows_its_outputs_and_no_directives(pages, notebook):
    page = pages[page_of(notebook)]
    assert not re.search(r"#\|\s?(export|hide|default_exp)", re.sub(r"<[^>]+>", "", page.text))
    assert "google.colab" not in page.text
    assert "application/vnd.jupyter" not in page.text
    folds = sum(text.count("<details>") for text in cells(notebook, "markdown"))
    assert page.summaries >= folds > 0


def test_every_public_name_has_its_place_in_the_reference(pages):
    sys.path.insert(0, str(REPO / "docs"))
    try:
        import reference
        import sources
    finally:
        sys.path.remove(str(REPO / "docs"))
    chapters, tools = sources.notebooks()
    modules = [n.module for n in chapters + tools if n.module]
    assert len(modules) == len(set(modules)) > 20
    for module in modules:
        missing = {f"sft_course.{module}.{name}" for name in reference.shown(module)} - pages[f"api/{module}.html"].anchors
        assert not missing
    assert "One step of a recipe" in pages["api/tools.phases.html"].text


def test_the_search_knows_names_and_words(html):
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    assert "fine_tun" in index and "overfit" in index
    assert (html / "search.html").is_file()


def test_what_a_repository_of_the_public_has():
    citation = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.*)"', (REPO / "sft_course" / "__init__.py").read_text())[1]
    assert f"\nversion: {version}\n" in citation
    assert re.findall(r"^  - (.*): ", citation, re.MULTILINE) == ["name"], "the authors are an entity"
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "bash .ci/run" in workflow


CHANGELOG = "# Changelog\n\n## 0.2.0 (not released)\n\n- More.\n\n## 0.1.0 (2026-01-02)\n\n- All.\n"


@pytest.fixture
def release(tmp_path, monkeypatch):
    "docs/release.py, and a small repository to release."
    spec = importlib.util.spec_from_file_location("release", REPO / "docs" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "sft_course").mkdir()
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "sft_course" / "__init__.py").write_text('__version__ = "0.1.0"\n\n_HERE = {}\n')
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 0.1.0\ndate-released: 2026-01-02\nlicense: Apache-2.0\n")
    who = ["-c", "user.name=Tests", "-c", "user.email=tests@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-qm", "All"], ["tag", "v0.1.0"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return module, tmp_path


@pytest.mark.parametrize("version, why", [("0.2", "no semantic version"), ("0.2.0rc1", "no semantic version"), ("v0.2.0", "no semantic version"),
                                          ("0.1.0", "not after"), ("0.0.9", "not after"), ("0.2.0", ""), ("0.10.0", "")])
def test_a_release_needs_a_later_semantic_version(release, version, why):
    module, repo = release
    said = module.refusal(version, repo)
    assert why in said and bool(why) == bool(said)


def test_a_release_needs_a_clean_tree_and_something_to_release(release):
    module, repo = release
    (repo / "notes.txt").touch()
    assert "not clean" in module.refusal("0.2.0", repo)
    (repo / "notes.txt").unlink()
    module.write_version("0.2.0", "2026-11-26", repo)
    module.git("-c", "user.name=Tests", "-c", "user.email=tests@example.org", "commit", "-qam", "Release", repo=repo)
    assert "nothing to release" in module.refusal("0.3.0", repo)


def test_a_release_writes_its_version_everywhere(release):
    module, repo = release
    module.write_version("0.2.0", "2026-11-26", repo)
    assert (repo / "CHANGELOG.md").read_text() == CHANGELOG.replace("0.2.0 (not released)", "0.2.0 (2026-11-26)")
    assert (repo / "sft_course" / "__init__.py").read_text() == '__version__ = "0.2.0"\n\n_HERE = {}\n'
    assert (repo / "CITATION.cff").read_text() == "title: x\nversion: 0.2.0\ndate-released: 2026-11-26\nlicense: Apache-2.0\n"
