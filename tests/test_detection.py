"Boxes: files of three formats, hostile files, IoU, suppression and average precision against the libraries, training."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sft_course.detection import (
    average_precision,
    box_features,
    box_iou,
    box_quality,
    detection_loss,
    find_boxes,
    fit_boxes,
    matches,
    nms,
    one_box_loss,
)
from sft_course.tools.boxes import (
    Found,
    coco_scores,
    drawn_flowers,
    load_images,
    read_boxes,
    read_coco,
    read_voc,
    read_yolo,
    scales,
    small_flowers,
    to_coco,
    truth_to_coco,
)
from sft_course.tools.detectors import BoxTargets, detector
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError

REPO = Path(__file__).parent.parent
RACCOONS = REPO.parent / "shared" / "data" / "raccoon"


# ---- files

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (60, 40), (k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
    return tmp_path


def coco(folder, boxes, images=3, categories=((1, "cat"),), **more):
    data = {"images": [{"id": k, "file_name": f"{k}.png"} for k in range(images)],
            "categories": [{"id": i, "name": n} for i, n in categories],
            "annotations": [{"id": j, "image_id": k, "category_id": c, "bbox": b} for j, (k, c, b) in enumerate(boxes)]}
    (folder / "coco.json").write_text(json.dumps(data | more))
    return folder / "coco.json"


def test_category_ids_with_holes_and_zero_become_labels_from_one(folder):
    file = coco(folder, [(0, 7, [1, 2, 3, 4]), (1, 0, [0, 0, 9, 9])], categories=((7, "dog"), (0, "cat")))
    found = read_coco(file)
    assert found.classes == ("cat", "dog")
    assert [x.tolist() for x in found.labels] == [[2], [1], []]
    assert found.boxes[0].tolist() == [[1, 2, 4, 6]]
    assert [p.kind for p in found.problems] == ["ids"]


HOSTILE = {
    "four": ([(0, 1, [1, 2, 3])], "not four numbers"),
    "text": ([(0, 1, "abcd")], "not four numbers"),
    "nan": ([(0, 1, [1, 2, None, 4])], "not four numbers"),
    "flat": ([(0, 1, [1, 2, 0, 4])], "no area"),
    "negative": ([(0, 1, [9, 2, -4, 4])], "no area"),
    "outside": ([(0, 1, [100, 2, 4, 4])], "lies outside"),
    "over": ([(0, 1, [50, 2, 40, 4])], "reaches over the edge"),
    "class": ([(0, 5, [1, 2, 3, 4])], "no category has"),
    "image": ([(9, 1, [1, 2, 3, 4])], "belongs to no image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_box_is_one_sentence_and_the_others_stay(folder, name):
    wrong, said = HOSTILE[name]
    found = read_coco(coco(folder, [*wrong, (1, 1, [1, 1, 5, 5]), (2, 1, [1, 1, 5, 5])]))
    assert len(found.problems) == 1 and said in found.problems[0].message
    assert [len(b) for b in found.boxes] == [int(name == "over"), 1, 1]
    assert all((b[:, 2:] > b[:, :2]).all() and (b <= [60, 40, 60, 40]).all() for b in found.boxes)


def test_a_missing_and_a_broken_image_are_left_out_by_name(folder):
    (folder / "images" / "1.png").write_bytes(b"no image")
    (folder / "images" / "2.png").unlink()
    found = read_coco(coco(folder, [(k, 1, [1, 1, 5, 5]) for k in range(3)]))
    assert found.files == ("images/0.png",)
    assert ["1.png cannot be opened" in p.message or "2.png is missing" in p.message for p in found.problems] == [True] * 2


@pytest.mark.parametrize("text, said", [
    ("{", "line 1"), ("[]", "not COCO"), ('{"images": 3}', "not COCO"), ("\xff\xfe", "no JSON"),
    ('{"images": [{}], "annotations": [], "categories": []}', "needs an id and a file_name"),
    ('{"images": [], "annotations": [], "categories": [{"id": "x"}]}', "needs an id"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "the same id"),
    ('{"images": [], "annotations": [], "categories": []}', "no image with a box"),
])
def test_a_broken_coco_file_is_one_sentence(folder, text, said):
    (folder / "coco.json").write_text(text)
    with pytest.raises(SFTError, match=said):
        read_boxes(folder)


def test_the_wrong_order_of_numbers_is_noticed(folder):
    rng = np.random.default_rng(0)
    corners = [(k % 3, [*c, *(c + rng.integers(4, 20, 2))]) for k, c in enumerate(rng.integers(0, 20, (30, 2)))]
    with pytest.raises(SFTError, match="read as two corners they fit"):
        read_coco(coco(folder, [(k, 1, [int(v) for v in b]) for k, b in corners]))
    (folder / "voc").mkdir()
    for k in range(3):
        objects = "".join(
            f"<object><name>cat</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1 - x0}</xmax><ymax>{y1 - y0}</ymax></bndbox></object>"
            for i, (x0, y0, x1, y1) in corners if i == k)
        (folder / "voc" / f"{k}.xml").write_text(f"<annotation><filename>{k}.png</filename>{objects}</annotation>")
    with pytest.raises(SFTError, match="as x, y, width, height they fit|no area, read as x, y, width, height"):
        read_voc(folder / "voc")


def test_yolo_lines(folder):
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: {0: cat, 1: dog}")
    (folder / "labels" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\nx\n7 .5 .5 .1 .1\n\n")
    (folder / "labels" / "gone.txt").write_text("0 .5 .5 .1 .1")
    found = read_yolo(folder)
    assert found.boxes[0].tolist() == [[15, 10, 45, 30]] and found.labels[0].tolist() == [2]
    assert len(found) == 3 and sorted(p.kind for p in found.problems) == ["image", "line", "line"]
    (folder / "data.yaml").write_text("names: [a\nb: ]]")
    with pytest.raises(SFTError, match="no YAML mapping at line"):
        read_yolo(folder)


def test_images_are_squeezed_with_their_boxes(folder):
    found = read_coco(coco(folder, [(0, 1, [6, 4, 30, 20])]))
    images = load_images(found, 32)
    assert images.pixels.shape == (3, 32, 32, 3)
    assert np.allclose(images.targets.boxes[0], [[3.2, 3.2, 19.2, 19.2]])
    assert np.allclose(images.targets.boxes[0].numpy() * scales(found, 32)[0], found.boxes[0])


@pytest.mark.skipif(not RACCOONS.is_dir(), reason="no photographs here")
@pytest.mark.parametrize("part", ["train", "test"])
def test_coco_and_voc_of_the_same_photographs_give_the_same_catalog(part):
    a, b = read_boxes(RACCOONS / part), read_voc(RACCOONS / part / "voc")
    assert a.classes == b.classes and not a.problems and not b.problems
    by_file = {f: (boxes, labels) for f, boxes, labels in zip(b.files, b.boxes, b.labels)}
    assert sorted(a.files) == sorted(b.files)
    for file, boxes, labels in zip(a.files, a.boxes, a.labels):
        assert boxes.shape == by_file[file][0].shape and np.array_equal(labels, by_file[file][1])
        assert np.abs(boxes - by_file[file][0]).max() < 1  # the XML files hold whole pixels


# ---- by hand against the libraries

def some_boxes(n, seed, side=100.):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, side - 30, (n, 2))
    return torch.tensor(np.c_[corner, corner + rng.uniform(3, 30, (n, 2))], dtype=torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_suppression_are_torchvisions(seed):
    a, b = some_boxes(50, seed), some_boxes(20, seed + 10)
    assert torch.allclose(box_iou(a, b), torchvision.ops.box_iou(a, b))
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(50) / 50).float()
    for threshold in (0., .3, .7, 1.):
        assert nms(a, scores, threshold).equal(torchvision.ops.nms(a, scores, threshold))
    assert len(nms(a[:0], scores[:0])) == 0


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_pycocotools(seed):
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for k in range(40):
        boxes = some_boxes(int(rng.integers(0, 7)), (seed + 1) * 1000 + k)
        labels = torch.from_numpy(rng.integers(1, 4, len(boxes)))
        truth.append((boxes, labels))
        shift = rng.normal(0, 2, (2 * len(boxes), 2))
        said = (np.r_[boxes.numpy(), boxes.numpy()] + np.c_[shift, shift]).astype(np.float32)
        found.append(Found(said, rng.random(len(said)), np.r_[labels.numpy(), rng.permutation(labels.numpy())]))
    targets = BoxTargets(*map(tuple, zip(*truth)))
    theirs = coco_scores(found, targets, ["a", "b", "c"])
    assert np.isclose(average_precision(found, targets), theirs["AP50"], atol=1e-9)
    assert np.isclose(average_precision(found, targets, .75), theirs["AP75"], atol=1e-9)
    mean = np.mean([average_precision(found, targets, t) for t in np.linspace(.5, .95, 10)])
    assert np.isclose(mean, theirs["AP"], atol=1e-9)


def test_nothing_found_and_nothing_there():
    none = Found(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, int))
    empty = BoxTargets((torch.zeros(0, 4),), (torch.zeros(0, dtype=torch.long),))
    one = BoxTargets((some_boxes(1, 0),), (torch.ones(1, dtype=torch.long),))
    assert average_precision([none], one) == 0 and average_precision([none], empty) == 0
    assert box_quality([none], one) == 0 and box_quality([none], empty) == 1
    assert len(matches(none, one.boxes[0])) == 0 and to_coco([none]) == []
    assert truth_to_coco(one, ["a"])["annotations"][0]["id"] == 1  # pycocotools takes id 0 for "not found"
    with pytest.raises(SFTError, match="predictions for 1 images"):
        average_precision([], one)


def test_without_pycocotools_there_is_one_sentence():
    code = ("import sys; sys.modules['pycocotools'] = None; sys.modules['pycocotools.coco'] = None\n"
            "from sft_course.tools.boxes import coco_scores\n"
            "from sft_course.tools.detectors import BoxTargets\n"
            "try: coco_scores([], BoxTargets((), ()), ['a'])\n"
            "except ValueError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "pip install 'sft_course[detection]'" in done.stdout, done.stderr


@pytest.mark.parametrize("boxes, labels, said", [
    ([[10, 10, 10, 20]], [1], "no area"), ([[10, 10, 5, 20]], [1], "is it x, y, width, height"), ([[1, 2, 3, 4]], [0], "0 is the background"),
    ([[1, 2, 3, float("nan")]], [1], "not finite"), ([[1, 2, 3, 4]], [1, 1], "give"),
])
def test_targets_that_would_end_training_are_refused_with_their_image(boxes, labels, said):
    with pytest.raises(SFTError, match=said):
        BoxTargets((torch.tensor(boxes, dtype=torch.float32),), (torch.tensor(labels),))


def test_a_mirrored_image_has_mirrored_boxes():
    targets = BoxTargets((some_boxes(5, 0),), (torch.ones(5, dtype=torch.long),))
    twice = targets.flipped(100).flipped(100)
    assert torch.allclose(twice.boxes[0], targets.boxes[0], atol=1e-4)
    flipped = targets.flipped(100).boxes[0]
    assert (flipped[:, 2:] > flipped[:, :2]).all() and torch.allclose(flipped[:, 1::2], targets.boxes[0][:, 1::2])


# ---- training

@pytest.fixture(scope="module")
def trained():
    train, val = drawn_flowers(range(24), (1, 2, 3), 64), drawn_flowers(range(500, 508), (1, 2, 3), 64)
    d = detector(open_backbone(), 1, 64)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    return d, train, val, before, fit_boxes(d, train, val, 4)


def test_a_detector_learns_and_the_body_does_not_move(trained):
    d, train, val, before, fitted = trained
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]
    assert average_precision(find_boxes(d, train.pixels), train.targets) > .5
    moved = [k for k, v in d.state_dict().items() if not torch.equal(v, before[k])]
    assert moved and all(k.startswith("fcos") for k in moved)


def test_the_same_seed_gives_the_same_bits_and_a_checkpoint_goes_on(trained, tmp_path):
    _, train, val, _, _ = trained
    small, ends = train.take(range(8)), []
    for stop in (None, tmp_path / "last.ckpt"):
        d = detector(open_backbone(), 1, 64)
        rates = {"checkpoint": stop, "epochs": 2}
        fit_boxes(d, small, val, lr=1e-3, **rates)
        if stop:
            assert stop.exists()
            again = fit_boxes(detector(open_backbone(), 1, 64), small, val, lr=1e-3, **rates)
            assert len(again.history) == 2
        ends.append(d.state_dict())
    assert all(torch.equal(ends[0][k], v) for k, v in ends[1].items())


def test_loss_is_a_sum_and_a_count_and_empty_images_train(trained):
    d, train, *_ = trained
    features = [level[:2] for level in box_features(d, train.pixels[:2])]
    empty = BoxTargets((torch.zeros(0, 4),) * 2, (torch.zeros(0, dtype=torch.long),) * 2)
    total, n = detection_loss(d)(d.train()(features), empty)
    assert n == 2 and torch.isfinite(total)
    total.backward()
    assert one_box_loss(torch.zeros(3, 4), torch.zeros(3, 4))[1] == 3


def test_unfreezing_moves_the_upper_pieces_but_no_statistics(trained):
    d, train, val, *_ = trained
    d = detector(open_backbone(), 1, 64)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    d.unfreeze()
    assert len(box_features(d, train.pixels[:2])) == 1
    fit_boxes(d, train.take(range(8)), val, 1)
    moved = [k for k, v in d.state_dict().items() if k.startswith("pieces") and not torch.equal(v, before[k])]
    assert moved and not any("running" in k or k.startswith("pieces.0") for k in moved)


def test_wrong_pixels_are_one_sentence(trained):
    for pixels in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)):
        with pytest.raises(SFTError, match="this detector takes"):
            find_boxes(trained[0], pixels)


def test_small_flowers_are_whole_and_the_same_each_time():
    a, b = small_flowers(range(4), 64), small_flowers(range(4), 64)
    assert np.array_equal(a.pixels, b.pixels) and all(len(x) == 1 for x in a.targets.boxes)
