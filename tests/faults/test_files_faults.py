"Artifacts, checkpoints and weights from somebody else: nothing in them runs, nothing reaches outside, and what does not fit is named."

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from forks import NETWORK, SIZE, pictures, plan

from sft_course import FineTuner, load_settings
from sft_course.tools.artifact import load_artifact
from sft_course.tools.checkpoints import read_checkpoint
from sft_course.tools.intake import scan
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError


def refused(call, *args, **how):
    "The one sentence with which something is refused, checked for its form."
    with pytest.raises(SFTError) as e:
        call(*args, **how)
    text = str(e.value)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text and len(text) < 1000, text
    return text


class Evil:
    "Unpickling it makes a file."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    here = tmp_path_factory.mktemp("artifact")
    settings = load_settings(cache=str(here / "cache"))
    FineTuner(pictures(here / "data"), NETWORK, here / "out", size=SIZE, weights=None, settings=settings).run(*plan("short"))
    return here / "out"


@pytest.fixture
def copy(artifact, tmp_path):
    "A copy to tamper with."
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def card(folder):
    return json.loads((folder / "card.json").read_text())


def put(folder, **changed):
    (folder / "card.json").write_text(json.dumps(card(folder) | changed))


def put_weights(folder, state=None, data=None):
    "Other weights, of which the card speaks."
    from safetensors.torch import save

    data = save(state) if data is None else data
    (folder / "model.safetensors").write_bytes(data)
    put(folder, sha256=hashlib.sha256(data).hexdigest())


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---- something that runs when it is unpickled


def evil(path, how, mark):
    if how == "torch":
        torch.save({"format": "sft_course checkpoint 1", "model": Evil(mark)}, path)
    elif how == "old torch":
        torch.save(Evil(mark), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Evil(mark)))


HOWS = ["pickle", "torch", "old torch"]


@pytest.mark.parametrize("how", HOWS)
def test_a_malicious_checkpoint(fault, copy, tmp_path, how):
    evil(copy / "last.ckpt", how, tmp_path / "mark")
    with fault("malicious last.ckpt") as f:
        f.said(refused(read_checkpoint, copy / "last.ckpt"))
        settings = load_settings(cache=str(tmp_path / "cache"))
        tuner = FineTuner(pictures(tmp_path / "data"), NETWORK, copy, size=SIZE, weights=None, settings=settings)
        assert "last.ckpt" in refused(tuner.run, *plan("short"), resume=True)
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", HOWS)
def test_malicious_weights_in_an_artifact(fault, copy, tmp_path, how):
    evil(copy / "model.safetensors", how, tmp_path / "mark")
    with fault("malicious model.safetensors") as f:
        assert "model.safetensors" in refused(load_artifact, copy)
        put_weights(copy, data=(copy / "model.safetensors").read_bytes())
        f.said(refused(load_artifact, copy))
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_malicious_weights_for_a_backbone(fault, tmp_path, how, suffix):
    evil(path := tmp_path / f"w{suffix}", how, tmp_path / "mark")
    with fault("malicious weights file") as f:
        said = refused(open_backbone, NETWORK, path)
        assert path.name in said and not (tmp_path / "mark").exists()
        f.said(said)


@pytest.mark.parametrize("held", [[1, 2], "text", 3, {"a": 1}, {"state_dict": 5}, {"state_dict": {"a": "b"}}, {1: torch.zeros(2)}], ids=str)
def test_weights_that_are_no_table_of_tensors(fault, tmp_path, held):
    torch.save(held, path := tmp_path / "w.pt")
    with fault("weights file without tensors") as f:
        f.said(refused(open_backbone, NETWORK, path))


@pytest.mark.parametrize(
    "held",
    [{}, {"model": 3}, {"model": {}, "kind": "AdamW", "optimizer": {}, "average": None, "more": {}}, {"more": {"also": {"plan": {}}}}],
    ids=["nothing more", "a number", "empty", "no history"],
)
def test_a_checkpoint_that_lacks_something(fault, copy, tmp_path, held):
    "Its format is right, what it holds is not."
    torch.save({"format": "sft_course checkpoint 1"} | held, copy / "last.ckpt")
    settings = load_settings(cache=str(tmp_path / "cache"))
    with fault("last.ckpt that lacks something") as f:
        tuner = FineTuner(pictures(tmp_path / "data"), NETWORK, copy, size=SIZE, weights=None, settings=settings)
        f.said(refused(tuner.run, *plan("short"), resume=True))


