# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`FlowBPCallback`: record an unmodified pipeline, then send the gradient of a reward back to its transformer.

One update, through the modules that it uses (docs/life_of_a_gradient.md tells it in full):

    record      `recording` cuts the pipeline's call, told what to keep by `plan`; `accounting` and `checks` refuse
    score       `scoring`, `objectives` and `decode`: from images to the loss's gradient at the endpoint
    sweep       `guidance` says which samples get a gradient, `replay` calls the transformer again, `sweep` adds it up
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import checks
from .caches import with_fills
from .columns import Columns, Reward
from .decode import decoding_in_chunks
from .guidance import kept_samples
from .host import widened
from .methods import Method
from .objectives import Objective, connector_gaps, sample_weights
from .observers import GradientNorms, VelocityAnchor
from .outputs import BackwardOutput, SweepOutput
from .recording import Recorder
from .replay import Replay, wrapped
from .scoring import endpoint_gradients, score
from .state import without_autocast, without_cudnn_attention
from .surrogate import Surrogate
from .sweep import all_or_nothing, sweep
from .trajectory import Trajectory


class FlowBPCallback:
    """Records pipeline calls and sends gradients back along a surrogate path.

    Args:
        method: row of the table from `get_method`, or a `Surrogate` of your own.
        generator: CPU generator that draws the surrogate; `None` uses torch's global one.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance; `None` takes the
            method's default (a `Surrogate`: no).
        samples_per_decode: decode, and with a reward function score, this many samples at a time; `None` for all at
            once. Memory against speed, the gradient stays the same.
        noise_generator: of the noise of DRaFT-LV's copies, or a list with one for each sample; `None` uses torch's.
        strict: also repeat every recorded call of the active steps as a whole before the sweep, and compare it.
        on_stage: called with "rollout", "decode", "reward" and "sweep" when that stage begins, to measure them.
        velocity_anchor: beta >= 0 of a penalty `beta * |v - v_base|^2` that keeps the active steps' outputs near those
            of the transformer without its trained adapters: for each replayed call the mean over the elements of the
            samples that get a gradient, summed over calls and copies. Couplings carry its gradient too.
        measure_gradients: report the norm of the gradient that each active step adds in this process, the anchor's
            part included. Takes memory for one more copy of the gradients (whole ones also under FSDP2).

    Call the pipeline inside `record`. To pass the callback to the pipeline as well is optional; it then checks that
    the pipeline is the recorded one:

        callback = FlowBPCallback(get_method("flowbp-lagrange"), generator=generator)
        with callback.record(pipe):
            images = pipe(prompts, output_type="pt", callback_on_step_end=callback).images
        out = callback.backward(reward, images, prompts)

    What is not finite raises no error: it gives a loss or gradients that are not finite, after the same replays as
    otherwise, so that a script can skip the update on all of its processes together.
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
        checks.check_options(method, samples_per_decode, velocity_anchor)
        if unconditional_gradient is None:
            unconditional_gradient = isinstance(method, Method) and method.unconditional_gradient
        self.method, self.generator, self.noise_generator = method, generator, noise_generator
        self.unconditional_gradient = unconditional_gradient
        self.samples_per_decode, self.strict = samples_per_decode, strict
        self.velocity_anchor, self.measure_gradients = velocity_anchor, measure_gradients
        self.on_stage = on_stage if on_stage is not None else lambda stage: None
        self._recorder: Recorder | None = None
        self._is_recording = False
        self._is_done = False

    @property
    def copies(self) -> int:
        """How many more calls of the pipeline the `record` block needs, with the same arguments (DRaFT-LV)."""
        return self.method.num_noised

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The rollout, and after it DRaFT-LV's copies; RecordingError unless all are complete."""
        recorded = tuple(self._recorder.trajectories) if self._recorder is not None else ()
        checks.check_complete("" if self._recorder is None else self._recorder.name, recorded, 1 + self.copies)
        return recorded

    @property
    def trajectory(self) -> Trajectory:
        """The recorded rollout."""
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
            pipe: samples with a flow-matching Euler scheduler; call it with `output_type="pt"` or `"latent"`.

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
        columns: Columns | None = None,
        objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        gradient_scale: float = 1.0,
        transformer: torch.nn.Module | None = None,
    ) -> BackwardOutput:
        """Add the gradient of the objective to `.grad` of the transformer's trainable parameters.

        Args:
            reward: `(B,)` rewards of the recorded images, differentiable; or a function of
                `(images, prompts, **columns)` that scores each image on its own, which is then called on
                `samples_per_decode` images at a time.
            images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, for a reward function; one without
                `takes_videos = True` scores frames, and their mean counts. DRaFT-LV's copies follow
                the samples, also in `reward`.
            prompts: one for each image, or one for each `B / len(prompts)` images in a row.
            columns: what else is known of the prompts, name -> a value for each prompt. A reward function gets those
                that its signature has a parameter for, or all of them as `**columns`, as keyword arguments.
            objective: `f(rewards, weights) -> scalar`; default `Objective()`, the mean of `-weights * rewards`.
            gradient_scale: factor on the gradients only (1 / accumulation steps, a loss scaler's scale).
            transformer: that processes share: DDP's wrapper, or the recorded transformer itself under FSDP2. They
                exchange gradients with the last replay only.

        Raises:
            ValueError: for rewards, images, prompts or columns of the wrong length or shape, an objective that returns
                no differentiable scalar, and as `sweep`.
            RecordingError: where rewards and rollout are not connected, for a second call, and as `sweep`.
        """
        trajectories = self.trajectories
        first, name, trained = trajectories[0], self._recorder.name, self._recorder.trained
        checks.check_once(name, self._is_done)
        gaps = connector_gaps(self.surrogate, first.latents, first.velocities, first.sampled)
        endpoints = [trajectory.endpoint for trajectory in trajectories]
        num_images = sum(map(len, endpoints))
        checks.check_scoring_arguments(callable(reward), images, prompts, columns)
        if callable(reward):
            check = functools.partial(checks.check_rewards, name, checks.name_of_reward(reward), trained)
            size, of, columns = self.samples_per_decode, len(self.endpoint), columns or {}
            scored = score(
                reward, images, prompts, columns, num_images, of, size, gradient_scale, check, self.on_stage
            )
            rewards = scored.rewards
        else:
            scored, rewards = None, reward
            checks.check_rewards(name, "backward(rewards)", trained, rewards, num_images)
        weights = sample_weights(self.surrogate, gaps)
        weights = torch.ones_like(rewards) if weights is None else weights.to(rewards).repeat(len(trajectories))
        with torch.enable_grad():
            loss = (Objective() if objective is None else objective)(rewards, weights.detach())
        checks.check_loss(loss)
        checks.check_loss_roots(name, "rewards and objective", [loss], trained)
        self.on_stage("decode")
        adjoints = endpoint_gradients(endpoints, loss, gradient_scale, scored)
        checks.check_endpoint_reached(name, adjoints)
        self._is_done = True
        swept = self.sweep(adjoints, gradient_scale=gradient_scale, is_scaled=True, transformer=transformer)
        detached = rewards.detach(), loss.detach(), weights.detach()
        return BackwardOutput(*detached, gaps, swept.anchor, swept.gradient_norms)

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
            ValueError: for an adjoint of another shape, nothing to train, or an anchor that cannot be computed.
            RecordingError: where a replay is not what was recorded, or the unconditional branch cannot be found.
        """
        trajectories, name = self.trajectories, self._recorder.name
        adjoints = [adjoint] if isinstance(adjoint, torch.Tensor) else list(adjoint)
        checks.check_inference_mode(name)
        checks.check_adjoints(adjoints, [trajectory.endpoint for trajectory in trajectories])
        checks.check_sampled_places(name, trajectories, adjoints)
        self.on_stage("sweep")
        transformers, beta = self._recorder.transformers, self.velocity_anchor
        checks.check_trainable(name, transformers)
        checks.check_accumulates(name, transformers)
        steps = [step for each in trajectories for step in each.steps.values() if step.velocity.requires_grad]
        replay = Replay(name, wrapped(transformers, transformer))
        checks.check_one_wrapper(name, {call.module for step in steps for call in step.calls}, replay.modules)
        checks.check_states(name, with_fills(name, steps), trajectories[0].fingerprints)
        kept = kept_samples(name, steps, self.unconditional_gradient)
        anchor = VelocityAnchor(name, beta, gradient_scale, transformers) if beta else None
        norms = GradientNorms(transformers, gradient_scale) if self.measure_gradients else None
        scaled = [widened(each) * (1 if is_scaled else gradient_scale) for each in adjoints]
        device_type = adjoints[0].device.type
        with all_or_nothing(self._recorder.trained), without_autocast(device_type), without_cudnn_attention():
            if self.strict:
                replay.check_whole(steps)
            # Coupled terms added to them.
            swept = sweep(trajectories, scaled, kept, replay, anchor, norms)
            checks.check_sampled_places(name, trajectories, swept)
        value = scaled[0].new_zeros(()) + (0 if anchor is None else anchor.value)
        return SweepOutput(value, {} if norms is None else norms.found)
