# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The state of a transformer that a call depends on beside its arguments, and what of it a call computes with.

A replay under another state, or one that takes a part's result from a cache, can give the recorded values and yet lack
a part of the gradient (an adapter that is fresh changes no value). So states, and the parameters that a call's graph
reaches, are compared as well.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.modules import module as torch_module
from torch.utils._pytree import TreeSpec

from .placed import PLAIN, STATELESS_HOOKS, Placed, keeps_nothing, plain_attributes, stateless_hooks

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Parts of these packages keep nothing from call to call; their adapters are looked at by name.
_STATELESS = {"torch", "peft", "flowbp", "abc", "builtins", "collections", "typing"}
# What `torch.nn.Module` itself keeps in every part.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
# How many numbers of each trained parameter are compared one by one.
FINGERPRINT_LENGTH = 1024


class _Held:
    """A tensor that a part of a model holds, as it was: equal to itself unwritten, and to another of its values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        if self.tensor is other.tensor:
            return self.version == other.version
        left, right = self.tensor, other.tensor
        is_unwritten = left.is_inference() or left._version == self.version
        # Some models make their tables anew at every call. To compare them waits for the device, but is rare.
        return is_unwritten and left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)

    __hash__ = None  # type: ignore[assignment]


class _Entries(dict[Any, Any]):
    """Numbers and words by key; equal to others if what both have is: what was added may be a log of calls."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Entries) and all(self[key] == other[key] for key in self.keys() & other.keys())

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class ModelState:
    """What a call of a model depends on beside its arguments.

    Attributes:
        structure: for each part of the model its training flag, hooks, adapters, attention processor and replaced
            forward, and hooks of all modules.
        values: for each part its buffers and frozen parameters and, where its class is not torch's own, its tensors,
            numbers and words, those in lists and dicts among them.
        versions: version counters of the trained parameters.
        autocast: device type, whether autocast is on, and its dtype.
        random: states of the generators that a call would draw from.
        placed: hooks and attention processors that may have been placed for the call.
    """

    structure: tuple[Any, ...]
    values: tuple[Any, ...]
    versions: tuple[int, ...]
    autocast: tuple[str, bool, torch.dtype]
    random: list[torch.Tensor]
    placed: Placed

    @classmethod
    def of(cls, module: torch.nn.Module) -> "ModelState":
        """The state of `module` now. Take it before hooks of one's own are placed."""
        parts = parts_of(module)
        parameters = [each for part in parts for each in part._parameters.values() if each is not None]
        device_type = parameters[0].device.type if parameters else "cpu"
        return cls(
            (*map(_structure, parts), _global_hooks()),
            tuple(_values(part, is_sharded(module)) for part in parts),
            tuple(parameter._version for parameter in parameters if parameter.requires_grad),
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)),
            random_states(module),
            Placed(parts),
        )

    def in_place(self, module: torch.nn.Module) -> AbstractContextManager[None]:
        """A context in which `module` has the hooks and attention processors that were placed for the call."""
        return self.placed.in_place(parts_of(module))

    def under_autocast(self) -> AbstractContextManager[Any]:
        """A context with the recorded autocast settings."""
        device_type, is_enabled, dtype = self.autocast
        if not is_enabled:
            return without_autocast(device_type)
        return torch.autocast(device_type, dtype=dtype)

    def change(self, module: torch.nn.Module, now: "ModelState") -> str | None:
        """In words, the first part of `module` that differs from this state; `None` if none does.

        Autocast and random states are left out, as replays have them as they were; so are the parameters' versions.
        """
        parts = [*parts_of(module), None]
        if len(self.structure) != len(now.structure):
            return f"{len(self.structure) - 1} parts, now {len(now.structure) - 1}"
        for before, after in ((self.structure, now.structure), (self.values, now.values)):
            for part, old, new in zip(parts, before, after, strict=False):
                if old != new:
                    where = "hooks of all modules" if part is None else name_of([module], part)
                    return f"{where}: {_difference(old, new)}"
        return None