# ---- a card that says something else

NEEDED = ("classes", "backbone", "preprocessing", "head", "metrics", "sha256")
WRONG = {
    "classes": ([], ["a"], ["a", "a"], ["a", 1], "ab", {"a": 1, "b": 2}, ["a", "b", "c"], [str(i) for i in range(1000)]),
    "backbone": (
        "",
        3,
        "resnet10t",
        "no_such_network",
        "../../etc/passwd",
        "a/b",
        "hf-hub:evil/model",
        "local-dir:/tmp",
        "lite0\n",
        "x" * 10000,
    ),
    "preprocessing": ({}, [], {"size": 48}, "48"),
    "head": ("none", 1, ["last"], "every"),
    "metrics": ([], 3, "x"),
    "sha256": ("", 3, "0" * 64),
}


@pytest.mark.parametrize("key", NEEDED)
def test_a_card_without_a_key(fault, copy, key):
    (copy / "card.json").write_text(json.dumps({k: v for k, v in card(copy).items() if k != key}))
    with fault("card.json without a key") as f:
        said = refused(load_artifact, copy)
        assert key in said
        f.said(said)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs], ids=lambda v: str(v)[:20])
def test_a_card_with_a_wrong_value(fault, copy, key, value):
    put(copy, **{key: value})
    with fault("card.json with a wrong value") as f:
        said = refused(load_artifact, copy)
        assert "card.json" in said
        f.said(said)


@pytest.mark.parametrize("key", sorted(set("weights chosen along phases seed problems notes data versions seconds".split())))
@pytest.mark.parametrize("value", [None, [], "x", 10**30], ids=["none", "list", "text", "huge"])
def test_what_a_card_says_by_the_way_does_not_matter(fault, copy, key, value):
    with fault("card.json with a strange remark"):
        put(copy, **{key: value})
        assert load_artifact(copy).classes == ["a", "b"]


PREPROCESSING = {
    "size": (0, -1, 10**9, "48", None, 48.5),
    "crop": (0, "x", float("nan"), None),
    "mean": ([0, 0], ["a"] * 3, [float("inf")] * 3, 0),
    "std": ([0, 0, 0], [1, 1], None),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in PREPROCESSING.items() for v in vs], ids=str)
def test_a_card_with_wrong_preprocessing(fault, copy, key, value):
    put(copy, preprocessing=card(copy)["preprocessing"] | {key: value})
    with fault("card.json with wrong preprocessing") as f:
        f.said(refused(load_artifact, copy))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "[" * 100000, '{"classes": ' + "9" * 5000 + "}", "\x00" * 100, "\udcff"],
    ids=["empty", "half", "list", "null", "number", "text", "deep", "long number", "zeros", "no text"],
)
def test_a_card_that_is_none(fault, copy, text):
    (copy / "card.json").write_text(text, errors="surrogateescape")
    with fault("card.json that is no table") as f:
        f.said(refused(load_artifact, copy))


@pytest.mark.parametrize("name", ["card.json", "model.safetensors", "history.csv", "report.html"])
@pytest.mark.parametrize("what", ["missing", "a folder", "a link to nothing", "not utf-8"])
def test_a_file_of_an_artifact_is_something_else(fault, copy, name, what):
    (copy / name).unlink()
    if what == "a folder":
        (copy / name).mkdir()
    if what == "a link to nothing":
        (copy / name).symlink_to(copy / "nowhere")
    if what == "not utf-8":
        (copy / name).write_bytes(b"\xff\xfe\x00\x80" * 10)
    with fault("a file of an artifact is something else") as f:
        if name in ("card.json", "model.safetensors"):
            f.said(refused(load_artifact, copy))
        else:
            load_artifact(copy)


