"What is generated agrees with what it is generated from."
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the sources, exported, cleaned and rendered anew."
    place = tmp_path_factory.mktemp("copy") / "repo"
    place.mkdir()
    for name in ("nbs", "sft_course", "images"):
        shutil.copytree(REPO / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "Makefile", "README.md", "settings.ini"):
        shutil.copy(REPO / name, place / name)
    for module in (place / "sft_course").rglob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"):  # the two that are written by hand
            module.unlink()  # a module that no notebook exports would be missed otherwise
    (place / ".git").mkdir()  # nbdev looks for the top of a repository
    for command in (["nbdev-export"], ["nbdev-clean"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=place, check=True, capture_output=True)
    make = subprocess.run(["make", "readme", "-o", ".venv/.ready-all", f"BIN={BIN}"], cwd=place, capture_output=True, text=True)
    assert make.returncode == 0, make.stderr
    return place


def different(copy, pattern):
    return [f.name for f in sorted(copy.glob(pattern)) if not filecmp.cmp(f, REPO / f.relative_to(copy), shallow=False)]


def test_modules_are_what_the_notebooks_export(copy):
    exported, kept = ({f.relative_to(top) for f in (top / "sft_course").rglob("*.py")} for top in (copy, REPO))
    assert exported == kept, "a module that no notebook exports, or one that was not exported"
    assert different(copy, "sft_course/**/*.py") == [], "run `make export`"


def test_notebooks_are_clean(copy):
    assert different(copy, "nbs/**/*.ipynb") == [], "run `make export`"


def test_readme_is_made_from_the_index(copy):
    assert different(copy, "README.md") == [], "run `make readme`"
