# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Pictures of fixed prompts from fixed noise, and what is measured of them, shared out over the processes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..rewards import WeightedReward
from .guard import VelocityMeter, diversity, high_frequency_energy, saturated_share


@dataclass(frozen=True)
class Drawn:
    """Pictures and their measurements; the same in every process.

    Attributes:
        images: P prompts x m pictures of each, prompt by prompt.
        scores: `{reward: P * m numbers}` in the order of the pictures, NaN for one that is not finite; the parts of a
            weighted sum beside the sum.
        saturated: mean of `guard.saturated_share`.
        high_frequency: mean of `guard.high_frequency_energy`.
        velocity_norm: mean root mean square of the transformer's outputs.
        diversity: mean over the prompts of `guard.diversity`, None with one picture of each.

    Means are over what is finite, NaN where nothing is.
    """

    images: list[Image.Image]
    scores: dict[str, list[float]]
    saturated: float
    high_frequency: float
    velocity_norm: float
    diversity: float | None


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of `(B, 3, H, W)` in [0, 1], or of the middle frames of videos `(B, F, 3, H, W)`."""
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.nan_to_num()))


def frames(images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, Sequence[str]]:
    """What a reward is called with: pictures, or all frames of videos, and the prompt of each.

    Args:
        images: `(B, 3, H, W)` or `(B, F, 3, H, W)`, in [0, 1].
        prompts: B of them.

    Returns:
        `(B, 3, H, W)` or `(B * F, 3, H, W)`, video by video, and as many prompts.

    Raises:
        ValueError: for values outside [0, 1]; NaN is let pass.
    """
    low, high = images.min().item(), images.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"Expected pictures in [0, 1], the pipeline made values from {low:.2f} to {high:.2f}.")
    if images.ndim == 4:
        return images, prompts
    return images.flatten(0, 1), [prompt for prompt in prompts for _ in range(images.shape[1])]


def score_images(
    reward: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], images: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """Rewards of pictures, of videos the mean over the frames.

    Args:
        reward: `(images (B, 3, H, W), prompts) -> (B,)`.
        images: `(B, 3, H, W)` or `(B, F, 3, H, W)`, in [0, 1].
        prompts: B of them.

    Returns:
        `(B,)`.

    Raises:
        ValueError: for values outside [0, 1].
    """
    scores = reward(*frames(images, prompts))
    return scores if images.ndim == 4 else scores.unflatten(0, (len(images), -1)).mean(1)


@torch.no_grad()
def draw_images(
    accelerator: Accelerator,
    transformer: torch.nn.Module,
    prompts: Sequence[str],
    noise: Callable[[int], torch.Generator],
    count: int,
    sample: Callable[[int, torch.Generator], torch.Tensor],
    rewards: Mapping[str, torch.nn.Module],
    advance: Callable[[int], object] = lambda count: None,
) -> Drawn:
    """Draw `count` images of each prompt, one at a time, so that nothing depends on batches or processes.

    All processes draw equally many, because a sharded transformer is called by all of them together: where prompts run
    out they repeat the last one, which is not counted.

    Args:
        accelerator: of the run.
        transformer: whose outputs are measured.
        prompts: P prompts.
        noise: generator of the picture with this number, from 0 to P * count - 1.
        count: pictures of a prompt.
        sample: `sample(place of the prompt, generator) -> (1, 3, H, W)` or `(1, F, 3, H, W)`, the pipeline's own
            sampling.
        rewards: by name.
        advance: is told how many images all processes together have made since the last time.
    """
    mine = []
    of_all = math.ceil(len(prompts) / accelerator.num_processes)
    for turn in range(of_all):
        place = turn * accelerator.num_processes + accelerator.process_index
        number = min(place, len(prompts) - 1)
        with VelocityMeter(transformer) as velocities:
            pictures = [sample(number, noise(number * count + index)) for index in range(count)]
        if place == number:
            measured = _measure(torch.cat(pictures), prompts[number], rewards)
            mine.append((place, {**measured, "velocity_norm": velocities.mean()}))
        done = min((turn + 1) * accelerator.num_processes, len(prompts)) - turn * accelerator.num_processes
        advance(done * count)
    found = [each for _, each in sorted(gather_object(mine), key=lambda entry: entry[0])]

    def mean(name: str) -> float:
        values = [each[name] for each in found if each[name] is not None and math.isfinite(each[name])]
        return sum(values) / len(values) if values else math.nan

    return Drawn(
        images=[image for each in found for image in each["images"]],
        scores={name: [score for each in found for score in each["scores"][name]] for name in found[0]["scores"]},
        saturated=mean("saturated"),
        high_frequency=mean("high_frequency"),
        velocity_norm=mean("velocity_norm"),
        diversity=mean("diversity") if count > 1 else None,
    )


def _measure(images: torch.Tensor, prompt: str, rewards: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    files, images = to_pil(images), images.float()
    scores: dict[str, list[float]] = {}
    for name, reward in rewards.items():
        of_reward: dict[str, list[float]] = {name: []}
        parts = list(reward.weights) if isinstance(reward, WeightedReward) and len(reward.weights) > 1 else []
        of_reward |= {part: [] for part in parts}
        for image in images.split(1):
            # Rewards refuse what is not finite; training skips it and goes on, and so does this.
            is_finite = bool(image.isfinite().all())
            of_reward[name].append(score_images(reward, image, [prompt]).item() if is_finite else math.nan)
            for part in parts:
                of_reward[part].append(reward.last_scores[part].mean().item() if is_finite else math.nan)
        # A part that is also the held-out reward keeps one entry; both are the same number.
        scores |= of_reward
    return {
        "images": files,
        "scores": scores,
        "saturated": saturated_share(images).nanmean().item(),
        "high_frequency": high_frequency_energy(images).nanmean().item(),
        "diversity": diversity(images),
    }
