"Whatever an image comes as, the network says the same of it; one that cannot be read does not end the run."
import io
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO, draw
from PIL import Image

from sft_course import FineTuner, Phase, fine_tune, load_artifact
from sft_course.tools.predict import Prediction
from sft_course.tools.settings import SFTError

CASES = REPO.parent / "shared" / "cases"
HEAD = (Phase("head", looks_at="last"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Drawn images as PNG, so that what is decoded here and what the library decodes are the same pixels."
    root = draw(tmp_path_factory.mktemp("predict") / "stripes", classes=("stripes", "waves", "third"))
    for f in sorted(root.rglob("*.jpg")):
        Image.open(f).save(f.with_suffix(".png"))
        f.unlink()
    return root


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("predict") / "model"
    return fine_tune(folder, out=out, size=64, phases=HEAD)


@pytest.fixture(scope="module")
def wide(folder):
    "A network whose head looks at every stage."
    return FineTuner(folder, size=64).run(Phase("head", looks_at="every"))


@pytest.fixture
def image(folder):
    return folder / "waves" / "00.png"


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path / "broken.png"


SINGLE = {
    "path": lambda f: f,
    "text": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda f: bytearray(f.read_bytes()),
    "file in memory": lambda f: io.BytesIO(f.read_bytes()),
    "open file": lambda f: open(f, "rb"),
    "PIL image": Image.open,
    "array": lambda f: np.asarray(Image.open(f)),
    "array of a name": lambda f: np.array(str(f)),
}
SEVERAL = {
    "list": lambda f: [f, f],
    "tuple": lambda f: (str(f), f),
    "generator": lambda f: (f for _ in range(2)),
    "glob": lambda f: f.parent.glob("0[0]*.png"),
    "array of names": lambda f: np.array([str(f), str(f)]),
    "batch": lambda f: np.stack([np.asarray(Image.open(f))] * 2),
    "batches": lambda f: [np.stack([np.asarray(Image.open(f))] * 2)] * 2,
    "series": lambda f: pd.Series([str(f)]),
    "of all kinds": lambda f: [make(f) for make in SINGLE.values()],
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_image(result, image, kind):
    want, got = result.predict(image), result.predict(SINGLE[kind](image))
    assert got.label == "waves" and got.probabilities == want.probabilities and got.error is None


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_images(result, image, kind):
    found = result.predict(SEVERAL[kind](image))
    assert isinstance(found, list) and found
    want = result.predict(image).probabilities
    assert all(p.probabilities == pytest.approx(want, abs=1e-5) for p in found)


@pytest.mark.parametrize("shape", [(72, 72), (72, 72, 1), (72, 72, 4), (3, 72, 72), (2, 72, 72, 1), (2, 72, 72, 4)])
def test_arrays_of_any_shape(result, image, shape):
    x = np.asarray(Image.open(image))
    one = {1: x[..., :1], 3: x, 4: np.dstack([x, np.full(x.shape[:2], 255, np.uint8)])}
    given = x[..., 0] if len(shape) == 2 else np.stack([x[..., 0]] * 3) if shape[0] == 3 else one[shape[-1]]
    if len(shape) == 4:
        given = np.stack([given] * 2)
    found = result.predict(given)
    assert given.shape == shape
    assert {p.label for p in (found if isinstance(found, list) else [found])} == {"waves"}


def test_a_folder_stands_for_the_images_in_it(result, folder, tmp_path):
    found = result.predict(folder)
    assert [p.path for p in found] == [str(f) for f in sorted(folder.rglob("*.png"))]
    assert result.predict([folder / "waves", str(folder / "stripes")])[0].path == str(folder / "waves" / "00.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.png").write_bytes(b"")
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "a.png").write_bytes((folder / "waves" / "00.png").read_bytes())
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.warns(UserWarning, match="there is no image to be read in this folder"):
        assert [p.path for p in result.predict(tmp_path)] == [str(tmp_path)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "no extension").write_bytes((folder / "waves" / "00.png").read_bytes())
    assert [(p.path, p.label) for p in result.predict(tmp_path)] == [(str(tmp_path / "a" / "no extension"), "waves")]


def test_nothing_gives_nothing(result):
    for nothing in ([], (), iter(()), np.empty((0, 64, 64, 3), np.uint8), np.array([], dtype=str)):
        assert result.predict(nothing) == []
    assert list(result.predict_frame([])) == ["path", "label", "probability", "label_2", "probability_2", "label_3", "probability_3", "error"]


@pytest.mark.parametrize(
    ("what", "said"),
    [(None, "NoneType is no image"), (3, "int is no image"), ({"image": 1}, "dict is no image"), (torch.zeros(3, 8, 8), "Tensor is no image"),
     (io.StringIO("x"), "open it with 'rb'"), (b"", "it is empty"), (b"%PDF-1.7", "it is a PDF"), ("gone.jpg", "gone.jpg: there is no such file"),
     (np.zeros(3, np.uint8), "an array of shape"), ("\0", "there is no such file")],
    ids=lambda value: ascii(value)[:30] if isinstance(value, str) else type(value).__name__,  # the same in every process
)
def test_what_is_no_image_is_refused_in_a_sentence(result, what, said):
    with pytest.raises(SFTError, match=said):
        result.predict(what)
    with pytest.warns(UserWarning, match="1 of 1 images"):
        assert said in result.predict([what])[0].error


def test_one_bad_file_among_many_is_named_and_passed_over(result, image, broken):
    with pytest.warns(UserWarning, match="1 of 41 images cannot be read, the first: .*broken.png"):
        found = result.predict([*[image] * 20, broken, *[image] * 20])
    assert [i for i, p in enumerate(found) if p.error] == [20] and "broken.png: cannot be read as an image" in found[20].error
    assert found[20] == Prediction(str(broken), error=found[20].error) and found[20].label is None
    assert {p.label for p in found if not p.error} == {"waves"}
    with pytest.raises(SFTError, match="broken.png"):
        result.predict(broken)


def test_an_image_that_is_cut_off_and_comes_open_is_passed_over_too(result, image, tmp_path):
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:900])
    with pytest.warns(UserWarning, match="cut.png"):
        found = result.predict([Image.open(tmp_path / "cut.png"), image])
    assert found[0].path == str(tmp_path / "cut.png") and found[0].error and found[1].label == "waves"


