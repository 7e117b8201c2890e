"The commands as a stranger types them: with typing errors, closed streams, folders that hold something already."
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import REPO, draw
from typer.testing import CliRunner

CASES = REPO.parent / "shared" / "cases"
EASY = ("--image-size", "64")


def one_object(done, status=0):
    "The JSON object that is all of standard output."
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(done, status=1):
    "The sentence on standard error of a command that printed nothing else."
    assert done.returncode == status and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("sft-course: ") and "Traceback" not in done.stderr and "unexpected" not in done.stderr
    return lines[-1]


@pytest.fixture(scope="module")
def fitted(cli, tmp_path_factory):
    "A place with the folder `photos` and the model of it, `photos-model`."
    place = tmp_path_factory.mktemp("fitted")
    draw(place / "photos")
    done = cli("fit", "photos", *EASY, "--json", cwd=place)
    return place, one_object(done)


# ---- JSON and nothing else

def test_fit_prints_json_alone_and_tells_people_on_standard_error(fitted):
    place, told = fitted
    assert told["artifact"] == "photos-model" and (place / told["report"]).is_file()
    assert told["n_train"] + told["n_test"] == 24


@pytest.mark.parametrize("args", [("check", "photos"), ("backbones", "resnet5?"), ("notebooks", "course"), ("cache",), ("doctor",),
                                  ("evaluate", "photos-model", "photos"), ("predict", "photos-model", "photos/waves/00.jpg")],
                         ids=lambda args: args[0])
def test_every_command_prints_one_json_object_and_nothing_else(fitted, cli, args):
    told = one_object(cli(*args, "--json", cwd=fitted[0]))
    assert isinstance(told, dict) and told


def test_demo_prints_json_alone(monkeypatch, tmp_path):
    import sft_course.recipe as recipe
    from sft_course.tools.cli import app
    metrics = {"accuracy": .9, "head_accuracy": .8, "n_train": 4, "n_test": 2, "n_val": 1}
    card = dict.fromkeys(("classes", "problems", "phases", "notes"), []) | {"metrics": metrics, "chosen": "head", "seconds": 1.}
    card |= {"backbone": "lite0", "seed": 0, "preprocessing": {"size": 64}}
    result = SimpleNamespace(card=card, history=[{"val_loss": float("nan")}], accuracy=.9)
    monkeypatch.setattr(recipe, "demo", lambda out: (.25, result))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", "--json"])
    told = json.loads(done.stdout)
    assert told["scratch_accuracy"] == .25 and told["history"] == [{"val_loss": None}] and "from scratch 0.250" in done.stderr


def test_where_check_is_strict_the_object_comes_and_the_status_is_1(cli, stripes, tmp_path):
    (stripes / "waves" / "notes.txt").write_text("no image")
    done = cli("check", "stripes", "--strict", "--json", cwd=tmp_path)
    assert "waves/notes.txt" in {p["path"] for p in one_object(done, 1)["problems"]}
    assert "would be left out" in done.stderr


# ---- ways to call it

def test_version_and_help_in_all_ways(cli):
    import sft_course
    assert cli("--version").stdout.split()[-1] == sft_course.__version__
    assert cli("-h").stdout == cli("--help").stdout and "doctor" in cli("-h").stdout
    assert "--batch-size" in cli("fit", "-h").stdout
    module = subprocess.run([sys.executable, "-m", "sft_course", "--help"], capture_output=True, text=True)
    assert module.stdout == cli("--help").stdout and module.returncode == 0


