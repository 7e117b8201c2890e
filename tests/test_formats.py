"Drawn flowers in every format that the library reads, and raccoons in two: fitted and asked from the command line."

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_flowers
from PIL import Image
from test_tasks import write_images, write_yolo

from sft_course.tools.masks import save_mask

RACCOONS = Path(__file__).parent.parent.parent / "shared" / "data" / "raccoon"
SIZE, N = 64, 20
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255]], np.uint8)


@pytest.fixture(scope="module")
def flowers():
    return draw_flowers(N, SIZE)


def species(i):
    return ("pointed", "round")[i % 2]


def class_folders(top, flowers):
    write_images(top / "all", flowers)
    for i in range(N):
        (top / species(i)).mkdir(exist_ok=True)
        (top / "all" / f"{i}.png").rename(top / species(i) / f"{i}.png")
    (top / "all").rmdir()
    return top


def table(header, row):
    "A CSV beside its images, a line for each flower."

    def write(top, flowers):
        write_images(top / "images", flowers)
        lines = [f"images/{i}.png,{row(i, b)}" for i, b in enumerate(flowers)]
        (top / "table.csv").write_text("\n".join([f"path,{header}", *lines]), encoding="utf-8")
        return top / "table.csv"

    return write


def masks(draw, classes=None):
    "images/ and masks/, where `draw` makes an image of indices."

    def write(top, flowers):
        write_images(top / "images", flowers)
        (top / "masks").mkdir()
        for i, b in enumerate(flowers):
            draw(b.mask, top / "masks" / f"{i}.png")
        if classes:
            (top / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
        return top

    return write


def coco(top, flowers):
    write_images(top / "images", flowers)
    boxes = [(i, *map(float, b)) for i, f in enumerate(flowers) for b in f.boxes]
    said = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(N)],
        "categories": [{"id": 1, "name": "flower"}],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0} for k, (i, x0, y0, x1, y1) in enumerate(boxes)
        ],
    }
    (top / "coco.json").write_text(json.dumps(said), encoding="utf-8")
    return top


def cocos_own(top, flowers):
    "annotations/instances_train2017.json and train2017/, and the same for val."
    coco(top / "whole", flowers)
    said = json.loads((top / "whole" / "coco.json").read_text(encoding="utf-8"))
    (top / "annotations").mkdir()
    for part, rows in (("train", range(15)), ("val", range(15, N))):
        (top / f"{part}2017").mkdir()
        for i in rows:
            (top / "whole" / "images" / f"{i}.png").rename(top / f"{part}2017" / f"{i}.png")
        one = said | {"images": said["images"][rows.start : rows.stop], "annotations": [a for a in said["annotations"] if a["image_id"] in rows]}
        (top / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(one), encoding="utf-8")
    shutil.rmtree(top / "whole")
    return top


def voc(top, flowers):
    write_images(top / "JPEGImages", flowers)
    (top / "Annotations").mkdir()
    for i, b in enumerate(flowers):
        corners = ["".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box)) for box in b.boxes]
        objects = "".join(f"<object><name>flower</name><bndbox>{c}</bndbox></object>" for c in corners)
        (top / "Annotations" / f"{i}.xml").write_text(f"<annotation><filename>{i}.png</filename>{objects}</annotation>", encoding="utf-8")
    return top


def grey(values):
    return lambda mask, file: Image.fromarray(np.array(values, np.uint8)[mask]).save(file)


