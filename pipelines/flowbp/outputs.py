# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a sweep and a backward report."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SweepOutput:
    """What a sweep found beside the gradients, detached and without `gradient_scale`.

    Attributes:
        anchor: scalar, the velocity anchor with its factor beta; 0 without one.
        gradient_norms: `{active step: scalar}` norm of the gradient that it added to the parameters in this process;
            empty unless measured.
    """

    anchor: torch.Tensor
    gradient_norms: dict[int, torch.Tensor]


@dataclass(frozen=True)
class BackwardOutput:
    """What one `backward` computed, all detached.

    Attributes:
        rewards: `(B,)`; with DRaFT-LV's n copies `((n + 1) * B,)`, the sample's first.
        loss: scalar, without `gradient_scale` and without the anchor: the gradient is that of `loss + anchor`.
        weights: sample weights, like `rewards`.
        gaps: `{step: (B,)}` connector gaps at the ends of the surrogate's legs; N is the gap d_0.
        anchor: see `SweepOutput`.
        gradient_norms: see `SweepOutput`.
    """

    rewards: torch.Tensor
    loss: torch.Tensor
    weights: torch.Tensor
    gaps: dict[int, torch.Tensor]
    anchor: torch.Tensor
    gradient_norms: dict[int, torch.Tensor]