@pytest.mark.parametrize("args, said", [
    (("fit", "stripes", "--image-size", "7"), "--image-size = 7: not allowed; use a whole number from 32 to 1024"),
    (("fit", "stripes", "--image-size", "0"), "--image-size = 0: not allowed"),
    (("fit", "stripes", "--seed", "-1"), "--seed = -1: not allowed"),
    (("fit", "strips"), "strips: there is no such folder; did you mean stripes?"),
    (("check", "strips"), "strips: there is no such folder; did you mean stripes?"),
    (("predict", "strips", "a.jpg"), "strips: there is no such folder; did you mean stripes?"),
    (("evaluate", "strips", "stripes"), "strips: there is no such folder; did you mean stripes?"),
    (("fit", "stripes", "--val", "strips"), "strips: there is no such folder; did you mean stripes?"),
    (("fit", "stripes", "--weights", "strips"), "strips: there is no such file; did you mean stripes?"),
    (("fit", "nowhere"), "nowhere: there is no such folder"),
    (("fit", "stripes", "--device", "gpu"), "--device = gpu: not allowed"),
])
def test_a_wrong_value_is_one_sentence_by_the_name_that_was_typed(cli, tmp_path, stripes, args, said):
    assert said in refused(cli(*args, cwd=tmp_path))


@pytest.mark.parametrize("args, said", [
    (("--train", "heads"), "did you mean head?"),
    (("--train", "0"), "neither head nor all nor a number"),
    (("--watch", "tensorbord"), "did you mean tensorboard?"),
    (("--lr", "0"), "no learning rate"),
    (("--lr", "nan"), "no learning rate"),
    (("--epochs", "0"), "--epochs"),
    (("--batch-size", "1"), "--batch-size"),
    (("--name", "my/leaves"), "a path goes to --out"),
    (("--name", ""), "no name of a folder"),
    (("--epoch", "3"), "--epochs"),
    (("--out", ""), "the path is empty"),
])
def test_a_wrong_option_is_one_sentence_and_status_2(cli, tmp_path, stripes, args, said):
    assert said in refused(cli("fit", "stripes", *args, cwd=tmp_path), 2)


@pytest.mark.parametrize("command", ["fit", "check", "notebooks"])
def test_an_unset_variable_is_not_the_working_directory(cli, stripes, command):
    assert "the path is empty; is a variable of the shell unset?" in refused(cli(command, "", cwd=stripes), 2)
    assert sorted(p.name for p in stripes.iterdir()) == ["stripes", "waves"]


def test_a_home_that_nobody_knows(cli):
    assert "the home folder is not known here" in refused(cli("check", "~nobody-of-this-name/photos"), 2)


# ---- what fit passes on

class Told(Exception):
    "What `fine_tune` was asked for."


@pytest.fixture
def asked(monkeypatch, stripes):
    "What `fine_tune` would have been called with: asked(*args)."
    import sft_course.recipe as recipe
    import sft_course.tools.cli as cli
    monkeypatch.chdir(stripes.parent)
    monkeypatch.setattr(cli, "_few_threads", lambda *_: None)

    def fine_tune(data, **options):
        options.pop("say")("12 images of 2 classes")
        raise Told(data, options)

    def ask(*args):
        monkeypatch.setattr(recipe, "fine_tune", fine_tune)
        done = CliRunner().invoke(cli.app, ["fit", "stripes", *args])
        assert isinstance(done.exception, Told), done.exception
        assert "12 images of 2 classes" in done.stderr and done.stdout == ""
        return done.exception.args
    return ask


def test_what_is_not_given_is_left_to_the_library(asked):
    data, options = asked()
    assert len(data) == 24 and options.pop("settings").seed == 0
    assert {k: v for k, v in options.items() if v} == {"out": SimpleNamespace(**options).out} and str(options["out"]) == "stripes-model"


def test_what_people_change_reaches_the_recipe(asked, stripes):
    (stripes.parent / "mine.pt").write_bytes(b"weights")
    _, options = asked("--epochs", "3", "--lr", "3e-4", "--batch-size", "16", "--train", "all", "--weights", "mine.pt", "--watch", "csv",
                       "--keep-checkpoint", "--backbone", "timm/resnet18", "--device", "cpu", "--seed", "7", "--image-size", "96")
    settings = options.pop("settings")
    assert (settings.backbone, settings.device, settings.seed, settings.fit_image_size) == ("timm/resnet18", "cpu", 7, 96)
    assert {k: options[k] for k in ("epochs", "lr", "batch_size", "train", "weights", "watch", "keep_checkpoint")} == {
        "epochs": 3, "lr": 3e-4, "batch_size": 16, "train": "all", "weights": "mine.pt", "watch": "csv", "keep_checkpoint": True}
    assert asked("--train", "4")[1]["train"] == 4 and asked("--train", "head")[1]["train"] == "head"


