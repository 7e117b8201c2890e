"The structural rule: modules stand in reading order, and a module imports only modules before it."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sft_course

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "sft_course"

# The one order of all modules: each imports only modules before it.
# The rooms behind a chapter stand before it, the chapters in reading order.
ORDER = [
    "tools.figures", "tools.diagrams", "tools.settings", "tools.extras", "tools.terminal", "tools.files", "tools.torch_state", "tools.processes",
    "tools.records", "tools.blooms", "tools.datasets",
    "core",
    "tools.budget", "tools.transfers", "tools.catalog", "tools.folders", "tools.tables", "tools.intake", "tools.given", "tools.decoding",
    "tools.pixels", "tools.copies", "tools.problems",
    "data", "tools.weights", "backbones", "tools.stages", "tools.opening", "tools.costs", "losses", "tools.loss_lab",
    "tools.graphs", "tools.checkpoints", "tools.steps", "loop", "tools.training",
    "tools.surgery", "tools.activations", "tools.taps", "tools.heads", "freezing", "unfreezing", "tools.finder", "schedules",
    "tools.cams", "tools.logits", "evaluation", "tools.charts", "tools.neighbours", "tools.report",
    "tools.watchers", "tools.objectives", "tools.phases", "tools.predict", "tools.artifact", "tools.tuner", "tools.fitting", "tools.resume",
    "tools.engine",
    "recipe",
    "tools.head_lab", "tools.recipe_lab", "choosing", "tools.compare", "tools.compare_command", "tools.choosing_lab", "objective", "tools.trick_lab",
    "tools.search_space", "tools.trials", "tools.tuning", "tools.tune_command", "parameters",
    "tools.unfreezing_lab", "adapters", "tools.adapter_files", "tools.adapter_lab",
    "robustness", "tools.averages", "tools.corruptions", "tools.shift_lab",
    "tools.target_tables", "tools.flower_targets", "tools.photo_targets", "targets", "tools.target_runs",
    "tools.masks", "tools.segmenters", "segmentation",
    "tools.detectors", "tools.boxes", "tools.detector_race", "detection",
    "tools.task_kinds", "tools.task_folders", "tools.task", "tools.task_report", "tools.task_run", "tools.mask_lab",
    "tools.task_problems", "tools.task_command",
    "tools.sentences", "tools.descriptions", "tools.hidden_states", "tools.sequence_classifiers", "text", "tools.text_lab", "tools.text_files",
    "tools.garden_notes", "tools.chats", "tools.language_models", "tools.upper_layers", "language", "tools.constrained", "tools.language_lab",
    "tools.chat_kinds", "tools.chat_files", "tools.chat_run", "tools.chat_command",
    "tools.keras_start", "tools.keras_inputs", "keras_twin", "tools.parity",
    "tools.launch", "tools.sharded_predict", "tools.scale_lab", "scale",
    "shipping", "tools.keras_export", "tools.exporting", "tools.model_card", "tools.task_model_card", "tools.known_images",
    "tools.serving", "tools.clients", "tools.shipping_runs",
    "tools.shipping_commands",
    "tools.cheat_sheet", "answers",
    "tools.ladder", "tools.widgets",
    "tools.exercises", "tools.exercises_open", "tools.exercises_10", "tools.exercises_11", "tools.exercises_12",
    "tools.exercises_13", "tools.exercises_14",
    "tools.exercises_15", "tools.exercises_16", "tools.exercises_17", "tools.exercises_18", "tools.exercises_19", "tools.exercises_20",
    "tools.exercises_21", "tools.exercises_22", "tools.exercises_23", "tools.cli",
]


def module_name(file, package=PACKAGE):
    "The name of a module below the package: `core`, or `tools.cache` where it lies in a folder."
    return ".".join(file.relative_to(package).with_suffix("").parts)


MODULES = sorted(module_name(f) for f in PACKAGE.rglob("*.py") if not f.name.startswith("_"))


def imported(module, package=PACKAGE):
    "The modules of the package that a module imports, anywhere in it and however the import is written."
    file = package.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(node, module)
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from filter(None, (inside(name, package) for name in names))


def origin_of(node, module):
    "The absolute name of what `from … import` imports from, in a module of the package."
    here = ["sft_course", *module.split(".")]
    above = here[:len(here) - node.level] if node.level else []
    return ".".join([*above, *filter(None, [node.module])])


def inside(name, package=PACKAGE):
    "The module that an absolute name belongs to, or None; `sft_course.fine_tune` belongs to `recipe`."
    first, *parts = name.split(".")
    if first != "sft_course" or not parts:
        return None
    if parts[0] in sft_course._HERE:
        return sft_course._HERE[parts[0]]
    while parts and not package.joinpath(*parts).with_suffix(".py").is_file():
        parts.pop()
    return ".".join(parts) or None


def late(module, order, package=PACKAGE):
    "What a module imports although it does not stand before it."
    return sorted({name for name in imported(module, package) if order.index(name) >= order.index(module)})


def test_every_module_has_its_place_once():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_before_it(module):
    assert late(module, ORDER) == []


def test_what_the_modules_import_is_really_seen():
    "So that the test above cannot pass by looking away."
    assert {"tools.blooms"} <= set(imported("tools.datasets"))
    assert {"tools.settings", "loop"} <= set(imported("schedules"))
    assert {"tools.settings", "tools.intake", "evaluation", "recipe"} <= set(imported("tools.cli"))


WAYS = ["from .zoo import lion", "from . import zoo", "from sft_course.zoo import lion",
        "from sft_course import zoo", "import sft_course.zoo", "import sft_course.zoo as z", "from sft_course import fine_tune",
        "def late():\n    from .zoo import lion"]
FROM_A_FOLDER = ["from .cache import key", "from . import cache", "from ..tools.cache import key",
                 "from ..tools import cache", "from sft_course.tools.cache import key", "import sft_course.tools.cache"]


@pytest.mark.parametrize("line", WAYS)
def test_an_import_is_seen_however_it_is_written(line, tmp_path):
    for name in ("zoo", "recipe"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "ant.py").write_text(line + "\n")
    expected = ["recipe"] if "fine_tune" in line else ["zoo"]
    assert late("ant", ["ant", "recipe", "zoo"], tmp_path) == expected
    assert late("ant", ["recipe", "zoo", "ant"], tmp_path) == []


@pytest.mark.parametrize("line", FROM_A_FOLDER)
def test_an_import_is_seen_in_a_folder_too(line, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "cache.py").touch()
    (tmp_path / "tools" / "ant.py").write_text(line + "\n")
    assert late("tools.ant", ["tools.ant", "tools.cache"], tmp_path) == ["tools.cache"]


def test_import_does_not_load_torch_or_matplotlib():
    code = "import sys, sft_course; assert not {'torch', 'matplotlib', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import sys, sft_course.tools.cli; assert 'torch' not in sys.modules"], check=True)


def test_names_at_the_top_of_the_package_exist():
    for name in sft_course._HERE:
        assert getattr(sft_course, name).__name__ == name


def test_nothing_else_at_the_top_level():
    known = {"settings.ini", "README.md", "nbs", "sft_course", "tests", "images", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md",
             "docs", "CONTRIBUTING.md", "CITATION.cff", "SECURITY.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    assert {t.split("/")[0] for t in tracked if not t.startswith(".")} <= known


def test_everything_is_written_for_the_oldest_python_that_is_promised():
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (REPO / "pyproject.toml").read_text())[1]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", f"py3{oldest}", "--select", "E9", "sft_course", "tests"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_modules_import_what_they_use_and_nothing_else():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401,F821", "sft_course"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
