"What the notebooks on shipping do not show: faults of exports, of the server's clients, of the card and of the commands."
import asyncio
import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from sft_course.shipping import Agreement, Batcher, Busy, Shipped, agreement, require_agreement
from sft_course.tools.settings import SFTError

pytest.importorskip("onnxruntime")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")


def a_network(classes=3):
    "A small convolution in place of a backbone."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def a_module(**how):
    return Shipped(a_network(), (.5, .4, .3), (.2, .3, .4), 16, .875, **how).eval()


def squares(n=5, side=18, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def a_png(side=40, seed=0):
    file = io.BytesIO()
    Image.fromarray(squares(1, side, seed)[0]).save(file, "PNG")
    return file.getvalue()


def a_predictor(run=None, kind="image"):
    from sft_course.tools.serving import Predictor, read_upload
    net = a_module()

    def ask(items):
        with torch.no_grad():
            return net(torch.from_numpy(np.stack(items))).numpy()

    return Predictor(kind, ["a", "b", "c"], lambda data, limits: read_upload(data, limits, 18), run or ask,
                   {"model": "x", "kind": kind, "classes": ["a", "b", "c"], "calibrated": False, "accuracy": None})


def loop_of(coroutine):
    return ThreadPoolExecutor(1).submit(asyncio.run, coroutine).result(30)


# The module

def test_a_module_gives_probabilities_for_one_and_for_many():
    net, x = a_module(temperature=2.), torch.from_numpy(squares())
    with torch.no_grad():
        many, one = net(x), net(x[:1])
    assert net.side == 18 and many.shape == (5, 3)
    assert torch.allclose(many.sum(1), torch.ones(5)) and torch.allclose(many[:1], one, atol=1e-6)


def test_a_mirrored_image_gets_the_same_answer():
    net, x = a_module(), torch.from_numpy(squares())
    with torch.no_grad():
        assert torch.allclose(net(x), net(x.flip(2)), atol=1e-6)
        plain = a_module(mirrored=False)
        assert not torch.allclose(plain(x), plain(x.flip(2)), atol=1e-4)


def test_the_temperature_changes_no_class():
    x = torch.from_numpy(squares())
    with torch.no_grad():
        cold, hot = a_module(temperature=.5)(x), a_module(temperature=3.)(x)
    assert (cold.argmax(1) == hot.argmax(1)).all() and (cold.max(1).values > hot.max(1).values).all()


# The gate

def test_what_is_no_number_never_agrees():
    p = np.full((2, 2), .5)
    q = p.copy()
    q[1, 0] = np.nan
    found = agreement(p, q)
    assert found.largest == np.inf
    with pytest.raises(SFTError, match="does not say"):
        require_agreement("x", found)


def test_other_shapes_are_refused():
    with pytest.raises(SFTError, match="shape"):
        agreement(np.zeros((2, 3)), np.zeros((2, 2)))


def test_rounding_passes_and_another_class_does_not():
    require_agreement("x", Agreement(100, 0, 1e-5))
    require_agreement("x", Agreement(100, 1, 1e-5))  # a tie
    for wrong in (Agreement(100, 0, .01), Agreement(100, 50, 1e-5)):
        with pytest.raises(SFTError, match="was not written"):
            require_agreement("x", wrong)


def a_result(classes=3):
    from sft_course.backbones import new_head
    from sft_course.tools.opening import open_backbone
    from sft_course.tools.predict import Result
    net = new_head(open_backbone(), classes, seed=0, std=.02)
    net.model.eval()
    card = {"classes": [f"c{i}" for i in range(classes)], "backbone": "lite0", "head": "last", "metrics": {"accuracy": .5, "n_test": 20},
            "preprocessing": {"size": 64, "crop": .875, "mean": list(net.mean), "std": list(net.std), "levels": None}}
    return Result(net, card, [])


def test_a_format_that_is_not_known_and_no_images(tmp_path):
    from sft_course.tools.exporting import export
    with pytest.raises(SFTError, match="'coreml'.*onnx, torch, timm, transformers, keras"):
        export(a_result(), "coreml", tmp_path, squares(side=74))
    with pytest.raises(SFTError, match="no images"):
        export(a_result(), "onnx", tmp_path, squares(0))


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path):
    import sft_course.tools.extras as extras
    from sft_course.tools.exporting import export
    from sft_course.tools.serving import make_app

    def missing(name):
        return None if name in ("onnx", "fastapi") else object()

    with patch.object(extras, "find_spec", missing):
        with pytest.raises(SFTError, match=r"onnx is not installed.*sft_course\[export\]"):
            export(a_result(), "onnx", tmp_path, squares(2, 74))
        with pytest.raises(SFTError, match=r"fastapi is not installed.*sft_course\[serve\]"):
            make_app(a_predictor())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_torch_file_that_disagrees_leaves_what_was_there(tmp_path):
    from sft_course.tools import exporting
    result, images = a_result(), squares(3, 74)
    first = exporting.export(result, "torch", tmp_path, images)
    before = first.path.read_bytes()
    write = exporting.write_torch
    with patch.object(exporting, "write_torch", lambda net, said, path: write(exporting.shipped(result, 3.), said, path)):
        with pytest.raises(SFTError, match="model.pt2"):
            exporting.export(result, "torch", tmp_path, images)
    assert first.path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# The batcher