def test_folders_for_validation_and_test_are_those_parts(asked, stripes):
    draw(stripes.parent / "later" / "v", n=3, seed=1)
    draw(stripes.parent / "later" / "t", n=4, seed=2)
    data, _ = asked("--val", "later/v", "--test", "later/t")
    assert [int((data.part == p).sum()) for p in ("train", "val", "test")] == [24, 6, 8]


# ---- nothing is replaced

def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_second_fit_takes_the_next_free_name(fitted, cli, tmp_path):
    place, _ = fitted
    before = bytes_of(place / "photos-model")
    draw(tmp_path / "photos", classes=("rose", "lily"), seed=5)
    done = cli("fit", tmp_path / "photos", *EASY, cwd=place)
    assert done.returncode == 0 and "photos-model is there already, so this run writes to photos-model-2" in done.stderr
    assert "saved in photos-model-2" in done.stdout and (place / "photos-model-2" / "card.json").is_file()
    assert bytes_of(place / "photos-model") == before


@pytest.mark.slow
def test_a_model_that_was_named_is_not_replaced(fitted, cli):
    place, _ = fitted
    before = bytes_of(place / "photos-model")
    said = refused(cli("fit", "photos", *EASY, "--out", "photos-model", cwd=place))
    assert "photos-model: a model lies there, and it is not replaced; give another folder with --out" in said
    again = cli("fit", "photos", *EASY, "--out", "photos-model", "--resume", cwd=place)
    assert again.returncode == 0 and "has ended already" in again.stderr
    assert bytes_of(place / "photos-model") == before


def test_files_of_a_person_that_are_called_as_ours_are_kept(cli, stripes, tmp_path):
    mine = tmp_path / "project"
    mine.mkdir()
    (mine / "history.csv").write_text("my,own")
    (mine / "report.html").write_text("mine")
    assert "project: this exists and is no artifact" in refused(cli("fit", "stripes", "--out", "project", cwd=tmp_path))
    assert bytes_of(mine) == {"history.csv": b"my,own", "report.html": b"mine"}


def test_artifacts_are_named_and_placed_where_nothing_lies_and_never_in_the_data(tmp_path, monkeypatch):
    from sft_course.tools.cli import _artifact, _free, _outside
    from sft_course.tools.settings import SFTError
    monkeypatch.chdir(tmp_path)
    data = draw(tmp_path / "images" / "v1.2", n=1)

    def place(*args):
        return str(_artifact(data, *args, False))
    assert place(None, None) == "v1.2-model" and place(None, "oaks") == "oaks" and place(tmp_path / "runs", "oaks") == str(tmp_path / "runs" / "oaks")
    (tmp_path / "v1.2-model").write_text("a file")
    assert place(None, None) == "v1.2-model-2"
    (tmp_path / "v1.2-model-2").mkdir()
    (tmp_path / "v1.2-model-2" / "last.ckpt").touch()
    with pytest.raises(SFTError, match="v1.2-model-2: an unfinished run lies there; go on with it by --resume"):
        place(None, None)
    assert str(_artifact(data, None, None, True)) == "v1.2-model-2"
    assert str(_free(tmp_path / "v1.2-model")).endswith("v1.2-model-3"), "the demo does not take it either"
    (data / "stripes").rename(data / "deep")
    monkeypatch.chdir(data / "deep")
    assert (data / "deep" / place(None, None)).resolve() == tmp_path / "images" / "v1.2-model"
    with pytest.raises(SFTError, match="lies inside"):
        _outside(data / "waves" / "model", None, data)


