# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Pipelines that are broken on purpose, each in one way, are refused whatever the method.

First those of `broken_loops`, then real pipelines, schedulers and caches of diffusers that the recorder does not
support.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from broken_loops import BROKEN, BeginsLater, check_refused
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
from violations import STEPS, PlainLoop, Violation, changed, loop, problem, run

# Rows that look at every step, at two of them, at two legs, and at a posterior mean.
METHODS = ("full", "flowbp-sparse", "flowbp-lagrange", "drtune")


def stepping_with(scheduler: Any, pipeline_class: type[PlainLoop] = PlainLoop) -> Callable[[], Any]:
    """Builds a loop with another scheduler."""

    def change(pipe: Any) -> None:
        pipe.scheduler = copy.deepcopy(scheduler)

    return changed(loop(pipeline_class, float64_scheduler=False), change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pipeline_class", BROKEN, ids=lambda pipeline_class: pipeline_class.__name__)
def test_a_broken_loop_is_refused(pipeline_class: type[PlainLoop], method: str):
    build = loop(pipeline_class, float64_scheduler=False)
    if pipeline_class is BeginsLater:
        # Evenly spaced, so that steps have the expected length wherever they are.
        build = stepping_with(FlowMatchEulerDiscreteScheduler(shift=1.0), pipeline_class)
    check_refused(build, method, BROKEN[pipeline_class])


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers, caches and pipelines of diffusers that do not fit
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchLCMScheduler(),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_multistep_and_stochastic_schedulers_are_refused(scheduler: Any, method: str):
    found = f"of {type(scheduler).__name__} is not latents + (sigmas[i + 1] - sigmas[i]) * velocity"
    check_refused(stepping_with(scheduler), method, (found, "use FlowMatchEulerDiscreteScheduler"))


@pytest.mark.parametrize(
    "scheduler_class", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_schedulers_whose_sigmas_are_not_those_of_a_flow_are_refused(scheduler_class: type):
    message = ("PlainLoop: `sigmas` must fall from about 1 to exactly 0, got", "; use a flow")
    check_refused(stepping_with(scheduler_class()), "full", message)


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


def flux_call(pipe: Any, **more: Any) -> dict[str, Any]:
    return {**FLUX_CALL, "generator": torch.Generator().manual_seed(1), **more}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_inside_the_transformer_are_refused(cache: str):
    """They skip parts of a step with what another step computed. Switched off again, the pipeline trains."""
    message = ("the transformer's cache is on", "call pipe.transformer.disable_cache()")
    with_cache = changed(build_flux, lambda pipe: pipe.transformer.enable_cache(CACHES[cache]))
    check_refused(with_cache, "full", message, call=flux_call)
    without_cache = changed(with_cache, lambda pipe: pipe.transformer.disable_cache())
    violation = Violation("off", 0, without_cache, "right", call=flux_call)
    assert problem(violation, "full", run(violation, "full")) is None


def flux(pipeline_class: type[DiffusionPipeline], scheduler: Any) -> Callable[[], DiffusionPipeline]:
    """Builds the tiny FLUX.1 in another pipeline class."""
    return lambda: quiet(pipeline_class(**{**build_flux().components, "scheduler": scheduler}))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_image_to_image_begins_later(method: str, shift: float):
    """FLUX.1-schnell's sigmas are evenly spaced, so each step has the expected length though it is another one."""
    build = flux(FluxImg2ImgPipeline, FlowMatchEulerDiscreteScheduler(shift=shift))
    call = functools.partial(flux_call, image=embeddings(2, 3, 8, 12).sigmoid(), strength=0.75, num_inference_steps=8)
    violation = Violation("strength", 0, build, "right", call=call)
    assert problem(violation, method, run(violation, method)) is None


@pytest.mark.parametrize("method", METHODS)
def test_inpainting(method: str):
    """It pastes the given part of the picture into the latents after every step."""
    build = flux(FluxInpaintPipeline, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    mask = torch.zeros(2, 1, 8, 12)
    mask[:, :, 2:6] = 1
    call = functools.partial(flux_call, image=embeddings(2, 3, 8, 12).sigmoid(), mask_image=mask, strength=1.0)
    violation = Violation("inpainting", 0, build, "right", call=call)
    assert problem(violation, method, run(violation, method)) is None
