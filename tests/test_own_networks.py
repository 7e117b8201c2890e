"Weights and networks as people bring them: checkpoints of trainers, modules of their own, names of the Hub, sizes that a network does not take."
import argparse
import collections
import copy
import pathlib
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sft_course.backbones import new_head
from sft_course.tools.costs import stage_costs
from sft_course.tools.opening import as_backbone, fitting_size, open_backbone
from sft_course.tools.settings import SFTError
from sft_course.tools.stages import cut_into_stages
from sft_course.tools.weights import load_weights

KIND = "resnet10t"
HALF = (.5, .5, .5)


class CfgNode(dict):
    "Settings as some trainers keep them: a class of their own."


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    return timm.create_model(KIND)


def other_head(net, classes):
    "The same body with a head for other classes."
    twin = copy.deepcopy(net)
    twin.reset_classifier(classes)
    return twin.state_dict()


def before(prefix, state):
    return collections.OrderedDict((prefix + k, v) for k, v in state.items())


def random_state():
    torch.manual_seed(4)
    return timm.create_model(KIND).state_dict()


def forms(net):
    "{name: (what is saved, what the sentence says)}"
    sd = net.state_dict()
    args = argparse.Namespace(lr=.1, out=pathlib.Path("/x"), more=types.SimpleNamespace(a=1))
    return {
        "more.pth": (sd | {"neck.weight": torch.ones(3)}, "72 of 72 tensors fit; left unused: 1, the first is neck.weight."),
        "plain.pth": (sd, "72 of 72 tensors fit"),
        "reference.pth": ({"model": sd, "optimizer": {}, "epoch": 3, "args": args}, "from 'model'"),
        "timm.pth.tar": ({"epoch": 3, "arch": KIND, "state_dict": sd, "args": args, "metric": 1.}, "from 'state_dict'"),
        "settings.pth": ({"model": sd, "cfg": CfgNode()}, "from 'model'"),
        "parallel.pth": (before("module.", sd), "without the prefix 'module.'"),
        "lightning.ckpt": ({"state_dict": before("model.", sd) | {"loss.weight": torch.ones(3)}, "epoch": 1},
                           "(from 'state_dict', without the prefix 'model.')"),
        "compiled.pth": (before("_orig_mod.module.", sd), "without the prefix '_orig_mod.module.'"),
        "inside.pth": (before("backbone.", {k: v for k, v in sd.items() if k[:2] != "fc"}) | {"decode.weight": torch.ones(2, 2)}, "it holds no head"),
        "average.pth": ({"state_dict": random_state(), "state_dict_ema": sd}, "from 'state_dict_ema'"),
        "average2.pth": ({"model": random_state(), "model_ema": before("module.", sd) | {"n_averaged": torch.tensor(3)}}, "from 'model_ema'"),
        "average3.pth": ({"ema": {"shadow": sd, "decay": .9}, "net": random_state()}, "from 'ema.shadow'"),
        "seven.pth": (other_head(net, 7), "70 of 72 tensors fit; its head of 7 classes was left out"),
        "headless.pth": ({k: v for k, v in sd.items() if k[:2] != "fc"}, "70 of 72 tensors fit; it holds no head"),
        "uncounted.pth": ({k: v for k, v in sd.items() if "num_batches" not in k}, "72 of 72 tensors fit"),
        "half.pth": ({k: v.half() if v.is_floating_point() else v for k, v in sd.items()}, "72 of 72 tensors fit"),
    }


NAMES = list(forms(timm.create_model(KIND)))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_as_people_have_them(net, tmp_path, name):
    held, said = forms(net)[name]
    torch.save(held, tmp_path / name)
    opened = open_backbone(KIND, tmp_path / name)
    assert said in opened.loaded and opened.loaded.startswith(f"weights {name}: ") and opened.loaded.endswith(".")
    mine, theirs = opened.model.state_dict(), net.state_dict()
    same = [k for k in theirs if torch.allclose(mine[k].float(), theirs[k].float(), atol=1e-3)]
    assert set(theirs) - set(same) <= {"fc.weight", "fc.bias"}
    assert ("fc.weight" in same) == ("head" not in said)


