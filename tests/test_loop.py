"The loop: metrics against the libraries', and runs that stop and go on as if they had not."

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torchmetrics.functional.classification import multiclass_accuracy

from sft_course.core import what_moved
from sft_course.loop import batches, best_epoch, copy_state, epoch_seed, out_of_patience, predict_logits, score
from sft_course.tools.checkpoints import load_checkpoint, save_checkpoint, state_by_name
from sft_course.tools.settings import SFTError
from sft_course.tools.steps import add_gradients, average_weights, native_bfloat16, train_epoch
from sft_course.tools.training import fit

quick = settings(max_examples=40, deadline=None)


def always(step):
    return 1.0


def drawn(seed, n, classes, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g) * scale, torch.randint(classes, (n,), generator=g)


# ---- metrics


@quick
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(2, 9), st.sampled_from([1e-6, 1.0, 30.0, 1e3, 1e30]))
def test_score_agrees_with_torchmetrics_and_float64(seed, n, classes, scale):
    logits, labels = drawn(seed, n, classes, scale)
    s = score(logits, labels)
    exact = F.cross_entropy(logits.double(), labels).item()
    assert s.loss == pytest.approx(exact, rel=1e-6, abs=1e-6) and s.n == n
    assert s.accuracy == pytest.approx(
        multiclass_accuracy(logits, labels, num_classes=classes, average="micro").item(), abs=1e-6
    )


@quick
@given(st.integers(0, 2**31), st.integers(2, 70), st.integers(1, 40))
def test_score_of_ragged_batches_is_that_of_all(seed, n, size):
    "Whatever the batches, the logits come back in order, and the score is that of all images at once."
    x, labels = drawn(seed, n, 5)
    logits = predict_logits(nn.Identity(), x.__getitem__, n, size)
    assert torch.equal(logits, x) and score(logits, labels) == score(x, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_score_of_half_precision_is_taken_in_float32(dtype):
    logits, labels = drawn(0, 50, 4, 10)
    s = score(logits.to(dtype), labels)
    assert s.loss == pytest.approx(F.cross_entropy(logits.to(dtype).float(), labels).item(), abs=1e-6)


def test_score_of_logits_at_a_thousand_is_finite():
    s = score(torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]]), torch.tensor([0, 0]))
    assert s.loss == pytest.approx(1000) and s.accuracy == 0.5


# ---- batches and modes


@quick
@given(st.integers(1, 200), st.integers(1, 50), st.one_of(st.none(), st.integers(0, 2**31)))
def test_batches_visit_each_row_once_and_never_one_alone(n, size, seed):
    parts = batches(n, size, seed)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert all(len(p) <= size + 1 for p in parts)
    assert size == 1 or n == 1 or min(map(len, parts)) > 1


def test_order_depends_on_seed_and_epoch_alone():
    np.random.seed(1)
    first = batches(50, 8, (0, 3))
    np.random.seed(2)
    assert all((a == b).all() for a, b in zip(first, batches(50, 8, (0, 3)), strict=True))
    assert not (np.concatenate(first) == np.concatenate(batches(50, 8, (0, 4)))).all()
    assert epoch_seed(0, 3) != epoch_seed(0, 4) and 0 <= epoch_seed(2**31 - 1, 10**6) < 2**31


def test_prediction_leaves_every_module_in_its_mode_also_when_it_fails():
    net = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout(), nn.Linear(3, 2))
    before = [m.training for m in net.modules()]
    predict_logits(net, torch.zeros(5, 3).__getitem__, 5)
    with pytest.raises(RuntimeError):
        predict_logits(net, torch.zeros(5, 7).__getitem__, 5)
    assert [m.training for m in net.modules()] == before == [True, False, True, True]


# ---- gradients


@quick
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 45), st.sampled_from([0.0, 0.1]))
def test_micro_batches_add_up_to_the_large_batch(seed, n, micro, smoothing):
    x, y = drawn(seed, n, 4)
    torch.manual_seed(seed % 2**31)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    whole = F.cross_entropy(net(x), y, label_smoothing=smoothing)
    want = torch.autograd.grad(whole, list(net.parameters()))
    total = add_gradients(net, x.__getitem__, y, np.arange(n), smoothing, micro)
    assert total.item() == pytest.approx(whole.item() * n, rel=1e-5)
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(net.parameters(), want, strict=True))


@quick
@given(st.integers(0, 2**31), st.floats(1e-3, 10))
def test_clipping_bounds_the_step(seed, clip):
    x, y = drawn(seed, 20, 4, 100)
    net = nn.Linear(4, 4)
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    train_epoch(net, x.__getitem__, y, [np.arange(20)], torch.optim.SGD(net.parameters(), lr=1.0), always, 0, clip=clip)
    assert (torch.cat([p.detach().flatten() for p in net.parameters()]) - before).norm() <= clip * (1 + 1e-3) + 1e-5


