"Labels, numbers, masks and boxes: what data are taken for, fitted, killed and gone on with, saved, asked and judged."

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import typer
from conftest import draw_flowers
from PIL import Image
from typer.testing import CliRunner

from sft_course.tools import shipping_commands
from sft_course.tools.artifact import load_artifact
from sft_course.tools.masks import save_mask
from sft_course.tools.model_card import HubStandIn, push_to_hub
from sft_course.tools.serving import open_predictor
from sft_course.tools.settings import SFTError
from sft_course.tools.task_command import evaluate_task, fit_task, predict_task
from sft_course.tools.task_folders import divided, read_task
from sft_course.tools.task_kinds import task_at, task_for
from sft_course.tools.task_run import fine_tune_task, open_task

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SIZE, N = 64, 16
TASKS = ["labels", "number", "masks", "boxes"]
HOW = {
    "labels": {"image_size": 64, "epochs": 2},
    "number": {"image_size": 64, "epochs": 2},
    "masks": {"epochs": 2},
    "boxes": {"image_size": 64, "epochs": 2},
}

app = typer.Typer()


def ended(work):
    "What the command line makes of an error: a sentence and exit status 1."
    try:
        return work()
    except SFTError as error:
        print(f"sft-course: {error}")
        raise typer.Exit(1) from None


@app.command()
def fit(data: Path, out: Path, task: Annotated[str | None, typer.Option()] = None, epochs: int | None = None, image_size: int | None = None):
    ended(lambda: fit_task(data, out, task_for(data, task, print), epochs=epochs, image_size=image_size))


@app.command()
def predict(artifact: Path, files: list[Path]):
    ended(lambda: predict_task(artifact, files, say=print))


@app.command()
def evaluate(artifact: Path, data: Path, report: Path):
    ended(lambda: evaluate_task(artifact, data, report))


def call(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def flowers():
    return draw_flowers(N, SIZE)


def write_images(folder, flowers):
    folder.mkdir(parents=True, exist_ok=True)
    for i, b in enumerate(flowers):
        Image.fromarray(b.image).save(folder / f"{i}.png")


def annotations(flowers):
    return [(i, [float(v) for v in box]) for i, b in enumerate(flowers) for box in b.boxes]


def write_labels(top, flowers, style="flags"):
    write_images(top, flowers)
    pointed = [i % 2 == 0 for i in range(len(flowers))]
    three = [b.image.mean() > np.median([f.image.mean() for f in flowers]) for b in flowers]
    rows = []
    for i, row in enumerate(zip(pointed, three)):
        names = [n for n, there in zip(("pointed", "bright"), row) if there]
        rows.append(f"{i}.png,{','.join(str(int(v)) for v in row)}" if style == "flags" else f"{i}.png,{style.join(names)}")
    header = "path,pointed,bright" if style == "flags" else "path,label"
    (top / "t.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return top / "t.csv"


def write_numbers(top, flowers):
    write_images(top, flowers)
    rows = [f"{i}.png,{float(b.mask.astype(bool).mean()):.4f}" for i, b in enumerate(flowers)]
    (top / "n.csv").write_text("\n".join(["path,share", *rows]), encoding="utf-8")
    return top / "n.csv"


def write_masks(top, flowers):
    write_images(top / "images", flowers)
    (top / "masks").mkdir()
    for i, b in enumerate(flowers):
        save_mask(top / "masks" / f"{i}.png", b.mask)
    return top


def write_coco(top, flowers):
    write_images(top / "images", flowers)
    notes = [
        {"id": k, "image_id": i, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]} for k, (i, (x0, y0, x1, y1)) in enumerate(annotations(flowers))
    ]
    said = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(len(flowers))],
        "categories": [{"id": 1, "name": "flower"}],
        "annotations": notes,
    }
    (top / "coco.json").write_text(json.dumps(said), encoding="utf-8")
    return top


