"What processes say to one another, with 2 and 4 of them: gradients, heads, blocks, metrics, decisions."
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_course.loop import score
from sft_course.scale import sharded_head
from sft_course.tools.heads import fit_head
from sft_course.tools.launch import in_processes
from sft_course.tools.settings import SFTError

from .small import WAYS, trained


def everything(rank, count):
    "All that the tests below look at, so that the processes are started once."
    from distributed import small
    from sft_course.loop import batches
    from sft_course.scale import sharded_head
    from sft_course.tools.processes import agreed, everywhere, from_first, in_turns, share
    found = {"share": [share(np.arange(n)).tolist() for n in (10, 7, 3, 1)]}
    found |= {name: small.trained(**how) for name, how in small.WAYS.items()}
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(61, 20, generator=draw), torch.randint(0, 4, (61,), generator=draw)
    W, b, sent = sharded_head(x[rank::count], y[rank::count], 61, 4)
    found["head"] = W, b
    found["blocks"] = torch.cat(list(in_turns(batches(61, 8), lambda at: x[at] * 2)))
    found["first"] = from_first(lambda: {"rank": rank, "tensor": torch.ones(2)})
    found["asked"] = agreed(lambda: 15 if rank == count - 1 else None)(), agreed(lambda: None)()
    found["everywhere"] = everywhere(True), everywhere(rank == 0)
    for name, call in {"a block fails": lambda: list(in_turns(range(3), lambda b: 1 / (b - 1))),
                       "the first fails": lambda: from_first(lambda: 1 / 0)}.items():
        try: call()
        except ZeroDivisionError as e: found[name] = str(e)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    return in_processes(request.param, everything)


def test_every_item_is_counted_once_whatever_the_remainder(found):
    for k, n in enumerate((10, 7, 3, 1)):
        assert sorted(sum((f["share"][k] for f in found), [])) == list(range(n))


@pytest.mark.parametrize("name", WAYS)
def test_gradients_and_steps_are_those_of_one_process(found, name):
    want = trained(**WAYS[name])
    for f in found:
        torch.testing.assert_close(f[name]["grad"], want["grad"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(f[name]["weights"], want["weights"], atol=1e-6, rtol=1e-6)
        assert f[name]["losses"] == pytest.approx(want["losses"], abs=1e-6)
        assert f[name]["terms"] == want["terms"]


def test_all_processes_hold_the_same_weights_after_unfreezing_in_mid_run(found):
    for name in WAYS:
        assert all(torch.equal(f[name]["weights"], found[0][name]["weights"]) for f in found)


def test_the_head_from_sums_is_that_of_one_process(found):
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(61, 20, generator=draw), torch.randint(0, 4, (61,), generator=draw)
    W, b, _ = sharded_head(x, y, 61, 4)
    p, q = ((x @ w.T + c).softmax(1) for w, c in ((W, b), fit_head(x, y, 4, weight_decay=.01)))
    torch.testing.assert_close(p, q, atol=.01, rtol=0)
    for f in found:
        torch.testing.assert_close(f["head"][0], W, atol=1e-5, rtol=0)
        torch.testing.assert_close(f["head"][1], b, atol=1e-5, rtol=0)


def test_blocks_are_gathered_in_order_and_metrics_are_of_items(found):
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(61, 20, generator=draw), torch.randint(0, 4, (61,), generator=draw)
    for f in found:
        assert torch.equal(f["blocks"], x * 2)
        assert score(f["blocks"][:, :4], y) == score((x * 2)[:, :4], y)


def test_one_does_it_for_all_and_all_decide_alike(found):
    for f in found:
        assert f["first"]["rank"] == 0 and torch.equal(f["first"]["tensor"], torch.ones(2))
        assert f["asked"] == (15, None) and f["everywhere"] == (True, False)


def test_an_error_in_one_is_an_error_in_all(found):
    assert all("division by zero" in f["a block fails"] and "division by zero" in f["the first fails"] for f in found)


def fails(rank, count):
    if rank == 1:
        raise ValueError("rank 1 has a reason")
    dist.all_reduce(torch.ones(1))  # noqa: F821


def test_a_process_that_fails_ends_the_others_and_signals_do_what_they_did():
    with pytest.raises(SFTError, match="fails: a process failed"):
        in_processes(2, fails)
    for name in (signal.SIGINT, signal.SIGTERM):
        assert "torch" not in str(getattr(signal.getsignal(name), "__module__", ""))


def test_the_mean_of_means_is_another_number():
    losses = F.cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1]), reduction="none") * torch.tensor([1., 2, 9])
    means = [losses[r::2].mean() for r in range(2)]
    assert not torch.isclose(torch.stack(means).mean(), losses.mean())
