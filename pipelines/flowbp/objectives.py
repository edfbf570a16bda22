# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Objectives: how the rewards of a batch become one loss, and how a surrogate's gaps weight its samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .host import widened
from .surrogate import Surrogate


@dataclass(frozen=True)
class Objective:
    """`mean(w * relu(clip - reward)) * scale / undo_guidance`, or `mean(-w * reward)` in the same way without `clip`.

    The mean is taken over the samples that are kept, that is those of weight other than 0.

    Attributes:
        clip: reward at which a sample stops to give a gradient (the reference uses 0.55 for HPSv2.1), `None` for a
            plain negative reward.
        scale: factor on the loss, above 0.
        undo_guidance: guidance scale by which the loss is divided to undo the gain that guidance gives the gradient, 1
            for none (docs/methods.md, "From rewards to a loss").
    """

    clip: float | None = None
    scale: float = 1.0
    undo_guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.clip is not None and not math.isfinite(self.clip):
            raise ValueError(f"`clip` must be a finite number or None, got {self.clip}.")
        for name, value in (("scale", self.scale), ("undo_guidance", self.undo_guidance)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {value}.")

    def __call__(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            rewards: `(B,)`, floating point.
            weights: `(B,)`, at least 0; 0 drops a sample.

        Returns:
            Scalar tensor, differentiable in the rewards; 0 where no sample is kept.
        """
        losses = -rewards if self.clip is None else torch.relu(self.clip - rewards)
        kept = (weights != 0).sum().clamp(min=1)
        return (weights * losses).sum() / kept * (self.scale / self.undo_guidance)


def connector_gaps(
    surrogate: Surrogate,
    latents: Mapping[int, torch.Tensor],
    velocities: Mapping[int, torch.Tensor],
    sampled: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Mean absolute gap between each leg's value and the rollout's latent at its end (docs/methods.md, section 2).

    Args:
        surrogate: with legs, or none for an empty result.
        latents: `{step: (B, ...)}`, at the legs' starts and ends.
        velocities: `{step: (B, ...)}`, at the legs' supports and, where they are blended, starts.
        sampled: mask of the places that are sampled; at the others the value is the rollout's. `None` for all.

    Returns:
        `{leg's end: (B,)}`, float32 (float64 for float64 latents), detached.
    """
    gaps = {}
    for leg in surrogate.legs:
        # Legs end at sigma 0 with values near the latents': the sum is made in float32 at least.
        value = widened(latents[leg.start])
        for step, weight in zip(leg.supports, leg.weights, strict=True):
            value = value + weight * widened(velocities[step])
        if leg.blend:
            value = value + leg.blend * widened(velocities[leg.start])
        gap = (value - widened(latents[leg.end])).abs()
        gaps[leg.end] = (gap if sampled is None else gap.where(sampled, 0)).flatten(1).mean(1)
    return gaps


def sample_weights(surrogate: Surrogate, gaps: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """Trajectory-similarity weights `1 / (max(d_j, tau) + max(d_0, tau))`, 0 for samples beyond the largest gaps.

    Args:
        surrogate: two legs where `tau`, `max_gap_j` or `max_gap_0` is set.
        gaps: of `connector_gaps`.

    Returns:
        `(B,)` weights, or `None` where every sample has weight 1.
    """
    if surrogate.tau is None and surrogate.max_gap_j is None and surrogate.max_gap_0 is None:
        return None
    gap_j, gap_0 = (gaps[leg.end] for leg in surrogate.legs)
    if surrogate.tau is None:
        weights = torch.ones_like(gap_j)
    else:
        weights = 1.0 / (gap_j.clamp(min=surrogate.tau) + gap_0.clamp(min=surrogate.tau))
    for gap, largest in ((gap_j, surrogate.max_gap_j), (gap_0, surrogate.max_gap_0)):
        if largest is not None:
            weights = torch.where(gap > largest, torch.zeros_like(weights), weights)
    return weights