def write_voc(top, flowers):
    write_images(top / "images", flowers)
    (top / "voc").mkdir()
    for i in range(len(flowers)):
        objects = "".join(
            "<object><name>flower</name><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
            + "</bndbox></object>"
            for k, box in annotations(flowers)
            if k == i
        )
        (top / "voc" / f"{i}.xml").write_text(f"<annotation><filename>{i}.png</filename>{objects}</annotation>", encoding="utf-8")
    return top


def write_yolo(top, flowers):
    write_images(top / "images", flowers)
    (top / "labels").mkdir()
    (top / "data.yaml").write_text("names: [flower]\n", encoding="utf-8")
    for i in range(len(flowers)):
        lines = [
            f"0 {(x0 + x1) / 2 / SIZE} {(y0 + y1) / 2 / SIZE} {(x1 - x0) / SIZE} {(y1 - y0) / SIZE}"
            for k, (x0, y0, x1, y1) in annotations(flowers)
            if k == i
        ]
        (top / "labels" / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
    return top


WRITE = {"labels": write_labels, "number": write_numbers, "masks": write_masks, "boxes": write_coco}


@pytest.fixture(scope="module")
def data(tmp_path_factory, flowers):
    "Blooms as each task wants them."
    return {task: WRITE[task](tmp_path_factory.mktemp(task), flowers) for task in TASKS}


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    "An artifact of each task, made when it is first asked for."
    made, top = {}, tmp_path_factory.mktemp("fitted")

    def get(task):
        if task not in made:
            os.environ["XDG_CACHE_HOME"] = str(top / "cache")
            fine_tune_task(data[task], out=top / task, **HOW[task])
            made[task] = top / task
        return made[task]

    return get


@pytest.mark.parametrize(
    "write, task",
    [
        (write_labels, "labels"),
        (lambda t, f: write_labels(t, f, ";"), "labels"),
        (lambda t, f: write_labels(t, f, "|"), "labels"),
        (write_masks, "masks"),
        (write_coco, "boxes"),
        (write_voc, "boxes"),
        (write_yolo, "boxes"),
    ],
    ids=["flags", "semicolons", "bars", "masks", "coco", "voc", "yolo"],
)
def test_data_say_what_they_are_for(write, task, tmp_path, flowers):
    path = write(tmp_path / "data", flowers)
    said = []
    assert task_for(path, None, said.append) == task
    assert len(said) == 1 and "taken for" in said[0]
    assert len(read_task(path, task, tmp_path / "cache", 64)) == N


@pytest.mark.parametrize(
    "values, task",
    [([str(i) for i in range(30)], "number"), ([str(i % 3) for i in range(30)], "class"), (["ant", "bee"] * 15, "class")],
    ids=["many", "few", "words"],
)
def test_a_column_called_label(values, task, tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *(f"{i}.jpg,{v}" for i, v in enumerate(values))]), encoding="utf-8")
    said = []
    assert task_for(tmp_path / "t.csv", None, said.append) == task
    assert (len(said) == 1) == values[0].isdecimal()
    assert task_for(tmp_path / "t.csv", "regression", said.append) == "number"


def test_class_folders_stay_class_folders(stripes):
    assert task_at(stripes) == ("class", "a folder a class")
    with pytest.raises(SFTError, match="taken for one class an image"):
        fine_tune_task(stripes)


def test_three_formats_hold_the_same_boxes(tmp_path, flowers):
    found = [read_task(write(tmp_path / str(i), flowers), "boxes", tmp_path) for i, write in enumerate((write_coco, write_voc, write_yolo))]
    for other in found[1:]:
        assert other.names == found[0].names and (other.part == found[0].part).mean() == 1
        where = {f: i for i, f in enumerate(other.files)}
        for i, f in enumerate(found[0].files):
            torch.testing.assert_close(other.targets.boxes[where[f]], found[0].targets.boxes[i], atol=1e-3, rtol=1e-3)


LAYOUTS_OF_COCO = {
    "cocos own": ("annotations/instances_{}2017.json", "{}2017"),
    "cocos own, images together": ("annotations/instances_{}2017.json", "images/{}2017"),
    "by part": ("annotations/instances_{}.json", "{}"),
    "one folder of images": ("annotations/instances_{}.json", "images"),
    "short names": ("annotations/{}.json", "images/{}"),
    "files beside the folders": ("{}.json", "{}"),
    "in the folders": ("{}/_annotations.coco.json", "{}"),
    "data and labels": ("{}/labels.json", "{}/data"),
}


