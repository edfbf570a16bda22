# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""An accelerator without float64 and pinned memory, played by the CPU, and what makes the host wait for it."""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result, or its shape, the host must wait for.
_READS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}


class DeviceError(Exception):
    """What the device cannot do. (A TypeError would be hidden by operators, a RuntimeError by who expects one.)"""


class PretendedDevice:
    """While open, tensors on the CPU count as a device's, but for those that were brought to the host.

    On the host are what `Tensor.cpu` returns, what is made without naming a device, and what is computed of these
    alone. ("cpu" as a string is the host too; the device is a `torch.device`.) All else is on the device, which is as
    strict as Apple's MPS: float64 and complex128 results, pinned memory, numpy arrays and operations on tensors of
    both sides raise DeviceError.

    Args:
        has_float64: whether the device computes in float64 and takes pinned memory, as CUDA does.

    Attributes:
        reads: where the host waited for numbers of the device, each as "operation at file:line", the place in `flowbp`
            or whatever else called PyTorch.
        sends: the same for copies to the device, for which the host waits as well unless its memory is pinned.
    """

    def __init__(self, has_float64: bool = False) -> None:
        self.reads: list[str] = []
        self.sends: list[str] = []
        self._refused = () if has_float64 else (torch.float64, torch.complex128)
        self._on_host: set[int] = set()
        # Whether the innermost function of PyTorch that runs makes its results on the host; `None` outside of all.
        self._makes_on_host: bool | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "PretendedDevice":
        # The state of a generator is on the host, and no operation makes it.
        state = torch.get_rng_state
        self._stack.enter_context(mock.patch("torch.get_rng_state", lambda: self._bring(state())))
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the host."""
        return tensor.untyped_storage()._cdata in self._on_host

    def function(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of PyTorch."""
        if self._refused and (func is torch.Tensor.pin_memory or kwargs.get("pin_memory")):
            raise DeviceError(f"pinned memory, at {_place()}")
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and self.is_on_host(tensor):
            if func is torch.Tensor.to and any(map(self._is_device, (*args[1:], *kwargs.values()))):
                self.sends.append(f"to at {_place()}")
                return self._send(func(*args, **kwargs))
        elif tensor is not None:
            if func is torch.Tensor.cpu or (
                func is torch.Tensor.to and any(map(_is_host, (*args[1:], *kwargs.values())))
            ):
                self.reads.append(f"{func.__name__} at {_place()}")
                return self._bring(func(*args, **kwargs).clone())
            if func is torch.Tensor.tolist:
                self.reads.append(f"tolist at {_place()}")
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise DeviceError(f"numpy of a tensor on the device, at {_place()}")
        has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and self._is_device(device) and not has_tensors:
            self.sends.append(f"{func.__name__} at {_place()}")
        is_made_here = not has_tensors and (device is None or _is_host(device))
        before, self._makes_on_host = self._makes_on_host, bool(self._makes_on_host) or is_made_here
        try:
            return func(*args, **kwargs)
        finally:
            self._makes_on_host = before

    def operation(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operation that is carried out."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        of_device = [tensor for tensor in inputs if not self.is_on_host(tensor)]
        name = func.overloadpacket.__name__
        if of_device and (name in _READS or (name.startswith("index") and _is_boolean(args[1]))):
            self.reads.append(f"{name} at {_place()}")
        if name not in ("copy_", "_to_copy") and not self._makes_on_host:
            of_host = [tensor for tensor in inputs if self.is_on_host(tensor) and tensor.ndim]
            if of_host and of_device:
                raise DeviceError(f"{name} of tensors on the device and on the host, at {_place()}")
        result = func(*args, **kwargs)
        # Of those that make tensors, `torch.from_numpy` alone does not pass through `function`.
        is_from_numpy = name == "lift_fresh" and self._makes_on_host is None
        makes_on_host = self._makes_on_host or is_from_numpy or (inputs and not of_device)
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            if makes_on_host:
                self._bring(leaf)
            elif leaf.dtype in self._refused and not self.is_on_host(leaf):
                raise DeviceError(f"{name} gives {leaf.dtype} on the device, at {_place()}")
        return result

    def _is_device(self, target: Any) -> bool:
        """Whether `Tensor.to` of this argument leads to the device."""
        return isinstance(target, torch.device) or (isinstance(target, torch.Tensor) and not self.is_on_host(target))

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._on_host:
            self._on_host.add(storage._cdata)
            weakref.finalize(storage, self._on_host.discard, storage._cdata)
        return tensor

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        # Where the dtype stays, it is the host's own memory.
        tensor = tensor.clone()
        self._on_host.discard(tensor.untyped_storage()._cdata)
        return tensor


class _Functions(TorchFunctionMode):
    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.device.function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return self.device.operation(func, args, kwargs or {})


def _is_host(target: Any) -> bool:
    return isinstance(target, str) and target == "cpu"


def _is_boolean(indices: Any) -> bool:
    return any(
        isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in tree_leaves(indices)
    )


def _place() -> str:
    """Where the code is: the innermost frame of `flowbp`, or of whatever is neither PyTorch nor this module."""
    frame, first = sys._getframe(1), None
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] == "flowbp" and name not in ("flowbp.marks", "flowbp.host"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if first is None and name != __name__ and name.split(".")[0] != "torch":
            first = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return first or "?"
