"Broken targets, one way each: a sentence that names file and value, exit status 1, no traceback, nothing touched."

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from sft_course.tools.settings import SFTError
from sft_course.tools.task_command import check_task
from sft_course.tools.task_kinds import task_for

app = typer.Typer()


@app.command()
def check(data: Path, task: Annotated[str | None, typer.Option()] = None):
    try:
        check_task(data, task_for(data, task, print), strict=True)
    except SFTError as error:
        print(f"sft-course: {error}")
        raise typer.Exit(1) from None


def images(folder, n=8, size=32):
    "n different images: 0.png, 1.png …"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def table(top, header, rows, name="t.csv"):
    images(top)
    (top / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return top / name


SIZES = [f"{i}.png,{i + 0.5}" for i in range(8)]
FLAGS = [f"{i}.png,{i % 2},{i // 4}" for i in range(8)]
CELLS = ["a;b", "b;c", "c", "a", "a;c", "b", "a;b", "c"]


def numbers(**changed):
    "A table of one number, with some lines changed: {line: cells}."
    rows = [changed.get(f"row{i}", row) for i, row in enumerate(SIZES)]
    return lambda top: table(top, changed.get("header", "path,size"), rows)


def flags(**changed):
    rows = [changed.get(f"row{i}", row) for i, row in enumerate(FLAGS)]
    return lambda top: table(top, changed.get("header", "path,red,round"), rows)


def after(make, change):
    "What `make` writes, and then a change to the folder."

    def build(top):
        path = make(top)
        change(top)
        return path

    return build


def copy(a, b):
    return lambda top: (top / b).write_bytes((top / a).read_bytes())


def turned(name):
    "An image that viewers turn by half."

    def change(top):
        exif = Image.Exif()
        exif[0x0112] = 3
        with Image.open(top / name) as image:
            image.load()
        image.save(top / name, exif=exif)

    return change


def text(name, content):
    def change(top):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(content, encoding="utf-8")

    return change


def bytes_at(name, content):
    return lambda top: (top / name).write_bytes(content)


def gone(name):
    return lambda top: (top / name).unlink()


def blank(name):
    return lambda top: Image.new("RGB", (32, 32), "red").save(top / name)


SPLIT = [f"{i}.png,{i + 0.5},{'test' if i > 5 else 'train'}" for i in range(8)]

TABLES = {
    "a number in words": (numbers(row3="3.png,wide"), "number", r"t.csv, line 5: size: 'wide' is not a number"),
    "a number with a comma": (numbers(row3='3.png,"1,5"'), "number", r"line 5: size: '1,5' is not a number"),
    "not a number at all": (numbers(row2="2.png,nan"), "number", r"line 4: size: 'nan' is no finite number"),
    "an endless number": (numbers(row2="2.png,inf"), "number", r"line 4: size: 'inf' is no finite number"),
    "a number beyond bounds": (numbers(row2="2.png,1e40"), "number", r"line 4: size: '1e40' is no finite number"),
    "an empty number": (numbers(row7="7.png,"), "number", r"line 9: size: the cell is empty"),
    "the same number everywhere": (lambda top: table(top, "path,size", [f"{i}.png,4" for i in range(8)]), "number", "all images have the same size"),
    "a number far from the others": (numbers(row2="2.png,99999"), "number", "2.png: size 99999 is far from the others"),
    "a flag of two": (flags(row1="1.png,2,0"), "labels", r"t.csv, line 3: red: '2' is neither 0 nor 1"),
    "an empty flag": (flags(row1="1.png,,0"), "labels", "line 3: red: the cell is empty"),
    "a flag in words": (flags(row1="1.png,maybe,0"), "labels", "'maybe' is neither 0 nor 1"),
    "a label that nobody has": (
        lambda top: table(top, "path,red,round", [f"{i}.png,0,{i % 2}" for i in range(8)]),
        "labels",
        "no image has the label 'red'",
    ),
    "a label that all have": (
        lambda top: table(top, "path,red,round", [f"{i}.png,1,{i % 2}" for i in range(8)]),
        "labels",
        "every image has the label 'red'",
    ),
    "a rare label": (
        lambda top: table(top, "path,red,round", [f"{i}.png,{int(i < 2)},{i % 2}" for i in range(8)]),
        "labels",
        "label red: . of . images to train on have it",
    ),
    "a label only in test": (
        lambda top: table(top, "path,red,round,split", [f"{i}.png,{int(i > 6)},{i % 2},{'test' if i > 5 else 'train'}" for i in range(8)]),
        "labels",
        "label red: 1 test images have it, and none to train on",
    ),
    "cells without labels": (lambda top: table(top, "path,tags", [f"{i}.png,;" for i in range(8)]), "labels", "no line names a label in tags"),
    "one cell everywhere": (lambda top: table(top, "path,tags", [f"{i}.png,a;b" for i in range(8)]), None, "every image has the label 'a'"),
    "an image twice": (numbers(row4="3.png,9"), "number", "line 6: 3.png stands there a second time"),
    "an image twice among labels": (
        lambda top: table(top, "path,tags", [f"{max(i, 1)}.png,{c}" for i, c in enumerate(CELLS)]),
        None,
        "line 3: 1.png stands there a second time",
    ),
    "an image that is missing": (after(numbers(), gone("5.png")), "number", "line 7: 5.png is in the CSV and not on the disk"),
    "an image of another folder": (numbers(row0="../0.png,1"), "number", r"line 2: ../0.png leads out of the folder"),
    "an absolute path": (numbers(row0="/0.png,1"), "number", "line 2: /0.png is an absolute path"),
    "an address": (numbers(row0="https://example.org/0.png,1"), "number", "line 2: https://example.org/0.png is an address"),
    "no image": (after(numbers(row0="0.txt,1"), text("0.txt", "x")), "number", "line 2: 0.txt"),
    "an empty path": (numbers(row0=",1"), "number", "line 2: path or label is empty"),
    "an unknown split": (lambda top: table(top, "path,size,split", [*SPLIT[:7], "7.png,1,later"]), "number", "line 9: split 'later' is unknown"),
    "more cells than columns": (numbers(row1="1.png,1,2,3"), "number", "line 3: has 4 cells where the first line has 2"),
    "a column twice": (
        lambda top: table(top, "path,size,size", [f"{i}.png,{i},{i}" for i in range(8)]),
        "number",
        "t.csv: the first line reads path,size,size",
    ),
    "no line": (lambda top: table(top, "path,size", []), "number", "t.csv: there is no line below the first"),
    "no column": (lambda top: table(top, "path", [f"{i}.png" for i in range(8)]), "number", "t.csv: there is no column beside path"),
    "no path": (lambda top: table(top, "image,size", SIZES), "number", "t.csv: the first line reads image,size"),
    "no UTF-8": (after(numbers(), bytes_at("t.csv", b"path,size\n\xff.png,1\n")), "number", "t.csv: this is no CSV in UTF-8"),
    "four images": (lambda top: table(top, "path,size", SIZES[:4]), "number", "4 images to train on are too few"),
    "an image cut off": (
        after(numbers(), lambda top: (top / "3.png").write_bytes((top / "3.png").read_bytes()[:300])),
        "number",
        "3.png cannot be read as an image",
    ),
    "an empty image": (after(numbers(), bytes_at("3.png", b"")), "number", "3.png cannot be read as an image"),
    "an image of one colour": (after(numbers(), blank("3.png")), "number", "3.png has one colour everywhere"),
    "training and test share an image": (
        after(lambda top: table(top, "path,size,split", [*SPLIT[:6], "6.png,0.5,test", SPLIT[7]]), copy("0.png", "6.png")),
        "number",
        r"6.png \(test\) is the same image as 0.png",
    ),
    "an image with two targets": (after(numbers(), copy("0.png", "1.png")), "number", "1.png is the same image as 0.png and has another target"),
    "integers that may be classes": (
        lambda top: table(top, "path,petals", [f"{i}.png,{5 + i % 2}" for i in range(8)]),
        None,
        "petals has 2 different values; are they numbers",
    ),
    "two columns of words": (
        lambda top: table(top, "path,mood,place", [f"{i}.png,glad,here" for i in range(8)]),
        None,
        "which column is to be learned, mood or place",
    ),
    "a task that is none": (numbers(), "boxs", "task = 'boxs'.*did you mean boxes"),
    "a folder where a table is due": (lambda top: images(top / "x"), "number", "this is a folder; give the CSV"),
    "nothing there": (lambda top: top / "none", "masks", "none: there is no such folder or file"),
}


def masks(n=8, size=32, masks="masks", values=(0, 255)):
    "images/ and masks/ with the upper half of one value."

    def build(top, part=""):
        images(top / part / "images", n, size)
        (top / part / masks).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            grey = np.full((size, size), values[0], np.uint8)
            grey[size // 2 :] = values[1]
            Image.fromarray(grey).save(top / part / masks / f"{i}.png")
        return top

    return build


def mask(name, array, format="PNG"):
    return lambda top: Image.fromarray(np.asarray(array, np.uint8)).save(top / name, format=format)


def two_parts(top):
    for k, part in enumerate(("train", "test")):
        masks(5)(top, part)
        for i in range(5):  # other images in test
            Image.fromarray(np.random.default_rng(100 + 10 * k + i).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
                top / part / "images" / f"{i}.png"
            )
    return top


HALF = np.repeat([0, 255], 16)[:, None] * np.ones((1, 32))

MASKS = {
    "no folder of masks": (lambda top: images(top / "images").parent, "masks", "has no folder masks"),
    "no folder of images": (lambda top: images(top / "masks").parent, "masks", "has no folder images"),
    "no two names are equal": (
        after(masks(), lambda top: [f.rename(f.with_name(f"m{f.name}")) for f in (top / "masks").iterdir()]),
        None,
        "no image with a mask that can be used|the masks hold 0 classes",
    ),
    "a mask is missing": (after(masks(), gone("masks/3.png")), None, "images/3.png has no mask"),
    "an image of a mask is missing": (after(masks(), gone("images/3.png")), None, "masks/3.png has no image"),
    "a mask of another size": (after(masks(), mask("masks/3.png", HALF[:, :16])), None, "masks/3.png is 16 × 32 pixels, its image 32 × 32"),
    "a mask of an image that EXIF turns": (after(masks(), turned("images/3.png")), None, "masks/3.png: its image is turned by its EXIF"),
    "a mask in JPEG": (after(masks(), mask("masks/3.png", HALF, "JPEG")), None, "masks/3.png: a mask in JPEG has lost its exact values"),
    "a mask that is no image": (after(masks(), text("masks/3.png", "no image")), None, "masks/3.png: cannot be read as an image"),
    "an image that is none": (after(masks(), text("images/3.png", "no image")), None, "images/3.png cannot be read"),
    "masks of one class": (masks(values=(7, 7)), None, "the masks hold 1 classes"),
    "a mask of one class": (after(masks(), mask("masks/3.png", np.zeros((32, 32)))), None, "masks/3.png holds one class only"),
    "a value that is not listed": (
        after(after(masks(), text("classes.json", '{"a": 0, "b": 255}')), mask("masks/3.png", HALF * 0.5)),
        None,
        "masks/3.png holds 127, which is none of the classes",
    ),
    "a list of classes that is none": (after(masks(), text("classes.json", "[1, 2]")), None, "classes.json: write"),
    "a broken list of classes": (after(masks(), text("classes.json", '{"a": 0,')), None, "classes.json: write"),
    "a colour beyond bounds": (after(masks(), text("classes.json", '{"a": [0, 0, 300], "b": 255}')), None, "classes.json: write"),
    "two classes of one value": (after(masks(), text("classes.json", '{"a": 0, "b": 0}')), None, "classes.json: two classes have one value"),
    "photographs for masks": (lambda top: (images(top / "images"), images(top / "masks"), top)[-1], None, r"the masks hold \d+ classes"),
    "nothing but void": (after(masks(values=(0, 1)), mask("masks/3.png", np.full((32, 32), 255))), "masks", "masks/3.png holds nothing but void"),
    "mostly void": (
        after(
            after(masks(values=(0, 1)), mask("masks/3.png", np.r_[np.full((30, 32), 255), np.zeros((2, 32))])),
            text("classes.json", '{"a": 0, "b": 1}'),
        ),
        None,
        "masks/3.png holds one class only|images/3.png: 94% of its mask is void",
    ),
    "a class in test that training lacks": (
        after(two_parts, mask("test/masks/2.png", HALF * 0.5)),
        None,
        "test/masks/2.png holds 127, which is none of the classes",
    ),
    "masks in four images": (masks(4), None, "4 images to train on are too few"),
    "a size that is no multiple": (masks(8, 32), "masks-40", "image size 40: masks need a multiple of 32"),
    "training and test share a mask's image": (
        after(two_parts, copy("train/images/0.png", "test/images/1.png")),
        None,
        r"images/[01].png \(\w+\) is the same image as",
    ),
    "a file where a folder is due": (
        lambda top: table(top, "path,size", SIZES),
        "masks",
        "this is a file; give the folder that holds images and masks",
    ),
}


def coco(n=8, size=32, **changed):
    "A COCO file; `changed` are functions of its dict."

    def build(top, part=""):
        images(top / part / "images", n, size)
        said = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": size, "height": size} for i in range(n)],
            "categories": [{"id": 1, "name": "bee"}],
            "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2 + i, 3, 10, 12]} for i in range(n)],
        }
        for change in changed.values():
            change(said)
        (top / part / "coco.json").write_text(json.dumps(said), encoding="utf-8")
        return top

    return build


def box(value, at=3):
    return coco(12, change=lambda said: said["annotations"][at].update(bbox=value))


def other_test(top):
    coco(6)(top, "train")
    coco(3, change=lambda said: said["categories"].append({"id": 2, "name": "fly"}), more=lambda said: said["annotations"][0].update(category_id=2))(
        top, "test"
    )
    for i in range(3):
        Image.fromarray(np.random.default_rng(50 + i).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(top / "test" / "images" / f"{i}.png")
    return top


def voc(wrong=("2", "3", "20", "22"), **changed):
    "Pascal VOC files, one changed, or all."

    def build(top):
        images(top / "images", 12)
        (top / "voc").mkdir()
        for i in range(12):
            x = wrong if i == 3 or changed.get("all") else ("2", "3", "20", "22")
            name = "" if i == 3 and changed.get("nameless") else f"<filename>{i}.png</filename>"
            box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), x))
            xml = f"<annotation>{name}<object><name>bee</name><bndbox>{box}</bndbox></object></annotation>"
            (top / "voc" / f"{i}.xml").write_text(xml[:-9] if i == 3 and changed.get("broken") else xml, encoding="utf-8")
        return top

    return build