def coco_in_parts(top, flowers, file, images, change=lambda said, part: None, **names):
    "COCO files for 10, 2 and 4 images, and their images, in files and folders called so."
    whole = write_coco(top / "whole", flowers)
    said = json.loads((whole / "coco.json").read_text(encoding="utf-8"))
    for part, rows in (("train", range(10)), ("val", range(10, 12)), ("test", range(12, N))):
        one = {
            "images": [i for i in said["images"] if i["id"] in rows],
            "categories": said["categories"],
            "annotations": [a for a in said["annotations"] if a["image_id"] in rows],
        }
        change(one, part)
        at, folder = (top / "data" / text.format(names.get(part, part)) for text in (file, images))
        at.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        at.write_text(json.dumps(one), encoding="utf-8")
        for i in rows:
            shutil.copy(whole / "images" / f"{i}.png", folder)
    return top / "data"


@pytest.mark.parametrize("name", LAYOUTS_OF_COCO)
def test_coco_is_read_where_it_usually_lies(name, tmp_path, flowers):
    top = coco_in_parts(tmp_path, flowers, *LAYOUTS_OF_COCO[name], **({"val": "valid"} if name == "in the folders" else {}))
    (top / "annotations").mkdir(exist_ok=True)
    (top / "annotations" / "captions_val2017.json").write_text('{"annotations": [], "images": []}', encoding="utf-8")
    assert task_at(top)[0] == "boxes"
    data, whole = read_task(top, "boxes", tmp_path), read_task(tmp_path / "whole", "boxes", tmp_path, whole=True)
    assert [len(data.rows(p)) for p in ("train", "val", "test")] == [10, 2, 4] and not data.problems
    where = {Path(f).name: i for i, f in enumerate(whole.files)}
    for i, f in enumerate(data.files):
        assert (top / f).is_file() and (data.images[i] == whole.images[where[Path(f).name]]).all()
        assert torch.equal(data.targets.boxes[i], whole.targets.boxes[where[Path(f).name]])


def test_a_group_of_categories_is_no_class(tmp_path, flowers):
    def grouped(said, part):
        said["categories"] = [{"id": 0, "name": "plants", "supercategory": "none"}, {"id": 1, "name": "flower", "supercategory": "plants"}]

    data = read_task(coco_in_parts(tmp_path, flowers, "{}/_annotations.coco.json", "{}", grouped), "boxes", tmp_path)
    assert data.names == ("flower",) and {p.kind for p in data.problems} == {"group"}
    assert data.problems[1].message == "train/_annotations.coco.json: category 'plants' is a group of others, and no box has it; it is no class."


def test_crowds_are_left_out_and_counted(tmp_path, flowers):
    def crowded(said, part):
        for a in said["annotations"]:
            a["iscrowd"] = int(a["image_id"] in (3, 5) or a["id"] == 1)  # image 1 has another box

    data = read_task(coco_in_parts(tmp_path, flowers, "annotations/instances_{}.json", "{}", crowded), "boxes", tmp_path)
    counts = [sum(a in (3, 5) for a, _ in annotations(flowers)) + 1]
    assert len(data) == N - 2 and len(data.targets.boxes[data.files.index("train/1.png")]) == 1
    said = f"instances_train.json: annotations of crowds (iscrowd) are left out: {counts[0]}, in 3 images, 2 of which show nothing else and are left out too."
    assert [p.message for p in data.problems] == [said]