@dataclass(frozen=True, eq=False)
class CallKind:
    """Calls of one transformer at one place in their steps, with arguments of one structure and in one state.

    Attributes:
        place: how many calls come before in the step.
        spec: structure of the arguments.
        layout: see `values.layout`.
        structure: of the transformer's state.
        trained: ids of its trained parameters.
        reached: ids of those that the graph of the first call of this kind reached; `None` for sharded transformers,
            whose parameters are other tensors while they compute.
        parts: ids of the trained parts that ran in that call, for sharded transformers.
    """

    place: int
    spec: TreeSpec
    layout: tuple[Any, ...]
    structure: tuple[Any, ...]
    trained: frozenset[int]
    reached: frozenset[int] | None
    parts: frozenset[int]


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context for backward passes, whose matrix products autocast would round once more."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep cuDNN's attention out of what is differentiated: its backward pass gives wrong gradients.

    Seen with torch 2.11 on an H200 in bfloat16: NaN for tiny models of FLUX.1 and FLUX.2-Klein, and an illegal memory
    access at FLUX.1-dev's size (benchmarks/README.md); pytorch/pytorch issue 196678 describes such a fault for masked
    attention. Flash and memory-efficient attention take its place.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def parts_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """All parts of a model, itself among them, each once: `module.modules()`, but fast enough for every update."""
    found: dict[torch.nn.Module, None] = {}
    pending: list[torch.nn.Module | None] = [module]
    while pending:
        part = pending.pop()
        if part is not None and part not in found:
            found[part] = None
            pending += part._modules.values()
    return list(found)


def parameters_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """All parameters of a model; one that parts share comes once for each of them."""
    return [each for part in parts_of(module) for each in part._parameters.values() if each is not None]


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of a model that require a gradient, each once."""
    return list({id(each): each for each in parameters_of(module) if each.requires_grad}.values())


def trained_adapters(part: BaseTunerLayer | AuxiliaryTrainingWrapper) -> list[str]:
    """Names of the adapters of a layer that have a parameter that requires a gradient."""
    if isinstance(part, AuxiliaryTrainingWrapper):
        held = [part.modules_to_save] if hasattr(part, "modules_to_save") else []
    else:
        held = [getattr(part, name, None) for name in part.adapter_layer_names]
    found: dict[str, None] = {}
    for layers in held:
        for adapter in layers.keys() if hasattr(layers, "keys") else ():
            layer = layers[adapter]
            tensors = [layer] if isinstance(layer, torch.Tensor) else layer.parameters()
            if any(tensor.requires_grad for tensor in tensors):
                found[adapter] = None
    return list(found)


def name_of(modules: Sequence[torch.nn.Module], wanted: torch.nn.Module | torch.nn.Parameter) -> str:
    """What a part or a parameter of one of these models is called in it; for messages."""
    for module in modules:
        for name, found in (*module.named_modules(), *module.named_parameters()):
            if found is wanted:
                return name or type(module).__name__
    return type(wanted).__name__


def _identity(value: Any) -> Any:
    """What equals only that of the same object, which it does not keep alive. An id may be given to a later one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _structure(part: torch.nn.Module) -> tuple[Any, ...]:
    attributes = part.__dict__
    hooks = [tuple(map(_identity, attributes[name].values())) for name in _HOOKS if attributes[name]]
    stateless, forward = stateless_hooks(part, attributes.get("forward"))
    # These by content, as guiders make new ones for each call.
    around = tuple((type(hook).__name__, plain_attributes(hook)) for hook in stateless)
    facts: tuple[Any, ...] = (part.training, tuple(hooks), (around, _identity(forward)), _identity(part))
    processor = attributes.get("processor") or attributes["_modules"].get("processor")
    if processor is not None:
        facts += ("processor", type(processor).__name__, tuple(_plain_entries(_attributes(processor)).items()))
        if not keeps_nothing(processor):
            facts += (_identity(processor),)
    # diffusers leaves an empty registry behind.
    registry = attributes["_diffusers_hook"].hooks if "_diffusers_hook" in attributes else {}
    if others := [type(each).__name__ for each in registry.values() if type(each) not in STATELESS_HOOKS]:
        facts += ("hooks", *others)
    if isinstance(part, BaseTunerLayer):
        facts += ("adapters", tuple(part.active_adapters), part.disable_adapters, tuple(part.merged_adapters))
        facts += ("scaling", tuple(part.scaling.items()) if isinstance(getattr(part, "scaling", None), dict) else ())
    elif isinstance(part, AuxiliaryTrainingWrapper):
        facts += ("adapters", tuple(part.active_adapters), part.disable_adapters)
    return facts


def _values(part: torch.nn.Module, is_of_shards: bool) -> tuple[Any, ...]:
    found: list[tuple[str, Any]] = [(name, _Held(each)) for name, each in part._buffers.items() if each is not None]
    # Sharded parameters are other tensors while and after they compute.
    for name, each in () if is_of_shards else part._parameters.items():
        if each is not None and not each.requires_grad:
            found.append((name, _Held(each)))
    # Of base classes too: FSDP2 and parametrisations make a class of torch's out of a user's.
    if any(each.__module__.partition(".")[0] not in _STATELESS for each in type(part).__mro__):
        attributes = _attributes(part)
        found += [(name, _Held(value)) for name, value in attributes.items() if isinstance(value, torch.Tensor)]
        found += _plain_entries(attributes).items()
    return tuple(found)


