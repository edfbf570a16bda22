# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rewards by name: `load_reward("ocr")`, weighted sums, and the user's own.

A reward is `reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`, differentiable in the images. Adding one is
adding a factory to `REWARDS`; a factory imports what it needs when it is called.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _ocr(version: str, colour_invariant: bool = False) -> Callable[..., nn.Module]:
    def make(augment: bool = False, generator: torch.Generator | None = None) -> nn.Module:
        from .ocr import OCRReward

        return OCRReward(version, augment, generator, colour_invariant=colour_invariant)

    return make


# Name -> factory; the factory's keyword arguments are the reward's options.
REWARDS: dict[str, Callable[..., nn.Module]] = {
    "ocr": _ocr("v4"),  # the faster of the two, for training
    "ocr-shapes": _ocr("v4", colour_invariant=True),  # colours and contrast do not count
    "ocr-v4": _ocr("v4"),
    "ocr-v5": _ocr("v5"),  # the held-out judge of what `ocr` trains
}


class WeightedReward(nn.Module):
    """A weighted sum of rewards whose parts stay readable.

    Args:
        rewards: name -> reward.
        weights: name -> weight, for the same names.
    """

    def __init__(self, rewards: dict[str, nn.Module], weights: dict[str, float]):
        super().__init__()
        self.weights = {name: weights[name] for name in rewards}
        # A list, because a submodule's name may not contain the dots of a user's own reward.
        self.rewards = nn.ModuleList(rewards.values())

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward's own score (B,), not weighted, by name."""
        return {name: reward(images, prompts) for name, reward in zip(self.weights, self.rewards, strict=True)}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The sum of weight x score, (B,)."""
        return sum(self.weights[name] * score for name, score in self.parts(images, prompts).items())


class _FunctionReward(nn.Module):
    """A user's reward that is a plain function, as a module."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def load_reward(spec: str, **options: Any) -> nn.Module:
    """Makes a reward from its name.

    Args:
        spec: a name of `REWARDS` (`"ocr"`); a weighted sum (`"ocr:0.7,ocr-v5:0.3"`; a part without a weight has 1); or
            the user's own factory, `"package.module:factory"`, alone or in a sum. What follows a part's last colon is
            a weight if it parses as a number (`"package.module:factory:0.5"`). A factory returns a module or a
            function.
        options: keyword arguments of the factories. Each must be known to at least one part, and goes to every part
            that knows it. The `ocr` rewards have `augment` (False) and its `generator` (None: torch's global one).

    Returns:
        A module `reward(images, prompts) -> (B,)`; for several parts, or a weight, a `WeightedReward`.

    Raises:
        ValueError: an unknown name, option or factory, a weight that is no finite number, a part that is named twice;
            known before any reward is made.
        ModuleNotFoundError, FileNotFoundError: what a reward needs is missing; the message names the package.
    """
    weights: dict[str, float] = {}
    for part in spec.split(","):
        name, weight = _split_weight(part.strip(), spec)
        if name in weights:
            raise ValueError(f"reward: expected each name once, got {name!r} twice in {spec!r}; add up its weights.")
        weights[name] = weight
    factories = {name: _factory(name) for name in weights}
    known = {name: set(inspect.signature(factory).parameters) for name, factory in factories.items()}
    choices = sorted(set().union(*known.values()))
    unknown = sorted(set(options) - set(choices))
    if unknown:
        raise ValueError(
            f"reward {spec!r}: expected options among {', '.join(choices) or 'none'}; got {', '.join(unknown)}."
        )
    rewards = {}
    for name, factory in factories.items():
        reward = factory(**{key: value for key, value in options.items() if key in known[name]})
        if not callable(reward):
            raise ValueError(f"reward {name!r}: expected the factory to return a reward, got {type(reward).__name__}.")
        rewards[name] = reward if isinstance(reward, nn.Module) else _FunctionReward(reward)
    if list(weights.values()) == [1.0]:
        return rewards[next(iter(rewards))]
    return WeightedReward(rewards, weights)


def _split_weight(part: str, spec: str) -> tuple[str, float]:
    name, colon, text = part.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        # Not a number: "module:factory" is a name on its own; anything else with a colon is a bad weight.
        if not colon or (":" not in name and name not in REWARDS and text.isidentifier()):
            return part, 1.0
        raise ValueError(f"reward {spec!r}: expected a number as the weight of {name!r}, got {text!r}.") from None
    if not colon or not math.isfinite(weight):
        raise ValueError(f"reward {spec!r}: expected a name, a colon and a finite weight, got {part!r}.")
    return name, weight


def _factory(name: str) -> Callable[..., Any]:
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.partition(":")
    if not all(word.isidentifier() for word in [*module_name.split("."), attribute]):
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reward: expected {', '.join(REWARDS)} or package.module:factory, got {name!r}; "
            f"the nearest is {nearest!r}."
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: expected an importable package.module:factory, got: {error}.") from None
    if not callable(factory):
        raise ValueError(f"reward {name!r}: expected a factory to call, got {type(factory).__name__}.")
    return factory