def test_images_of_coco_that_are_missing(tmp_path, flowers):
    top = coco_in_parts(tmp_path, flowers, "annotations/instances_{}2017.json", "{}2017")
    (top / "train2017" / "3.png").unlink()
    data = read_task(top, "boxes", tmp_path)
    assert len(data) == N - 1 and "instances_train2017.json, image 3: image train2017/3.png is missing" in data.problems[0].message
    shutil.rmtree(top / "val2017")
    with pytest.raises(SFTError, match="instances_val2017.json: none of its 2 images can be used; the first, val2017/10.png, is missing"):
        read_task(top, "boxes", tmp_path)
    many = write_coco(tmp_path / "many", flowers)
    for i in range(11):
        (many / "images" / f"{i}.png").unlink()
    found = read_task(many, "boxes", tmp_path, whole=True)
    assert [p.message for p in found.problems] == [
        "coco.json: 11 of its 16 images cannot be used; the first, images/0.png, is missing. They are left out."]


@pytest.mark.parametrize("file, said", [("instances_train2014", "is for train, as instances_train2014.json is"),
                                        ("instances_mini", "its name says neither train, val nor test")])
def test_coco_files_whose_parts_are_unclear(file, said, tmp_path, flowers):
    top = coco_in_parts(tmp_path, flowers, "annotations/instances_{}2017.json", "{}2017")
    shutil.copy(top / "annotations" / "instances_val2017.json", top / "annotations" / f"{file}.json")
    with pytest.raises(SFTError, match=said):
        task_at(top)


def test_masks_in_colours_and_greys_are_one(tmp_path, flowers):
    first = write_masks(tmp_path / "a", flowers[:6])
    again = write_masks(tmp_path / "b", flowers[:6])
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255]], np.uint8)
    for file in (again / "masks").iterdir():
        Image.fromarray(colours[np.asarray(Image.open(file))]).save(file)
    (again / "classes.json").write_text(json.dumps({"background": "#000000", "petal": [255, 0, 0], "centre": "#0080ff"}), encoding="utf-8")
    a, b = (read_task(top, "masks", tmp_path) for top in (first, again))
    assert (a.targets == b.targets).all() and b.names == ("background", "petal", "centre") and a.native and b.native


