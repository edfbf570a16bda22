# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Text caches: keys and values of tokens that do not change, which a transformer keeps from its first step on.

Qwen-Image 2.1 and FLUX.2-Klein-KV fill such a cache in the first step and read it in all later ones, whose gradients
go on to the call that filled it. So that call is kept too. A replay of a call that reads the cache repeats it first,
with gradients and into a fresh cache; both graphs are alive together. What fills a cache later, or writes into it, is
refused (`checks.check_text_cache`).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from . import checks
from .state import is_sharded, with_random_states
from .trajectory import ActiveStep, Call

# Whether gradient checkpointing computes with the cache that it was given. FLUX.2's blocks get theirs in a dict that
# the loop over the blocks changes, so that all blocks would be recomputed with the last block's.
KNOWN = {"QwenImage21KVCache": True, "Flux2KVCache": False}


def is_cache(value: Any) -> bool:
    """Whether an argument is one of diffusers' text caches."""
    return type(value).__name__ in KNOWN and type(value).__module__.startswith("diffusers.")


def fills(kwargs: Mapping[str, Any]) -> bool:
    """Whether a transformer call with these arguments fills a text cache."""
    return kwargs.get("kv_cache_mode") == "extract"


def _contents(value: Any) -> Iterator[Any]:
    """What a cache holds: its tensors, each with its version, and its numbers."""
    if isinstance(value, torch.Tensor):
        yield value, value._version
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _contents(each)
    elif hasattr(value, "__dict__"):
        yield from _contents(list(vars(value).values()))
    else:
        yield value, None


@dataclass(eq=False)
class KeptCache:
    """What stands for a cache among a call's kept arguments.

    Attributes:
        kind: name of the cache's class.
        empty: the cache before the call that filled it, of that call; else `None`.
        filled_by: the call that filled it, of those that read it; else `None`.
        place: which of the caches among that call's arguments and results it is.
    """

    kind: str
    empty: Any = None
    filled_by: Call | None = None
    place: int = 0

    def again(self) -> Any:
        """A cache for one more call: empty, or filled anew. The gradient goes on to the parameters that fill it."""
        call = self.filled_by
        if call is None:
            return copy.deepcopy(self.empty)
        leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves]
        leaves = [leaf.again() if isinstance(leaf, KeptCache) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, call.spec)
        with call.state.in_place(call.module), call.state.under_autocast():
            with with_random_states(call.module, call.state.random):
                returned = call.module(*args, **kwargs)
        return [leaf for leaf in tree_leaves((args, kwargs, returned)) if is_cache(leaf)][self.place]


class Caches:
    """The text caches of one rollout."""

    def __init__(self, name: str) -> None:
        self.name = name
        # By id: the cache, what it held when it was filled, and what stands for it.
        self._filled: dict[int, tuple[Any, list[Any], KeptCache]] = {}

    def call_begins(
        self, step: int, module: torch.nn.Module, leaves: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Judge the caches among a call's flattened arguments, and a call that fills one."""
        found = [leaf for leaf in leaves if is_cache(leaf)]
        if fills(kwargs):
            self._check(step, found, step > 0, "is filled")
            carries = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
            self._check(step, found, carries, "is filled from what carries a gradient")
        for cache in found:
            is_new = fills(kwargs) and not any(isinstance(held, torch.Tensor) for held, _ in _contents(cache))
            self._check(
                step, [cache], not is_new and id(cache) not in self._filled, "was not filled in the first step"
            )
            self._check(step, [cache], self._is_changed(cache), "was written into after it was filled")
            check_recomputed(self.name, step, module, type(cache).__name__)
            self._check(step, [cache], is_sharded(module), "is passed to a sharded transformer")

    def kept(self, cache: Any) -> KeptCache:
        """What stands for a cache among the kept arguments of the call that begins."""
        _, _, kept = self._filled.get(id(cache), (None, None, None))
        return KeptCache(type(cache).__name__, empty=copy.deepcopy(cache)) if kept is None else kept

    def call_made(self, step: int, call: Call | None, leaves: Sequence[Any], returned: Any) -> list[torch.Tensor]:
        """Note what a call filled, and judge what it wrote into.

        Args:
            call: as it is kept, if it fills a cache.

        Returns:
            The tensors of the caches that it filled, which went around the cut of its outputs.
        """
        tensors: list[torch.Tensor] = []
        found = [leaf for leaf in (*leaves, *tree_leaves(returned)) if is_cache(leaf)]
        for place, cache in enumerate(found):
            self._check(step, [cache], self._is_changed(cache), "was written into after it was filled")
            if call is not None and id(cache) not in self._filled:
                kept = KeptCache(type(cache).__name__, filled_by=call, place=place)
                self._filled[id(cache)] = (cache, list(_contents(cache)), kept)
                tensors += [held for held, _ in _contents(cache) if isinstance(held, torch.Tensor)]
        return tensors

    def _is_changed(self, cache: Any) -> bool:
        _, before, _ = self._filled.get(id(cache), (None, None, None))
        if before is None:
            return False
        now = list(_contents(cache))
        return len(before) != len(now) or any(
            (old is not new if isinstance(old, torch.Tensor) else old != new) or version != new_version
            for (old, version), (new, new_version) in zip(before, now, strict=True)
        )

    def _check(self, step: int, caches: Sequence[Any], is_wrong: bool, problem: str) -> None:
        if is_wrong:
            checks.check_text_cache(self.name, step, [type(cache).__name__ for cache in caches], problem)


def check_recomputed(name: str, step: int, module: torch.nn.Module, kind: str) -> None:
    """Gradient checkpointing must recompute with the cache's class, also where it is switched on later."""
    if getattr(module, "is_gradient_checkpointing", False) and not KNOWN[kind]:
        problem = "is passed to blocks that gradient checkpointing recomputes, with another layer's (switch that off)"
        checks.check_text_cache(name, step, [kind], problem)


def _with_fills(call: Call) -> Iterator[Call]:
    for leaf in call.leaves:
        if isinstance(leaf, KeptCache) and leaf.filled_by is not None:
            yield from _with_fills(leaf.filled_by)
    yield call


def with_fills(name: str, steps: Iterable[ActiveStep]) -> list[tuple[int, Call]]:
    """The calls that a sweep of these steps repeats, each with its step; those that fill their caches among them."""
    found = [(step.number, each) for step in steps for call in step.calls for each in _with_fills(call)]
    for number, call in found:
        for cache in (leaf for leaf in call.leaves if isinstance(leaf, KeptCache)):
            check_recomputed(name, number, call.module, cache.kind)
    return found
