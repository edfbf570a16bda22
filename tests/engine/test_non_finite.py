# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite go through recording and sweep like others, and switch no check off for what is finite.

A script skips such an update on all processes together, so each of them must come to the end of its `backward`, with
as many forward passes as the others.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from broken_loops import BROKEN, BeginsLater, MovingAverage, WordsDrift, check_refused
from brute_force import relative_difference, toy_reward
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from gradient_rows import NOISE_SEED, ROWS, found_gradients
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from violations import PlainLoop, changed, loop

from flowbp import FlowBPCallback, Objective, Surrogate, Term, get_method
from flowbp.callback import BackwardOutput
from flowbp.checks import RecordingError

PROMPTS = ["a 42", "the 7"]
Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]


class Rescales(PlainLoop):
    """Guidance whose result gets the size of the conditional output: a glue that is not linear."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (self.branch(latents, timestep, *text) for text in self.texts)
        guided = unconditional + 3.5 * (conditional - unconditional)
        return guided * conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)


class RescalesInPlace(Rescales):
    """It writes inputs and velocities over the last ones, whose place in the graph stays, with gradients of 0."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self.seen:
            self.seen = [torch.zeros_like(latents), torch.zeros_like(latents)]
        inputs, outputs = self.seen
        inputs[:] = latents / latents.std()
        outputs[:] = super().velocity(inputs.clone(), timestep)
        return outputs.clone()


class RescalesAndRemembers(MovingAverage, Rescales):
    """Guidance with memory, which is refused."""


class Clamps(PlainLoop):
    """Where a velocity is NaN it is replaced, and its gradient is 0."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().velocity(latents, timestep).nan_to_num(0.0)


def callback_of(name: str, **options: Any) -> FlowBPCallback:
    return FlowBPCallback(
        get_method(name, **ROWS[name]),
        generator=torch.Generator().manual_seed(3),
        noise_generator=torch.Generator().manual_seed(NOISE_SEED),
        **options,
    )


def call(guidance_scale: float = 3.5) -> dict[str, Any]:
    return {
        "prompt": PROMPTS,
        "num_inference_steps": 7,
        "guidance_scale": guidance_scale,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }


def train(
    pipe: DiffusionPipeline, callback: FlowBPCallback, arguments: dict[str, Any], reward: Reward = toy_reward
) -> tuple[dict[str, torch.Tensor], BackwardOutput, int]:
    """Gradients by name, what `backward` returned, and how many forward passes it made."""
    pipe.transformer.zero_grad(set_to_none=True)
    images, passes = [], []
    # There before the recording: hooks that come between record and backward are refused.
    handle = pipe.transformer.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    with callback.record(pipe):
        for _ in range(1 + callback.copies):
            output = pipe(**arguments)
            images.append(output if isinstance(output, torch.Tensor) else output.images)
    passes.clear()
    try:
        out = callback.backward(reward, torch.cat(images), PROMPTS, objective=Objective(clip=0.55))
    finally:
        handle.remove()
    return found_gradients(pipe), out, len(passes)


@contextmanager
def broken_parameter(pipe: DiffusionPipeline, value: float = math.nan) -> Iterator[None]:
    """One entry of the transformer's first trainable matrix is not finite, so that every output is NaN."""
    parameter = next(each for each in pipe.transformer.parameters() if each.requires_grad)
    before = parameter.detach().clone()
    parameter.data.view(-1)[0] = value
    try:
        yield
    finally:
        parameter.data.copy_(before)


@contextmanager
def broken_sample(pipe: DiffusionPipeline) -> Iterator[None]:
    """The first row of every batch that the transformer computes is NaN."""

    def spoil(module: torch.nn.Module, inputs: object, returned: torch.Tensor) -> torch.Tensor:
        spoiled = returned.clone()
        spoiled[0] = math.nan
        return spoiled

    handle = pipe.transformer.proj_out.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def is_spoiled(gradients: dict[str, torch.Tensor]) -> bool:
    return any(not gradient.isfinite().all() for gradient in gradients.values())


def lora_pipeline() -> StableDiffusion3Pipeline:
    return tiny_sd3_pipeline(seed=9, lora_rank=2)


# ---------------------------------------------------------------------------------------------------------------------
# Not finite, and no error
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unconditional_gradient", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("name", ["flowbp-sparse", "flowbp-lagrange", "draft-lv", "full"])
def test_parameters_of_nan_end_as_gradients_of_nan(name: str, guidance_scale: float, unconditional_gradient: bool):
    """With strict checks, an anchor and measured norms, and as many passes as a finite update makes."""
    pipe = lora_pipeline()
    options = {
        "unconditional_gradient": unconditional_gradient,
        "strict": True,
        "velocity_anchor": 0.1,
        "measure_gradients": True,
    }
    finite, _, passes = train(pipe, callback_of(name, **options), call(guidance_scale))
    assert not is_spoiled(finite)
    with broken_parameter(pipe):
        gradients, out, passes_of_nan = train(pipe, callback_of(name, **options), call(guidance_scale))
    assert is_spoiled(gradients) and passes_of_nan == passes
    assert out.rewards.isnan().all() and out.loss.isnan() and out.anchor.isnan()
    assert all(norm.isnan() for norm in out.gradient_norms.values())
    again, _, _ = train(pipe, callback_of(name, **options), call(guidance_scale))
    assert relative_difference(again, finite) == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_velocities_end_as_gradients_of_nan(value: float):
    pipe = tiny_sd3_pipeline(torch.float32)
    pipe.transformer.proj_out.bias.data[0] = value
    callback = callback_of("flowbp-sparse")
    gradients, out, _ = train(pipe, callback, call())
    assert is_spoiled(gradients) and not out.loss.isfinite()


