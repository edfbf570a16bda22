# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Pipelines that are broken on purpose, each in one way, are refused whatever the method; `test_recording` has more.

First those of `broken_loops`, then real pipelines, schedulers and caches of diffusers that the recorder does not
support.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from broken_loops import ALTERED, BROKEN, PROMPTS, BeginsLater, assert_refused, loop, trained
from brute_force import Sampling, relative_difference, stock_gradients, toy_reward
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from families.family import embeddings
from families.paper import build_flux
from tiny_sd3 import tiny_sd3_pipeline
from violations import GUIDANCE, STEPS, PlainLoop

from flowbp import FlowBPCallback, Surrogate, Term, get_method

# Rows that look at every step, at two of them (several draws), at two legs, and at a posterior mean.
METHODS: dict[str, Callable[[], FlowBPCallback]] = {
    "full": lambda: FlowBPCallback(get_method("full"), unconditional_gradient=True),
    **{
        f"sparse-{seed}": lambda seed=seed: FlowBPCallback(
            get_method("flowbp-sparse", num_active=2), generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(3)
    },
    "lagrange": lambda: FlowBPCallback(get_method("flowbp-lagrange"), generator=torch.Generator().manual_seed(0)),
    "posterior-mean": lambda: FlowBPCallback(
        Surrogate(("posterior_mean", 4), (Term(1, -0.2), Term(3, -0.2, 0.5), Term(4, -0.5)))
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_loop_is_not_refused(method: str):
    trained(loop(PlainLoop), METHODS[method](), prompts=PROMPTS)


def test_the_plain_loop_is_exact():
    pipe = loop(PlainLoop, float64_scheduler=True)
    found = trained(pipe, METHODS["full"](), prompts=PROMPTS)
    images = PlainLoop.__call__.__wrapped__(pipe, PROMPTS)
    expected = torch.autograd.grad(-toy_reward(images, PROMPTS).mean(), list(pipe.transformer.parameters()))
    assert relative_difference(found, dict(zip(found, expected, strict=True))) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pipeline_class", BROKEN, ids=lambda pipeline_class: pipeline_class.__name__)
def test_a_broken_loop_is_refused(pipeline_class: type[PlainLoop], method: str):
    pipe = loop(pipeline_class)
    if pipeline_class is BeginsLater:
        # Evenly spaced, so that steps have the expected length wherever they are.
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert_refused(pipe, METHODS[method](), BROKEN[pipeline_class], prompts=PROMPTS)


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers, caches and pipelines of diffusers that do not fit
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchLCMScheduler(),
]


@pytest.mark.parametrize("method", ["full", "sparse-0", "posterior-mean"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_multistep_and_stochastic_schedulers_are_refused(scheduler: Any, method: str):
    pipe = loop(PlainLoop)
    pipe.scheduler = copy.deepcopy(scheduler)
    name = type(scheduler).__name__
    found = f"of {name} is not latents + (sigmas[i + 1] - sigmas[i]) * velocity"
    assert_refused(pipe, METHODS[method](), (found, "use FlowMatchEulerDiscreteScheduler"), prompts=PROMPTS)


@pytest.mark.parametrize(
    "scheduler_class", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_schedulers_whose_sigmas_are_not_those_of_a_flow_are_refused(scheduler_class: type):
    pipe = loop(PlainLoop)
    pipe.scheduler = scheduler_class()
    with pytest.raises(ValueError, match="PlainLoop: .* must fall from about 1 to exactly 0, got .*; use a flow"):
        with FlowBPCallback(get_method("full")).record(pipe):
            pipe(PROMPTS)


CACHES = {
    "first-block": FirstBlockCacheConfig(threshold=0.1),
    "taylor": TaylorSeerCacheConfig(),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, is_guidance_distilled=True
    ),
}
FLUX_PROMPTS = {"prompt_embeds": embeddings(2, 5, 32), "pooled_prompt_embeds": embeddings(2, 32, seed=1)}
FLUX_CALL = {**FLUX_PROMPTS, "height": 8, "width": 12, "num_inference_steps": STEPS, "output_type": "pt"}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_inside_the_transformer_are_refused(cache: str):
    """They skip parts of a step with what another step computed. Switched off again, the pipeline trains."""
    pipe = build_flux()
    pipe.transformer.enable_cache(CACHES[cache])
    message = ("the transformer's cache is on", "call pipe.transformer.disable_cache()")
    for method in METHODS.values():
        assert_refused(pipe, method(), message, **FLUX_CALL)
    pipe.transformer.disable_cache()
    trained(pipe, METHODS["full"](), **FLUX_CALL)


def flux(pipeline_class: type[DiffusionPipeline], scheduler: Any) -> DiffusionPipeline:
    """The tiny FLUX.1 in another pipeline class."""
    parts = {**build_flux().components, "scheduler": scheduler}
    pipe = pipeline_class(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", METHODS)
def test_image_to_image_is_refused(method: str):
    """FLUX.1-schnell's sigmas are evenly spaced, so each step has the expected length though it is another one."""
    pipe = flux(FluxImg2ImgPipeline, FlowMatchEulerDiscreteScheduler(shift=1.0))
    message = (
        "the scheduler made step 2 of its sigmas, expected step 0",
        "use a text-to-image pipeline or strength 1",
    )
    image = embeddings(2, 3, 8, 12).sigmoid()
    assert_refused(pipe, METHODS[method](), message, **FLUX_CALL, image=image, strength=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_inpainting_is_refused(method: str):
    """It pastes the given part of the picture into the latents after every step."""
    pipe = flux(FluxInpaintPipeline, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    mask = torch.zeros(2, 1, 8, 12)
    mask[:, :, 2:6] = 1
    image = embeddings(2, 3, 8, 12).sigmoid()
    assert_refused(pipe, METHODS[method](), ALTERED, **FLUX_CALL, image=image, mask_image=mask, strength=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Looks alike and is exact
# ---------------------------------------------------------------------------------------------------------------------


def last_latents_doubled(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 2 * inputs["latents"]} if step == STEPS - 1 else {}


def last_latents_doubled_in_place(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": inputs["latents"].mul_(2)} if step == STEPS - 1 else {}


def guidance_fades(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 4.0 - 0.5 * step
    return {}


@pytest.mark.parametrize(
    "step_callback",
    [last_latents_doubled, last_latents_doubled_in_place, guidance_fades],
    ids=lambda call: call.__name__,
)
def test_what_a_callback_may_do(step_callback: Callable[..., dict[str, Any]]):
    """What a callback does to the last latents, or to guidance, is differentiated like the pipeline's own code."""
    pipe = tiny_sd3_pipeline(float64_scheduler=True)
    sampling = Sampling(tuple(PROMPTS), STEPS, GUIDANCE)
    changes = {"callback_on_step_end": step_callback}
    expected = stock_gradients(pipe, sampling, more_arguments=changes)
    unchanged = stock_gradients(pipe, sampling)
    found = trained(pipe, METHODS["full"](), **sampling.call_arguments(), **changes)
    assert relative_difference(found, expected) < 1e-10
    assert relative_difference(unchanged, expected) > 0.01