# ---- weights that are not those of the card


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "renamed", "transposed", "none"])
def test_weights_of_another_form(fault, copy, change):
    state = weights(copy)
    name = next(k for k, v in state.items() if v.dim() == 4 and v.shape[0] != v.shape[1])
    if change == "shape":
        state[name] = torch.zeros(3)
    if change == "missing":
        del state[name]
    if change == "extra":
        name, state["more"] = "more", torch.zeros(3)
    if change == "renamed":
        state[name + "x"] = state.pop(name)
    if change == "transposed":
        state[name] = state[name].transpose(0, 1).contiguous()
    if change == "none":
        state = {}
    put_weights(copy, state)
    with fault("weights of another form") as f:
        said = refused(load_artifact, copy)
        assert change == "none" or name in said
        f.said(said)


def test_bit_flips_in_the_weights(fault, times, copy):
    whole, rng = (copy / "model.safetensors").read_bytes(), random.Random(0)
    for _ in range(30 * times):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        (copy / "model.safetensors").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with fault("bit flip in model.safetensors") as f:
            said = refused(load_artifact, copy)
            assert "model.safetensors is damaged" in said
            f.said(said)


def test_bit_flips_in_the_head_of_the_weights_that_the_card_knows_of(fault, times, copy):
    "The hash is right then; the names, shapes and places are not. What loads all the same has the shapes it must have."
    whole, rng = (copy / "model.safetensors").read_bytes(), random.Random(1)
    for _ in range(30 * times):
        at = rng.randrange(8 + int.from_bytes(whole[:8], "little"))
        put_weights(copy, data=whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with fault("bit flip in the head of model.safetensors") as f:
            try:
                load_artifact(copy)
            except SFTError as e:
                f.said(e)


# ---- out of the folder


@pytest.mark.parametrize("path", ["../secret.png", "/{outside}/secret.png", "a/../../secret.png", "file:///{outside}/secret.png"])
def test_a_table_cannot_name_what_lies_outside(fault, tmp_path, path):
    "A file outside the table's folder is taken only where the library says so, and never read as anything but an image."
    pictures(tmp_path / "data", n=4)
    (tmp_path / "secret.png").write_text("root:x:0:0")
    rows = [f"{p.relative_to(tmp_path / 'data')},{p.parent.name}" for p in sorted((tmp_path / "data").rglob("*.png"))]
    (tmp_path / "data" / "t.csv").write_text("\n".join(["path,label", *rows, path.format(outside=tmp_path) + ",a"]) + "\n")
    with fault("a path in a CSV that leads outside") as f:
        from sft_course.tools.pixels import decode_once

        try:
            found = decode_once(scan(tmp_path / "data" / "t.csv"), SIZE, tmp_path / "cache")
        except SFTError as e:
            return f.said(e)
        assert not any("secret" in n for n in found.catalog.files) and any("secret" in p.path for p in found.catalog.problems)
        f.said(next(p.message for p in found.catalog.problems if "secret" in p.path))


@pytest.mark.parametrize(
    "names",
    [["../../etc", "/etc/passwd"], ["a\nb", "c"], ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>']],
    ids=["paths", "lines", "script"],
)
def test_names_in_a_card_are_only_names(fault, copy, tmp_path, names):
    "They come back as they are, are not opened, and are escaped in a report."
    with fault("names of classes like paths or HTML"):
        put(copy, classes=names)
        before = sorted(tmp_path.rglob("*"))
        result = load_artifact(copy)
        assert result.predict(next(pictures(tmp_path / "more", n=1).rglob("*.png"))).label in names
        result.save(tmp_path / "saved")
        assert {p for p in tmp_path.rglob("*") if "more" not in p.parts and "saved" not in p.parts} == set(before)


def test_a_report_escapes_names(fault, tmp_path):
    data = pictures(tmp_path / "data", n=24)
    (data / "a").rename(data / "<script>alert(1)<")
    (data / "b").rename(data / '"><img src=x onerror=alert(2)>')
    for p in sorted(data.rglob("*.png")):
        p.rename(p.with_name(f"<b onclick=alert(3)>&{p.name}"))
    (data / "<script>alert(1)<" / "<script>alert(4)<.png").write_text("no image")
    settings = load_settings(cache=str(tmp_path / "cache"))
    with fault("HTML in names of classes and files"):
        FineTuner(data, NETWORK, tmp_path / "out", size=SIZE, weights=None, settings=settings).run(plan("short")[0])
        html = (tmp_path / "out" / "report.html").read_text()
        assert not [w for w in ("<script>alert", "<img src=x", "<b onclick") if w in html] and "&lt;script&gt;" in html
