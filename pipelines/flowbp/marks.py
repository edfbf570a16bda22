# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Marks on tensors that a trained parameter went into outside of the recorded calls.

The graph of the glue shows such a use where gradients are on. Pipelines compute much without gradients (everything
before the first transformer call, for one), and there a value that depends on a trained parameter looks like any
other. `TrainedUses` sees every operation of the pipeline's own code and passes a mark on from operand to result, so
that the value is known where it reaches a transformer's inputs, a velocity or the images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves

_MARK = "_flowbp_mark"
# Functions that look at the dtype, device or shape of some operands only: how many of the first ones count.
_METADATA_OF = {
    **dict.fromkeys((torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.expand_as), 1),
    **dict.fromkeys((torch.Tensor.view_as, torch.Tensor.reshape_as), 1),
    **dict.fromkeys((torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like), 0),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), 0),
    **dict.fromkeys((torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty), 0),
    **dict.fromkeys((torch.Tensor.new_full, torch.Tensor.new_tensor), 0),
}


def mark(tensor: torch.Tensor, origin: str) -> None:
    """Note on a tensor, and on what it is a view of, where it comes from; results of `TrainedUses` inherit it."""
    setattr(tensor, _MARK, origin)
    if tensor._base is not None:
        setattr(tensor._base, _MARK, origin)


def mark_of(tensor: torch.Tensor) -> str | None:
    """Where a tensor, or what it is a view of, comes from, if that was noted."""
    found = tensor.__dict__.get(_MARK)
    if found is None and tensor._base is not None:
        return tensor._base.__dict__.get(_MARK)
    return found


class TrainedUses(TorchFunctionMode):
    """While active, marks the results of operations on trained parameters, and on what is marked.

    Args:
        trained: parameters that are trained. Views of them, made at any time, count as they do.
        untrained: parameters that require a gradient and are not trained. Every other leaf that requires one counts.
        name_of: what to call a trained parameter in a message.

    Attributes:
        in_callback: whether a step callback of the user's runs. There numpy gets what it asks for, as it would outside
            of recording, where tensors carry no graph.
        has_left_torch: whether a tensor that carries a gradient became a numpy array inside a step callback.
        is_in_loop: whether gradients are on, so that the graph shows what depends on a tensor that requires one.
    """

    def __init__(
        self,
        trained: Sequence[torch.nn.Parameter],
        untrained: Sequence[torch.nn.Parameter],
        name_of: Callable[[torch.nn.Parameter], str],
    ) -> None:
        super().__init__()
        self.in_callback = False
        self.has_left_torch = False
        self.is_in_loop = False
        self._trained = set(map(id, trained))
        self._untrained = set(map(id, untrained))
        # Where their numbers lie: parameters that were read from one file share a storage.
        self._places: dict[int, list[tuple[int, int, torch.nn.Parameter]]] = {}
        for parameter in trained:
            if type(parameter) is torch.nn.Parameter and not parameter.is_meta:
                start = parameter.data_ptr()
                place = (start, start + parameter.nbytes, parameter)
                self._places.setdefault(parameter.untyped_storage()._cdata, []).append(place)
        self._name_of = name_of
        self._is_suspended = False
        # Nothing needs to be passed on until something is marked.
        self._has_marks = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` and pass marks on."""
        kwargs = kwargs or {}
        # Inside torch.compile's tracing a mark would become part of the compiled code, and a reason to compile again.
        if self._is_suspended or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if self.in_callback and func in (torch.Tensor.numpy, torch.Tensor.__array__) and args[0].requires_grad:
            self.has_left_torch = True
            return func(args[0].detach(), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        origin = self._origin((*args, *kwargs.values())[: _METADATA_OF.get(func)])
        if origin is not None:
            self._has_marks = True
            # Assignments to a part of a tensor return nothing.
            for tensor in (args[0],) if func is torch.Tensor.__setitem__ else tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in self._trained:
                    mark(tensor, origin)
        return result

    def note(self, tensors: Sequence[torch.Tensor], origin: str) -> None:
        """Mark the results of a transformer call that is not recorded."""
        self._has_marks = True
        for tensor in tensors:
            mark(tensor, origin)

    def _origin(self, values: Sequence[Any]) -> str | None:
        for value in values:
            if isinstance(value, torch.Tensor):
                if (origin := self._origin_of(value)) is not None:
                    return origin
            elif isinstance(value, list | tuple) and (origin := self._origin(value)) is not None:
                return origin
        return None

    def _origin_of(self, tensor: torch.Tensor) -> str | None:
        if self._has_marks and (origin := mark_of(tensor)) is not None:
            return origin
        if id(tensor) in self._trained:
            return self._use_of(tensor)
        is_on_its_own = tensor.is_leaf or not self.is_in_loop
        if tensor.requires_grad and is_on_its_own and id(tensor) not in self._untrained:
            return f"a tensor of shape {tuple(tensor.shape)} that requires a gradient and is not the transformer's"
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta:
            for start, end, parameter in self._places.get(tensor.untyped_storage()._cdata, ()):
                if start <= tensor.data_ptr() < end:
                    return self._use_of(parameter)
        return None

    def _use_of(self, parameter: torch.Tensor) -> str:
        return f"the trained parameter {self._name_of(parameter)}, used outside of the transformer's recorded calls"

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let a recorded call compute as if the mode were not there.

        Compiled code is bound to the modes that are active, so the mode comes off where no other lies above it.
        """
        is_on_top = _get_current_function_mode() is self
        if is_on_top:
            self.__exit__(None, None, None)
        else:
            was_suspended, self._is_suspended = self._is_suspended, True
        try:
            yield
        finally:
            if is_on_top:
                self.__enter__()
            else:
                self._is_suspended = was_suspended


_DRAWING = {
    *(torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.randint, torch.randint_like, torch.randperm),
    *(
        torch.bernoulli,
        torch.normal,
        torch.multinomial,
        torch.poisson,
        torch.Tensor.bernoulli,
        torch.Tensor.multinomial,
    ),
    *(torch.Tensor.bernoulli_, torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_),
    *(torch.Tensor.exponential_, torch.Tensor.cauchy_, torch.Tensor.geometric_, torch.Tensor.log_normal_),
}
_DROPPING = {
    *(torch.nn.functional.dropout, torch.nn.functional.dropout1d, torch.nn.functional.dropout2d),
    *(torch.nn.functional.dropout3d, torch.nn.functional.alpha_dropout, torch.nn.functional.feature_alpha_dropout),
    torch.dropout,
}


class Draws(TorchFunctionMode):
    """While active, notes a call that draws random numbers, from whatever generator.

    Attributes:
        found: name of the first function that drew; `None` if none did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`."""
        kwargs = kwargs or {}
        if self.found is None and (func in _DRAWING or (func in _DROPPING and _drops(args, kwargs))):
            self.found = func.__name__
        return func(*args, **kwargs)


def _drops(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of one of torch's dropout functions, `(input, p, training, ...)`, drops anything."""
    values = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
    return bool(values.get("p", 0.5)) and bool(values.get("training", True))