def test_everyone_gets_their_own_row():
    async def run():
        async with Batcher(lambda items: [i * i for i in items], most=4) as batcher:
            return await asyncio.gather(*(batcher(i) for i in range(50)))

    assert loop_of(run()) == [i * i for i in range(50)]


def test_an_item_that_fails_fails_alone():
    def run(items):
        if 3 in items:
            raise ValueError("three")
        return items

    async def ask():
        async with Batcher(run, most=8) as batcher:
            return await asyncio.gather(*(batcher(i) for i in range(8)), return_exceptions=True)

    said = loop_of(ask())
    assert isinstance(said[3], ValueError) and said[:3] + said[4:] == [0, 1, 2, 4, 5, 6, 7]


def test_who_finds_the_line_full_is_told_so_and_who_leaves_is_not_computed():
    seen = []

    def slow(items):
        seen.extend(items)
        time.sleep(.2)
        return items

    async def ask():
        async with Batcher(slow, most=1, line=2) as batcher:
            first = asyncio.ensure_future(batcher(0))
            await asyncio.sleep(.05)
            waiting = [asyncio.ensure_future(batcher(i)) for i in (1, 2)]
            await asyncio.sleep(.01)
            with pytest.raises(Busy):
                await batcher(3)
            waiting[0].cancel()
            return await first, await waiting[1]

    assert loop_of(ask()) == (0, 2) and seen == [0, 2]


# The server

def test_limits_are_answers(tmp_path):
    from sft_course.tools.clients import png_that_says
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(bytes=20_000, pixels=10_000)) as url:
        assert httpx.post(f"{url}/predict", content=a_png(40)).json()["label"] in "abc"
        large = httpx.post(f"{url}/predict", content=bytes(30_000))
        huge = httpx.post(f"{url}/predict", content=png_that_says(60_000, 60_000))
        wide = httpx.post(f"{url}/predict", content=png_that_says(200, 200))
        nothing = httpx.post(f"{url}/predict", content=b"")
        form = httpx.post(f"{url}/predict", data={"file": "no file"})
        assert httpx.get(f"{url}/predict").status_code == 405 and httpx.get(f"{url}/../etc/passwd").status_code == 404
        chunks = httpx.post(f"{url}/predict", content=(bytes(1000) for _ in range(30)))  # no length is said
    assert large.status_code == chunks.status_code == 413 and "0.02 MB" in large.json()["error"]
    assert {r.status_code for r in (huge, wide, nothing, form)} == {422}
    assert all("0.01 million pixels" in r.json()["error"] for r in (huge, wide)) and "empty" in nothing.json()["error"]


