# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Recording a rollout of an unmodified pipeline.

The pipeline is cut at two places only: at the transformer's calls and at `scheduler.step`. A transformer call runs
without gradients and hands its outputs on as leaves; `scheduler.step` hands the next latents on as a leaf. What the
pipeline itself computes between leaf and leaf (doubling, casts, guidance, packing) stays an autograd graph, the
*glue*, so that gradients can later go through the pipeline's own code (README.md, "How it works").

What cannot be proven to fit this picture is refused with a `RecordingError`. Values that are not finite prove nothing
and are no reason to refuse: such a rollout gives gradients that are not finite, so that a training script can skip the
update on all of its processes together.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .methods import Method, Surrogate

# Largest relative difference (maximum norm) between a recorded output and its replay where rows are dropped, steps are
# joined or another kernel may run. A tiny SD3 at B against 2B differs by 1e-15, 6e-7 and 8e-3 (float64, float32,
# bf16).
REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_PLAIN_ARGUMENTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class RecordingError(RuntimeError):
    """The pipeline does something that cannot be proven to give the right gradient; the message says what."""


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
            then have one for each sample too. Otherwise the samples are the rows of `outputs[0]`.
        versions: version counters of the trainable parameters at the call.
        switches: the diffusers hooks and attention processors inside the transformer at the call; some guidance
            exchanges them around one call.
    """

    module: torch.nn.Module
    spec: TreeSpec
    leaves: list[Any]
    attached: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]
    is_list: bool
    versions: list[int]
    switches: list[str]

    @property
    def size(self) -> int:
        """How many samples the call has, those of all branches of guidance together."""
        return len(self.outputs) if self.is_list else len(self.outputs[0])


@dataclass(eq=False)
class ActiveStep:
    """What the sweep needs of one step: its calls and the glue around them.

    Attributes:
        latents: `(B, ...)` leaf that the scheduler handed to this step, `None` for a rollout's first step.
        velocity: `(B, ...)` what the scheduler was given, in the glue.
        calls: in the pipeline's order.
    """

    latents: torch.Tensor | None
    velocity: torch.Tensor
    calls: list[Call]


@dataclass(eq=False)
class Trajectory:
    """A recorded rollout. Only what the surrogate needs is kept.

    Attributes:
        sigmas: `(N + 1,)`, the scheduler's; falling to 0, or rising to 1 where it inverts them.
        surrogate: what was drawn for it.
        latents: `{step: (B, ...)}` detached; `latents[N]` is the sample.
        velocities: `{step: (B, ...)}` detached.
        steps: `{step: ActiveStep}` of the surrogate's terms.
        endpoint: `(B, ...)` leaf requiring a gradient, in the shape and dtype of the loop's latents.
    """

    sigmas: torch.Tensor
    surrogate: Surrogate
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    velocities: dict[int, torch.Tensor] = field(default_factory=dict)
    steps: dict[int, ActiveStep] = field(default_factory=dict)
    endpoint: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1


def is_velocity_model(component: str) -> bool:
    """Whether a pipeline's component of this name computes velocities: a transformer, in few pipelines a UNet."""
    return "transformer" in component or component == "unet"


