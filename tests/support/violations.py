# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Ways to call a pipeline that could give a wrong gradient without an error, and calls that only look like them.

Each `Violation` belongs to a rule of the accounting (docs/life_of_a_gradient.md, section 6). `run` records and sweeps;
it must be refused in one line that names the cause, or its gradient must be what autograd finds through the pipeline's
undecorated call. For rows other than `full` the oracle is the same call with a scheduler that makes the row's
surrogate, so that it uses nothing of the engine but which surrogate was drawn.

python tests/support/violations.py [NAME ...]    prints what becomes of each
"""

import argparse
import contextlib
import copy
import functools
import itertools
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, ZImageControlNetModel, ZImageControlNetPipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SD3CFGCutoffCallback
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from families.family import embeddings, ready
from families.packed import tiny_z_image_parts
from families.videos import build_wan, wan_prompts
from peft import LoHaConfig, LoKrConfig, LoraConfig
from tiny_sd3 import MAX_SEQUENCE_LENGTH, Float64Scheduler, tiny_sd3_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from flowbp import FlowBPCallback, Surrogate, get_method
from flowbp.checks import RecordingError
from flowbp.hooks import is_patched

PROMPTS = ["a 42", "the 7"]
STEPS = 5
GUIDANCE = 3.5
# After this step a callback changes something, so that rows that look late see both states.
SWITCH = 3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "draft-k": {"last_k": 2},
    "refl": {"last_n": 3},
    "draft-lv": {"num_noised": 1},
    "drtune": {"num_active": 2},
    "leapalign": {},
    "flowbp-sparse": {"num_active": 2},
    "flowbp-bridge": {"num_active": 3},
    "flowbp-lagrange": {},
}
SOME = ("full", "flowbp-sparse")
WITH_DRAFT = ("full", "flowbp-sparse", "draft-k")
MANY = ("full", "flowbp-sparse", "draft-k", "drtune", "flowbp-lagrange")
# Whose oracle is the surrogate's graph; DRaFT-LV's copies have none here.
JUDGED = tuple(name for name in METHODS if name != "draft-lv")

# The stock pipeline's code without its `no_grad`.
SD3_CODE = StableDiffusion3Pipeline.__call__.__wrapped__

Must = Literal["refused", "right", "either"]
Call = Callable[[Any], dict[str, Any]]
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------------
# What a violation is, and what becomes of it
# ---------------------------------------------------------------------------------------------------------------------


def nothing(pipe: Any) -> None:
    """For what a violation does not need."""


def no_context(pipe: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def sd3_call(pipe: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of Stable Diffusion 3's call, with a fresh generator."""
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "prompt": list(PROMPTS),
        "height": 8,
        "width": 8,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": generator,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "output_type": "pt",
    }
    return arguments | changes


def transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's transformers by component name."""
    return {name: part for name, part in pipe.components.items() if "transformer" in name and part is not None}


def transformer_parameters(pipe: Any) -> dict[str, torch.Tensor]:
    """What is trained, unless a violation trains more: the transformers' parameters that require a gradient."""
    return {
        f"{component}.{name}": parameter
        for component, module in transformers(pipe).items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def along_a_direction(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """(B,) rewards: each image along a fixed random direction."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (images.double() * direction).flatten(1).sum(1)


def trained_with(name: str) -> Callable[[Any], dict[str, torch.Tensor]]:
    """The transformers' trained parameters, and those of another attribute of the pipeline: a module or a number."""

    def trained(pipe: Any) -> dict[str, torch.Tensor]:
        more = getattr(pipe, name)
        named = more.named_parameters() if isinstance(more, torch.nn.Module) else [("", more)]
        own = {f"{name}.{key}": value for key, value in named if value.requires_grad}
        return {**transformer_parameters(pipe), **own}

    return trained


def minus_mean(pipe: Any, rewards: torch.Tensor) -> torch.Tensor:
    return -rewards.mean()


@dataclass(frozen=True, eq=False)
class Violation:
    """One way to use a pipeline.

    Attributes:
        name: what is done, in a few words.
        rule: number of the rule.
        build: makes the pipeline. It is called for the engine and once more for the oracle.
        must: what the row `full` must do: refuse it, be right, or either.
        cause: pattern that the refusal must match, case ignored.
        call: arguments of the pipeline's call, made outside of the record block.
        methods: rows to try. Those other than `full` must be right if `full` must, else either, but for:
        refused_by: rows other than `full` that must refuse it.
        prepare: done before the record block.
        in_block: done in the record block, after the pipeline's call.
        before_backward: done after the record block.
        around: open from before the record block until after the sweep.
        around_record: open around the record block.
        around_backward: open around the sweep.
        reward: `(B,)` of the images.
        objective: scalar of the rewards.
        trained: tensors, by name, whose gradients are compared.
        options: of the callback.
        detached: whether the oracle cuts the unconditional branch, which must come first.
        tolerance: largest relative difference to the oracle.
        is_table: whether it stands in the issue's table of known failures.
    """

    name: str
    rule: int
    build: Callable[[], Any]
    must: Must = "refused"
    cause: str = ""
    call: Call = sd3_call
    methods: tuple[str, ...] = SOME
    refused_by: tuple[str, ...] = ()
    prepare: Callable[[Any], None] = nothing
    in_block: Callable[[Any], None] = nothing
    before_backward: Callable[[Any], None] = nothing
    around: Callable[[Any], AbstractContextManager[Any]] = no_context
    around_record: Callable[[Any], AbstractContextManager[Any]] = no_context
    around_backward: Callable[[Any], AbstractContextManager[Any]] = no_context
    reward: Callable[[Any, torch.Tensor], torch.Tensor] = along_a_direction
    objective: Callable[[Any, torch.Tensor], torch.Tensor] = minus_mean
    trained: Callable[[Any], dict[str, torch.Tensor]] = transformer_parameters
    options: Mapping[str, Any] = field(default_factory=dict)
    detached: bool = False
    tolerance: float = 1e-6
    is_table: bool = False

    def must_be(self, method: str) -> Must:
        """What this row must do."""
        if method == "full" or self.must == "right":
            return self.must
        return "refused" if method in self.refused_by else "either"


@dataclass(frozen=True)
class Outcome:
    """What became of a violation.

    Attributes:
        pipeline: class name.
        refused: the refusal's message; `None` where it was accepted.
        difference: to the oracle, relative, where it was accepted; `None` where there is no oracle.
        left: what a refusal or a record block left behind, in words.
    """

    pipeline: str
    refused: str | None
    difference: float | None
    left: tuple[str, ...]


def images_of(output: Any) -> torch.Tensor:
    """The images or videos that a pipeline returned."""
    return output if isinstance(output, torch.Tensor) else output[0]


def same_start() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def new_callback(method: str, **options: Any) -> FlowBPCallback:
    """A callback for a row of the table, with gradients through both branches."""
    return FlowBPCallback(
        get_method(method, **METHODS[method]),
        generator=torch.Generator().manual_seed(0),
        noise_generator=torch.Generator().manual_seed(1),
        **{"unconditional_gradient": True, **options},
    )


def run(violation: Violation, method: str) -> Outcome:
    """Record the violation, sweep, and compare what was accepted."""
    same_start()
    pipe = violation.build()
    trained = violation.trained(pipe)
    violation.prepare(pipe)
    surroundings = Surroundings(pipe)
    callback = new_callback(method, **violation.options)
    refused = surrogate = None
    try:
        with violation.around(pipe):
            calls = [violation.call(pipe) for _ in range(1 + callback.copies)]
            with violation.around_record(pipe), callback.record(pipe):
                images = torch.cat([images_of(pipe(**arguments)) for arguments in calls])
                violation.in_block(pipe)
            surrogate = callback.trajectory.surrogate
            rewards = violation.reward(pipe, images)
            violation.before_backward(pipe)
            with violation.around_backward(pipe):
                callback.backward(rewards, objective=lambda rewards, weights: violation.objective(pipe, rewards))
    except (RecordingError, ValueError) as error:
        refused = str(error)
    left = surroundings.changes()
    name = type(pipe).__name__
    if refused is not None:
        tensors = {**violation.trained(pipe), **trained, **all_parameters(pipe)}
        left += [f"a gradient of {key}" for key, tensor in tensors.items() if tensor.grad is not None][:1]
        return Outcome(name, refused, None, tuple(left))
    if method == "draft-lv":
        return Outcome(name, None, None, tuple(left))
    found = gradients(trained)
    wanted = expected(violation, None if method == "full" else surrogate)
    return Outcome(name, None, relative_difference(found, wanted), tuple(left))


def problem(violation: Violation, method: str, outcome: Outcome) -> str | None:
    """In words, what is wrong with an outcome; `None` if nothing."""
    must = violation.must_be(method)
    if outcome.left:
        return f"left behind: {', '.join(outcome.left)}"
    if outcome.refused is None:
        if must == "refused":
            return f"accepted, with a relative error of {outcome.difference}"
        if outcome.difference is not None and not outcome.difference < violation.tolerance:
            return f"accepted with a wrong gradient: relative error {outcome.difference}"
        return None
    name = outcome.pipeline
    if must == "right":
        return f"refused: {outcome.refused}"
    if not outcome.refused.startswith(name) or not outcome.refused.endswith(".") or "\n" in outcome.refused:
        return f"expected one line that begins with {name} and ends with a full stop: {outcome.refused}"
    if not re.search(violation.cause, outcome.refused, re.IGNORECASE):
        return f"expected a cause like {violation.cause!r}: {outcome.refused}"
    return None


def all_parameters(pipe: Any) -> dict[str, torch.Tensor]:
    """Parameters of all components."""
    return {
        f"{component}.{name}": parameter
        for component, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, parameter in module.named_parameters()
    }


def gradients(trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().clone()
        for name, tensor in trained.items()
    }


def relative_difference(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """|found - wanted| / |wanted| over all tensors; |found| where `wanted` is zero."""
    assert found.keys() == wanted.keys()
    left, right = (torch.cat([each.double().flatten() for each in side.values()]) for side in (found, wanted))
    size = right.norm()
    assert torch.isfinite(size)
    return ((left - right).norm() / (size if size > 0 else 1)).item()


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


def expected(violation: Violation, surrogate: Surrogate | None) -> dict[str, torch.Tensor]:
    """Gradient by autograd through the undecorated call; of a surrogate, if one is given."""
    same_start()
    pipe = violation.build()
    trained = violation.trained(pipe)
    violation.prepare(pipe)
    with violation.around(pipe):
        arguments = violation.call(pipe)
        with violation.around_record(pipe), contextlib.ExitStack() as stack:
            if surrogate is not None:
                stack.enter_context(surrogate_steps(pipe, surrogate))
            if violation.detached:
                stack.enter_context(unconditional_detached(pipe))
            images = images_of(type(pipe).__call__.__wrapped__(pipe, **arguments))
            violation.in_block(pipe)
        violation.objective(pipe, violation.reward(pipe, images)).backward()
    return gradients(trained)


@contextmanager
def surrogate_steps(pipe: Any, surrogate: Surrogate) -> Iterator[None]:
    """The scheduler's steps have the values of the rollout and, for autograd, the graph of a surrogate."""
    terms = {term.step: term for term in surrogate.terms}
    state = SimpleNamespace(step=0, path=None, endpoint=None)
    original = pipe.scheduler.step

    def joined(value: torch.Tensor, coupling: float) -> torch.Tensor:
        return value if state.path is None or not coupling else value + coupling * state.path

    @functools.wraps(original)
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        number = state.step
        state.step += 1
        if state.endpoint is not None:
            return (state.endpoint,)
        with torch.no_grad():
            following = original(
                model_output.detach(), timestep, sample.detach(), **{**options, "return_dict": False}
            )[0]
        if options.get("per_token_timesteps") is not None:
            # Tokens that are given do not move, others move the other way.
            length = pipe.scheduler.sigmas[number + 1] - pipe.scheduler.sigmas[number]
            moved = (following - sample.detach()) / (length * model_output.detach())
            model_output = model_output * moved.round().nan_to_num()
        if number in terms:
            move = terms[number].weight * model_output
            # Zero, with a gradient.
            move = move - move.detach()
            state.path = move if state.path is None else state.path + move
        sigmas = pipe.scheduler.sigmas[pipe.scheduler.begin_index or 0 :]
        if surrogate.endpoint != "sample" and surrogate.endpoint[1] == number:
            mean = sample.detach() + (sigmas[-1] - sigmas[number]) * model_output.detach()
            state.endpoint = joined(mean, 1.0)
            # Inpainting goes on until its source has no noise.
            if hasattr(type(pipe), "interrupt") and not re.search("Inpaint|Pastes", type(pipe).__name__):
                # A rollout ends where nothing more is needed.
                pipe._interrupt = True
            return (state.endpoint,)
        if number == len(sigmas) - 2:
            return (joined(following, 1.0),)
        later = terms.get(number + 1)
        return (joined(following, later.coupling if later is not None else 0.0),)

    pipe.scheduler.step = step
    try:
        yield
    finally:
        del pipe.scheduler.step
        pipe._interrupt = False


@contextmanager
def unconditional_detached(pipe: Any) -> Iterator[None]:
    """The unconditional outputs carry no gradient: the first half of each batch, or the first of two calls."""
    forward, is_first = pipe.transformer.forward, itertools.cycle([True, False])

    @functools.wraps(forward)
    def detached(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)[0]
        if len(output) == len(PROMPTS):
            return (output.detach() if next(is_first) else output,)
        first, second = output.chunk(2)
        return (torch.cat([first.detach(), second]),)

    pipe.transformer.forward = detached
    try:
        yield
    finally:
        del pipe.transformer.forward


# ---------------------------------------------------------------------------------------------------------------------
# What must be as before
# ---------------------------------------------------------------------------------------------------------------------


class Surroundings:
    """Class attributes, modes and hooks, to be compared with what they were."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        parts = [pipe, *(part for part in pipe.components.values() if part is not None)]
        self.classes = {owner: dict(vars(owner)) for part in parts for owner in type(part).__mro__}
        self.modes = self._modes()

    @staticmethod
    def _modes() -> dict[str, Any]:
        return {
            "gradients": torch.is_grad_enabled(),
            "torch function modes": torch.overrides._get_current_function_mode_stack(),
            "dispatch modes": _get_current_dispatch_mode_stack(),
            "global forward hooks": list(torch.nn.modules.module._global_forward_hooks),
            "global forward pre-hooks": list(torch.nn.modules.module._global_forward_pre_hooks),
        }

    def changes(self) -> list[str]:
        """In words, what is not as it was."""
        found = []
        for owner, before in self.classes.items():
            now = dict(vars(owner))
            changed = [name for name in now.keys() | before.keys() if now.get(name) is not before.get(name)]
            # Python keeps these when it copies.
            found += [f"{owner.__name__}.{name}" for name in sorted(changed) if name != "__slotnames__"]
        found += [name for name, value in self._modes().items() if value != self.modes[name]]
        if getattr(self.pipe, "_interrupt", False):
            found.append("the interrupt flag")
        for component, part in self.pipe.components.items():
            for name, value in vars(part).items() if hasattr(part, "__dict__") else ():
                if _is_of_the_engine(value):
                    found.append(f"{component}.{name}")
            for module in part.modules() if isinstance(part, torch.nn.Module) else ():
                found += [f"a hook on {component}" for hook in _hooks(module) if _is_of_the_engine(hook)]
        return found


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from vars(module)[name].values()
    for parameter in module.parameters(recurse=False):
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            yield from (getattr(parameter, name) or {}).values()


def _is_of_the_engine(value: Any) -> bool:
    if isinstance(value, functools.partial):
        return _is_of_the_engine(value.func)
    value = getattr(value, "__func__", value)
    code = getattr(value, "__code__", None)
    return callable(value) and ("/flowbp/" in code.co_filename if code else type(value).__module__[:7] == "flowbp.")


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


class PlainLoop(StableDiffusion3Pipeline):
    """Stable Diffusion 3 with the plainest sampling loop, in parts. `seen` starts empty at every call."""

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int = STEPS) -> torch.Tensor:
        """Images (B, 3, 8, 8)."""
        self.seen: list[Any] = []
        words, no_words, pooled, no_pooled = self.encode_prompt(
            prompts, None, None, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        self.texts = ((self.prepared(words), pooled), (no_words, no_pooled))
        latents = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=words.dtype)
        return self.pictures(self.sampled(self.started(latents), steps))

    def prepared(self, words: torch.Tensor) -> torch.Tensor:
        return words

    def started(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            latents = self.step(latents, timestep)
        return latents

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        velocity = self.velocity(latents, timestep)
        return self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (self.branch(latents, timestep, *text) for text in self.texts)
        return unconditional + GUIDANCE * (conditional - unconditional)

    def branch(
        self, latents: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return self.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=words,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return self.image_processor.postprocess(self.decoded(latents), output_type="pt")

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        return self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample


def with_part(part: str, change: Callable[[Any, torch.Tensor], torch.Tensor], base: type = PlainLoop) -> type:
    """A loop in which `change(pipe, result)` takes the place of what a part returns."""
    return type("ChangedLoop", (base,), {part: lambda pipe, *args: change(pipe, getattr(base, part)(pipe, *args))})


def with_last_latents(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> type:
    """A loop that decodes `change(pipe, latents)`; it keeps what it stepped."""

    class ChangedLoop(KeepsLatents):
        def pictures(self, latents: torch.Tensor) -> torch.Tensor:
            return super().pictures(change(self, latents))

    return ChangedLoop


def loop_call(pipe: Any) -> dict[str, Any]:
    return {"prompts": list(PROMPTS)}


def loop(pipeline_class: type[PlainLoop] = PlainLoop, **changes: Any) -> Callable[[], Any]:
    """Builds the tiny pipeline's components in another pipeline class."""

    def build() -> Any:
        pipe = pipeline_class(**tiny_sd3_pipeline(**{"float64_scheduler": True, **changes}).components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def sd3(**changes: Any) -> Callable[[], Any]:
    """Builds the stock pipeline."""
    return lambda: tiny_sd3_pipeline(**{"float64_scheduler": True, **changes})


def changed(build: Callable[[], Any], *changes: Callable[[Any], None]) -> Callable[[], Any]:
    """Builds a pipeline and changes it."""

    def changed_build() -> Any:
        pipe = build()
        for change in changes:
            change(pipe)
        return pipe

    return changed_build


def as_class(pipeline_class: type, **changes: Any) -> Callable[[], Any]:
    """Builds the stock pipeline as a subclass of it."""

    def build() -> Any:
        pipe = sd3(**changes)()
        pipe.__class__ = pipeline_class
        return pipe

    return build


def scheduled_by(scheduler: type[Any]) -> Callable[[Any], None]:
    """A change of the scheduler's class."""
    return lambda pipe: setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))


def fresh_lora(pipe: Any) -> None:
    """The LoRA as it is before training: its second matrix is zero, so it does not change any output."""
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


fresh = changed(sd3(lora_rank=2), fresh_lora)


def adapted(config: Any, is_training: bool = False) -> Callable[[], Any]:
    """Builds the stock pipeline with an adapter that is alone trained, as PEFT initialises it."""

    def change(pipe: Any) -> None:
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(config)
        pipe.to(torch.float64)
        pipe.transformer.train(is_training)

    return changed(sd3(), change)


def frozen(pipe: Any) -> None:
    pipe.transformer.requires_grad_(False)


def adapter(config: Any, name: str = "default") -> Callable[[Any], None]:
    """Adds an adapter with random weights."""

    def change(pipe: Any) -> None:
        others = {key for key, _ in pipe.transformer.named_parameters()}
        # PEFT draws its weights from the global generator.
        torch.manual_seed(len(name))
        pipe.transformer.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(len(name))
        for key, parameter in pipe.transformer.named_parameters():
            if f".{name}" in key and key not in others and "magnitude" not in key:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = parameter.data.double() + 0.2 * noise
        # What PEFT adds is in training mode.
        pipe.transformer.to(torch.float64).eval()

    return change


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ATTENTION, **changes})


