# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`verify`: the engine's gradient of a user's own call against torch's autograd through the stock call.

The reference gradient uses nothing of the engine but the drawn `Surrogate`, which is data. It calls the pipeline's own
code without its `no_grad` decorator and differentiates a fixed random projection of what is returned. For the row
`full` this is all. For other surrogates `scheduler.step` is wrapped on the instance, so that latents keep the
rollout's values and carry the surrogate's gradient (see `_SurrogateSteps`).
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from .callback import FlowBPCallback
from .introspection import is_velocity_model
from .methods import Method, get_method
from .surrogate import Surrogate

# Largest relative difference of the whole gradient that counts as rounding, by the least precise dtype of transformers
# and VAE. Measured on the tiny pipelines of the matrix, N = 3, CPU, with gradients through both branches and through
# the conditional one: at most 1.5e-7 (the scheduler computes in float32), 1.4e-6, 4.7e-3 and 2.9e-2, medians 2e-8, 0,
# 7e-4 and 5e-3. DreamLite's UNet amplifies rounding most: 7e-8, 3.9e-4, 5.8e-3 and 1.03e-1 (so verify it in float32).
BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
# One parameter's gradient may differ by this many bounds (measured: at most 3 where the whole is near its bound).
LARGEST = 4.0
# A parameter whose gradient is smaller than this share of the parameters' root mean square is compared with that.
SMALL_GRADIENT = 0.1


class VerificationError(RuntimeError):
    """The stock call cannot be differentiated, so there is nothing to compare with; the message says why."""


