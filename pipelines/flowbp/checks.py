# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What is refused: one function for each reason, with its message.

Every path along which a gradient could go from a trained tensor to the loss is a recorded call of an active step, cut
on purpose by the surrogate, or refused here by name (docs/life_of_a_gradient.md). `accounting.py` says when each
function is asked. Those that need numbers put a verdict on the device; `Verdicts` reads them together.

Arguments that most of them have: `name` is the pipeline's class, `step` the step's number, and `verdicts` where it is
noted if something is wrong.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_leaves, tree_unflatten

from .graph import leaves_of, passed_places, passes_gradient
from .hooks import is_patched
from .host import read, widened
from .marks import mark_of
from .methods import Method
from .state import (
    CallKind,
    ModelState,
    fingerprint,
    name_of,
    parameters_of,
    parts_of,
    trained_adapters,
    trained_parameters,
)
from .surrogate import Surrogate
from .trajectory import Call, Trajectory
from .values import agree, holds_state, takes_two_values

# What a leaf of the glue is, noted on it as `origin`.
OUTPUT, LATENTS = "outputs of earlier steps", "latents of earlier steps"
UNRECORDED = "a transformer call that is not recorded (in a step callback, or after the last scheduler step)"


class RecordingError(RuntimeError):
    """The pipeline does something whose gradient is not accounted for; the message says what."""


class Verdicts:
    """Flags on the device, each with the message of what it would mean; read together."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, Callable[[], str]]] = []

    def add(self, is_wrong: torch.Tensor, message: Callable[[], str]) -> None:
        """Keep a verdict: a scalar flag, and what to say if it is true."""
        self._pending.append((is_wrong, message))

    def read(self) -> None:
        """Raise RecordingError for the first verdict, in the order of the rollout, that is true."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        for (_, message), is_wrong in zip(pending, read([flag for flag, _ in pending]), strict=True):
            if is_wrong:
                raise RecordingError(message())


# The callback and the pipeline, before anything runs.


def check_options(method: Any, samples_per_decode: int | None, velocity_anchor: float) -> None:
    """Options of `FlowBPCallback` outside of their range."""
    if not isinstance(method, Method | Surrogate):
        raise ValueError(f"`method` must come from get_method() or be a Surrogate, got {type(method).__name__}.")
    if samples_per_decode is not None and samples_per_decode < 1:
        raise ValueError(f"`samples_per_decode` must be at least 1 or None, got {samples_per_decode}.")
    if not 0 <= velocity_anchor < math.inf:
        raise ValueError(f"`velocity_anchor` must be a number of at least 0, got {velocity_anchor}.")


def check_pipeline(pipe: Any) -> None:
    """Only pipelines of diffusers are recorded."""
    name = type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline | ModularPipeline):
        raise RecordingError(f"{name}: expected a DiffusionPipeline of diffusers, got {type(pipe).__module__}.{name}.")


def check_components(name: str, components: Mapping[str, Any], transformers: Sequence[torch.nn.Module]) -> None:
    """A scheduler and a transformer are what the cut needs."""
    if components.get("scheduler") is None or not transformers:
        raise RecordingError(
            f"{name}: expected a scheduler and a component named transformer or unet, got "
            f"{', '.join(sorted(components))}; use a flow-matching pipeline."
        )


