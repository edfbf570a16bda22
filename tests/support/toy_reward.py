# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A reward of a user's own, for tests: how red a picture is."""

from collections.abc import Callable, Sequence

import torch


def make_reward() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """Reward `(B, 3, H, W), prompts -> (B,)`: red less the mean of green and blue."""
    return lambda images, prompts: (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


def make_held_out_reward() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """Another one, to judge with: how bright a picture is."""
    return lambda images, prompts: images.flatten(1).mean(1)
