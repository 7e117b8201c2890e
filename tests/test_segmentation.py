"Masks: hostile files, the four means of IoU, losses with void, decoders on stored maps, resume, tiles."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sft_course.segmentation import (
    border_distance,
    confusions,
    dice_loss,
    fit_masks,
    fit_pixel_head,
    iou,
    mask_loss,
    predict_masks,
    quality,
)
from sft_course.tools.masks import (
    VOID,
    Masks,
    bloom_masks,
    coloured,
    corners,
    flip_back,
    flip_view,
    mask_values,
    predict_tiles,
    read_masks,
    save_mask,
    tiles,
)
from sft_course.tools.segmenters import EpochViews, mask_inputs, mask_logits, open_segmenter, skip_maps
from sft_course.tools.settings import SFTError
from sft_course.tools.steps import add_summed_gradients

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "membrane"
pytest.importorskip("segmentation_models_pytorch")


def write(folder, name, image, mask, ending="png"):
    for part, array in (("images", image), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if array is not None:
            Image.fromarray(array).save(folder / part / f"{name}.{ending}")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        write(tmp_path, f"im{i}", rng.integers(256, size=(32, 40, 3), dtype=np.uint8), np.uint8(rng.integers(2, size=(32, 40)) * 255))
    return tmp_path


# ---- reading

def test_masks_of_0_and_255_are_two_classes(folder):
    data = read_masks(folder)
    assert data.classes == ("0", "255") and set(np.unique(data.masks)) == {0, 1} and data.problems == ()
    assert read_masks(folder, {255: "cell", 0: "rest"}).classes == ("cell", "rest")


def test_every_class_keeps_its_index_in_every_file(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    write(tmp_path, "a", image, np.full((32, 32), 2, np.uint8))
    write(tmp_path, "b", image, np.uint8(np.arange(32) // 11 * np.ones((32, 1))))
    data = read_masks(tmp_path)
    assert (data.masks[0] == 2).all() and [p.kind for p in data.problems] == ["one class"]


def test_palettes_colours_and_a_void_border(tmp_path):
    mask = np.uint8(np.arange(32) // 11 * np.ones((32, 1)))
    mask[:2] = VOID
    save_mask(tmp_path / "palette.png", mask)
    assert np.array_equal(mask_values(tmp_path / "palette.png"), mask)
    Image.fromarray(coloured(mask)).save(tmp_path / "colours.png")
    assert len(np.unique(mask_values(tmp_path / "colours.png"))) == 4
    write(tmp_path / "set", "a", np.zeros((32, 32, 3), np.uint8), mask)
    data = read_masks(tmp_path / "set")
    assert data.classes == ("0", "1", "2") and (data.masks[0][:2] == VOID).all()


FAULTS = {"size": (np.zeros((16, 40), np.uint8), "is 40 × 16 pixels, its image 40 × 32"),
          "values": (np.full((32, 40), 9, np.uint8), "holds 9, which is none of the classes 0, 255"),
          "one class": (np.zeros((32, 40), np.uint8), "holds one class only"),
          "no mask": (None, "has no mask")}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_sentence_and_the_others_are_read(folder, kind):
    mask, says = FAULTS[kind]
    write(folder, "zz", np.zeros((32, 40, 3), np.uint8), mask)
    data = read_masks(folder, {0: "membrane", 255: "cell"})
    assert [p.kind for p in data.problems] == [kind] and says in data.problems[0].message
    assert data.problems[0].message.count(". ") == 0 and len(data) == 3 + (kind == "one class")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_broken_files_are_named(folder, content):
    (folder / "masks" / "im1.png").write_bytes(content)
    (folder / "images" / "im2.png").write_bytes(content)
    data = read_masks(folder)
    assert data.names == ("im0.png",) and {p.path for p in data.problems} == {"masks/im1.png", "images/im2.png"}
    assert not any(str(folder) in p.message for p in data.problems)


def test_what_cannot_be_read_at_all_says_why(folder, tmp_path):
    with pytest.raises(SFTError, match="has no folder images"):
        read_masks(tmp_path / "images")
    write(folder, "wide", np.zeros((32, 64, 3), np.uint8), np.uint8(np.eye(32, 64) * 255))
    with pytest.raises(SFTError, match="give size="):
        read_masks(folder)
    assert read_masks(folder, size=32).masks.shape == (4, 32, 32)
    for f in (folder / "masks").iterdir():
        Image.fromarray(np.zeros((32, 40), np.uint8)).save(f)
    with pytest.raises(SFTError, match="there must be 2 to 254"):
        read_masks(folder)


# ---- moves

@pytest.mark.parametrize("view", range(8))
def test_views_are_undone_and_move_image_and_mask_alike(view):
    x = torch.arange(2 * 32 * 32).view(2, 1, 32, 32)
    assert torch.equal(flip_back(flip_view(x, view), view), x)
    data = EpochViews([torch.cat([flip_view(x, v) for v in range(8)])], np.uint8(x[:, 0] % 251), range(8), seed=view)
    rows = np.array([1, 0])
    assert torch.equal(data.inputs(rows)[:, 0].long() % 251, data[rows])


def test_tiles_cover_and_come_together_again():
    data = bloom_masks(1, 96)
    cut = tiles(data, 64, 16)
    assert len(cut) == 4 and corners(96, 64, 16) == [0, 32]
    assert np.array_equal(cut.images[3], data.images[0, 32:, 32:]) and np.array_equal(cut.masks[3], data.masks[0, 32:, 32:])
    x = torch.rand(1, 3, 96, 96)
    assert torch.allclose(predict_tiles(lambda t: t + 1, x, 64, 16), x + 1, atol=1e-5)
    for size, overlap in ((128, 0), (32, 32), (32, -1)):
        with pytest.raises(SFTError, match="tiles of"):
            corners(96, size, overlap)


# ---- numbers

def by_sets(predicted, truth, classes):
    "IoU of each class from sets of places, NaN where it is nowhere."
    out = []
    for c in range(classes):
        a, b = ({tuple(i) for i in np.argwhere((m == c) & (truth != VOID))} for m in (predicted, truth))
        out.append(len(a & b) / len(a | b) if a | b else np.nan)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_iou_is_what_sets_say_and_what_torchmetrics_says(seed):
    from torchmetrics.classification import MulticlassJaccardIndex

    rng = np.random.default_rng(seed)
    p, y = rng.integers(4, size=(2, 3, 8, 8))
    y[rng.random(y.shape) < .2] = VOID
    p[0][p[0] == 3], y[0][y[0] == 3] = 0, 1
    tables = confusions(p, y, 4)
    assert np.isclose(iou(tables, "image"), np.mean([np.nanmean(by_sets(a, b, 4)) for a, b in zip(p, y)]))
    assert np.isclose(iou(tables), np.nanmean(by_sets(np.concatenate(p), np.concatenate(y), 4)))
    for average in ("macro", "micro"):
        theirs = MulticlassJaccardIndex(4, average=average, ignore_index=VOID)(torch.from_numpy(p), torch.from_numpy(y))
        assert np.isclose(iou(tables, average=average), theirs.item())
    logits = F.one_hot(torch.from_numpy(p), 4).movedim(-1, 1).float()
    each = quality(logits, torch.from_numpy(y))
    assert each.shape == (3,) and np.isclose(each.mean(), iou(tables, "image")) and ((each >= 0) & (each <= 1)).all()


def test_absent_and_void_have_no_say():
    void = np.full((1, 4, 4), VOID)
    assert np.isnan(iou(confusions(np.zeros((1, 4, 4)), void, 3)))
    assert quality(torch.zeros(1, 3, 4, 4), torch.from_numpy(void)).tolist() == [1]
    two = confusions(np.zeros((2, 4, 4)), np.stack([void[0], 0 * void[0]]), 3)
    assert iou(two, "image") == iou(two) == 1
    with pytest.raises(SFTError, match="macro or micro"):
        iou(two, average="weighted")


@pytest.mark.parametrize("loss", [mask_loss, dice_loss])
def test_losses_in_parts_give_the_gradient_of_the_whole(loss):
    torch.manual_seed(0)
    net, x = torch.nn.Conv2d(2, 3, 1), torch.randn(6, 2, 8, 8)
    y = torch.randint(3, (6, 8, 8))
    y[:2, 3:] = VOID
    y[5] = VOID
    grads = []
    for micro in (None, 1, 4):
        net.zero_grad()
        add_summed_gradients(net, x.__getitem__, y, np.arange(6), loss, micro)
        grads.append(net.weight.grad.clone())
    assert all(torch.allclose(g, grads[0], atol=1e-6) for g in grads) and grads[0].isfinite().all()
    z = net(x)
    moved = z.clone()
    moved[5] += 7
    moved[0, 0, 5] -= 3
    assert torch.isclose(loss(z, y)[0], loss(moved, y)[0], rtol=1e-4)  # void pixels do not matter


def test_distance_from_a_border():
    mask = np.zeros((6, 6), int)
    mask[:, 3:] = 1
    assert np.allclose(border_distance(mask)[0], [2.5, 1.5, .5, .5, 1.5, 2.5])
    assert np.isinf(border_distance(np.zeros((3, 3)))).all()


# ---- networks

@pytest.fixture(scope="module")
def flowers():
    return bloom_masks(10, 32), bloom_masks(4, 32, 1)


def test_the_decoder_trains_and_not_a_bit_of_the_encoder_moves(flowers):
    net = open_segmenter(3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit_masks(net, *flowers, 2, loss=dice_loss)
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("upper.") for k in moved)


def test_unfreezing_moves_weights_and_leaves_the_batch_norms_of_the_encoder_asleep(flowers):
    net = open_segmenter(3)
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    fit_masks(net, *flowers, 1, 1e-3, encoder=True)
    moved = {k for k, v in net.encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.endswith("weight") for k in moved) and not any("running" in k or "tracked" in k for k in moved)


def test_the_same_seed_gives_the_same_bits_and_a_stopped_run_goes_on(flowers, tmp_path):
    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    whole, again = open_segmenter(3, seed=1), open_segmenter(3, seed=1)
    history = fit_masks(whole, *flowers, 3, seed=5).history
    with pytest.raises(KeyboardInterrupt):
        fit_masks(again, *flowers, 3, seed=5, checkpoint=tmp_path / "a.ckpt", watch=stop)
    again = open_segmenter(3, seed=2)
    assert fit_masks(again, *flowers, 3, seed=5, checkpoint=tmp_path / "a.ckpt").history == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_stored_maps_give_the_network_s_own_logits(flowers):
    net, x = open_segmenter(3), mask_inputs(flowers[0].images)
    with torch.no_grad():
        stored = net.upper([m.float() for m in skip_maps(net, flowers[0].images)])
        assert torch.allclose(stored, net(x), atol=.02)
    head = fit_pixel_head(skip_maps(net, flowers[0].images), flowers[0].masks, 3)
    assert head([m.float() for m in skip_maps(net, flowers[0].images)]).shape == (10, 3, 32, 32)


def test_predictions_are_indices_and_files(flowers, tmp_path):
    net, val = open_segmenter(3), flowers[1]
    found = predict_masks(net, val.images, folder=tmp_path / "new", names=val.names)
    assert found.dtype == np.uint8 and found.shape == val.masks.shape
    assert np.array_equal(mask_values(tmp_path / "new" / f"{val.names[2]}.png"), found[2])
    assert torch.equal(mask_logits(net, val.images, size=1), mask_logits(net, val.images, size=1))
    with pytest.raises(SFTError, match="multiples of 32"):
        predict_masks(net, val.images[:, :20])


def test_no_smp_is_one_sentence(monkeypatch):
    import builtins

    usual = builtins.__import__

    def without(name, *rest, **how):
        if name.startswith("segmentation_models"):
            raise ImportError
        return usual(name, *rest, **how)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SFTError, match=r"pip install 'sft_course\[segmentation\]'"):
        open_segmenter(2)


@pytest.mark.skipif(not DATA.is_dir(), reason="the membranes are not here")
def test_membranes_are_read():
    data = read_masks(DATA / "train", {0: "membrane", 255: "cell"})
    assert data.images.shape == (20, 512, 512, 3) and data.problems == () and isinstance(data, Masks)
    assert .7 < data.masks.mean() < .85 and len(tiles(data[:1], 256)) == 4
