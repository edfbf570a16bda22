# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Scoring images a few at a time: rewards, and the gradient of each in its own image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .columns import Columns, Reward
from .host import read, widened
from .state import without_autocast, without_cudnn_attention
from .videos import score_samples


def columns_of_images(columns: Columns, prompts: Sequence[str], num_images: int, num_samples: int) -> Columns:
    """Columns with a value for each image, as `prompts_of_images`.

    Raises:
        ValueError: for a column of another length than the prompts.
    """
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != len(prompts):
            raise ValueError(f"Expected a list of {len(prompts)} values of the column {name!r}, one for each prompt.")
    return {name: prompts_of_images(values, num_images, num_samples) for name, values in columns.items()}


def prompts_of_images(prompts: Sequence[Any], num_images: int, num_samples: int) -> list[Any]:
    """A prompt for each image.

    Args:
        prompts: one for each image, or one for each `num_samples / len(prompts)` images in a row.
        num_images: samples, and after them the copies of all samples, again and again (DRaFT-LV).
        num_samples: B.

    Raises:
        ValueError: for prompts that fit neither.
    """
    if isinstance(prompts, str):
        raise ValueError("`prompts` must be a list with a prompt for each image, got one string.")
    if len(prompts) == num_images:
        return list(prompts)
    if len(prompts) == 0 or num_samples % len(prompts):
        raise ValueError(f"Expected a prompt for each of {num_images} images, got {len(prompts)} prompts.")
    # Several images of a prompt stand together; copies score the same prompts again after all samples.
    of_samples = [prompt for prompt in prompts for _ in range(num_samples // len(prompts))]
    return of_samples * (num_images // num_samples)


def check_images(images: torch.Tensor, expected: int) -> None:
    """Raise unless these are all images of the record block, connected to it.

    Raises:
        RecordingError: for images without a gradient.
        ValueError: for another number of images.
    """
    if not isinstance(images, torch.Tensor) or not images.requires_grad:
        raise checks.RecordingError(
            f"The images are not connected to the recorded rollout, got {type(images).__name__}; call the pipeline "
            'with output_type="pt" inside record() and pass what it returned (post-processing through numpy cannot be '
            "trained through)."
        )
    if len(images) != expected:
        raise ValueError(f"Expected all {expected} images of the record() block, got {len(images)}.")


def check_images_are_used(gradient: torch.Tensor | None) -> None:
    """A reward model's own parameters may require a gradient where the images have lost theirs."""
    if gradient is None:
        raise checks.RecordingError(
            "The rewards are not differentiable in the images, although they carry a gradient (of the reward's own "
            "parameters); let the reward use them without detach, PIL or numpy."
        )


@dataclass(frozen=True, eq=False)
class Scored:
    """Images and their rewards.

    Attributes:
        rewards: `(B,)`, a leaf that requires a gradient.
        images: `(B, 3, H, W)` or `(B, F, 3, H, W)` with their graph.
        gradients: like `images`, of each reward in its own image, with the scale.
    """

    rewards: torch.Tensor
    images: torch.Tensor
    gradients: torch.Tensor


def score(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    columns: Columns,
    num_images: int,
    num_samples: int,
    size: int | None,
    gradient_scale: float,
    check: Callable[[torch.Tensor, int], None],
    on_stage: Callable[[str], None],
) -> Scored:
    """Score images a few at a time.

    Args:
        reward: scores each image on its own, see `score_samples`.
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`.
        prompts: see `prompts_of_images`.
        columns: see `columns_of_images`.
        num_images: that are expected.
        num_samples: see `prompts_of_images`.
        size: images at a time; `None` for all.
        gradient_scale: factor on the gradients.
        check: raises for rewards that are not as many as expected, or not differentiable in the images alone.
        on_stage: told "reward" before each part.

    Raises:
        RecordingError: for images without a gradient.
        ValueError: for another number of images, or prompts or columns that do not fit.
    """
    check_images(images, num_images)
    columns = columns_of_images(columns, prompts, num_images, num_samples)
    prompts = prompts_of_images(prompts, num_images, num_samples)
    parts = images.detach().split(size or len(images))
    are_finite = read([part.isfinite().all() for part in parts])
    rewards, gradients, start = [], [], 0
    for part, is_finite in zip(parts, are_finite, strict=True):
        part = part.requires_grad_()
        places, start = slice(start, start + len(part)), start + len(part)
        of_part = {name: values[places] for name, values in columns.items()}
        if not is_finite:
            # Rewards refuse such images, and a judge would take them for bad ones.
            rewards.append(widened(part.new_full((len(part),), math.nan)))
            gradients.append(torch.full_like(part, math.nan))
            continue
        on_stage("reward")
        with torch.enable_grad(), without_cudnn_attention():
            scored = score_samples(reward, part, prompts[places], of_part)
        check(scored, len(part))
        # Each reward sees its own image only, so the sum's gradient is every reward's own.
        # It is scaled here and not later: float16 gradients of single pixels would be lost before.
        with without_autocast(part.device.type):
            (gradient,) = torch.autograd.grad(scored.sum() * gradient_scale, part, allow_unused=True)
        check_images_are_used(gradient)
        rewards.append(scored.detach())
        gradients.append(gradient)
    return Scored(torch.cat(rewards).requires_grad_(), images, torch.cat(gradients))


def endpoint_gradients(
    endpoints: Sequence[torch.Tensor],
    loss: torch.Tensor,
    gradient_scale: float,
    scored: Scored | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradient of the loss at each endpoint, `(B, ...)`; `None` for one that the loss does not depend on.

    Args:
        endpoints: leaves that were decoded.
        loss: scalar, with its graph.
        gradient_scale: factor on the gradients.
        scored: what the loss was made of; `None` where its graph leads to the endpoints.
    """
    with torch.enable_grad(), without_autocast(endpoints[0].device.type):
        if scored is None:
            return torch.autograd.grad(loss * gradient_scale, endpoints, allow_unused=True)
        (of_rewards,) = torch.autograd.grad(loss, scored.rewards)
        shape = (-1, *[1] * (scored.images.ndim - 1))
        cotangent = (scored.gradients * of_rewards.to(scored.gradients).view(shape)).to(scored.images.dtype)
        return torch.autograd.grad(scored.images, endpoints, cotangent, allow_unused=True)