@pytest.mark.slow
def test_fit_on_the_working_directory_writes_beside_it(fitted, cli):
    place, _ = fitted
    done = cli("fit", ".", *EASY, cwd=place / "photos")
    assert done.returncode == 0, done.stderr
    saved = re.search(r"saved in (\S+);", done.stdout)[1]
    assert re.fullmatch(r"\.\./photos-model-\d", saved) and (place / "photos" / saved / "card.json").is_file()
    assert sorted(p.name for p in (place / "photos").iterdir()) == ["stripes", "waves"]
    assert "lies inside" in refused(cli("fit", "photos", "--out", "photos/model", cwd=place))


@pytest.mark.slow
def test_home_is_expanded_and_suggestions_can_be_pasted(cli, stripes, tmp_path):
    home = os.environ | {"HOME": str(tmp_path)}
    done = cli("fit", "stripes", *EASY, "--out=~/my models/v 1", cwd=tmp_path, env=home)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my models" / "v 1" / "card.json").is_file() and not (tmp_path / "~").exists()
    suggested = re.search(r"try: (sft-course predict .*) IMAGE", done.stdout)[1]
    again = subprocess.run(["bash", "-c", f"{suggested} stripes/waves/00.jpg".replace("sft-course", f"{sys.executable} -m sft_course")],
                           cwd=tmp_path, env=home, capture_output=True, text=True)
    assert again.returncode == 0 and "waves" in again.stdout, again.stderr


def test_the_command_that_goes_on_can_be_pasted(monkeypatch):
    from sft_course.tools.cli import _again
    monkeypatch.setattr(sys, "argv", ["sft-course", "fit", "my photos", "--resume"])
    assert _again() == "sft-course fit 'my photos' --resume"
    monkeypatch.setattr(sys, "argv", ["sft-course", "fit", "--", "-odd"])
    assert _again() == "sft-course fit --resume -- -odd"


# ---- evaluate

@pytest.mark.slow
def test_evaluate_takes_the_classes_of_the_artifact(cli, tmp_path):
    "A class that the folder has no training images of is asked about too, and a folder with a test split alone will do."
    if not CASES.is_dir():
        pytest.skip("the cases are not here")
    sys.path.insert(0, str(CASES))
    from mk import put
    put(tmp_path / "abc" / "train", "abc", 10, (64, 64))
    put(tmp_path / "abc" / "test", "abc", 5, (64, 64), start=60)
    put(tmp_path / "ev1" / "train", "ab", 6, (64, 64), start=100)
    for name in ("ev1", "ev2"):
        put(tmp_path / name / "test", "abc", 6, (64, 64), start=200)
    assert cli("fit", "abc", *EASY, "--out", "m", cwd=tmp_path).returncode == 0
    for name in ("ev1", "ev2", "ev1/test"):
        told = one_object(cli("evaluate", "m", name, "--json", cwd=tmp_path))
        assert (told["n"], round(told["accuracy"], 3), told["classes"]) == (18, .889, ["a", "b", "c"]), name


@pytest.mark.slow
def test_a_second_report_takes_the_next_free_name_and_none_of_a_persons(fitted, cli, tmp_path):
    place, _ = fitted
    first, second = (one_object(cli("evaluate", "photos-model", "photos", "--json", cwd=place))["report"] for _ in range(2))
    assert first != second and (place / first).is_file() and (place / second).is_file()
    (tmp_path / "mine.html").write_text("mine")
    done = cli("evaluate", "photos-model", "photos", "--report", tmp_path / "mine.html", cwd=place)
    assert "mine.html: this exists and was not written by sft-course" in refused(done)
    assert (tmp_path / "mine.html").read_text() == "mine"


# ---- predict