def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same shape and, wherever both are finite, the same values."""
    if left.shape != right.shape:
        return False
    return torch.equal(left, right) or bool(((left == right) | ~left.isfinite() | ~right.isfinite()).all())


def reaches(tensors: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], if_not_finite: bool = True) -> bool:
    """Whether any of `tensors` depends, through autograd, on any of `leaves`.

    A gradient that is not finite leaves it open whether its true value is 0; `if_not_finite` is then the answer.
    """
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not tensors or not leaves:
        return False
    # Random cotangents, so that nothing cancels: where latents are overwritten in place, the graph keeps a path to the
    # old ones along which every gradient is exactly zero.
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in tensors]
    found = torch.autograd.grad(tensors, leaves, cotangents, allow_unused=True, retain_graph=True)
    found = [gradient for gradient in found if gradient is not None]
    if not if_not_finite:
        found = [gradient[gradient.isfinite()] for gradient in found]
    return any(bool(gradient.count_nonzero()) for gradient in found)


class Recorder:
    """Hooks of one `record()` block. Use it as a context manager; all hooks come off when it closes.

    Args:
        pipe: a diffusers pipeline with a `scheduler` and transformers.
        method: what to draw a surrogate from, or the surrogate itself.
        generator: CPU generator of the surrogate.
        noise_generator: generator of DRaFT-LV's re-noising, or a list with one for each sample.
        samples_per_decode: the VAE decodes this many samples at a time; `None` for all.
        on_stage: called with "rollout" and "decode" when that stage begins.

    Raises:
        RecordingError: for a pipeline without scheduler or transformer, or under model CPU offload.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method | Surrogate,
        generator: torch.Generator | None,
        noise_generator: torch.Generator | list[torch.Generator] | None,
        samples_per_decode: int | None,
        on_stage: Callable[[str], None],
    ) -> None:
        self.pipe = pipe
        self.name = type(pipe).__name__
        self.method = method
        self.generator = generator
        self.noise_generator = noise_generator
        self.samples_per_decode = samples_per_decode
        self.on_stage = on_stage
        self.scheduler = pipe.components.get("scheduler")
        self.transformers = [
            module
            for name, module in pipe.components.items()
            if is_velocity_model(name) and isinstance(module, torch.nn.Module)
        ]
        if self.scheduler is None or not self.transformers:
            raise RecordingError(
                f"{self.name}: expected a scheduler and a component named transformer or unet, got "
                f"{', '.join(sorted(pipe.components))}; use a flow-matching pipeline."
            )
        if getattr(pipe, "_all_hooks", None):
            raise RecordingError(
                f"{self.name}: model CPU offload frees the VAE while its gradient is still needed; call "
                "pipe.remove_all_hooks() and keep the pipeline loaded."
            )
        for name, module in pipe.components.items():
            if (is_velocity_model(name) or name == "vae") and isinstance(module, torch.nn.Module):
                if any("group_offloading" in switch for switch in switches(module)):
                    raise RecordingError(
                        f"{self.name}: group offloading of {name} takes weights away that its backward pass needs; "
                        "use it on the text encoders only, and quantise the transformer where memory is short."
                    )
        if any(parameter.is_meta for transformer in self.transformers for parameter in transformer.parameters()):
            raise RecordingError(
                f"{self.name}: sequential CPU offload replaces the transformer's parameters at every call, so their "
                "gradients would be lost; call pipe.remove_all_hooks() and keep the transformer loaded."
            )
        if any(getattr(transformer, "is_cache_enabled", False) for transformer in self.transformers):
            raise RecordingError(
                f"{self.name}: the transformer's cache is on, so a step reuses what another one computed; call "
                "pipe.transformer.disable_cache()."
            )
        for module in (module for transformer in self.transformers for module in transformer.modules()):
            # Small rates could hide in the tolerance of a replay, so this is not left to the comparison.
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
                raise RecordingError(
                    f"{self.name}: the transformer has dropout {module.p:g} switched on, expected none: a replay "
                    "would draw another mask; call pipe.transformer.eval()."
                )
        self.trajectories: list[Trajectory] = []
        self._stand_ins: dict[tuple[int, int], Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._begin_rollout()

    # Hooks on and off.

    def __enter__(self) -> "Recorder":
        self._grad_enabled = torch.is_grad_enabled()
        try:
            scheduler_class = type(self.scheduler)
            self._patch(type(self.pipe), "__call__", self._pipeline_call)
            self._patch(scheduler_class, "step", self._scheduler_step)
            self._patch(scheduler_class, "set_timesteps", self._scheduler_set_timesteps)
            for transformer in self.transformers:
                if hasattr(transformer, "set_requires_gradient_sync"):
                    # FSDP2 acts in hooks around forward. The cut is outside of them, or the hooks of its backward pass
                    # would be in the glue and exchange gradients whenever that is differentiated.
                    self._patch(type(transformer), "__call__", functools.partial(self._sharded_call, transformer))
                else:
                    self._patch(transformer, "forward", functools.partial(self._transformer_call, transformer))
            vae = self.pipe.components.get("vae")
            if self.samples_per_decode is not None and vae is not None:
                self._patch(vae, "decode", self._decode)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        while self._undo:
            self._undo.pop()()
        if hasattr(type(self.pipe), "interrupt"):
            self.pipe._interrupt = False
        # The pipeline's own no_grad restores this too; an undecorated call does not.
        torch.set_grad_enabled(self._grad_enabled)

    def _patch(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        own = name in vars(owner)

        # Pipelines read the signatures of scheduler methods, so the wrapper carries the original's.
        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        def undo() -> None:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        setattr(owner, name, hooked)
        self._undo.append(undo)

    # A rollout's state.

    def _begin_rollout(self) -> None:
        self._trajectory: Trajectory | None = None
        self._step = 0
        self._calls: list[Call] = []
        # Each call's arguments of this step and the one before, with the version that counts in-place changes.
        self._inputs: list[list[tuple[Any, int]]] = []
        self._previous_inputs: list[list[tuple[Any, int]]] = []
        self._leaves: list[torch.Tensor] = []
        self._previous_leaves: list[torch.Tensor] = []
        self._latents: torch.Tensor | None = None
        self._kept: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._endpoint: torch.Tensor | None = None
        self._finished = False
        self._trailing_calls = 0

    def _pipeline_call(self, original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if pipe is not self.pipe:
            return original(pipe, *args, **kwargs)
        self._begin_rollout()
        returned = original(pipe, *args, **kwargs)
        if self._finished and self._trailing_calls:
            # It got an earlier call's output in place of its own.
            raise RecordingError(
                f"{self.name}: the transformer was called after the last scheduler step, expected nothing but the "
                "decoder there; switch that pass (a refiner) off."
            )
        tensors = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, torch.Tensor)]
        if self._finished and tensors and not any(tensor.requires_grad for tensor in tensors):
            raise RecordingError(
                f"{self.name}: what the pipeline returned carries no gradient (decoded or post-processed through "
                'numpy, detach or no_grad), expected differentiable pictures; call it with output_type="pt", or '
                '"latent" and decode yourself.'
            )
        return returned

    def _scheduler_set_timesteps(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.scheduler and self._trajectory is not None:
            raise RecordingError(
                f"{self.name}: a second sampling loop began within one call of the pipeline, expected one rollout; "
                "ask for what the pipeline samples in one loop (such as a shorter video)."
            )
        return original(scheduler, *args, **kwargs)

    def _start(self) -> None:
        """Make the rollout's trajectory and draw its surrogate, at the first transformer call."""
        if self._trajectory is not None:
            return
        if torch.is_inference_mode_enabled():
            raise RecordingError(f"{self.name}: the pipeline runs in inference mode; call it without it.")
        sigmas = self.scheduler.sigmas.detach().clone()
        if self.trajectories:
            surrogate = self.trajectories[0].surrogate
            if len(self.trajectories) > surrogate.num_noised:
                raise RecordingError(
                    f"{self.name}: expected {1 + surrogate.num_noised} pipeline call(s) in one record() block, got "
                    "one more; open a new block for each rollout."
                )
        else:
            try:
                surrogate = self._draw(sigmas)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        self._trajectory = Trajectory(sigmas, surrogate)
        self.on_stage("rollout")
        self._is_copy = bool(self.trajectories)
        self._last = surrogate.last_step(len(sigmas) - 1)
        self._active = {term.step for term in surrogate.terms}
        self._coupled = {term.step for term in surrogate.terms[1:] if term.coupling}
        supports = {step for leg in surrogate.legs for step in (leg.start, *leg.supports)}
        self._needed_velocities = self._active | supports
        self._needed_latents = self._active | {step for leg in surrogate.legs for step in (leg.start, leg.end)}
        self.trajectories.append(self._trajectory)
        # From here on the pipeline's code between the leaves is recorded as glue.
        torch.set_grad_enabled(True)

    def _draw(self, sigmas: torch.Tensor) -> Surrogate:
        if isinstance(self.method, Surrogate):
            self.method.check(len(sigmas) - 1)
            return self.method
        if sigmas[0] < sigmas[-1]:
            # Schedulers with inverted sigmas count from 0, noise, to 1: velocities have the other sign.
            return self.method.draw(1 - sigmas, self.generator).negated()
        return self.method.draw(sigmas, self.generator)

    @property
    def _skips(self) -> bool:
        """Whether this step of a copy only leads to the step that DRaFT-LV repeats."""
        return self._is_copy and self._step < self._last

    # The transformer's calls.

    def _sharded_call(
        self,
        sharded: torch.nn.Module,
        original: Callable[..., Any],
        module: torch.nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if module is not sharded:
            return original(module, *args, **kwargs)
        return self._transformer_call(module, functools.partial(original, module), *args, **kwargs)

    def _transformer_call(
        self, module: torch.nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._start()
        self._trailing_calls += 1
        if self._finished or self._skips:
            # Nothing that follows is used: earlier outputs of that batch stand in, and the pipeline's code runs on.
            layout = _layout(tree_flatten((args, kwargs))[0])
            return self._stand_ins.get(layout, next(reversed(self._stand_ins.values())))
        leaves, spec = tree_flatten((args, kwargs))
        self._check_inputs(leaves)
        self._check_lora_scale(module, kwargs)
        with torch.no_grad():
            returned = original(*args, **kwargs)
        results, result_spec = tree_flatten(returned)
        outputs = []
        for index, value in enumerate(results):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                leaf = value.detach().requires_grad_()
                outputs.append(leaf)
                # A copy, because pipelines may write into what they are given.
                results[index] = leaf.clone()
        self._inputs.append([(leaf, _version(leaf)) for leaf in leaves])
        if self._step in self._active:
            self._calls.append(self._keep_call(module, spec, leaves, outputs, _is_list(returned, outputs)))
        self._leaves.extend(outputs)
        result = tree_unflatten(results, result_spec)
        if not self._is_copy:
            self._stand_ins[_layout(leaves)] = _detached(result)
        return result

    def _keep_call(
        self,
        module: torch.nn.Module,
        spec: TreeSpec,
        leaves: list[Any],
        outputs: list[torch.Tensor],
        is_list: bool,
    ) -> Call:
        attached = {}
        sources = list(self._leaves)
        if self._step in self._coupled and self._latents is not None:
            sources.append(self._latents)
        kept = list(leaves)
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if reaches([leaf], sources):
                # A copy in the glue: a pipeline that later writes into this tensor changes its place in the graph.
                attached[index] = leaf.clone()
                kept[index] = attached[index].detach()
            else:
                kept[index] = self._keep(leaf)
        versions = [parameter._version for parameter in module.parameters() if parameter.requires_grad]
        return Call(module, spec, kept, attached, outputs, is_list, versions, switches(module))

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A detached copy; one for all steps where the pipeline passes the same, unchanged tensor again."""
        known = self._kept.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == tensor._version:
            return known[2]
        copy = tensor.detach().clone()
        if not tensor.requires_grad:
            self._kept[id(tensor)] = (tensor, tensor._version, copy)
        return copy

    def _check_inputs(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if _holds_state(leaf):
                raise RecordingError(
                    f"{self.name}: step {self._step} passes a {type(leaf).__name__} to the transformer, expected "
                    "tensors and plain values: state kept between steps cannot be replayed; switch its cache off."
                )
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if reaches(tensors, self._previous_leaves, if_not_finite=False):
            raise RecordingError(
                f"{self.name}: the transformer's inputs at step {self._step} depend on outputs of earlier steps other "
                "than through the latents; such state is not supported."
            )
        if len(self._inputs) >= len(self._previous_inputs):
            return
        before = self._previous_inputs[len(self._inputs)]
        if len(before) != len(leaves):
            return
        for index, (leaf, (earlier, version)) in enumerate(zip(leaves, before, strict=True)):
            if not isinstance(leaf, torch.Tensor) or not isinstance(earlier, torch.Tensor):
                continue
            if leaf is earlier:
                is_same = _version(leaf) == version
            else:
                is_same = agree(leaf, earlier)
            drifts = leaf.is_floating_point() and not leaf.requires_grad and not is_same
            if drifts and not _is_timestep(leaf):
                raise RecordingError(
                    f"{self.name}: transformer input {index} of shape {tuple(leaf.shape)} changed from step "
                    f"{self._step - 1} to step {self._step}, and neither the latents nor a timestep explain it; its "
                    "gradient would be lost, so this pipeline is not supported."
                )

    def _check_lora_scale(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        scales = [value["scale"] for value in kwargs.values() if isinstance(value, dict) and "scale" in value]
        if getattr(module, "is_gradient_checkpointing", False) and any(scale != 1 for scale in scales):
            raise RecordingError(
                f"{self.name}: a LoRA scale of {scales[0]} is set for the forward pass only, so gradient "
                "checkpointing would recompute its blocks with scale 1; switch checkpointing off, or use "
                "set_adapters weights."
            )

    # The scheduler's steps.

    def _scheduler_step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is not self.scheduler:
            return original(scheduler, *args, **kwargs)
        values = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        velocity, sample = values["model_output"], values["sample"]
        as_tuple = values.get("return_dict", True) is False
        self._trailing_calls = 0
        if self._finished:
            return (self._endpoint,) if as_tuple else _scheduler_output(self._endpoint)
        trajectory, step = self._trajectory, self._step
        if trajectory is None:
            raise RecordingError(
                f"{self.name}: scheduler.step was called before any transformer ran; expected a sampling loop of "
                "transformer call and scheduler step."
            )
        self._check_sample(sample)
        # Skipped steps too: schedulers count their steps, and not all find their place by the timestep.
        with torch.no_grad():
            result = original(scheduler, *_detached(args), **_detached(kwargs))
        self._check_place(scheduler)
        if self._skips:
            following = self._renoised() if step == self._last - 1 else sample.detach()
        else:
            following = (result[0] if isinstance(result, tuple) else result.prev_sample).detach()
            self._check_euler(following, sample, velocity)
            self._keep_step(velocity, sample)
        return self._hand_on(following, as_tuple)

    def _keep_step(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        trajectory, step = self._trajectory, self._step
        if step in self._needed_latents:
            trajectory.latents[step] = sample.detach().clone()
        if step in self._needed_velocities:
            trajectory.velocities[step] = velocity.detach()
        if step in self._active:
            outputs = [output for call in self._calls for output in call.outputs]
            # Where a pipeline clamps outputs that are not finite, their gradients are 0.
            is_open = velocity.requires_grad and not all(bool(output.isfinite().all()) for output in outputs)
            if not is_open and not reaches([velocity], outputs):
                raise RecordingError(
                    f"{self.name}: the velocity of step {step} is not connected to the transformer's outputs by "
                    "autograd (through numpy, detach or no_grad); such a pipeline cannot be trained through."
                )
            if reaches([velocity], self._previous_leaves, if_not_finite=False):
                raise RecordingError(
                    f"{self.name}: the velocity of step {step} depends on outputs of earlier steps (guidance with "
                    "memory); switch that guidance off."
                )
            attached = [tensor for call in self._calls for tensor in call.attached.values()]
            if _uses_parameters([velocity, *attached], self.transformers):
                raise RecordingError(
                    f"{self.name}: the velocity of step {step} uses parameters of the transformer outside of its "
                    "forward pass, so their gradient would be lost; such a pipeline is not supported."
                )
            trajectory.steps[step] = ActiveStep(
                self._latents if step in self._coupled else None, velocity, self._calls
            )
        endpoint = trajectory.surrogate.endpoint
        if endpoint != "sample" and endpoint[1] == step:
            # Made as the scheduler makes its steps, so that the posterior mean has the latents' dtype.
            wide = _widest(sample, velocity)
            leap = (trajectory.sigmas[-1] - trajectory.sigmas[step]).to(sample.device)
            mean = sample.detach().to(wide) + leap * velocity.detach().to(wide)
            self._endpoint = mean.to(sample.dtype).requires_grad_()

    def _hand_on(self, following: torch.Tensor, as_tuple: bool) -> Any:
        """Give the pipeline the next latents, or the endpoint, as a leaf, and move on to the next step."""
        trajectory = self._trajectory
        if self._step == self._last:
            if self._step + 1 in self._needed_latents or trajectory.surrogate.endpoint == "sample":
                trajectory.latents[self._step + 1] = following
            if self._endpoint is None:
                self._endpoint = following.clone().requires_grad_()
            trajectory.endpoint = self._endpoint
            self._finished = True
            self.on_stage("decode")
            self._forget_glue()
            if hasattr(type(self.pipe), "interrupt"):
                self.pipe._interrupt = True
            leaf = self._endpoint
        else:
            leaf = following.requires_grad_()
            self._previous_leaves += [*self._leaves, *([self._latents] if self._latents is not None else [])]
            self._previous_inputs = self._inputs
            self._latents, self._leaves, self._inputs, self._calls = leaf, [], [], []
            self._step += 1
        # A copy, because pipelines may write into their latents.
        handed = leaf.clone()
        return (handed,) if as_tuple else _scheduler_output(handed)

    def _forget_glue(self) -> None:
        self._leaves, self._previous_leaves, self._inputs, self._previous_inputs = [], [], [], []
        self._calls, self._kept, self._latents = [], {}, None

    def _renoised(self) -> torch.Tensor:
        """DRaFT-LV's input of the last step: `(1 - sigma) x_N + sigma noise` at the last step's sigma."""
        from diffusers.utils.torch_utils import randn_tensor

        sample = self.trajectories[0].latents[self._last + 1]
        generator = self.noise_generator
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(
                f"{self.name}: expected one noise generator or a list with one for each of {len(sample)} samples, got "
                f"{len(generator)}."
            )
        noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
        sigmas = self._trajectory.sigmas
        sigma = (sigmas[self._last] - sigmas[-1]).abs().to(sample.device)
        wide = _widest(sample, noise)
        return ((1 - sigma) * sample.to(wide) + sigma * noise.to(wide)).to(sample.dtype)

    # Refusals.

    def _check_sample(self, sample: torch.Tensor) -> None:
        if self._latents is None:
            return
        if not agree(sample.detach(), self._latents.detach()):
            raise RecordingError(
                f"{self.name}: the latents given to step {self._step} are not those that step {self._step - 1} "
                "returned; a callback or the pipeline altered them. Record without such a callback."
            )

    def _check_place(self, scheduler: Any) -> None:
        # Evenly spaced sigmas hide a rollout that starts later: its steps have the expected length all the same.
        following = getattr(scheduler, "step_index", None)
        if following is not None and following != self._step + 1:
            raise RecordingError(
                f"{self.name}: the scheduler made step {following - 1} of its sigmas, expected step {self._step}: the "
                "rollout must begin at the first sigma and make one Euler step for each; use a text-to-image pipeline "
                "or strength 1."
            )

    def _check_euler(self, following: torch.Tensor, sample: torch.Tensor, velocity: torch.Tensor) -> None:
        sigmas, step = self._trajectory.sigmas, self._step
        if step + 1 >= len(sigmas):
            raise RecordingError(
                f"{self.name}: the scheduler made more than the {len(sigmas) - 1} steps of its sigmas; expected one "
                "Euler step for each, use FlowMatchEulerDiscreteScheduler."
            )
        length = (sigmas[step + 1].double() - sigmas[step].double()).to(sample.device)
        # The scheduler computes in float32, but rounds the product to the velocity's dtype, the sum to the latents'.
        move = length * velocity.detach().double()
        expected = sample.detach().double() + move
        is_finite = expected.isfinite() & following.isfinite()
        expected, move = expected.where(is_finite, 0), move.where(is_finite, 0)
        rounding = torch.finfo(following.dtype).eps * expected.abs() + torch.finfo(velocity.dtype).eps * move.abs()
        rounding = rounding + 4 * torch.finfo(torch.float32).eps * max(expected.abs().amax(), move.abs().amax())
        excess = (following.double().where(is_finite, 0) - expected).abs() - rounding
        if not bool((excess <= 0).all()):
            raise RecordingError(
                f"{self.name}: step {step} of {type(self.scheduler).__name__} is not latents + (sigmas[i + 1] - "
                f"sigmas[i]) * velocity: it differs by {excess.amax():.2e} more than rounding explains; use "
                "FlowMatchEulerDiscreteScheduler without stochastic sampling."
            )

    # Decoding.

    def _decode(self, original: Callable[..., Any], latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Copies keep their pictures side by side, so there even a part that fits is recomputed in the backward pass.
        fits = len(latents) <= self.samples_per_decode and self._trajectory.surrogate.num_noised == 0
        if fits or not latents.requires_grad:
            return original(latents, *args, **kwargs)
        parts = [
            tree_flatten(checkpoint(original, part, *args, use_reentrant=False, **kwargs))
            for part in latents.split(self.samples_per_decode)
        ]
        joined = [torch.cat(tensors) for tensors in zip(*(leaves for leaves, _ in parts), strict=True)]
        return tree_unflatten(joined, parts[0][1])


def switches(module: torch.nn.Module) -> list[str]:
    """Names of the diffusers hooks (skipped layers, offloading, ...) and attention processors inside a model."""
    found = []
    for name, part in module.named_modules():
        if hasattr(part, "_diffusers_hook"):
            found += [f"{name}.{hook}" for hook in part._diffusers_hook.hooks]
        if hasattr(part, "processor"):
            found.append(f"{name}.{type(part.processor).__name__}")
    return found


def _holds_state(value: Any) -> bool:
    """Whether an argument may keep tensors from call to call. An empty cache object does not."""
    if isinstance(value, (torch.Tensor, *_PLAIN_ARGUMENTS)):
        return False
    pending, seen = [value], set()
    while pending:
        part = pending.pop()
        if isinstance(part, _PLAIN_ARGUMENTS) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping):
            pending += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            pending += part
        elif callable(part) or isinstance(part, torch.Tensor) or not hasattr(part, "__dict__"):
            return True
        else:
            pending += vars(part).values()
    return False


def _uses_parameters(tensors: Sequence[torch.Tensor], modules: Sequence[torch.nn.Module]) -> bool:
    """Whether the autograd graph of `tensors` ends in a parameter of `modules`."""
    parameters = {id(parameter) for module in modules for parameter in module.parameters()}
    pending, seen = [tensor.grad_fn for tensor in tensors], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        pending += [following for following, _ in node.next_functions]
    return False


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _layout(leaves: list[Any]) -> tuple[int, int]:
    """What tells calls of other batches apart: how many arguments, and the first matrix' length."""
    return len(leaves), next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 1), 0)


def _is_list(result: Any, outputs: list[torch.Tensor]) -> bool:
    """Whether a transformer returned `(list of tensors, ...)`, one for each sample."""
    values = list(result.values()) if isinstance(result, dict) else result
    first = values[0] if isinstance(values, list | tuple) and values else None
    return isinstance(first, list | tuple) and len(first) == len(outputs)


def _is_timestep(tensor: torch.Tensor) -> bool:
    # One number for each sample, or the same number for every token (a second value marks tokens that are given).
    return tensor.ndim <= 1 or len(torch.unique(tensor)) <= 2


def _detached(values: Any) -> Any:
    leaves, spec = tree_flatten(values)
    return tree_unflatten([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)


def _widest(*tensors: torch.Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _scheduler_output(sample: torch.Tensor) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)
