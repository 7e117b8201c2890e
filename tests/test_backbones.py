import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sft_course.backbones import new_head
from sft_course.tools.costs import stage_costs
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError
from sft_course.tools.stages import cut_into_stages
from sft_course.tools.surgery import split_at
from sft_course.tools.weights import load_weights

FAMILIES = ["lite0", "resnet18", "efficientnet_b0", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t", "densenet121", "regnet_y_400mf",
            "vit_tiny_patch16_224", "convnext_atto", "regnety_002"]


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    return open_backbone(request.param, weights=None)


def test_stages_partition_the_parameters_and_end_in_the_head(backbone):
    named = [n for n, _ in backbone.model.named_parameters()]
    staged = [n for s in backbone.stages for n in s.parameters]
    assert sorted(staged) == sorted(named) and len(set(staged)) == len(staged)
    assert len(backbone.stages) >= 4 and backbone.head.weight.shape[0] == 1000


def test_split_in_the_middle_and_below_the_head_equals_the_whole(backbone):
    x = torch.randn(2, 3, backbone.size, backbone.size)
    with torch.no_grad():
        whole = backbone.model.eval()(x)
        for stage in (len(backbone.stages) // 2, len(backbone.stages) - 1):
            lower, upper = split_at(backbone, stage)
            assert not isinstance(lower, torch.nn.Identity)
            assert torch.allclose(upper(lower(x)), whole, atol=1e-4)


def test_what_is_drawn_is_seeded_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one, two, other = (new_head(open_backbone("resnet18", None, seed), 5, seed).model.state_dict() for seed in (7, 7, 8))
    assert one["fc.weight"].shape[0] == 5 and all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"]) and not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_bundled_weights_know_ants_and_bees(photos):
    "The right normalisation: with ImageNet's own mean and std instead of 0.5 the share of right words falls by a seventh."
    from timm.data import ImageNetInfo

    from sft_course.data import decoded_size
    from sft_course.tools.decoding import read_picture
    from sft_course.tools.intake import scan
    from sft_course.tools.logits import eval_logits
    lite0 = open_backbone("lite0")
    assert lite0.mean == lite0.std == (.5, .5, .5)
    c = scan(photos)
    c = c.keep(c.part == "test")
    pixels = np.stack([read_picture(c.root / f, decoded_size(224)) for f in c.files])
    words = [ImageNetInfo().index_to_description(int(i)) for i in eval_logits(lite0, pixels, 224).argmax(1)]
    right = np.mean([word.split(",")[0] == {"ants": "ant", "bees": "bee"}[c.classes[y]] for word, y in zip(words, c.labels)])
    assert right > .78


def test_a_tampered_weights_file_is_refused(monkeypatch):
    monkeypatch.setattr("sft_course.tools.weights.LITE0_SHA256", "0" * 64)
    with pytest.raises(SFTError, match="not the weights the course was written with"):
        open_backbone("lite0")


def plain(model):
    return {k: v.contiguous() for k, v in model.state_dict().items()}


def test_weights_from_a_file(tmp_path):
    model = open_backbone("resnet18", None).model
    save_file(plain(model), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        again = open_backbone("resnet18", tmp_path / name).model
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_weights_that_do_not_fit_or_are_none(tmp_path):
    model = open_backbone("resnet18", None).model
    save_file(plain(open_backbone("mobilenet_v3_small", None).model), tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for name, said in (("other.safetensors", "do not fit this network"), ("text.pth", "not a file of tensors"), ("gone.pth", "no such file")):
        with pytest.raises(SFTError, match=said):
            load_weights(model, tmp_path / name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(SFTError, match="not a file of tensors"):
        load_weights(open_backbone("resnet18", None).model, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(SFTError, match="resnet18: its pretrained weights could not be downloaded .*lite0"):
        open_backbone("resnet18")


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(SFTError, match="did you mean .*resnet50"):
        open_backbone("resnet_50")


@pytest.mark.parametrize("name", ["levit_128s", "deit_tiny_distilled_patch16_224", "crossvit_9_240"])
def test_two_heads_are_refused_by_name(name):
    with pytest.raises(SFTError, match=f"backbone {name}: this network has two heads, head.* and head"):
        open_backbone(name, None)


def test_what_was_pretrained_without_a_head_gets_one():
    net = open_backbone("eva02_tiny_patch14_224", None)
    assert net.stages[-1].name == "head" and net.head.weight.shape == (1000, 192)
    staged = [n for s in net.stages for n in s.parameters]
    assert sorted(staged) == sorted(n for n, _ in net.model.named_parameters())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_network_made_without_a_head_is_refused(name):
    import timm
    with pytest.raises(SFTError, match="is no classifier"):
        cut_into_stages(timm.create_model(name, num_classes=0), 224)


def test_what_holds_nearly_everything_is_opened_and_lists_of_blocks_are():
    "A ModuleList never runs itself: its blocks are the pieces, in the order in which they run."
    names = [s.name for s in open_backbone("cait_xxs24_224", None).stages]
    assert [n for n in names if n.startswith("blocks.")] == [f"blocks.{i}" for i in range(24)] and names[-1] == "head"
    names = [s.name for s in open_backbone("coat_lite_tiny", None).stages]
    assert names.index("serial_blocks1.0") < names.index("patch_embed2")


def test_auxiliary_heads_are_taken_off():
    "One output in training too, and the input is scaled as it was in pretraining whatever the weights."
    net = open_backbone("googlenet", None)
    assert net.model.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000) and net.model.transform_input
    assert not any("aux" in n for n, _ in net.model.named_parameters())


@pytest.mark.parametrize("name, size, theirs", [("resnet18", 224, 1.814), ("vit_b_16", 224, 17.564), ("swin_t", 224, 4.491)])
def test_accounts_add_up(name, size, theirs):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net = open_backbone(name, None)
    net.model.requires_grad_(False)
    rows = stage_costs(net, size)
    assert not any(p.requires_grad for p in net.model.parameters()) and not net.model.training
    assert sum(r["parameters"] for r in rows) == sum(p.numel() for p in net.model.parameters())
    net.model.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as products, which torch counts
        net.model(torch.zeros(1, 3, size, size))
    assert sum(r["multiply_adds"] for r in rows) == counter.get_total_flops() // 2
    assert abs(sum(r["multiply_adds"] for r in rows) / 1e9 - theirs) < .01
    assert all(r["multiply_adds"] > 0 and r["activation_bytes"] > 0 for r in rows)


def test_memory_counts_what_is_kept_once_and_no_weights():
    "Layers keep their inputs; ReLU its output, which is the next layer's input; a mean keeps nothing; the weights are not counted."
    from torch import nn

    from sft_course.backbones import Backbone
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    rows = stage_costs(Backbone("toy", net, cut_into_stages(net, 16), (0,) * 3, (1,) * 3, 16, 1., "None"), 16, batch=2)
    assert [r["activation_bytes"] for r in rows] == [2 * 4 * (3 * 16 * 16 + 4 * 14 * 14), 0, 2 * 4 * 5]
    assert [r["multiply_adds"] for r in rows] == [2 * 4 * 14 * 14 * 27, 2 * 5 * 12 * 12 * 36, 2 * 10]


def test_the_scale_of_a_new_head():
    head = new_head(open_backbone("resnet18", None), 200, std=.1).head
    assert abs(head.weight.std().item() - .1) < .002 and head.bias.abs().sum() == 0
    assert new_head(open_backbone("squeezenet1_1", None), 6, std=0).head.weight.abs().sum() == 0