def test_predict_goes_through_a_folder_and_names_what_cannot_be_read(fitted, cli, tmp_path):
    place, _ = fitted
    (tmp_path / "text.jpg").write_text("no image")
    done = cli("predict", "photos-model", "photos/waves", tmp_path / "text.jpg", "photos/stripes/00.jpg", tmp_path / "gone.jpg", cwd=place)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 13 and "stripes" in lines[-1] and "photos/stripes/00.jpg" in lines[-1], done.stderr
    said = done.stderr.splitlines()
    assert "text.jpg" in said[0] and "gone.jpg" in said[1] and said[2] == "sft-course: 2 of 15 files could not be read and were skipped"


@pytest.mark.slow
def test_predict_writes_a_table_with_the_most_probable_classes(fitted, cli, tmp_path):
    place, _ = fitted
    done = cli("predict", "photos-model", "photos", "--csv", tmp_path / "out.csv", "--top", "3", cwd=place)
    assert done.returncode == 0 and f"24 predictions in {tmp_path / 'out.csv'}" in done.stdout, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "out.csv", newline="")))
    assert len(rows) == 24 and all(float(r["probability"]) >= float(r["probability_2"]) for r in rows)
    assert {r["label"] for r in rows} == {"stripes", "waves"} and all({r["label"], r["label_2"]} == {"stripes", "waves"} for r in rows)
    (tmp_path / "mine.csv").write_text("my,own")
    assert "mine.csv: this exists and was not written by" in refused(cli("predict", "photos-model", "photos", "--csv", tmp_path / "mine.csv", cwd=place))
    assert (tmp_path / "mine.csv").read_text() == "my,own"


def test_predict_as_json_says_what_was_skipped(fitted, cli, tmp_path):
    place, _ = fitted
    (tmp_path / "text.jpg").write_text("no image")
    told = one_object(cli("predict", "photos-model", "photos/waves/00.jpg", tmp_path / "text.jpg", "--top", "2", "--json", cwd=place), 1)
    assert told["n"] == 1 and [p["path"] for p in told["skipped"]] == [str(tmp_path / "text.jpg")]
    assert [t["label"] for t in told["predictions"][0]["top"]] == ["waves", "stripes"]


