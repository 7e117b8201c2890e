"How Sphinx makes the pages. `make docs` runs docs/build.py, which writes the sources first."
import importlib.util
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import sources  # noqa: E402

project = "sft_course"
author = "The sft_course authors"
project_copyright = author
release = re.search(r'__version__ = "(.*)"', (sources.REPO / "sft_course" / "__init__.py").read_text())[1]
version = release

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["images/*.ipynb"]

# Notebooks: the outputs that they were committed with. No script is fetched for widgets: the figure below each stays.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_text_lexer = "none"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a chapter may go from a title to a third-level heading, as Jupyter shows it

# Formulas: MathJax from a package, as one file that needs no fonts; nothing is loaded from elsewhere.
MATHJAX = Path(importlib.util.find_spec("mathjax").submodule_search_locations[0]) / "static" / "mathjax"
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global", "scale": .94}}

html_theme = "furo"
html_title = "sft_course"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["course.css"]
html_js_files = [("page.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
python_use_unqualified_type_names = True
add_module_names = False
python_maximum_signature_line_length = 88
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2", "color-brand-visited": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9", "color-brand-visited": "#56b4e9"},
    "navigation_with_keys": True,
}


def add_mathjax(app, failed):
    "Puts MathJax, one file and its licence, beside the pages."
    if failed or app.builder.format != "html":
        return
    place = Path(app.outdir) / "_static" / "mathjax"
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(MATHJAX / "es5" / "tex-svg.js", place)
    shutil.copy(MATHJAX / "LICENSE", place)


def setup(app):
    app.connect("build-finished", add_mathjax)
