# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes rewards from their names, from weighted sums of names, and from users' functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..columns import Places
from ..videos import makes_videos, takes_videos
from .specs import REWARDS, RewardSpec, reward_spec
from .weighted import WeightedReward, call_reward


class NamedReward(nn.Module):
    """A user's reward with its name in all errors, see `call_reward`, and with its own attributes, such as `text_of`.

    Args:
        name: for messages.
        reward: `reward(images, prompts, **columns) -> (B,)`, a module or a function.
    """

    def __init__(self, name: str, reward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name = name
        self.reward = reward

    @property
    def takes_videos(self) -> bool | None:
        return takes_videos(self.reward)

    def forward(self, images: Tensor, prompts: Sequence[str], /, **columns: Sequence[Any]) -> Tensor:
        return call_reward(self.name, self.reward, images, prompts, columns)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "reward":
                raise
            return getattr(self.reward, name)


def load_reward(
    reward: str | Callable[..., Tensor],
    model_paths: Mapping[str, str | Path] | None = None,
    offload: bool = False,
    reward_frames: int | None = None,
    **options: Any,
) -> nn.Module:
    """Makes a reward from its name, or wraps a user's function.

    Args:
        reward: a name of `REWARDS` (`"ocr"`); a weighted sum (`"hpsv2.1:0.7,clip:0.3"`, where a part without a weight
            has 1); a user's own factory, `"package.module:factory"`, alone or in a sum; or a function or module
            `reward(images, prompts, **columns) -> (B,)`. What follows a part's last colon is a weight if it parses as
            a number (`"package.module:factory:0.5"`). A factory returns a module or a function. A user's module is
            frozen and set to evaluation mode in place.
        model_paths: name -> local folder with the weights, used in place of the Hub. The factory gets it as
            `model_path`.
        offload: keep the rewards on the CPU; each moves to the images' device while it scores, see `WeightedReward`.
        reward_frames: of a video, how many evenly spaced frames a reward of images scores, the first and the last
            among them (1: the middle one); None: all. Their mean counts.
        options: keyword arguments of the factories. Each must be known to at least one part, and goes to every part
            that knows it, see `option_names`. The `ocr` rewards have `augment` (False), its `generator` (None: torch's
            global one) and `texts` (prompt -> text to look for; None: what the prompt quotes); `geneval` has
            `metadata_path`.

    Returns:
        A module `reward(images, prompts, **columns) -> (B,)`, frozen and in evaluation mode. For several parts, a
        weight, `offload` or `reward_frames` it is a `WeightedReward`.

    Raises:
        ValueError: an unknown name, option or factory, a weight that is not a finite number, a name given twice, or a
            model path for none of the parts; all before any reward is made. Also a factory that fails or does not
            return a reward.
        ModuleNotFoundError, FileNotFoundError: something that a reward needs is missing; the message names the
            package, or the repository and how to get it.
    """
    if not isinstance(reward, str):
        return _wrapped(reward, offload, reward_frames, [*(model_paths or {}), *options])
    weights: dict[str, float] = {}
    for name, weight in _parts(reward):
        if name in weights:
            raise ValueError(f"reward: expected each name once, got {name!r} twice in {reward!r}; add up its weights.")
        weights[name] = weight
    specs = {name: reward_spec(name) for name in weights}
    folders = {name: Path(folder) for name, folder in (model_paths or {}).items()}
    with_folder = [name for name, spec in specs.items() if spec.has_model_path]
    for name in folders:
        if name not in with_folder:
            raise ValueError(
                f"reward {reward!r}: expected model paths of {', '.join(with_folder) or 'none of its parts'}, got one "
                f"of {name!r}."
            )
    choices = option_names(reward)
    if unknown := sorted(set(options) - choices):
        raise ValueError(
            f"reward {reward!r}: expected options among {', '.join(sorted(choices)) or 'none'}; got "
            f"{', '.join(unknown)}."
        )
    rewards = {name: _made(name, spec, folders.get(name), options) for name, spec in specs.items()}
    if list(weights.values()) == [1.0] and not offload and reward_frames is None:
        return rewards[next(iter(rewards))]
    return WeightedReward(rewards, weights, offload, reward_frames)


def _wrapped(
    reward: Callable[..., Tensor], offload: bool, reward_frames: int | None, given: Sequence[str]
) -> nn.Module:
    """A user's function or module; `given` are names of model paths and options, which it cannot have."""
    name = getattr(reward, "__name__", type(reward).__name__)
    if given:
        raise ValueError(
            f"reward {name!r}: expected no model paths and no options for a function or a module, got "
            f"{', '.join(given)}; give them to it directly."
        )
    module = _as_frozen_module(name, reward, "a function or a module")
    if isinstance(module, WeightedReward) and reward_frames is not None:
        raise ValueError(f"reward {name!r}: expected no reward_frames for a sum; give them where the sum is made.")
    is_plain = not offload and reward_frames is None
    return module if is_plain else WeightedReward({name: module}, {name: 1.0}, offload, reward_frames)


def _made(name: str, spec: RewardSpec, folder: Path | None, options: Mapping[str, Any]) -> nn.Module:
    """A part of a reward's string."""
    given = {key: value for key, value in options.items() if key in spec.options}
    if folder is not None:
        given["model_path"] = folder
    try:
        made = spec.factory(**given)
    except (Exception, SystemExit) as error:
        if name in REWARDS:
            raise
        raise ValueError(f"reward {name!r}: its factory raised {type(error).__name__}: {error}") from error
    if name in REWARDS:
        return made.requires_grad_(False).eval()
    return _as_frozen_module(name, made, "the factory to return a reward")


def _as_frozen_module(name: str, reward: Any, expected: str) -> nn.Module:
    if not callable(reward):
        raise ValueError(f"reward {name!r}: expected {expected}, got {type(reward).__name__}.")
    if isinstance(reward, type):
        raise ValueError(f"reward {name!r}: expected {expected}, got the class {reward.__name__}; create an instance.")
    # The parts of a sum have their names already.
    module = reward if isinstance(reward, WeightedReward | NamedReward) else NamedReward(name, reward)
    takes_videos(module)
    return module.requires_grad_(False).eval()


def part_names(reward: str) -> list[str]:
    """The names in a reward's string, see `load_reward`, without their weights.

    Raises:
        ValueError: a weight that is not a finite number.
    """
    return [name for name, _ in _parts(reward)]


def option_names(reward: str) -> set[str]:
    """The options that `load_reward` takes for a reward's string: its factories' keyword arguments.

    Raises:
        ValueError: an unknown name or factory, or a weight that is not a finite number.
    """
    return set().union(*(reward_spec(name).options for name in part_names(reward)))


def reward_needs(reward: str) -> set[str]:
    """What a reward's string needs of the prompts besides their text: the union of its parts' `RewardSpec.needs`.

    `"texts"` is satisfied by the option or by a text in double quotes in each prompt (`check_prompts` verifies that),
    `"metadata_path"` by the option alone.

    Raises:
        ValueError: an unknown name or factory, or a weight that is not a finite number.
    """
    return set().union(*(reward_spec(name).needs for name in part_names(reward)))


def check_prompts(reward: nn.Module, prompts: Sequence[str], sizes: Sequence[tuple[int, int]] = ()) -> None:
    """Checks that a loaded reward can score images of these prompts, before anything is trained.

    Args:
        reward: of `load_reward`.
        prompts: all that the reward will score: of training, validation and evaluation.
        sizes: height and width in pixels of the images.

    Raises:
        ValueError: the first prompt in which an `ocr` reward finds no text to look for, or one with characters unknown
            to the recogniser, or too long for a size.
    """
    for part in _all_parts(reward):
        for prompt in prompts:
            if hasattr(part, "check_prompt"):
                part.check_prompt(prompt, sizes)
            elif hasattr(part, "text_of"):
                part.text_of(prompt)


def check_columns(
    reward: nn.Module, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]], source: str
) -> dict[str, None]:
    """Checks that the prompts' table has what a loaded reward needs of it, before anything is trained.

    Args:
        reward: of `load_reward`.
        prompts: that it will score.
        rows: the other columns of each prompt, name -> value.
        source: the option that the prompts are from, for messages.

    Returns:
        The names of the columns that reach the reward, as keys in their order.

    Raises:
        ValueError: a prompt without a value for a parameter that has no default, or a column whose name a reward's
            `**columns` cannot take.
    """
    found = dict.fromkeys(column for row in rows for column in row)
    reached: dict[str, None] = {}
    for part in _all_parts(reward):
        name = part.name if isinstance(part, NamedReward) else type(part).__name__
        places = Places.of(part.reward if isinstance(part, NamedReward) else part)
        for column in (each for each, is_required in places.named.items() if is_required):
            for prompt, row in zip(prompts, rows, strict=True):
                if row.get(column) is None:
                    raise ValueError(
                        f"reward {name!r}: its parameter {column!r} needs a column of that name, but {source} has no "
                        f"value for the prompt {prompt!r}; columns of text, numbers or truth values there: "
                        f"{', '.join(found) or 'none'}. Add it, or give the parameter a default."
                    )
        if places.takes_all and (clash := [column for column in found if column in places.reserved]):
            raise ValueError(
                f"reward {name!r}: expected columns with other names than its parameters for images and prompts, got "
                f"{clash[0]!r} in {source}; rename the column."
            )
        reached |= dict.fromkeys(places.columns(dict.fromkeys(found, ())))
    return reached


