"LoRA and its kin: merged and unmerged, as files, on four kinds of network, in the recipe, and killed."
import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, draw
from safetensors.torch import load_file, save_file
from torch import nn

from sft_course import FineTuner, Phase
from sft_course.adapters import (
    adapter_of,
    add_lora,
    kin_layers,
    lora_layers,
    merge,
    moving,
    train_only,
    unmerge,
)
from sft_course.backbones import new_head
from sft_course.core import what_moved
from sft_course.tools.adapter_files import (
    adapted,
    base_key,
    load_adapter,
    own_names,
    read_adapter,
    remove_adapter,
    save_adapter,
)
from sft_course.tools.artifact import load_artifact
from sft_course.tools.opening import open_backbone
from sft_course.tools.settings import SFTError


class Sentences(nn.Module):
    "MiniLM with a head of three classes on what it says of a sentence, in two ways, so that every layer is used."
    def __init__(self):
        super().__init__()
        pytest.importorskip("transformers")
        from sft_course.tools.sentences import open_encoder
        try:
            self.encoder = open_encoder().model
        except SFTError as e:
            pytest.skip(str(e))
        torch.manual_seed(0)
        self.head = nn.Linear(384, 3)

    def forward(self, tokens):
        out = self.encoder(input_ids=tokens)
        return self.head(out.last_hidden_state.mean(1) + out.pooler_output)


def network(kind):
    "A network, what is in its head, and a batch for it."
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if kind == "minilm":
        return Sentences(), ("head",), torch.arange(4 * 9).view(4, 9) + 1000
    if kind == "vit":
        import timm
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3), ("head",), images
    net = new_head(open_backbone(kind, "pretrained" if kind == "lite0" else None), 3)
    return net.model, net.stages[-1].modules[-1:], images


KINDS = ["lite0", "resnet18", "vit", "minilm"]


def train(model, batch, steps=3, awake=True):
    "A few steps on what moves, batch norms awake."
    model.train(awake)
    optimizer = torch.optim.AdamW(moving(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), torch.arange(4) % 3).backward()
        optimizer.step()
    return model.eval()


def close(a, b):
    "Equal but for rounding, against the largest entry."
    return (a - b).abs().max().item() <= 1e-5 * max(1, b.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_after_a_round_trip_through_a_file(kind, tmp_path):
    base, head, batch = network(kind)
    model = add_lora(copy.deepcopy(base), 4, full=head)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), base.eval()(batch))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, batch)
    moved, own = set(what_moved(before, model.state_dict())), set(own_names(model, adapter_of(model)))
    assert moved <= own and set(moving(model)) <= moved  # what is frozen has the same bits, and all else moved
    file = save_adapter(model, tmp_path / "a.safetensors")
    assert file.stat().st_size < 1_300_000
    again = load_adapter(copy.deepcopy(base), file).eval()
    assert what_moved(model.state_dict(), again.state_dict()) == []
    with torch.no_grad():
        said = model(batch)
        assert torch.equal(again(batch), said)
        undo = merge(again)
        assert set(again.state_dict()) == set(base.state_dict()) and close(again(batch), said)
        unmerge(again, undo)
        assert torch.equal(again(batch), said) and what_moved(model.state_dict(), again.state_dict()) == []
    remove_adapter(again)
    plain = again.state_dict()
    assert set(what_moved(base.state_dict(), plain)) <= {n for n in own if "parametrizations" not in n}


@pytest.mark.parametrize("kind", ["lite0", "resnet18"])
def test_the_statistics_of_batch_norms_are_in_the_file(kind, tmp_path):
    base, head, batch = network(kind)
    model = train(add_lora(copy.deepcopy(base), 2, full=head), batch)
    _, _, tensors = read_adapter(save_adapter(model, tmp_path / "a.safetensors"))
    buffers = {n: b for n, b in model.named_buffers() if "running" in n}
    assert buffers and all(torch.equal(tensors[n], b) for n, b in buffers.items())
    assert any(not torch.equal(tensors[n], dict(base.named_buffers())[n]) for n in buffers)


