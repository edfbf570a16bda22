# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
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


def mark(tensor: torch.Tensor, origin: str) -> None:
    """Note on a tensor where it comes from, in words; results of `TrainedUses` inherit it."""
    setattr(tensor, _MARK, origin)


def mark_of(tensor: torch.Tensor) -> str | None:
    """Where a tensor comes from, if that was noted."""
    return tensor.__dict__.get(_MARK)


class TrainedUses(TorchFunctionMode):
    """While active, marks the results of operations on trained parameters, and on what is marked.

    Args:
        trained: parameters.
        name_of: what to call one of them in a message.

    Attributes:
        in_callback: whether a step callback of the user's runs. There numpy gets what it asks for, as it would outside
            of recording, where tensors carry no graph.
        has_left_torch: whether a tensor that carries a gradient became a numpy array inside a step callback.
    """

    def __init__(self, trained: Sequence[torch.nn.Parameter], name_of: Callable[[torch.nn.Parameter], str]) -> None:
        super().__init__()
        self.in_callback = False
        self.has_left_torch = False
        self._trained = set(map(id, trained))
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
        origin = self._origin((*args, *kwargs.values()))
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
                if id(value) in self._trained:
                    name = self._name_of(value)
                    return f"the trained parameter {name}, used outside of the transformer's recorded calls"
                if self._has_marks and (origin := mark_of(value)) is not None:
                    return origin
            elif isinstance(value, list | tuple) and (origin := self._origin(value)) is not None:
                return origin
        return None

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