@dataclass(frozen=True)
class Difference:
    """How one method's gradient differs from the reference.

    Attributes:
        method: name of the row, or "surrogate" for one of the user's own.
        whole: `|found - expected| / |expected|` over all trainable parameters together.
        largest: the largest of the same ratio for single parameters; gradients below 10 % of the root mean square over
            the parameters' norms are compared with that.
        parameter: the parameter that has it, such as "transformer.proj_out.weight".
        output: relative difference of what the pipeline returned, images or latents.
        coupling: share of the expected gradient that crosses from step to step: `|expected - cut| / |expected|`, where
            `cut` is the gradient with all couplings set to 0. Below the bound, a lost coupling would not be seen.
        left_out: with `unconditional_gradient=False`, the part of a step's transformer calls whose gradient was left
            out; `None` where no part was.
    """

    method: str
    whole: float
    largest: float
    parameter: str
    output: float
    coupling: float
    left_out: str | None = None


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`; `str()` gives one line.

    Attributes:
        pipeline: class name.
        num_inference_steps: steps of the rollouts.
        dtype: least precise dtype of the transformers and the VAE, or of autocast.
        bound: largest accepted difference of the whole gradient and of the output; single parameters may differ by
            four times as much.
        differences: one for each method, in the order in which they were asked for.
    """

    pipeline: str
    num_inference_steps: int
    dtype: torch.dtype
    bound: float
    differences: tuple[Difference, ...]

    @property
    def difference(self) -> float:
        """The largest difference of a whole gradient."""
        return max(each.whole for each in self.differences)

    @property
    def failed(self) -> tuple[Difference, ...]:
        """The differences out of the bound. What is not finite is out of it."""
        return tuple(each for each in self.differences if not self._fits(each))

    @property
    def is_within_bound(self) -> bool:
        """Whether all differences are within the bound."""
        return not self.failed

    def _fits(self, each: Difference) -> bool:
        return max(each.whole, each.output) <= self.bound and each.largest <= LARGEST * self.bound

    def __str__(self) -> str:
        parts = []
        for each in self.differences:
            left_out = f", without {each.left_out}" if each.left_out else ""
            output = "" if each.output <= self.bound else f", output {each.output:.1e}"
            unseen = ", too small to be tested" if 0 < each.coupling <= self.bound else ""
            parts.append(
                f"{each.method} {each.whole:.1e} ({each.parameter} {each.largest:.1e}{output}, coupling "
                f"{each.coupling:.1g}{unseen}{left_out})"
            )
        failed = ", ".join(each.method for each in self.failed)
        outcome = f"OUT OF THE BOUND ({failed})" if failed else "within the bound"
        return (
            f"{self.pipeline}, {self.num_inference_steps} steps, {str(self.dtype).removeprefix('torch.')}: relative "
            f"difference from autograd through the stock call: {'; '.join(parts)}: {outcome} {self.bound:.0e}"
        )


MethodLike = str | Method | Surrogate


def verify(
    pipe: Any,
    *,
    method: MethodLike | Sequence[MethodLike] = "full",
    num_inference_steps: int = 3,
    bound: float | None = None,
    unconditional_gradient: bool = True,
    **call: Any,
) -> Verification:
    """Compare the engine's gradient of a call with autograd through the same call of the stock pipeline.

        print(verify(pipe, prompt=["a red cube"], guidance_scale=3.5))

    The call is made for a few steps from the same noise, recorded by the engine and by the pipeline's own code without
    its `no_grad`. The objective is a fixed random projection of the returned images, videos or latents, summed over
    the samples; compared are the gradients of all trainable parameters of the transformers. Afterwards `.grad`, grad
    mode, random number generators, the pipeline and its scheduler are as before, also after an exception; generators
    among the arguments are copied. What a call itself leaves in the models, such as a cache, stays. Autograd keeps the
    graphs of the decoder and of all steps with all branches of guidance: choose a small batch and size.

    Args:
        pipe: a diffusers pipeline whose transformers have trainable parameters, with a flow-matching Euler scheduler.
        method: a row's name, a `Method`, a `Surrogate`, or a sequence of these. Options of a method that count steps
            are lowered to what the rollout can hold; each method is drawn once, with a fixed seed.
        num_inference_steps: 2 or 3, more cost more memory; methods that draw two steps need 3.
        bound: largest accepted difference, above 0; `None` takes that of `BOUNDS` for the least precise dtype of
            transformers and VAE, measured on tiny models.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance. Without them,
            which branch that is cannot be known from outside: the engine's gradient is compared with the stock call's
            without the outputs of one branch, for each branch in turn, and the nearest counts. So it is verified that
            exactly one branch is left out and that the rest is right, but not that it is the unconditional one.
        **call: arguments of the pipeline's call, as at inference; `output_type` must be "pt" (default) or "latent",
            and `sigmas` or `timesteps` must have `num_inference_steps` entries.

    Raises:
        ValueError: for arguments outside their range, a transformer without trainable parameters, sharded parameters,
            or a method that does not fit into the rollout.
        RecordingError: where the engine refuses the call.
        VerificationError: where the stock call cannot be differentiated, or its gradient is 0 or not finite.
    """
    if num_inference_steps < 2:
        raise ValueError(f"`num_inference_steps` must be at least 2, got {num_inference_steps}; use 2 or 3.")
    if bound is not None and not 0 < bound < float("inf"):
        raise ValueError(f"`bound` must be above 0 and finite, or None, got {bound}.")
    methods = [method] if isinstance(method, MethodLike) else list(method)
    if not methods:
        raise ValueError("`method` must name at least one method, got none.")
    named = [_named(each, num_inference_steps) for each in methods]
    arguments = _call_arguments(pipe, num_inference_steps, call)
    parameters = _trained_parameters(pipe)
    dtype = _least_precise(pipe)
    bound = BOUNDS[dtype] if bound is None else bound
    with _untouched(pipe) as restart, torch.enable_grad():
        comparison = _Comparison(pipe, arguments, parameters, restart)
        differences = tuple(comparison.compare(name, each, unconditional_gradient) for name, each in named)
    return Verification(type(pipe).__name__, num_inference_steps, dtype, bound, differences)


# What is asked for.


def _named(method: MethodLike, num_steps: int) -> tuple[str, Method | Surrogate]:
    """A method's name, and the method with the options that count steps lowered to what `num_steps` can hold."""
    if isinstance(method, Surrogate):
        return "surrogate", method
    if isinstance(method, str):
        method = get_method(method)
    if not isinstance(method, Method):
        raise ValueError(f"`method` must be a name, a Method or a Surrogate, got {type(method).__name__}.")
    options = dict(method.options)
    largest = dict.fromkeys(("last_k", "last_n", "num_active"), num_steps)
    if "early_stop_ratio" in options:
        # DRTune may stop before the last step.
        largest["num_active"] = num_steps - max(1, round(options["early_stop_ratio"] * num_steps)) + 1
    options |= {name: min(options[name], most) for name, most in largest.items() if name in options}
    return method.name, replace(method, options=options)


def _call_arguments(pipe: Any, num_steps: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of every call, checked."""
    name = type(pipe).__name__
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise ValueError(f"`pipe` must be a diffusers pipeline, got {name}.")
    arguments = {key: value for key, value in call.items() if not isinstance(value, FlowBPCallback)}
    if (output_type := arguments.get("output_type", "pt")) not in ("pt", "latent"):
        raise ValueError(f'`output_type` must be "pt" or "latent", got {output_type!r}; others carry no gradient.')
    for key in ("sigmas", "timesteps"):
        if (given := arguments.get(key)) is not None and len(given) != num_steps:
            raise ValueError(
                f"`{key}` must have {num_steps} entries, one for each step, got {len(given)}; pass others, or "
                "`num_inference_steps`."
            )
    parameters = signature(type(pipe).__call__).parameters
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    defaults = {
        "num_inference_steps": num_steps,
        "output_type": output_type,
        "return_dict": False,
        "generator": arguments.get("generator") or torch.Generator().manual_seed(0),
    }
    return arguments | {key: value for key, value in defaults.items() if takes_all or key in parameters}


def _transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's transformers, in few pipelines a UNet, by component name."""
    return {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module) and is_velocity_model(name)
    }


def _trained_parameters(pipe: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of the transformers by name, shared ones once."""
    found = {
        f"{component}.{name}": parameter
        for component, module in _transformers(pipe).items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    once = {id(parameter): name for name, parameter in reversed(found.items())}
    found = {name: parameter for name, parameter in found.items() if once[id(parameter)] == name}
    if not found:
        raise ValueError(
            f"{type(pipe).__name__}: expected trainable parameters in a transformer, got none; add a LoRA adapter or "
            "set requires_grad."
        )
    for name, parameter in found.items():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"{name} is sharded, expected whole parameters; verify in one process, before FSDP shards the model."
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook that runs when its gradient is accumulated (an optimizer in the backward pass), "
                "which verify would trigger; verify before such hooks are registered."
            )
    return found


def _least_precise(pipe: Any) -> torch.dtype:
    """The dtype whose rounding limits the comparison."""
    modules = [*_transformers(pipe).values(), pipe.components.get("vae")]
    tensors = [tensor for module in modules if isinstance(module, torch.nn.Module) for tensor in module.parameters()]
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    devices = {tensor.device.type for tensor in tensors}
    found |= {torch.get_autocast_dtype(kind) for kind in devices if torch.is_autocast_enabled(kind)}
    if "cuda" in devices and torch.float32 in found and torch.backends.cuda.matmul.allow_tf32:
        # TF32 has float16's mantissa.
        found.add(torch.float16)
    # Storage dtypes such as float8 are computed with in bfloat16.
    known = {dtype if dtype in BOUNDS else torch.bfloat16 for dtype in found}
    return max(known, key=lambda dtype: torch.finfo(dtype).eps)


# Nothing is left behind.


@contextmanager
def _untouched(pipe: Any) -> Iterator[Callable[[], None]]:
    """Leave `.grad`, random number generators, the pipeline and its scheduler as they were.

    Inside, `.grad` is empty, progress bars are off, and the function that is yielded sets the generators back.
    """
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    gradients = [(parameter, parameter.grad) for module in modules for parameter in module.parameters()]
    owners = [owner for owner in (pipe, pipe.components.get("scheduler")) if owner is not None]
    attributes = [(owner, dict(vars(owner))) for owner in owners]
    restart = _random_states({parameter.device for parameter, _ in gradients})
    for parameter, _ in gradients:
        parameter.grad = None
    pipe.set_progress_bar_config(disable=True)
    try:
        yield restart
    finally:
        restart()
        for owner, before in attributes:
            vars(owner).clear()
            vars(owner).update(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _random_states(devices: set[torch.device]) -> Callable[[], None]:
    """Remember the states of all global generators; calling what is returned sets them back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    states = []
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            # Apple's MPS has one device, and takes no argument in the oldest torch that is allowed.
            where = () if device.type == "mps" else (device,)
            states.append((module, module.get_rng_state(*where), where))

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for module, state, where in states:
            module.set_rng_state(state, *where)

    return restore


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an instance or a class, and put back what was there."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _undecorated(pipeline: type) -> Iterator[None]:
    """Take torch's `no_grad` and `inference_mode` off the `__call__` of a class and its bases."""
    with ExitStack() as stack:
        for owner in pipeline.__mro__:
            call = bare = vars(owner).get("__call__")
            while hasattr(bare, "__wrapped__") and bare.__code__.co_name == "decorate_context":
                bare = bare.__wrapped__
            if bare is not call:
                stack.enter_context(_replaced(owner, "__call__", bare))
        yield


@contextmanager
def _frozen(pipe: Any, kept: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """All parameters but the compared ones without gradients, such as those of text encoders: less memory."""
    kept_ids = {id(parameter) for parameter in kept.values()}
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    frozen = [
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.requires_grad and id(parameter) not in kept_ids
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


# The rollouts.


@dataclass(frozen=True)
class _Rollout:
    """One recorded or stock rollout (with DRaFT-LV's copies): gradients by parameter and outputs, on the CPU."""

    gradients: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """A part of a step's transformer outputs: of one call with `count * batch` samples, `batch` samples in a row."""

    call: int
    place: int
    count: int
    batch: int

    def __str__(self) -> str:
        call = f"transformer call {self.call + 1}"
        return call if self.count == 1 else f"part {self.place + 1}/{self.count} of {call}"


@dataclass(frozen=True)
class _Comparison:
    """The rollouts of one pipeline call, and their differences."""

    pipe: Any
    arguments: Mapping[str, Any]
    parameters: Mapping[str, torch.nn.Parameter]
    restart: Callable[[], None]

    def compare(self, name: str, method: Method | Surrogate, unconditional_gradient: bool) -> Difference:
        """Record one method's gradient and compare it with the reference."""
        found, surrogate = self.engine(method, unconditional_gradient)
        # The chain rule through all steps needs no surrogate: nothing is wrapped.
        oracle = None if name == "full" else surrogate
        branches: list[_Part] | None = None if unconditional_gradient else []
        expected, left_out = self.stock(oracle, branches=branches), None
        if branches:
            candidates = [(self.stock(oracle, left_out=part), part) for part in dict.fromkeys(branches)]
            expected, left_out = min(candidates, key=lambda candidate: _relative(found, candidate[0]))
        size = _norm(expected.gradients)
        if not 0 < size < float("inf"):
            raise VerificationError(
                f"{type(self.pipe).__name__}, {name}: the gradient of the stock call has norm {size}, expected a "
                "finite one above 0, so nothing can be compared; check the weights, or use another dtype or call."
            )
        coupling = 0.0
        if any(term.coupling for term in surrogate.terms[1:]):
            cut = replace(surrogate, terms=tuple(replace(term, coupling=0.0) for term in surrogate.terms))
            coupling = _relative(self.stock(cut, left_out=left_out), expected)
        largest, parameter = _largest(found, expected, list(self.parameters))
        output = _norm(_differences(found.outputs, expected.outputs)) / max(_norm(expected.outputs), 1e-30)
        shown = None if left_out is None else str(left_out)
        return Difference(name, _relative(found, expected), largest, parameter, output, coupling, shown)

    def engine(self, method: Method | Surrogate, unconditional_gradient: bool) -> tuple[_Rollout, Surrogate]:
        """The engine's gradient, and the surrogate that it drew."""
        callback = FlowBPCallback(
            method,
            generator=torch.Generator().manual_seed(0),
            noise_generator=_copies_generator(),
            unconditional_gradient=unconditional_gradient,
        )
        with callback.record(self.pipe):
            outputs = [self._call() for _ in range(1 + callback.copies)]
        surrogate = callback.surrogate
        rewards = torch.cat([_project(output) for output in outputs])
        # Sample weights belong to the objective, not to the terms: here each sample counts the same.
        callback.backward(rewards, objective=lambda rewards, weights: rewards.sum())
        parameters = self.parameters.values()
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        for parameter in parameters:
            parameter.grad = None
        return _Rollout(_on_cpu(gradients), _on_cpu(outputs)), surrogate

    def stock(
        self, surrogate: Surrogate | None, left_out: _Part | None = None, branches: list[_Part] | None = None
    ) -> _Rollout:
        """The gradient by autograd through the stock call.

        Args:
            surrogate: whose gradient it is; `None` for the call's own.
            left_out: part of each step's transformer outputs that is detached.
            branches: a list that receives the parts that there are, where a step has several.
        """
        found: _Rollout | None = None
        steps = None if surrogate is None else _SurrogateSteps(surrogate, self.pipe.scheduler)
        for _ in range(1 + (0 if surrogate is None else surrogate.num_noised)):
            with ExitStack() as stack:
                stack.enter_context(_undecorated(type(self.pipe)))
                stack.enter_context(_frozen(self.pipe, self.parameters))
                if steps is not None:
                    steps.begin()
                    stack.enter_context(_replaced(self.pipe.scheduler, "step", steps.wrapped))
                if left_out is not None or branches is not None:
                    stack.enter_context(_Branches(self.pipe, left_out, branches))
                output, gradients = self._differentiate()
            if found is not None:
                output = found.outputs + output
                gradients = [old + new for old, new in zip(found.gradients, gradients, strict=True)]
            found = _Rollout(gradients, output)
        return found

    def _differentiate(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        name = type(self.pipe).__name__
        try:
            output = self._call()
            parameters = list(self.parameters.values())
            gradients = torch.autograd.grad(_project(output).sum(), parameters, materialize_grads=True)
        except VerificationError:
            raise
        except torch.OutOfMemoryError as error:
            raise VerificationError(
                f"{name}: autograd through the stock call does not fit into memory, it keeps the graphs of all steps; "
                "verify with a smaller size or batch, or 2 steps."
            ) from error
        except RuntimeError as error:
            raise VerificationError(
                f"{name}: autograd through the stock call failed ({error}), expected a call that is differentiable; "
                "it cannot be verified."
            ) from error
        return _on_cpu([output]), _on_cpu(gradients)

    def _call(self) -> torch.Tensor:
        """Call the pipeline with copies of the arguments, from the same random numbers every time."""
        self.restart()
        returned = self.pipe(**tree_map(_copy, dict(self.arguments)))
        output = returned if isinstance(returned, torch.Tensor) else returned[0]
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            raise VerificationError(
                f"{type(self.pipe).__name__}: expected the call to return a differentiable tensor, got "
                f"{type(output).__name__} without a gradient; it cannot be verified."
            )
        return output


class _SurrogateSteps:
    """`scheduler.step` with the rollout's values and a surrogate's gradient.

    Every latent that is handed on has the value that the stock scheduler gives it. Of the terms passed so far there is
    a sum of `weight * velocity` whose value is exactly 0 and whose gradient is that of the velocities. It enters the
    endpoint with factor 1, the latents of a coupled term with the factor `coupling`, and no others. So the gradient at
    the endpoint reaches every term unchanged, and a coupled term sends `coupling` times the gradient of its input to
    all terms before it.
    """

    def __init__(self, surrogate: Surrogate, scheduler: Any) -> None:
        self.terms = {term.step: term for term in surrogate.terms}
        self.endpoint = surrogate.endpoint
        self.scheduler = scheduler
        self.original = scheduler.step
        self.noise_generator = _copies_generator()
        self.sample: torch.Tensor | None = None
        self.is_copy = False
        # Pipelines look at the parameters of `step`.
        self.wrapped = functools.wraps(self.original)(functools.partial(self._step))

    def begin(self) -> None:
        """Begin a rollout; each but the first is a re-noised copy."""
        self.is_copy = self.sample is not None
        self.number = 0
        self.sum: torch.Tensor | float = 0.0
        self.end: torch.Tensor | None = None

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        velocity, sample = values["model_output"], values["sample"]
        step, self.number = self.number, self.number + 1
        with torch.no_grad():
            # Steps after the endpoint too, because schedulers count.
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            result = self.original(*args, **kwargs)
        following = result[0].detach()
        place = getattr(self.scheduler, "step_index", None)
        sigmas = self.scheduler.sigmas[0 if place is None else place - step - 1 :]
        if values.get("per_token_timesteps") is not None:
            # Tokens that are given do not move, others move the other way: from values alone.
            move = (following - sample.detach()) / (velocity.detach() * (sigmas[step + 1] - sigmas[step]))
            velocity = velocity * move.nan_to_num().round()
        if step in self.terms:
            wide = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
            self.sum = self.sum + self.terms[step].weight * (wide - wide.detach())
        if self.end is None and self.endpoint != "sample" and self.endpoint[1] == step:
            wide = torch.promote_types(torch.promote_types(sample.dtype, velocity.dtype), torch.float32)
            leap = float(sigmas[-1]) - float(sigmas[step])
            mean = sample.detach().to(wide) + leap * velocity.detach().to(wide)
            self.end = self._attached(mean.to(sample.dtype), 1.0)
        if self.end is not None:
            following = self.end
        elif step + 2 == len(sigmas):
            self.sample = following if self.sample is None else self.sample
            following = self._attached(following, 1.0)
        else:
            if self.is_copy and step + 3 == len(sigmas):
                following = self._renoised(abs(float(sigmas[-2]) - float(sigmas[-1])))
            term = self.terms.get(step + 1)
            following = self._attached(following, 0.0 if term is None else term.coupling)
        if isinstance(result, tuple):
            return (following, *result[1:])
        result.prev_sample = following
        return result

    def _attached(self, value: torch.Tensor, factor: float) -> torch.Tensor:
        if factor == 0 or isinstance(self.sum, float):
            return value
        return value + (factor * self.sum).to(value.dtype)

    def _renoised(self, sigma: float) -> torch.Tensor:
        """DRaFT-LV: the last step of a copy starts from `(1 - sigma) sample + sigma noise`."""
        wide = self.sample.to(torch.promote_types(self.sample.dtype, torch.float32))
        noise = torch.randn(wide.shape, generator=self.noise_generator).to(wide)
        return ((1 - sigma) * wide + sigma * noise).to(self.sample.dtype)


class _Branches:
    """Watches the transformer calls of each step, and detaches a part of their outputs.

    Args:
        pipe: the pipeline.
        left_out: the part of each step's outputs to detach, `None` for none.
        found: a list that receives all parts of steps that have several, `None` for no list.
    """

    def __init__(self, pipe: Any, left_out: _Part | None, found: list[_Part] | None) -> None:
        self.pipe = pipe
        self.left_out = left_out
        self.found = found
        self.sizes: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> "_Branches":
        scheduler = self.pipe.scheduler
        step = functools.wraps(scheduler.step)(functools.partial(self._step, scheduler.step))
        self._stack.enter_context(_replaced(scheduler, "step", step))
        for module in _transformers(self.pipe).values():
            forward = functools.wraps(module.forward)(functools.partial(self._forward, module.forward))
            self._stack.enter_context(_replaced(module, "forward", forward))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = len(kwargs["sample"] if "sample" in kwargs else args[2])
        parts = [
            _Part(call, place, size // batch, batch)
            for call, size in enumerate(self.sizes)
            for place in range(size // batch)
        ]
        if self.found is not None and len(parts) > 1:
            self.found += parts
        self.sizes = []
        return step(*args, **kwargs)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        first = next(iter(result.values() if isinstance(result, dict) else result))
        is_list = isinstance(first, list | tuple)
        size = len(first)
        part, call = self.left_out, len(self.sizes)
        self.sizes.append(size)
        # Guidance may be switched off at some steps, whose calls are then smaller.
        if part is None or part.call != call or size != part.count * part.batch:
            return result
        taken = slice(part.place * part.batch, (part.place + 1) * part.batch)
        if is_list:
            # One tensor for each sample.
            leaves[taken] = [leaf.detach() for leaf in leaves[taken]]
        else:
            leaves = [_detached_rows(leaf, taken, size) for leaf in leaves]
        return tree_unflatten(leaves, spec)


# Tensors.


def _copies_generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _copy(value: Any) -> Any:
    """A copy of a tensor or a generator, so that no call can change another's."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, torch.Generator):
        return torch.Generator(device=value.device).set_state(value.get_state())
    return value


def _detached_rows(value: Any, rows: slice, size: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != size:
        return value
    return torch.cat([value[: rows.start], value[rows].detach(), value[rows.stop :]])


def _project(output: torch.Tensor) -> torch.Tensor:
    """`(B,)` numbers: each sample's image, video or latents along a fixed random direction."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return (wide * direction).flatten(1).sum(1)


def _on_cpu(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def _differences(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Left minus right in float64."""
    return [one.double() - other.double() for one, other in zip(left, right, strict=True)]


def _norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    return [torch.linalg.vector_norm(tensor.double()).item() for tensor in tensors]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(np.linalg.norm(_norms(tensors)))


def _relative(found: _Rollout, expected: _Rollout) -> float:
    return _norm(_differences(found.gradients, expected.gradients)) / max(_norm(expected.gradients), 1e-300)


def _largest(found: _Rollout, expected: _Rollout, names: Sequence[str]) -> tuple[float, str]:
    """The largest relative difference of one parameter, and its name."""
    sizes = np.asarray(_norms(expected.gradients))
    floor = SMALL_GRADIENT * float(np.sqrt(np.mean(sizes**2)))
    differences = np.asarray(_norms(_differences(found.gradients, expected.gradients))) / np.maximum(sizes, floor)
    place = int(np.argmax(differences))
    return float(differences[place]), names[place]