def yolo(line="0 0.5 0.5 0.4 0.4", yaml="names: [bee]\n"):
    "YOLO files; the line of one of them."

    def build(top):
        images(top / "images")
        (top / "labels").mkdir()
        for i in range(8):
            (top / "labels" / f"{i}.txt").write_text(line if i == 3 else "0 0.4 0.5 0.4 0.4", encoding="utf-8")
        if yaml is not None:
            (top / "data.yaml").write_text(yaml, encoding="utf-8")
        return top

    return build


def corners(said):
    for a in said["annotations"]:
        a["bbox"] = [12, 14, 28, 30]


BOXES = {
    "broken JSON": (after(coco(), text("coco.json", '{"images": [')), None, "coco.json: no JSON at line 1, column 13"),
    "JSON that is a list": (after(coco(), text("coco.json", "[]")), None, "coco.json: not COCO"),
    "JSON without annotations": (coco(change=lambda said: said.pop("annotations")), None, "coco.json: not COCO; it must hold the lists"),
    "JSON that is no UTF-8": (after(coco(), bytes_at("coco.json", b'{"images": "\xff"}')), None, "coco.json: it cannot be read"),
    "an image without a name": (coco(change=lambda said: said["images"][2].pop("file_name")), None, "each of the images needs an id and a file_name"),
    "a category without a name": (
        coco(change=lambda said: said["categories"][0].pop("name")),
        None,
        "each of the categories needs an id, a whole number, and a name",
    ),
    "two categories of one name": (
        coco(change=lambda said: said["categories"].append({"id": 2, "name": "bee"})),
        None,
        "two categories have the same id or name",
    ),
    "label 0": (
        coco(
            change=lambda said: said["categories"].insert(0, {"id": 0, "name": "ant"}), more=lambda said: said["annotations"][0].update(category_id=0)
        ),
        None,
        "category ids 0, 1 become labels 1 to 2; 0 is the background",
    ),
    "ids with holes": (
        coco(change=lambda said: said["categories"].append({"id": 7, "name": "fly"}), more=lambda said: said["annotations"][0].update(category_id=7)),
        None,
        "category ids 1, 7 become labels 1 to 2",
    ),
    "a category that none has": (
        coco(change=lambda said: said["annotations"][3].update(category_id=9)),
        None,
        "annotation 3 has category 9, which no category has",
    ),
    "an annotation of no image": (coco(change=lambda said: said["annotations"][3].update(image_id=99)), None, "annotation 3 belongs to no image"),
    "a box of three numbers": (box([1, 2, 3]), None, r"box 1 is \[1, 2, 3\], not four numbers"),
    "a box in words": (box([1, 2, "wide", 4]), None, "not four numbers"),
    "a box that is not a number": (box([1, 2, float("nan"), 4]), None, "not four numbers"),
    "a box without width": (box([5, 5, 0, 9]), None, "box 1 has no area"),
    "a box of negative height": (box([5, 20, 9, -8]), None, "box 1 has no area"),
    "a box outside": (box([40, 5, 9, 8]), None, "lies outside the image of 32 × 32"),
    "a box over the edge": (box([20, 5, 30, 8]), None, "reaches over the edge of 32 × 32"),
    "corners taken for width and height": (coco(change=corners), None, "read as two corners they fit"),
    "an image of boxes is missing": (after(coco(), gone("images/3.png")), None, "image images/3.png is missing"),
    "an image of boxes is none": (after(coco(), text("images/3.png", "no")), None, "images/3.png cannot be opened as an image"),
    "an image of boxes cut off": (
        after(coco(), lambda top: (top / "images/3.png").write_bytes((top / "images/3.png").read_bytes()[:400])),
        None,
        "images/3.png",
    ),
    "a size that is another": (coco(change=lambda said: said["images"][3].update(width=64)), None, "the image is said to be 64 × 32 and is 32 × 32"),
    "no box": (coco(change=lambda said: said["annotations"].clear()), None, "no image with a box that can be used"),
    "a box twice": (
        coco(change=lambda said: said["annotations"].append(dict(said["annotations"][3], id=99))),
        None,
        "images/3.png: 1 of its 2 boxes stand there twice",
    ),
    "a class that no box has": (coco(change=lambda said: said["categories"].append({"id": 2, "name": "fly"})), None, "class fly: no box has it"),
    "a class in test alone": (other_test, None, "class 'fly' is not among those of training"),
    "boxes in four images": (coco(4), None, "4 images to train on are too few"),
    "broken XML": (voc(broken=True), None, "3.xml: no XML at line 1"),
    "XML without an image": (voc(nameless=True), None, r"3.xml: it names no image \(filename\)"),
    "corners the other way": (voc(wrong=("20", "22", "2", "3")), None, "box 1 has no area"),
    "a corner in words": (voc(wrong=("a", "2", "3", "4")), None, "not four numbers"),
    "width and height taken for corners": (voc(wrong=("20", "18", "8", "9"), all=True), None, "x, y, width, height they fit; write xmin"),
    "an image of XML is missing": (after(voc(), gone("images/3.png")), None, "3.xml: image images/3.png is missing"),
    "no data.yaml": (yolo(yaml=None), None, "there is no data.yaml"),
    "broken YAML": (yolo(yaml="names: [bee"), None, "data.yaml: no YAML mapping"),
    "names with holes": (yolo(yaml="names: {0: bee, 2: fly}\n"), None, "data.yaml: names must be a list, or numbered from 0 without holes"),
    "YAML without names": (yolo(yaml="nc: 1\n"), None, "data.yaml: names must be a list"),
    "a class beyond the names": (yolo("4 0.5 0.5 0.2 0.2"), None, "3.txt, line 1 has class 4, but data.yaml names 0 to 0"),
    "pixels where shares are due": (yolo("0 12 14 8 9"), None, "3.txt, line 1 has numbers far above 1"),
    "a line of three numbers": (yolo("0 0.5 0.5 0.2"), None, "3.txt, line 1 is not a class and four numbers"),
    "boxes of an image that EXIF turns": (after(yolo(), turned("images/3.png")), None, "3.txt: image images/3.png is turned by its EXIF"),
    "masks and boxes": (after(masks(), text("Annotations/3.xml", "<annotation/>")), None, "holds masks and boxes; give --task masks or --task boxes"),
    "a text without an image": (after(yolo(), text("labels/99.txt", "0 0.5 0.5 0.2 0.2")), None, "99.txt: there is no image of this name"),
}

FAULTS = {f"{kind}: {name}": case for kind, cases in (("table", TABLES), ("masks", MASKS), ("boxes", BOXES)) for name, case in cases.items()}


def state(folder):
    "What every file below a folder holds."
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_there_are_at_least_sixty():
    assert len(FAULTS) >= 60


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_broken_target_costs_one_sentence(name, tmp_path, monkeypatch):
    make, task, said = FAULTS[name]
    path = make(tmp_path / "data")
    before = state(tmp_path)
    if task == "masks-40":
        from sft_course.tools.task_folders import read_task

        with pytest.raises(SFTError, match=said):
            read_task(path, "masks", tmp_path / "cache", size=40)
        return
    done = CliRunner().invoke(app, [str(path), *(["--task", task] if task else [])])
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    line = next(row for row in done.output.splitlines() if row.startswith("sft-course: "))
    found = " ".join(done.output.split())
    assert re.search(said, found), found
    assert line.rstrip().endswith((".", "?", ")?")) and "Traceback" not in found
    assert state(tmp_path) == before
