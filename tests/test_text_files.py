"Tables of texts at the command line: fitted, asked, refused in a sentence, and gone on with after a stop."
import json

import pandas as pd
import pytest

import sft_course.tools.training as training
from sft_course.tools.descriptions import draw_descriptions
from sft_course.tools.sentences import holds_texts
from sft_course.tools.settings import SFTError
from sft_course.tools.text_files import fit_text_file, is_text_model, label_column, predict_texts


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    texts, species = draw_descriptions(6)
    file = tmp_path_factory.mktemp("texts") / "flowers.csv"
    pd.DataFrame({"text": texts, "species": species}).to_csv(file, index=False)
    return file


@pytest.fixture
def command(cli):
    "Exit status, output and errors of `sft-course`."
    def run(*words, cwd):
        done = cli(*words, cwd=cwd, load=("transformers", "transformers.models.bert.modeling_bert", "tokenizers"))
        return done.returncode, done.stdout, done.stderr
    return run


def test_a_table_is_fitted_and_asked_and_a_model_is_not_replaced(command, table, tmp_path):
    status, out, err = command("fit", table, "--out", "model", "--json", cwd=tmp_path)
    assert status == 0, err
    card = json.loads(out)
    assert card["task"] == "text" and card["metrics"]["n_train"] == 36 and len(card["classes"]) == 6
    status, out, err = command("predict", "model", "Five blunt petals.", table, "--json", cwd=tmp_path)
    said = json.loads(out)
    assert status == 0 and said["n"] == 37 and {row["label"] for row in said["predictions"]} <= set(card["classes"])
    status, _, err = command("fit", table, "--out", "model", cwd=tmp_path)
    assert status == 1 and "a model lies there" in err and "Traceback" not in err


@pytest.mark.parametrize("options, said", [(["--image-size", "64"], "--image-size is for images"),
                                           (["--backbone", "resnet18"], "--backbone is for images")])
def test_what_only_images_have_is_refused(command, table, tmp_path, options, said):
    status, _, err = command("fit", table, *options, cwd=tmp_path)
    assert status == 1 and said in err and "Traceback" not in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("header, column", [("text,label", "label"), ("text,mood", "mood"), ("id,text,label", "label"), (" text , mood", "mood")])
def test_the_column_of_labels_is_found(tmp_path, header, column):
    file = tmp_path / "t.csv"
    file.write_text(f"{header}\n")
    assert holds_texts(file) and label_column(file) == column


@pytest.mark.parametrize("header", ["text", "text,a,b"])
def test_where_labels_could_be_anywhere_it_is_asked(tmp_path, header):
    file = tmp_path / "t.csv"
    file.write_text(f"{header}\n")
    with pytest.raises(SFTError, match="which column holds the labels"):
        label_column(file)


def test_a_table_of_images_holds_no_texts(tmp_path):
    (tmp_path / "i.csv").write_text("path,label\na.jpg,ant\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert not holds_texts(tmp_path / "i.csv") and not holds_texts(tmp_path / "broken.jsonl") and not holds_texts(tmp_path)
    with pytest.raises(SFTError, match="no model of texts"):
        predict_texts(tmp_path, ["a"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(table, tmp_path, monkeypatch):
    save = training.save_checkpoint
    how = {"train": 1, "epochs": 2}

    def dies(*args, **kwargs):
        save(*args, **kwargs)
        raise RuntimeError("the power fails")
    monkeypatch.setattr(training, "save_checkpoint", dies)
    with pytest.raises(RuntimeError, match="the power fails"):
        fit_text_file(table, tmp_path / "a", **how)
    assert (tmp_path / "a" / "last.ckpt").exists() and not is_text_model(tmp_path / "a")
    monkeypatch.setattr(training, "save_checkpoint", save)
    for name in "ab":
        fit_text_file(table, tmp_path / name, **how)
    for file in ("model.safetensors", "history.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not (tmp_path / "a" / "last.ckpt").exists()