def inactive(pipe: Any) -> None:
    """Another adapter is active; the trained one still requires gradients."""
    adapter(lora(), "second")(pipe)
    pipe.transformer.set_adapters(["second"])
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_(".default." in name)


def both_trained(pipe: Any) -> None:
    """What adding a LoRA has frozen is trained again."""
    for parameter in (pipe.transformer.context_embedder.first, pipe.transformer.context_embedder.second):
        parameter.requires_grad_(True)


class Zeros(torch.nn.Module):
    """A trained layer beside a frozen one, `base(x) + scale * (x A) B`, with B = 0 as before training.

    Whatever is done to `scale`, outputs do not show it; gradients do.
    """

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        first = torch.randn(base.in_features, 2, generator=generator, dtype=torch.float64)
        self.first = torch.nn.Parameter(first.to(base.weight.dtype))
        self.second = torch.nn.Parameter(torch.zeros(2, base.out_features, dtype=base.weight.dtype))
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.added(x)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.masked(x @ self.first) @ self.second

    def masked(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def replaced(part: str, make: Callable[[torch.nn.Module], torch.nn.Module]) -> Callable[[Any], None]:
    """A change that puts `make(module)` in the place of a part of the transformer."""

    def change(pipe: Any) -> None:
        owner, _, name = part.rpartition(".")
        module = pipe.transformer.get_submodule(owner)
        setattr(module, name, make(getattr(module, name)))

    return change


replaced_text_projection = functools.partial(replaced, "context_embedder")


def masking(masked: Callable[[Any, torch.Tensor], torch.Tensor]) -> type[Zeros]:
    """Such a layer, with `masked(layer, hidden)` between its two matrices."""
    return type("Masking", (Zeros,), {"masked": masked})


def with_zeros(layer: type[Zeros] = Zeros) -> Callable[[], Any]:
    """Builds the stock pipeline with `layer` in place of the text projection, alone trained."""
    return changed(sd3(), frozen, replaced_text_projection(layer))


class _Doubled(torch.autograd.Function):
    """Returns its input and doubles the gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def doubling(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook that scales the gradient."""
    return (_Doubled.apply(output[0]), *output[1:]) if isinstance(output, tuple) else _Doubled.apply(output)


# ---------------------------------------------------------------------------------------------------------------------
# Step callbacks
# ---------------------------------------------------------------------------------------------------------------------


def stepping(
    make: Callable[[Any], StepCallback], *tensor_inputs: str, **changes: Any
) -> Callable[[Any], dict[str, Any]]:
    """A call with a step callback, which `make` makes anew for each call."""

    def call(pipe: Any) -> dict[str, Any]:
        return sd3_call(
            pipe,
            callback_on_step_end=make(pipe),
            callback_on_step_end_tensor_inputs=["latents", *tensor_inputs],
            **copy.deepcopy(changes),
        )

    return call


def at_step(number: int, change: Callable[[Any], None]) -> Callable[[Any], StepCallback]:
    """A callback that does something to the pipeline after a step."""

    def make(pipe: Any) -> StepCallback:
        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            if step == number:
                change(pipe)
            return inputs

        return callback

    return make


def switching(change: Callable[[Any], None], **changes: Any) -> Call:
    """A call whose step callback does something to the pipeline after the step `SWITCH`."""
    return stepping(at_step(SWITCH, change), **changes)


def at_the_end(change: Callable[[Any, list[torch.Tensor]], torch.Tensor]) -> Callable[[Any], StepCallback]:
    """A callback that keeps every step's latents and changes the last."""

    def make(pipe: Any) -> StepCallback:
        seen: list[torch.Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(inputs["latents"])
            return {"latents": change(pipe, seen)} if step == STEPS - 1 else {}

        return callback

    return make


def looking(look: Callable[[Any, torch.Tensor], Any]) -> Callable[[Any], StepCallback]:
    """A callback that looks at the pipeline and the latents after every step and changes nothing."""

    def make(pipe: Any) -> StepCallback:
        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            look(pipe, inputs["latents"])
            return inputs

        return callback

    return make


VIOLATIONS: list[Violation] = []


def adding(rule: int, cause: str, violations: list[Violation] = VIOLATIONS) -> Callable[..., None]:
    """A function that adds a violation of a rule to `violations`; `cause` is its default."""

    def add(name: str, build: Any, must: Must = "refused", **changes: Any) -> None:
        if isinstance(build, type):
            build, changes = loop(build), {"call": loop_call, **changes}
        violations.append(Violation(name, rule, build, must, **{"cause": cause, **changes}))

    return add


# ---------------------------------------------------------------------------------------------------------------------
# Rule 1: the only roots of the images are the endpoint, of a velocity its step's outputs and latents
# ---------------------------------------------------------------------------------------------------------------------


class KeepsLatents(PlainLoop):
    """Keeps what it stepped: `seen` has (latents, velocity, following) of every step."""

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        velocity = self.velocity(latents, timestep)
        following = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        self.seen.append((latents, velocity, following))
        return following


class BlendsAnEarlyEstimate(KeepsLatents):
    """Shows a little of what step 1 expected to become of it."""

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        before, velocity, _ = self.seen[1]
        estimate = before - self.scheduler.sigmas[1] * velocity
        return 0.9 * super().decoded(latents) + 0.1 * super().decoded(estimate)


class GainOfItsOwn(PlainLoop):
    """Has a trained number that is not part of any component."""

    gain: torch.nn.Parameter

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.gain * super().velocity(latents, timestep)


class GainOnTheImages(GainOfItsOwn):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return PlainLoop.velocity(self, latents, timestep)

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.gain * super().decoded(latents)


class ShiftsTimesteps(GainOfItsOwn):
    """The trained number moves the timesteps that the transformer is told."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return PlainLoop.velocity(self, latents, timestep * self.gain)


def own_gain(pipe: Any, value: float = 0.9) -> None:
    pipe.gain = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


class MomentumInPlace(PlainLoop):
    """Guidance with momentum in one buffer that is written in place."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        velocity = super().velocity(latents, timestep)
        if not self.seen:
            self.seen.append(torch.zeros_like(velocity))
        return self.seen[0].mul_(0.3).add_(velocity).clone()


class OldUnconditionalBranch(PlainLoop):
    """Computes the unconditional branch at every second step only."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional = self.branch(latents, timestep, *self.texts[0])
        if len(self.seen) % 2 == 0:
            self.unconditional = self.branch(latents, timestep, *self.texts[1])
        self.seen.append(None)
        return self.unconditional + GUIDANCE * (conditional - self.unconditional)


class PooledTextFollowsVelocity(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (words, pooled), negative = self.texts
        if self.seen:
            pooled = pooled + 0.1 * self.seen[-1].mean()
        branches = (self.branch(latents, timestep, *text) for text in ((words, pooled), negative))
        conditional, unconditional = branches
        self.seen.append(unconditional + GUIDANCE * (conditional - unconditional))
        return self.seen[-1]


class DriftFromTheSecond(PlainLoop):
    """Pulls towards the latents of step 1."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(latents)
        pull = 0.1 * (latents - self.seen[1]) if len(self.seen) > 2 else 0
        return super().velocity(latents, timestep) + pull


class CheckpointsItsCalls(PlainLoop):
    """Calls the transformer inside of `torch.utils.checkpoint`, which runs it again in its backward pass."""

    def branch(self, latents: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().branch, latents, timestep, *text, use_reentrant=False)


class OneVelocityBuffer(PlainLoop):
    """Writes every step's velocity into the same tensor."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        velocity = super().velocity(latents, timestep)
        self.seen = self.seen or [torch.zeros_like(velocity)]
        return self.seen[0].copy_(velocity)


class WritesOverVelocities(PlainLoop):
    """Writes into a velocity when its step is made."""

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        velocity = self.velocity(latents, timestep)
        following = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        velocity.mul_(0)
        return following


class ScalesInPlace(Float64Scheduler):
    """Its steps write into the velocity that they are given."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return super().step(model_output.mul_(0.9), *args, **kwargs)


class _Rounded(torch.autograd.Function):
    """Rounds, and lets the gradient pass."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return (value * 64).round() / 64

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class ShowsTheNoise(PlainLoop):
    """Adds some of the initial noise, a constant, to the last latents."""

    def started(self, latents: torch.Tensor) -> torch.Tensor:
        self.noise = latents
        return latents.clone()

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return super().pictures(latents + 0.1 * self.noise)


class OneBuffer(PlainLoop):
    """Writes every step's latents into the same tensor, which leaves a path along which all gradients are zero."""

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents.copy_(super().step(latents.clone(), timestep))


class AddsNothing(PlainLoop):
    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().step(latents, timestep) + 0.0 * latents


class SecondBranchSeesTheFirst(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional = self.branch(latents, timestep, *self.texts[0])
        unconditional = self.branch(latents + 0.2 * conditional, timestep, *self.texts[1])
        return unconditional + GUIDANCE * (conditional - unconditional)


class DetachesUnconditionalBranch(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (self.branch(latents, timestep, *text) for text in self.texts)
        return unconditional.detach() + GUIDANCE * (conditional - unconditional.detach())


class PredictsTheSample(PlainLoop):
    """Turns outputs into an estimate of the sample and back, so that latents reach the velocity by themselves."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = timestep / self.scheduler.config.num_train_timesteps
        estimate = latents - sigma * super().velocity(latents, timestep)
        return (latents - estimate.tanh()) / sigma


class GuidanceInterval(PlainLoop):
    """Guides at the middle steps only, so steps have different numbers of calls."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(None)
        if len(self.seen) in (2, 3):
            return super().velocity(latents, timestep)
        return self.branch(latents, timestep, *self.texts[0])


class UsesFeatures(PlainLoop):
    """A hook keeps what a block computed, and the pipeline's own code uses it."""

    def branch(self, latents: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        handle = self.transformer.transformer_blocks[0].register_forward_hook(self.keep)
        try:
            return super().branch(latents, timestep, *text)
        finally:
            handle.remove()

    def keep(self, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.feature = output[1].mean((1, 2)).view(-1, 1, 1, 1)

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().velocity(latents, timestep) + 0.5 * self.feature


class FeaturesInTheImages(UsesFeatures):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return PlainLoop.velocity(self, latents, timestep)

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decoded(latents) + 0.5 * self.feature


class FeaturesInTheOtherBranch(UsesFeatures):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional = self.branch(latents, timestep, *self.texts[0])
        unconditional = self.branch(latents + 0.5 * self.feature, timestep, *self.texts[1])
        return unconditional + GUIDANCE * (conditional - unconditional)


def on_latents_at(number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], StepCallback]:
    """A callback that gives other latents back after a step."""

    def make(pipe: Any) -> StepCallback:
        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"latents": change(inputs["latents"])} if step == number else {}

        return callback

    return make


def keeps_latents(pipe: Any) -> StepCallback:
    """Keeps what the reward looks at later."""
    pipe.kept = []
    return looking(lambda pipe, latents: pipe.kept.append(latents))(pipe)


def rewards_the_way(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """Rewards what the latents were like on the way, too."""
    return along_a_direction(pipe, images) + 0.2 * along_a_direction(pipe, pipe.kept[2])


def moving_average(pipe: Any, seen: list[torch.Tensor]) -> torch.Tensor:
    average = seen[0]
    for latents in seen[1:]:
        average = 0.3 * average + 0.7 * latents
    return average


ROOT = "latents|earlier step|outside of|endpoint|velocit"
rule_1 = adding(1, ROOT)

rule_1(
    "decodes the mean of its last two latents",
    with_last_latents(lambda pipe, latents: (latents + pipe.seen[-1][0]) / 2),
    methods=JUDGED,
    is_table=True,
)
rule_1(
    "decodes x_N + 0.2 v_last",
    with_last_latents(lambda pipe, latents: latents + 0.2 * pipe.seen[-1][1]),
    cause=ROOT + "|not recorded",
    methods=tuple(METHODS),
    refused_by=("draft-lv",),
    is_table=True,
)
rule_1(
    "step callback averages the last two latents",
    sd3(),
    call=stepping(at_the_end(lambda pipe, seen: (seen[-1] + seen[-2]) / 2)),
    methods=JUDGED,
    is_table=True,
)
rule_1(
    "step callback blends in early latents that a closure kept",
    sd3(),
    call=stepping(at_the_end(lambda pipe, seen: 0.7 * seen[-1] + 0.3 * seen[1])),
    methods=MANY,
)
rule_1("step callback returns a moving average", sd3(), call=stepping(at_the_end(moving_average)))
rule_1(
    "step callback blends in detached latents",
    sd3(),
    "either",
    call=stepping(at_the_end(lambda pipe, seen: (seen[-1] + seen[-2].detach()) / 2)),
)
rule_1(
    "gives the last latents the spread of those before",  # as guidance rescaling does
    with_last_latents(lambda pipe, latents: latents * (pipe.seen[-1][0].std() / latents.std())),
)
rule_1("blends a decoded early estimate into the images", BlendsAnEarlyEstimate, methods=MANY)
rule_1(
    "brightens images by a trained bias",
    with_part("decoded", lambda pipe, images: images + 30 * pipe.transformer.proj_out.bias.mean()),
    cause="parameter|outside",
    methods=MANY,
)
for each, shape in ((GainOfItsOwn, "velocities"), (GainOnTheImages, "images"), (ShiftsTimesteps, "timesteps")):
    rule_1(
        f"trained number of the pipeline's own acts on {shape}",
        changed(loop(each), own_gain),
        call=loop_call,
        cause="gradient|trained|outside",
        trained=trained_with("gain"),
    )
rule_1(
    "learned guidance scale",
    changed(sd3(), functools.partial(own_gain, value=GUIDANCE)),
    call=lambda pipe: sd3_call(pipe, guidance_scale=pipe.gain),
    trained=trained_with("gain"),
    cause="gradient|trained|guidance",
)
rule_1("momentum in a buffer written in place", MomentumInPlace, cause="earlier step|memory", methods=MANY)
rule_1("unconditional branch of the step before", OldUnconditionalBranch, cause="earlier step|memory|call")
rule_1("pooled text follows the last velocity", PooledTextFollowsVelocity, cause="earlier step|input")
rule_1("pull towards the latents of step 1", DriftFromTheSecond, cause="earlier step|memory|latents")
rule_1(
    "step callback hooks the latents' gradient",
    sd3(),
    "either",
    call=stepping(looking(lambda pipe, x: x.requires_grad and x.register_hook(lambda gradient: 0.5 * gradient))),
    methods=MANY,
    cause="hook",
)
rule_1(
    "step callback doubles the latents' gradient, not their values",
    sd3(),
    "either",
    cause="latents|callback|gradient",
    call=stepping(on_latents_at(2, _Doubled.apply)),
    methods=MANY,
)
rule_1(
    "step callback detaches latents",
    sd3(),
    "either",
    cause="latents|callback|gradient",
    call=stepping(on_latents_at(2, torch.Tensor.detach)),
)
rule_1(
    "reward looks at latents that a step callback kept",
    sd3(),
    cause="latents|reward|step|endpoint",
    call=stepping(keeps_latents),
    reward=rewards_the_way,
)
rule_1(
    "step callback exchanges the transformer",
    # By a copy that is trained, too.
    changed(sd3(), lambda pipe: setattr(pipe, "second", copy.deepcopy(pipe.transformer))),
    "either",
    cause="transformer",
    call=stepping(at_step(1, lambda pipe: setattr(pipe, "transformer", pipe.second))),
    trained=trained_with("second"),
)
for each, where in (
    (UsesFeatures, "velocity"),
    (FeaturesInTheImages, "images"),
    (FeaturesInTheOtherBranch, "other branch's input"),
):
    rule_1(f"features that a hook kept reach the {where}", each, cause="outside|hook|feature|inside|" + ROOT)
rule_1(
    "objective with a penalty on trained weights",
    sd3(),
    "either",
    # Weight decay.
    objective=lambda pipe, r: -r.mean() + sum(p.square().sum() for p in transformer_parameters(pipe).values()),
    cause="parameter|trained|weights|endpoint",
)
rule_1(
    "scheduler scales velocities in place",
    changed(loop(), scheduled_by(ScalesInPlace)),
    cause="rounding explains",
    call=loop_call,
)
rule_1("calls the transformer under checkpoint", CheckpointsItsCalls, "either", cause="checkpoint")
rule_1("guides at some steps only", GuidanceInterval, "either", cause="guidance|call")
# Look alike.
for each, name in (
    (with_part("velocity", lambda pipe, v: _Rounded.apply(v)), "rounds velocities straight through"),
    (ShowsTheNoise, "adds the initial noise to the last latents"),
    (OneBuffer, "writes all latents into one tensor"),
    (OneVelocityBuffer, "writes all velocities into one tensor"),
    (WritesOverVelocities, "writes over velocities after their steps"),
    (AddsNothing, "adds zero times the old latents"),
    (with_part("velocity", lambda pipe, v: v - 0.5 * v.mean(0, keepdim=True)), "mixes samples in its own code"),
    (SecondBranchSeesTheFirst, "gives one branch's output to the other"),
    (DetachesUnconditionalBranch, "detaches the unconditional branch by itself"),
    (PredictsTheSample, "turns outputs into estimates and back"),
):
    rule_1(name, each, "right", methods=("full", "draft-k", "flowbp-lagrange"))
for each, name in (
    (at_the_end(lambda pipe, seen: seen[-1].flip(0)), "reverses the last latents' order"),
    (at_the_end(lambda pipe, seen: seen[-1].mul_(2)), "doubles the last latents in place"),
    (looking(lambda pipe, x: x.requires_grad and x.retain_grad()), "retains the latents' gradients"),
):
    rule_1(f"step callback {name}", sd3(), "right", call=stepping(each))


# ---------------------------------------------------------------------------------------------------------------------
# Rule 2: trained tensors used elsewhere
# ---------------------------------------------------------------------------------------------------------------------


def through_to_q(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """Words (B, L, 32) through the transformer's query projection, 16 features at a time."""
    to_q = pipe.transformer.transformer_blocks[0].attn.to_q
    return to_q(words.unflatten(-1, (-1, 16))).flatten(-2)


def through_weight(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """The parameter itself, not its module."""
    return torch.nn.functional.linear(words, pipe.transformer.context_embedder.weight).repeat(1, 1, 2)


def times_norm_of_all(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """One operation on a list of all parameters."""
    return words * torch.stack(torch._foreach_norm(list(pipe.transformer.parameters()))).norm() / 30


def times_vector_of_all(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    return words * torch.nn.utils.parameters_to_vector(pipe.transformer.parameters()).square().mean().sqrt()


def through_functional_call(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """A part of the transformer with its parameters as arguments."""
    part = pipe.transformer.context_embedder
    return torch.func.functional_call(part, dict(part.named_parameters()), (words,)).repeat(1, 1, 2)


def through_lora_by_hand(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    to_q = pipe.transformer.transformer_blocks[0].attn.to_q
    delta = to_q.lora_B["default"].weight @ to_q.lora_A["default"].weight
    return words + torch.nn.functional.linear(words.unflatten(-1, (-1, 16)), delta).flatten(-2)


def slice_times_norm(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """Writes into a part of the text in place."""
    words = words.clone()
    words[:, :3].mul_(pipe.transformer.proj_out.weight.norm() / 3)
    return words


preparing = functools.partial(with_part, "prepared")


def tied_prior(pipe: Any) -> None:
    prior = torch.nn.Linear(32, 16, bias=False, dtype=torch.float64)
    prior.weight = pipe.transformer.context_embedder.weight
    pipe.prior = prior


def through_numpy(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    weight = pipe.transformer.context_embedder.weight.detach().numpy()
    return torch.from_numpy(words.numpy() @ weight.T).repeat(1, 1, 2)


class VelocityTimesWeightNorm(PlainLoop):
    """In the loop, without its graph."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            norm = self.transformer.proj_out.weight.norm()
        return super().velocity(latents, timestep) * norm / 3


class NoiseThroughPatchEmbedding(PlainLoop):
    """The initial latents depend on a trained part."""

    def started(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + 0.2 * self.transformer.pos_embed(latents).mean()


def text_encoder_lora(pipe: Any) -> None:
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    pipe.text_encoder.to(torch.float64)


def reads_dtypes(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """Takes dtype, device and shape of a parameter, in every way that people write."""
    weight = pipe.transformer.proj_out.weight
    words = words.to(weight.dtype).to(weight.device).to(weight).type_as(weight)
    dtype = torch.result_type(words, weight)
    return words.to(torch.promote_types(dtype, weight.dtype)) * (weight.numel() / weight.shape.numel())


def makes_tensors_like(pipe: Any, words: torch.Tensor) -> torch.Tensor:
    """Makes tensors of a parameter's dtype, shape and device."""
    weight = pipe.transformer.proj_out.weight
    zeros = torch.zeros_like(weight).sum() + weight.new_zeros(1) + torch.empty_like(weight).fill_(0).sum()
    return words + zeros + torch.full_like(weight, 0.1)[0, 0] + weight.new_tensor([0.1]) + weight.new_ones(1)


def everything_at_its_default(pipe: Any) -> None:
    for name in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).requires_grad_(True)


def user_embeddings(pipe: Any) -> None:
    """Embeddings that the user made before, those of the prompts and of nothing."""
    words, no_words, pooled, no_pooled = pipe.encode_prompt(
        PROMPTS, None, None, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    pipe.user = {
        "prompt_embeds": words.detach(),
        "negative_prompt_embeds": no_words.detach(),
        "pooled_prompt_embeds": pooled.detach(),
        "negative_pooled_prompt_embeds": no_pooled.detach(),
        "latents": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64),
    }


def call_with_user_s(pipe: Any) -> dict[str, Any]:
    return sd3_call(pipe, prompt=None, **pipe.user)


def requiring(name: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        user_embeddings(pipe)
        pipe.user[name].requires_grad_(True)

    return change


def embeddings_from_a_trained_part(pipe: Any) -> None:
    """The user refines the embeddings with a part of the transformer, before the call."""
    user_embeddings(pipe)
    pipe.user["prompt_embeds"] = through_to_q(pipe, pipe.user["prompt_embeds"])


def tiny_z_image_control() -> ZImageControlNetPipeline:
    """Z-Image with a control network, which shares the transformer's refiners, and a LoRA on the queries."""
    controlnet = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    # diffusers forgets to set it, and reads it where gradients are on.
    controlnet.gradient_checkpointing = False
    pipe = ready(ZImageControlNetPipeline(**tiny_z_image_parts(), controlnet=controlnet))
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    pipe.transformer.to(torch.float64)
    return pipe


def z_image_call(pipe: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": [embeddings(5, 32), embeddings(3, 32, seed=1)],
        "control_image": embeddings(2, 3, 8, 8, seed=2).sigmoid(),
        "height": 8,
        "width": 8,
        "num_inference_steps": 3,
        "guidance_scale": 0.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "pt",
    }


def transformer_reward(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """A reward that asks the transformer itself, as implicit rewards do."""
    batch = len(images)
    latents = images.mean(1, keepdim=True).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).expand(-1, 4, -1, -1)
    output = pipe.transformer(
        hidden_states=latents,
        timestep=torch.full((batch,), 500.0, dtype=torch.float64),
        encoder_hidden_states=embeddings(batch, 5, 32),
        pooled_projections=embeddings(batch, 32),
        return_dict=False,
    )[0]
    return along_a_direction(pipe, images) + output.flatten(1).sum(1)


def adds_trained_bias(pipe: Any, seen: list[torch.Tensor]) -> torch.Tensor:
    return seen[-1] + pipe.transformer.proj_out.bias.mean()


def logs_norms(pipe: Any, latents: torch.Tensor) -> None:
    parameters = list(pipe.transformer.parameters())
    norm = torch.stack([parameter.norm() for parameter in parameters]).norm()
    largest = max(parameter.detach().abs().max().item() for parameter in parameters)
    assert torch.isfinite(norm) and largest > 0 and f"{norm:.3f}"


def counts_parameters(pipe: Any, latents: torch.Tensor) -> None:
    assert sum(parameter.numel() for parameter in pipe.transformer.parameters() if parameter.requires_grad) > 0
    assert pipe.transformer.num_parameters() > 0 and pipe.transformer.get_memory_footprint() > 0
    assert pipe.transformer.dtype == torch.float64 and repr(pipe.transformer)


def copies_state(pipe: Any, latents: torch.Tensor) -> None:
    state = {name: value.detach().cpu().clone() for name, value in pipe.transformer.state_dict().items()}
    assert copy.deepcopy(pipe.transformer).state_dict().keys() == state.keys()


def updates_moving_average(pipe: Any, latents: torch.Tensor) -> None:
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            pipe.average[name].lerp_(parameter, 0.1)


def with_moving_average(pipe: Any) -> None:
    pipe.average = {name: value.detach().clone() for name, value in pipe.transformer.named_parameters()}


def moves(pipe: Any, latents: torch.Tensor) -> None:
    pipe.to("cpu")
    pipe.transformer.to(torch.float64).to(torch.device("cpu"))


ELSEWHERE = "outside of|elsewhere|trained|shares|before the|parameter"
rule_2 = adding(2, ELSEWHERE)
ALL = tuple(METHODS)

rule_2("text through to_q before the loop", preparing(through_to_q), methods=ALL, refused_by=ALL[1:], is_table=True)
rule_2("text through to_q under no_grad before the loop", preparing(torch.no_grad()(through_to_q)), "either")
rule_2(
    "Z-Image's control network shares refiners with a LoRA",
    tiny_z_image_control,
    call=z_image_call,
    methods=("full", "draft-k", "flowbp-sparse", "drtune", "draft-lv"),
    refused_by=("draft-k", "flowbp-sparse", "drtune", "draft-lv"),
    is_table=True,
)
for each, name, component in (
    (text_encoder_lora, "text encoder with a trainable LoRA", "text_encoder"),
    (lambda pipe: pipe.vae.decoder.conv_out.requires_grad_(True), "VAE that is trainable in part", "vae"),
):
    rule_2(
        name,
        changed(sd3(lora_rank=2), each),
        cause=component,
        methods=ALL,
        refused_by=ALL[1:],
        trained=trained_with(component),
        is_table=True,
    )
for name in ("prompt_embeds", "latents", "pooled_prompt_embeds", "negative_prompt_embeds"):
    rule_2(
        f"user's {name} require a gradient",
        changed(sd3(), requiring(name)),
        cause=name.removeprefix("negative_") + "|embed",
        call=call_with_user_s,
        methods=("full", "flowbp-sparse", "draft-lv"),
        refused_by=("flowbp-sparse", "draft-lv"),
        trained=lambda pipe, name=name: {**transformer_parameters(pipe), name: pipe.user[name]},
        is_table=name in ("prompt_embeds", "latents"),
    )
rule_2(
    "textual inversion beside the transformer",
    # It trains token embeddings alone.
    changed(sd3(lora_rank=2), lambda pipe: pipe.text_encoder.get_input_embeddings().requires_grad_(True)),
    cause="text_encoder",
    trained=trained_with("text_encoder"),
)
rule_2(
    "user's embeddings come from a trained part",
    changed(sd3(), embeddings_from_a_trained_part),
    cause="prompt_embeds|embed|" + ELSEWHERE,
    call=call_with_user_s,
)
for each, name in (
    (preparing(through_weight), "text through a weight before the loop"),
    (preparing(lambda pipe, words: words * pipe.transformer.proj_out.weight.norm() / 3), "text times a weight's norm"),
    (preparing(times_norm_of_all), "text times the norm of all weights, found at once"),
    (preparing(times_vector_of_all), "text times the size of all weights as a vector"),
    (preparing(through_functional_call), "text through a part with its parameters as arguments"),
    (NoiseThroughPatchEmbedding, "noise through the patch embedding"),
    (preparing(slice_times_norm), "a slice of the text times a weight's norm, in place"),
):
    rule_2(name, each)
rule_2("text through a LoRA's product by hand", loop(preparing(through_lora_by_hand), lora_rank=2), call=loop_call)
rule_2(
    "text through a view of a weight that was made before",
    changed(
        loop(preparing(lambda pipe, words: (words @ pipe.view).repeat(1, 1, 2))),
        lambda pipe: setattr(pipe, "view", 1.0 * pipe.transformer.context_embedder.weight.t()),
    ),
    cause=ELSEWHERE + "|gradient",
    call=loop_call,
)
rule_2(
    "text through a module that shares a weight",
    changed(loop(preparing(lambda pipe, words: pipe.prior(words).repeat(1, 1, 2))), tied_prior),
    call=loop_call,
)
rule_2(
    "text times a trained number of the pipeline's own",
    changed(loop(preparing(lambda pipe, words: pipe.gain * words)), own_gain),
    cause=ELSEWHERE + "|gradient",
    call=loop_call,
    trained=trained_with("gain"),
)
rule_2("step callback adds a trained bias to the last latents", sd3(), call=stepping(at_the_end(adds_trained_bias)))
rule_2("reward asks the transformer", sd3(), "either", cause="reward|" + ELSEWHERE, reward=transformer_reward)
# Autograd's own answer is that these carry no gradient.
for each, name in (
    (preparing(through_numpy), "text through a weight as a numpy array"),
    (
        preparing(lambda pipe, words: words * pipe.transformer.proj_out.weight.data.norm() / 3),
        "text times the norm of a weight's data",
    ),
    (VelocityTimesWeightNorm, "velocity times a weight's norm under no_grad"),
):
    rule_2(name, each, "either")
# Look alike.
rule_2(
    "VAE and text encoders at PyTorch's default",
    changed(sd3(lora_rank=2), everything_at_its_default),
    "right",
    methods=MANY,
)
rule_2("reads dtypes, shapes and devices of weights", preparing(reads_dtypes), "right")
rule_2("makes tensors like a weight", preparing(makes_tensors_like), "right")
for look, name in (
    (logs_norms, "logs norms of weights"),
    (counts_parameters, "counts parameters"),
    (copies_state, "copies the state"),
    (moves, "moves models to where they are"),
):
    rule_2(f"step callback {name}", sd3(), "right", call=stepping(looking(look)))
rule_2(
    "step callback updates a moving average of weights",
    changed(sd3(), with_moving_average),
    "right",
    call=stepping(looking(updates_moving_average)),
)


rule_2(
    "user overwrites the embeddings after recording",
    changed(sd3(), user_embeddings),
    "right",
    call=call_with_user_s,
    before_backward=lambda pipe: [value.mul_(-1) for value in pipe.user.values()],
)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 3: a replay is the same computation, not only the same values
# ---------------------------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A part of the transformer that is called through another one. `kept` starts empty."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.kept: dict[Any, torch.Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        key = self.key(*args, **kwargs)
        if key not in self.kept:
            self.kept[key] = self.inner(*args, **kwargs)
        return self.kept[key]

    def key(self, *args: Any, **kwargs: Any) -> Any:
        """Calls with equal keys get the same output."""
        return None


class KeptByShape(Wrapped):
    def key(self, x: torch.Tensor) -> Any:
        return tuple(x.shape)


class KeptByTensor(Wrapped):
    """Cached for as long as the same unchanged tensor comes in; copies are computed anew."""

    def key(self, x: torch.Tensor) -> Any:
        self.alive = [*getattr(self, "alive", []), x]
        return id(x), x._version


class KeptByTimestep(Wrapped):
    def key(self, timestep: torch.Tensor, pooled: torch.Tensor) -> Any:
        return timestep[0].item(), len(timestep)


class KeptWithoutGradients(KeptByShape):
    """Uses what it kept where no gradient is needed only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if torch.is_grad_enabled() else super().forward(x)


class KeptAtEverySecondCall(Wrapped):
    """Adds the residual of the call before at every second call, as caches of features do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__(inner)
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: Any) -> Any:
        self.calls += 1
        if self.calls % 2:
            words, hidden = self.inner(hidden_states, encoder_hidden_states, **more)
            self.kept = {"words": words, "residual": hidden - hidden_states}
            return words, hidden
        return self.kept["words"], hidden_states + self.kept["residual"]


def last_call_kept(pipe: Any) -> None:
    """The whole transformer returns its last output where its inputs are those of the last call."""
    forward = pipe.transformer.forward
    last: dict[str, Any] = {}

    @functools.wraps(forward)
    def remembering(**inputs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        known = last.get("tensors", {})
        if known.keys() != tensors.keys() or not all(torch.equal(known[name], tensors[name]) for name in known):
            last.update(tensors=tensors, output=forward(**inputs))
        return last["output"]

    pipe.transformer.forward = remembering


def cached_text_keys(pipe: Any) -> None:
    """Wan's cross-attention sees the same text at every step, so its keys and values are computed once."""
    for block in pipe.transformer.blocks:
        block.attn2.to_k, block.attn2.to_v = KeptByShape(block.attn2.to_k), KeptByShape(block.attn2.to_v)


def wan_call(pipe: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {**wan_prompts(), "num_inference_steps": 4, "guidance_scale": 1.0, "generator": generator} | {
        "output_type": "pt"
    }


class KeptMerge(Zeros):
    """Adds its product to the base's weight once and keeps the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "merged"):
            self.merged = self.base.weight + (self.first @ self.second).t()
        return torch.nn.functional.linear(x, self.merged, self.base.bias)


class ReturnsWhatItStored(Wrapped):
    """Computes at every call and returns what it computed at the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.setdefault("output", self.inner(x))
        return self.kept["output"]


class KeptCast(torch.nn.Module):
    """Keeps a copy of its weight in the dtype that it computes in."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.weight.to(torch.float32).to(x.dtype)
        return torch.nn.functional.linear(x, self.kept, self.linear.bias)


class KeptBetweenBranches(PlainLoop):
    """Embeds the latents once in each step, for both branches; the unconditional one comes first."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        unconditional, conditional = (self.branch(latents, timestep, *text) for text in reversed(self.texts))
        return unconditional + GUIDANCE * (conditional - unconditional)


class KeptUntilLatentsChange(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "x" not in self.kept or not torch.equal(self.kept["x"], x):
            self.kept = {"x": x.detach().clone(), "output": self.inner(x)}
        return self.kept["output"]


def checkpointed(pipe: Any) -> None:
    pipe.transformer.enable_gradient_checkpointing()


SAME = "cache|stored|kept|computation|trained part|does not reproduce|gradient|switched after"
rule_3 = adding(3, SAME)
normalised = changed(sd3(), replaced("proj_out", parametrizations.weight_norm))
SKIPPING = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 0.5}

rule_3(
    "text projection returns what it stored at step 0",
    changed(sd3(), replaced_text_projection(Wrapped)),
    methods=ALL,
    refused_by=ALL[1:],
    is_table=True,
)
rule_3("time embedding cached by timestep", changed(sd3(), replaced("time_text_embed", KeptByTimestep)), methods=MANY)
rule_3(
    "residual of a block reused at every second step",
    changed(sd3(), replaced("transformer_blocks.0", KeptAtEverySecondCall)),
    methods=MANY,
)
rule_3("whole transformer remembers its last call", changed(sd3(), last_call_kept), "either", methods=MANY)
rule_3("keys and values of the text cached", changed(build_wan, cached_text_keys), call=wan_call)
rule_3("merged weight of an own adapter kept", with_zeros(KeptMerge))
rule_3(
    "merged weight of an own adapter kept, beside a LoRA",
    changed(with_zeros(KeptMerge), adapter(LoraConfig(r=2, target_modules=ATTENTION)), both_trained),
)
rule_3(
    "text projection computes and returns what it stored",
    changed(sd3(), replaced_text_projection(ReturnsWhatItStored)),
)
# Kept with its graph, a cast gives the right gradient, rounded once more.
rule_3("cast of a weight kept", changed(sd3(), replaced_text_projection(KeptCast)), "either", tolerance=1e-7)
rule_3(
    "patch embedding kept from branch to branch",
    changed(loop(KeptBetweenBranches), replaced("pos_embed", KeptUntilLatentsChange)),
    "either",
    call=loop_call,
)
rule_3(
    "patch embedding kept from branch to branch, conditional branch alone",
    changed(loop(KeptBetweenBranches), replaced("pos_embed", KeptUntilLatentsChange)),
    "either",
    call=loop_call,
    options={"unconditional_gradient": False},
    detached=True,
)
rule_3(
    "weight normalisation cached from record to backward",
    normalised,
    "either",
    around=lambda pipe: parametrize.cached(),
)
rule_3(
    "one autocast around record and backward, which caches weights",
    lambda: tiny_sd3_pipeline(torch.float32, lora_rank=2),
    "either",
    cause="autocast",
    around=lambda pipe: torch.autocast("cpu", torch.bfloat16),
    tolerance=0.1,
)
rule_3(
    "text projection cached by the tensor's identity", changed(sd3(), replaced_text_projection(KeptByTensor)), "either"
)
# Look alike.
rule_3(
    "text projection cached where no gradient is needed",
    changed(sd3(), replaced_text_projection(KeptWithoutGradients)),
    "right",
)
rule_3(
    "frozen text projection cached",
    changed(sd3(lora_rank=2), replaced_text_projection(Wrapped)),
    "right",
    methods=MANY,
)
rule_3("skip-layer guidance", sd3(), "right", call=lambda pipe: sd3_call(pipe, **SKIPPING), methods=MANY)
rule_3("gradient checkpointing", changed(sd3(), checkpointed), "right", methods=MANY)
rule_3(
    "weight normalisation cached around record only",
    normalised,
    "right",
    around_record=lambda pipe: parametrize.cached(),
)
rule_3("weight normalisation", normalised, "right")


# ---------------------------------------------------------------------------------------------------------------------
# Rule 4: a replay is made in the same state
# ---------------------------------------------------------------------------------------------------------------------


class DoublesOutputs(ModelHook):
    """A hook of accelerate."""

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        return doubling(module, (), output)


def hooked_part(pipe: Any) -> None:
    pipe.handle = pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(doubling)


def masked_gradients(pipe: Any) -> None:
    """The user trains half of each matrix."""
    for parameter in pipe.transformer.parameters():
        mask = torch.arange(parameter.numel()).view(parameter.shape) % 2
        parameter.register_hook(functools.partial(torch.mul, mask))


def optimizer_in_backward(pipe: Any) -> None:
    """Parameters are updated as soon as they have a gradient, to save the memory of the gradients."""

    def update(parameter: torch.Tensor) -> None:
        parameter.data -= 1e-3 * parameter.grad
        parameter.grad = None

    for parameter in pipe.transformer.parameters():
        parameter.register_post_accumulate_grad_hook(update)


def weighs(*weights: float) -> Callable[[Any], None]:
    """Set the adapters' weights, as a script does."""
    names = ["default", "second"][: len(weights)]
    return lambda pipe: pipe.transformer.set_adapters(names, list(weights))


def second_adapter(pipe: Any) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=ATTENTION), adapter_name="second")
    pipe.transformer.to(torch.float64)
    pipe.transformer.set_adapters(["default", "second"], [1.0, 0.0])


def fuses_lora(pipe: Any) -> None:
    pipe.fuse_lora()


def disables(pipe: Any) -> None:
    pipe.transformer.disable_adapters()


def trains(pipe: Any) -> None:
    pipe.transformer.train()


def rewrites_first_matrices(pipe: Any) -> None:
    """Weights that do not show, because the second matrix is zero, are exchanged behind autograd's back."""
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(-0.5)


def replaces_parameters(pipe: Any) -> None:
    """New parameters of the same values, as loading a checkpoint makes them."""
    for module in pipe.transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))


class BufferScaled(Zeros):
    """Its scale is a buffer."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base)
        del self.scale
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def added(self, x: torch.Tensor) -> torch.Tensor:
        # A copy, so that autograd does not mind when the buffer is written.
        return self.scale.clone() * (x @ self.first) @ self.second


class ParameterScaled(BufferScaled):
    """Its scale is a frozen parameter."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base)
        del self.scale
        own_gate(0.9, self)


def own_gate(value: float, layer: torch.nn.Module) -> None:
    layer.scale = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64), requires_grad=False)


class TableScaled(Zeros):
    """Its scale stands in a dict of lists."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base)
        self.scales = {"first": [1.0]}

    def masked(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scales["first"][0] * hidden


def own_scale(value: float) -> Callable[[Any], None]:
    return lambda pipe: setattr(pipe.transformer.context_embedder, "scale", value)


class DrawsAside(Zeros):
    """Draws in a fork of the global generator, which is then as before."""

    def masked(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            return hidden * torch.rand_like(hidden)


class Remembers(Zeros):
    """A gate, zero as before training, on what the call before computed."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base)
        self.before: torch.Tensor | float = 1.0

    def added(self, x: torch.Tensor) -> torch.Tensor:
        added = super().added(x) * self.before
        self.before = self.base(x).square().mean() * (1 if isinstance(self.before, float) else 2 + self.before)
        return added


class CountsCalls(Zeros):
    """Its scale falls from call to call."""

    def masked(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scale *= 0.5
        return hidden


def second_part(pipe: Any) -> None:
    pipe.second = Zeros(pipe.transformer.context_embedder.base)
    pipe.second.first.data.mul_(-3)


def exchanges_processor_weights(pipe: Any) -> None:
    """Others of the same class, with weights of their own."""
    for attn in [part for part in pipe.transformer.modules() if isinstance(getattr(part, "processor", None), Branch)]:
        other = copy.deepcopy(attn.processor)
        other.first.weight.data.mul_(-3)
        attn.set_processor(other)


@contextmanager
def globally_hooked(pipe: Any) -> Iterator[None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return doubling(module, inputs, output) if module is pipe.transformer.proj_out else None

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class ComputesInBFloat16(PlainLoop):
    """Has an autocast of its own around the transformer's calls."""

    def branch(self, latents: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().branch(latents, timestep, *text).float()


class Normalised(torch.nn.Sequential):
    """A linear layer and batch normalisation of its features."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear, torch.nn.BatchNorm1d(linear.out_features, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x).transpose(1, 2)).transpose(1, 2)


class Branch(torch.nn.Module):
    """An attention processor with a trained branch of its own, zero as before training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain = JointAttnProcessor2_0()
        self.first = torch.nn.Linear(width, 2, bias=False, dtype=torch.float64)
        self.second = torch.nn.Linear(2, width, bias=False, dtype=torch.float64)
        self.second.weight.data.zero_()
        self.scale = 1.0

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.plain(attn, hidden_states, *args, **kwargs)
        hidden, *words = result if isinstance(result, tuple) else (result,)
        hidden = hidden + self.scale * self.second(self.first(hidden_states))
        return (hidden, *words) if words else hidden


def with_branches(pipe: Any) -> None:
    torch.manual_seed(4)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.set_attn_processor({name: Branch(16) for name in pipe.transformer.attn_processors})


def branch_scale(value: float) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        for processor in pipe.transformer.attn_processors.values():
            processor.scale = value

    return change


def exchanges_processors(pipe: Any) -> None:
    """Others of the same class and with the same parameters."""
    others = {name: copy.copy(processor) for name, processor in pipe.transformer.attn_processors.items()}
    for other in others.values():
        other.scale = -2.0
    pipe.transformer.set_attn_processor(others)


def with_ip_adapter(pipe: Any) -> None:
    """Stable Diffusion 3's image prompts, whose projections are trained."""
    torch.manual_seed(4)
    transformer = pipe.transformer.requires_grad_(False)
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=16, scale=0.5)
        for name in transformer.attn_processors
    }
    transformer.set_attn_processor(processors)
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=8, output_dim=16, hidden_dim=16, depth=1, dim_head=8, heads=2, num_queries=2, timestep_in_dim=16
    ).requires_grad_(False)
    pipe.transformer.to(torch.float64)


def ip_adapter_call(pipe: Any) -> dict[str, Any]:
    image = embeddings(2, 3, 8)
    cutoff = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=SWITCH)
    return sd3_call(pipe, ip_adapter_image_embeds=image, callback_on_step_end=MultiPipelineCallbacks([cutoff]))


STATE = "adapter|scal|merge|fuse|state|changed|exchanged|hook|processor|does not reproduce|between record and backward"
rule_4 = adding(4, STATE)
RANDOM = "random|dropout|training mode|eval"

HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward hook that scales the gradient": lambda pipe: pipe.transformer.register_forward_hook(doubling),
    "forward pre-hook that scales the inputs' gradient": lambda pipe: pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "hidden_states": _Doubled.apply(kwargs["hidden_states"])}),
        with_kwargs=True,
    ),
    "full backward hook that scales the inputs' gradient": lambda pipe: pipe.transformer.register_full_backward_hook(
        lambda module, inputs, outputs: tuple(2 * each for each in inputs)
    ),
    "hook of accelerate that scales the gradient": lambda pipe: add_hook_to_module(pipe.transformer, DoublesOutputs()),
    "forward hook on a part that scales the gradient": hooked_part,
}
for name, hook in HOOKS.items():
    rule_4(f"user's {name}", changed(sd3(), hook), "right", is_table=name == "forward hook that scales the gradient")
rule_4("user's masks on gradients", changed(sd3(), masked_gradients), "right")
rule_4(
    "optimizer steps within the backward pass", changed(sd3(), optimizer_in_backward), cause="optimizer|hook|changed"
)
rule_4(
    "step callback sets a LoRA's weight from 1 to 0",
    fresh,
    "either",
    call=switching(weighs(0.0)),
    methods=JUDGED,
    is_table=True,
)
rule_4(
    "step callback fades from one LoRA to another",
    changed(fresh, second_adapter),
    "either",
    call=switching(weighs(0.0, 1.0)),
    trained=lambda pipe: {key: value for key, value in pipe.transformer.named_parameters() if "lora_" in key},
)
for change, name in (
    (weighs(0.5), "sets a LoRA's weight"),
    (disables, "disables the LoRA"),
    (fuses_lora, "fuses the LoRA"),
    (lambda pipe: pipe.transformer.delete_adapters("default"), "deletes the LoRA"),
    (second_adapter, "adds a second LoRA"),
    (rewrites_first_matrices, "changes a LoRA's first matrix through .data"),
    (replaces_parameters, "puts new parameters in place of the LoRA's"),
    (lambda pipe: pipe.transformer.fuse_qkv_projections(), "fuses the projections"),
):
    rule_4(f"{name} between record and backward", fresh, "either", before_backward=change)
branched, hooked = changed(sd3(), with_branches), changed(sd3(), hooked_part)
for name, build, change, cause in (
    ("fuses the LoRA", fresh, fuses_lora, ""),
    ("disables the LoRA", fresh, disables, ""),
    ("exchanges attention processors' weights", branched, exchanges_processor_weights, "|part"),
    ("exchanges attention processors for others of the same class", branched, exchanges_processors, ""),
    ("changes an own layer's scale", with_zeros(), own_scale(0.0), "|attribute"),
    (
        "writes into an own layer's buffer",
        with_zeros(BufferScaled),
        lambda pipe: pipe.transformer.context_embedder.scale.fill_(0.25),
        "|buffer",
    ),
    (
        "changes an own layer's scale in a dict",
        with_zeros(TableScaled),
        lambda pipe: pipe.transformer.context_embedder.scales.update(first=[0.25]),
        "",
    ),
    (
        # As FSDP2 and parametrisations make one.
        "changes an own layer's scale, of a class that torch made of its class",
        with_zeros(type("Made", (Zeros,), {"__module__": "torch.nn.utils.parametrize"})),
        own_scale(0.0),
        "",
    ),
    (
        "changes an own layer's frozen gate",
        with_zeros(ParameterScaled),
        lambda pipe: own_gate(0.25, pipe.transformer.context_embedder),
        "",
    ),
    ("removes a hook that scales gradients", hooked, lambda pipe: pipe.handle.remove(), ""),
    ("puts up a hook that scales gradients", sd3(), hooked_part, ""),
):
    rule_4(f"step callback {name}", build, "either", cause=STATE + cause, call=switching(change))
for name, build, change, cause in (
    ("evaluation mode", changed(fresh, trains), lambda pipe: pipe.transformer.eval(), "mode"),
    ("changes an own layer's scale", with_zeros(), own_scale(3.0), STATE + "|attribute"),
    ("removes a hook that scales gradients", hooked, lambda pipe: pipe.handle.remove(), STATE),
):
    rule_4(f"{name} between record and backward", build, "either", cause=cause, before_backward=change)
for config, name in (
    (LoraConfig(r=2, lora_dropout=0.5, target_modules=ATTENTION), "LoRA with lora_dropout"),
    (LoHaConfig(r=2, rank_dropout=0.5, target_modules=ATTENTION), "LoHa with rank_dropout"),
    (LoKrConfig(r=2, module_dropout=0.5, target_modules=ATTENTION), "LoKr with module_dropout"),
):
    is_loha = isinstance(config, LoHaConfig)
    rule_4(
        f"fresh {name} in training mode",
        adapted(config, True),
        cause=RANDOM,
        methods=JUDGED if is_loha else SOME,
        refused_by=JUDGED[1:] if is_loha else (),
        is_table=is_loha,
    )
rule_4(
    "training mode between record and backward, with lora_dropout",
    adapted(LoraConfig(r=2, lora_dropout=0.5, target_modules=ATTENTION)),
    "either",
    cause=RANDOM + "|" + STATE,
    before_backward=trains,
)
rule_4(
    "LoHa in training mode without dropout, which draws numbers",
    adapted(LoHaConfig(r=2, target_modules=ATTENTION), True),
    "either",
    cause=RANDOM,
)
functional = masking(lambda layer, hidden: torch.nn.functional.dropout(hidden, 0.5, layer.training))
rule_4("own layer with functional dropout in training mode", changed(with_zeros(functional), trains), cause=RANDOM)
rule_4(
    "own layer that draws in a fork of the generator",
    with_zeros(DrawsAside),
    "either",
    cause=RANDOM,
    before_backward=lambda pipe: torch.manual_seed(9),
)
rule_4(
    "own layer with a gate on what the last call computed",
    with_zeros(Remembers),
    "either",
    cause=STATE + "|earlier|call",
)
rule_4("own layer that counts its calls", with_zeros(CountsCalls), "either", cause=STATE + "|attribute|call")
rule_4(
    "step callback exchanges a part for another with other weights",
    changed(with_zeros(), second_part),
    "either",
    cause=STATE + "|part",
    # Another adapter of the same class.
    call=switching(lambda pipe: setattr(pipe.transformer, "context_embedder", pipe.second)),
    trained=trained_with("second"),
)
rule_4("global hook that scales gradients around record only", sd3(), "either", around_record=globally_hooked)
rule_4(
    "step callback changes the LoRA scale among the arguments",
    fresh,
    "either",
    call=switching(
        lambda pipe: pipe._joint_attention_kwargs.update(scale=0.25), joint_attention_kwargs={"scale": 0.5}
    ),
)
noisy = masking(lambda layer, hidden: hidden * torch.rand_like(hidden))
rule_4("own layer that is random in evaluation mode", with_zeros(noisy), cause=RANDOM)
rule_4(
    "step callback scales an attention processor's branch",
    branched,
    "either",
    call=switching(branch_scale(0.0)),
    methods=MANY,
)
rule_4(
    "diffusers' callback that cuts an IP-adapter's scale to 0",
    changed(sd3(), with_ip_adapter),
    "either",
    call=ip_adapter_call,
)
for name, where in (("record", "around_record"), ("backward", "around_backward")):
    rule_4(
        f"autocast around {name} only",
        lambda: tiny_sd3_pipeline(torch.float32, lora_rank=2),
        "either",
        cause="autocast",
        tolerance=0.1,
        **{where: lambda pipe: torch.autocast("cpu", torch.bfloat16)},
    )
rule_4(
    "kernels of attention chosen around record only",
    sd3(),
    "either",
    cause="kernel|does not reproduce|rounding",
    around_record=lambda pipe: sdpa_kernel(SDPBackend.MATH),
)
rule_4("backward under no_grad", sd3(), "either", cause="no_grad", around_backward=lambda pipe: torch.no_grad())
rule_4(
    "batch normalisation in training mode",
    changed(sd3(), replaced_text_projection(Normalised), trains),
    "either",
    cause="training mode|buffer|" + STATE,
)
# Look alike.
rule_4("checkpointing switched on between record and backward", sd3(), "right", before_backward=checkpointed)
rule_4(
    "LoRA scale as an argument",
    fresh,
    "right",
    call=lambda pipe: sd3_call(pipe, joint_attention_kwargs={"scale": 0.5}),
)
rule_4(
    "pipeline with an autocast of its own",
    loop(ComputesInBFloat16, dtype=torch.float32, lora_rank=2),
    "right",
    call=loop_call,
    tolerance=0.1,
)
rule_4("global hook that scales gradients", sd3(), "right", around=globally_hooked)
rule_4("activations kept on the CPU", sd3(), "right", around_backward=lambda pipe: torch.autograd.graph.save_on_cpu())
rule_4("lora_dropout in evaluation mode", adapted(lora(lora_dropout=0.5)), "right")
rule_4("weight-decomposed LoRA", adapted(LoraConfig(r=2, use_dora=True, target_modules=ATTENTION)), "right")
rule_4("attention processors with a branch", branched, "right")


# ---------------------------------------------------------------------------------------------------------------------
# Rule 5: other uses of the transformer
# ---------------------------------------------------------------------------------------------------------------------


def other_output(pipe: Any) -> torch.Tensor:
    """A call of the transformer that has nothing to do with the rollout."""
    return pipe.transformer(
        hidden_states=embeddings(3, 4, 4, 4, seed=5),
        timestep=torch.tensor([900.0, 500.0, 100.0], dtype=torch.float64),
        encoder_hidden_states=embeddings(3, 6, 32, seed=6),
        pooled_projections=embeddings(3, 32, seed=7),
        return_dict=False,
    )[0]


def other_images(pipe: Any) -> torch.Tensor:
    """Images of another pipeline that has the same transformer."""
    return pipe.other(**sd3_call(pipe, num_inference_steps=3)).images


def with_references(pipe: Any) -> None:
    """What other uses give where nothing is recorded."""
    other = StableDiffusion3Pipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    pipe.other = other
    with torch.no_grad():
        pipe.references = (other_output(pipe), other_images(pipe))


def calls_transformer(pipe: Any, latents: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        assert torch.equal(other_output(pipe), pipe.references[0]), "another output than without recording"


def calls_transformer_with_gradients(pipe: Any, latents: torch.Tensor | None = None) -> None:
    with torch.enable_grad():
        output = other_output(pipe)
    assert output.requires_grad and torch.equal(output, pipe.references[0]), "another output than without recording"


def calls_other_pipeline(pipe: Any, latents: torch.Tensor | None = None) -> None:
    assert torch.equal(other_images(pipe), pipe.references[1]), "other images than without recording"


def calls_transformer_in_a_thread(pipe: Any, latents: torch.Tensor) -> None:
    found = []

    def call() -> None:
        with torch.no_grad():
            found.append(other_output(pipe))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert torch.equal(found[0], pipe.references[0]), "another output than without recording"


def trains_otherwise(pipe: Any) -> None:
    """Adds the gradient of another loss."""
    with torch.enable_grad():
        other_output(pipe).square().mean().backward()


def previews(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    config = pipe.vae.config
    images = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pt")


def previews_without_gradients(pipe: Any, latents: torch.Tensor) -> None:
    with torch.no_grad():
        assert previews(pipe, latents).numpy().shape == (2, 3, 8, 8)


def previews_detached(pipe: Any, latents: torch.Tensor) -> None:
    images = previews(pipe, latents.detach()).float().cpu().numpy().transpose(0, 2, 3, 1)
    assert len(pipe.image_processor.numpy_to_pil(images)) == 2


def previews_as_they_are(pipe: Any, latents: torch.Tensor) -> None:
    """As it is written for inference, where no gradients are on; nor are they here for the oracle."""
    config = pipe.vae.config
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_patched(type(pipe), "__call__")):
        images = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        assert len(pipe.image_processor.postprocess(images, output_type="pil")) == 2


def logs_as_numbers(pipe: Any, latents: torch.Tensor) -> None:
    assert latents.std().item() > 0 and len(latents.flatten().tolist()) and latents.detach().numpy().size


class DraftsItsNoise(PlainLoop):
    """Another pipeline with the same transformer makes the image to begin with."""

    def started(self, latents: torch.Tensor) -> torch.Tensor:
        return 0.9 * latents + 0.1 * self.other(**sd3_call(self, num_inference_steps=2, output_type="latent")).images


class DraftsWithGradients(PlainLoop):
    """The same, by the code of the other pipeline without its decorator."""

    def started(self, latents: torch.Tensor) -> torch.Tensor:
        drafted = SD3_CODE(self.other, **sd3_call(self, num_inference_steps=2, output_type="latent")).images
        return 0.9 * latents + 0.1 * drafted


class Refines(PlainLoop):
    """One more call of the transformer between the loop and the decoder."""

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return super().pictures(latents - 0.1 * self.velocity(latents, self.scheduler.timesteps[-1]))


class ForwardForTheUnconditional(PlainLoop):
    """Calls `forward` itself for one of the branches."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (words, pooled), (no_words, no_pooled) = self.texts
        conditional = self.branch(latents, timestep, words, pooled)
        unconditional = self.transformer.forward(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=no_words,
            pooled_projections=no_pooled,
            return_dict=False,
        )[0]
        return unconditional + GUIDANCE * (conditional - unconditional)


class WarmsUp(PlainLoop):
    """Calls the transformer once before the loop and takes no notice of what it returns."""

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        self.branch(latents, self.scheduler.timesteps[0], *self.texts[0])
        return super().sampled(latents, steps)


USES = "other|another|outside|after the last|call|twice|second|loop"
rule_5 = adding(5, USES)

for use, name in (
    (calls_other_pipeline, "another pipeline with the same transformer is called"),
    (calls_transformer, "the transformer is called"),
    (calls_transformer_with_gradients, "the transformer is called with gradients"),
):
    is_table = use is not calls_transformer_with_gradients
    rule_5(
        f"after the rollout {name}",
        sd3(),
        "right",
        prepare=with_references,
        in_block=use,
        methods=("full", "draft-k", "refl"),
        is_table=is_table,
    )
    rule_5(f"in a step callback {name}", sd3(), "right", prepare=with_references, call=stepping(looking(use)))
rule_5("another loss is differentiated after the rollout", sd3(), "right", in_block=trains_otherwise)
rule_5(
    "in a step callback a thread calls the transformer",
    sd3(),
    "right",
    prepare=with_references,
    call=stepping(looking(calls_transformer_in_a_thread)),
)
rule_5(
    "step callback sets the scheduler back a step",  # the next step has the sigmas of this one again
    sd3(),
    cause="step|scheduler",
    call=stepping(at_step(1, lambda pipe: setattr(pipe.scheduler, "_step_index", pipe.scheduler._step_index - 1))),
)
rule_5("another pipeline drafts the noise", DraftsItsNoise, "either", prepare=with_references)
rule_5("another pipeline's code drafts the noise", DraftsWithGradients, prepare=with_references)
rule_5("the transformer refines after the loop", Refines, "either")
rule_5("forward is called itself for one branch", ForwardForTheUnconditional, "either", cause="forward|" + USES)
rule_5("the transformer is warmed up before the loop", WarmsUp, "either")
for look, name in (
    (previews_without_gradients, "shows a preview under no_grad"),
    (previews_detached, "shows a preview of detached latents"),
    (logs_as_numbers, "logs latents as numbers"),
):
    rule_5(f"step callback {name}", sd3(), "right", call=stepping(looking(look)))
rule_5(
    "step callback shows a preview while decoding is in parts",
    sd3(),
    "right",
    call=stepping(looking(previews_without_gradients)),
    options={"samples_per_decode": 1},
)
rule_5(
    "step callback shows a preview as it is written for inference",
    sd3(),
    "either",
    cause="preview|callback.*(detach|no_grad)",
    call=stepping(looking(previews_as_they_are)),
)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 6: which branch is the unconditional one
# ---------------------------------------------------------------------------------------------------------------------


class AlwaysGuided(StableDiffusion3Pipeline):
    """Computes both branches whatever the scale."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return True


class TwoNegatives(PlainLoop):
    """Guides away from two prompts, by different amounts."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (words, pooled), (no_words, no_pooled) = self.texts
        wanted = self.branch(latents, timestep, words, pooled)
        first = self.branch(latents, timestep, no_words, no_pooled)
        second = self.branch(latents, timestep, words.flip(0), pooled.flip(0))
        return wanted + 2.0 * (wanted - first) + 1.5 * (wanted - second)


def guided(scale: Any) -> Call:
    return lambda pipe: sd3_call(pipe, guidance_scale=scale)


def sets_scale(scale: float) -> Callable[[Any], None]:
    return lambda pipe: setattr(pipe, "_guidance_scale", scale)


class WithNumber(SD3Transformer2DModel):
    """Also returns a number for the whole batch, as for balancing the load of experts."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (output,) = super().forward(*args, **{**kwargs, "return_dict": False})
        return output, output.square().mean()


fading = stepping(looking(lambda pipe, latents: setattr(pipe, "_guidance_scale", pipe._guidance_scale - 0.5)))
rule_6 = adding(6, "guidance|unconditional")
# Gradients through the conditional branch alone.
conditional = functools.partial(rule_6, options={"unconditional_gradient": False}, detached=True)
guided_always = as_class(AlwaysGuided)
TENSOR = torch.tensor(-2.0, dtype=torch.float64)

conditional(
    "guidance scale of -2", guided_always, call=guided(-2.0), methods=WITH_DRAFT, refused_by=WITH_DRAFT, is_table=True
)
conditional("guidance scale of -2 as a tensor", guided_always, call=guided(TENSOR))
conditional("guidance scale of -2 as numpy's number", guided_always, call=guided(np.float64(-2.0)))
conditional(
    "guidance scale for each sample, one of them negative",
    guided_always,
    call=guided(torch.tensor([GUIDANCE, -2.0], dtype=torch.float64).view(2, 1, 1, 1)),
)
conditional("step callback turns guidance negative", guided_always, call=switching(sets_scale(-2.0)))
conditional(
    "step callback hides that guidance was negative",
    guided_always,
    call=stepping(at_step(STEPS - 1, sets_scale(GUIDANCE)), guidance_scale=-2.0),
)
rule_6(
    "guides away from two prompts, conditional branch alone", TwoNegatives, options={"unconditional_gradient": False}
)
rule_6(
    "skip-layer guidance, conditional branch alone",
    sd3(),
    call=lambda pipe: sd3_call(pipe, **SKIPPING),
    options={"unconditional_gradient": False},
)
for scale in (0.5, 1.0):
    conditional(f"guidance scale of {scale}, conditional branch alone", guided_always, "either", call=guided(scale))
rule_6(
    "diffusers' callback that cuts guidance off",
    sd3(),
    "either",
    call=lambda pipe: sd3_call(
        pipe,
        prompt=PROMPTS[:1],
        callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    ),
    methods=MANY,
)
# Look alike.
conditional(
    "transformer returns a number for its whole batch, too",
    changed(sd3(), lambda pipe: setattr(pipe.transformer, "__class__", WithNumber)),
    "right",
)
conditional("guidance scale of 3.5, conditional branch alone", guided_always, "right", methods=MANY)
conditional("scale is set after the rollout", guided_always, "right", in_block=sets_scale(-2.0))
rule_6("guidance scale of -2, both branches", guided_always, "right", call=guided(-2.0))
rule_6("step callback fades guidance", sd3(), "right", call=fading)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 7: the velocity anchor compares with the model without everything that is trained
# ---------------------------------------------------------------------------------------------------------------------

BETA = 0.2


@dataclass(frozen=True, eq=False)
class Anchored:
    """A model for the velocity anchor.

    Attributes:
        name: what is trained.
        build: makes the pipeline.
        base: makes a pipeline whose transformer is the same without everything that is trained.
        must: see `Violation`.
        cause: see `Violation`.
    """

    name: str
    build: Callable[[], Any]
    base: Callable[[], Any]
    must: Must = "either"
    cause: str = "velocity_anchor|anchor"


def run_anchored(anchored: Anchored) -> Outcome:
    """Sweep with a velocity anchor; the difference is the larger of the anchor's and the gradient's."""
    pipe = anchored.build()
    trained = transformer_parameters(pipe)
    surroundings = Surroundings(pipe)
    callback = new_callback("full", velocity_anchor=BETA)
    try:
        with callback.record(pipe):
            images = pipe(**sd3_call(pipe)).images
        rewards = along_a_direction(pipe, images)
        out = callback.backward(rewards, objective=lambda rewards, weights: minus_mean(pipe, rewards))
    except (RecordingError, ValueError) as error:
        left = surroundings.changes()
        left += [f"a gradient of {name}" for name, tensor in trained.items() if tensor.grad is not None][:1]
        return Outcome(type(pipe).__name__, str(error), None, tuple(left))
    anchor, wanted = expected_anchor(anchored)
    of_value = abs(out.anchor.item() - anchor) / anchor
    of_gradient = relative_difference(gradients(trained), wanted)
    return Outcome(type(pipe).__name__, None, max(of_value, of_gradient), tuple(surroundings.changes()))


def expected_anchor(anchored: Anchored) -> tuple[float, dict[str, torch.Tensor]]:
    """The anchor, and the gradient of loss and anchor by autograd through the undecorated call."""
    pipe, base = anchored.build(), anchored.base().transformer
    trained = transformer_parameters(pipe)
    penalties = []

    def watch(module: torch.nn.Module, args: Any, inputs: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        with torch.no_grad():
            of_base = base(**inputs)[0]
        penalties.append((output[0] - of_base).square().mean())

    pipe.transformer.register_forward_hook(watch, with_kwargs=True)
    images = type(pipe).__call__.__wrapped__(pipe, **sd3_call(pipe)).images
    anchor = BETA * sum(penalties)
    (minus_mean(pipe, along_a_direction(pipe, images)) + anchor).backward()
    return anchor.item(), gradients(trained)


def trained_bias(pipe: Any) -> None:
    bias = pipe.transformer.proj_out.bias
    bias.data += 0.7
    bias.requires_grad_(True)


def trained_norm(pipe: Any) -> None:
    weight = pipe.transformer.norm_out.linear.weight
    weight.data *= 1.3
    weight.requires_grad_(True)


def trained_lora_biases(pipe: Any) -> None:
    """What training does to the biases that `bias="lora_only"` trains."""
    for name, parameter in pipe.transformer.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data += 0.3


def trained_branches(pipe: Any) -> None:
    with_branches(pipe)
    for processor in pipe.transformer.attn_processors.values():
        torch.nn.init.normal_(processor.second.weight)


def trains_branches(pipe: Any) -> None:
    for processor in pipe.transformer.attn_processors.values():
        processor.requires_grad_(True)


def style_and_trained(pipe: Any) -> None:
    """A LoRA for the style, which is frozen, and another one that is trained."""
    adapter(lora(), "style")(pipe)
    frozen(pipe)
    adapter(lora())(pipe)
    pipe.transformer.set_adapters(["style", "default"])
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_("default" in name)


STOCK = changed(sd3(), frozen)
ANCHORED = [
    Anchored("modules_to_save beside the LoRA", changed(STOCK, adapter(lora(modules_to_save=["proj_out"]))), STOCK),
    Anchored("trained bias beside the LoRA", changed(STOCK, adapter(lora()), trained_bias), STOCK),
    Anchored(
        "LoRA that trains its layers' biases",
        changed(STOCK, adapter(lora(bias="lora_only")), trained_lora_biases),
        STOCK,
    ),
    Anchored("trained modulation beside the LoRA", changed(STOCK, adapter(lora()), trained_norm), STOCK),
    Anchored(
        "trained attention processors beside the LoRA",
        changed(STOCK, trained_branches, adapter(lora()), trains_branches),
        STOCK,
    ),
    Anchored(
        "frozen LoRA beside the trained one",
        changed(STOCK, style_and_trained),
        changed(STOCK, adapter(lora(), "style")),
    ),
    Anchored("all weights", sd3(), sd3(), "refused", "LoRA|adapter"),
    Anchored("LoRA", changed(STOCK, adapter(lora())), STOCK, "right"),
    Anchored("weight-decomposed LoRA", changed(STOCK, adapter(lora(use_dora=True))), STOCK, "right"),
    Anchored("LoHa", changed(STOCK, adapter(LoHaConfig(r=2, target_modules=ATTENTION))), STOCK, "right"),
    Anchored("LoRA with a weight of 0.5", changed(STOCK, adapter(lora()), weighs(0.5)), STOCK, "right"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Rule 8: what nothing but a comparison with autograd can find
# ---------------------------------------------------------------------------------------------------------------------


class KnowsItIsCalled(StableDiffusion3Pipeline):
    """Keeps a value outside of every component, that its call alone sets."""

    inside: dict[str, float]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.inside["factor"] = 1.0
        try:
            return SD3_CODE(self, *args, **kwargs)
        finally:
            self.inside["factor"] = 0.25


class _Times(torch.autograd.Function):
    """Returns its input and multiplies the gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        context.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.factor * gradient, None


def scale_in_a_closure(pipe: Any) -> None:
    """The own layer's scale is not an attribute but a value that its method sees."""
    pipe.inside = {"factor": 0.25}
    layer = Zeros(pipe.transformer.context_embedder)
    inside = pipe.inside
    layer.masked = lambda hidden: inside["factor"] * hidden
    pipe.transformer.requires_grad_(False)
    pipe.transformer.context_embedder = layer


def gradient_in_a_closure(pipe: Any) -> None:
    """A part multiplies the gradient, not the value, by what its closure holds."""
    pipe.inside = {"factor": 0.25}
    forward, inside = pipe.transformer.transformer_blocks[0].ff.forward, pipe.inside
    pipe.transformer.transformer_blocks[0].ff.forward = lambda x: _Times.apply(forward(x), inside["factor"])


class OwnGenerator(Zeros):
    """Draws from a generator of its own."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base)
        self.generator = torch.Generator().manual_seed(0)

    def masked(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rand(hidden.shape, generator=self.generator, dtype=hidden.dtype)


class ScalesGradients(Float64Scheduler):
    """Its steps double the velocity's gradient."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return super().step(_Doubled.apply(model_output), *args, **kwargs)


UNSEEN = [
    Violation("scheduler that scales gradients", 8, changed(sd3(), scheduled_by(ScalesGradients))),
    Violation("scale in a closure that the call sets", 8, changed(as_class(KnowsItIsCalled), scale_in_a_closure)),
    Violation(
        "gradient's factor in a closure that the call sets",
        8,
        changed(as_class(KnowsItIsCalled), gradient_in_a_closure),
    ),
    Violation(
        "mask that numpy draws",
        8,
        with_zeros(masking(lambda layer, x: x * torch.from_numpy(np.random.rand(*x.shape) > 0.5))),
    ),
    Violation(
        "dropout that Python draws",  # of samples
        8,
        with_zeros(masking(lambda layer, x: x * torch.tensor([random.random() > 0.5 for _ in x]).view(-1, 1, 1))),
    ),
    Violation("mask from a generator of the layer's own", 8, with_zeros(OwnGenerator)),
]


def main() -> None:
    """Print what becomes of each violation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a violation's name; all by default")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    for violation in [*VIOLATIONS, *UNSEEN]:
        for method in violation.methods:
            if names and not any(name in violation.name for name in names):
                continue
            try:
                outcome = run(violation, method)
            except Exception as error:
                found = state = f"{type(error).__name__}: {error}"
            else:
                found = problem(violation, method, outcome)
                state = outcome.refused or f"accepted, relative error {outcome.difference}"
            print(f"{'BAD' if found else 'ok '} {violation.rule} {violation.name} [{method}]: {state}")


if __name__ == "__main__":
    main()