@pytest.mark.parametrize("kind", ["bias", "norms"])
@pytest.mark.parametrize("name", KINDS)
def test_biases_or_norms_alone(name, kind, tmp_path):
    base, head, batch = network(name)
    model = train_only(copy.deepcopy(base), kind, full=head)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, batch, awake=False)
    moved = what_moved(before, model.state_dict())
    inside = [n for n in moved if not n.startswith(f"{head[0]}.")]
    assert inside and set(moved) <= set(moving(model)) and all(n.rpartition(".")[0] in kin_layers(base, kind) for n in inside)
    if kind == "bias":
        assert all(n.endswith(".bias") for n in inside)
    again = load_adapter(copy.deepcopy(base), save_adapter(model, tmp_path / "a.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))
    with pytest.raises(SFTError, match="trained in place"):
        remove_adapter(again)


def test_peft_says_the_same():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(4, 3, 8, 8)
    mine = add_lora(copy.deepcopy(base), 2, alpha=6.)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base)).eval()
    for name in ("0", "2"):
        lora, other = mine.get_submodule(name).parametrizations.weight[0], theirs.get_submodule(name)
        with torch.no_grad():
            lora.B.normal_()
            for part, theirs_ in ((lora.A, other.lora_A), (lora.B, other.lora_B)):
                theirs_["default"].weight.copy_(part.view_as(theirs_["default"].weight))
    target = torch.randn(4, 5)
    for model in (mine, theirs):
        F.mse_loss(model(x), target).backward()
    assert torch.allclose(mine(x), theirs(x), atol=1e-5)
    for name in ("0", "2"):
        lora, other = mine.get_submodule(name).parametrizations.weight[0], theirs.get_submodule(name)
        assert torch.allclose(lora.A.grad.flatten(), other.lora_A["default"].weight.grad.flatten(), rtol=1e-4, atol=1e-3)
        assert torch.allclose(lora.B.grad.flatten(), other.lora_B["default"].weight.grad.flatten(), rtol=1e-4, atol=1e-3)
    merge(mine)
    for name in ("0", "2"):
        theirs.get_submodule(name).merge()
        assert torch.allclose(mine.get_submodule(name).weight, theirs.get_submodule(name).base_layer.weight, atol=1e-5)


# ---- one base, several adapters

def test_adapters_are_swapped_with_their_classes(tmp_path):
    base, head, batch = network("lite0")
    files, said = {}, {}
    for classes in (3, 5):
        net = new_head(open_backbone("lite0"), classes, seed=classes)
        model = train(add_lora(net.model, 2, full=head, seed=classes), batch)
        files[classes] = save_adapter(model, tmp_path / f"{classes}.safetensors")
        with torch.no_grad():
            said[classes] = model(batch)
    for classes in (5, 3, 5):
        load_adapter(base, files[classes])
        with torch.no_grad():
            assert torch.equal(base.eval()(batch), said[classes])
    load_adapter(remove_adapter(base), files[3])
    with torch.no_grad():
        assert torch.equal(base(batch), said[3])


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture
def file(tmp_path):
    return save_adapter(add_lora(small(), 2, full=("3",)), tmp_path / "a.safetensors")


def other_base():
    model = small()
    with torch.no_grad():
        model[0].weight[0] += 1e-6
    return model


REFUSED = {"other weights": (other_base, "trained on another base"),
           "other network": (lambda: nn.Sequential(nn.Linear(3, 3)), "trained on another base"),
           "other rank": (lambda: add_lora(small(), 3, full=("3",)), r"another rank \(3, in the file 2\)"),
           "other kind": (lambda: train_only(small(), "bias", full=("3",)), r"another kind \(bias, in the file lora\)")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence_and_nothing_changes(case, file):
    make, said = REFUSED[case]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SFTError, match=said) as e:
        load_adapter(model, file)
    assert "\n" not in str(e.value) and what_moved(before, model.state_dict()) == []
    assert set(before) == set(model.state_dict())


