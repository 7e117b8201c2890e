"On a machine without a GPU: the whole recipe on tensors that say they lie on one. `fake_gpu.py` says what that cannot see."
import numpy as np
import pytest
import torch
from conftest import draw
from fake_gpu import OnGPU, gpu

from sft_course import FineTuner, Phase, load_artifact, load_settings


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with gpu() as waits:
        a = torch.arange(6., device="cuda").view(2, 3)
        assert a.device == torch.device("cuda:0") and (a + 1).device == a.device and isinstance(a.sum(), OnGPU)
        with pytest.raises(RuntimeError, match="two devices"):
            a + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.nn.Linear(3, 2)(a)
        with pytest.raises((RuntimeError, TypeError)):
            a.numpy()
        assert not waits
        assert a.sum().item() == 15 and a.cpu().numpy().shape == (2, 3) and a[np.array([1])].tolist() == [[3., 4., 5.]]
        assert sum(waits.values()) == 4
        waits.clear()
        assert isinstance(torch.ones(2).pin_memory().to("cuda", non_blocking=True), OnGPU) and not waits
        torch.ones(2).pin_memory().to("cuda"), torch.ones(2).to("cuda", non_blocking=True)
        assert waits == {"to the GPU": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images") / "stripes", n=15)


TRIED = Phase(3, epochs=1, batch_size=8, views=0, trial=True), Phase(3, epochs=1, batch_size=8, views=2)


@pytest.mark.slow
@pytest.mark.parametrize("phases", [(Phase("head"), *TRIED), (Phase("all", epochs=1, views=0, batch_stats=True),)], ids=["recipe", "scratch"])
def test_a_run_on_the_gpu_ends_as_one_on_the_processor(images, tmp_path, phases):
    def run(device):
        tuner = FineTuner(images, "lite0", out=tmp_path / device, size=64, settings=load_settings(device=device))
        return tuner.run(*phases)
    whole = run("cpu")
    with gpu():
        result = run("cuda")
        image = next(iter(sorted(images.rglob("*.jpg"))))
        assert next(result.model.parameters()).device.type == "cuda" and result.accuracy == whole.accuracy
        said = load_artifact(tmp_path / "cuda", "cuda").predict(image)
        assert said.label == whole.predict(image).label
        assert list(said.probabilities.values()) == pytest.approx(list(whole.predict(image).probabilities.values()), abs=.05)


@pytest.mark.slow
def test_a_step_does_not_wait_for_the_gpu(images):
    def waited(batch_size, views):
        with gpu() as waits:
            tuner = FineTuner(images, "lite0", size=64, settings=load_settings(device="cuda"))
            tuner.run_phase(Phase(3, epochs=1, batch_size=batch_size, views=views))
            return dict(waits)
    for views in (0, 2):
        waited(4, views)  # what is kept is computed
        assert waited(4, views) == waited(8, views)
