"The structural rule: modules stand in reading order, and a module imports only modules before it."
import ast
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
ORDER = ["blooms", "core", "data", "backbones", "losses", "loop", "freezing", "unfreezing", "schedules", "evaluation", "recipe",
         "widgets", "exercises", "cli"]
MODULES = sorted(p.stem for p in (REPO / "sft_course").glob("*.py") if not p.stem.startswith("_"))


def imported(module):
    tree = ast.parse((REPO / "sft_course" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sft_course."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("sft_course."))


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), set(MODULES) - set(ORDER)


def test_a_module_imports_only_modules_before_it():
    late = [(m, i) for m in MODULES for i in imported(m) if ORDER.index(i) >= ORDER.index(m)]
    assert late == []
    assert any(True for m in MODULES for _ in imported(m))


def test_import_does_not_load_torch_or_matplotlib():
    code = "import sys, sft_course; assert not {'torch', 'matplotlib', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import sys, sft_course.cli; assert 'torch' not in sys.modules"], check=True)


def test_names_at_the_top_of_the_package_exist():
    import sft_course
    for name in sft_course._HERE:
        assert getattr(sft_course, name).__name__ == name


def test_nothing_else_at_the_top_level():
    known = {"settings.ini", "README.md", "nbs", "sft_course", "tests", "images", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    assert {t.split("/")[0] for t in tracked if not t.startswith(".")} <= known


def test_everything_is_written_for_the_oldest_python_that_is_promised():
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (REPO / "pyproject.toml").read_text())[1]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", f"py3{oldest}", "--select", "E9", "sft_course", "tests"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
