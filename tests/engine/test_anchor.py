# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The velocity anchor against one autograd graph of loss and penalty, with a second model as the base.

The brute force builds a surrogate's graph as in `test_gradients.py`, watches the transformer's calls in it, and calls
a transformer of the same weights that never had a LoRA.
"""

import math

import pytest
import torch
from brute_force import Sampling, brute_force, relative_difference, sample, surrogate_graph, toy_reward
from diffusers import StableDiffusion3Pipeline
from gradient_rows import EXACT, PROMPTS, ROWS, drawn_steps, engine, found_gradients
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_sd3 import mixing_samples, tiny_sd3_pipeline
from torch.utils._pytree import tree_unflatten

from flowbp import FlowBPCallback, Objective, get_method
from flowbp.callback import BackwardOutput

BETA = 0.2
SCALE = 0.25
SEED = 9
COUPLED_OR_NOT = ("full", "flowbp-sparse", "flowbp-bridge", "flowbp-lagrange")


def lora_pipeline() -> StableDiffusion3Pipeline:
    return tiny_sd3_pipeline(seed=SEED, lora_rank=2, float64_scheduler=True)


def base_transformer() -> torch.nn.Module:
    """The same weights without a LoRA, as another model."""
    return tiny_sd3_pipeline(seed=SEED, float64_scheduler=True).transformer


def expected(
    pipe: StableDiffusion3Pipeline, base: torch.nn.Module, name: str, callback: FlowBPCallback, sampling: Sampling
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of `SCALE * loss` and of `SCALE * anchor`, and the anchor."""
    drawn = drawn_steps(name, callback.surrogate)
    of_loss = brute_force(pipe, name, ROWS[name], drawn, sampling, gradient_scale=SCALE).gradients
    roll = sample(pipe, sampling)
    penalties = []

    def watch(module: torch.nn.Module, args: tuple, inputs: dict, returned: tuple[torch.Tensor]) -> None:
        with torch.no_grad():
            of_base = base(**inputs)[0]
        gap = returned[0] - of_base
        # Of both branches the conditional one stands last.
        penalties.append((gap if sampling.unconditional_gradient else gap[-len(PROMPTS) :]).square().mean())

    handle = pipe.transformer.register_forward_hook(watch, with_kwargs=True)
    surrogate_graph(name, ROWS[name], drawn, roll)
    handle.remove()
    assert len(penalties) == len(callback.surrogate.terms)
    anchor = BETA * sum(penalties)
    parameters = {key: value for key, value in pipe.transformer.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(SCALE * anchor, list(parameters.values()), allow_unused=True)
    of_anchor = {
        key: torch.zeros_like(value) if gradient is None else gradient
        for (key, value), gradient in zip(parameters.items(), found, strict=True)
    }
    return of_loss, of_anchor, anchor.detach()


def added(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: left[key] + right[key] for key in left}


def anchored(
    pipe: StableDiffusion3Pipeline, name: str, sampling: Sampling, beta: float = BETA, **options: object
) -> tuple[dict[str, torch.Tensor], BackwardOutput, FlowBPCallback]:
    """The engine's gradients, what `backward` returned, and the callback."""
    backward = options.pop("backward", {})
    return engine(
        pipe,
        get_method(name, **ROWS[name]),
        sampling,
        seed=6,
        reward_as_function=True,
        unconditional_gradient=sampling.unconditional_gradient,
        memory={"velocity_anchor": beta, **options},
        backward={"gradient_scale": SCALE, **backward},
    )


@pytest.mark.parametrize("unconditional_gradient", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("name", COUPLED_OR_NOT)
def test_loss_and_anchor_are_one_sum(name: str, guidance_scale: float, unconditional_gradient: bool):
    """Whatever is evaluated together: gradient and value of the penalty are those of the brute force."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, guidance_scale, unconditional_gradient=unconditional_gradient)
    wanted = None
    for memory in ({}, {"samples_per_decode": 2}):
        gradients, out, callback = anchored(pipe, name, sampling, **memory)
        if wanted is None:
            wanted = expected(pipe, base_transformer(), name, callback, sampling)
        of_loss, of_anchor, anchor = wanted
        assert relative_difference(gradients, added(of_loss, of_anchor)) < EXACT
        assert relative_difference(of_loss, added(of_loss, of_anchor)) > 0.01
        torch.testing.assert_close(out.anchor, anchor, rtol=EXACT, atol=0)
        assert not out.anchor.requires_grad


@pytest.mark.parametrize("name", ["flowbp-sparse", "flowbp-bridge"])
def test_anchor_where_rows_do_not_stand_alone(name: str):
    """Calls that are replayed whole have the penalty on the same rows."""
    pipe, base = lora_pipeline(), base_transformer()
    sampling = Sampling(PROMPTS, 7, 3.5)
    for transformer in (pipe.transformer, base):
        transformer.proj_out.register_forward_hook(mixing_samples)
    gradients, out, callback = anchored(pipe, name, sampling)
    of_loss, of_anchor, anchor = expected(pipe, base, name, callback, sampling)
    assert relative_difference(gradients, added(of_loss, of_anchor)) < EXACT
    torch.testing.assert_close(out.anchor, anchor, rtol=EXACT, atol=0)


def test_anchor_acts_where_the_reward_does_not():
    """A hinge that no sample reaches leaves the penalty's gradient alone."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, 3.5)
    objective = Objective(clip=-2.0)
    gradients, out, callback = anchored(pipe, "flowbp-bridge", sampling, backward={"objective": objective})
    _, of_anchor, _ = expected(pipe, base_transformer(), "flowbp-bridge", callback, sampling)
    assert out.loss == 0 and out.anchor > 0
    assert relative_difference(gradients, of_anchor) < EXACT


def test_anchor_of_copies():
    """DRaFT-LV's copies have a penalty each, at the state from which they start."""
    pipe, base = lora_pipeline(), base_transformer()
    _, out, callback = anchored(pipe, "draft-lv", Sampling(PROMPTS, 7, 3.5))
    penalties = []
    for trajectory in callback.trajectories:
        ((inputs, outputs),) = [
            (tree_unflatten(call.leaves, call.spec)[1], call.outputs[0]) for call in trajectory.steps[6].calls
        ]
        with torch.no_grad():
            gap = outputs - base(**inputs)[0]
        penalties.append(gap[len(PROMPTS) :].square().mean())
    assert len(penalties) == 3
    torch.testing.assert_close(out.anchor, BETA * sum(penalties).detach(), rtol=EXACT, atol=0)


def test_a_lora_at_its_start_has_no_anchor():
    """Where B is 0 the adapter does nothing: the value is exactly 0 and the gradient, to the bit, what it was."""
    pipe = lora_pipeline()
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    sampling = Sampling(PROMPTS, 7, 3.5)
    without, nothing, _ = anchored(pipe, "flowbp-bridge", sampling, beta=0.0)
    gradients, out, _ = anchored(pipe, "flowbp-bridge", sampling)
    assert out.anchor == nothing.anchor == 0
    assert all(torch.equal(gradients[key], without[key]) for key in without)
    assert any(gradient.any() for gradient in gradients.values())


def test_two_halves_scale_the_anchor():
    """`callback.sweep` alone multiplies the penalty's gradient by `gradient_scale` too, and reports it without."""
    pipe = lora_pipeline()
    _, out, callback = anchored(pipe, "flowbp-bridge", Sampling(PROMPTS, 7, 3.5))
    found = {}
    for scale in (1.0, SCALE):
        pipe.transformer.zero_grad()
        swept = callback.sweep(torch.ones_like(callback.endpoint), gradient_scale=scale)
        torch.testing.assert_close(swept.anchor, out.anchor, rtol=EXACT, atol=0)
        found[scale] = found_gradients(pipe)
    assert relative_difference({key: SCALE * value for key, value in found[1.0].items()}, found[SCALE]) < EXACT


# ---------------------------------------------------------------------------------------------------------------------
# Adapters off and on again
# ---------------------------------------------------------------------------------------------------------------------


def adapter_states(pipe: StableDiffusion3Pipeline) -> tuple[object, ...]:
    """Everything that switching adapters could leave altered."""
    layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    return (
        [(layer.disable_adapters, layer._active_adapter, layer.merged) for layer in layers],
        [parameter.requires_grad for parameter in pipe.transformer.parameters()],
        [parameter._version for parameter in pipe.transformer.parameters()],
    )


def test_a_frozen_adapter_belongs_to_the_base_and_stays_as_it_was():
    """Two active adapters, one of them frozen: the base has that one, and afterwards both are as before."""
    pipe, base = lora_pipeline(), base_transformer()
    base.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), adapter_name="fixed")
    pipe.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), adapter_name="fixed")
    for name, parameter in pipe.transformer.named_parameters():
        if "fixed" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
            base.get_parameter(name).data = parameter.data
    pipe.transformer.set_adapters(["default", "fixed"])
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_("default" in name)
    before = adapter_states(pipe)
    sampling = Sampling(PROMPTS, 7, 3.5)
    gradients, out, callback = anchored(pipe, "flowbp-sparse", sampling)
    assert adapter_states(pipe) == before
    of_loss, of_anchor, anchor = expected(pipe, base, "flowbp-sparse", callback, sampling)
    assert relative_difference(gradients, added(of_loss, of_anchor)) < EXACT
    torch.testing.assert_close(out.anchor, anchor, rtol=EXACT, atol=0)


