# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards of a user's own, for tests: how red a picture is, how bright, how much a video moves."""

from collections.abc import Callable, Sequence

import torch


def make_reward() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """Reward `(B, 3, H, W), prompts -> (B,)`: red less the mean of green and blue."""
    return lambda images, prompts: (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


def make_held_out_reward() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """Another one, to judge with: how bright a picture is."""
    return lambda images, prompts: images.flatten(1).mean(1)


class Motion(torch.nn.Module):
    """Takes videos `(B, F, 3, H, W)`: minus the mean squared change from frame to frame."""

    takes_videos = True

    def forward(self, videos: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -videos.diff(dim=1).pow(2).flatten(1).mean(1)
