# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Images of fixed prompts from fixed noise and their measurements, distributed over the processes."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..columns import Columns
from ..rewards import WeightedReward
from ..videos import score_samples
from .guard import VelocityMeter, diversity, high_frequency_energy, saturated_share


@dataclass(frozen=True)
class Drawn:
    """Images and their measurements, the same in every process.

    Attributes:
        images: m images of each of P prompts, prompt by prompt.
        scores: reward -> P * m scores in the order of the images; NaN for an image that is not finite. A weighted sum
            is followed by its parts.
        saturated: mean of `guard.saturated_share`.
        high_frequency: mean of `guard.high_frequency_energy`.
        velocity_norm: mean over the prompts of `guard.VelocityMeter.mean`.
        diversity: mean over the prompts of `guard.diversity`; None with one image of each.

    Means are over finite values, and NaN without any.
    """

    images: list[Image.Image]
    scores: dict[str, list[float]]
    saturated: float
    high_frequency: float
    velocity_norm: float
    diversity: float | None


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Convert images, or the middle frames of videos, to PIL images.

    Args:
        images: `(B, 3, H, W)` or `(B, F, 3, H, W)`, in [0, 1], of any floating dtype; NaNs become 0.
    """
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.nan_to_num()))


def are_finite(images: torch.Tensor) -> torch.Tensor:
    """Which images have neither NaNs nor infinities, `(B,)` bool, for `(B, ...)`."""
    return images.isfinite().flatten(1).all(1)


def check_range(images: torch.Tensor) -> None:
    """Refuse images or videos with values outside of [0, 1]; NaNs are allowed.

    Raises:
        ValueError: with the range.
    """
    low, high = images.min().item(), images.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"images: expected the pipeline's images in [0, 1], got values from {low:.2f} to {high:.2f}; use its "
            'image processor with output_type="pt".'
        )


def score_images(
    reward: Callable[..., torch.Tensor], images: torch.Tensor, prompts: Sequence[str], columns: Columns
) -> torch.Tensor:
    """`score_samples` of what a pipeline made, `(B,)`.

    Raises:
        ValueError: as `score_samples`, and for values outside of [0, 1].
    """
    check_range(images)
    return score_samples(reward, images, prompts, columns)


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
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Drawn:
    """Draw `count` images of each prompt, one at a time, so that nothing depends on batches or processes.

    All processes make equally many calls, because they call a sharded transformer together. A process that has no
    prompt left draws images of the last prompt, which are not counted.

    Args:
        accelerator: accelerator of the run.
        transformer: module whose outputs are measured.
        prompts: P prompts.
        noise: index of an image, from 0 to P * count - 1 -> its generator.
        count: number of images of each prompt.
        sample: `sample(index of the prompt, generator) -> (1, 3, H, W)` or `(1, F, 3, H, W)`; calls the pipeline.
        rewards: name -> reward.
        advance: called with the number of images that all processes together have drawn since its last call.
        rows: the other columns of each prompt, name -> value, for rewards that have a place for them.
    """
    processes = accelerator.num_processes
    mine = []
    for start in range(0, len(prompts), processes):
        own = start + accelerator.process_index
        place = min(own, len(prompts) - 1)
        with VelocityMeter(transformer) as velocities:
            images = [sample(place, noise(place * count + index)) for index in range(count)]
        if place == own:
            row = {} if rows is None else rows[place]
            measured = _measure(torch.cat(images), prompts[place], row, rewards)
            mine.append((place, {**measured, "velocity_norm": velocities.mean()}))
        advance(min(processes, len(prompts) - start) * count)
    found = [measured for _, measured in sorted(gather_object(mine), key=lambda entry: entry[0])]

    def mean(name: str) -> float:
        values = [each[name] for each in found if each[name] is not None and math.isfinite(each[name])]
        return statistics.fmean(values) if values else math.nan

    return Drawn(
        images=[image for each in found for image in each["images"]],
        scores={name: [score for each in found for score in each["scores"][name]] for name in found[0]["scores"]},
        saturated=mean("saturated"),
        high_frequency=mean("high_frequency"),
        velocity_norm=mean("velocity_norm"),
        diversity=mean("diversity") if count > 1 else None,
    )


def _measure(
    images: torch.Tensor, prompt: str, row: Mapping[str, Any], rewards: Mapping[str, torch.nn.Module]
) -> dict[str, Any]:
    """The images of one prompt as PIL images, their scores by reward, and their measurements."""
    as_pil, images = to_pil(images), images.float()
    columns = {name: [value] for name, value in row.items()}
    scores: dict[str, list[float]] = {}
    for name, reward in rewards.items():
        of_reward: dict[str, list[float]] = {name: []}
        parts = list(reward.weights) if isinstance(reward, WeightedReward) and len(reward.weights) > 1 else []
        of_reward |= {part: [] for part in parts}
        for image in images.split(1):
            # Rewards raise an error for values that are not finite; such an image has no score, as in training.
            is_finite = bool(are_finite(image))
            of_reward[name].append(score_images(reward, image, [prompt], columns).item() if is_finite else math.nan)
            for part in parts:
                of_reward[part].append(reward.last_scores[part].mean().item() if is_finite else math.nan)
        # A part of a sum that is also the held-out reward has one entry; both scores are the same number.
        scores |= of_reward
    return {
        "images": as_pil,
        "scores": scores,
        "saturated": saturated_share(images).nanmean().item(),
        "high_frequency": high_frequency_energy(images).nanmean().item(),
        "diversity": diversity(images),
    }
