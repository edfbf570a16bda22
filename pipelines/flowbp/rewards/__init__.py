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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _ocr(version: str, colour_invariant: bool = False) -> Callable[..., nn.Module]:
    def make(
        augment: bool = False, generator: torch.Generator | None = None, texts: Mapping[str, str] | None = None
    ) -> nn.Module:
        from .ocr import OCRReward

        return OCRReward(version, augment, generator, colour_invariant=colour_invariant, texts=texts)

    return make


def _weights(module: str, factory: str, **fixed: Any) -> Callable[..., nn.Module]:
    """The factory of a reward whose weights come from the Hub or from the folder `model_path`."""

    def make(model_path: Path | None = None) -> nn.Module:
        return getattr(importlib.import_module(f".{module}", __name__), factory)(model_path=model_path, **fixed)

    return make


def _geneval(metadata_path: Path | None = None, model_path: Path | None = None) -> nn.Module:
    from .geneval import geneval

    return geneval(metadata_path, model_path)


# Name -> factory; the factory's keyword arguments are the reward's options.
REWARDS: dict[str, Callable[..., nn.Module]] = {
    "aesthetic": _weights("clip", "aesthetic"),
    "clip": _weights("clip", "clip"),
    "geneval": _geneval,
    "hpsv2.1": _weights("openclip", "hpsv2_1"),
    "hpsv3": _weights("judges", "hpsv3"),
    "imagereward": _weights("blip", "imagereward"),
    "ocr": _ocr("v4"),  # the faster of the two, for training
    "ocr-shapes": _ocr("v4", colour_invariant=True),  # colours and contrast do not count
    "ocr-v4": _ocr("v4"),
    "ocr-v5": _ocr("v5"),  # the held-out judge of what `ocr` trains
    "pickscore": _weights("clip", "pickscore"),
    "pickscore/26": _weights("clip", "pickscore", normalized=True),
    "unifiedreward-alignment": _weights("judges", "unifiedreward_alignment"),
    "unifiedreward-quality": _weights("judges", "unifiedreward_quality"),
}
# These judge and give no gradient.
JUDGES = ("geneval", "hpsv3", "unifiedreward-alignment", "unifiedreward-quality")


