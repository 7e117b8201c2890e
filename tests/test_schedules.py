"Schedules agree with torch's at every step; the rate finder leaves no trace, whatever happens in it."

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as theirs

from sft_course.schedules import SCHEDULES, cosine, linear, one_cycle, rate_table, schedule, step_decay, warm_up
from sft_course.tools.finder import RULES, find_rate, rate_curve, smoothed, suggest
from sft_course.tools.phases import Phase
from sft_course.tools.settings import SFTError

LENGTHS = [1, 2, 3, 4, 7, 10, 30, 99, 1000]
quick = settings(max_examples=200, deadline=None)


def of_torch(make, steps, bases=(1.0,)):
    "Rates (steps, groups) of a scheduler of torch at every step."
    sgd = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": b} for b in bases])
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = make(sgd)
        for _ in range(steps):
            out.append([g["lr"] for g in sgd.param_groups])
            sgd.step()
            plan.step()
    return np.array(out)


def close(a, b):
    return np.allclose(np.ravel(a), np.ravel(b), rtol=1e-9, atol=1e-10)


def every(s, steps):
    return [s(t, steps) for t in range(steps)]


# ---- value by value against torch

ORACLES = {
    "constant": lambda o, n: theirs.ConstantLR(o, factor=1.0),
    "step": lambda o, n: theirs.StepLR(o, -(-n // 3), 0.1),
    "linear": lambda o, n: theirs.LinearLR(o, 1.0, 0.0, n),
    "cosine": lambda o, n: theirs.CosineAnnealingLR(o, n),
}


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", ORACLES)
def test_plain_schedules_are_torchs_at_every_step(name, steps):
    assert close(every(SCHEDULES[name], steps), of_torch(lambda o: ORACLES[name](o, steps), steps))


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 0.77, 1.0])
def test_one_cycle_is_torchs_at_every_step(steps, share):
    def make(o):
        return theirs.OneCycleLR(o, [1.0], total_steps=steps, pct_start=share, cycle_momentum=False)

    mine = [one_cycle(t, steps, share) for t in range(steps)]
    try:
        assert close(mine, of_torch(make, steps))
    except ZeroDivisionError:  # torch divides 0 by 0 where the rise ends at step 0, or the fall begins at the last step
        assert share * steps == 1 or share == 1
        assert all(0 < f <= 1 for f in mine)


@pytest.mark.parametrize("rise", [0, 1, 2, 9, 100])
def test_warm_up_is_torchs_linear(rise):
    mine = [warm_up(t, rise) for t in range(150)]
    if rise:
        assert close(mine, of_torch(lambda o: theirs.LinearLR(o, 1 / (rise + 1), 1.0, rise), 150))
    assert mine[rise] == 1 == mine[-1] and mine[0] > 0


@pytest.mark.parametrize("steps", [2, 3, 10, 37, 400])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ORACLES)
def test_warm_up_then_schedule_is_torchs_sequence(name, steps, warmup):
    rise = min(round(warmup * steps), steps - 1)

    def make(o):
        fall = ORACLES[name]
        if not rise:
            return fall(o, steps)
        parts = [theirs.LinearLR(o, 1 / (rise + 1), 1.0, rise), fall(o, steps - rise)]
        return theirs.SequentialLR(o, parts, [rise])

    bases = (1.0, 0.03)
    assert close(rate_table(name, steps, bases, warmup), of_torch(make, steps, bases))


def test_one_cycle_in_a_recipe_takes_the_share_that_warms_up():
    rate = schedule("one_cycle", 50, 0.2)
    assert [rate(t) for t in range(50)] == [one_cycle(t, 50, 0.2) for t in range(50)]
    assert SCHEDULES["one_cycle"](3, 50) == one_cycle(3, 50, 0.3)


# ---- properties

names, lengths = st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3000)
shares = st.floats(0, 1, exclude_max=True)


@quick
@given(names, lengths, shares, st.data())
def test_factors_lie_between_0_and_1_and_are_the_same_when_asked_again(name, steps, warmup, data):
    rate, again = schedule(name, steps, warmup), schedule(name, steps, warmup)
    t = data.draw(st.integers(0, steps + 5))
    assert 0 <= rate(t) <= 1 and rate(t) == again(t)


@quick
@given(st.sampled_from(["constant", "step", "linear", "cosine"]), lengths, shares)
def test_the_peak_is_reached_and_the_end_is_where_it_should_be(name, steps, warmup):
    rate = schedule(name, steps, warmup)
    f = [rate(t) for t in range(steps + 1)]
    assert max(f[:-1]) == 1 and min(f[:-1]) > 0
    ends = {"constant": 1, "linear": 0, "cosine": 0}
    assert f[-1] == pytest.approx(ends.get(name, f[-1]), abs=1e-12)
    top = f.index(1)
    assert f[: top + 1] == sorted(f[: top + 1]) and f[top:] == sorted(f[top:], reverse=True)


