"A head on every stage is a module like any other: many threads at once, copies, files, export; and what cannot be traced works all the same."
import copy
import io
import pickle
import threading

import pytest
import torch
from torch import fx, nn

from sft_course.tools.opening import as_backbone, open_backbone
from sft_course.tools.surgery import fold_for, split_at
from sft_course.tools.taps import EveryStage, _moments, _positions, stage_features

HALF = (.5, .5, .5)
SIZE = 64


class Counting(nn.Module):
    "Cannot be traced: its forward asks for a length, and loops over it."
    def __init__(self):
        super().__init__()
        self.low, self.norm, self.high = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.high(self.norm(self.low(x)))
        return self.head(torch.stack([x[i].mean((1, 2)) for i in range(len(x))]))


class Next(Counting):
    "Cannot be traced: an iterator ends early."
    def forward(self, x):
        if isinstance(x, fx.Proxy):
            next(iter([]))
        return super().forward(x)


def network(kind):
    torch.manual_seed(0)
    return open_backbone(kind, None) if isinstance(kind, str) else as_backbone(kind(), HALF, HALF, size=32)


KINDS = ["resnet10t", Counting]


@pytest.fixture(params=KINDS, ids=["traced", "not traced"])
def net(request):
    return EveryStage(network(request.param), 4).eval()


def by_hooks(backbone, features, x):
    "What the head is given and what the stages make, read off by hooks on the network, as one would by hand."
    made, at = {}, backbone.model.get_submodule
    hooks = [at(n).register_forward_hook(lambda m, args, out, n=n: made.update({n: out})) for n, _ in features.taps]
    hooks += [at(features.head[0]).register_forward_hook(lambda m, args, out: made.update(given=args[0]))]
    backbone.model.eval()(x)
    for h in hooks:
        h.remove()
    parts = [_positions(made["given"], features.head[1]).mean(1), *(_moments(made[n], axis) for n, axis in features.taps)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", ["lite0", "resnet10t", "vit_tiny_patch16_224", "convnext_atto", Counting], ids=str)
def test_the_features_are_those_that_hooks_would_read_to_the_last_bit(kind):
    backbone = network(kind)
    features = stage_features(backbone).eval()
    assert features.traced == isinstance(kind, str)
    size = backbone.size if kind == "vit_tiny_patch16_224" else SIZE
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.equal(features(x), by_hooks(backbone, features, x))
        assert torch.equal(fold_for(features, size)(x[:1]).isfinite(), torch.ones(1, features.columns, dtype=bool))


def test_many_threads_use_one_network(net):
    "Each has images of its own, and gets the logits that it gets alone."
    xs = [torch.randn(2, 3, SIZE, SIZE) * (i + 1) for i in range(4)]
    with torch.no_grad():
        alone = [net(x) for x in xs]
    wrong = []

    def use(i):
        with torch.no_grad():
            for _ in range(6):
                if not torch.equal(net(xs[i]), alone[i]):
                    wrong.append(i)
    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert not any(m._forward_hooks for m in net.modules())


def test_names_of_entries_are_those_of_the_network(net):
    "What an older version saved is loaded."
    body = network("resnet10t" if net.features.traced else Counting).model.state_dict()
    head = "fc." if net.features.traced else "head."
    want = {f"features.model.{k}" for k in body if not k.startswith(head)} | {"linear.weight", "linear.bias"}
    assert set(net.state_dict()) == want == set(copy.deepcopy(net).state_dict()) == set(net.plain().state_dict())


def test_copies_are_their_own(net):
    twin, x = copy.deepcopy(net), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        was = net(x)
        for p in net.features.parameters():
            p.zero_()
        assert torch.equal(twin(x), was) and not torch.equal(net(x), was)


def test_a_file_of_the_whole_module(net):
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    again, x = torch.load(file, weights_only=False), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_training_moves_the_network(net):
    x = torch.randn(4, 3, SIZE, SIZE)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_plain_module_needs_nothing_of_the_course():
    net, x = EveryStage(network("resnet10t"), 4).eval(), torch.randn(2, 3, SIZE, SIZE)
    plain = net.plain()
    with torch.no_grad():
        assert torch.equal(plain(x), net(x))
    held = pickle.dumps(plain)
    assert b"sft_course" not in held and not any("sft_course" in type(m).__module__ for m in plain.modules())
    with torch.no_grad():
        assert torch.equal(pickle.loads(held)(x), net(x))


def test_export_and_compile():
    net, x = EveryStage(network("resnet10t"), 4).eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        want = net(x)
        exported = torch.export.export(net, (x,)).module()(x)
        assert torch.allclose(exported, want, atol=1e-5)
        assert torch.allclose(torch.compile(net, backend="eager")(x), want, atol=1e-5)
        assert torch.allclose(torch.jit.trace(net, x)(x), want, atol=1e-5)


@pytest.mark.parametrize("kind", [Counting, Next])
def test_what_cannot_be_traced_is_not_split_whatever_tracing_raises(kind):
    backbone = network(kind)
    lower, upper = split_at(backbone, len(backbone.stages) - 1)
    assert isinstance(lower, nn.Identity) and upper is backbone.model


def test_to_split_or_to_look_wakes_nothing():
    backbone = network("resnet10t")
    backbone.model.train().layer1.eval()
    modes = [m.training for m in backbone.model.modules()]
    split_at(backbone, 3), stage_features(backbone)
    assert [m.training for m in backbone.model.modules()] == modes


def test_a_host_with_another_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        net = EveryStage(network("resnet10t"), 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float32} and net.features.traced
