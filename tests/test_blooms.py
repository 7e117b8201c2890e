import csv

import numpy as np
import pytest
from PIL import Image

from sft_course.tools.blooms import SPECIES, blooms_folder, draw_bloom, write_blooms
from sft_course.tools.settings import DOMAINS


def test_six_species_of_form_and_three_domains():
    assert {(s.petals, s.tip) for s in SPECIES} == {(p, t) for p in (5, 6, 8) for t in ("round", "pointed")}
    assert set(DOMAINS) >= {"garden", "night", "herbarium"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_seed_same_pixels_and_another_seed_other_pixels(domain):
    one, two, other = (draw_bloom("round5", seed, domain=domain) for seed in (3, 3, 4))
    assert (one.image == two.image).all() and (one.mask == two.mask).all() and (one.image != other.image).any()
    assert one.image.dtype == np.uint8 and one.image.shape == (192, 192, 3) and one.mask.shape == (192, 192)


@pytest.mark.parametrize("domain", DOMAINS)
def test_truth_agrees_with_itself(domain):
    for seed in range(6):
        b = draw_bloom(None, seed, size=128, domain=domain, flowers=1 + seed % 3)
        assert set(np.unique(b.mask)) <= {0, 1, 2} and (b.mask == 1).any()
        assert len(b.boxes) == len(b.labels) == len(b.petals) == len(b.diameters) >= 1
        assert [SPECIES[i].petals for i in b.labels] == b.petals.tolist()
        x0, y0, x1, y1 = b.boxes.T
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 128).all() and (y1 <= 128).all() and (x1 > x0).all() and (y1 > y0).all()
        rows, cols = np.nonzero(b.mask)
        assert cols.min() >= x0.min() - 1.5 and cols.max() <= x1.max() + 1.5 and rows.min() >= y0.min() - 1.5 and rows.max() <= y1.max() + 1.5


def test_folder_is_an_image_folder_with_its_truth(tmp_path):
    root = write_blooms(tmp_path / "b", train_per_species=3, test_per_species=2, size=64)
    assert sorted(p.name for p in (root / "train").iterdir()) == sorted(s.name for s in SPECIES)
    pictures = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.jpg"))
    assert len(pictures) == 6 * 5
    rows = list(csv.DictReader((root / "truth.csv").open()))
    assert sorted(r["path"] for r in rows) == pictures
    assert len({r["seed"] for r in rows}) == len(rows)  # no image of test is one of train
    with Image.open(root / pictures[0]) as im:
        assert im.size == (64, 64)


def test_number_of_workers_changes_nothing(tmp_path):
    one, two = (write_blooms(tmp_path / str(n), train_per_species=2, test_per_species=1, size=64, workers=n) for n in (1, 2))
    for path in one.rglob("*.jpg"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()


def test_drawn_once_and_found_again(tmp_path):
    options = {"train_per_species": 1, "test_per_species": 1, "size": 64}
    folder = blooms_folder(tmp_path, **options)
    stamp = (folder / "truth.csv").stat().st_mtime_ns
    assert blooms_folder(tmp_path, **options) == folder and (folder / "truth.csv").stat().st_mtime_ns == stamp
    assert blooms_folder(tmp_path, **options | {"domain": "night"}) != folder


def test_an_interrupted_drawing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    import sft_course.tools.blooms as blooms

    def stop(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(blooms, "write_picture", stop)
    with pytest.raises(KeyboardInterrupt):
        blooms_folder(tmp_path, train_per_species=1, test_per_species=1, size=64, workers=1)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [] and not any(p.name == "train" for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("wrong, said", [({"species": "round7"}, "round5"), ({"domain": "desert"}, "garden"), ({"size": 3}, "size")])
def test_a_wrong_value_is_a_sentence_that_says_what_is_allowed(wrong, said):
    with pytest.raises(ValueError, match=said):
        draw_bloom(**{"species": "round5", "seed": 0} | wrong)