def test_the_options_of_an_epoch_do_nothing_at_their_defaults():
    "Bit for bit what torch does step by step, with a rate that changes and groups with their own."
    x, y = drawn(0, 41, 5)
    mine, theirs = (lambda n: (n, copy.deepcopy(n)))(nn.Linear(5, 5))

    def optimiser(net):
        return torch.optim.AdamW(
            [{"params": [net.weight], "lr": 0.1, "base": 0.1}, {"params": [net.bias], "lr": 0.01, "base": 0.01}]
        )

    opt, order = optimiser(theirs), batches(41, 8, 3)
    train_epoch(mine, x.__getitem__, y, order, optimiser(mine), lambda t: 1 / (t + 1), 2)
    for t, rows in enumerate(order, 2):
        for g in opt.param_groups:
            g["lr"] = g["base"] / (t + 1)
        opt.zero_grad()
        F.cross_entropy(theirs(x[rows]), y[rows]).backward()
        opt.step()
    assert what_moved(mine.state_dict(), theirs.state_dict()) == []


def test_bfloat16_is_offered_only_where_it_is_native():
    assert native_bfloat16("meta") is None and native_bfloat16("cpu") in (None, torch.bfloat16)
    x, y = drawn(0, 16, 4)
    net = nn.Linear(4, 4)
    loss, _ = train_epoch(
        net,
        x.__getitem__,
        y,
        [np.arange(16)],
        torch.optim.SGD(net.parameters(), lr=0.1),
        always,
        0,
        precision=torch.bfloat16,
    )
    assert net.weight.dtype == torch.float32 and np.isfinite(loss)


@quick
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30), st.floats(0.1, 0.999))
def test_the_average_is_the_recursion(values, decay):
    net = nn.Linear(1, 1, bias=False)
    slow, want = average_weights(net, decay), None
    for v in values:
        with torch.no_grad():
            net.weight.fill_(v)
        slow.update_parameters(net)
        want = v if want is None else decay * want + (1 - decay) * v
    assert slow.module.weight.item() == pytest.approx(want, abs=1e-4)


# ---- history


@quick
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_best_epoch_is_the_first_of_the_best(rows):
    history = [{"val_accuracy": a / 4, "val_loss": float(loss)} for a, loss in rows]
    want = min(range(len(rows)), key=lambda e: (-rows[e][0], rows[e][1], e), default=-1) + 1
    assert best_epoch(history) == want
    assert not out_of_patience(history, None)
    assert out_of_patience(history, 3) == (len(rows) - want >= 3)


def test_a_copied_state_stays():
    net = nn.BatchNorm1d(2)
    kept = copy_state(net)
    net(torch.randn(4, 2))
    assert what_moved(kept, net.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]


# ---- stopping and going on


def run(path=None, epochs=6, seed=0, init=0, kind="adamw", averaged=True, stop_after=None, patience=None, n=50, **more):
    torch.manual_seed(init)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))
    opt = (
        torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
        if kind == "adamw"
        else torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    )
    slow, (x, y), (hx, hy) = average_weights(net, 0.9) if averaged else None, drawn(1, n, 6), drawn(2, 21, 6)
    y, hy, calls = x[:, :3].argmax(1), hx[:, :3].argmax(1), []

    def inputs(rows):
        calls.append(1)
        if stop_after is not None and len(calls) > stop_after:
            raise KeyboardInterrupt
        return x[rows] + 0.1 * torch.randn(len(rows), 6)

    out = fit(
        net,
        (inputs, y),
        (hx.__getitem__, hy),
        opt,
        epochs,
        lambda t: 1 / (1 + t / 10),
        batch_size=8,
        seed=seed,
        checkpoint=path,
        average=slow,
        patience=patience,
        clip=1.0,
        micro=5,
        **more,
    )
    return out, net, opt, slow


def same(a, b):
    return a[0] == b[0] and what_moved(a[1].state_dict(), b[1].state_dict()) == []


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("stop_after", [1, 12, 13, 40, 65])
def test_a_run_that_is_killed_anywhere_ends_in_the_same_bits(tmp_path, kind, averaged, stop_after):
    how = {"kind": kind, "averaged": averaged}
    whole = run(tmp_path / "whole.ckpt", **how)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.ckpt", stop_after=stop_after, **how)
    torch.manual_seed(stop_after)  # whatever was drawn in between
    init = 0 if not (tmp_path / "cut.ckpt").exists() else 7
    assert same(whole, run(tmp_path / "cut.ckpt", init=init, **how))
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("whole", "cut"))
    assert what_moved(one["model"], two["model"]) == [] and one["more"]["history"] == two["more"]["history"]
    assert all(what_moved(one["optimizer"][n], two["optimizer"][n]) == [] for n in one["optimizer"])


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    whole = run(epochs=6)
    run(tmp_path / "c.ckpt", epochs=2)
    assert same(whole, run(tmp_path / "c.ckpt", epochs=6, init=5))


def test_a_finished_run_comes_back_without_a_step(tmp_path):
    whole = run(tmp_path / "c.ckpt", patience=2, epochs=30)
    assert len(whole[0].history) < 30
    assert same(whole, run(tmp_path / "c.ckpt", patience=2, epochs=30, init=5, stop_after=0))