@quick
@given(st.integers(2, 3000), shares)
def test_one_cycle_rises_once_falls_once_and_ends_near_nothing(steps, warmup):
    f = [one_cycle(t, steps, warmup) for t in range(steps)]
    top = int(np.argmax(f))
    assert f[: top + 1] == sorted(f[: top + 1]) and f[top:] == sorted(f[top:], reverse=True)
    assert f[-1] == pytest.approx(4e-6) or top == steps - 1
    assert one_cycle(steps, steps, warmup) == pytest.approx(4e-6)


@quick
@given(lengths)
def test_linear_and_cosine_spend_the_same_sum(steps):
    for s in (linear, cosine):
        assert sum(every(s, steps)) == pytest.approx((steps + 1) / 2)


def test_step_decay_has_three_levels():
    assert sorted({round(f, 12) for f in every(step_decay, 90)}, reverse=True) == [1, 0.1, 0.01]
    assert step_decay(500, 90) == pytest.approx(0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_and_two_steps_give_rates_above_0(name):
    assert schedule(name, 1)(0) > 0 and all(schedule(name, 2, 0.5)(t) > 0 for t in (0, 1))


def test_wrong_names_and_numbers_are_sentences():
    for call, say in (
        (lambda: schedule("cosin", 10), "'cosin': use one of constant, step"),
        (lambda: schedule("cosine", 0), "steps = 0"),
        (lambda: schedule("linear", 10, 1.0), "warmup = 1.0"),
        (lambda: schedule("linear", 10, -0.1), "warmup = -0.1"),
    ):
        with pytest.raises(SFTError, match=say):
            call()


def test_every_name_makes_a_phase():
    assert all(Phase("all", schedule=name).schedule == name for name in SCHEDULES)


# ---- the finder


class Everything(nn.Module):
    "Batch norm, dropout, and buffers that a pass replaces instead of writing to."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.passes = self.passes + 1
        self.hidden += 1
        return self.head(self.body(x))


def problem(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=g)
    x[:, :3] += 2 * nn.functional.one_hot(y, 3)
    return x, y


def trained(kind="AdamW"):
    "A network half way through training: optimiser state, gradients, mixed modes, own base rates."
    torch.manual_seed(0)
    net, (x, y) = Everything(), problem()
    groups = [{"params": net.body.parameters(), "lr": 1e-3}, {"params": net.head.parameters(), "lr": 1e-2, "base": 1e-2}]
    opt = torch.optim.AdamW(groups) if kind == "AdamW" else torch.optim.SGD(groups, momentum=0.9)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    net.body[0].weight.requires_grad_(False)
    net.body[1].eval()
    net.head.bias.grad = None
    return net, opt


def snapshot(net, opt):
    "Everything that a finder could leave behind, copied; tensors with their identity."
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    state = copy.deepcopy(opt.state_dict())
    return {
        "tensors": [(id(t), t.detach().clone()) for t in tensors],
        "grads": [p.grad is None for p in net.parameters()],
        "wanted": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]],
        "owned": [[id(p) for p in g["params"]] for g in opt.param_groups],
        "state": state["state"],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()),
        "graph": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differing(a, b):
    return [k for k in a if not same(a[k], b[k])]


def wild(x):
    "Inputs that draw from all three generators."

    def inputs(rows):
        return x[rows] + 0.01 * (random.random() + np.random.rand() + torch.rand(()))

    return inputs


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_the_finder_leaves_no_trace(kind, held):
    net, opt = trained(kind)
    x, y = problem()
    before = snapshot(net, opt)
    curve = rate_curve(net, (wild(x), y), (wild(x), y) if held else None, opt, clip=1.0)
    assert len(curve[0]) == len(curve[1]) > 10
    assert differing(before, snapshot(net, opt)) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, SFTError, SystemExit])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_no_trace_where_it_is_stopped(fault, at):
    net, opt = trained()
    x, y = problem()
    calls, before = [], snapshot(net, opt)

    def inputs(rows):
        calls.append(random.random() + np.random.rand() + torch.rand(()).item())
        if len(calls) > at:
            raise fault("stop")
        return x[rows]

    with pytest.raises(fault, match="stop"):
        find_rate(net, (inputs, y), None, opt)
    assert differing(before, snapshot(net, opt)) == []


def test_no_trace_where_the_loss_is_not_finite_or_does_not_fall():
    net, opt = trained()
    x, y = problem()
    before = snapshot(net, opt)
    with pytest.raises(SFTError, match="not finite at the first step, at rate 1e-05"):
        find_rate(net, ((x * float("nan")).__getitem__, y), None, opt)
    with pytest.raises(SFTError, match="does not fall at any of"):
        find_rate(net, (x.__getitem__, y), (x.__getitem__, (y + 1) % 3), opt)  # what it learns is wrong there
    assert differing(before, snapshot(net, opt)) == []