def test_predict_in_an_empty_folder(fitted, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(cli("predict", "photos-model", tmp_path / "empty", cwd=fitted[0]))


def test_predictions_are_written_as_they_come(capsys):
    from sft_course.tools.cli import _write_predictions
    seen = []

    def stream():
        for k in range(3):
            yield SimpleNamespace(path=f"{k}.jpg", label="ant", probability=1., probabilities={"ant": 1.}, error=None)
            seen.append(capsys.readouterr().out)
    assert _write_predictions(stream(), None, 1, None) == (3, [])
    assert [f"{k}.jpg" in text for k, text in enumerate(seen)] == [True] * 3


# ---- streams, folders and homes that are gone

@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "A CSV of labelled images."
    place = tmp_path_factory.mktemp("table")
    draw(place / "images")
    rows = [f"{p.relative_to(place)},{p.parent.name}" for p in sorted((place / "images").rglob("*.jpg"))]
    (place / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    return place / "labels.csv"


def shell(line, *args, **more):
    "A line of bash, in which $S is sft-course."
    return subprocess.run(["bash", "-c", f"S='{sys.executable} -m sft_course'; {line}", "bash", *map(str, args)], capture_output=True, text=True, **more)


@pytest.mark.parametrize("streams, status", [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("<&-", 0), ("| head -c 5 > /dev/null; exit ${PIPESTATUS[0]}", 1)])
@pytest.mark.parametrize("json_too", ["", "--json"])
def test_closed_streams_cost_no_traceback(table, streams, status, json_too):
    done = shell(f"$S check $1 {json_too} {streams}", table)
    assert done.returncode in (0, status) and "rror" not in done.stderr and "Traceback" not in done.stderr, done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_a_full_disk_under_standard_output_is_a_sentence(table):
    done = shell("$S check $1 > /dev/full", table)
    assert done.returncode == 1 and "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_deleted_working_directory_is_a_sentence_or_does_not_matter(table, tmp_path):
    for line in ("$S check $1", "$S fit $1", "$S predict gone a.jpg", "$S --version"):
        (tmp_path / "gone").mkdir()
        done = shell(f"cd gone && rmdir ../gone && {line}", table, cwd=tmp_path)
        assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1


def no_home():
    done = subprocess.run(["unshare", "--map-user=12345", "true"], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not shutil.which("unshare") or not no_home(), reason="another user cannot be had here")
def test_without_home_and_without_an_entry_in_passwd(table):
    done = shell("unshare --map-user=12345 env -u HOME -u XDG_CACHE_HOME -u SFT_COURSE_CACHE $S check $1", table)
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or len(done.stderr.splitlines()) == 1


def test_a_settings_file_that_may_not_be_read(table, tmp_path):
    "A folder of that name stands for one without permission, which root would have all the same."
    (tmp_path / "settings.ini").symlink_to("settings.ini")
    done = shell("$S check $1", table, cwd=tmp_path)
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_the_system_refuses_is_told_with_the_file(monkeypatch, capsys):
    from sft_course.tools.cli import _unexpected
    assert _unexpected(PermissionError(13, "Permission denied", "/etc/settings.ini")) == 1
    said = capsys.readouterr().err
    assert "/etc/settings.ini: Permission denied" in said and "unexpected" not in said


# ---- threads

def test_waiting_threads_sleep_unless_somebody_has_said_otherwise(monkeypatch):
    from sft_course.tools.cli import _wait_asleep
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    _wait_asleep()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("KMP_BLOCKTIME")
    _wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "KMP_BLOCKTIME" not in os.environ


@pytest.mark.slow
def test_the_command_asks_for_it_before_torch_is_loaded(tmp_path):
    "libgomp reads the environment when it is loaded, and says what it read where OMP_DISPLAY_ENV asks for it."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_"))} | {"OMP_DISPLAY_ENV": "true"}
    done = subprocess.run([sys.executable, "-m", "sft_course", "backbones", "lite0"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr


@pytest.mark.slow
def test_few_small_images_take_one_thread():
    code = ("import torch; from sft_course.tools.cli import _few_threads; torch.set_num_threads(2); {}; print(torch.get_num_threads())")
    for call, threads in (("_few_threads(60, 64)", "1"), ("_few_threads(60, 192)", "2"), ("_few_threads(5000, 64)", "2")):
        done = subprocess.run([sys.executable, "-c", code.format(call)], capture_output=True, text=True)
        assert done.stdout.strip() == threads, call


# ---- doctor and cache

@pytest.mark.slow
def test_doctor_says_what_a_bug_report_needs(cli):
    told = one_object(cli("doctor", "--json"))
    assert set(told) == {"versions", "settings", "device", "threads", "cache", "weights", "speed"}
    assert told["versions"]["torch"] and told["speed"]["images_per_second"] > 0 and told["weights"].startswith("there")
    assert told["threads"]["torch"] >= 1 and told["cache"]["bytes"] >= 0


def test_doctor_goes_on_where_something_is_broken(cli, tmp_path):
    (tmp_path / "settings.ini").write_text("[course]\nsede = 1\n")
    done = cli("doctor", cwd=tmp_path)
    assert done.returncode == 0 and "did you mean seed?" in done.stdout and re.search(r"versions +torch +\d", done.stdout)


def test_cache_is_shown_and_cleared(cli, stripes, tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert one_object(cli("cache", "--json", env=env))["bytes"] == 0
    assert cli("check", "stripes", cwd=tmp_path, env=env).returncode == 0
    kept = one_object(cli("cache", "--json", env=env))
    assert kept["bytes"] > 0 and [k["files"] > 0 for k in kept["kinds"] if k["bytes"]]
    assert str(tmp_path / "cache") in cli("cache", env=env).stdout
    cleared = one_object(cli("cache", "--clear", "--json", env=env))
    assert cleared["freed"] == kept["bytes"] and cleared["bytes"] == 0