def test_results_stream_and_memory_stays_flat(result, image):
    x, drawn = np.asarray(Image.open(image)), itertools.count()
    def endless():
        while True:
            next(drawn)
            yield x
    found = list(itertools.islice(result.predict_stream(endless(), batch_size=4), 10))
    assert [p.path for p in found] == [f"image {i}" for i in range(10)] and next(drawn) == 12


def test_an_array_that_is_written_anew_for_every_image(result, folder):
    "As cameras and video readers do it."
    files = [folder / c / f"{i:02}.png" for i in range(4) for c in ("stripes", "waves")]
    frame = np.empty((72, 72, 3), np.uint8)
    def frames():
        for f in files:
            frame[:] = np.asarray(Image.open(f))
            yield frame
    assert [p.probabilities for p in result.predict(frames())] == [p.probabilities for p in result.predict(files)]


def test_the_given_image_stays_as_it_is(result, image):
    with Image.open(image) as im, open(image, "rb") as f:
        want = result.predict(im)
        assert im.size == (72, 72) and result.predict(im) == want
        assert result.predict(f).label == result.predict(f).label == want.label and not f.closed


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_batch_does_not_matter(result, folder, batch):
    want = [p.probabilities for p in result.predict(folder)]
    got = [p.probabilities for p in result.predict_stream(folder, batch_size=batch)]
    assert len(got) == len(want) and all(g == pytest.approx(w, abs=1e-5) for g, w in zip(got, want))


def test_the_most_probable_classes(result, image):
    every, best = result.predict(image), result.predict(image, top=2)
    order = sorted(every.probabilities, key=every.probabilities.get, reverse=True)
    assert list(every.probabilities) == result.classes and list(best.probabilities) == order[:2]
    assert best.label == order[0] and len(result.predict(image, top=9).probabilities) == 3
    for wrong in ({"top": 0}, {"top": -1}):
        with pytest.raises(SFTError, match="use a whole number from 1"):
            result.predict(image, **wrong)


def test_a_table(result, folder, broken):
    files = [folder / "waves" / "00.png", broken, folder / "stripes" / "00.png"]
    table = result.predict_frame(files, top=2)
    assert list(table) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert table.path.tolist() == [str(f) for f in files] and table.label[0] == "waves" and table.label[2] == "stripes"
    assert table.label.isna().tolist() == table.error.notna().tolist() == [False, True, False]
    for i in (0, 2):
        best = result.predict(files[i], top=2).probabilities
        assert [table.label[i], table.label_2[i]] == list(best)
        assert [table.probability[i], table.probability_2[i]] == pytest.approx(list(best.values()), abs=1e-5)
    assert len(list(result.predict_frame(files[0], top=99))) == 2 + 2 * 3


def test_predictions_can_be_compared_and_kept_in_sets(result, image):
    assert len({result.predict(image), result.predict(image)}) == 1
    assert result != load_artifact(result.folder) and len({result, result}) == 1


# ---- addresses

