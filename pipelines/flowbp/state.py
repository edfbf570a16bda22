# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The state of a transformer that a call depends on beside its arguments, and which of its parts a call runs.

A replay under another state, or one that takes a part's result from a cache, can give the recorded values and yet lack
a part of the gradient (an adapter that is fresh changes no value). So states and parts are compared, not only values.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class ModelState:
    """What a call of a model depends on beside its arguments.

    Attributes:
        parts: for each part of the model its training flag, hooks, adapters, attention processor and replaced forward.
        versions: version counters of the trained parameters.
        autocast: device type, whether autocast is on, and its dtype.
    """

    parts: tuple[tuple[Any, ...], ...]
    versions: tuple[int, ...]
    autocast: tuple[str, bool, torch.dtype]

    @classmethod
    def of(cls, module: torch.nn.Module) -> "ModelState":
        """The state of `module` now. Take it before hooks of one's own are placed."""
        parts, parameters = parts_of(module), parameters_of(module)
        device_type = parameters[0].device.type if parameters else "cpu"
        return cls(
            tuple(map(_facts, parts)),
            tuple(parameter._version for parameter in parameters if parameter.requires_grad),
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)),
        )

    def under_autocast(self) -> AbstractContextManager[Any]:
        """A context with the recorded autocast settings."""
        device_type, is_enabled, dtype = self.autocast
        if not is_enabled:
            return without_autocast(device_type)
        return torch.autocast(device_type, dtype=dtype)

    def change(self, module: torch.nn.Module, now: "ModelState") -> str | None:
        """In words, the first part of `module` that differs from this state; `None` if none does.

        Autocast is left out, as replays have it as it was; so are the parameters' versions.
        """
        if self.parts == now.parts:
            return None
        for part, before, after in zip(parts_of(module), self.parts, now.parts, strict=False):
            if before != after:
                return f"{name_of([module], part)}: {_difference(before, after)}"
        return f"{len(self.parts)} parts, now {len(now.parts)}"


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context for backward passes, whose matrix products autocast would round once more."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def parts_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """All parts of a model, itself among them, each once: `module.modules()`, but fast enough for every update."""
    found, pending = {}, [module]
    while pending:
        part = pending.pop()
        if part is not None and part not in found:
            found[part] = None
            pending += part._modules.values()
    return list(found)


def parameters_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """All parameters of a model; one that parts share comes once for each of them."""
    return [each for part in parts_of(module) for each in part._parameters.values() if each is not None]


def name_of(modules: Sequence[torch.nn.Module], wanted: torch.nn.Module | torch.nn.Parameter) -> str:
    """What a part or a parameter of one of these models is called in it; for messages."""
    for module in modules:
        for name, found in (*module.named_modules(), *module.named_parameters()):
            if found is wanted:
                return name or type(module).__name__
    return type(wanted).__name__


def _facts(part: torch.nn.Module) -> tuple[Any, ...]:
    attributes = part.__dict__
    hooks = [tuple(map(id, attributes[name].values())) for name in _HOOKS if attributes[name]]
    facts: tuple[Any, ...] = (part.training, tuple(hooks), id(attributes.get("forward")))
    processor = attributes.get("processor") or attributes["_modules"].get("processor")
    if processor is not None:
        facts += ("processor", type(processor).__name__, _plain_attributes(processor))
    # diffusers leaves an empty registry behind.
    if "_diffusers_hook" in attributes and attributes["_diffusers_hook"].hooks:
        facts += ("hooks", tuple(attributes["_diffusers_hook"].hooks))
    if isinstance(part, BaseTunerLayer):
        facts += ("adapters", tuple(part.active_adapters), part.disable_adapters, tuple(part.merged_adapters))
        facts += ("scaling", tuple(part.scaling.items()) if isinstance(getattr(part, "scaling", None), dict) else ())
    elif isinstance(part, AuxiliaryTrainingWrapper):
        facts += ("adapters", tuple(part.active_adapters), part.disable_adapters)
    return facts


def _plain_attributes(value: Any) -> tuple[tuple[str, Any], ...]:
    """Numbers, words and lists of them among an object's attributes."""
    found = []
    for name, attribute in getattr(value, "__dict__", {}).items():
        if isinstance(attribute, _PLAIN):
            found.append((name, attribute))
        elif isinstance(attribute, list | tuple) and all(isinstance(each, _PLAIN) for each in attribute):
            found.append((name, tuple(attribute)))
    return tuple(found)


def _difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    if before[0] != after[0]:
        return f"{'training' if before[0] else 'evaluation'} mode, now {'training' if after[0] else 'evaluation'} mode"
    if before[1] != after[1]:
        return "other hooks"
    if before[2] != after[2]:
        return "another forward"
    return f"{' '.join(map(str, before[3:]))}, now {' '.join(map(str, after[3:]))}"


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 shards the module."""
    return hasattr(module, "set_requires_gradient_sync")


def observable_parts(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Names and parts of a model on which hooks are called: all outside of what `torch.compile` compiled."""
    pending = [("", module)]
    while pending:
        name, part = pending.pop()
        if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
            continue
        yield name, part
        children = part._modules.items()
        pending += [(f"{name}.{child}" if name else child, each) for child, each in children if each is not None]


@contextmanager
def parts_that_run(
    module: torch.nn.Module, on_part: Callable[[str, torch.nn.Module], None] | None = None
) -> Iterator[set[torch.nn.Module]]:
    """Collect the trained parts that the calls of this block run.

    Args:
        module: the model.
        on_part: told of every part that runs and has parameters of its own, trained or frozen.
    """
    ran: set[torch.nn.Module] = set()

    def note(name: str, part: torch.nn.Module, is_trained: bool, *_: object) -> None:
        if is_trained:
            ran.add(part)
        if on_part is not None:
            on_part(name, part)

    handles = []
    for name, part in observable_parts(module):
        own = list(part.parameters(recurse=False))
        is_trained = any(parameter.requires_grad for parameter in own)
        if is_trained or (own and on_part is not None):
            handles.append(part.register_forward_pre_hook(functools.partial(note, name, part, is_trained)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def random_states(module: torch.nn.Module) -> list[bytes]:
    """States of the random number generators that a call of `module` would draw from: the CPU's and its device's."""
    states = [torch.get_rng_state()]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return [state.numpy().tobytes() for state in states]