@pytest.mark.parametrize("unconditional_gradient", [False, True])
@pytest.mark.parametrize("pipeline_class", [Rescales, RescalesInPlace, Clamps])
def test_a_glue_of_nan(pipeline_class: type[PlainLoop], unconditional_gradient: bool):
    """Probes do not find the unconditional branch, gradients of 0 come back as NaN, and others as 0."""
    pipe = loop(pipeline_class, float64_scheduler=False)()
    surrogate = Surrogate("sample", (Term(1, -0.3), Term(2, -0.2, 0.5), Term(5, -0.1, 1.0)))

    def callback() -> FlowBPCallback:
        return FlowBPCallback(surrogate, unconditional_gradient=unconditional_gradient)

    finite, _, passes = train(pipe, callback(), {"prompts": PROMPTS, "steps": 6})
    assert not is_spoiled(finite) and passes == (6 if unconditional_gradient else 3)
    with broken_parameter(pipe):
        gradients, _, passes_of_nan = train(pipe, callback(), {"prompts": PROMPTS, "steps": 6})
    assert is_spoiled(gradients) or pipeline_class is Clamps
    assert passes_of_nan == passes
    with broken_sample(pipe):
        _, _, passes_of_nan = train(pipe, callback(), {"prompts": PROMPTS, "steps": 6})
    assert passes_of_nan == passes
    again, _, _ = train(pipe, callback(), {"prompts": PROMPTS, "steps": 6})
    assert relative_difference(again, finite) == 0


@pytest.mark.parametrize("as_function", [False, True])
def test_a_reward_of_nan_for_one_sample(as_function: bool):
    pipe = lora_pipeline()

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return toy_reward(images, prompts) * torch.tensor([1.0, math.nan])

    callback = callback_of("flowbp-lagrange")
    with callback.record(pipe):
        images = pipe(**call()).images
    if as_function:
        out = callback.backward(reward, images, PROMPTS)
    else:
        out = callback.backward(reward(images, PROMPTS))
    assert out.rewards.isnan().tolist() == [False, True] and out.loss.isnan()
    assert is_spoiled(found_gradients(pipe))


def test_pictures_that_are_not_finite_are_not_scored():
    """A reward may refuse them, or take them for bad ones. The others' rewards stay what they are."""
    pipe = lora_pipeline()
    scored = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert images.isfinite().all()
        scored.extend(prompts)
        return toy_reward(images, prompts)

    with broken_sample(pipe):
        gradients, out, _ = train(pipe, callback_of("flowbp-sparse", samples_per_decode=1), call(1.0), reward)
    assert scored == PROMPTS[1:]
    assert out.rewards.isnan().tolist() == [True, False] and out.loss.isnan() and is_spoiled(gradients)


# ---------------------------------------------------------------------------------------------------------------------
# What is finite is checked all the same
# ---------------------------------------------------------------------------------------------------------------------


# The words of all samples follow the mean of the latents, so nothing finite is left to tell.
@pytest.mark.parametrize(
    "pipeline_class", [each for each in BROKEN if each is not WordsDrift], ids=lambda each: each.__name__
)
def test_a_broken_loop_is_refused_beside_a_sample_of_nan(pipeline_class: type[PlainLoop]):
    def set_scheduler(pipe: PlainLoop) -> None:
        if pipeline_class is BeginsLater:
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)

    build = changed(loop(pipeline_class, float64_scheduler=False), set_scheduler)
    check_refused(build, "full", BROKEN[pipeline_class], around=broken_sample)


def test_memory_is_refused_beside_a_sample_of_nan():
    """Through a glue whose gradients are NaN for that sample."""
    build = loop(RescalesAndRemembers, float64_scheduler=False)
    check_refused(build, "full", BROKEN[MovingAverage], around=broken_sample)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("spoil", [broken_parameter, broken_sample])
def test_a_broken_replay_is_refused_after_nan(spoil: Callable[[Any], Any], guidance_scale: float):
    """The callback, and the pipeline, that went through NaN refuse a transformer that gives something else."""
    pipe = tiny_sd3_pipeline(torch.float32)
    callback = callback_of("flowbp-sparse")
    with spoil(pipe):
        train(pipe, callback, call(guidance_scale))
    with callback.record(pipe):
        images = pipe(**call(guidance_scale)).images
    pipe.transformer.proj_out.weight.data.mul_(1.01)
    with pytest.raises(RecordingError, match="parameters changed after the rollout was recorded"):
        callback.backward(toy_reward, images, PROMPTS)


def test_a_broken_replay_of_one_sample_is_refused_beside_a_sample_of_nan():
    pipe = tiny_sd3_pipeline(torch.float32)
    callback = callback_of("flowbp-sparse")
    with broken_sample(pipe):
        with callback.record(pipe):
            images = pipe(**call(1.0)).images
        pipe.transformer.proj_out.weight.data.mul_(1.01)
        with pytest.raises(RecordingError, match="parameters changed after the rollout was recorded"):
            callback.backward(toy_reward, images, PROMPTS)


class WrongLength(FlowMatchEulerDiscreteScheduler):
    """Its steps are one percent too long."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(1.01 * model_output, *args, **kwargs)


def test_a_wrong_step_is_refused_beside_a_sample_of_nan():
    def set_scheduler(pipe: PlainLoop) -> None:
        pipe.scheduler = WrongLength()

    found = ("step 0 of WrongLength is not latents + (sigmas[i + 1] - sigmas[i]) * velocity", "stochastic sampling")
    check_refused(changed(loop(PlainLoop), set_scheduler), "full", found, around=broken_sample)
