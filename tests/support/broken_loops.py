# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 with a plain sampling loop that is broken in one way each, and how each is refused.

Every pipeline is a subclass of `violations.PlainLoop`, whose gradient is exact, and overrides one part of it.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from violations import PlainLoop, Refines, Violation, loop_call, problem, run


class AltersLatents(PlainLoop):
    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0.99 * super().step(latents, timestep)


class AddsNoise(PlainLoop):
    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        following = super().step(latents, timestep)
        return following + 1e-3 * torch.randn(following.shape, dtype=following.dtype)


class MovingAverage(PlainLoop):
    """Guidance with momentum, as adaptive projected guidance has it."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(super().velocity(latents, timestep) + (0.3 * self.seen[-1] if self.seen else 0))
        return self.seen[-1]


class OldVelocity(PlainLoop):
    """Memory that skips a step."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(super().velocity(latents, timestep))
        return self.seen[-1] + (0.3 * self.seen[-3] if len(self.seen) > 2 else 0)


class OldLatents(PlainLoop):
    """Memory of an earlier step's latents, not of outputs."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(latents)
        return super().velocity(latents, timestep) + (0.1 * self.seen[-2] if len(self.seen) > 1 else 0)


class WordsDrift(PlainLoop):
    """Text that follows the latents without a gradient."""

    def branch(
        self, latents: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return super().branch(latents, timestep, words + latents.detach().mean(), pooled)


class LatentsThroughNumpy(PlainLoop):
    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(super().step(latents, timestep).detach().numpy())


class DetachedVelocity(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().velocity(latents, timestep).detach()


class GuidanceWithoutGradients(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().velocity(latents, timestep)


class GuidanceThroughNumpy(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(super().velocity(latents, timestep).numpy())


class VelocityAgain(PlainLoop):
    """Skips the transformer from the second step on."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self.seen:
            self.seen.append(super().velocity(latents, timestep))
        return self.seen[0]


class StepFirst(PlainLoop):
    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        first = self.scheduler.timesteps[0]
        latents = self.scheduler.step(torch.zeros_like(latents), first, latents, return_dict=False)[0]
        for timestep in self.scheduler.timesteps[1:]:
            latents = self.step(latents, timestep)
        return latents


class TwoLoops(PlainLoop):
    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        super().sampled(latents, steps)
        return super().sampled(latents + 0.1, steps)


class BeginsLater(PlainLoop):
    """Image-to-image: the first steps of the schedule are left out."""

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps + 2)
        for timestep in self.scheduler.timesteps[2:]:
            latents = self.step(latents, timestep)
        return latents


class OwnScheduler(PlainLoop):
    """Steps a copy of its scheduler."""

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        other = copy.deepcopy(self.scheduler)
        for timestep in other.timesteps:
            latents = other.step(self.velocity(latents, timestep), timestep, latents, return_dict=False)[0]
        return latents


class UsesParameters(PlainLoop):
    """Calls a part of the transformer by itself."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        words = self.texts[0][0]
        return super().velocity(latents, timestep) + self.transformer.context_embedder(words).mean()


class ChangesParameters(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.transformer.proj_out.bias.data += 0.01
        return super().velocity(latents, timestep)


class ChangesSettings(PlainLoop):
    """State of the transformer that differs from step to step."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(None)
        self.transformer.transformer_blocks[1].norm1.norm.eps = 0.1 * len(self.seen)
        return super().velocity(latents, timestep)


class PicturesThroughNumpy(PlainLoop):
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(super().pictures(latents).numpy())


class PicturesThroughDetachedNumpy(PlainLoop):
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(super().pictures(latents).detach().numpy())


class DecodesWithoutGradients(PlainLoop):
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().pictures(latents)


# What is found, and what to do about it.
ALTERED = ("the latents given to step 1 are not those that step 0 returned", "Record without such a callback")
MEMORY = ("of earlier steps, other than through the latents of this one (guidance with memory)", "switch that")
DRIFT = ("changed from step 0 to step 1, and neither the latents nor a timestep explain it", "is not supported")
DISCONNECTED = ("is not connected to the transformer's outputs by autograd", "cannot be trained through")
NUMPY = ("turns tensors into numpy arrays, which carry no gradient", 'call it with output_type="pt"')
NO_GRADIENT = ("what the pipeline returned carries no gradient", 'call it with output_type="pt"')
NOT_REPRODUCED = ("does not reproduce its recorded output", "change nothing between record and backward")

BROKEN: dict[type[PlainLoop], tuple[str, str]] = {
    AltersLatents: ALTERED,
    AddsNoise: ALTERED,
    MovingAverage: MEMORY,
    OldVelocity: MEMORY,
    OldLatents: MEMORY,
    WordsDrift: DRIFT,
    LatentsThroughNumpy: DRIFT,
    DetachedVelocity: DISCONNECTED,
    GuidanceWithoutGradients: DISCONNECTED,
    GuidanceThroughNumpy: NUMPY,
    VelocityAgain: DISCONNECTED,
    StepFirst: ("scheduler.step was called before any transformer ran", "expected a sampling loop"),
    TwoLoops: ("a second sampling loop began", "in one loop"),
    BeginsLater: ("scheduler made step 2 of its sigmas, expected step 0", "text-to-image pipeline or strength 1"),
    OwnScheduler: ("Expected a complete rollout, got none", "with its own scheduler"),
    Refines: ("a transformer call that is not recorded", "switch that pass (a refiner, "),
    UsesParameters: ("the trained parameter context_embedder.weight, used outside of", "switch that pass"),
    ChangesParameters: ("parameters changed after the rollout was recorded", "call backward before they change"),
    ChangesSettings: NOT_REPRODUCED,
    PicturesThroughNumpy: NUMPY,
    PicturesThroughDetachedNumpy: NO_GRADIENT,
    DecodesWithoutGradients: NO_GRADIENT,
}


def check_refused(build: Callable[[], Any], method: str, message: tuple[str, str], **changes: Any) -> None:
    """Refused in one line that says what was found and what to do, and nothing is left behind.

    Args:
        build: makes the pipeline.
        method: the row.
        message: what was found, and what to do.
        changes: further fields of the violation.
    """
    cause = ".*".join(map(re.escape, message))
    violation = Violation("broken", 0, build, cause=cause, refused_by=(method,), **{"call": loop_call, **changes})
    assert problem(violation, method, run(violation, method)) is None
