# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`FlowBPCallback`: record an unmodified pipeline, then send the gradient of a reward back to its transformer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .methods import Method, Surrogate
from .objectives import Objective, connector_gaps, sample_weights, widened
from .recording import Recorder, RecordingError, Trajectory
from .sweep import Sweep, SweepOutput

Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class BackwardOutput:
    """What one `backward` computed, all detached.

    Attributes:
        rewards: `(B,)`; with DRaFT-LV's n copies `((n + 1) * B,)`, the sample's first.
        loss: scalar, without `gradient_scale`.
        weights: sample weights, like `rewards`.
        gaps: `{step: (B,)}` connector gaps at the ends of the surrogate's legs; N is the gap d_0.
        anchor: scalar, the velocity anchor with its factor beta and without `gradient_scale`, so that the gradient is
            that of `loss + anchor`; 0 without an anchor.
        gradient_norms: `{active step: scalar}`, see `measure_gradients`; empty without it.
    """

    rewards: torch.Tensor
    loss: torch.Tensor
    weights: torch.Tensor
    gaps: dict[int, torch.Tensor]
    anchor: torch.Tensor
    gradient_norms: dict[int, torch.Tensor]


class FlowBPCallback:
    """Records pipeline calls and sends gradients back along a surrogate path.

    Args:
        method: row of the table from `get_method`, or a `Surrogate` of your own.
        generator: CPU generator that draws the surrogate; `None` uses torch's global one.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance; `None` takes the
            method's default (a `Surrogate`: no).
        samples_per_decode: decode, and with a reward function score, this many samples at a time; `None` for all at
            once. Memory against speed, the gradient stays the same.
        steps_per_forward: evaluate up to this many active steps that share an adjoint in one forward pass. Memory
            against speed, the gradient stays the same.
        noise_generator: generator of the noise of DRaFT-LV's copies, or a list with one for each sample, from which
            all of that sample's noise comes; `None` uses torch's global one.
        strict: call every recorded transformer call of every active step again as a whole before its gradient is
            taken, and refuse what does not reproduce the recording: one more forward pass for each. Without it only
            what the sweep computes is compared.
        on_stage: called with "rollout", "decode", "reward" and "sweep" when that stage begins, to measure them.
        velocity_anchor: beta >= 0, factor of a penalty that keeps the active steps' velocities near those of the
            transformer with its LoRA adapters switched off, `beta * |v - v_base|^2`. For each transformer call that is
            evaluated again it is the mean over all elements of its output (over the conditional rows where the
            unconditional branch is not computed), and these add up over the active steps' calls, DRaFT-LV's copies
            included. It acts on the transformer's outputs, not on the guided velocity; `v_base` is a constant, found
            by one more forward pass of each call; couplings carry the penalty's gradient as they carry the reward's.
        measure_gradients: report the norm of the gradient that each active step adds to the trainable parameters, the
            anchor's part included, in this process and before processes exchange gradients; without `gradient_scale`.
            Steps that `steps_per_forward` evaluates together get the norm of their sum. Takes memory for one more copy
            of the gradients, of whole ones also where parameters are sharded (FSDP2).

    Raises:
        ValueError: for options outside their range.

    Use it in the pipeline call, inside `record`:

        callback = FlowBPCallback(get_method("flowbp-lagrange"), generator=generator)
        with callback.record(pipe):
            images = pipe(prompts, output_type="pt", callback_on_step_end=callback).images
        out = callback.backward(reward, images, prompts)

    Velocities, pictures and rewards that are not finite raise no error: they give a loss or gradients that are not
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
        steps_per_forward: int = 1,
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
        if steps_per_forward < 1:
            raise ValueError(f"`steps_per_forward` must be at least 1, got {steps_per_forward}.")
        if not 0 <= velocity_anchor < math.inf:
            raise ValueError(f"`velocity_anchor` must be a number of at least 0, got {velocity_anchor}.")
        self.method = method
        self.generator = generator
        if unconditional_gradient is None:
            unconditional_gradient = isinstance(method, Method) and method.unconditional_gradient
        self.unconditional_gradient = unconditional_gradient
        self.samples_per_decode = samples_per_decode
        self.steps_per_forward = steps_per_forward
        self.noise_generator = noise_generator
        self.strict = strict
        self.velocity_anchor = velocity_anchor
        self.measure_gradients = measure_gradients
        self.on_stage = on_stage if on_stage is not None else lambda stage: None
        self._recorder: Recorder | None = None
        self._is_recording = False

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
        if not recorded or any(trajectory.endpoint is None for trajectory in recorded):
            name = "" if self._recorder is None else f"{self._recorder.name}: "
            raise RecordingError(
                f"{name}Expected a complete rollout, got none; call the pipeline inside `with callback.record(pipe):` "
                "and let it make every step with its own scheduler."
            )
        if len(recorded) != 1 + self.copies:
            raise RecordingError(
                f"Expected {1 + self.copies} pipeline calls in the record() block (callback.copies is {self.copies}), "
                f"got {len(recorded)}."
            )
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
            RecordingError: for what cannot be proven to give the right gradient, here or during the call.
        """
        if self._is_recording:
            raise RecordingError("This callback is recording already; close the first record() block, or use another.")
        self._recorder = Recorder(
            pipe, self.method, self.generator, self.noise_generator, self.samples_per_decode, self.on_stage
        )
        self._is_recording = True
        try:
            with self._recorder:
                yield self
        except BaseException as error:
            self._recorder = None
            if isinstance(error, RuntimeError) and "numpy() on Tensor that requires grad" in str(error):
                raise RecordingError(
                    f"{type(pipe).__name__}: the pipeline turns tensors into numpy arrays, which carry no gradient; "
                    'call it with output_type="pt" (a pipeline that always does so cannot be trained through).'
                ) from error
            raise
        finally:
            self._is_recording = False

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end`: checks that the pipeline is the recorded one and changes nothing."""
        if not self._is_recording or pipe is not self._recorder.pipe:
            raise RecordingError(
                f"{type(pipe).__name__} called this callback outside of its record() block; call the pipeline inside "
                "`with callback.record(pipe):`."
            )
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

        Returns:
            Detached rewards, loss, weights, gaps, anchor and gradient norms.

        Raises:
            ValueError: for rewards, images or prompts of the wrong length or shape, or a velocity anchor without LoRA.
            RecordingError: where the images are not connected to the rollout, or a replay differs.
        """
        objective = Objective() if objective is None else objective
        gaps = connector_gaps(self.surrogate, self.trajectory.latents, self.trajectory.velocities)
        if callable(reward):
            if images is None or prompts is None:
                raise ValueError(
                    "A reward function needs the images and the prompts: backward(reward, images, prompts)."
                )
            rewards, image_gradients = self._score(reward, images, prompts, gradient_scale)
            rewards.requires_grad_()
        else:
            if images is not None or prompts is not None:
                raise ValueError("Rewards that are computed already need no images and prompts: backward(rewards).")
            rewards, image_gradients = reward, None
            self._check_rewards(rewards, len(self.endpoint) * len(self.trajectories))
        weights = self._weights(gaps, rewards)
        with torch.enable_grad():
            loss = objective(rewards, weights)
        adjoints = self._endpoint_gradients(loss, rewards, images, image_gradients, gradient_scale)
        swept = self.sweep(adjoints, gradient_scale=gradient_scale, is_scaled=True, transformer=transformer)
        return BackwardOutput(rewards.detach(), loss.detach(), weights, gaps, swept.anchor, swept.gradient_norms)

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

        Returns:
            The velocity anchor and the gradient norms.

        Raises:
            ValueError: for an adjoint of another shape, a transformer without trainable parameters, or a velocity
                anchor without LoRA.
        """
        if self._is_recording:
            raise RecordingError(
                "backward was called inside the record() block, where transformer calls are hooked; leave the block "
                "first."
            )
        adjoints = [adjoint] if isinstance(adjoint, torch.Tensor) else list(adjoint)
        trajectories = self.trajectories
        if [tuple(each.shape) for each in adjoints] != [tuple(each.endpoint.shape) for each in trajectories]:
            raise ValueError(
                f"`adjoint` must have the endpoint's shape {tuple(self.endpoint.shape)} for each of "
                f"{len(trajectories)} trajectories, got {[tuple(each.shape) for each in adjoints]}."
            )
        self.on_stage("sweep")
        recorder = self._recorder
        if not any(p.requires_grad for module in recorder.transformers for p in module.parameters()):
            raise ValueError(
                f"{recorder.name}: the transformer has no trainable parameters; add a LoRA adapter or set "
                "requires_grad."
            )
        # Training scripts wrap the one that they train.
        trained = [each for each in recorder.transformers if any(p.requires_grad for p in each.parameters())]
        is_wrapped = transformer is not trained[0] or hasattr(transformer, "set_requires_gradient_sync")
        modules: Mapping[torch.nn.Module, torch.nn.Module] = (
            {trained[0]: transformer} if transformer is not None and is_wrapped else {}
        )
        sweep = Sweep(
            recorder.name,
            self.unconditional_gradient,
            self.steps_per_forward,
            modules,
            self.strict,
            self.velocity_anchor,
            self.measure_gradients,
            gradient_scale,
        )
        return sweep.run(trajectories, [widened(each) * (1 if is_scaled else gradient_scale) for each in adjoints])

    # The endpoint stage: decode and reward.

    def _score(
        self, reward: Reward, images: torch.Tensor, prompts: Sequence[str], gradient_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards `(B,)` and `gradient_scale` times the gradient of each in its own image `(B, 3, H, W)`."""
        if isinstance(prompts, str):
            raise ValueError("`prompts` must be a list with a prompt for each image, got one string.")
        if not isinstance(images, torch.Tensor) or not images.requires_grad:
            raise RecordingError(
                f"The images are not connected to the recorded rollout, got {type(images).__name__}; call the "
                'pipeline with output_type="pt" inside record() and pass what it returned (post-processing through '
                "numpy cannot be trained through)."
            )
        of_sample = len(self.endpoint)
        if len(images) != of_sample * len(self.trajectories):
            raise ValueError(
                f"Expected all {of_sample * len(self.trajectories)} images of the record() block, got {len(images)}."
            )
        if len(prompts) != len(images):
            if len(prompts) == 0 or of_sample % len(prompts):
                raise ValueError(f"Expected a prompt for each of {len(images)} images, got {len(prompts)} prompts.")
            # Several images of a prompt stand together; copies score the same prompts again after all samples.
            prompts = [prompt for prompt in prompts for _ in range(of_sample // len(prompts))] * len(self.trajectories)
        size = self.samples_per_decode or len(images)
        rewards, gradients = [], []
        for start in range(0, len(images), size):
            part = images[start : start + size].detach().requires_grad_()
            if not bool(part.isfinite().all()):
                # Rewards refuse such pictures, and a judge would take them for bad ones.
                rewards.append(widened(part.new_full((len(part),), math.nan)))
                gradients.append(torch.full_like(part, math.nan))
                continue
            self.on_stage("reward")
            with torch.enable_grad():
                scored = reward(part, prompts[start : start + size])
            self._check_rewards(scored, len(part))
            # Each reward sees its own image only, so the sum's gradient is every reward's own.
            # It is scaled here and not later: float16 gradients of single pixels would be lost before.
            (gradient,) = torch.autograd.grad(scored.sum() * gradient_scale, part)
            rewards.append(scored.detach())
            gradients.append(gradient)
        return torch.cat(rewards), torch.cat(gradients)

    def _check_rewards(self, rewards: Any, count: int) -> None:
        if not isinstance(rewards, torch.Tensor) or rewards.shape != (count,):
            found = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
            raise ValueError(
                f"Expected one reward for each of {count} images, a tensor of shape ({count},), got {found}."
            )
        if not rewards.requires_grad:
            raise RecordingError(
                "The rewards carry no gradient; score the images that the recorded pipeline call returned "
                '(output_type="pt"), with gradients on.'
            )

    def _weights(self, gaps: Mapping[int, torch.Tensor], rewards: torch.Tensor) -> torch.Tensor:
        weights = sample_weights(self.surrogate, gaps)
        if weights is None:
            return torch.ones_like(rewards).detach()
        return weights.to(rewards).repeat(len(self.trajectories))

    def _endpoint_gradients(
        self,
        loss: torch.Tensor,
        rewards: torch.Tensor,
        images: torch.Tensor | None,
        image_gradients: torch.Tensor | None,
        gradient_scale: float,
    ) -> list[torch.Tensor]:
        self.on_stage("decode")
        endpoints = [trajectory.endpoint for trajectory in self.trajectories]
        if image_gradients is None:
            gradients = torch.autograd.grad(loss * gradient_scale, endpoints, allow_unused=True)
        else:
            (of_rewards,) = torch.autograd.grad(loss, rewards)
            shape = (-1, *[1] * (images.ndim - 1))
            cotangent = (image_gradients * of_rewards.to(image_gradients).view(shape)).to(images.dtype)
            gradients = torch.autograd.grad(images, endpoints, cotangent, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise RecordingError(
                f"{self._recorder.name}: the rewards do not depend on the recorded endpoint; score the images that "
                "the pipeline calls of this record() block returned, all of them."
            )
        return list(gradients)
