# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Recording a rollout of an unmodified pipeline.

The pipeline is cut at two places only: at the transformer's calls and at `scheduler.step`. A transformer call runs
without gradients and hands its outputs on as leaves; `scheduler.step` hands the next latents on as a leaf. What the
pipeline itself computes between leaf and leaf (doubling, casts, guidance, packing) stays an autograd graph, the
*glue*, so that gradients can later go through the pipeline's own code (docs/life_of_a_gradient.md).

`Recorder` puts hooks on and takes them off and knows which calls belong to the rollout; `Rollout` cuts. What is
refused is decided in `accounting` and `checks`, which are told of every event.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import checks, kinds, modular, steps
from .accounting import Accounting
from .caches import fills
from .hooks import Patches
from .introspection import begin_index, calling_pipeline, guidance_scales, is_velocity_model, keyword_arguments
from .kept_inputs import KeptInputs
from .marks import TrainedUses
from .methods import Method
from .placed import as_they_are
from .plan import Plan
from .stand_ins import StandIns
from .state import fingerprint, name_of, parameters_of, trained_parameters, without_cudnn_attention
from .surrogate import Surrogate
from .trajectory import ActiveStep, Call, Trajectory
from .values import is_list_of_samples, layout


class Recorder:
    """Hooks of one `record()` block. Use it as a context manager; all hooks come off when it closes.

    Args:
        pipe: a diffusers pipeline with a `scheduler` and transformers.
        method: what to draw a surrogate from, or the surrogate itself.
        generator: CPU generator of the surrogate.
        noise_generator: generator of DRaFT-LV's re-noising, or a list with one for each sample.
        on_stage: called with "rollout" and "decode" when that stage begins.

    Attributes:
        trajectories: of the rollouts that were recorded.

    Raises:
        RecordingError: for a pipeline that cannot be recorded.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method | Surrogate,
        generator: torch.Generator | None,
        noise_generator: torch.Generator | list[torch.Generator] | None,
        on_stage: Callable[[str], None],
    ) -> None:
        self.pipe, self.name = pipe, type(pipe).__name__
        self.method, self.generator, self.noise_generator = method, generator, noise_generator
        self.on_stage = on_stage
        self.trajectories: list[Trajectory] = []
        checks.check_pipeline(pipe)
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.scheduler = pipe.components.get("scheduler")
        self.transformers = [part for name, part in modules.items() if is_velocity_model(name)]
        self.others = {name: part for name, part in modules.items() if not is_velocity_model(name)}
        checks.check_components(self.name, pipe.components, self.transformers)
        checks.check_offloading(
            self.name, pipe, {name: part for name, part in modules.items() if is_velocity_model(name) or name == "vae"}
        )
        checks.check_inference_weights(self.name, self.transformers)
        checks.check_cache(self.name, self.transformers)
        checks.check_dropout(self.name, self.transformers)
        checks.check_adapters(self.name, self.transformers)
        checks.check_other_components(self.name, self.others)
        self._patches = Patches()
        self._rollout: Rollout | None = None
        self.stand_ins = StandIns()

    def __enter__(self) -> "Recorder":
        patched = {type(self.pipe): "__call__", type(self.scheduler): "step"}
        checks.check_overlap(self.name, {**patched, **{type(each): "__call__" for each in self.transformers}})
        try:
            self._patches.replace(type(self.pipe), "__call__", self._pipeline_call)
            self._patches.replace(type(self.scheduler), "step", self._scheduler_step)
            self._patches.replace(type(self.scheduler), "set_timesteps", self._scheduler_set_timesteps)
            for transformer_class in {type(transformer) for transformer in self.transformers}:
                # Hooks of users, of diffusers and of FSDP2 act inside `__call__`, so they lie inside the cut.
                self._patches.replace(transformer_class, "__call__", self._transformer_call)
            if isinstance(self.pipe, ModularPipeline):
                for block_class in modular.block_classes(self.pipe):
                    self._patches.replace(block_class, "__call__", functools.partial(modular.call_block, self.pipe))
        except BaseException:
            self._patches.undo()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.undo()
        if hasattr(type(self.pipe), "interrupt"):
            self.pipe._interrupt = False

    # The pipeline's call.

    def _pipeline_call(self, original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if pipe is not self.pipe or self._rollout is not None:
            return original(pipe, *args, **kwargs)
        # A call that does not fit the signature raises what it always raises.
        call = inspect.signature(original).bind(pipe, *args, **kwargs)
        holders = [call.arguments, *keyword_arguments(call)]
        for arguments in holders:
            checks.check_user_tensors(self.name, arguments)
        untrained = [parameter for each in self.others.values() for parameter in parameters_of(each)]
        uses = TrainedUses(self.trained, untrained, functools.partial(name_of, self.transformers))
        rollout = Rollout(self, Accounting(self.name, self.transformers, self.others, uses))
        for arguments in holders:
            steps.wrap_callback(arguments, rollout.step_callback)
        grad_enabled, put_back = torch.is_grad_enabled(), as_they_are(self.transformers)
        self._rollout = rollout
        try:
            with uses, without_cudnn_attention():
                returned = original(*call.args, **call.kwargs)
            if rollout.is_finished:
                rollout.accounting.returned(modular.returned_values(returned), rollout.trajectory.endpoint)
            else:
                rollout.accounting.settle()
        except BaseException as error:
            put_back()
            if isinstance(error, Exception):
                # What is known by now may explain the error, which is then its context.
                rollout.accounting.settle()
            raise
        finally:
            self._rollout = None
            # The pipeline's own no_grad restores this too; an undecorated call does not.
            torch.set_grad_enabled(grad_enabled)
        return returned

    # Dispatch on the instance: the classes' other objects are left alone.

    def _transformer_call(
        self, original: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        if not any(module is each for each in self.transformers) or not self._is_own_call():
            return self._others_call(module, functools.partial(original, module, *args, **kwargs))
        with self._rollout.accounting.uses.suspended():
            return self._rollout.transformer_call(module, functools.partial(original, module), args, kwargs)

    def _scheduler_step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is not self.scheduler or not self._is_own_call() or self._rollout.is_in_callback:
            return original(scheduler, *args, **kwargs)
        with self._rollout.accounting.uses.suspended():
            return self._rollout.scheduler_step(functools.partial(original, scheduler), args, kwargs)

    def _scheduler_set_timesteps(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.scheduler and self._is_own_call() and not self._rollout.is_in_callback:
            # Refused if another loop follows: some pipelines set their schedule again after the last one.
            self._rollout.is_rescheduled = self._rollout.has_begun
        return original(scheduler, *args, **kwargs)

    def _is_own_call(self) -> bool:
        """Whether the recorded call of the pipeline runs, and not another pipeline's inside of it."""
        return self._rollout is not None and calling_pipeline() in (None, self.pipe)

    def _others_call(self, module: torch.nn.Module, call: Callable[[], Any]) -> Any:
        """A call of a transformer, of this or of another pipeline, that is not recorded."""
        if self._rollout is None or not any(module is each for each in self.transformers):
            return call()
        with self._rollout.accounting.uses.suspended():
            returned = call()
        self._rollout.note_unrecorded(returned)
        return returned

    # What rollouts of a block share.

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters of the transformers that require a gradient."""
        return [parameter for each in self.transformers for parameter in trained_parameters(each)]

    def begin(self) -> tuple[Trajectory, Plan]:
        """The trajectory of the rollout that begins, and its plan; draws the surrogate for the first one."""
        checks.check_inference_mode(self.name)
        checks.check_has_sigmas(self.name, self.scheduler)
        first = begin_index(self.pipe, self.scheduler)
        sigmas = self.scheduler.sigmas[first:].detach().clone()
        on_host = sigmas.cpu()
        if self.trajectories:
            surrogate = self.trajectories[0].surrogate
            checks.check_number_of_calls(self.name, len(self.trajectories), surrogate.num_noised)
        else:
            try:
                surrogate = self._draw(on_host)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        fingerprints = {module: fingerprint(module) for module in self.transformers}
        sampled = self.trajectories[0].sampled if self.trajectories else None
        trajectory = Trajectory(sigmas, surrogate, fingerprints, sampled=sampled)
        plan = Plan.of(surrogate, on_host, is_copy=bool(self.trajectories), first=first)
        self.trajectories.append(trajectory)
        self.on_stage("rollout")
        return trajectory, plan

    def _draw(self, sigmas: torch.Tensor) -> Surrogate:
        if isinstance(self.method, Surrogate):
            self.method.check(len(sigmas) - 1)
            return self.method
        first, *_, last = sigmas.tolist()
        if first < last:
            # Schedulers with inverted sigmas count from 0, noise, to 1: velocities have the other sign.
            return self.method.draw(1 - sigmas, self.generator).negated()
        return self.method.draw(sigmas, self.generator)

    def renoised(self, plan: Plan) -> torch.Tensor:
        """DRaFT-LV's input of the last step: `(1 - sigma) x_N + sigma noise` at the last step's sigma."""
        sample = self.trajectories[0].latents[plan.last + 1]
        generator = self.noise_generator
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(
                f"{self.name}: expected one noise generator or a list with one for each of {len(sample)} samples, got "
                f"{len(generator)}."
            )
        noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
        # As a tensor, so that 1 - sigma is rounded as the scheduler rounds its own.
        sigmas = self.trajectories[0].sigmas
        sigma = (sigmas[plan.last] - sigmas[-1]).abs().to(sample.device)
        wide = torch.promote_types(sample.dtype, torch.float32)
        return ((1 - sigma) * sample.to(wide) + sigma * noise.to(wide)).to(sample.dtype)


class Rollout:
    """Cuts one call of the pipeline.

    Attributes:
        recorder: of the block.
        accounting: told of what happens.
        trajectory: what is kept; `None` before the first transformer call.
        is_finished: whether the last step that is needed was made.
        is_in_callback: whether a step callback of the user's runs, in which nothing is recorded.
        is_rescheduled: whether the schedule was set again after the first transformer call.
    """

    def __init__(self, recorder: Recorder, accounting: Accounting) -> None:
        self.recorder = recorder
        self.accounting = accounting
        self.trajectory: Trajectory | None = None
        self.is_finished = False
        self.is_in_callback = False
        self.is_rescheduled = False
        self._step = 0
        # With those that an earlier end leaves out.
        self._num_made = 0
        self._calls: list[Call] = []
        self._outputs: list[torch.Tensor] = []
        # The leaf of this step's latents, and the copy of it that the pipeline was given, with its version.
        self._latents: torch.Tensor | None = None
        self._handed: tuple[torch.Tensor, int] | None = None
        self._inputs = KeptInputs(accounting.caches)

    @property
    def has_begun(self) -> bool:
        """Whether a transformer was called."""
        return self.trajectory is not None

    def step_callback(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the user's step callback outside of the recording."""
        uses = self.accounting.uses
        self.is_in_callback = uses.in_callback = True
        try:
            returned = callback(*args, **kwargs)
        finally:
            self.is_in_callback = uses.in_callback = False
        latents = returned.get("latents") if isinstance(returned, dict) else None
        is_untouched = latents is None or self._is_untouched(latents)
        if not self.is_finished or is_untouched:
            # Arrays for a preview; the latents went on as they were, or are compared at the next step.
            uses.has_left_torch = False
        return returned

    # The transformer's calls.

    def transformer_call(
        self, module: torch.nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a call without gradients and hand its outputs on as leaves."""
        leaves, spec = tree_flatten((args, kwargs))
        checks.check_one_loop(self.recorder.name, self.is_rescheduled and not self.is_in_callback)
        if self.is_in_callback or (self.is_finished and self._made_all_steps):
            # As if nothing were recorded; where the result goes on towards the loss, it is found by its mark.
            with torch.no_grad():
                returned = original(*args, **kwargs)
            return self._marked(returned)
        if not self.has_begun:
            self.trajectory, self.plan = self.recorder.begin()
            # From here on the pipeline's code between the leaves is recorded as glue.
            torch.set_grad_enabled(True)
            self.accounting.uses.is_in_loop = True
        if self.is_finished or self.plan.skips(self._step):
            return self._marked(self.recorder.stand_ins.answer(leaves))
        is_active = self._step in self.plan.active
        own = self._outputs if self._latents is None else [*self._outputs, self._latents]
        place = self.accounting.call_begins(self._step, module, leaves, kwargs, own)
        is_kept = is_active or fills(kwargs)
        # Copies are taken before the call, which may write into its inputs.
        attached, inputs = self._inputs.keep(leaves, self._sources()) if is_kept else ({}, [])
        made = functools.partial(original, *args, **kwargs)
        alike = (place, spec, layout(args, kwargs, leaves))
        returned, state, kind = kinds.compute(self.recorder.name, self._step, module, alike, is_kept, made)
        result, outputs = cut(returned)
        call = Call(module, spec, inputs, attached, outputs, is_list_of_samples(returned, outputs), state, kind)
        self.accounting.call_made(self._step, call if fills(kwargs) else None, leaves, returned)
        if is_active:
            self._calls.append(call)
        self._outputs += outputs
        if not self.plan.is_copy:
            self.recorder.stand_ins.learn(leaves, returned)
        return result

    @property
    def _made_all_steps(self) -> bool:
        return self._step >= self.plan.num_steps - 1

    def _marked(self, returned: Any) -> Any:
        result, _ = cut(returned, checks.UNRECORDED)
        self.note_unrecorded(result)
        return result

    def note_unrecorded(self, result: Any) -> None:
        """Mark what a call returned that is not recorded."""
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.accounting.uses.note(tensors, checks.UNRECORDED)

    def _sources(self) -> list[torch.Tensor]:
        """Leaves to which a gradient of this step's inputs goes on."""
        is_coupled = self._step in self.plan.coupled and self._latents is not None
        return [*self._outputs, self._latents] if is_coupled else self._outputs

    # The scheduler's steps.

    def scheduler_step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a step without gradients and hand the next latents on as a leaf."""
        values = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        velocity, sample = values["model_output"], values["sample"]
        name = self.recorder.name
        checks.check_loop_has_begun(name, self.has_begun)
        checks.check_one_loop(name, self.is_rescheduled)
        checks.check_number_of_steps(name, self._num_made, self.plan.num_steps)
        self._num_made += 1
        if self.is_finished:
            return steps.returned(self.trajectory.endpoint.clone(), values)
        if self._latents is not None:
            self.trajectory.sampled = self.accounting.handed_on(
                self._step,
                (sample, self._latents),
                self._is_untouched(sample),
                self._outputs,
                self.trajectory.sampled,
            )
        # Skipped steps too: schedulers count their steps, and not all find their place by the timestep.
        following, lengths = steps.made(original, args, kwargs)
        checks.check_place(name, self.plan.first + self._step, self.recorder.scheduler)
        if lengths is not None:
            velocity = self.accounting.signed(self._step, self.plan, self.recorder.scheduler, velocity, lengths)
        given = self.accounting.given
        if self.plan.skips(self._step):
            following = self.recorder.renoised(self.plan) if self._step == self.plan.last - 1 else sample.detach()
            following = following if given is None else sample.detach().where(given, following)
        else:
            tensors = (sample, velocity, following)
            self.accounting.step_made(
                self._step, self.plan, self.recorder.scheduler, tensors, self._outputs, self._latents
            )
            self._keep_step(velocity, sample)
        return steps.returned(self._hand_on(following), values)

    def _is_untouched(self, latents: torch.Tensor) -> bool:
        """Whether these are the latents that the scheduler handed on, and nobody has written into them."""
        if self._handed is None or latents is not self._handed[0] or latents._version != self._handed[1]:
            return False
        # A hook that the user's callback placed acts on the gradient only.
        return not latents._backward_hooks

    def _keep_step(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        trajectory, plan, step = self.trajectory, self.plan, self._step
        if step in plan.latents:
            trajectory.latents[step] = sample.detach().clone()
        if step in plan.velocities:
            # A copy in the glue: a pipeline that later writes into this tensor changes its place in the graph.
            with torch.enable_grad():
                velocity = velocity.clone()
            trajectory.velocities[step] = velocity.detach()
        if step in plan.active:
            latents = self._latents if step in plan.coupled else None
            scales = guidance_scales(self.recorder.pipe)
            trajectory.steps[step] = ActiveStep(step, latents, velocity, self._calls, scales)
        if step == plan.posterior_step:
            # Made as the scheduler makes its steps, so that the posterior mean has the latents' dtype.
            wide = torch.promote_types(torch.promote_types(sample.dtype, velocity.dtype), torch.float32)
            mean = sample.detach().to(wide) + (plan.sigmas[-1] - plan.sigmas[step]) * velocity.detach().to(wide)
            trajectory.endpoint = mean.to(sample.dtype).requires_grad_()

    def _hand_on(self, following: torch.Tensor) -> torch.Tensor:
        """The next latents, or the endpoint, as a leaf's copy; the next step begins."""
        trajectory, plan, given = self.trajectory, self.plan, self.accounting.given
        if self._step == plan.last:
            if self._step + 1 in plan.latents:
                trajectory.latents[self._step + 1] = following
            if trajectory.endpoint is None:
                trajectory.endpoint = following.clone().requires_grad_()
            leaf = trajectory.endpoint
            self.is_finished = True
            self._calls, self._outputs, self._latents, self._inputs = [], [], None, None
            self.accounting.settle()
            if not self._made_all_steps and hasattr(type(self.recorder.pipe), "interrupt"):
                # A source that is written after every step has no noise only after the last one.
                sampled = trajectory.sampled
                if sampled is not None and (not sampled.ndim or bool(sampled.all())):
                    self.recorder.pipe._interrupt = True
            self.recorder.on_stage("decode")
        else:
            leaf = following.requires_grad_()
            leaf.origin, leaf.given = checks.LATENTS, given
            self._calls, self._outputs, self._latents = [], [], leaf
            self._step += 1
            self.accounting.step_ends()
        # A copy, because pipelines may write into their latents. Attached wherever the step is made.
        with torch.enable_grad():
            # What is given depends on nothing that is trained.
            handed = leaf.clone() if given is None else leaf.detach().where(given, leaf)
        self._handed = (handed, handed._version)
        return handed


def cut(returned: Any, origin: str = checks.OUTPUT) -> tuple[Any, list[torch.Tensor]]:
    """What a transformer returned with copies of leaves in place of its floating point tensors, and these leaves."""
    results, spec = tree_flatten(returned)
    outputs = []
    for index, value in enumerate(results):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaf = value.detach().requires_grad_()
            leaf.origin = origin
            outputs.append(leaf)
            # A copy, because pipelines may write into what they are given. Attached wherever the call is made.
            with torch.enable_grad():
                results[index] = leaf.clone()
    return tree_unflatten(results, spec), outputs