class WeightedReward(nn.Module):
    """A weighted sum of rewards whose parts stay readable and are differentiated one after the other.

    Where the images need a gradient, `forward` takes each part's gradient as soon as it has its score, so that the
    graph of one part alone is alive at a time: memory is that of the largest part, not of the sum. That relies on what
    every reward must keep, that it scores each image on its own. There are no second derivatives.

    Args:
        rewards: name -> reward.
        weights: name -> weight, for the same names.
        offload: parts wait on the CPU, whatever `.to` is told, and visit the images' device for their own turn.

    Attributes:
        last_scores: each part's own scores (B,) of the last `forward`, not weighted, detached, by name.
    """

    def __init__(self, rewards: Mapping[str, nn.Module], weights: Mapping[str, float], offload: bool = False) -> None:
        super().__init__()
        self.weights = {name: weights[name] for name in rewards}
        self.offload = offload
        # Modules in a dict are not moved when this one is.
        self._parts = dict(rewards)
        if not offload:
            # A list, because a submodule's name may not contain the dots of a user's own reward.
            self.rewards = nn.ModuleList(rewards.values())
        self.last_scores: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward's own score (B,), not weighted, by name, without gradients."""
        scores = {}
        for name, reward in self._parts.items():
            with self._at_work(reward, images.device):
                scores[name] = self._checked(name, reward(images, prompts), images)
        return scores

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The sum of weight x score, (B,).

        Raises:
            ValueError: a part that does not return (B,), or, where the images need a gradient, gives none.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            return _PartByPart.apply(images, self, prompts)
        self.last_scores = self.parts(images, prompts)
        return self._sum(self.last_scores)

    def all_parts(self) -> list[nn.Module]:
        """The rewards that are added up."""
        return list(self._parts.values())

    def pop_means(self) -> dict[str, float]:
        """Each part's mean score over all images that were differentiated since the last call, not weighted."""
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def scores_and_gradient(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The weighted sum (B,) and the gradient (B, 3, H, W) of each in its own image, in float32 or float64."""
        images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
        scores, gradient = {}, torch.zeros_like(images)
        for name, reward in self._parts.items():
            with self._at_work(reward, images.device), torch.enable_grad():
                leaf = images.detach().requires_grad_()
                score = self._checked(name, reward(leaf, prompts), images)
                if not score.requires_grad:
                    raise ValueError(
                        f"reward {name!r} gives no gradient in the images, so it can judge but not train; leave it "
                        "out of --reward and evaluate with it."
                    )
                gradient += self.weights[name] * torch.autograd.grad(score.sum(), leaf)[0]
                scores[name] = score.detach()
        self.last_scores = scores
        self._sums = {name: self._sums.get(name, 0) + score.sum() for name, score in scores.items()}
        self._count += len(images)
        return self._sum(scores), gradient

    def _sum(self, scores: Mapping[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * score for name, score in scores.items())

    @contextmanager
    def _at_work(self, reward: nn.Module, device: torch.device) -> Iterator[None]:
        if not self.offload:
            yield
            return
        try:
            reward.to(device)
            yield
        finally:
            reward.to("cpu")

    @staticmethod
    def _checked(name: str, score: Any, images: Tensor) -> Tensor:
        if not isinstance(score, Tensor) or score.shape != (len(images),):
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"reward {name!r}: expected a tensor of shape ({len(images)},), got {found}.")
        return score.to(images.device)


class _PartByPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, reward: WeightedReward, prompts: Sequence[str]) -> Tensor:
        score, gradient = reward.scores_and_gradient(images, prompts)
        ctx.save_for_backward(gradient)
        ctx.dtype = images.dtype
        return score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * cotangent.to(gradient).view(-1, 1, 1, 1)).to(ctx.dtype), None, None


def part_means(reward: nn.Module) -> dict[str, float]:
    """`WeightedReward.pop_means` of a sum, for a log; a single reward has no parts, {}."""
    return reward.pop_means() if isinstance(reward, WeightedReward) else {}


def check_prompts(reward: nn.Module, prompts: Sequence[str]) -> None:
    """Try whether a reward can score these prompts, before anything is trained.

    Raises:
        ValueError: naming the first prompt that one of the `ocr` rewards finds no text in.
    """
    for part in reward.all_parts() if isinstance(reward, WeightedReward) else [reward]:
        if hasattr(part, "text_of"):
            for prompt in prompts:
                part.text_of(prompt)


class _FunctionReward(nn.Module):
    """A user's reward that is a plain function, as a module."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def load_reward(
    spec: str, model_paths: Mapping[str, str | Path] | None = None, offload: bool = False, **options: Any
) -> nn.Module:
    """Makes a reward from its name.

    Args:
        spec: a name of `REWARDS` (`"ocr"`); a weighted sum (`"hpsv2.1:0.7,clip:0.3"`; a part without a weight has 1);
            or the user's own factory, `"package.module:factory"`, alone or in a sum. What follows a part's last colon
            is a weight if it parses as a number (`"package.module:factory:0.5"`). A factory returns a module or a
            function.
        model_paths: part -> local folder with its weights, in place of the Hub. The factory's `model_path` gets it.
        offload: rewards wait on the CPU and visit the images' device for their own turn, see `WeightedReward`.
        options: keyword arguments of the factories. Each must be known to at least one part, and goes to every part
            that knows it. The `ocr` rewards have `augment` (False), its `generator` (None: torch's global one), and
            `texts` (prompt -> text to look for; None: what the prompt quotes); `geneval` has `metadata_path`.

    Returns:
        A module `reward(images, prompts) -> (B,)`, frozen and in evaluation mode; for several parts, a weight, or
        `offload`, a `WeightedReward`.

    Raises:
        ValueError: an unknown name, option or factory, a weight that is no finite number, a part that is named twice,
            a model path of no part; known before any reward is made.
        ModuleNotFoundError, FileNotFoundError: what a reward needs is missing; the message names the package, or the
            repository and how to get it.
    """
    weights: dict[str, float] = {}
    for name, weight in _parts(spec):
        if name in weights:
            raise ValueError(f"reward: expected each name once, got {name!r} twice in {spec!r}; add up its weights.")
        weights[name] = weight
    factories = {name: _factory(name) for name in weights}
    known = {name: _options(factory) for name, factory in factories.items()}
    folders = {name: Path(folder) for name, folder in (model_paths or {}).items()}
    local = [name for name in known if "model_path" in known[name]]
    for name in folders:
        if name not in local:
            raise ValueError(
                f"reward {spec!r}: expected model paths of {', '.join(local) or 'none of its parts'}, got one of "
                f"{name!r}."
            )
    choices = sorted(option_names(spec))
    unknown = sorted(set(options) - set(choices))
    if unknown:
        raise ValueError(
            f"reward {spec!r}: expected options among {', '.join(choices) or 'none'}; got {', '.join(unknown)}."
        )
    rewards = {}
    for name, factory in factories.items():
        given = {key: value for key, value in options.items() if key in known[name]}
        if name in folders:
            given["model_path"] = folders[name]
        try:
            reward = factory(**given)
        except Exception as error:
            if name in REWARDS:
                raise
            raise ValueError(f"reward {name!r}: its factory raised {type(error).__name__}: {error}") from error
        if not callable(reward):
            raise ValueError(f"reward {name!r}: expected the factory to return a reward, got {type(reward).__name__}.")
        module = reward if isinstance(reward, nn.Module) else _FunctionReward(reward)
        rewards[name] = module.requires_grad_(False).eval()
    if list(weights.values()) == [1.0] and not offload:
        return rewards[next(iter(rewards))]
    return WeightedReward(rewards, weights, offload)


def option_names(spec: str) -> set[str]:
    """The options that `load_reward` takes for a `spec`, that is its factories' keyword arguments.

    Raises:
        ValueError: an unknown name or factory, a weight that is no finite number.
    """
    return set().union(*(_options(_factory(name)) for name in part_names(spec))) - {"model_path"}


def part_names(spec: str) -> list[str]:
    """The names in a reward's `spec`, see `load_reward`, without their weights.

    Raises:
        ValueError: a weight that is no finite number.
    """
    return [name for name, _ in _parts(spec)]


def _options(factory: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(factory).parameters)


def _parts(spec: str) -> list[tuple[str, float]]:
    return [_split_weight(part.strip(), spec) for part in spec.split(",")]


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
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"reward {name!r}: expected an importable package.module:factory, got {type(error).__name__}: {error}; "
            "its folder must be on PYTHONPATH."
        ) from error
    if not callable(factory):
        raise ValueError(f"reward {name!r}: expected a factory to call, got {type(factory).__name__}.")
    return factory
