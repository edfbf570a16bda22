# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks and attention processors that stand in a transformer for single calls.

Skip-layer guidance, perturbed attention and autoguidance place them before one call and take them off after it. Each
recorded call keeps its own, and gets them back around its replay and its backward pass, in which gradient
checkpointing computes blocks again. Only what keeps nothing from call to call is put back. Whatever else was exchanged
stays as it is now, and the state of the transformer shows it (`state.ModelState.change`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

import torch
from diffusers.hooks.hooks import HookFunctionReference
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, FeedForwardSkipHook, TransformerBlockSkipHook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook

PLAIN = (bool, int, float, str, type(None))
# Hooks of diffusers that compute from their arguments and their own numbers alone.
STATELESS_HOOKS = (
    AttentionProcessorSkipHook,
    FeedForwardSkipHook,
    TransformerBlockSkipHook,
    SmoothedEnergyGuidanceHook,
)
_ABSENT = object()


def plain_attributes(value: Any) -> tuple[tuple[str, Any], ...]:
    """Numbers, words and lists of them among an object's attributes."""
    found = []
    for name, attribute in getattr(value, "__dict__", {}).items():
        if isinstance(attribute, PLAIN):
            found.append((name, attribute))
        elif isinstance(attribute, list | tuple) and all(isinstance(each, PLAIN) for each in attribute):
            found.append((name, tuple(attribute)))
    return tuple(found)


def keeps_nothing(processor: Any) -> bool:
    """Whether an attention processor has no attributes but numbers and words, so that each of its calls is alike."""
    if isinstance(processor, torch.nn.Module | FunctionType | functools.partial):
        return False
    return len(plain_attributes(processor)) == len(getattr(processor, "__dict__", {}))


def stateless_hooks(part: torch.nn.Module, forward: Any) -> tuple[list[Any], Any]:
    """The hooks of `STATELESS_HOOKS` around a part's forward, outermost first, and the forward that they wrap.

    The latter is `None` where it is the class's own: diffusers leaves that on the instance when it removes a hook.
    """
    hooks = []
    while (reference := _reference(forward)) is not None:
        hook = getattr(reference.pre_forward, "__self__", None)
        if type(hook) not in STATELESS_HOOKS:
            break
        hooks.append(hook)
        forward = reference.original_forward or reference.forward
    is_own = getattr(forward, "__self__", None) is part and forward.__func__ is type(part).forward
    return hooks, None if is_own else forward


def _reference(forward: Any) -> Any:
    """What a forward that diffusers' `HookRegistry.register_hook` made calls; `None` for another one."""
    for cell in getattr(getattr(forward, "func", None), "__closure__", None) or ():
        with suppress(ValueError):
            if isinstance(cell.cell_contents, HookFunctionReference):
                return cell.cell_contents
    return None


class Placed:
    """The forwards and attention processors that parts of a transformer have of their own at one call.

    Attributes:
        key: equal to that of another call if these are the same objects.
        hooks: the hooks of `STATELESS_HOOKS` among them, each with its part.
    """

    def __init__(self, parts: Sequence[torch.nn.Module]) -> None:
        self._of: dict[torch.nn.Module, tuple[Any, Any]] = {}
        self.hooks: list[tuple[torch.nn.Module, Any]] = []
        for part in parts:
            attributes = part.__dict__
            if "forward" not in attributes and "processor" not in attributes:
                continue
            hooks, inner = stateless_hooks(part, attributes.get("forward"))
            self.hooks += [(part, hook) for hook in hooks]
            forward = attributes["forward"] if hooks or inner is not None else None
            self._of[part] = (forward, attributes.get("processor"))
        self.key = tuple((id(part), *map(id, own)) for part, own in self._of.items())

    @contextmanager
    def in_place(self, parts: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Put these hooks and processors back for the time of the block."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for part in parts:
                for name, value in self._to_put_back(part).items():
                    undo.append((part.__dict__, name, part.__dict__.get(name, _ABSENT)))
                    _put(part.__dict__, name, value)
            yield
        finally:
            for attributes, name, value in reversed(undo):
                _put(attributes, name, value)

    def _to_put_back(self, part: torch.nn.Module) -> Mapping[str, Any]:
        forward, processor = self._of.get(part, (None, None))
        now, found = part.__dict__, {}
        if forward is not now.get("forward"):
            (hooks, inner), (others, others_inner) = (
                stateless_hooks(part, each) for each in (forward, now.get("forward"))
            )
            if inner is others_inner and hooks != others:
                found["forward"] = _ABSENT if forward is None else forward
        other = now.get("processor")
        if processor is not other and all(each is not None and keeps_nothing(each) for each in (processor, other)):
            found["processor"] = processor
        return found


def as_they_are(modules: Sequence[torch.nn.Module]) -> Callable[[], None]:
    """A function that takes off the hooks that were placed since now, and puts the attention processors of now back.

    After an exception nobody else does: a guider removes its hooks, and a pipeline its processors, when a call ends.
    """
    parts = [part for module in modules for part in module.modules()]
    before = [
        (part, part.__dict__.get("processor"), stateless_hooks(part, part.__dict__.get("forward"))[0])
        for part in parts
    ]

    def put_back() -> None:
        for part, processor, hooks in before:
            registry = part.__dict__.get("_diffusers_hook")
            for name, hook in list(registry.hooks.items()) if registry is not None else ():
                if type(hook) in STATELESS_HOOKS and hook not in hooks:
                    registry.remove_hook(name, recurse=False)
            if processor is not None and "processor" in part.__dict__:
                part.processor = processor

    return put_back


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value
