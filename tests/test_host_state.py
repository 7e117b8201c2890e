"What the program that calls the library has set up in torch, and other threads of it, change nothing."
import threading

import pytest
import torch

from sft_course.tools.files import whole_file
from sft_course.tools.torch_state import own_torch_state


def state():
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


HOSTS = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_inside_torch_is_as_in_a_fresh_process(name):
    with HOSTS[name]():
        before = state()
        with own_torch_state():
            w = torch.ones(3, 3, requires_grad=True)
            (w @ w).sum().backward()
            assert w.grad.tolist() == [[6.0] * 3] * 3 and w.dtype == w.grad.dtype == torch.float32
        assert state() == before


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_another_default_type(doubles):
    @own_torch_state()
    def made():
        return torch.ones(1).dtype
    assert made() == torch.float32 and torch.ones(1).dtype == torch.float64
    with pytest.raises(KeyError), own_torch_state():
        raise KeyError
    assert torch.get_default_dtype() == torch.float64


def test_the_last_of_several_threads_puts_the_default_type_back(doubles):
    "The type belongs to the process: were each thread to put back what it found, the second would run in the wrong one."
    inside, go, seen = threading.Event(), threading.Event(), []

    def long():
        with own_torch_state():
            inside.set()
            go.wait(10)
            seen.append(torch.ones(1).dtype)
    thread = threading.Thread(target=long)
    with own_torch_state():
        thread.start()
        inside.wait(10)
    go.set()
    thread.join()
    assert seen == [torch.float32] and torch.get_default_dtype() == torch.float64


def test_threads_that_write_one_file_do_not_share_a_temporary_one(tmp_path):
    names, both = [], threading.Barrier(2)

    def write(letter):
        with whole_file(tmp_path / "f.txt") as temp:
            names.append(temp)
            both.wait(10)
            temp.write_text(letter * 100_000)
            both.wait(10)
    threads = [threading.Thread(target=write, args=letter) for letter in "ab"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(names)) == 2 and [p.name for p in tmp_path.iterdir()] == ["f.txt"]
    assert (tmp_path / "f.txt").read_text() in ("a" * 100_000, "b" * 100_000)
