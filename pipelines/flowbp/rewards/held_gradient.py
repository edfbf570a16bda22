# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Scores whose gradient in the images was computed together with them, so that no graph is kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _HeldGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = images.dtype
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        shape = (-1, *[1] * (gradient.ndim - 1))
        return (gradient * cotangent.to(gradient).view(shape)).to(ctx.dtype), None, None


def hold_gradient(images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
    """Scores (B,) with a known gradient in the images, of their shape; each image has an effect on its score only.

    There are no second derivatives.
    """
    return _HeldGradient.apply(images, scores, gradient)


def score_one_by_one(score: Callable[[Tensor, int], Tensor], images: Tensor) -> Tensor:
    """Scores images one at a time, with the graph of one of them in memory.

    Args:
        score: `score(image (3, H, W), index)`: a scalar. Its parameters are frozen.
        images: (B, 3, H, W).

    Returns:
        (B,) on the images' device, with a gradient if the images require one and gradients are enabled.
    """
    if not (torch.is_grad_enabled() and images.requires_grad):
        return torch.stack([score(image, index) for index, image in enumerate(images)]).to(images.device)
    leaves = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    scores, gradient = [], torch.empty_like(leaves)
    for index, image in enumerate(leaves):
        with torch.enable_grad():
            leaf = image.clone().requires_grad_()
            one = score(leaf, index)
            (gradient[index],) = torch.autograd.grad(one, leaf)
        scores.append(one.detach())
    return hold_gradient(images, torch.stack(scores).to(images.device), gradient)