def test_a_form_and_the_bytes_themselves_are_the_same():
    from sft_course.tools.serving import serving
    with serving(a_predictor()) as url:
        bare = httpx.post(f"{url}/predict", content=a_png()).json()
        form = httpx.post(f"{url}/predict", files={"file": ("x.png", a_png(), "image/png")}).json()
    assert bare["probabilities"] == form["probabilities"]


def test_a_fault_of_the_network_is_an_answer_and_the_server_goes_on():
    from sft_course.tools.serving import serving
    calls = []

    def once(items):
        calls.append(len(items))
        if len(calls) == 1:
            raise RuntimeError("secret detail")
        return np.tile(np.float32([.2, .5, .3]), (len(items), 1))

    with serving(a_predictor(once)) as url:
        bad, good = (httpx.post(f"{url}/predict", content=a_png()) for _ in range(2))
        numbers = httpx.get(f"{url}/metrics").text
    assert bad.status_code == 500 and "secret" not in bad.text and good.json()["label"] == "b"
    assert 'route="/predict",status="500"} 1.0' in numbers and 'route="/predict",status="200"} 1.0' in numbers


def test_a_full_line_is_503_and_nobody_is_lost():
    from sft_course.tools.clients import load
    from sft_course.tools.serving import Limits, serving

    def slow(items):
        time.sleep(.05)
        return np.tile(np.float32([.2, .5, .3]), (len(items), 1))

    with serving(a_predictor(slow), Limits(batch=1, waiting=2)) as url:
        said = load(url, [a_png()], 40, 20)
        assert httpx.post(f"{url}/predict", content=a_png()).status_code == 200
    assert set(said.status) == {200, 503} and len(said) == 40
    assert all("come again" in json.loads(a)["error"] for a in said[said.status == 503].answer)


def test_slow_and_hostile_clients_cost_the_others_nothing():
    from sft_course.tools.clients import Slow, hostile, load
    from sft_course.tools.serving import Limits, serving
    uploads = [body for bad in hostile(100) for body in (bad, a_png())]
    with serving(a_predictor(), Limits(seconds=1.5)) as url:
        with Slow(url, 6, 20.) as slow:
            said = load(url, uploads, 200, 32)
    assert set(slow.statuses) == {408}
    assert set(said[said.body % 2 == 1].status) == {200} and set(said[said.body % 2 == 0].status) == {422}
    assert said[said.body % 2 == 1].answer.map(lambda a: json.loads(a)["label"]).nunique() == 1


def test_slow_headers_are_cut_off_and_counted():
    from sft_course.tools.clients import Slow, load
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(seconds=1.)) as url:
        with Slow(url, 6, 20., headers=True) as slow:
            said = load(url, [a_png()], 40, 8)
        numbers = httpx.get(f"{url}/metrics").text
    assert set(slow.statuses) == {408} and set(said.status) == {200}
    assert 'sft_requests_total{route="other",status="408"} 6.0' in numbers


def heard(s, seconds=5.):
    "All that a server says until it closes the connection."
    s.settimeout(seconds)
    parts = []
    while part := s.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_silence_and_a_slow_second_request_end_too():
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(seconds=.5)) as url:
        place = "127.0.0.1", int(url.rsplit(":", 1)[1])
        with socket.create_connection(place) as silent:
            assert heard(silent) == b""
        with socket.create_connection(place) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert s.recv(65536).startswith(b"HTTP/1.1 200")
            s.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
            answer = heard(s)
        head, _, body = answer[answer.index(b"HTTP/1.1 408 "):].partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert "headers took longer than 0.5 seconds" in json.loads(body)["error"]


def test_a_body_that_follows_an_answer_ends_too():
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(seconds=.5)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            answer = s.recv(65536)
            s.sendall(b"x")
            answer += heard(s)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1


