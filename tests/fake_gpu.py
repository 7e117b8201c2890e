"""A stand-in for a GPU on a machine without one: tensors that say they lie on `cuda`, and are computed by the processor.

What a real GPU refuses is refused here: an operation on tensors of two devices, and NumPy's view of a tensor that lies on the GPU. Every
transfer to the processor (`.item()`, `.cpu()`, a bool of a tensor) is counted, because each makes the processor wait for the GPU; so is
every copy to the GPU that is not from pinned memory, or is waited for.
What it cannot see: whether a GPU has an operation at all, its speed and memory, streams, and kernels that round otherwise; under autocast it
stays in float32.
"""
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
waits = Counter()  # by the name of the operation


class OnGPU(torch.Tensor):
    "A tensor on the GPU: `.there` holds its numbers."

    @staticmethod
    def __new__(cls, there):
        return torch.Tensor._make_wrapper_subclass(
            cls, there.size(), strides=there.stride(), storage_offset=there.storage_offset(), dtype=there.dtype, layout=there.layout,
            device="meta", requires_grad=there.requires_grad)

    def __init__(self, there):
        self.there = there.detach()

    @property
    def device(self): return GPU

    @property
    def is_cuda(self): return True

    def untyped_storage(self): return self.there.untyped_storage()

    def __repr__(self):
        return f"OnGPU({self.there})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def name(func): return str(func.overloadpacket)


def is_gpu(device): return device is not None and torch.device(device).type == "cuda"


def run(func, args, kwargs):
    "One operation: on the processor's copies, its outputs on the GPU again."
    given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    ours = [a for a in given if isinstance(a, OnGPU)]
    others = [a for a in given if not isinstance(a, OnGPU)]
    called = name(func)
    target = kwargs.get("device")
    if called in ("aten._to_copy", "aten.copy_", "aten._copy_from", "aten._local_scalar_dense", "aten._pin_memory", "aten.is_pinned"):
        pass
    elif others and ours and any(a.dim() for a in others) and not indexing(called, args):
        raise RuntimeError(f"{called}: tensors on two devices: "
                           + ", ".join(f"{'cuda' if isinstance(a, OnGPU) else 'cpu'} {tuple(a.shape)}" for a in given))
    if called == "aten._local_scalar_dense" or called == "aten._to_copy" and target is not None and not is_gpu(target) and ours:
        waits[called] += 1
    if called == "aten._to_copy" and is_gpu(target) and not ours and not (kwargs.get("non_blocking") and hasattr(args[0], "pinned")):
        waits["to the GPU"] += 1
    if called == "aten.copy_" and ours and not isinstance(args[0], OnGPU):
        waits[called] += 1
    there = {k: torch.device("cpu") if k == "device" and is_gpu(v) else v for k, v in kwargs.items()}
    inner = pytree.tree_map(lambda a: a.there if isinstance(a, OnGPU) else a, (args, there))
    out = func(*inner[0], **inner[1])
    if called == "aten._to_copy":
        stays = is_gpu(target) if target is not None else bool(ours)
    else:
        stays = bool(ours) or is_gpu(target)
    if called == "aten._local_scalar_dense" or not stays:
        return out
    known = {id(a.there): a for a in ours}  # an operation in place gives back the tensor it was given
    def back(t):
        if not isinstance(t, torch.Tensor):
            return t
        return known[id(t)] if id(t) in known else OnGPU(t)
    return pytree.tree_map(back, out)


def indexing(called, args):
    "A GPU takes indices from the processor."
    return called in ("aten.index", "aten.index_put_", "aten.index_put", "aten._index_put_impl_") and isinstance(args[0], OnGPU)


class Made(TorchDispatchMode):
    "Tensors that are made on the GPU."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(a, OnGPU) for a in pytree.tree_leaves((args, kwargs))) or is_gpu(kwargs.get("device")):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def there(index):
    "An index as a GPU takes it; one that lies elsewhere is copied, and waited for."
    outside = isinstance(index, np.ndarray) or isinstance(index, torch.Tensor) and not isinstance(index, OnGPU)
    if outside:
        waits["index"] += 1
    return OnGPU(torch.as_tensor(index)) if outside else index


class First(TorchFunctionMode):
    "`cuda` is `cuda:0`: which of several it is, torch would ask the driver."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def first(a): return GPU if isinstance(a, torch.device) and a.type == "cuda" or isinstance(a, str) and a == "cuda" else a
        args, kwargs = [first(a) for a in args], {k: first(v) for k, v in (kwargs or {}).items()}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnGPU):  # indices may come from outside
            args = (args[0], pytree.tree_map(there, args[1]), *args[2:])
        if func is torch.Tensor.pin_memory:
            args[0].pinned = True
            return args[0]
        if func is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            return args[0].cpu().tolist()
        if func in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            return func(*args, **kwargs | {"device": None}).to(GPU)
        if func is torch.Tensor.to and isinstance(args[1] if len(args) > 1 else None, torch.Tensor):  # as another tensor
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def gpu():
    "Inside the block torch finds one GPU."
    fakes = {  # a function of its own for each: torch._dynamo refuses one under two names
             "_lazy_init": lambda *a: None, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
             "get_device_name": lambda *a: "a stand-in", "get_device_capability": lambda *a: (8, 0), "is_bf16_supported": lambda *a: True,
             "mem_get_info": lambda *a: (16 << 30, 16 << 30), "is_initialized": lambda: False, "manual_seed_all": lambda *a: None,
             "get_rng_state": lambda *a: torch.zeros(1, dtype=torch.uint8), "set_rng_state": lambda *a: None,
             "get_rng_state_all": lambda: [], "set_rng_state_all": lambda *a: None, "synchronize": lambda *a: None, "empty_cache": lambda *a: None}
    waits.clear()
    with ExitStack() as stack:
        for key, value in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, key, value))
        for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, check):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, check, lambda self: None))
        stack.enter_context(First())
        stack.enter_context(Made())
        yield waits