def test_safetensors_and_the_folder_of_an_artifact(net, tmp_path):
    state = before("features.model.", {k: v for k, v in net.state_dict().items() if k[:2] != "fc"})  # a head that looks at every stage
    save_file({k: v.contiguous() for k, v in (state | {"linear.weight": torch.ones(2, 9)}).items()}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        opened = open_backbone(KIND, path)
        assert "70 of 72 tensors fit" in opened.loaded and torch.equal(opened.model.conv1[0].weight, net.conv1[0].weight)


@pytest.mark.parametrize("name", ["resnet14t", "resnet26t"])
def test_a_deeper_or_shallower_network_is_another(net, tmp_path, name):
    "Every entry of the shallow one is in the deep one, with the same shape: strict=False would be content."
    for theirs, ours in ((name, KIND), (KIND, name)):
        torch.save(timm.create_model(theirs).state_dict(), tmp_path / "w.pth")
        model = timm.create_model(ours)
        was = copy.deepcopy(model.state_dict())
        with pytest.raises(SFTError, match="w.pth: .*fit this network.*; give the weights of the same model."):
            load_weights(model, tmp_path / "w.pth")
        assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items())


def test_a_whole_network_that_was_pickled(net, tmp_path):
    torch.save(net, tmp_path / "whole.pth")
    with pytest.raises(SFTError, match=r"whole.pth: not a file of tensors .*timm.models.resnet.ResNet.*; give a file that holds .*state_dict"):
        load_weights(net, tmp_path / "whole.pth")


def test_what_would_run_beside_good_weights_does_not(net, tmp_path):
    class Evil:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)
    torch.save({"model": net.state_dict(), "args": Evil()}, tmp_path / "w.pth")
    load_weights(timm.create_model(KIND), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_positions_of_another_size_are_interpolated(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), tmp_path / "v.pth")
    opened = open_backbone("vit_tiny_patch16_224", tmp_path / "v.pth", size=64)
    assert opened.size == 64 and opened.model.pos_embed.shape[1] == 17 and "its head of 5 classes was left out" in opened.loaded


# ---- sizes


def test_a_transformer_is_made_for_the_size_that_is_asked_for():
    made = open_backbone("vit_tiny_patch16_224", None, size=64)
    assert made.size == 64 and fitting_size(made, 64) == (64, "")
    assert new_head(made, 3).model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_size_that_does_not_fit_is_refused_or_gives_way():
    made = open_backbone("vit_b_32", None, size=64)  # torchvision's are made for one size
    with pytest.raises(SFTError, match=r"^size = 64: vit_b_32 takes no images of 64 × 64 pixels .*; give size = 224"):
        fitting_size(made, 64, asked=True)
    size, said = fitting_size(made, 64, asked=False)
    assert size == 224 and said.startswith("vit_b_32 takes no images of 64") and said.endswith("224 × 224.")
    small = open_backbone(KIND, None, size=64)
    assert small.size == 224 - 48 and fitting_size(small, 64) == (64, "")  # convolutions take any


# ---- names


def test_timms_own_names_on_the_hub():
    for name in ("timm/resnet10t", "hf-hub:timm/resnet10t.c3_in1k", "hf_hub:timm/resnet10t"):
        assert open_backbone(name, None).name in ("resnet10t", "resnet10t.c3_in1k")
    with pytest.raises(SFTError, match="write hf-hub:someone/net"):
        open_backbone("someone/net", None)


def on_the_hub(monkeypatch, **args):
    "As if the Hub described a network of somebody's."
    cfg = {"num_classes": 5, "input_size": (3, 160, 160), "mean": HALF, "std": HALF, "architecture": KIND, "crop_pct": .9}
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *a, **k: (dict(cfg), KIND, args or None))


def test_a_network_of_the_hub_has_the_name_of_its_kind(monkeypatch):
    on_the_hub(monkeypatch)
    opened = open_backbone("hf-hub:someone/net", None)
    assert (opened.name, opened.mean, opened.size, opened.crop) == (KIND, HALF, 160, .9) and opened.head.out_features == 5
    on_the_hub(monkeypatch, stem_width=16)  # not what the name alone would make
    assert open_backbone("hf-hub:someone/net", None).name == "hf-hub:someone/net"