def test_a_slow_answer_is_not_cut_off():
    from sft_course.tools.serving import Limits, serving

    def slow(items):
        time.sleep(1.)
        return np.tile(np.float32([.2, .5, .3]), (len(items), 1))

    with serving(a_predictor(slow), Limits(seconds=.3)) as url, httpx.Client() as client:
        assert [client.post(f"{url}/predict", content=a_png()).status_code for _ in range(2)] == [200, 200]


def test_there_are_only_so_many_connections():
    from sft_course.tools.serving import Limits, serving
    with serving(a_predictor(), Limits(connections=4, seconds=20.)) as url:
        place = "127.0.0.1", int(url.rsplit(":", 1)[1])
        idle = [socket.create_connection(place) for _ in range(4)]
        time.sleep(.2)
        assert httpx.get(f"{url}/health").status_code == 503
        more = [socket.create_connection(place) for _ in range(4)]
        assert heard(more[-1]) == b""
        for s in idle + more:
            s.close()
        time.sleep(.2)
        assert httpx.get(f"{url}/health").status_code == 200


def test_the_nearest_images_are_asked_for_by_a_route_of_their_own():
    from dataclasses import replace

    from sft_course.tools.serving import page, serving
    one = {"label": "<b>a</b>", "similarity": .98765, "image": b"\xff\xd8 a file"}
    with serving(a_predictor()) as url:
        assert httpx.post(f"{url}/nearest", content=a_png()).status_code == 404
    with serving(replace(a_predictor(), nearest=lambda items: [[one] * 3 for _ in items])) as url:
        said = httpx.post(f"{url}/nearest", content=a_png()).json()
        assert httpx.post(f"{url}/nearest", content=b"").status_code == 422
        assert httpx.post(f"{url}/predict", content=a_png()).json()["label"] in "abc"
    assert [n["similarity"] for n in said["nearest"]] == [.9877] * 3 and base64.b64decode(said["nearest"][0]["image"]) == one["image"]
    assert 'id="near"' not in page(a_predictor())


def test_known_images_of_a_folder(tmp_path):
    from sft_course.tools import serving
    from sft_course.tools.known_images import known_images
    rng = np.random.default_rng(0)
    for k in range(2):
        (tmp_path / "data" / f"c{k}").mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "data" / f"c{k}" / f"{i}.png")
    result = a_result()
    known = known_images(result, tmp_path / "data", most=4)
    assert len(known) == 4 and sorted(known.labels) == ["c0", "c0", "c1", "c1"]
    found = known.nearest(squares(2, 74), k=9)
    assert [len(f) for f in found] == [4, 4] and all(Image.open(io.BytesIO(n["image"])).size == (112, 112) for n in found[0])
    out = result.save(tmp_path / "m")
    with patch.object(serving, "load_artifact", wraps=serving.load_artifact) as opened:
        assert serving.open_predictor(out, tmp_path / "data").about["known_images"] == 6
    assert opened.call_count == 1  # hashing and building the network takes a while
    with pytest.raises(SFTError, match="nowhere"):
        serving.open_predictor(out, tmp_path / "nowhere")
    with patch.object(serving, "is_text_model", lambda folder: True), pytest.raises(SFTError, match="leave --images out"):
        serving.open_predictor(out, tmp_path / "data")


def test_the_temperature_in_the_card_is_used(tmp_path):
    from sft_course.tools.serving import open_predictor
    result = a_result()
    plain = open_predictor(result.save(tmp_path / "plain"))
    result.card["temperature"] = 2.
    cold = open_predictor(result.save(tmp_path / "cold"))
    assert not plain.about["calibrated"] and cold.about["calibrated"]
    images = list(squares(3, 74))
    assert (cold.run(images).max(1) < plain.run(images).max(1)).all()