def check_videos(rewards: Sequence[nn.Module], pipeline: type, reward_frames: int | None) -> None:
    """Checks that loaded rewards can score what a pipeline class makes, before it is loaded.

    Raises:
        ValueError: a reward of videos for a pipeline of images, or `reward_frames` where every reward takes videos.
    """
    parts = [part for reward in rewards for part in _all_parts(reward)]
    of_videos = [part for part in parts if takes_videos(part)]
    if of_videos and not makes_videos(pipeline):
        name = of_videos[0].name if isinstance(of_videos[0], NamedReward) else type(of_videos[0]).__name__
        raise ValueError(
            f"reward {name!r}: it takes videos, but {pipeline.__name__} makes images; choose a video pipeline, or "
            "another reward."
        )
    if reward_frames is not None and len(of_videos) == len(parts):
        raise ValueError(f"--reward_frames {reward_frames}: every reward takes whole videos; leave it out.")


def _all_parts(reward: nn.Module) -> list[nn.Module]:
    return reward.all_parts() if isinstance(reward, WeightedReward) else [reward]


def _parts(reward: str) -> list[tuple[str, float]]:
    return [_split_weight(part.strip(), reward) for part in reward.split(",")]


def _split_weight(part: str, reward: str) -> tuple[str, float]:
    name, colon, text = part.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        # Not a number: "module:factory" is a name without a weight; anything else with a colon is a bad weight.
        if not colon or (":" not in name and name not in REWARDS and text.isidentifier()):
            return part, 1.0
        raise ValueError(f"reward {reward!r}: expected a number as the weight of {name!r}, got {text!r}.") from None
    if not colon or not math.isfinite(weight):
        raise ValueError(f"reward {reward!r}: expected a name, a colon and a finite weight, got {part!r}.")
    return name, weight
