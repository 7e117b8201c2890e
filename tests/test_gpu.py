"On a machine with an NVIDIA GPU, `make gpu`: what the stand-in of test_on_gpu.py cannot see. Elsewhere all of it is skipped."
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import draw, draw_flowers
from test_tasks import HOW, TASKS, WRITE

from sft_course import FineTuner, Phase, fine_tune, load_artifact, load_settings
from sft_course.tools import steps
from sft_course.tools.chat_run import fine_tune_chats
from sft_course.tools.garden_notes import draw_notes, note_chat
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError
from sft_course.tools.task_run import fine_tune_task, open_task
from sft_course.tools.transfers import DeviceRows, sent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
SIZE = 96


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images") / "stripes", n=60)


def settings(device, **more):
    return load_settings(device=device, **more)


PHASES = Phase("head"), Phase(6, epochs=2, batch_size=8)


def tuned(images, out, device="cuda", **more):
    return FineTuner(images, "lite0", out=out, size=SIZE, settings=settings(device), **more).run(*PHASES)


def test_rows_on_the_gpu_are_those_of_the_array():
    array = np.random.default_rng(0).integers(0, 255, (50, 4, 4, 3), np.uint8)
    at = np.array([7, 0, 7, 49])
    for share in (.25, 0.):  # moved as a whole, and a batch at a time
        rows = DeviceRows(array, "cuda", share)
        assert torch.is_tensor(rows.array) == (share > 0)
        assert rows[at].device.type == "cuda" and np.array_equal(rows[at].cpu().numpy(), array[at])
    assert sent(torch.arange(3), "cuda").tolist() == [0, 1, 2]


@pytest.mark.parametrize("views", [0, 2])
def test_no_step_waits_for_the_gpu(images, monkeypatch, views):
    "torch itself raises where the processor would wait."
    asked = []

    def strictly(work):
        def inside(*args, **how):
            asked.append(torch.cuda.set_sync_debug_mode("error"))
            try:
                return work(*args, **how)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return inside

    monkeypatch.setattr(steps, "within_memory", strictly(steps.within_memory))
    monkeypatch.setattr(torch.optim.AdamW, "step", strictly(torch.optim.AdamW.step))
    FineTuner(images, "lite0", size=SIZE, settings=settings("cuda")).run_phase(Phase(3, epochs=1, views=views, batch_size=8))
    assert len(asked) >= 20
    with pytest.raises(RuntimeError, match="synchroni"):
        strictly(lambda: torch.ones(1, device="cuda").item())()


def test_a_run_ends_as_on_the_processor_and_its_artifact_moves(images, tmp_path):
    results = {device: tuned(images, tmp_path / device, device) for device in ("cpu", "cuda")}
    assert abs(results["cpu"].accuracy - results["cuda"].accuracy) <= .1
    heads = [r.card["metrics"]["head_accuracy"] for r in results.values()]
    assert abs(heads[0] - heads[1]) <= .05
    some = sorted(images.rglob("*.jpg"))[:5]
    said = [[list(p.probabilities.values()) for p in load_artifact(tmp_path / "cuda", device).predict(some)] for device in ("cpu", "cuda")]
    assert np.allclose(*said, atol=.02)


def test_tuning_computes_in_bfloat16_where_the_gpu_does(images, monkeypatch):
    kinds, usual = set(), torch.nn.functional.conv2d

    def seen(x, *args, **how):
        out = usual(x, *args, **how)
        if torch.is_grad_enabled():
            kinds.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", seen)
    FineTuner(images, "lite0", size=SIZE, settings=settings("cuda")).run_phase(Phase(3, epochs=1, views=0))
    wanted = steps.native_bfloat16("cuda") or torch.float32
    assert wanted in kinds or not kinds


def test_the_same_seed_gives_the_same_weights_and_a_stopped_run_goes_on_to_them(images, tmp_path):
    def end(result):
        return {k: v.cpu() for k, v in result.model.state_dict().items()}

    def stops(row):
        if row["phase"] == 1 and row["epoch"] == 1:
            raise KeyboardInterrupt

    a, b = end(tuned(images, tmp_path / "a")), end(tuned(images, tmp_path / "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(KeyboardInterrupt):
        tuned(images, tmp_path / "c", watch=stops)
    c = end(FineTuner(images, "lite0", out=tmp_path / "c", size=SIZE, settings=settings("cuda")).run(*PHASES, resume=True))
    assert all(torch.equal(a[k], c[k]) for k in a)


def test_too_little_memory_ends_in_smaller_parts_or_in_a_sentence(images):
    tuner = FineTuner(images, "lite0", size=160, settings=settings("cuda"))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.2e9) / total)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuner.run_phase(Phase("all", epochs=2, views=0, batch_size=64))
        assert sum("memory is short" in str(w.message) for w in said) >= 1
        assert len(tuner.history) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)


def test_where_one_image_is_too_much_blocks_are_computed_again():
    "The memory that is there lies between what one image takes plainly and what it takes with gradient checkpointing."
    net = open_backbone("lite0").model.cuda().eval()
    x = torch.randn(1, 3, 1024, 1024, device="cuda")

    def gradients(rows):
        net.zero_grad(set_to_none=True)
        net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    def most(again):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = steps.within_memory(gradients, steps.RowsAtATime(1, again), 1, net)
        return found, torch.cuda.max_memory_allocated() - before

    wanted, plainly = most(False)
    found, few = most(True)
    assert few < plainly / 2 and all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(wanted, found))
    net.zero_grad(set_to_none=True)
    del wanted, found
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + few + (plainly - few) / 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    at = steps.RowsAtATime(1)
    try:
        with pytest.warns(UserWarning, match="computed again in the backward pass"):
            steps.within_memory(gradients, at, 1, net)
        assert at.again
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)


def test_a_gpu_that_is_not_there_is_one_sentence(images):
    with pytest.raises(SFTError, match="counts from 0"):
        FineTuner(images, "lite0", settings=settings(f"cuda:{torch.cuda.device_count()}"))


def test_the_command_line(images, tmp_path):
    def call(*words):
        done = subprocess.run([sys.executable, "-m", "sft_course", *map(str, words)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    assert "on cuda" in call("fit", images, "--out", tmp_path / "out", "--device", "cuda", "--image-size", SIZE)
    assert "stripes" in call("predict", tmp_path / "out", *sorted(images.rglob("*.jpg"))[:2])


def test_default_recipe_of_a_backbone_with_other_parts(images):
    "A vision transformer with random weights: attention, layer norm, no batch norm to fold."
    vit = open_backbone("vit_tiny_patch16_224", weights=None)
    result = fine_tune(images, vit, settings=settings("cuda"), phases=(Phase("head"), Phase(2, epochs=1)), size=224)
    assert np.isfinite(result.card["metrics"]["loss"])


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks(task, tmp_path):
    flowers = draw_flowers(16)
    (tmp_path / task).mkdir()
    data = WRITE[task](tmp_path / task, flowers)
    fine_tune_task(data, task, tmp_path / "out", device="cuda", **HOW[task])
    image = next(iter(sorted((tmp_path / task).rglob("*.png"))))
    assert open_task(tmp_path / "out").predict([image])


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_chats(tmp_path, adapter):
    pytest.importorskip("transformers")
    chats = [note_chat(note) for note in draw_notes(24)]
    result = fine_tune_chats(chats, tmp_path / "chat", device="cuda", epochs=1, layers=1, adapter=adapter)
    assert result.chat("Hello", max_new_tokens=3) is not None
