"""A device that only pretends: tensors "on cuda:0" that compute on the CPU, and refuse what a GPU would refuse.

It shows that every tensor of a computation is where it belongs, and that the numbers are those of the CPU. It knows
nothing of a GPU's kernels, their speed, their rounding or their memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_ATEN = torch.ops.aten
SIZES = {_ATEN.nonzero.default, _ATEN.bincount.default}  # have to know what they make before they make it
COPIES = {_ATEN.copy_.default, _ATEN._to_copy.default}
# In these, torch makes tensors of the CPU of plain numbers.
NUMBERS = {_ATEN.fill_.Tensor, _ATEN.where.self, _ATEN.clamp_min_.Tensor, _ATEN.index_put_.default}
WAITS = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
waited: Counter[str] = Counter()  # by what the host has waited for the pretended device


class Placed(Tensor):
    """A tensor on the pretended device. For torch's own C++ it is on the CPU, so that autograd needs no device of its
    kind; for Python code, and for every operation, it is on `DEVICE`."""

    held: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Placed:
        placed: Placed = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        placed.held = held.detach()
        return placed

    def __repr__(self, **_: object) -> str:
        return f"Placed({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        apart = [t for t in tensors if not isinstance(t, Placed) and (t.dim() or func not in NUMBERS)]
        if apart and func not in COPIES:
            there = [f"{t.device} {tuple(t.shape)}" for t in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {', '.join(there)}")
        if func is _ATEN.native_group_norm.default and not args[0].is_contiguous():
            raise RuntimeError("native_group_norm: CUDA's takes contiguous input alone, not channels-last")
        waited.update([str(func)] if func in SIZES else [])
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if (written := _written(func, args, kwargs)) is not None:
            return written
        # In inference mode a view of a tensor from outside of it is none of inference mode's own.
        outside = any(result.alias_info for result in func._schema.returns) and not tensors[0].is_inference()
        with torch.inference_mode(torch.is_inference_mode_enabled() and not outside):
            return tree_map(lambda t: Placed(t) if isinstance(t, Tensor) else t, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Placed) else value


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation that writes into its arguments returns: these; None for others."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            target = args[place] if place < len(args) else kwargs[argument.name]
            if isinstance(target, Placed) and (target.shape, target.stride()) != (
                target.held.shape,
                target.held.stride(),
            ):
                raise NotImplementedError(f"{func} changes a tensor's shape")
            written.append(target)
    if not written or not func._schema.returns:
        return None
    return written[0] if len(written) == 1 else tuple(written)


class _Pretence(TorchFunctionMode):
    """What takes tensors there and back, or is asked of a device by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, own = dict(kwargs or {}), args[0] if args else None
        if isinstance(own, Placed):
            if func in WAITS:
                waited[func.__name__] += 1
                return own.held.tolist() if func is Tensor.tolist else func(own.held)
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
            if func is Tensor.pin_memory:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
            if func is Tensor.cpu:
                waited["cpu"] += 1
                return own.held.clone()
            if func is Tensor.new_tensor:
                return Placed(torch.tensor(*args[1:], **{"dtype": own.dtype, **kwargs}))
        elif func is Tensor.pin_memory:
            return own
        if func is Tensor.to:
            return self._to(own, *args[1:], **kwargs)
        if _is_cuda(kwargs.get("device")):
            waited.update(["tensor"] if func is torch.tensor else [])
            del kwargs["device"]
            return Placed(func(*args, **kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _to(own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        like = [of for a in given if isinstance(a, Tensor) for of in (a.device, a.dtype)]
        devices = [a for a in (*given, *like) if isinstance(a, str | torch.device)]
        dtype = next((a for a in (*given, *like) if isinstance(a, torch.dtype)), own.dtype)
        layout = {"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {}
        if not devices or _is_cuda(devices[0]) == isinstance(own, Placed):
            return own.to(dtype, **layout)
        if isinstance(own, Placed):
            waited["to"] += 1
            return own.held.clone().to(dtype, **layout)
        if not kwargs.get("non_blocking"):
            waited["to"] += 1
        return Placed(own.detach().clone().to(dtype, **layout))


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[call-overload]


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within, "cuda" is a device, in this thread."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    waited.clear()
    try:
        with _Pretence():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
