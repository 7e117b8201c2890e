"""One data set for all: `train/` and `val/` with the same images for every peer. Run by bench.py in a process of its own.

Only files that every reader takes are in it (torchvision's ImageFolder knows no GIF, and what PIL cannot decode ends every
peer but ours). They are links to the originals. What is not reported on is all there to learn from; who wants to hold some of
it back does so.
"""
import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sft_course.tools.datasets import open_dataset
from sft_course.tools.intake import scan
from sft_course.tools.settings import load_settings

EVERY_READER = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def readable(path):
    if path.suffix.lower() not in EVERY_READER:
        return False
    try:
        with Image.open(path) as im:
            im.convert("RGB")
    except Exception:
        return False
    return True


def few(catalog, train, val):
    "At most so many images a class of each part."
    rows = []
    for c in range(len(catalog.classes)):
        for reported, most in ((False, train), (True, val)):
            rows += list(np.flatnonzero((catalog.labels == c) & ((catalog.part == "test") == reported))[:most])
    return catalog.keep(np.isin(np.arange(len(catalog)), rows))


def link(catalog, folder):
    "Links to the images under `folder/train` and `folder/val`."
    for f, label, part in zip(catalog.files, catalog.labels, catalog.part, strict=True):
        place = folder / ("val" if part == "test" else "train") / catalog.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f.replace("/", "--")).symlink_to((catalog.root / f).resolve())


def prepare(source, work, quick=False):
    "The folder of a data set (`blooms` or a path), and what is in it."
    root = open_dataset(load_settings(dataset="blooms", cache=str(work / "drawn"))) if source == "blooms" else Path(source).resolve()
    catalog = scan(root, seed=0)
    good = np.array([readable(root / f) for f in catalog.files])
    left_out = [f for f, ok in zip(catalog.files, good, strict=True) if not ok]
    catalog = catalog.keep(good)
    if quick:
        catalog = few(catalog, 12, 6)
    key = hashlib.blake2b(json.dumps([str(root), catalog.files, catalog.part.tolist()]).encode(), digest_size=6).hexdigest()
    folder = work / "data" / f"{root.name if source != 'blooms' else source}-{key}"
    if not folder.exists():
        temp = folder.with_name(f".{folder.name}")
        shutil.rmtree(temp, ignore_errors=True)
        link(catalog, temp)
        temp.rename(folder)
    val = int((catalog.part == "test").sum())
    return {"folder": str(folder), "train": len(catalog) - val, "val": val, "classes": len(catalog.classes), "left_out": left_out}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    print(json.dumps(prepare(given.source, given.work, given.quick)))
