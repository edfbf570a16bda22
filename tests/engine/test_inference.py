# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`BaseForLast` on a tiny pipeline: which steps run with the LoRA, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.callbacks import MultiPipelineCallbacks
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import tiny_ovis_image_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, add_random_lora, tiny_sd3_pipeline

from flowbp.inference import BaseForLast, call_arguments, lora_models

STEPS = 6


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return tiny_sd3_pipeline(torch.float32, lora_rank=2)


def draw(pipe: DiffusionPipeline, **call: Any) -> torch.Tensor:
    return pipe(
        "a 7",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        height=8,
        width=8,
        guidance_scale=3.5,
        output_type="pt",
        **call,
    ).images


def draw_sd3(pipe: DiffusionPipeline, callback: Callable | None = None) -> torch.Tensor:
    return draw(pipe, max_sequence_length=MAX_SEQUENCE_LENGTH, callback_on_step_end=callback)


def adapters_on(pipe: DiffusionPipeline) -> bool:
    states = {not layer.disable_adapters for layer in pipe.transformer.modules() if isinstance(layer, BaseTunerLayer)}
    assert len(states) == 1
    return states.pop()


@pytest.mark.parametrize("last", [1, 2, STEPS - 1])
def test_the_last_steps_are_the_base_model_s(pipe: StableDiffusion3Pipeline, last: int) -> None:
    # Another way to the same: the transformer itself counts its calls, one a step, and switches before them.
    seen = []

    def count(module: torch.nn.Module, _: Any) -> None:
        seen.append(adapters_on(pipe))
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(len(seen) <= STEPS - last)

    handle = pipe.transformer.register_forward_pre_hook(count)
    expected = draw_sd3(pipe)
    handle.remove()
    pipe.transformer.enable_lora()
    seen.clear()
    watch = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(adapters_on(pipe)))
    found = draw_sd3(pipe, BaseForLast(last))
    watch.remove()
    assert seen == [True] * (STEPS - last) + [False] * last
    assert adapters_on(pipe)
    assert torch.equal(found, expected)


def test_none_of_the_steps_is_the_lora_and_other_callbacks_may_stand_beside_it(pipe: StableDiffusion3Pipeline) -> None:
    aligned = draw_sd3(pipe)
    assert torch.equal(draw_sd3(pipe, BaseForLast(0)), aligned)
    both = draw_sd3(pipe, MultiPipelineCallbacks([BaseForLast(2), BaseForLast(0)]))
    pipe.disable_lora()
    base = draw_sd3(pipe)
    pipe.enable_lora()
    assert torch.equal(both, draw_sd3(pipe, BaseForLast(2)))
    distances = [(picture - base).abs().mean().item() for picture in (aligned, both)]
    assert distances[0] > distances[1] > 1e-3


def test_a_pipeline_without_a_lora_loader() -> None:
    pipe = tiny_ovis_image_pipeline()
    add_random_lora(pipe, 2, torch.Generator().manual_seed(0))
    assert lora_models(pipe) == [pipe.transformer]
    call = {"max_sequence_length": 136}
    aligned, mixed = draw(pipe, **call), draw(pipe, callback_on_step_end=BaseForLast(2), **call)
    pipe.transformer.disable_lora()
    assert not torch.equal(mixed, aligned) and not torch.equal(mixed, draw(pipe, **call))


def test_refusals(pipe: StableDiffusion3Pipeline) -> None:
    with pytest.raises(ValueError, match="expected 0 steps or more, got -1"):
        BaseForLast(-1)
    with pytest.raises(ValueError, match="expected more than 6 steps in a call, got 6.*disable_lora"):
        draw_sd3(pipe, BaseForLast(STEPS))
    assert adapters_on(pipe)
    with pytest.raises(ValueError, match="expected a LoRA, this StableDiffusion3Pipeline has none"):
        draw_sd3(tiny_sd3_pipeline(torch.float32), BaseForLast(1))


def test_call_arguments_are_those_of_the_pipeline() -> None:
    found = call_arguments(StableDiffusion3Pipeline, {"height": 8, "num_frames": None, "sigmas": [1.0]})
    assert found == {"height": 8, "sigmas": [1.0], "output_type": "pt", "return_dict": False}
    for name in ("guidence_scale", "generator"):
        with pytest.raises(ValueError, match=f"takes no argument {name} here"):
            call_arguments(StableDiffusion3Pipeline, {name: 1})