def by_parts(top, flowers, images, masks):
    "Masks whose parts are folders within the two of a layout: 10 train, 2 val, 4 test."
    for i, b in enumerate(flowers):
        part = "train" if i < 10 else "val" if i < 12 else "test"
        for folder in (images, masks):
            (top / folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(b.image).save(top / images / part / f"{i:02d}.png")
        save_mask(top / masks / part / f"{i:02d}.png", b.mask)
    return top


@pytest.mark.parametrize("names", [("images", "masks"), ("JPEGImages", "SegmentationClass")], ids=["plain", "voc"])
def test_parts_may_lie_within_images_and_masks(names, tmp_path, flowers):
    top = by_parts(tmp_path / "data", flowers, *names)
    (top / names[0] / "train" / ".hidden.png").write_bytes(b"")
    assert task_at(top) == ("masks", f"folders {names[0]} and {names[1]}")
    data = read_task(top, "masks", tmp_path)
    assert [len(data.rows(p)) for p in ("train", "val", "test")] == [10, 2, 4] and not data.problems
    assert data.files[0] == f"{names[0]}/test/12.png" and (data.targets[0] == flowers[12].mask).all()


def test_pascal_vocs_lists_say_the_parts(tmp_path, flowers):
    for kind, write in (("Segmentation", write_masks), ("Main", write_voc)):
        top = write(tmp_path / kind, flowers)
        (top / "images").rename(top / "JPEGImages")
        if kind == "Segmentation":
            (top / "masks").rename(top / "SegmentationClass")
        (top / "ImageSets" / kind).mkdir(parents=True)
        (top / "ImageSets" / kind / "train.txt").write_text("\n".join(map(str, range(9))), encoding="utf-8")
        (top / "ImageSets" / kind / "val.txt").write_text("9\n10\n", encoding="utf-8")
        (top / "ImageSets" / kind / "test.txt").write_text("\n".join(map(str, range(11, N))), encoding="utf-8")
        data = read_task(top, task_at(top)[0], tmp_path)
        assert [len(data.rows(p)) for p in ("train", "val", "test")] == [9, 2, N - 11]
        assert {Path(data.files[i]).stem for i in data.rows("val")} == {"9", "10"}


def test_a_photograph_that_its_exif_turns_keeps_its_mask_and_boxes(tmp_path, flowers):
    exif = Image.Exif()
    exif[0x0112] = 8
    half = flowers[0].image[: SIZE // 2], flowers[0].mask[: SIZE // 2]
    shown = [np.rot90(a) for a in half]
    plain, turned = (write_masks(tmp_path / n, flowers[:2]) for n in "ab")
    for top in (plain, turned):
        (top / "masks" / "1.png").unlink()
    Image.fromarray(shown[0]).save(plain / "images" / "0.png")
    Image.fromarray(half[0]).save(turned / "images" / "0.png", exif=exif)
    found = []
    for top, mask in ((plain, shown[1]), (turned, shown[1]), (turned, half[1])):
        save_mask(top / "masks" / "0.png", mask)
        found.append(read_task(top, "masks", tmp_path, whole=True))
    for other in found[1:]:
        assert (other.images == found[0].images).all() and (other.targets == found[0].targets).all()
        assert [p.kind for p in other.problems] == ["no mask"]


def test_parts_are_drawn_once_and_for_all():
    part = divided(np.array(["train"] * 20), 1)
    assert (part == divided(np.array(["train"] * 20), 1)).all() and (part == "test").sum() == 4 and (part == "val").sum() == 3
    assert set(divided(np.array(["train"] * 10 + ["val"] * 3))) == {"train", "val", "test"}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_with_an_artifact_that_answers_as_the_network(task, fitted, data):
    out = fitted(task)
    assert {p.name for p in out.iterdir()} - {".lock"} == {"model.safetensors", "card.json", "history.csv", "report.html"}
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert card["task"] == task and {p["phase"] for p in card["phases"]} == {"frozen", "tuned"}
    for value, low, high in card["metrics"]["scores"].values():
        assert np.isnan(value) or low <= value + 1e-6 and value <= high + 1e-6
    report = (out / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/jpeg") >= 3 and "95 % interval" in report and "<title>Report: " in report
    rows = list(csv.DictReader(open(out / "history.csv", encoding="utf-8")))
    assert {r["phase"] for r in rows} == {"frozen", "tuned"}


def image_of(data, task, number=3):
    top = data[task] if data[task].is_dir() else data[task].parent
    return next(p for p in (top / "images" / f"{number}.png", top / f"{number}.png") if p.is_file())


def test_labels_come_with_probabilities(fitted, data):
    said = open_task(fitted("labels")).predict(image_of(data, "labels"))
    assert set(said.probabilities) == {"pointed", "bright"} and set(said.labels) <= set(said.probabilities)
    assert all(0 <= p <= 1 for p in said.probabilities.values())


def test_a_number_comes_with_an_interval_where_validation_images_are_enough(tmp_path, flowers):
    rows = [f"{i % N}.png,{i}" for i in range(N)]
    write_images(tmp_path, flowers)
    parts = ["val"] * 9 + ["train"] * 5 + ["test"] * 2
    (tmp_path / "n.csv").write_text("\n".join(["path,share,split", *(f"{r},{p}" for r, p in zip(rows, parts))]), encoding="utf-8")
    result = fine_tune_task(tmp_path / "n.csv", "number", image_size=64, train="head")
    value, low, high = result.predict(flowers[0].image).numbers["share"]
    assert low < value < high and result.card["interval"]


def test_few_validation_images_give_no_interval(fitted, data):
    result = open_task(fitted("number"))
    assert result.card["interval"] is None and any("too few for an interval" in note for note in result.card["notes"])
    assert result.predict(image_of(data, "number")).numbers["share"][1] is None


def test_a_mask_is_as_large_as_its_image(fitted, data, tmp_path):
    result = open_task(fitted("masks"))
    for w, h in ((SIZE, SIZE), (70, 50), (33, 95)):
        image = Image.open(image_of(data, "masks")).resize((w, h))
        assert result.predict(image).mask.shape == (h, w)
    status, out = call("predict", fitted("masks"), image_of(data, "masks"), image_of(data, "masks"))
    folder = Path(re.search(r"written to (.+)", out.replace("\n", "\n"))[1].strip())
    assert status == 0 and {f.name for f in folder.iterdir()} == {"3.png", "3-seen.png", "3-2.png", "3-2-seen.png"}
    assert (np.asarray(Image.open(folder / "3.png")) == result.predict(image_of(data, "masks")).mask).all()


def test_boxes_are_in_the_pixels_of_their_image_and_in_one_file(fitted, data, tmp_path):
    result = open_task(fitted("boxes"))
    small = Image.open(image_of(data, "boxes"))
    result.card["score"] = 0.0
    a = result.predict(small).found
    b = result.predict(small.resize((2 * SIZE, SIZE), Image.Resampling.NEAREST)).found
    assert len(a.boxes) and b.boxes[:, [0, 2]].max() > SIZE * 1.2
    assert a.boxes.max() <= SIZE + 1e-3
    said = predict_task(fitted("boxes"), [image_of(data, "boxes")], out=tmp_path / "said", quiet=True)
    coco = json.loads((tmp_path / "said" / "predictions.coco.json").read_text(encoding="utf-8"))
    assert coco["categories"] == [{"id": 1, "name": "flower"}] and len(coco["images"]) == said["n"] == 1
    assert (tmp_path / "said" / "3-boxes.png").is_file()


@pytest.mark.parametrize("task", ["masks", "boxes"])
def test_a_large_photograph_is_answered_in_its_own_pixels_as_it_is_shown(task, fitted, data, tmp_path):
    "A JPEG may be decoded at a fraction of its size; boxes and masks may not."
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image_of(data, task)).convert("RGB").resize((640, 320)).save(tmp_path / "a.jpg", exif=exif)
    result = open_task(fitted(task))
    result.card["score"] = 0.0
    said = result.predict(tmp_path / "a.jpg")
    where = said.mask.shape if task == "masks" else said.found.boxes[:, 2:].max(0)[::-1] + 1
    assert tuple(np.array(where) > (321, 161)) == (True, True) and where[0] <= 641 and where[1] <= 321
    predict_task(fitted(task), [tmp_path / "a.jpg"], out=tmp_path / "said", quiet=True)
    assert {Image.open(f).size for f in (tmp_path / "said").glob("*.png")} == {(320, 640)}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_model_card_and_what_is_for_classes_says_so(task, fitted, tmp_path):
    out = tmp_path / "artifact"
    shutil.copytree(fitted(task), out)
    shipping_commands.card(out, "to try", "drawn", "mit")
    text = (out / "README.md").read_text(encoding="utf-8")
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert all(f"| {name} |" in text for name in card["metrics"]["scores"]) and "license: mit" in text
    for work in (lambda: shipping_commands.export(out), lambda: open_predictor(out), lambda: load_artifact(out)):
        with pytest.raises(SFTError, match=f"a model for task {task}, and this is for models of one class"):
            work()


def test_a_model_of_another_task_is_uploaded(fitted, tmp_path):
    out = tmp_path / "artifact"
    shutil.copytree(fitted("labels"), out)
    with pytest.raises(SFTError, match="there is no README.md"):
        push_to_hub(out, "me/labels")
    shipping_commands.card(out)
    with HubStandIn() as hub:
        push_to_hub(out, "me/labels", token="x", endpoint=hub.url)
    assert {"README.md", "card.json", "model.safetensors"} <= set(hub.files) and "report.html" not in hub.files


@pytest.mark.parametrize("task", TASKS)
def test_an_artifact_is_judged_on_other_data(task, fitted, data, tmp_path):
    status, out = call("evaluate", fitted(task), data[task], tmp_path / "report.html")
    assert status == 0 and f"{N} images" in out and "95 % interval" in out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_file_that_is_no_image_is_named_and_the_others_are_answered(fitted, data, tmp_path):
    (tmp_path / "no.png").write_text("no", encoding="utf-8")
    told = []
    said = predict_task(fitted("labels"), [tmp_path / "no.png", image_of(data, "labels"), tmp_path / "none.png"], say=told.append)
    assert said["n"] == 1 and len(said["skipped"]) == 2 and "cannot be read as an image" in told[0] and "no such file" in told[1]


KILLED = """
import os, sys
import sft_course.tools.training as training
from sft_course.tools.task_run import fine_tune_task
save, at = training.save_checkpoint, int(sys.argv[3])
def counted(*args, **how):
    global at
    save(*args, **how)
    at -= 1
    if at == 0: os.kill(os.getpid(), 9)
training.save_checkpoint = counted
fine_tune_task(sys.argv[1], out=sys.argv[2], image_size=None if sys.argv[4] == "None" else int(sys.argv[4]), epochs=2)
"""


LATER = pytest.mark.long  # the other two go the same way through the same code


@pytest.mark.slow
@pytest.mark.parametrize("task, saves", [pytest.param("labels", 1, marks=LATER), ("number", 2), ("masks", 3),
                                         pytest.param("boxes", 3, marks=LATER)], ids=TASKS)
def test_a_killed_run_goes_on_to_the_same_bytes(task, saves, fitted, data, tmp_path):
    whole, out = fitted(task), tmp_path / "out"
    how = HOW[task]
    words = [sys.executable, "-c", KILLED, str(data[task]), str(out), str(saves), str(how.get("image_size"))]
    threads = str(torch.get_num_threads())
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
    assert done.returncode == -9, done.stderr
    assert (out / "last.ckpt").is_file() and not (out / "card.json").exists()
    with pytest.raises(SFTError, match="unfinished run"):
        fine_tune_task(data[task], out=out, **how)
    with pytest.raises(SFTError, match="that run had other lr"):
        fine_tune_task(data[task], out=out, resume=True, lr=.5, **how)
    fine_tune_task(data[task], out=out, resume=True, **how)
    for name in ("model.safetensors", "history.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (json.loads((f / "card.json").read_text(encoding="utf-8")) for f in (out, whole))
    assert {**a, "seconds": 0} == {**b, "seconds": 0} or json.dumps({**a, "seconds": 0}) == json.dumps({**b, "seconds": 0})
    assert not (out / "last.ckpt").exists()


def test_a_damaged_artifact_costs_one_sentence(fitted, tmp_path):
    import shutil

    shutil.copytree(fitted("labels"), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SFTError, match="is not the file that card.json speaks of"):
        open_task(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(SFTError, match="damaged"):
        open_task(tmp_path / "a")


@pytest.mark.parametrize(
    "how, said",
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"lr": -1.0}, "lr = -1"),
        ({"train": "3"}, "use 'head' or 'all'"),
        ({"image_size": 50}, "need a multiple of 32"),
    ],
    ids=["epochs", "lr", "train", "size"],
)
def test_values_that_cannot_be_used(how, said, data, tmp_path):
    with pytest.raises(SFTError, match=said):
        fine_tune_task(data["masks"], out=tmp_path / "out", **how)
    assert not (tmp_path / "out" / "card.json").exists()


def test_classes_that_the_model_does_not_know(fitted, tmp_path, flowers):
    other = write_masks(tmp_path / "m", flowers[:5])
    (other / "classes.json").write_text(json.dumps({"sky": 0, "1": 1, "2": 2}), encoding="utf-8")
    with pytest.raises(SFTError, match="masks hold the class 'sky'"):
        open_task(fitted("masks")).evaluate(other, tmp_path)


def test_membrane_and_raccoon_are_known(tmp_path):
    if not (SHARED / "membrane").is_dir():
        pytest.skip("the photographs are not here")
    assert task_at(SHARED / "membrane")[0] == "masks" and task_at(SHARED / "raccoon")[0] == "boxes"
    assert task_at(SHARED / "ants_bees")[0] == "class"
    found = read_task(SHARED / "membrane", "masks", tmp_path)
    assert found.native and found.images.shape == (30, 512, 512, 3) and found.names == ("0", "255")
    assert [len(found.rows(p)) for p in ("train", "val", "test")] == [16, 4, 10]
