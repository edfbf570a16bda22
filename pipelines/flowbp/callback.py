# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`FlowBPCallback`: record an unmodified pipeline, then send the gradient of a reward back to its transformer.

One update, through the modules that it uses (docs/life_of_a_gradient.md tells it in full):

    record      `recording` cuts the pipeline's call, told what to keep by `plan`; `accounting` and `checks` refuse
    score       `scoring`, `objectives` and `decode`: from images to the loss's gradient at the endpoint
    sweep       `guidance` says which samples get a gradient, `replay` calls the transformer again, `sweep` adds it up
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .decode import decoding_in_chunks
from .guidance import kept_samples
from .host import widened
from .methods import Method
from .objectives import Objective, connector_gaps, sample_weights
from .observers import GradientNorms, VelocityAnchor
from .recording import Recorder
from .replay import Replay
from .scoring import Reward, check_images, prompts_of_images, score
from .state import is_sharded, trained_parameters, without_autocast, without_cudnn_attention
from .surrogate import Surrogate
from .sweep import sweep
from .trajectory import Trajectory


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
class BackwardOutput(SweepOutput):
    """What one `backward` computed, all detached.

    Attributes:
        rewards: `(B,)`; with DRaFT-LV's n copies `((n + 1) * B,)`, the sample's first.
        loss: scalar, without `gradient_scale` and without the anchor: the gradient is that of `loss + anchor`.
        weights: sample weights, like `rewards`.
        gaps: `{step: (B,)}` connector gaps at the ends of the surrogate's legs; N is the gap d_0.
    """

    rewards: torch.Tensor
    loss: torch.Tensor
    weights: torch.Tensor
    gaps: dict[int, torch.Tensor]