def check_inference_weights(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """Weights made under inference mode can never have a gradient, nor take part in one."""
    if any(parameter.is_inference() for module in transformers for parameter in parameters_of(module)):
        raise RecordingError(
            f"{name}: the transformer's weights were made under torch.inference_mode(), so autograd cannot save them; "
            "load them outside of it."
        )


def check_offloading(name: str, pipe: Any, recorded: Mapping[str, torch.nn.Module]) -> None:
    """Weights must stay where their backward pass finds them.

    Args:
        pipe: the pipeline.
        recorded: its transformers, and its VAE if it has one, by component.
    """
    manager = getattr(pipe, "_components_manager", None)
    if getattr(manager, "_auto_offload_enabled", False):
        raise RecordingError(
            f"{name}: the components manager takes weights away that their backward pass needs; call "
            "disable_auto_cpu_offload() on it."
        )
    if getattr(pipe, "_all_hooks", None):
        raise RecordingError(
            f"{name}: model CPU offload frees the VAE while its gradient is still needed; call "
            "pipe.remove_all_hooks() and keep the pipeline loaded."
        )
    for component, module in recorded.items():
        hooks = (vars(part).get("_diffusers_hook") for part in parts_of(module))
        if any("group_offloading" in hook.hooks for hook in hooks if hook is not None):
            raise RecordingError(
                f"{name}: group offloading of {component} takes weights away that its backward pass needs; use it on "
                "the text encoders only, and quantise the transformer where memory is short."
            )
        if component != "vae" and any(parameter.is_meta for parameter in parameters_of(module)):
            raise RecordingError(
                f"{name}: sequential CPU offload replaces the transformer's parameters at every call, so their "
                "gradients would be lost; call pipe.remove_all_hooks() and keep the transformer loaded."
            )


def check_cache(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """diffusers' caches reuse what another step computed."""
    if any(getattr(transformer, "is_cache_enabled", False) for transformer in transformers):
        raise RecordingError(
            f"{name}: the transformer's cache is on, so a step reuses what another one computed; call "
            "pipe.transformer.disable_cache()."
        )


def check_dropout(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """A replay would draw another mask. `check_random` finds what this does not know by type, at the first call."""
    for module in (part for transformer in transformers for part in parts_of(transformer)):
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise RecordingError(
                f"{name}: the transformer has dropout {module.p:g} switched on, expected none: a replay would draw "
                "another mask; call pipe.transformer.eval()."
            )


def check_other_components(name: str, others: Mapping[str, torch.nn.Module]) -> None:
    """Only transformers are trained. A component whose parameters all require a gradient is at PyTorch's default."""
    for component, module in others.items():
        # Quantised weights are integers, which cannot require a gradient.
        parameters = [parameter for parameter in parameters_of(module) if parameter.is_floating_point()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has_adapter = any(isinstance(part, BaseTunerLayer) for part in parts_of(module))
        if trained and (has_adapter or len(trained) < len(parameters)):
            raise RecordingError(
                f"{name}: {component}.{name_of([module], trained[0])} requires a gradient and others do not, so it "
                f"seems meant for training, but only transformers are trained; call "
                f"pipe.{component}.requires_grad_(False)."
            )


def check_adapters(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """A trained adapter that is fused, disabled or not active would get no gradient."""
    for transformer in transformers:
        for part in parts_of(transformer):
            trained = trained_adapters(part) if isinstance(part, BaseTunerLayer) else []
            if not trained:
                continue
            idle = [adapter for adapter in trained if adapter not in part.active_adapters]
            if part.merged:
                raise RecordingError(
                    f"{name}: the adapter {part.merged_adapters[0]} is fused into the weights of "
                    f"{name_of([transformer], part)}, so the trained adapter {trained[0]} would get no gradient; call "
                    "pipe.unfuse_lora()."
                )
            if part.disable_adapters:
                raise RecordingError(
                    f"{name}: the trained adapter {trained[0]} is disabled ({name_of([transformer], part)}), so it "
                    "would get no gradient; call pipe.enable_lora()."
                )
            if idle:
                raise RecordingError(
                    f"{name}: the trained adapter {idle[0]} is not active ({name_of([transformer], part)}; active: "
                    f"{', '.join(part.active_adapters) or 'none'}), so it would get no gradient; call "
                    "pipe.transformer.set_adapters, or freeze it."
                )


def check_overlap(name: str, patched: Mapping[type, str]) -> None:
    """Two record blocks that patch one class at the same time would take each other's hooks off."""
    for owner, method in patched.items():
        if is_patched(owner, method):
            raise RecordingError(
                f"{name}: another record() block is open whose pipeline shares the class {owner.__name__}; close it "
                "before this one begins."
            )


def check_not_nested(is_recording: bool) -> None:
    """One block of a callback at a time."""
    if is_recording:
        raise RecordingError("This callback is recording already; close the first record() block, or use another.")


# The pipeline's call, as it begins.


def check_user_tensors(name: str, arguments: Mapping[str, Any]) -> None:
    """What the user passes gets no gradient, so it must not ask for one; and autograd must be able to save it."""
    for argument, value in arguments.items():
        for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)):
            if tensor.is_inference():
                raise RecordingError(
                    f"{name}: `{argument}` was made under torch.inference_mode(), so autograd cannot save it; make it "
                    "under torch.no_grad()."
                )
            if tensor.requires_grad:
                raise RecordingError(
                    f"{name}: `{argument}` requires a gradient, which would be lost: gradients go to the transformer "
                    f"only; pass {argument}.detach()."
                )


def check_number_of_calls(name: str, made: int, num_noised: int) -> None:
    """One rollout in each record block, and as many copies as the surrogate has."""
    if made > num_noised:
        raise RecordingError(
            f"{name}: expected {1 + num_noised} pipeline call(s) in one record() block, got one more; open a new "
            "block for each rollout."
        )


def check_inference_mode(name: str) -> None:
    """Tensors of inference mode can never have a gradient."""
    if torch.is_inference_mode_enabled():
        raise RecordingError(f"{name}: inference mode is on, in which nothing has a gradient; call this without it.")


def check_has_sigmas(name: str, scheduler: Any) -> None:
    """Weights of terms are made of sigmas."""
    if not isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        raise RecordingError(
            f"{name}: {type(scheduler).__name__} has no sigmas, expected those of a flow; use "
            "FlowMatchEulerDiscreteScheduler."
        )


def check_one_loop(name: str, is_rescheduled: bool) -> None:
    """A second sampling loop within one call would be another rollout."""
    if is_rescheduled:
        raise RecordingError(
            f"{name}: a second sampling loop began within one call of the pipeline, expected one rollout; ask for "
            "what the pipeline samples in one loop (such as a shorter video)."
        )


# The transformer's calls.


def check_arguments(name: str, step: int, leaves: Sequence[Any]) -> None:
    """State that an argument carries from step to step cannot be replayed."""
    for leaf in leaves:
        if holds_state(leaf):
            raise RecordingError(
                f"{name}: step {step} passes a {type(leaf).__name__} to the transformer, expected tensors and plain "
                "values: state kept between steps cannot be replayed; switch its cache off."
            )


def check_text_cache(name: str, step: int, caches: Sequence[str], problem: str | None) -> None:
    """A text cache is filled once, by the first step's calls, and read by the later ones.

    Args:
        caches: names of their classes.
        problem: in words, what is wrong with them; `None` for nothing.
    """
    if problem is not None:
        raise RecordingError(
            f"{name}: at step {step} a {caches[0] if caches else 'text cache'} {problem}, expected one that the first "
            "step's calls fill and later calls read, so a part of the gradient would be wrong; switch its cache off."
        )


def check_inference_tensors(name: str, step: int, leaves: Sequence[Any]) -> None:
    """Tensors made under inference mode cannot be saved for a backward pass."""
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_inference():
            raise RecordingError(
                f"{name}: transformer input {index} at step {step} was made under torch.inference_mode(), so autograd "
                "cannot save it; make it under torch.no_grad()."
            )


def check_lora_scale(name: str, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Gradient checkpointing recomputes blocks after the forward pass has reset the scale that it was given."""
    scales = [value["scale"] for value in kwargs.values() if isinstance(value, dict) and "scale" in value]
    # In this order: diffusers looks through the whole model for the answer.
    if any(scale != 1 for scale in scales) and getattr(module, "is_gradient_checkpointing", False):
        raise RecordingError(
            f"{name}: a LoRA scale of {scales[0]} is set for the forward pass only, so gradient checkpointing would "
            "recompute its blocks with scale 1; switch checkpointing off, or use set_adapters weights."
        )


def check_unmarked(name: str, what: str, tensors: Iterable[torch.Tensor]) -> None:
    """Nothing that a trained parameter went into outside of the recorded calls may go on towards the loss."""
    for tensor in tensors:
        if (origin := mark_of(tensor)) is not None:
            raise RecordingError(
                f"{name}: {what} depend on {origin}, so a part of the gradient would be lost; switch that pass (a "
                "refiner, a control network that shares parts) off, or freeze what it uses."
            )


def check_roots(
    name: str, what: str, tensors: Sequence[torch.Tensor], allowed: Callable[[torch.Tensor], bool], verdicts: Verdicts
) -> None:
    """The graph of the glue may end in the leaves of its own step only.

    Args:
        what: the tensors, in words (plural).
        tensors: whose graph is walked.
        allowed: whether a leaf is one of those that the sweep accounts for.
    """
    for leaf in leaves_of(tensors):
        if not allowed(leaf):
            message = f"{name}: {what} {_dependence(leaf)}."
            verdicts.add(_reaches(name, what, tensors, leaf), lambda message=message: message)


def _reaches(name: str, what: str, tensors: Sequence[torch.Tensor], leaf: torch.Tensor) -> torch.Tensor:
    try:
        return passes_gradient(tensors, leaf)
    except RuntimeError as error:
        raise RecordingError(
            f"{name}: autograd cannot differentiate {what}: a tensor that their gradient needs was written into in "
            "place; replace the part of the pipeline that does so."
        ) from error


def _dependence(leaf: torch.Tensor) -> str:
    origin = vars(leaf).get("origin")
    if origin == UNRECORDED:
        return f"depend on {origin}, so a part of the gradient would be lost; switch that pass (a refiner) off"
    if origin is not None:
        return (
            f"depend on {origin}, other than through the latents of this one (guidance with memory), so a part of "
            "the gradient would be lost; switch that guidance or callback off"
        )
    return f"depend on a tensor of shape {tuple(leaf.shape)} that requires a gradient, which would be lost; detach it"


def check_drift(name: str, step: int, index: int, now: torch.Tensor, before: Any, verdicts: Verdicts) -> None:
    """An input may change from step to step with the latents, with the timestep, or not at all.

    Args:
        index: of the input among the call's leaves.
        now: the input, without a graph.
        before: `(the input of the step before, whether it was changed in place since)`.
    """
    earlier, is_changed_in_place = before
    # One number for each sample is a timestep; so is the same number for every token.
    if now.ndim <= 1 or not now.is_floating_point() or (now is earlier and not is_changed_in_place):
        return
    if now is earlier:
        has_changed = torch.ones((), dtype=torch.bool, device=now.device)
    elif now.shape == earlier.shape and now.device == earlier.device:
        has_changed = ~agree(now, earlier)
    elif now.shape[1:] == earlier.shape[1:] and now.device == earlier.device and len(now) < len(earlier):
        # Guidance that ends in mid-rollout leaves some of the samples.
        has_changed = ~(agree(now, earlier[-len(now) :]) | agree(now, earlier[: len(now)]))
    else:
        # A smaller batch grows again, or the call is of another kind: nothing to compare with.
        return
    # The message must not keep the input alive until the verdicts are read.
    shape = tuple(now.shape)
    verdicts.add(
        has_changed & ~takes_two_values(now),
        lambda: (
            f"{name}: transformer input {index} of shape {shape} changed from step {step - 1} to step "
            f"{step}, and neither the latents nor a timestep explain it; its gradient would be lost, so this "
            "pipeline is not supported."
        ),
    )


def check_hooks(name: str, step: int, module: torch.nn.Module, hooks: Iterable[tuple[torch.nn.Module, Any]]) -> None:
    """Skipped layers are left out whole: a part of them, drawn at random, would be another one in a replay.

    Args:
        hooks: parts of the transformer, each with a hook of diffusers on it.
    """
    for part, hook in hooks:
        dropout = getattr(hook, "dropout", 1.0)
        if 0 < dropout < 1 and not math.isclose(dropout, 1.0):
            raise RecordingError(
                f"{name}: step {step}: a {type(hook).__name__} on {name_of([module], part)} drops {dropout:g} of its "
                "output at random, so a replay would drop another part; use dropout 1, which skips the layer whole."
            )


def check_random(
    name: str, step: int, module: torch.nn.Module, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> None:
    """A transformer that draws random numbers computes something else when it is called again."""
    if any(old.numpy().tobytes() != new.numpy().tobytes() for old, new in zip(before, after, strict=True)):
        raise RecordingError(_drawn(name, step, module, "draws random numbers"))


def check_draws(name: str, step: int, module: torch.nn.Module, function: str | None) -> None:
    """Draws from a generator of the model's own, or from a fork of the global one, leave no trace in its state."""
    if function is not None:
        raise RecordingError(_drawn(name, step, module, f"draws random numbers ({function})"))


def _drawn(name: str, step: int, module: torch.nn.Module, what: str) -> str:
    training = [path for path, part in module.named_modules() if part.training and path]
    where = f" (in training mode: {training[0]}, ...)" if training else ""
    return (
        f"{name}: the transformer {what} at step {step}{where}, so a replay would compute something else; switch "
        "dropout of every kind off with pipe.transformer.eval()."
    )


# The scheduler's steps.


def check_loop_has_begun(name: str, has_begun: bool) -> None:
    """A step without a transformer call has no velocity."""
    if not has_begun:
        raise RecordingError(
            f"{name}: scheduler.step was called before any transformer ran; expected a sampling loop of transformer "
            "call and scheduler step."
        )


def check_handed_on(
    name: str,
    step: int,
    sample: torch.Tensor,
    leaf: torch.Tensor,
    is_first: bool,
    dtypes: Sequence[torch.dtype],
    verdicts: Verdicts,
) -> torch.Tensor:
    """The latents of a step must be those that the step before returned, but where the pipeline writes its source.

    There no gradient passes; everywhere else values and gradients pass as they are.

    Args:
        sample: the latents that the scheduler was given.
        leaf: the latents that it returned, in the glue.
        is_first: whether nothing is known yet of where the pipeline writes.
        dtypes: of the step's transformer outputs, to which a pipeline may round its latents.

    Returns:
        A mask of the places that were handed on.
    """
    given = vars(leaf).get("given")
    noise = "" if given is None else ", and without noise on what is given (image_cond_noise_scale=0)"

    def message() -> str:
        return (
            f"{name}: the latents given to step {step} are not those that step {step - 1} returned; a callback or the "
            "pipeline altered them otherwise than by a mask of 0 and 1, with which inpainting writes its source. "
            f"Record without such a callback{noise}, and with a mask of 0 and 1."
        )

    values, expected = sample.detach(), leaf.detach()
    if values.shape != expected.shape:
        raise RecordingError(message())
    passed, is_as_it_is = passed_places(sample, leaf, step)
    if given is None:
        compared = passed | ~passed.any()
        # Values that stayed though no gradient passes were not written, but detached.
        was_written = passed.all() | ~_agree(values, expected, dtypes) if is_first else True
        passes = is_as_it_is & passed.any() & was_written
    else:
        # A pipeline may keep what is given as it was before the scheduler rounded it.
        compared = ~(given & (values.float() == expected.float()))
        passes = is_as_it_is & (passed == ~given).all()
        passed = torch.ones_like(passes)
    verdicts.add(~_agree(values.where(compared, 0), expected.where(compared, 0), dtypes), message)
    verdicts.add(
        ~passes,
        lambda: (
            f"{name}: the gradient of the latents given to step {step} does not reach those that step {step - 1} "
            "returned as it is (detached, scaled or hooked by a callback or the pipeline); leave the latents as they "
            "are."
        ),
    )
    return passed


def _agree(values: torch.Tensor, expected: torch.Tensor, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """Whether values are the expected ones, or these rounded to one of the dtypes."""
    is_same = agree(values, expected)
    for dtype in dict.fromkeys(dtypes):
        if dtype.itemsize < values.dtype.itemsize:
            is_same = is_same | agree(values, expected.to(dtype).to(values.dtype))
    return is_same


def check_same_places(
    name: str, step: int, passed: torch.Tensor, sampled: torch.Tensor | None, verdicts: Verdicts
) -> None:
    """A source is written to the same places of the latents before every step.

    Otherwise a gradient would have to end where a later step writes, and terms are added up as if none did.

    Args:
        passed: mask of the places that this step got from the one before; a scalar for all.
        sampled: the same of the steps before it, `None` for none.
    """
    if sampled is not None and (passed.ndim or sampled.ndim):
        verdicts.add(
            (passed != sampled).any(),
            lambda: (
                f"{name}: the pipeline or a callback writes to other places of the latents before step {step} than "
                "before the steps until then, expected the same places before every step; write with one mask, "
                "after every step."
            ),
        )


def check_place(name: str, step: int, scheduler: Any) -> None:
    """Evenly spaced sigmas hide a rollout that starts later: its steps have the expected length all the same.

    Args:
        step: counted by the scheduler, whose first steps an image-to-image pipeline leaves out.
    """
    following = getattr(scheduler, "step_index", None)
    if following is not None and following != step + 1:
        raise RecordingError(
            f"{name}: the scheduler made step {following - 1} of its sigmas, expected step {step}: the rollout must "
            "begin at the first sigma, or where set_begin_index or the pipeline's current timestep said before, and "
            "make one Euler step for each; use a text-to-image pipeline or strength 1."
        )


def check_number_of_steps(name: str, step: int, num_steps: int) -> None:
    """One step for each sigma."""
    if step >= num_steps:
        raise RecordingError(
            f"{name}: the scheduler made more than the {num_steps} steps of its sigmas; expected one Euler step for "
            "each, use FlowMatchEulerDiscreteScheduler."
        )


def check_euler(
    name: str,
    scheduler: Any,
    step: int,
    length: float,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    verdicts: Verdicts,
) -> None:
    """Terms weigh velocities as Euler steps do.

    Args:
        scheduler: for its name.
        length: `sigmas[step + 1] - sigmas[step]`.
        tensors: latents before the step, velocity, latents after it.
    """
    sample, velocity, following = tensors
    move = length * widened(velocity)
    expected = widened(sample) + move
    is_finite = expected.isfinite() & following.isfinite()
    expected, move = expected.where(is_finite, 0), move.where(is_finite, 0)
    # The scheduler computes in float32, but rounds the product to the velocity's dtype, the sum to the latents'.
    rounding = torch.finfo(following.dtype).eps * expected.abs() + torch.finfo(velocity.dtype).eps * move.abs()
    rounding = rounding + 8 * torch.finfo(torch.float32).eps * torch.maximum(expected.abs().amax(), move.abs().amax())
    excess = ((widened(following).where(is_finite, 0) - expected).abs() - rounding).amax()
    verdicts.add(
        excess > 0,
        lambda: (
            f"{name}: step {step} of {type(scheduler).__name__} is not latents + (sigmas[i + 1] - sigmas[i]) * "
            f"velocity: it differs by {excess.item():.2e} more than rounding explains; use "
            "FlowMatchEulerDiscreteScheduler without stochastic sampling."
        ),
    )


def check_lengths(
    name: str,
    scheduler: Any,
    step: int,
    length: float,
    lengths: torch.Tensor,
    signs: torch.Tensor,
    verdicts: Verdicts,
) -> None:
    """Terms weigh a whole velocity: each token makes the step, or none, in one direction or the other.

    Args:
        scheduler: for its name.
        length: `sigmas[step + 1] - sigmas[step]`.
        lengths: of each element's step.
        signs: 0, 1 and -1, what they are of `length`.
    """
    # Timesteps are sigmas times 1000, in float32, and back again.
    excess = (lengths - signs * length).abs().amax() - 16 * torch.finfo(torch.float32).eps
    verdicts.add(
        ~(excess <= 0),
        lambda: (
            f"{name}: step {step} of {type(scheduler).__name__} moves tokens by other lengths than 0 and "
            f"{abs(length):.4g}, off by up to {excess.item():.2e}: their noise falls by a schedule of their own (a "
            "condition whose strength is below 1), and terms weigh a whole velocity; pass strength 1."
        ),
    )


def check_connected(name: str, step: int, velocity: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """A velocity without a path to its step's outputs trains nothing. 0 is one, where guidance leaves a step out."""
    own = set(map(id, outputs))
    # Read at once: few pipelines have such a velocity.
    if not velocity.requires_grad and not velocity.any() and any(output.any() for output in outputs):
        return
    if not any(id(leaf) in own for leaf in leaves_of([velocity])):
        raise RecordingError(
            f"{name}: the velocity of step {step} is not connected to the transformer's outputs by autograd (through "
            "numpy, detach or no_grad); such a pipeline cannot be trained through."
        )


# What the pipeline returns.


def check_returned(name: str, returned: Sequence[torch.Tensor], has_left_torch: bool) -> None:
    """Images must be differentiable, and all of their path with them."""
    if returned and not any(tensor.requires_grad for tensor in returned):
        raise RecordingError(
            f"{name}: what the pipeline returned carries no gradient (decoded or post-processed through numpy, detach "
            'or no_grad), expected differentiable images; call it with output_type="pt", or "latent" and decode '
            "yourself."
        )
    if has_left_torch:
        raise RecordingError(
            f"{name}: a step callback made numpy arrays of tensors that carry a gradient and then changed the last "
            "latents, so a part of the gradient may be lost; change them with torch alone."
        )


def check_not_numpy(name: str, error: BaseException) -> None:
    """numpy refuses tensors that require gradients by itself; say what to do about it."""
    if isinstance(error, RuntimeError) and "numpy() on Tensor that requires grad" in str(error):
        raise RecordingError(
            f"{name}: the pipeline turns tensors into numpy arrays, which carry no gradient; call it with "
            'output_type="pt" (a pipeline that always does so cannot be trained through).'
        ) from error


def check_recorded_pipeline(pipe: Any, recorded: Any) -> None:
    """As a step callback, `FlowBPCallback` belongs to the pipeline that it records."""
    if pipe is not recorded:
        raise RecordingError(
            f"{type(pipe).__name__} called this callback outside of its record() block; call the pipeline inside "
            "`with callback.record(pipe):`."
        )


# The sweep, before it begins.


def check_complete(name: str, recorded: Sequence[Trajectory], expected: int) -> None:
    """A rollout must have reached its endpoint, and its copies must be there."""
    if not recorded or any(trajectory.endpoint is None for trajectory in recorded):
        raise RecordingError(
            f"{name + ': ' if name else ''}Expected a complete rollout, got none; call the pipeline inside `with "
            "callback.record(pipe):` and let it make every step with its own scheduler."
        )
    if len(recorded) != expected:
        raise RecordingError(
            f"{name}: Expected {expected} pipeline calls in the record() block (callback.copies is {expected - 1}), "
            f"got {len(recorded)}."
        )


def check_scoring_arguments(is_function: bool, images: Any, prompts: Any, columns: Any) -> None:
    """A reward function needs what it scores; rewards that are computed do not."""
    if is_function and (images is None or prompts is None):
        raise ValueError("A reward function needs the images and the prompts: backward(reward, images, prompts).")
    if not is_function and any(each is not None for each in (images, prompts, columns)):
        raise ValueError("Rewards that are computed already need no images, prompts and columns: backward(rewards).")


def check_endpoint_reached(name: str, gradients: Sequence[torch.Tensor | None]) -> None:
    """Rewards of other images say nothing about this rollout."""
    if any(gradient is None for gradient in gradients):
        raise RecordingError(
            f"{name}: the rewards do not depend on the recorded endpoint; score the images that the pipeline calls of "
            "this record() block returned, all of them, without detach or numpy."
        )


def check_trainable(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """Something must be there to train."""
    if any(trained_parameters(module) for module in transformers):
        return
    layers = [part for each in transformers for part in parts_of(each) if isinstance(part, BaseTunerLayer)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"{name}: the transformer's adapters are disabled, so nothing is trained; call enable_lora()."
        )
    raise ValueError(f"{name}: the transformer has no trainable parameters; add a LoRA adapter or set requires_grad.")


def check_accumulates(name: str, transformers: Sequence[torch.nn.Module]) -> None:
    """A sweep adds to `.grad` many times; what acts after each time would act too often."""
    for module in transformers:
        for parameter in trained_parameters(module):
            if parameter._post_accumulate_grad_hooks:
                raise RecordingError(
                    f"{name}: {name_of([module], parameter)} has a post-accumulate-grad hook (an optimizer that steps "
                    "within the backward pass), but a sweep accumulates once for each active step; step the optimizer "
                    "after backward."
                )


def check_once(name: str, is_done: bool) -> None:
    """A second backward would add the gradient once more, through a graph that is gone."""
    if is_done:
        raise RecordingError(
            f"{name}: backward was called already for this rollout, expected one call; record again for another "
            "gradient, or sum the rewards first."
        )


def check_adjoints(adjoints: Sequence[torch.Tensor], endpoints: Sequence[torch.Tensor]) -> None:
    """One adjoint for each trajectory, in the shape of its endpoint."""
    if [tuple(each.shape) for each in adjoints] != [tuple(each.shape) for each in endpoints]:
        raise ValueError(
            f"`adjoint` must have the endpoint's shape {tuple(endpoints[0].shape)} for each of {len(endpoints)} "
            f"trajectories, got {[tuple(each.shape) for each in adjoints]}."
        )


def check_sampled_places(name: str, trajectories: Sequence[Trajectory], adjoints: Sequence[torch.Tensor]) -> None:
    """Where a pipeline writes its source before every step, nothing is sampled, and no gradient may arrive.

    Args:
        adjoints: for each trajectory; those at its endpoint, or what the sweep made of them.
    """
    for trajectory, adjoint in zip(trajectories, adjoints, strict=True):
        if trajectory.sampled is None or not trajectory.sampled.ndim:
            continue
        # Gradients that are not finite decide nothing.
        if read([(adjoint.isfinite() & (adjoint != 0) & ~trajectory.sampled).any()])[0]:
            raise RecordingError(
                f"{name}: a gradient reaches latents over which the pipeline or a callback writes a source before "
                "every step, expected none there: the images or a transformer input see them as they were before; "
                "write the source after the last step too, and score what the pipeline returned."
            )


def check_one_wrapper(name: str, called: Iterable[torch.nn.Module], wrapped: Mapping[Any, Any]) -> None:
    """Of several transformers, it would not be known which pass exchanges gradients between processes."""
    if wrapped and any(module not in wrapped for module in called):
        raise RecordingError(
            f"{name}: expected one transformer, the wrapped one, got several: the pass that exchanges gradients "
            "between processes would not be known; train in one process."
        )


def check_states(
    name: str,
    calls: Sequence[tuple[int, Call]],
    fingerprints: Mapping[torch.nn.Module, torch.Tensor | None],
) -> None:
    """Calls are replayed in the state in which they were made, with the parameters that sampled.

    Args:
        calls: that the sweep repeats, each with its step.
        fingerprints: of the transformers when the rollout began.
    """
    now: dict[Any, ModelState] = {}
    for _, call in calls:
        if (key := (call.module, call.state.placed.key)) not in now:
            with call.state.in_place(call.module):
                now[key] = ModelState.of(call.module)
        check_versions(name, call.state, now[key])
    for module in {module for module, _ in now}:
        check_values(name, fingerprints[module], fingerprint(module))
    for step, call in calls:
        check_state(name, step, call.module, call.state, now[call.module, call.state.placed.key])
        _, kwargs = tree_unflatten(call.leaves, call.spec)
        check_lora_scale(name, call.module, kwargs)


def check_versions(name: str, recorded: ModelState, now: ModelState) -> None:
    """Gradients belong to the parameters that sampled."""
    if recorded.versions != now.versions:
        raise RecordingError(
            f"{name}: the transformer's parameters changed after the rollout was recorded; call backward before the "
            "optimizer's step."
        )


def check_values(name: str, recorded: torch.Tensor | None, now: torch.Tensor | None) -> None:
    """Values that were changed through `.data` leave no trace in version counters."""
    if recorded is None or now is None:
        return
    has_changed = recorded.shape != now.shape or bool(read([((recorded != now) & (recorded == recorded)).any()])[0])
    if has_changed:
        raise RecordingError(
            f"{name}: the transformer's parameters changed after the rollout was recorded, behind autograd's back "
            "(.data); call backward before they change."
        )


def check_state(name: str, step: int, module: torch.nn.Module, recorded: ModelState, now: ModelState) -> None:
    """A call is replayed in the state in which it was made."""
    change = recorded.change(module, now)
    if change is not None:
        raise RecordingError(
            f"{name}: step {step}: parts of the transformer were exchanged or switched after the call ({change}), so "
            "it cannot be called again as it was (only the hooks and attention processors of diffusers that keep "
            "nothing from call to call are put back); switch that guidance off, and change nothing between record and "
            "backward."
        )


def check_guidance_sign(name: str, step: int, scales: Mapping[str, float]) -> None:
    """Outputs cannot tell a guidance scale of -2 from one of 3 with the branches exchanged."""
    for scale_name, scale in scales.items():
        if scale < 0:
            raise RecordingError(
                f"{name}: `{scale_name}` is {scale:g} at step {step}, below 0, where the unconditional branch cannot "
                "be told from the conditional one; pass unconditional_gradient=True, or a scale above 1."
            )


# Replays.


def check_runs_with_gradients(name: str, path: str, part: torch.nn.Module) -> None:
    """Parts that switch gradients off inside the transformer leave a hole in its gradient."""
    if not torch.is_grad_enabled():
        raise RecordingError(
            f"{name}: {path} ({type(part).__name__}) runs without gradients inside the transformer, so its part of "
            "the gradient would be missing; if its code does so in evaluation mode only, put the module that holds it "
            "in training mode."
        )


def check_reach(
    name: str, step: int, module: torch.nn.Module, kind: CallKind, ran: set[int], outputs: Sequence[torch.Tensor]
) -> None:
    """A replay must compute with every trained parameter that the first call of its kind computed with.

    Args:
        ran: ids of the trained parts that ran now.
    """
    if kind.reached is None:
        # Sharded parameters are other tensors while they compute.
        missing: frozenset[int] = kind.parts - ran
    else:
        missing = kind.reached - set(map(id, leaves_of(outputs)))
    if missing:
        parts = {id(part): path for path, part in module.named_modules()}
        parts |= {id(parameter): path for path, parameter in module.named_parameters()}
        found = next((parts[each] for each in missing if each in parts), "a part")
        raise RecordingError(
            f"{name}: step {step}: {found} was computed with when the rollout began and is not now, so what it gave "
            "is kept somewhere and its part of the gradient would be missing; switch that cache off."
        )


def check_graph(name: str, step: int, error: Exception) -> None:
    """A cache that keeps tensors with their graph breaks a backward pass; say so in the words of this package."""
    found = str(error)
    if any(words in found for words in ("a second time", "unpack_hook")):
        raise RecordingError(
            f"{name}: step {step}: the transformer's graph leads to tensors of an earlier call, so what it computed "
            "then is kept somewhere; switch that cache off."
        ) from error


def check_reproduced(name: str, step: int, problem: str | None) -> None:
    """A replay that gives other values is another computation."""
    if problem is not None:
        raise RecordingError(
            f"{name}: step {step}: the transformer called again does not reproduce its recorded output: {problem}; "
            "switch dropout, caches and gradient checkpointing off and change nothing between record and backward."
        )


# Rewards and penalties.


def check_rewards(name: str, reward: str, trained: Iterable[torch.Tensor], rewards: Any, count: int) -> None:
    """One number for each image, differentiable in the images alone.

    Args:
        reward: what the reward is called.
        trained: parameters of the transformers.
        rewards: what it returned.
        count: how many images it was given.
    """
    if not isinstance(rewards, torch.Tensor) or rewards.shape != (count,):
        found = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
        raise ValueError(
            f"{name}: expected one reward for each of {count} images, a tensor of shape ({count},), got {found}."
        )
    if not rewards.requires_grad:
        raise RecordingError(
            f"{name}: the rewards of {reward} carry no gradient; score the images that the recorded pipeline call "
            'returned (output_type="pt") with gradients on, or let a reward without a gradient judge (--eval_reward).'
        )
    check_loss_roots(name, f"the rewards of {reward}", [rewards], trained)


def check_loss(loss: Any) -> None:
    """An objective makes one number of the rewards."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        is_tensor = isinstance(loss, torch.Tensor)
        found = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
        without = " without a gradient" if is_tensor and not loss.requires_grad else ""
        raise ValueError(
            f"`objective` must return a scalar tensor that is differentiable in the rewards, got {found}{without}; "
            "return a mean or a sum of them."
        )


def check_loss_roots(name: str, what: str, tensors: Sequence[torch.Tensor], trained: Iterable[torch.Tensor]) -> None:
    """Rewards and objectives see the endpoint only, and nothing else of the rollout or of what is trained.

    Args:
        what: the tensors, in words (plural).
        tensors: rewards or a loss, with their graph.
        trained: parameters of the transformers.
    """
    own, verdicts = set(map(id, trained)), Verdicts()
    for leaf in leaves_of(tensors):
        if id(leaf) in own:
            found = f"depend on a trained parameter of shape {tuple(leaf.shape)} other than through the images, so a "
            found += "part of the gradient would be lost; compute that apart and call its own backward"
        elif "origin" in vars(leaf):
            found = _dependence(leaf)
        else:
            continue
        message = f"{name}: {what} {found}."
        verdicts.add(_reaches(name, what, tensors, leaf), lambda message=message: message)
    verdicts.read()


def name_of_reward(reward: Any) -> str:
    """How to call a reward in a message."""
    if inspect.isfunction(reward) or inspect.ismethod(reward):
        return reward.__qualname__
    return type(reward).__name__


def check_anchor(name: str, module: torch.nn.Module, removable: set[int]) -> None:
    """The velocity anchor compares with the model without everything that is trained.

    Args:
        module: a trained transformer.
        removable: ids of the parameters that switching adapters off takes out of the computation.
    """
    if not removable:
        raise ValueError(
            f"{name}: `velocity_anchor` compares with the transformer without its LoRA, which has none; add a LoRA "
            "adapter, or set it to 0."
        )
    for path, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in removable:
            raise ValueError(
                f"{name}: `velocity_anchor` compares with the transformer without what is trained, but {path} stays "
                "when its adapters are switched off; train adapters alone, or set it to 0."
            )
