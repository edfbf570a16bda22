# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Columns of the prompts' table that a reward's signature has a place for."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Reward = Callable[..., torch.Tensor]
Columns = Mapping[str, Sequence[Any]]


class LazyValue:
    """A value of a column that takes memory and time: a reward gets what `open()` returns."""

    def open(self) -> Any:
        """The value."""
        raise NotImplementedError


@dataclass(frozen=True)
class Places:
    """What a reward's signature has a place for, beside images and prompts.

    Attributes:
        named: further parameters that take a keyword -> whether they have no default.
        takes_all: whether it has `**columns`.
        reserved: names that its `**columns` cannot take.
    """

    named: Mapping[str, bool]
    takes_all: bool
    reserved: frozenset[str]

    @classmethod
    def of(cls, reward: Reward) -> "Places":
        """Of a function, any other callable, or a module's `forward`."""
        bound = reward.keywords if isinstance(reward, functools.partial) else {}
        try:
            signature = inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward)
        except (TypeError, ValueError):
            # Functions written in C may have none.
            return cls({}, False, frozenset())
        parameters = [each for each in signature.parameters.values() if each.name not in bound]
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        first = [each for each in parameters if each.kind in by_place][:2]
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = {each.name: each.default is each.empty for each in parameters if each.kind in by_name}
        return cls(
            named={name: is_required for name, is_required in named.items() if name not in [p.name for p in first]},
            takes_all=any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters),
            reserved=frozenset({"self", *bound, *(each.name for each in first if each.kind in by_name)}),
        )

    def columns(self, columns: Columns) -> dict[str, Sequence[Any]]:
        """Those that there is a place for."""
        return {name: values for name, values in columns.items() if self.takes_all or name in self.named}


def call_with_columns(reward: Reward, images: torch.Tensor, prompts: Sequence[str], columns: Columns) -> torch.Tensor:
    """`reward(images, prompts, **columns)` with those columns that its signature has a place for, opened."""
    opened: dict[LazyValue, Any] = {}

    def value(each: Any) -> Any:
        if not isinstance(each, LazyValue):
            return each
        # All frames of a video have one source.
        if each not in opened:
            opened[each] = each.open()
        return opened[each]

    found = Places.of(reward).columns(columns) if columns else {}
    return reward(images, prompts, **{name: [value(each) for each in values] for name, values in found.items()})
