# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards of videos: those that take a video whole, and the mean over frames of those that score images."""

import functools
import inspect
import math
from collections.abc import Sequence

import torch

from .columns import Columns, Reward, call_with_columns


def takes_videos(reward: Reward) -> bool | None:
    """A reward's attribute `takes_videos`: whether it scores videos `(B, F, 3, H, W)`; False where it has none.

    None of something that calls several rewards, each of which has its own answer.

    Raises:
        ValueError: for another value.
    """
    function = reward
    while isinstance(function, functools.partial):
        function = function.func
    found = getattr(function, "takes_videos", False)
    if found is not None and not isinstance(found, bool):
        raise ValueError(f"takes_videos of {type(function).__name__}: expected True or False, got {found!r}.")
    return found


def makes_videos(pipeline: type) -> bool:
    """Whether a pipeline class of diffusers may make videos: its call has an argument for frames, or of videos."""
    names = inspect.signature(pipeline.__call__).parameters
    return not {"num_frames", "frames"}.isdisjoint(names) or any("video" in name for name in names)


def check_reward_frames(reward_frames: int | None, pipeline: type, num_frames: int | None) -> None:
    """Refuse `--reward_frames` that does not fit a pipeline class and the number of its frames, where that is given.

    Raises:
        ValueError: in one line.
    """
    if reward_frames is None:
        return
    if not makes_videos(pipeline):
        raise ValueError(
            f"--reward_frames {reward_frames}: {pipeline.__name__} makes images, not videos; leave it out."
        )
    if num_frames is not None and reward_frames > num_frames:
        raise ValueError(
            f"--reward_frames {reward_frames}: a video has {num_frames} frames (--num_frames); choose fewer."
        )


def chosen_frames(total: int, count: int | None) -> list[int]:
    """Which of a video's frames are scored: `count` evenly spaced ones with the first and the last, each once.

    One is the middle frame, which reports show. None: all of them.

    Raises:
        ValueError: for more frames than the video has.
    """
    if count is None:
        return list(range(total))
    if count > total:
        raise ValueError(f"--reward_frames {count}: expected at most the video's {total} frames; choose fewer.")
    if count == 1:
        return [total // 2]
    # Rounded half up, in whole numbers.
    return [(2 * place * (total - 1) + count - 1) // (2 * (count - 1)) for place in range(count)]


def score_samples(
    reward: Reward, samples: torch.Tensor, prompts: Sequence[str], columns: Columns, reward_frames: int | None = None
) -> torch.Tensor:
    """Scores of images, or of videos by a reward of either kind.

    Args:
        reward: `(images (B, 3, H, W), prompts, **columns) -> (B,)`, or with `takes_videos` the same of videos. It gets
            those columns that its signature has a place for.
        samples: `(B, 3, H, W)` or `(B, F, 3, H, W)`, in [0, 1].
        prompts: B of them.
        columns: name -> B values.
        reward_frames: of a video, how many frames a reward of images scores, see `chosen_frames`.

    Returns:
        `(B,)`; of a video the mean over its frames, through which the gradient flows alone. Without a gradient, frames
        that get no finite score are left out.

    Raises:
        ValueError: for images and a reward of videos, images and `reward_frames`, more frames than there are, and
            scores that are not one for each frame.
    """
    kind, is_video = takes_videos(reward), samples.ndim == 5
    if kind is True and not is_video:
        raise ValueError(f"Expected videos (B, F, 3, H, W), which the reward takes, got {tuple(samples.shape)}.")
    if kind is False and reward_frames is not None and not is_video:
        raise ValueError(f"--reward_frames {reward_frames}: expected videos, got images {tuple(samples.shape)}.")
    if kind is not False or not is_video:
        return call_with_columns(reward, samples, prompts, columns)
    frames = chosen_frames(samples.shape[1], reward_frames)
    chosen = (samples if reward_frames is None else samples[:, frames]).flatten(0, 1)
    places = [place for place in range(len(samples)) for _ in frames]
    of_frames = {name: [values[place] for place in places] for name, values in columns.items()}
    scores = call_with_columns(reward, chosen, [prompts[place] for place in places], of_frames)
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(chosen),):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"Expected a score of each of {len(chosen)} frames, a tensor ({len(chosen)},), got {found}.")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(0, (len(samples), -1))
    if scores.requires_grad:
        return scores.mean(1)
    return scores.masked_fill(~scores.isfinite(), math.nan).nanmean(1)
