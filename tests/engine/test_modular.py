# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines against autograd through their own blocks, with every `torch.no_grad` switched off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from families import FAMILIES
from families.oracle import gradients, project
from torch.utils._pytree import tree_map
from violations import METHODS, new_callback, surrogate_steps

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError

CLASSES = (
    "StableDiffusion3",
    "Flux",
    "Flux2",
    "Flux2Klein",
    "QwenImage",
    "Krea2",
    "ErnieImage",
    "Wan",
    "HunyuanVideo15",
)

Call = Callable[..., Any]


def build(name: str, guider: Any = None) -> tuple[ModularPipeline, Call]:
    """A tiny modular pipeline without its text encoders, and its call."""
    family = next(each for each in FAMILIES if each.pipeline == f"{name}Pipeline")
    stock = family.build()
    blocks = type(getattr(diffusers, f"{name}ModularPipeline")()._blocks)()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    found = {key: part for key, part in stock.components.items() if part is not None and key in pipe._component_specs}
    pipe.update_components(**found)
    if "guider" in pipe._component_specs:
        pipe.update_components(guider=guider or ClassifierFreeGuidance(guidance_scale=3.0))
    pipe.set_progress_bar_config(disable=True)
    known = {parameter.name for parameter in blocks.inputs}
    arguments = {key: value for key, value in family.cases(stock)[-1].arguments.items() if key in known}

    def call(steps: int = 3, output: str | None = family.output + "s") -> Any:
        copied = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments)
        generator = torch.Generator().manual_seed(1)
        return pipe(**copied, num_inference_steps=steps, generator=generator, output_type="pt", output=output)

    return pipe, call


@contextmanager
def nothing_switches_gradients_off() -> Iterator[None]:
    with (
        mock.patch.object(torch.no_grad, "__enter__", lambda self: None),
        mock.patch.object(torch.no_grad, "__exit__", lambda self, *exception: None),
    ):
        yield


def difference(pipe: ModularPipeline, call: Call, callback: FlowBPCallback, steps: int = 3) -> float:
    """How far a sweep is from autograd, |found - expected| / |expected|."""
    with callback.record(pipe):
        images = call(steps)
    callback.backward(project(images), objective=lambda rewards, weights: rewards.sum())
    found = gradients(pipe)
    with surrogate_steps(pipe, callback.trajectory.surrogate), nothing_switches_gradients_off():
        project(call(steps)).sum().backward()
    expected = gradients(pipe)
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CLASSES)
def test_the_gradient_is_autograds(name: str):
    pipe, call = build(name)
    callback = FlowBPCallback(get_method("full"), unconditional_gradient=True)
    assert difference(pipe, call, callback) < 1e-6
    assert not any(
        getattr(type(block).__call__, "is_flowbp_patch", False) for block in pipe._blocks.sub_blocks.values()
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "draft-lv")])
def test_every_row(method: str):
    pipe, call = build("StableDiffusion3")
    assert difference(pipe, call, new_callback(method), steps=6) < 1e-6


def test_the_whole_state_may_be_asked_for():
    pipe, call = build("StableDiffusion3")
    callback = FlowBPCallback(get_method("flowbp-sparse", num_active=1))
    with callback.record(pipe):
        state = call(output=None)
    callback.backward(project(state.get("images")))
    assert gradients(pipe).norm() > 0


def test_guidance_with_memory_is_refused():
    pipe, call = build("StableDiffusion3", AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5))
    with pytest.raises(RecordingError, match="guidance with memory"), FlowBPCallback(get_method("full")).record(pipe):
        call()


def layer(**skipped: Any) -> LayerSkipConfig:
    return LayerSkipConfig([0], "transformer_blocks", skip_attention=False, **skipped)


def skips_a_layer(scale: float = 3.0) -> SkipLayerGuidance:
    return SkipLayerGuidance(scale, 2.8, 0, 1, skip_layer_config=layer())


GUIDERS = {
    "skip-layer guidance": skips_a_layer,
    "skip-layer guidance alone": lambda: skips_a_layer(1.0),
    "autoguidance": lambda: AutoGuidance(3.0, auto_guidance_config=layer()),
    "smoothed energy guidance": lambda: SmoothedEnergyGuidance(
        3.0, 2.8, seg_guidance_start=0, seg_guidance_stop=1, seg_guidance_layers=[0]
    ),
    "tangential guidance": lambda: TangentialClassifierFreeGuidance(3.0),
    "projected guidance": lambda: AdaptiveProjectedGuidance(3.0, eta=0.0),
    "CFG-Zero*": lambda: ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0),
    "CFG-Zero*, no first step": lambda: ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=1),
}


@pytest.mark.parametrize("method", ["full", "flowbp-bridge"])
@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(name: str, method: str):
    pipe, call = build("StableDiffusion3", GUIDERS[name]())
    assert difference(pipe, call, new_callback(method), steps=4) < 1e-6


def test_a_guider_that_perturbs_attention():
    """Of those that are built here, it knows the attention processors of Qwen-Image alone."""
    perturbed = LayerSkipConfig(
        [0], "transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    pipe, call = build("QwenImage", PerturbedAttentionGuidance(3.0, 2.8, 0, 1, perturbed_guidance_config=perturbed))
    assert difference(pipe, call, new_callback("full")) < 1e-6


def test_dropout_of_a_part_of_a_layer_is_refused_and_leaves_no_hook():
    pipe, call = build("StableDiffusion3", AutoGuidance(3.0, auto_guidance_config=layer(dropout=0.5)))
    with pytest.raises(RecordingError, match="drops 0.5 .* use dropout 1"), new_callback("full").record(pipe):
        call()
    assert hooks_on(pipe) == 0


def hooks_on(pipe: ModularPipeline) -> int:
    return sum(
        len(part._diffusers_hook.hooks) for part in pipe.transformer.modules() if hasattr(part, "_diffusers_hook")
    )


def test_an_error_in_mid_call_takes_the_guiders_hooks_off():
    pipe, call = build("StableDiffusion3", skips_a_layer())

    def fails_where_there_are_hooks(*_: Any) -> None:
        if hooks_on(pipe):
            raise ZeroDivisionError

    pipe.transformer.register_forward_pre_hook(fails_where_there_are_hooks)
    with pytest.raises(ZeroDivisionError), FlowBPCallback(get_method("full")).record(pipe):
        call()
    assert hooks_on(pipe) == 0


def test_a_components_manager_that_offloads_is_refused():
    pipe, _ = build("StableDiffusion3")
    pipe._components_manager = diffusers.ComponentsManager()
    pipe._components_manager._auto_offload_enabled = True
    with (
        pytest.raises(RecordingError, match=r"disable_auto_cpu_offload\(\)"),
        FlowBPCallback(get_method("full")).record(pipe),
    ):
        pass