def _attributes(owner: Any) -> dict[str, Any]:
    """What an object, a part of a model or an attention processor, holds of its own."""
    # Checkpointing changes where tensors are kept, not what is computed.
    return {
        name: value
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in _OF_EVERY_MODULE and "gradient_checkpointing" not in name
    }


def _plain_entries(container: Any, depth: int = 4) -> _Entries:
    """The numbers and words in a dict, list or tuple, and in those that it holds."""
    found = _Entries()
    for key, value in container.items() if isinstance(container, Mapping) else enumerate(container):
        if isinstance(value, PLAIN) and isinstance(key, PLAIN):
            found[key] = value
        elif isinstance(value, Mapping | list | tuple) and isinstance(key, PLAIN) and depth:
            found[key] = _plain_entries(value, depth - 1)
    return found


def _global_hooks() -> tuple[Any, ...]:
    registries = (
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
    )
    return tuple(_identity(hook) for registry in registries for hook in registry.values())


def _difference(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    if old and new and isinstance(old[0], bool):
        if old[0] != new[0]:
            return f"{'training' if old[0] else 'evaluation'} mode, now {'training' if new[0] else 'evaluation'} mode"
        if old[1] != new[1]:
            return "other hooks"
        if old[3] != new[3]:
            return "another part"
        words = [_words(old), _words(new)]
        if words[0] != words[1]:
            return f"{words[0]}, now {words[1]}"
        return "another forward" if old[2] != new[2] else "another attention processor that may keep something"
    if old and isinstance(old[0], tuple):
        changed = [each for each in old if each not in new]
        return f"its {changed[0][0]}" if changed else "something new"
    return "other ones"


def _words(facts: tuple[Any, ...]) -> str:
    stateless, *others = facts[2][0], *facts[4:]
    found = [name for name, _ in stateless] + [str(each) for each in others if not isinstance(each, weakref.ref)]
    return " ".join(found) or "nothing"


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 shards the module."""
    return hasattr(module, "set_requires_gradient_sync")


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` has a part in the module."""
    return any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in parts_of(module))


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
) -> Iterator[set[int]]:
    """Collect the ids of the trained parts that the calls of this block run; of sharded models, or with `on_part`.

    Args:
        module: the model.
        on_part: told of every part that runs and has parameters of its own, trained or frozen.
    """
    ran: set[int] = set()

    def note(name: str, part: torch.nn.Module, is_trained: bool, *_: object) -> None:
        if is_trained:
            ran.add(id(part))
        if on_part is not None:
            on_part(name, part)

    handles = []
    if is_sharded(module) or on_part is not None:
        for name, part in observable_parts(module):
            own = [each for each in part._parameters.values() if each is not None]
            is_trained = any(parameter.requires_grad for parameter in own)
            if is_trained or (own and on_part is not None):
                handles.append(part.register_forward_pre_hook(functools.partial(note, name, part, is_trained)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def random_states(module: torch.nn.Module) -> list[torch.Tensor]:
    """States of the generators that a call of `module` would draw from: the CPU's and its device's."""
    states = [torch.get_rng_state()]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def with_random_states(module: torch.nn.Module, states: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the calls of this block draw what a recorded call drew; afterwards the generators go on as before."""

    def put(values: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(values[0])
        if len(values) > 1:
            device = next(module.parameters()).device
            torch.get_device_module(device).set_rng_state(values[1], device)

    before = random_states(module)
    put(states)
    try:
        yield
    finally:
        put(before)


def fingerprint(module: torch.nn.Module) -> torch.Tensor | None:
    """Norms and first numbers of the trained parameters, one tensor on the device; `None` if there are none.

    They show what version counters do not: values that were changed through `.data`.
    """
    tensors = [each.detach() for each in trained_parameters(module)]
    tensors = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
    tensors = [each for each in tensors if each.numel()]
    if not tensors:
        return None
    pieces = [norm.reshape(1) for norm in torch._foreach_norm(tensors)]
    pieces += [each.flatten()[:FINGERPRINT_LENGTH] for each in tensors]
    return torch.cat([piece.to(tensors[0].device, torch.float32) for piece in pieces])