def test_a_scheduler_on_the_optimiser_and_no_grad_outside_do_not_matter():
    net, opt = trained("SGD")
    x, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = theirs.CosineAnnealingLR(opt, 10)
    before, plan_before = snapshot(net, opt), plan.state_dict().copy()
    first = rate_curve(net, (x.__getitem__, y), None, opt)
    with torch.no_grad():
        second = rate_curve(net, (x.__getitem__, y), None, opt)
        assert not torch.is_grad_enabled()
    assert np.array_equal(first[1], second[1]) and first[1].min() < first[1][0]
    assert differing(before, snapshot(net, opt)) == [] and plan.state_dict() == plan_before


def test_the_same_seed_gives_the_same_curve_whatever_was_drawn_before():
    net, opt = trained()
    x, y = problem()
    curves = []
    for seed in (0, 0, 1):
        torch.rand(3), np.random.rand(3), random.random()
        curves.append(rate_curve(net, (wild(x), y), None, opt, seed=seed)[1].tolist())
    assert curves[0] == curves[1] != curves[2]


def test_training_after_the_finder_is_training_without_it():
    x, y = problem()
    ends = []
    for to_input in (False, True):
        net, opt = trained()
        torch.manual_seed(5)
        if to_input:
            rate_curve(net, (wild(x), y), (x.__getitem__, y), opt)
        for _ in range(4):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert same(*ends)


def test_a_rate_is_found_on_a_problem_that_can_be_learned():
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(6, 3), problem(400)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for rule in RULES:
        found = find_rate(net, (x[:300].__getitem__, y[:300]), (x[300:].__getitem__, y[300:]), opt, rule=rule, high=1e3)
        assert found.rates[0] <= found.suggested <= found.rates[-1] and found.losses[-1] > found.losses.min()
        assert f"{found.suggested:.1e}" in repr(found) and found.how in repr(found)
        with pytest.raises(AttributeError):
            found.suggested = 1.0


def test_rates_are_those_of_the_largest_group_and_the_others_keep_their_share():
    net, (x, y) = nn.Linear(6, 3), problem()
    opt = torch.optim.SGD([{"params": [net.weight], "lr": 0.2}, {"params": [net.bias], "lr": 0.05}])
    alone = torch.optim.SGD([{"params": [net.weight], "lr": 4.0}, {"params": [net.bias], "lr": 1.0}])
    one, two = (rate_curve(net, (x.__getitem__, y), None, o) for o in (opt, alone))
    assert np.array_equal(one[1], two[1])


def test_the_finders_errors_are_sentences():
    net, opt = trained()
    x, y = problem()
    pair = (x.__getitem__, y)
    for call, say in (
        (lambda: rate_curve(net, pair, None, opt, low=1.0, high=0.1), "0 < low < high"),
        (lambda: rate_curve(net, pair, None, opt, steps=3), "10 steps or more"),
        (lambda: rate_curve(net, (x.__getitem__, y[:0]), None, opt), "there are no images"),
        (lambda: find_rate(net, pair, None, opt, rule="valley"), "use one of steepest, lowest"),
        (lambda: rate_curve(net, pair, None, torch.optim.SGD(net.parameters(), lr=0.0)), "every rate of the optimiser is 0"),
    ):
        with pytest.raises(SFTError, match=say):
            call()
    net.kept = net.head.weight * 2  # part of a graph: cannot be copied
    with pytest.raises(SFTError, match="cannot be copied"):
        rate_curve(net, pair, None, opt)


# ---- from curve to number


@quick
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(0, 5))
def test_smoothing_is_the_mean_of_neighbours(losses, reach):
    want = [np.mean(losses[max(i - reach, 0) : i + reach + 1]) for i in range(len(losses))]
    assert np.allclose(smoothed(losses, reach), want, rtol=1e-6, atol=1e-6)


def gets_a_rate(losses):
    try:
        return bool(suggest(np.geomspace(1e-5, 1, len(losses)), losses))
    except SFTError:
        return False


def test_noise_seldom_gets_a_rate_and_a_flat_curve_never():
    lucky = [gets_a_rate(2 + 0.4 * np.random.default_rng(seed).normal(size=50)) for seed in range(300)]
    assert np.mean(lucky) < 0.12
    with pytest.raises(SFTError, match="still falls at the largest rate, 1;"):
        suggest(np.geomspace(1e-5, 1, 50), 2 - np.linspace(0, 1, 50))
    assert not gets_a_rate(np.full(50, 2.0)) and not gets_a_rate(np.array([2.0, 1.0, 0.5]))


@pytest.mark.parametrize("rule", RULES)
def test_rules_stay_at_or_below_the_lowest_point(rule):
    rates = np.geomspace(1e-5, 1, 50)
    curve = 2 - 1 / (1 + np.exp(-2 * (np.log10(rates) + 3))) + np.where(rates > 0.03, 50 * (rates - 0.03), 0)
    assert suggest(rates, curve, rule)[0] <= rates[curve.argmin()]