def test_the_model_holds_the_best_weights_and_the_state_outside_is_left_alone():
    torch.manual_seed(3)
    out, net, _, slow = run(averaged=False)
    x, _ = drawn(2, 21, 6)
    now = score(predict_logits(net, x.__getitem__, 21), x[:, :3].argmax(1))
    row = out.history[out.best_epoch - 1]
    assert (now.accuracy, now.loss) == (row["val_accuracy"], row["val_loss"])
    net, mine = nn.Linear(6, 3), torch.get_rng_state()
    fit(
        net,
        (x.__getitem__, x[:, :3].argmax(1)),
        (x.__getitem__, x[:, :3].argmax(1)),
        torch.optim.SGD(net.parameters(), lr=0.1),
        2,
    )
    assert torch.equal(mine, torch.get_rng_state())


@pytest.mark.parametrize("changed, said", [({"seed": 1}, "seed = 0"), ({"n": 40}, "pictures = 50")])
def test_another_plan_is_refused(tmp_path, changed, said):
    run(tmp_path / "c.ckpt", epochs=1)
    with pytest.raises(SFTError, match=f"c.ckpt: that run had {said}"):
        run(tmp_path / "c.ckpt", **changed)


def test_no_epochs_and_a_loss_that_is_not_finite_are_refused():
    with pytest.raises(SFTError, match="epochs = 0"):
        run(epochs=0)
    x, y = drawn(0, 8, 3, 100)
    net = nn.Linear(3, 3)
    with pytest.raises(SFTError, match="validation loss became"):
        fit(net, (x.__getitem__, y), (x.__getitem__, y), torch.optim.SGD(net.parameters(), lr=1e38), 1, batch_size=8)


# ---- checkpoints


def small(hidden=4, kind=torch.optim.AdamW, only=None):
    net = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 2))
    groups = [{"params": m.parameters(), "lr": 0.01} for m in (net if only is None else net[only:])]
    opt = kind(groups)
    F.cross_entropy(net(torch.ones(2, 3)), torch.tensor([0, 1])).backward()
    opt.step()
    return net, opt


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_state_by_name_is_torchs_own(kind):
    net, opt = small(kind=kind)
    mine, theirs = state_by_name(net, opt), get_optimizer_state_dict(net, opt)["state"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(torch.as_tensor(mine[n][k]), torch.as_tensor(theirs[n][k])) for n in mine for k in mine[n])


def test_unfreezing_between_stop_and_resume_keeps_what_is_known_and_starts_the_rest_fresh(tmp_path):
    net, opt = small(only=1)
    path = save_checkpoint(tmp_path / "c", net, opt)
    later, wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), None
    wide = torch.optim.AdamW([{"params": [p], "lr": 0.5} for p in later.parameters()])
    load_checkpoint(path, later, wide)
    assert what_moved(net.state_dict(), later.state_dict()) == [] and len(wide.param_groups) == 4
    assert torch.equal(wide.state[later[1].weight]["exp_avg"], opt.state[net[1].weight]["exp_avg"])
    assert later[0].weight not in wide.state and wide.param_groups[0]["lr"] == 0.5


def test_what_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path):
    net, opt = small()
    path = save_checkpoint(tmp_path / "c", net, opt)
    wide, wide_opt = small(hidden=5)
    before, state = copy_state(wide), copy.deepcopy(wide_opt.state_dict())
    with pytest.raises(SFTError, match="c: 3 entries do not fit this network, the first is 0.weight"):
        load_checkpoint(path, wide, wide_opt)
    assert what_moved(before, wide.state_dict()) == []
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"])
        for a, b in zip(state["state"].values(), wide_opt.state_dict()["state"].values(), strict=True)
    )
    with pytest.raises(SFTError, match="state of AdamW, not of SGD"):
        load_checkpoint(path, net, small(kind=torch.optim.SGD)[1])
    with pytest.raises(SFTError, match="averaged weights are not in the file"):
        load_checkpoint(path, net, opt, average_weights(net))
    with pytest.raises(SFTError, match="4 parameters that are not the model's"):
        load_checkpoint(path, small()[0], opt)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other", "absent", "program"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path, damage):
    net, opt = small()
    path, owned = save_checkpoint(tmp_path / "c", net, opt), tmp_path / "owned"

    class Evil:
        def __reduce__(self):
            return type(owned).touch, (owned,)

    if damage == "program":
        torch.save({"format": "sft_course checkpoint 1", "model": Evil()}, path)
    elif damage == "other":
        torch.save({"weights": torch.ones(2)}, path)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:700], "noise": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(SFTError, match="c: (not a checkpoint|there is no such checkpoint)"):
        load_checkpoint(path, net, opt)
    assert not owned.exists()


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    net, opt = small()
    path = save_checkpoint(tmp_path / "c", net, opt, epoch=1)

    def full(what, to):
        to.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SFTError, match="c: the checkpoint cannot be written .No space left"):
        save_checkpoint(path, net, opt, epoch=2)
    assert load_checkpoint(path, net, opt) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["c"]
