# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What every reward does to its pictures first: check, resize, crop or pad, normalise. All of it is differentiable.

On 8-bit pictures the results are those of transformers' PIL image processors up to the roundings that these make to
8 bits after each direction of a resize, which would leave no gradient: at most 1.2 / 255 / std apart on the pictures
of `tests/rewards/test_reward_preprocessing.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and standard deviation of the pictures that CLIP was trained on, by channel.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(images: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Refuses what no reward can score.

    Args:
        images: must be a float tensor (B, 3, H, W) of finite values in [0, 1]; 1e-3 beyond is let pass.
        prompts: if given, must be a list of B strings.

    Raises:
        ValueError: in one line.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(f"images: expected a float tensor (B, 3, H, W), got {tuple(images.shape)} of {images.dtype}.")
    low, high = (bound.item() for bound in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails this too
        raise ValueError(
            f"images: expected finite values in [0, 1], got {low:.4g} to {high:.4g}; "
            'pipelines give that range with output_type="pt".'
        )
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(images)):
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)}"
        raise ValueError(f"prompts: expected a list of {len(images)}, one per image, got {got}.")


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (B, 3, H, W) in [0, 1] to (B, 3, height, width) in [0, 1].

    Like Pillow it goes along one direction after the other, and cuts off after each what overshoots [0, 1]. It is done
    in float32 or float64, whatever the dtype of the pictures and autocast.
    """
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    rows, columns = images.shape[2:]
    # The order matters where something is cut off. Pillow 13 goes first along the rows, but along the columns where
    # these shrink by more than twice as much (pull request 9549 of Pillow).
    columns_first = rows > height and rows - height > 2 * (columns - width)
    between = (height, columns) if columns_first else (rows, width)
    for size in (between, (height, width)):
        if size != x.shape[2:]:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp(0, 1)
    return x


def resize_short(images: Tensor, size: int) -> Tensor:
    """`resize` with the shorter side at `size` and the aspect ratio kept; the longer side is rounded down."""
    height, width = images.shape[2:]
    short = min(height, width)
    return resize(images, int(size * height / short), int(size * width / short))


def resize_long(images: Tensor, size: int) -> Tensor:
    """`resize` with the longer side at `size` and the aspect ratio kept; the shorter side is rounded, at least 1."""
    height, width = images.shape[2:]
    scale = size / max(height, width)
    return resize(images, max(1, round(height * scale)), max(1, round(width * scale)))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle (B, 3, size, size) of pictures with sides of at least `size`; an odd margin is larger at the end."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def pad(images: Tensor, size: int) -> Tensor:
    """Black borders that make pictures with sides of at most `size` (B, 3, size, size); the last one is the wider."""
    height, width = (size - side for side in images.shape[2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """`(images - mean) / std` by channel."""
    mean, std = (torch.tensor(values).to(images).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std