class FlowBPCallback:
    """Records pipeline calls and sends gradients back along a surrogate path.

    Args:
        method: row of the table from `get_method`, or a `Surrogate` of your own.
        generator: CPU generator that draws the surrogate; `None` uses torch's global one.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance; `None` takes the
            method's default (a `Surrogate`: no).
        samples_per_decode: decode, and with a reward function score, this many samples at a time; `None` for all at
            once. Memory against speed, the gradient stays the same.
        noise_generator: generator of the noise of DRaFT-LV's copies, or a list with one for each sample, from which
            all of that sample's noise comes; `None` uses torch's global one.
        strict: call every recorded transformer call of every active step again as a whole before the sweep, and refuse
            what does not reproduce the recording. Without it only what the sweep computes is compared.
        on_stage: called with "rollout", "decode", "reward" and "sweep" when that stage begins, to measure them.
        velocity_anchor: beta >= 0 of a penalty `beta * |v - v_base|^2` that keeps the active steps' velocities near
            those of the transformer without its adapters: for each replayed call the mean over its output's elements
            (the kept samples' only), summed over calls and copies. It acts on the transformer's outputs, not on the
            guided velocity; `v_base` costs one more forward pass; couplings carry the penalty's gradient too.
        measure_gradients: report the norm of the gradient that each active step adds to the trainable parameters, the
            anchor's part included, in this process and before processes exchange gradients. Takes memory for one more
            copy of the gradients, of whole ones also where parameters are sharded (FSDP2).

    Raises:
        ValueError: for options outside their range.

    Call the pipeline inside `record`. To pass the callback to the pipeline as well is optional; it then checks that
    the pipeline is the recorded one:

        callback = FlowBPCallback(get_method("flowbp-lagrange"), generator=generator)
        with callback.record(pipe):
            images = pipe(prompts, output_type="pt", callback_on_step_end=callback).images
        out = callback.backward(reward, images, prompts)

    Velocities, images and rewards that are not finite raise no error: they give a loss or gradients that are not
    finite, after the same passes as otherwise, so that a script can skip the update on all of its processes together.
    """

    # Pipelines read this of callbacks that are objects of their own class.
    tensor_inputs = ["latents"]

    def __init__(
        self,
        method: Method | Surrogate,
        generator: torch.Generator | None = None,
        unconditional_gradient: bool | None = None,
        samples_per_decode: int | None = None,
        noise_generator: torch.Generator | list[torch.Generator] | None = None,
        strict: bool = False,
        on_stage: Callable[[str], None] | None = None,
        velocity_anchor: float = 0.0,
        measure_gradients: bool = False,
    ) -> None:
        if not isinstance(method, Method | Surrogate):
            raise ValueError(f"`method` must come from get_method() or be a Surrogate, got {type(method).__name__}.")
        if samples_per_decode is not None and samples_per_decode < 1:
            raise ValueError(f"`samples_per_decode` must be at least 1 or None, got {samples_per_decode}.")
        if not 0 <= velocity_anchor < math.inf:
            raise ValueError(f"`velocity_anchor` must be a number of at least 0, got {velocity_anchor}.")
        if unconditional_gradient is None:
            unconditional_gradient = isinstance(method, Method) and method.unconditional_gradient
        self.method = method
        self.generator = generator
        self.unconditional_gradient = unconditional_gradient
        self.samples_per_decode = samples_per_decode
        self.noise_generator = noise_generator
        self.strict = strict
        self.velocity_anchor = velocity_anchor
        self.measure_gradients = measure_gradients
        self.on_stage = on_stage if on_stage is not None else lambda stage: None
        self._recorder: Recorder | None = None
        self._is_recording = False
        self._is_done = False

    @property
    def copies(self) -> int:
        """How many more calls of the pipeline the `record` block needs, with the same arguments (DRaFT-LV)."""
        if isinstance(self.method, Surrogate):
            return self.method.num_noised
        return self.method.options.get("num_noised", 0)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The rollout, and after it DRaFT-LV's copies.

        Raises:
            RecordingError: if nothing was recorded, or a rollout did not reach its endpoint.
        """
        recorded = tuple(self._recorder.trajectories) if self._recorder is not None else ()
        checks.check_complete("" if self._recorder is None else self._recorder.name, recorded, 1 + self.copies)
        return recorded

    @property
    def trajectory(self) -> Trajectory:
        """The recorded rollout: latents, velocities, sigmas, and calls and glue of the active steps."""
        return self.trajectories[0]

    @property
    def surrogate(self) -> Surrogate:
        """The surrogate that was drawn for the recorded rollout."""
        return self.trajectories[0].surrogate

    @property
    def endpoint(self) -> torch.Tensor:
        """`(B, ...)` leaf that the pipeline decoded, in the shape and dtype of its loop's latents."""
        return self.trajectories[0].endpoint

    @contextmanager
    def record(self, pipe: Any) -> Iterator["FlowBPCallback"]:
        """Record the pipeline calls of this block. The hooks come off when it closes, whatever happens.

        Args:
            pipe: a diffusers pipeline that samples with a flow-matching Euler scheduler. `output_type` must be `"pt"`
                or `"latent"`.

        Raises:
            RecordingError: for what is not accounted for, here or during the call.
        """
        checks.check_not_nested(self._is_recording)
        self._recorder = Recorder(pipe, self.method, self.generator, self.noise_generator, self.on_stage)
        vae = pipe.components.get("vae")
        self._is_recording, self._is_done = True, False
        try:
            with self._recorder, decoding_in_chunks(vae, self.samples_per_decode, recomputes_all=self.copies > 0):
                yield self
        except BaseException as error:
            self._recorder = None
            checks.check_not_numpy(type(pipe).__name__, error)
            raise
        finally:
            self._is_recording = False

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end`: checks that the pipeline is the recorded one and changes nothing."""
        checks.check_recorded_pipeline(pipe, self._recorder.pipe if self._is_recording else None)
        return callback_kwargs

    def backward(
        self,
        reward: torch.Tensor | Reward,
        images: torch.Tensor | None = None,
        prompts: Sequence[str] | None = None,
        *,
        objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        gradient_scale: float = 1.0,
        transformer: torch.nn.Module | None = None,
    ) -> BackwardOutput:
        """Add the gradient of the objective to `.grad` of the transformer's trainable parameters.

        Args:
            reward: `(B,)` rewards of the recorded images, differentiable; or a function of `(images, prompts)` that
                returns them, which is then called on `samples_per_decode` images at a time. It must score each image
                on its own.
            images: `(B, 3, H, W)` what the pipeline returned, with a reward function only. DRaFT-LV's copies follow
                the samples along the first dimension, here and in `reward`.
            prompts: one for each image, or one for each `B / len(prompts)` images in a row.
            objective: `f(rewards, weights) -> scalar`; default `Objective()`, the mean of `-weights * rewards`.
            gradient_scale: factor on the gradients only (1 / accumulation steps, a loss scaler's scale).
            transformer: transformer that processes share: DDP's wrapper, to call in place of the recorded one, or the
                recorded one itself under FSDP2. They exchange gradients with the last pass only.

        Raises:
            ValueError: for rewards, images or prompts of the wrong length or shape, or a velocity anchor without LoRA.
            RecordingError: where the images are not connected to the rollout, a replay differs, or for a second call.
        """
        trajectories = self.trajectories
        checks.check_once(self._recorder.name, self._is_done)
        gaps = connector_gaps(self.surrogate, self.trajectory.latents, self.trajectory.velocities)
        num_images = len(self.endpoint) * len(trajectories)
        of_images = None
        if callable(reward):
            checks.check_scoring_arguments(True, images, prompts)
            check_images(images, num_images)
            prompts = prompts_of_images(prompts, num_images, len(self.endpoint))
            size = self.samples_per_decode
            check = functools.partial(self._check_rewards, checks.name_of_reward(reward))
            rewards, of_images = score(reward, images, prompts, size, gradient_scale, check, self.on_stage)
            rewards.requires_grad_()
        else:
            checks.check_scoring_arguments(False, images, prompts)
            rewards = reward
            self._check_rewards("backward(rewards)", rewards, num_images)
        weights = sample_weights(self.surrogate, gaps)
        weights = torch.ones_like(rewards) if weights is None else weights.to(rewards).repeat(len(trajectories))
        with torch.enable_grad():
            loss = (Objective() if objective is None else objective)(rewards, weights.detach())
            checks.check_loss_roots(self._recorder.name, "rewards and objective", [loss], self._trained())
        adjoints = self._endpoint_gradients(loss, rewards, images, of_images, gradient_scale)
        self._is_done = True
        swept = self.sweep(adjoints, gradient_scale=gradient_scale, is_scaled=True, transformer=transformer)
        return BackwardOutput(
            swept.anchor, swept.gradient_norms, rewards.detach(), loss.detach(), weights.detach(), gaps
        )

    def sweep(
        self,
        adjoint: torch.Tensor | Sequence[torch.Tensor],
        *,
        gradient_scale: float = 1.0,
        is_scaled: bool = False,
        transformer: torch.nn.Module | None = None,
    ) -> SweepOutput:
        """The second half of `backward`: from the loss's gradient at the endpoint to the parameters.

        Args:
            adjoint: `(B, ...)` like `callback.endpoint`; with DRaFT-LV one for each of `callback.trajectories`.
            gradient_scale: factor on the gradients.
            is_scaled: whether `adjoint` has that factor already.
            transformer: see `backward`.

        Raises:
            ValueError: for an adjoint of another shape, a transformer without trainable parameters, or a velocity
                anchor where switching adapters off leaves something trained.
            RecordingError: where a replay is not what was recorded, or the unconditional branch cannot be found.
        """
        trajectories, name = self.trajectories, self._recorder.name
        adjoints = [adjoint] if isinstance(adjoint, torch.Tensor) else list(adjoint)
        checks.check_adjoints(adjoints, [trajectory.endpoint for trajectory in trajectories])
        self.on_stage("sweep")
        transformers = self._recorder.transformers
        checks.check_trainable(name, transformers)
        checks.check_accumulates(name, transformers)
        steps = [step for trajectory in trajectories for step in trajectory.steps.values()]
        replay = Replay(name, self._wrapped(transformer))
        checks.check_one_wrapper(name, {call.module for step in steps for call in step.calls}, replay.modules)
        checks.check_states(name, steps, trajectories[0].fingerprints)
        kept = kept_samples(name, steps, self.unconditional_gradient)
        beta = self.velocity_anchor
        anchor = VelocityAnchor(name, beta, gradient_scale, transformers) if beta else None
        norms = GradientNorms(transformers, gradient_scale) if self.measure_gradients else None
        if self.strict:
            for step in steps:
                for call in step.calls:
                    replay.check_whole(step.number, call)
        scaled = [widened(each) * (1 if is_scaled else gradient_scale) for each in adjoints]
        fresh = [parameter for parameter in self._trained() if parameter.grad is None]
        try:
            with without_autocast(adjoints[0].device.type), without_cudnn_attention():
                sweep(trajectories, scaled, kept, replay, anchor, norms)
        except BaseException:
            # A part of a gradient is worse than none.
            for parameter in fresh:
                parameter.grad = None
            raise
        value = adjoints[0].new_zeros(()) if anchor is None else anchor.value
        return SweepOutput(value, {} if norms is None else norms.found)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for module in self._recorder.transformers for parameter in trained_parameters(module)]

    def _check_rewards(self, reward: str, rewards: Any, count: int) -> None:
        name = self._recorder.name
        checks.check_rewards(name, reward, rewards, count)
        checks.check_loss_roots(name, f"the rewards of {reward}", [rewards], self._trained())

    def _wrapped(self, transformer: torch.nn.Module | None) -> Mapping[torch.nn.Module, torch.nn.Module]:
        """What to call in place of the trained transformer, where processes share it."""
        trained = [module for module in self._recorder.transformers if trained_parameters(module)]
        is_wrapped = transformer is not None and (transformer is not trained[0] or is_sharded(transformer))
        return {trained[0]: transformer} if is_wrapped else {}

    def _endpoint_gradients(
        self,
        loss: torch.Tensor,
        rewards: torch.Tensor,
        images: torch.Tensor | None,
        of_images: torch.Tensor | None,
        gradient_scale: float,
    ) -> list[torch.Tensor]:
        self.on_stage("decode")
        endpoints = [trajectory.endpoint for trajectory in self.trajectories]
        with torch.enable_grad(), without_autocast(endpoints[0].device.type):
            if of_images is None:
                gradients = torch.autograd.grad(loss * gradient_scale, endpoints, allow_unused=True)
            else:
                (of_rewards,) = torch.autograd.grad(loss, rewards)
                shape = (-1, *[1] * (images.ndim - 1))
                cotangent = (of_images * of_rewards.to(of_images).view(shape)).to(images.dtype)
                gradients = torch.autograd.grad(images, endpoints, cotangent, allow_unused=True)
        checks.check_endpoint_reached(self._recorder.name, gradients)
        return list(gradients)