@pytest.fixture
def server(folder):
    asked = []
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): asked.append(self.path)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_nothing_is_fetched_unasked(result, server, image):
    url, asked = server
    with pytest.raises(SFTError, match="nothing is fetched unasked; give allow_url=True"):
        result.predict(f"{url}/waves/00.png")
    with pytest.warns(UserWarning, match="nothing is fetched"):
        result.predict([f"{url}/waves/00.png".replace("http", "HTTP")])
    assert asked == []
    assert result.predict(f"{url}/waves/00.png", allow_url=True).probabilities == result.predict(image).probabilities
    with pytest.warns(UserWarning, match="404"):
        found = result.predict([f"{url}/gone.png", f"{url}/waves/00.png"], allow_url=True)
    assert "gone.png" in found[0].error and found[1].label == "waves"
    with pytest.raises(SFTError, match="it is a web page"):
        result.predict(f"{url}/waves/", allow_url=True)


def test_a_home_folder_is_written_out(result, image, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "leaf.png").write_bytes(image.read_bytes())
    assert result.predict("~/leaf.png").label == "waves"
    monkeypatch.chdir(tmp_path)
    Path("~leaf.png").write_bytes(image.read_bytes())
    assert result.predict("~leaf.png").label == "waves"


# ---- alone or not, and under whatever the host has set

@pytest.mark.slow
@pytest.mark.parametrize("which", ["result", "wide"])
def test_many_threads_at_once(which, folder, request):
    network, files = request.getfixturevalue(which), sorted(folder.rglob("*.png"))
    want = [network.predict(f).probabilities for f in files]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda f: network.predict(f).probabilities, files * 3))
    wrong = sum(g != pytest.approx(w, abs=1e-4) for g, w in zip(got, want * 3))
    assert wrong == 0, f"{wrong} of {len(got)} differ"


def test_a_network_that_is_being_trained_keeps_its_modes(result, image):
    want = result.predict(image).probabilities
    again = load_artifact(result.folder)
    again.model.train()
    before = [m.training for m in again.model.modules()]
    assert again.predict(image).probabilities == want and [m.training for m in again.model.modules()] == before
    first = next(m for m in again.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.eval()
    assert again.predict(image).probabilities == want and not first.training and again.model.training


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("host", ["doubles", "elsewhere"])
def test_the_hosts_defaults_change_nothing(result, image, host, request):
    want = result.predict(image)
    request.getfixturevalue(host)
    assert result.predict(image) == want and load_artifact(result.folder).predict(image) == want


@pytest.mark.parametrize("host", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_the_hosts_contexts_change_nothing(result, image, folder, tmp_path, host):
    want = result.predict(image)
    with host():
        again = load_artifact(result.folder)
        assert result.predict(image) == want and again.predict(image) == want
        assert load_artifact(again.save(tmp_path / "copy")).predict(image) == want
    assert not next(again.model.parameters()).is_inference()


# ---- greys of more than eight bits

def test_the_range_of_greys_goes_with_the_artifact(folder, tmp_path):
    "Twelve bits in sixteen: the range that the data set fills is in the card, and an image alone is scaled by it."
    for f in sorted(folder.rglob("*.png")):
        grey = np.asarray(Image.open(f).convert("L")).astype(np.uint16) * 16
        (tmp_path / "deep" / f.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(tmp_path / "deep" / f.parent.name / f.name)
    made = fine_tune(tmp_path / "deep", out=tmp_path / "out", size=64, phases=HEAD)
    again = load_artifact(tmp_path / "out")
    low, high = again.card["preprocessing"]["levels"]
    assert low >= 0 and 3000 < high <= 4095
    files = [tmp_path / "deep" / f for f in made.test.paths]
    got = [list(p.probabilities.values()) for p in again.predict(files)]
    assert np.allclose(got, made.test.probabilities, atol=.02)


# ---- the case

@pytest.mark.skipif(not (CASES / "hard").is_dir(), reason="the cases are not here")
def test_every_input_of_the_case(tmp_path):
    fine_tune(CASES / "hard", out=tmp_path / "m", size=64, phases=HEAD)
    made, a = load_artifact(tmp_path / "m"), CASES / "hard" / "a"
    f = a / "0.jpg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        several = {"generator": a.glob("*.jpg"), "folder": str(a), "names": np.array([str(f), str(f)]), "empty": []}
        found = {name: made.predict(what) for name, what in several.items()}
        assert {name: len(v) for name, v in found.items()} == {"generator": 20, "folder": 20, "names": 2, "empty": 0}
        for what in (Image.open(f), np.asarray(Image.open(f)), f.read_bytes(), io.BytesIO(f.read_bytes())):
            assert made.predict(what).label == made.predict(f).label
    with pytest.warns(UserWarning, match="README"):
        found = made.predict([f, CASES / "README", CASES / "hard" / "b" / "0.jpg"])
    assert [bool(p.error) for p in found] == [False, True, False]