def test_the_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def refuse(*a, **k):
        raise OSError("no route to host\nmore")
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", refuse)
    with pytest.raises(SFTError, match="^backbone hf-hub:someone/net: .*could not be downloaded .OSError: no route to host.*"):
        open_backbone("hf-hub:someone/net")


# ---- one's own module


class Mine(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x): return self.head(self.body(x).mean((2, 3)))


def test_a_module_of_ones_own_is_copied_and_cut():
    mine = Mine().train()
    opened = as_backbone(mine, HALF, HALF, size=32)
    assert (opened.name, opened.mean, opened.size, opened.crop) == ("Mine", HALF, 32, .875) and [s.name for s in opened.stages][-1] == "head"
    new_head(opened, 9)
    assert mine.head.out_features == 3 and mine.training and all(m.training for m in mine.modules())
    assert opened.weights.startswith("given ") and opened.weights != as_backbone(Mine(), HALF, HALF, size=32).weights


def test_a_timm_model_brings_its_preprocessing(net):
    opened = as_backbone(net)
    assert opened.name == KIND and opened.mean == (.485, .456, .406) and opened.size == 176
    assert as_backbone(timm.create_model("vit_tiny_patch16_224", img_size=64)).size == 64
    assert as_backbone(timm.create_model(KIND, stem_width=16)).name == "ResNet"  # its name alone would make another


class Dictionary(Mine):
    def forward(self, x): return {"logits": super().forward(x)}


@pytest.mark.parametrize("model, given, said", [
    (Mine(), {}, "backbone Mine: with which mean and std was it trained"),
    (Mine(), {"mean": HALF}, "with which mean and std"),
    (Mine(), {"mean": HALF, "std": (0, 1, 1)}, r"std = \(0, 1, 1\): not allowed; use three numbers above 0"),
    (Mine(), {"mean": .5, "std": HALF}, "mean = 0.5: not allowed"),
    (Mine(), {"mean": HALF, "std": HALF, "crop": 2}, "crop = 2: not allowed"),
    (Mine(), {"mean": HALF, "std": HALF, "size": 2}, r"takes no images \(2, 3, 2, 2\)"),
    (Dictionary(), {"mean": HALF, "std": HALF}, "makes dict and not logits"),
    (nn.Conv2d(3, 4, 3), {"mean": HALF, "std": HALF}, r"makes \(2, 4, 222, 222\) and not logits"),
    (nn.Flatten(), {"mean": HALF, "std": HALF}, "has no parameters"),
], ids=lambda v: "")
def test_a_module_that_cannot_be_a_backbone_is_one_sentence(model, given, said):
    with pytest.raises(SFTError, match=said) as e:
        as_backbone(model, **given)
    assert "\n" not in str(e.value) and str(e.value).endswith(".")


# ---- what the host has set, and modes


@pytest.mark.parametrize("host", ["float64", "inference", "no_grad"])
def test_a_network_is_opened_as_in_a_fresh_process(host):
    want = new_head(open_backbone(KIND, None, 1), 3, 1).model.state_dict()
    if host == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(host == "inference"), torch.set_grad_enabled(host != "no_grad"):
            net = new_head(open_backbone(KIND, None, 1), 3, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(v, want[k]) and v.dtype == want[k].dtype for k, v in net.model.state_dict().items())
    net.model(torch.ones(1, 3, 64, 64)).sum().backward()


def test_looking_at_a_network_wakes_and_sends_to_sleep_nothing():
    "Batch norms asleep in a network that trains, as fine-tuning leaves it."
    net = open_backbone(KIND, None)
    net.model.train().layer1.eval()
    modes = [m.training for m in net.model.modules()]
    for to_input in (lambda: stage_costs(net, 64), lambda: cut_into_stages(net.model, 64), lambda: fitting_size(net, 64)):
        to_input()
        assert [m.training for m in net.model.modules()] == modes


def test_a_hook_of_the_counting_is_never_left_behind():
    net = open_backbone(KIND, None)
    with pytest.raises(Exception):  # noqa: B017
        stage_costs(net, 0)
    assert not any(m._forward_pre_hooks for m in net.model.modules())
    assert cut_into_stages(net.model, 64)