def test_clients_that_hang_up_are_forgotten():
    from sft_course.tools.serving import serving
    with serving(a_predictor()) as url:
        port = int(url.rsplit(":", 1)[1])
        for sent in (b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\nhalf", b"\0\1\2 nonsense\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(sent)
        assert httpx.post(f"{url}/predict", content=a_png()).status_code == 200
    assert not [t for t in threading.enumerate() if t.name.startswith("uvicorn")]


def test_the_page_needs_nothing_else_and_shows_names_as_text():
    from dataclasses import replace

    from sft_course.tools.serving import page
    predictor = replace(a_predictor(), about=a_predictor().about | {"model": "<script>alert(1)</script>", "accuracy": .91, "n_test": 7})
    text = page(predictor)
    assert "<script>alert(1)" not in text and "0.910" in text
    assert not [w for w in ("http:", "https:", "//", "@import", "url(") if w in text]
    assert "textarea" in page(replace(predictor, kind="text"))


def test_texts(tmp_path):
    from sft_course.tools.serving import Limits, Predictor, serving

    def read(text, limits):
        if not isinstance(text, str):
            raise SFTError("a text must be a string in quotes.")
        return text

    def run(texts):
        return np.float32([[len(t) > 3, len(t) <= 3] for t in texts])

    predictor = Predictor("text", ["long", "short"], read, run, {"model": "x", "kind": "text", "calibrated": False})
    with serving(predictor, Limits(texts=3)) as url:
        good = httpx.post(f"{url}/predict", json={"texts": ["ab", "abcdef"]})
        bad = [httpx.post(f"{url}/predict", content=c) for c in (b"", b"[", b"{}", b'{"texts": []}', b'{"texts": [1]}', b"[" * 9999,
                                                                b'{"texts": ["a", "b", "c", "d"]}')]
    assert [p["label"] for p in good.json()["predictions"]] == ["short", "long"]
    assert {b.status_code for b in bad} == {422} and all(b.json()["error"] for b in bad)


# The card and the commands

def test_a_card_of_a_folder_and_no_card_over_someone_elses(tmp_path):
    from sft_course.tools.model_card import model_card, push_to_hub, write_model_card
    out = a_result().save(tmp_path / "m")
    text = model_card(out, license="apache-2.0", intended="For tests | <b>only</b>.")
    assert "license: apache-2.0" in text and "<b>" not in text
    write_model_card(out, text)
    write_model_card(out, text)
    (out / "README.md").write_text("mine")
    with pytest.raises(SFTError, match="not written by sft_course"):
        write_model_card(out, text)
    with pytest.raises(SFTError, match="owner/name"):
        push_to_hub(out, "a name")


def an_app():
    import typer

    from sft_course.tools import shipping_commands as commands
    app = typer.Typer()
    for command in (commands.export, commands.card, commands.push, commands.serve):
        app.command()(command)
    return app


@pytest.mark.slow
def test_commands_on_an_artifact(tmp_path):
    from sft_course.tools.model_card import HubStandIn
    rng = np.random.default_rng(0)
    for k in range(3):
        (tmp_path / "data" / f"c{k}").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "data" / f"c{k}" / f"{i}.png")
    out = a_result().save(tmp_path / "m")
    run = CliRunner().invoke
    none = run(an_app(), ["export", str(out)])
    assert isinstance(none.exception, SFTError) and "--data" in str(none.exception)
    done = run(an_app(), ["export", str(out), "--to", "torch", "--data", str(tmp_path / "data"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["temperature"] == 1 and [r["images"] for r in said["rows"]] == [12, 12] and (out / "model.pt2").is_file()
    assert run(an_app(), ["card", str(out)]).exit_code == 0 and "model.pt2" in (out / "README.md").read_text()
    with HubStandIn() as hub:
        pushed = run(an_app(), ["push", str(out), "me/m", "--endpoint", hub.url], env={"HF_TOKEN": "hf_x"})
    assert pushed.exit_code == 0, pushed.output
    assert {"README.md", "card.json", "model.safetensors", "model.pt2"} <= set(hub.files) and hub.private


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    out = a_result().save(tmp_path / "m")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = CliRunner().invoke(an_app(), ["serve", str(out), "--port", str(s.getsockname()[1])])
    assert isinstance(done.exception, SFTError) and "--port" in str(done.exception)
