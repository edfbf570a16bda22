# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a drawn surrogate needs of a rollout."""

from dataclasses import dataclass

import torch

from .surrogate import Surrogate


@dataclass(frozen=True)
class Plan:
    """Which steps of one rollout are evaluated again, what is kept of the others, and where the rollout may end.

    Attributes:
        sigmas: N + 1 numbers, as the scheduler has them, from that of the first step on.
        active: steps with a term.
        coupled: active steps whose gradient goes on to earlier terms, so that the path to their latents is needed.
        latents: steps whose latents are kept; N is the sample.
        velocities: steps whose velocities are kept.
        last: the last step that must be made.
        posterior_step: the step at whose posterior mean the reward looks; `None` for the sample.
        is_copy: whether the rollout only repeats its last step from a re-noised sample (DRaFT-LV).
        first: how many of the scheduler's own steps come before step 0, which starts from a noised image
            (`strength` below 1).
    """

    sigmas: tuple[float, ...]
    active: frozenset[int]
    coupled: frozenset[int]
    latents: frozenset[int]
    velocities: frozenset[int]
    last: int
    posterior_step: int | None
    is_copy: bool
    first: int

    @classmethod
    def of(cls, surrogate: Surrogate, sigmas: torch.Tensor, is_copy: bool = False, first: int = 0) -> "Plan":
        """The plan of a rollout.

        Args:
            surrogate: that was drawn for it.
            sigmas: `(N + 1,)`, the scheduler's from step 0 on.
            is_copy, first: see the attributes.
        """
        num_steps = len(sigmas) - 1
        active = frozenset(term.step for term in surrogate.terms)
        supports = {step for leg in surrogate.legs for step in (leg.start, *leg.supports)}
        ends = {step for leg in surrogate.legs for step in (leg.start, leg.end)}
        sample = {num_steps} if surrogate.endpoint == "sample" else set()
        return cls(
            sigmas=tuple(sigmas.tolist()),
            active=active,
            # Nobody comes before the first term, so its coupling has nowhere to go.
            coupled=frozenset(term.step for term in surrogate.terms[1:] if term.coupling),
            latents=active | ends | sample,
            velocities=active | supports,
            last=surrogate.last_step(num_steps),
            posterior_step=None if surrogate.endpoint == "sample" else surrogate.endpoint[1],
            is_copy=is_copy,
            first=first,
        )

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    def length(self, step: int) -> float:
        """`sigmas[step + 1] - sigmas[step]`."""
        return self.sigmas[step + 1] - self.sigmas[step]

    def skips(self, step: int) -> bool:
        """Whether this step of a copy only leads to the step that is repeated, and need not be computed."""
        return self.is_copy and step < self.last