@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_a_file_with_other_tensors_is_refused(change, file):
    from safetensors import safe_open
    with safe_open(file, "pt") as f:
        about = f.metadata()
    tensors = load_file(file)
    if change == "shape":
        tensors["0.lora_A"] = torch.zeros(2, 5)
    elif change == "missing":
        del tensors["0.lora_B"]
    else:
        tensors["7.weight"] = torch.zeros(1)
    save_file(tensors, file, metadata=about)
    model = small()
    with pytest.raises(SFTError, match="in the file, and"):
        load_adapter(model, file)
    assert what_moved(small().state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("content", [None, b"", b"no tensors here", "plain"], ids=["none", "empty", "text", "no adapter"])
def test_what_is_no_adapter_file(content, tmp_path):
    path = tmp_path / "x.safetensors"
    if content == "plain":
        save_file({"a": torch.zeros(1)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SFTError, match="no such file" if content is None else "this is no adapter"):
        load_adapter(small(), path)


BAD = {"rank 0": (lambda: add_lora(small(), 0), "rank = 0"), "rank 2.5": (lambda: add_lora(small(), 2.5), "rank = 2.5"),
       "a name": (lambda: add_lora(small(), 2, layers=["9"]), "no layer 9"),
       "a norm": (lambda: add_lora(small(), 2, layers=["1"]), "1 is a BatchNorm2d"),
       "no norm": (lambda: train_only(small(), "norms", ["0"]), "0 is a Conv2d"),
       "nothing": (lambda: add_lora(nn.ReLU(), 2), "no layer in this network"),
       "twice": (lambda: add_lora(add_lora(small(), 2), 2), "has an adapter"),
       "kind": (lambda: train_only(small(), "biases"), "kind = 'biases'"),
       "none to merge": (lambda: merge(small()), "has no adapter"),
       "none to save": (lambda: save_adapter(small(), "x"), "has no adapter")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(case):
    make, said = BAD[case]
    with pytest.raises(SFTError, match=said):
        make()


def test_a_layer_that_is_refused_leaves_the_network_as_it_was():
    model = small()
    with pytest.raises(SFTError):
        add_lora(model, 2, layers=["0", "1"])
    assert set(model.state_dict()) == set(small().state_dict()) and all(p.requires_grad for p in model.parameters())


def test_depthwise_convolutions_are_left_out():
    model, head, _ = network("lite0")
    names = lora_layers(model, head)
    assert names and not any("conv_dw" in n for n in names) and head[0] not in names
    assert base_key(model, adapter_of(add_lora(copy.deepcopy(model), 2, full=head))) != ""


# ---- in the recipe

PHASE = Phase(6, epochs=2, lr=1e-3, batch_size=8, views=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("adapters") / "data", n=16)


def test_the_recipe_moves_the_adapter_alone_and_its_artifact_is_plain(data, tmp_path):
    tuner = FineTuner(data, adapted(open_backbone("lite0"), rank=4), tmp_path / "out", size=64)
    model = tuner.backbone.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = tuner.run(PHASE)
    own = set(own_names(model, adapter_of(model)))
    moved = set(what_moved(before, model.state_dict()))
    assert moved <= own and any(n.endswith(".B") for n in moved)
    loaded = load_artifact(tmp_path / "out").model
    assert set(loaded.state_dict()) == set(open_backbone("lite0").model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(loaded.eval()(x), result.model.eval()(x))
    file = save_adapter(result.model, tmp_path / "a.safetensors")
    again = load_adapter(new_head(open_backbone("lite0"), 2).model, file)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), result.model(x))


KILLED = """
import os, signal, sys
from pathlib import Path
from sft_course import FineTuner, Phase
from sft_course.tools.adapter_files import adapted
from sft_course.tools.opening import open_backbone

def watch(row):
    if sys.argv[3] == "kill" and row["phase"] == 2 and row["epoch"] == 1: os.kill(os.getpid(), 9)

net = adapted(open_backbone("lite0", None, seed=0), rank=4)
tuner = FineTuner(sys.argv[1], net, sys.argv[2], size=64, watch=watch)
tuner.run(Phase(2, epochs=1, views=2, batch_size=8), Phase(6, epochs=3, lr=1e-2, views=2, batch_size=8),
          resume=sys.argv[3] == "resume")
"""


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bytes(data, tmp_path, cache):
    def run(out, how):
        env = os.environ | {"PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), data, tmp_path / out, how],
                              env=env, capture_output=True, text=True, timeout=300)
    whole = run("whole", "through")
    assert whole.returncode == 0, whole.stderr
    assert run("cut", "kill").returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / "last.ckpt").exists() and not (tmp_path / "cut" / "card.json").exists()
    resumed = run("cut", "resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
