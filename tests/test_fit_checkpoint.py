"`fit` goes on from what `fit` has written, and from nothing else."
import pytest
import torch
from torch import nn

from sft_course.tools.checkpoints import read_checkpoint, save_checkpoint
from sft_course.tools.settings import SFTError
from sft_course.tools.torch_state import seeded
from sft_course.tools.training import fit


def small():
    with seeded(0):
        net = nn.Linear(3, 2)
    return net, torch.optim.SGD(net.parameters(), lr=.1)


X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = (X.__getitem__, Y)


@pytest.mark.parametrize("more", [{}, {"epoch": 2}, {"history": [], "plan": 3, "best": None, "part": {}}, {"plan": {"seed": 0}}])
def test_a_checkpoint_of_something_else_is_refused_and_nothing_is_loaded(tmp_path, more):
    net, sgd = small()
    file = save_checkpoint(tmp_path / "a.ckpt", net, sgd, **more)
    whole = file.read_bytes()
    other, theirs = small()
    with torch.no_grad():
        other.weight.fill_(7)
    with pytest.raises(SFTError, match="a.ckpt: this checkpoint holds no run of `fit` to go on with; give another file, or `resume=False`"):
        fit(other, DATA, DATA, theirs, 2, checkpoint=file)
    assert (other.weight == 7).all() and file.read_bytes() == whole
    assert len(fit(other, DATA, DATA, theirs, 2, checkpoint=file, resume=False).history) == 2


def test_a_run_with_another_plan_is_refused_before_anything_is_loaded(tmp_path):
    net, sgd = small()
    fit(net, DATA, DATA, sgd, 1, checkpoint=tmp_path / "a.ckpt")
    other, theirs = small()
    with torch.no_grad():
        other.weight.fill_(7)
    with pytest.raises(SFTError, match="that run had batch_size = 32"):
        fit(other, DATA, DATA, theirs, 2, batch_size=5, checkpoint=tmp_path / "a.ckpt")
    assert (other.weight == 7).all()


def test_who_watches_is_given_each_row_once_and_those_from_before_a_stop_first(tmp_path):
    first, then = [], []
    fit(*_run(), 2, checkpoint=tmp_path / "a.ckpt", watch=first.append)
    done = fit(*_run(), 4, checkpoint=tmp_path / "a.ckpt", watch=then.append)
    assert len(first) == 2 and then == done.history and then[:2] == first


def _run():
    net, sgd = small()
    return net, DATA, DATA, sgd


def test_a_checkpoint_without_an_optimiser_can_be_written_and_read(tmp_path):
    net, _ = small()
    assert read_checkpoint(save_checkpoint(tmp_path / "a.ckpt", net, None, done=1))["more"] == {"done": 1}


@pytest.mark.parametrize("host", [torch.no_grad, torch.inference_mode])
def test_training_needs_nothing_of_the_host(host):
    net, sgd = small()
    with host():
        history = fit(net, DATA, DATA, sgd, 3).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