def test_adapters_come_back_after_an_error():
    """The base's own pass fails; so does the sweep, with that error, and the adapters are on again."""
    pipe = lora_pipeline()
    layer = next(module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer))
    before = adapter_states(pipe)

    def fail(module: BaseTunerLayer, inputs: object) -> None:
        if module.disable_adapters:
            raise KeyError("base")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="base"):
        anchored(pipe, "flowbp-sparse", Sampling(PROMPTS, 7, 3.5))
    handle.remove()
    assert adapter_states(pipe) == before


def test_no_anchor_no_second_pass():
    """The base is evaluated once for each evaluated call, and not at all without an anchor."""
    pipe = lora_pipeline()
    for beta, passes in ((0.0, 4), (BETA, 8)):
        callback = FlowBPCallback(
            get_method("flowbp-sparse", num_active=4), torch.Generator().manual_seed(0), velocity_anchor=beta
        )
        sampling = Sampling(PROMPTS, 7, 3.5)
        calls = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, calls=calls: calls.append(torch.is_grad_enabled())
        )
        with callback.record(pipe):
            images = pipe(**sampling.call_arguments()).images
        calls.clear()
        out = callback.backward(toy_reward, images, list(PROMPTS))
        handle.remove()
        assert len(calls) == passes and sum(calls) == 4
        assert (out.anchor == 0) == (beta == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_a_factor_out_of_range_is_refused(beta: float):
    with pytest.raises(ValueError, match="`velocity_anchor` must be a number of at least 0, got "):
        FlowBPCallback(get_method("full"), velocity_anchor=beta)


def test_a_fused_lora_belongs_to_the_base():
    """It is in the weights, and stays there while another one that is trained is left out."""
    pipe, base = lora_pipeline(), lora_pipeline().transformer
    base.fuse_lora()
    pipe.transformer.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer, "other")
    pipe.transformer.to(torch.float64)
    pipe.transformer.fuse_lora(adapter_names=["default"])
    assert any(layer.merged for layer in pipe.transformer.modules() if isinstance(layer, BaseTunerLayer))
    before = adapter_states(pipe)
    sampling = Sampling(PROMPTS, 7, 3.5)
    gradients, out, callback = anchored(pipe, "flowbp-sparse", sampling)
    assert adapter_states(pipe) == before
    of_loss, of_anchor, anchor = expected(pipe, base, "flowbp-sparse", callback, sampling)
    assert anchor > 0 and relative_difference(gradients, added(of_loss, of_anchor)) < EXACT
    torch.testing.assert_close(out.anchor, anchor, rtol=EXACT, atol=0)
