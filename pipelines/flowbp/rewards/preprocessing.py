# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Differentiable preprocessing that the rewards share: check, resize, crop or pad, normalise.

On 8-bit images the results differ from those of transformers' PIL image processors by at most 1.2 / 255 / std on the
images of `tests/rewards/test_reward_preprocessing.py`: PIL rounds to 8 bits after each direction of a resize, which
would leave no gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Mean and standard deviation of the images that CLIP was trained on, by channel.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(images: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Checks what a reward is called with.

    Args:
        images: a float tensor (B, 3, H, W) of finite values in [0, 1], with a tolerance of 1e-3.
        prompts: None, or a list of B strings.

    Raises:
        ValueError: images of another shape or dtype, not finite or out of range; other than B prompts.
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


def to_pil_images(reward: str, images: Tensor, prompts: Sequence[str]) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as 8-bit PIL images, for scores without a gradient.

    Raises:
        ValueError: images that require a gradient; see also `check_images`.
    """
    check_images(images, prompts)
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"reward {reward!r}: expected images without requires_grad, got images that require a gradient, but this "
            "reward has none; call it under torch.no_grad() to evaluate, and train with another reward."
        )
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (B, 3, H, W) in [0, 1] to (B, 3, height, width) in [0, 1].

    Like Pillow it resizes one direction after the other and clamps to [0, 1] after each, so values that overshoot have
    no gradient. It computes in float32, or float64 for float64 images, whatever autocast says.
    """
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    old_height, old_width = images.shape[2:]
    # The order matters where values are clamped. Pillow 13 resizes the width first, but the height first where it
    # shrinks by more than twice as much (pull request 9549 of Pillow).
    height_first = old_height > height and old_height - height > 2 * (old_width - width)
    between = (height, old_width) if height_first else (old_height, width)
    resize_once = resized_by_products if x.is_cuda and torch.are_deterministic_algorithms_enabled() else _bicubic
    for size in (between, (height, width)):
        if size != x.shape[2:]:
            x = resize_once(x, size)
        x = x.clamp(0, 1)
    return x


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def resized_by_products(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize as products with its weights: on GPUs the kernel's gradient is not deterministic."""
    rows, columns = (torch.eye(old).to(images)[None, None] for old in images.shape[2:])
    return _bicubic(rows, (size[0], rows.shape[-1])) @ images @ _bicubic(columns, (size[1], columns.shape[-1])).mT


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
    """The centre (B, 3, size, size) of images with sides of at least `size`; an odd margin is larger at the end."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def pad(images: Tensor, size: int) -> Tensor:
    """Pads sides of at most `size` with black to (B, 3, size, size); an odd margin is larger at the end."""
    height, width = (size - side for side in images.shape[2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """`(images - mean) / std` by channel."""
    mean, std = (torch.tensor(values).to(images).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std