FORMATS = {  # what writes it, its task, and its names
    "class folders": (class_folders, "class", ["pointed", "round"]),
    "path,label": (table("label", lambda i, b: species(i)), "class", ["pointed", "round"]),
    "columns of 0 and 1": (table("pointed,several", lambda i, b: f"{1 - i % 2},{int(i % 4 > 1)}"), "labels", ["pointed", "several"]),
    "labels in a cell": (table("label", lambda i, b: ";".join([species(i), ("few", "many")[i % 4 > 1]])), "labels", ["few", "many", "pointed", "round"]),
    "a number": (table("share", lambda i, b: f"{(b.mask > 0).mean():.4f}"), "number", ["share"]),
    "masks of indices": (masks(grey([0, 1, 2])), "masks", ["0", "1", "2"]),
    "masks of 0 and 255": (masks(grey([0, 255, 255])), "masks", ["0", "255"]),
    "masks with a palette": (masks(lambda mask, file: save_mask(file, mask)), "masks", ["0", "1", "2"]),
    "masks in colours": (masks(lambda mask, file: Image.fromarray(COLOURS[mask]).save(file)), "masks", ["#000000", "#0080ff", "#ff0000"]),
    "masks in listed colours": (
        masks(lambda mask, file: Image.fromarray(COLOURS[mask]).save(file), {"ground": "#000000", "petal": [255, 0, 0], "centre": "#0080ff"}),
        "masks",
        ["ground", "petal", "centre"],
    ),
    "coco.json": (coco, "boxes", ["flower"]),
    "COCO's own folders": (cocos_own, "boxes", ["flower"]),
    "Pascal VOC": (voc, "boxes", ["flower"]),
    "YOLO": (write_yolo, "boxes", ["flower"]),
}


def ended(done):
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_fitted_and_the_artifact_answers(name, cli, tmp_path, flowers):
    write, task, names = FORMATS[name]
    data = write(tmp_path / "data", flowers)
    done = ended(cli("fit", data, "--image-size", SIZE, "--epochs", 1, "--out", "model", cwd=tmp_path))
    assert (f"taken for task {task}" in done.stdout + done.stderr) == (task != "class")
    model = tmp_path / "model"
    assert {"model.safetensors", "card.json", "history.csv", "report.html"} <= {f.name for f in model.iterdir()}
    card = json.loads((model / "card.json").read_text(encoding="utf-8"))
    assert card.get("task", "class") == task and card["classes" if task == "class" else "names"] == names
    report = (model / "report.html").read_text(encoding="utf-8")
    assert report.startswith("<!doctype html>") and all(n in report for n in names)
    assert task == "class" or report.count("data:image/") >= 3  # with classes, only mistakes are shown
    image = next((tmp_path / "data").rglob("3.png"))
    said = json.loads(ended(cli("predict", "model", image, "--json", cwd=tmp_path)).stdout.splitlines()[-1])
    assert said["n"] == 1 and not said["skipped"]
    written = {f.name for f in model.rglob("predictions/*")}
    assert written == {"masks": {"3.png", "3-seen.png"}, "boxes": {"3-boxes.png", "predictions.coco.json"}}.get(task, set())
    ended(cli("evaluate", "model", data, cwd=tmp_path))


@pytest.mark.long
def test_raccoons_are_fitted_as_coco_and_as_voc(cli, tmp_path):
    if not RACCOONS.is_dir():
        pytest.skip("the photographs are not here")
    cards = []
    for kept, gone in (("coco.json", "voc"), ("voc", "coco.json")):
        data, model = tmp_path / kept.partition(".")[0], tmp_path / f"of-{kept[:3]}"
        shutil.copytree(RACCOONS, data, ignore=shutil.ignore_patterns(gone))
        ended(cli("fit", data, "--image-size", 96, "--epochs", 2, "--out", model, cwd=tmp_path, timeout=600))
        cards.append(json.loads((model / "card.json").read_text(encoding="utf-8")))
        assert (model / "report.html").read_text(encoding="utf-8").count("data:image/") >= 3
        ended(cli("predict", model, data / "test" / "images", "--csv", tmp_path / f"{kept[:3]}.csv", cwd=tmp_path))
        assert len(list((model / "predictions").glob("*-boxes.png"))) == cards[-1]["metrics"]["n_test"]
    coco, voc = (c["metrics"] for c in cards)
    assert [coco[n] for n in ("n_train", "n_val", "n_test")] == [voc[n] for n in ("n_train", "n_val", "n_test")]
    assert cards[0]["names"] == cards[1]["names"] == ["raccoon"]
    # the XML files hold whole pixels, so the boxes differ by less than one
    assert abs(coco["scores"]["AP50"][0] - voc["scores"]["AP50"][0]) < 0.2 and min(m["scores"]["AP50"][0] for m in (coco, voc)) > 0
