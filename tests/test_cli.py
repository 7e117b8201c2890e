"The command line as a stranger meets it: one sentence for what is wrong, never a traceback."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import draw

EASY = ("--image-size", "64")


def sentence(done, status=1):
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sft-course: "), lines
    return lines[0]


def test_no_such_folder(cli, tmp_path):
    assert "nowhere: there is no such folder" in sentence(cli("fit", "nowhere", cwd=tmp_path))


def test_an_empty_folder(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: no images" in sentence(cli("fit", "empty", cwd=tmp_path))


def test_a_file_instead_of_a_folder(cli, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file: this is a file" in sentence(cli("fit", "file", cwd=tmp_path))


def test_one_class(cli, tmp_path):
    draw(tmp_path / "one", classes=("only",))
    assert "only one class (only)" in sentence(cli("fit", "one", cwd=tmp_path))


def test_a_class_with_a_single_picture(cli, tmp_path, stripes):
    for path in sorted((stripes / "waves").glob("*"))[1:]:
        path.unlink()
    assert "class 'waves' holds a single image" in sentence(cli("fit", "stripes", cwd=tmp_path))


def test_a_folder_without_pictures(cli, tmp_path):
    for c in "ab":
        (tmp_path / "texts" / c).mkdir(parents=True)
        (tmp_path / "texts" / c / "notes.txt").write_text("no image")
    assert "texts: no images" in sentence(cli("fit", "texts", cwd=tmp_path))


def test_only_text_files_named_jpg(cli, tmp_path):
    for c in "ab":
        (tmp_path / "lies" / c).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "lies" / c / f"{i}.jpg").write_text("no image")
    assert "none of the images can be read (6 .jpg): a/" in sentence(cli("fit", "lies", cwd=tmp_path))


def test_a_split_with_an_unknown_class(cli, tmp_path):
    draw(tmp_path / "d" / "train")
    draw(tmp_path / "d" / "val", classes=("stripes", "spots"))
    assert "is of class 'spots', which has no images to train on" in sentence(cli("fit", "d", "--strict", cwd=tmp_path))


def test_a_backbone_that_nobody_knows(cli, tmp_path, stripes):
    assert "there is no backbone 'resnet5'" in sentence(cli("fit", "stripes", "--backbone", "resnet5", cwd=tmp_path))


@pytest.mark.parametrize("args, said", [
    (("fit", "stripes", "--sede", "1"), "--seed"),
    (("fitt", "stripes"), "fit"),
    (("fit",), "DIR"),
    (("fit", "stripes", "--seed", "x"), "--seed"),
    (("predict", "stripes"), "FILE"),
    (("frobnicate",), "frobnicate"),
    (("--versoin",), "--versoin"),
])
def test_wrong_usage_is_one_sentence_and_status_2(cli, tmp_path, stripes, args, said):
    line = sentence(cli(*args, cwd=tmp_path), 2)
    assert said in line.split("ee: ")[0] and line.endswith("--help")


def test_out_that_is_no_artifact_is_never_overwritten(cli, tmp_path, stripes):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "thesis: this exists and is no artifact" in sentence(cli("fit", "stripes", "--out", "thesis", cwd=tmp_path))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_predict_with_something_else_than_an_artifact(cli, tmp_path, stripes):
    assert "not an artifact" in sentence(cli("predict", "stripes", "stripes/waves/00.jpg", cwd=tmp_path))


@pytest.mark.parametrize("command", ["", "demo", "fit", "check", "predict", "evaluate", "backbones", "notebooks", "cache", "doctor"])
def test_help_has_an_example(cli, command):
    done = cli(*command.split(), "--help")
    assert done.returncode == 0 and "Usage" in done.stdout and f"sft-course {command or 'fit'}" in done.stdout.split("Example")[1]


def test_without_arguments_it_is_the_help(cli):
    done = cli()
    assert done.returncode == 0 and "evaluate" in done.stdout and not done.stderr


# ---- completion

def test_completion_completes(cli):
    env = os.environ | {"_SFT_COURSE_COMPLETE": "complete_bash", "COMP_WORDS": "sft-course ev", "COMP_CWORD": "1"}
    assert cli(env=env).stdout.split() == ["evaluate"]
    env |= {"COMP_WORDS": "sft-course fit --res", "COMP_CWORD": "2"}
    assert cli(env=env).stdout.split() == ["--resume"]


@pytest.mark.parametrize("shell, file", [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish/completions/sft-course.fish")])
def test_completion_installs_itself(cli, tmp_path, shell, file):
    env = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = cli("--install-completion", shell, env=env)
    assert done.returncode == 0, done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert tmp_path / file in written and any("_SFT_COURSE_COMPLETE" in p.read_text() for p in written)


@pytest.fixture(scope="module")
def fitted(cli, tmp_path_factory):
    "A fit on a folder with two unreadable images and a text file, and where it lies."
    place = tmp_path_factory.mktemp("fit")
    data = draw(place / "data", n=20)
    (data / "stripes" / "broken.jpg").write_bytes((data / "stripes" / "00.jpg").read_bytes()[:400])
    (data / "waves" / "text.jpg").write_text("no image")
    (data / "waves" / "notes.txt").write_text("no image")
    (data / "waves" / ".ipynb_checkpoints").mkdir()
    shutil.copy(data / "waves" / "00.jpg", data / "waves" / ".ipynb_checkpoints" / "00.jpg")
    return place, cli("fit", "data", *EASY, "--json", cwd=place)


def test_fit_names_what_it_leaves_out_and_goes_on(fitted):
    place, done = fitted
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {(p["path"], p["kind"]) for p in told["problems"]} == {
        ("stripes/broken.jpg", "unreadable"), ("waves/text.jpg", "unreadable"), ("waves/notes.txt", "not an image")}
    assert told["n_train"] + told["n_test"] == 40 and told["classes"] == ["stripes", "waves"]
    assert set(told) >= {"accuracy", "head_accuracy", "n_train", "n_test", "classes", "problems", "seconds", "phases", "artifact"}
    assert told["accuracy"] >= .75
    assert "note: stripes/broken.jpg" in done.stderr
    assert (place / "data-model" / "report.html").is_file() and "open data-model/report.html" in done.stderr
    assert told["notes"] == [] and told["report"] == "data-model/report.html"


def test_no_progress_bar_in_a_pipe(fitted):
    assert "it/s" not in fitted[1].stderr and "\r" not in fitted[1].stderr


def test_predict_after_fit(fitted, cli):
    place, _ = fitted
    done = cli("predict", "data-model", "data/waves/00.jpg", "data/stripes/00.jpg", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["predictions"]
    assert [p["label"] for p in found] == ["waves", "stripes"]
    assert all(abs(sum(p["probabilities"].values()) - 1) < 1e-4 for p in found)


@pytest.mark.slow
def test_predict_names_the_file_that_cannot_be_read(fitted, cli):
    place, _ = fitted
    assert "data/waves/text.jpg: cannot be read" in sentence(cli("predict", "data-model", "data/waves/text.jpg", cwd=place))
    assert "gone.jpg: there is no such file" in sentence(cli("predict", "data-model", "gone.jpg", cwd=place))


@pytest.mark.slow
def test_same_seed_same_bytes_with_and_without_the_caches(fitted, cli, tmp_path):
    place, first = fitted
    again = cli("fit", "data", *EASY, "--out", "again", "--json", cwd=place, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    one, two = (json.loads(d.stdout.splitlines()[-1]) for d in (first, again))
    assert one["accuracy"] == two["accuracy"]
    assert (place / "data-model" / "model.safetensors").read_bytes() == (place / "again" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_demo_runs_on_what_the_nearest_settings_file_says(cli, tmp_path, stripes):
    (tmp_path / "settings.ini").write_text("[course]\ndataset = stripes\nimage_size = 64\nseed = 3\n")
    done = cli("demo", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"from scratch \d\.\d+ · frozen head \d\.\d+ · fine-tuned \d\.\d+", done.stdout.splitlines()[-1])
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["classes"] == ["stripes", "waves"] and card["preprocessing"]["size"] == 64 and card["seed"] == 3
    (tmp_path / "settings.ini").write_text("[course]\ndataset = gone\n")
    assert "settings.ini: [course] dataset = " in sentence(cli("demo", cwd=tmp_path))
    (tmp_path / "settings.ini").write_text("[course]\ndataset = stripes\nbackbone = resnet5\n")
    assert "settings.ini: [course] backbone = resnet5: there is no backbone 'resnet5'" in sentence(cli("demo", cwd=tmp_path))


# ---- evaluate

def test_evaluate_matches_classes_by_name(fitted, cli, tmp_path):
    place, _ = fitted
    other = draw(tmp_path / "other", ("stripes", "waves"), n=5, seed=7)
    shutil.rmtree(other / "stripes")  # now waves is class 0 of the folder, and class 1 of the network
    (other / "waves" / "broken.jpg").write_text("no image")
    done = cli("evaluate", "data-model", other, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["n"] == 5 and told["accuracy"] >= .8 and told["classes"] == ["stripes", "waves"] and told["split"] == "all"
    assert told["interval"][0] < told["accuracy"] <= told["interval"][1] == 1 or told["accuracy"] < 1
    stripes, waves = told["per_class"]
    assert (stripes["images"], stripes["recall"], waves["images"]) == (0, None, 5) and waves["recall"] == told["accuracy"]
    assert "note: waves/broken.jpg" in done.stderr and "no image of 'stripes'" in done.stderr
    assert told["report"] == "data-model/report-other.html"
    page = (place / "data-model" / "report-other.html").read_text()
    assert page.startswith("<!doctype html>") and "of 5 test images" in page and "broken.jpg" in page


@pytest.mark.slow
def test_evaluate_uses_the_split_that_is_there_and_says_when_it_was_learned_from(fitted, cli, tmp_path):
    place, _ = fitted
    draw(tmp_path / "split" / "train", n=3)
    draw(tmp_path / "split" / "val", n=2, seed=1)
    def ask(*more):
        done = cli("evaluate", "data-model", tmp_path / "split", "--report", tmp_path / "r.html", "--json", *more, cwd=place)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    assert (ask()["split"], ask()["n"], ask("--split", "all")["n"]) == ("val", 4, 10) and (tmp_path / "r.html").is_file()
    wrong = cli("evaluate", "data-model", tmp_path / "split", "--split", "test", cwd=place)
    assert "no such split here; use val, train or all" in sentence(wrong)
    assert "was fitted on these very images" in cli("evaluate", "data-model", "data", cwd=place).stdout


@pytest.mark.slow
def test_evaluate_refuses_classes_that_the_network_does_not_know(fitted, cli, tmp_path):
    place, _ = fitted
    draw(tmp_path / "new", ("Waves", "spots"), n=2)
    line = sentence(cli("evaluate", "data-model", tmp_path / "new", cwd=place))
    assert "new: 'Waves', 'spots' are unknown" in line and "'stripes', 'waves' (is" in line and "'waves'?)" in line
    assert "not an artifact" in sentence(cli("evaluate", "data", "data", cwd=place))
    assert "there is no such folder" in sentence(cli("evaluate", "data-model", "gone", cwd=place))
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in sentence(cli("evaluate", "data-model", "data", "--report", tmp_path / "file" / "r.html", cwd=place))


# ---- backbones and notebooks

def test_backbones_lists_what_fit_takes(cli):
    found = json.loads(cli("backbones", "resnet5?", "--json").stdout.splitlines()[-1])
    assert found["torchvision"] == ["resnet50"] and found["bundled"] == []
    everything = cli("backbones").stdout
    assert "lite0" in everything and "convnext_tiny" in everything and re.search(r"timm +[0-9]+ more", everything)
    assert "did you mean resnet50?" in sentence(cli("backbones", "rensnet50"))


def test_notebooks_are_copied_and_what_was_changed_is_never_lost(cli, tmp_path):
    done = cli("notebooks", "course", cwd=tmp_path)
    assert done.returncode == 0 and "jupyter lab course/nbs/index.ipynb" in done.stdout, done.stderr
    here, ours = tmp_path / "course", Path(__file__).parent.parent
    found, wanted = ([p.relative_to(top).as_posix() for p in sorted((top / "nbs").rglob("*.ipynb")) if "checkpoints" not in str(p)]
                     for top in (here, ours))
    assert found == wanted and "nbs/tools/cli.ipynb" in found
    for copy in (here / "nbs").rglob("*.ipynb"):
        text = "\n".join("".join(c["source"]) for c in json.loads(copy.read_text())["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\((?!http|#)([^)\s]+)\)", text):
            assert (copy.parent / target.split("#")[0]).exists(), f"{copy.name}: {target}"
    mine, panel = here / "nbs" / "01_data.ipynb", here / "settings.ini"
    mine.write_text("mine")
    panel.write_text("[course]\nprofile = full\n")
    (here / "nbs" / "00_concepts.ipynb").unlink()
    assert "course: 'nbs/01_data.ipynb' there differs from the course" in sentence(cli("notebooks", "course", cwd=tmp_path))
    assert mine.read_text() == "mine" and not (here / "nbs" / "00_concepts.ipynb").exists()
    assert "2 files copied" in cli("notebooks", "course", "--force", cwd=tmp_path).stdout
    assert mine.read_text() != "mine" and "full" in panel.read_text()
    (tmp_path / "file").write_text("x")
    assert "file: cannot be written" in sentence(cli("notebooks", "file", cwd=tmp_path))


# ---- stopped, and gone on

@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    "Images that hold no class at all, so that the head cannot be perfect and there is something to tune."
    import numpy as np
    from PIL import Image
    place, rng = tmp_path_factory.mktemp("hard"), np.random.default_rng(0)
    for c in ("one", "two", "three"):
        (place / "noise" / c).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(place / "noise" / c / f"{i}.png")
    return place


def start(place, *args):
    command = [Path(sys.executable).parent / "sft-course", *args]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_when(process, there, number, patience=240):
    "Send signal `number` when `there()`; what came back."
    until = time.monotonic() + patience
    while not there() and process.poll() is None and time.monotonic() < until:
        time.sleep(.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=patience)
    return process.returncode, out, err


FIT = ("fit", "noise", *EASY, "--seed", "5")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)], ids=["ctrl-c", "sigterm"])
def test_a_fit_that_is_stopped_says_how_to_go_on_and_goes_on_to_the_same_bytes(cli, hard, number):
    out = f"stopped-{number}"
    args = (*FIT, "--out", out)
    status, told, said = stop_when(start(hard, *args), (hard / out / "last.ckpt").exists, number)
    assert status == 128 + number and told == "" and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    again = f"sft-course {' '.join(args)} --resume"
    assert last == f"sft-course: stopped; {out}/last.ckpt holds all that was done; go on with: {again}"
    assert not (hard / out / "card.json").exists()
    assert "an unfinished run lies there; go on with it by --resume, or give another folder" in sentence(cli(*args, cwd=hard))
    assert "had other seed" in sentence(cli(*args, "--seed", "6", "--resume", cwd=hard))
    done = cli(*again.split()[1:], cwd=hard)
    assert done.returncode == 0, done.stderr
    if not (hard / "whole" / "card.json").exists():
        assert cli(*FIT, "--out", "whole", cwd=hard).returncode == 0
    assert (hard / out / "model.safetensors").read_bytes() == (hard / "whole" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stopped_before_training_it_is_a_sentence_and_nothing_is_half_written(hard, tmp_path, number):
    process = start(hard, "fit", "noise", "--out", str(tmp_path / "out"), "--image-size", "65")
    began = time.monotonic()
    status, told, said = stop_when(process, lambda: time.monotonic() > began + 1.5 or (tmp_path / "out").exists(), number)
    assert status == 128 + number and told == "" and "Traceback" not in said, said
    assert said.strip().splitlines()[-1].startswith("sft-course: stopped")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


def test_a_signal_waits_until_a_module_is_loaded(tmp_path):
    (tmp_path / "slow.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(.3)\nwhole = True\n")
    code = ("import signal, time; from sft_course.tools import cli; signal.signal(signal.SIGTERM, cli._end)\n"
            "try:\n    import slow\n    time.sleep(20)\nexcept cli._Ended as e: print(slow.whole, e.signal)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "15"], done.stderr


def test_resume_without_a_run_to_go_on_with_starts_one(cli, stripes, tmp_path):
    done = cli("fit", "stripes", *EASY, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "holds no run to go on with" in done.stderr
    assert (tmp_path / "stripes-model" / "card.json").exists()


def test_of_many_notes_a_fit_prints_some_and_counts_the_rest(cli, stripes, tmp_path):
    for i in range(30):
        (stripes / "waves" / f"{i}.txt").write_text("no image")
    done = cli("fit", "stripes", *EASY, "--json", cwd=tmp_path)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 11 and notes[-1] == "note: … and 20 more; stripes-model/card.json has them all"
    assert len(json.loads(done.stdout.splitlines()[-1])["problems"]) == 30


def test_the_wheel_brings_the_chapters():
    "`notebooks` looks for them there; tests/wheel_check.sh builds one."
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"nbs" = "sft_course/notebooks"' in text and '"images" = "sft_course/notebooks/images"' in text
