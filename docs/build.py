"""Makes the site: python docs/build.py [--out build/docs]. Warnings are errors; nothing is executed and nothing is fetched.

The folder gets three others: source (what Sphinx reads), doctrees (what it keeps for the next time) and html, the site.
"""
import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = {"sphinx": "sphinx", "myst_nb": "myst-nb", "furo": "furo", "mathjax.static": "django-static-mathjax"}


def missing() -> list[str]:
    "The packages of the extra `docs` that are not installed."
    def there(module):
        top = importlib.util.find_spec(module.partition(".")[0])
        if not top or "." not in module:
            return top
        return any((Path(p) / "static" / "mathjax" / "es5" / "tex-svg.js").is_file() for p in top.submodule_search_locations or ())
    return [package for module, package in NEEDED.items() if not there(module)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "docs", help="where the site goes")
    out = parser.parse_args().out.resolve()
    if missing():
        print(f"docs: {' and '.join(missing())} not installed; install the project with its extra docs.", file=sys.stderr)
        return 1
    sys.path.insert(0, str(HERE))
    import sources
    from sphinx.cmd.build import build_main

    sources.write_all(out / "source")
    shutil.rmtree(out / "html", ignore_errors=True)
    shutil.rmtree(out / "doctrees", ignore_errors=True)
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(HERE), "-d", str(out / "doctrees")]
    failed = build_main([*options, str(out / "source"), str(out / "html")])
    if not failed:
        print(f"The site: {out / 'html' / 'index.html'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
