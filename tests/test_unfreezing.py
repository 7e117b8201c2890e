"What may move when the upper stages train, for one network of each family; kept activations; rates by depth; costs."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_backbones import FAMILIES
from torch import nn

from sft_course.backbones import Backbone, new_head
from sft_course.loop import batches, copy_state
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError
from sft_course.tools.stages import cut_into_stages
from sft_course.tools.steps import train_epoch
from sft_course.tools.surgery import split_at
from sft_course.unfreezing import feature_drift, first_trainable, freeze_below, param_groups, training_costs, training_mode

NORMS = nn.modules.batchnorm._BatchNorm


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    "A network with random weights that looks at the smallest images it takes."
    name = request.param
    size = 224 if name.startswith(("vit", "swin")) else 64
    return new_head(open_backbone(name, weights=None), 3, std=.5), size


def named(backbone, stages):
    return {n for s in backbone.stages[stages] for n in s.parameters}


def entries(backbone, stages):
    "Names of all state entries, buffers too, of some stages."
    modules = tuple(m + "." for s in backbone.stages[stages] for m in s.modules)
    loose = named(backbone, stages)
    return {k for k in backbone.model.state_dict() if k.startswith(modules) or k in loose}


def test_freeze_below_sets_every_parameter(backbone):
    net, _ = backbone
    for stage in (len(net.stages) - 1, len(net.stages) // 2, 0, len(net.stages) - 1):  # and freezes again what it had let go
        freeze_below(net, stage)
        assert {n for n, p in net.model.named_parameters() if p.requires_grad} == named(net, slice(stage, None))


def test_training_mode_wakes_the_upper_stages_only(backbone):
    net, _ = backbone
    stage = len(net.stages) // 2
    for batch_stats in (True, False):
        net.model.train()
        training_mode(net, stage, batch_stats)
        upper = {sub for s in net.stages[stage:] for m in s.modules for sub in net.model.get_submodule(m).modules()}
        norms = {sub for m in net.model.modules() if isinstance(m, NORMS) for sub in m.modules()}  # timm's hold their activation
        awake = {m for m in net.model.modules() if m.training}
        assert awake == (upper if batch_stats else upper - norms)


def test_every_parameter_is_in_exactly_one_group_with_the_rate_of_its_depth(backbone):
    net, _ = backbone
    name_of, S = {p: n for n, p in net.model.named_parameters()}, len(net.stages)
    for stage in (0, S // 2, S - 1):
        groups = param_groups(net, stage, 1e-2, depth_decay=.7, weight_decay=.1)
        held = [name_of[p] for g in groups for p in g["params"]]
        assert len(held) == len(set(held)) and set(held) == named(net, slice(stage, None))
        depth = {s.name: S - 1 - i for i, s in enumerate(net.stages)}
        for g in groups:
            assert np.isclose(g["base"], 1e-2 * .7 ** depth[g["stage"]]) and g["lr"] == g["base"]
            assert all((p.dim() > 1) == (g["weight_decay"] == .1) for p in g["params"])


@pytest.mark.parametrize("batch_stats", [True, False])
def test_a_step_changes_nothing_below(backbone, batch_stats):
    "Neither parameters nor buffers, with momentum and decay in play and gradients left over from a step on everything."
    net, size = backbone
    stage = len(net.stages) - 2
    before, x = copy_state(net.model), torch.randn(2, 3, size, size)
    freeze_below(net, 0)
    for p in net.model.parameters(): p.grad = torch.ones_like(p)
    everything = torch.optim.AdamW(param_groups(net, 0, 1e-2, weight_decay=.1))
    freeze_below(net, stage)
    training_mode(net, stage, batch_stats)
    if batch_stats and size == 64: x = torch.randn(4, 3, 64, 64)
    F.cross_entropy(net.model(x), torch.arange(len(x)) % 3).backward()
    everything.step()
    moved = {k for k, v in net.model.state_dict().items() if not torch.equal(v, before[k])}
    assert named(net, slice(-1, None)) <= moved
    assert not moved & entries(net, slice(0, stage)), sorted(moved & entries(net, slice(0, stage)))[:3]
    assert moved <= entries(net, slice(stage, None))
    net.model.load_state_dict(before)


def test_what_train_may_be():
    net = open_backbone("resnet18", None)
    S = len(net.stages)
    assert [first_trainable(net, t) for t in ("head", 1, 3, "all", S)] == [S - 1, S - 1, S - 3, 0, 0]
    for wrong in (0, -1, S + 1, 2.0, "body", True, None):
        with pytest.raises(SFTError, match=f"stages from 1 to {S}"):
            first_trainable(net, wrong)


def steps_taken(stage, how):
    "An epoch of SGD with momentum on the upper stages of lite0; how far each weight went, as one vector."
    net = new_head(open_backbone("lite0"), 3, std=.05)
    generator = torch.Generator().manual_seed(0)
    x, y = F.interpolate(torch.randn(24, 3, 8, 8, generator=generator), 64, mode="bicubic"), torch.arange(24) % 3
    freeze_below(net, stage)
    lower, upper = split_at(net, stage)
    with torch.no_grad(): kept = lower.eval()(x.flip(3) if how == "mirrored" else x)
    if how == "jittered": kept = kept * (1 + 2**-11 * (2 * torch.rand(kept.shape, generator=generator) - 1))
    if how == "half": kept = kept.half()
    training_mode(net, stage, batch_stats=False)
    sgd = torch.optim.SGD(param_groups(net, stage, 1e-3, depth_decay=.8), momentum=.9)
    weights = [p for g in sgd.param_groups for p in g["params"]]
    was = [p.detach().clone() for p in weights]
    inputs = x.__getitem__ if how == "computed" else (lambda r: kept[r].float())
    train_epoch(net.model if how == "computed" else upper, inputs, y, batches(24, 8, 0), sgd, lambda t: 1., 0)
    return torch.cat([(p.detach() - w).flatten() for p, w in zip(weights, was)])


@pytest.mark.parametrize("top", [1, 2, 4])
def test_training_on_kept_activations_is_training(top):
    "To what noise of the size of rounding to 16 bits does to the steps; mirrored images do ten times as much and more."
    stage = len(open_backbone("lite0", None).stages) - top
    whole = steps_taken(stage, "computed")
    apart = {how: ((steps_taken(stage, how) - whole).norm() / whole.norm()).item() for how in ("half", "jittered", "mirrored")}
    assert apart["half"] < 3 * apart["jittered"] and apart["mirrored"] > 10 * apart["half"] and whole.norm() > 0, apart


def test_drift():
    h = torch.randn(40, 7)
    turn = torch.linalg.qr(torch.randn(7, 7))[0]
    assert feature_drift(h, h) == 0
    assert abs(feature_drift(h, h.mean(0).expand_as(h)) - 1) < 1e-5
    assert abs(feature_drift(h, h * 1.1) - feature_drift(5 * h @ turn, 5.5 * h @ turn)) < 1e-5
    with pytest.raises(SFTError, match="same images twice"):
        feature_drift(h, h[:3])
    with pytest.raises(SFTError, match="all images have the same features"):
        feature_drift(torch.ones(4, 2), torch.zeros(4, 2))


def test_costs_are_those_of_layers_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    rows = training_costs(Backbone("toy", net, cut_into_stages(net, 16), (0,) * 3, (1,) * 3, 16, 1., "None"), 16, batch=2)
    forward = [10 * 2, 5 * 12 * 12 * 36 * 2, 4 * 14 * 14 * 27 * 2]
    parameters, kept = [12, 12 + 185, 12 + 185 + 112], [4 * 2 * 5, 4 * 2 * 5, 4 * 2 * (5 + 3 * 16 * 16 + 4 * 14 * 14)]
    assert [r["train"] for r in rows] == [1, 2, 3] and [r["stage"] for r in rows] == ["5", "2", "0"]
    assert [r["parameters"] for r in rows] == parameters
    assert [r["multiply_adds"] for r in rows] == [sum(forward) + 2 * sum(forward[:k]) for k in (1, 2, 3)]
    assert [r["cached_multiply_adds"] for r in rows] == [3 * sum(forward[:k]) for k in (1, 2, 3)]
    assert [r["bytes"] for r in rows] == [12 * p + k for p, k in zip(parameters, kept)]
