"The command line as a stranger meets it: one sentence for what is wrong, never a traceback."
import json
import re
import shutil

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
    assert "empty: no pictures" in sentence(cli("fit", "empty", cwd=tmp_path))


def test_a_file_instead_of_a_folder(cli, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file: this is a file" in sentence(cli("fit", "file", cwd=tmp_path))


def test_one_class(cli, tmp_path):
    draw(tmp_path / "one", classes=("only",))
    assert "only one class (only)" in sentence(cli("fit", "one", cwd=tmp_path))


def test_a_class_with_a_single_picture(cli, tmp_path, stripes):
    for path in sorted((stripes / "waves").glob("*"))[1:]:
        path.unlink()
    assert "class 'waves' holds a single picture" in sentence(cli("fit", "stripes", cwd=tmp_path))


def test_a_folder_without_pictures(cli, tmp_path):
    for c in "ab":
        (tmp_path / "texts" / c).mkdir(parents=True)
        (tmp_path / "texts" / c / "notes.txt").write_text("no picture")
    assert "texts: no pictures" in sentence(cli("fit", "texts", cwd=tmp_path))


def test_only_text_files_named_jpg(cli, tmp_path):
    for c in "ab":
        (tmp_path / "lies" / c).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "lies" / c / f"{i}.jpg").write_text("no picture")
    assert "could not be read, the first is a/" in sentence(cli("fit", "lies", cwd=tmp_path))


def test_a_split_with_an_unknown_class(cli, tmp_path):
    draw(tmp_path / "d" / "train")
    draw(tmp_path / "d" / "val", classes=("stripes", "spots"))
    assert "is of class 'spots', which has no pictures to train on" in sentence(cli("fit", "d", "--strict", cwd=tmp_path))


def test_a_backbone_that_nobody_knows(cli, tmp_path, stripes):
    assert "there is no backbone 'resnet5'" in sentence(cli("fit", "stripes", "--backbone", "resnet5", cwd=tmp_path))


def test_a_wrong_option_is_wrong_usage(cli, tmp_path, stripes):
    done = cli("fit", "stripes", "--sede", "1", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--seed" in done.stderr


def test_out_that_is_no_artifact_is_never_overwritten(cli, tmp_path, stripes):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "thesis: this exists and is no artifact" in sentence(cli("fit", "stripes", "--out", "thesis", cwd=tmp_path))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_predict_with_something_else_than_an_artifact(cli, tmp_path, stripes):
    assert "not an artifact" in sentence(cli("predict", "stripes", "stripes/waves/00.jpg", cwd=tmp_path))


@pytest.mark.parametrize("command", [(), ("fit",), ("demo",), ("predict",)])
def test_help(cli, command):
    done = cli(*command, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


@pytest.fixture(scope="module")
def fitted(cli, tmp_path_factory):
    "A fit on a folder with two unreadable pictures and a text file, and where it lies."
    place = tmp_path_factory.mktemp("fit")
    data = draw(place / "data", n=20)
    (data / "stripes" / "broken.jpg").write_bytes((data / "stripes" / "00.jpg").read_bytes()[:400])
    (data / "waves" / "text.jpg").write_text("no picture")
    (data / "waves" / "notes.txt").write_text("no picture")
    (data / "waves" / ".ipynb_checkpoints").mkdir()
    shutil.copy(data / "waves" / "00.jpg", data / "waves" / ".ipynb_checkpoints" / "00.jpg")
    return place, cli("fit", "data", *EASY, "--json", cwd=place)


def test_fit_names_what_it_leaves_out_and_goes_on(fitted):
    _, done = fitted
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {(p["path"], p["kind"]) for p in told["problems"]} == {
        ("stripes/broken.jpg", "unreadable"), ("waves/text.jpg", "unreadable"), ("waves/notes.txt", "not a picture")}
    assert told["n_train"] + told["n_val"] == 40 and told["classes"] == ["stripes", "waves"]
    assert set(told) >= {"accuracy", "head_accuracy", "n_train", "n_val", "classes", "problems", "seconds", "phases", "artifact"}
    assert told["accuracy"] >= .75
    assert "stripes/broken.jpg" in done.stdout


def test_no_progress_bar_in_a_pipe(fitted):
    assert "it/s" not in fitted[1].stderr and "\r" not in fitted[1].stderr


def test_predict_after_fit(fitted, cli):
    place, _ = fitted
    done = cli("predict", "data-model", "data/waves/00.jpg", "data/stripes/00.jpg", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [p["label"] for p in found] == ["waves", "stripes"]
    assert all(abs(sum(p["probabilities"].values()) - 1) < 1e-4 for p in found)


def test_predict_names_the_file_that_cannot_be_read(fitted, cli):
    place, _ = fitted
    assert "data/waves/text.jpg: cannot be read" in sentence(cli("predict", "data-model", "data/waves/text.jpg", cwd=place))
    assert "gone.jpg: there is no such file" in sentence(cli("predict", "data-model", "gone.jpg", cwd=place))


def test_same_seed_same_bytes_with_and_without_the_caches(fitted, cli, tmp_path):
    place, first = fitted
    import os
    again = cli("fit", "data", *EASY, "--out", "again", "--json", cwd=place, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    one, two = (json.loads(d.stdout.splitlines()[-1]) for d in (first, again))
    assert one["accuracy"] == two["accuracy"]
    assert (place / "data-model" / "model.safetensors").read_bytes() == (place / "again" / "model.safetensors").read_bytes()


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
