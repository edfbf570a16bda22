# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a rollout leaves behind: the calls and the glue of its active steps, and the numbers that a surrogate reads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from .state import CallKind, ModelState
from .surrogate import Surrogate


@dataclass(eq=False)
class Call:
    """One transformer call of an active step.

    Attributes:
        module: the transformer.
        spec: structure of `(args, kwargs)`.
        leaves: its flattened arguments; tensors detached and kept as they were at the call.
        attached: `{index in leaves: tensor in the glue}` for the inputs through which a gradient must return.
        outputs: the recorded floating point outputs, leaves of the glue.
        is_list: whether the outputs are a list with a tensor for each sample; lists of that length among the arguments
            then have one for each sample too. Otherwise the samples stand along the first dimension of `outputs[0]`.
        state: of the transformer at the call.
        kind: of the call, with what the first call of its kind computed with.
    """

    module: torch.nn.Module
    spec: TreeSpec
    leaves: list[Any]
    attached: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]
    is_list: bool
    state: ModelState
    kind: CallKind

    @property
    def size(self) -> int:
        """How many samples the call has, those of all branches of guidance together."""
        return len(self.outputs) if self.is_list else len(self.outputs[0])


@dataclass(eq=False)
class ActiveStep:
    """What the sweep needs of one step: its calls and the glue around them.

    Attributes:
        number: the step.
        latents: `(B, ...)` leaf that the scheduler handed to this step; `None` where no gradient goes on to it.
        velocity: `(B, ...)` what the scheduler was given, in the glue; without a gradient if it is constant 0.
        calls: in the pipeline's order.
        guidance_scales: `{name: value}` as the pipeline had them at this step.
    """

    number: int
    latents: torch.Tensor | None
    velocity: torch.Tensor
    calls: list[Call]
    guidance_scales: dict[str, float]


@dataclass(eq=False)
class Trajectory:
    """A recorded rollout. Only what the surrogate needs is kept.

    Attributes:
        sigmas: `(N + 1,)`, the scheduler's; falling to 0, or rising to 1 where it inverts them.
        surrogate: what was drawn for it.
        fingerprints: `{transformer: see state.fingerprint}` when the rollout began.
        latents: `{step: (B, ...)}` detached; `latents[N]` is the sample, as the scheduler returned it.
        velocities: `{step: (B, ...)}` detached.
        steps: `{step: ActiveStep}` of the surrogate's terms.
        endpoint: `(B, ...)` leaf requiring a gradient, in the shape and dtype of the loop's latents.
        sampled: `(B, ...)` mask, `False` where the pipeline writes a source into the latents between all steps; a
            scalar `True` if it leaves them as they are; `None` while there is only one step.
    """

    sigmas: torch.Tensor
    surrogate: Surrogate
    fingerprints: dict[torch.nn.Module, torch.Tensor | None]
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    velocities: dict[int, torch.Tensor] = field(default_factory=dict)
    steps: dict[int, ActiveStep] = field(default_factory=dict)
    endpoint: torch.Tensor | None = None
    sampled: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1
