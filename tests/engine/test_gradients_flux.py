# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The engine's gradients on FLUX.1 and FLUX.2-Klein against independent computations of them.

As in `test_gradients`, whose rows, options and bounds these are: every row against `brute_force`, which has its own
code for what these pipelines do around their transformer (packing, positions, shifted schedules, guidance, batch-norm
statistics of the VAE), and the brute force itself against autograd through the stock pipeline. Against the brute force
the bound is 1e-10 (seen: 4e-15).
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import pytest
import torch
from brute_force import Drawn, Sampling, brute_force, relative_difference, stock_gradients
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families.paper import build_flux, build_flux2_klein
from gradient_rows import (
    EXACT,
    FLOAT32_SCHEDULER,
    LEAPALIGN,
    OPTIONS,
    PROMPTS,
    ROLLOUTS,
    ROWS,
    assert_agrees,
    drawn_steps,
    engine,
)
from tiny_sd3 import Float64Scheduler, redraw

from flowbp import get_method

# Not square, so that swapped rows and columns show.
HEIGHT, WIDTH = 8, 12


@dataclasses.dataclass(frozen=True)
class Mode:
    """A pipeline and how its guidance is used.

    Attributes:
        build: makes the tiny pipeline.
        backbone: the backbone's name in the method table.
        guidance: fields of `Sampling`.
        calls: transformer calls of a step, the conditional one first.
    """

    build: Callable[[], DiffusionPipeline]
    backbone: str
    guidance: Mapping[str, float]
    calls: int


MODES = {
    "flux": Mode(build_flux, "flux", {"guidance_scale": 3.5}, 1),
    "flux-true-guidance": Mode(build_flux, "flux", {"guidance_scale": 3.5, "true_cfg_scale": 4.0}, 2),
    "klein": Mode(lambda: build_flux2_klein(is_distilled=False), "flux2", {"guidance_scale": 4.0}, 2),
    "klein-no-guidance": Mode(lambda: build_flux2_klein(is_distilled=False), "flux2", {"guidance_scale": 1.0}, 1),
    "klein-distilled": Mode(lambda: build_flux2_klein(is_distilled=True), "flux2", {"guidance_scale": 4.0}, 1),
}
# Each mode with one branch, or with the unconditional branch's gradient and without it.
BRANCHES = [(mode, both) for mode, row in MODES.items() for both in ((False, True) if row.calls == 2 else (False,))]
GUIDED = [mode for mode, row in MODES.items() if row.calls == 2]
# Rollouts of three lengths and batches; the longest, for time, only with guidance by the conditional branch.
RUNS = [
    (mode, both, seed) for mode, both in BRANCHES for seed in ROLLOUTS if seed != 1 or (mode in GUIDED and not both)
]


def tiny_pipeline(mode: str, seed: int, float64_scheduler: bool = True) -> DiffusionPipeline:
    """The mode's pipeline with weights of this seed, all of the transformer's parameters trainable."""
    pipe = MODES[mode].build()
    generator = torch.Generator().manual_seed(seed)
    redraw(pipe.transformer, 1.0, generator)
    redraw(pipe.vae, 0.7, generator)
    scheduler_class = Float64Scheduler if float64_scheduler else FlowMatchEulerDiscreteScheduler
    pipe.scheduler = scheduler_class(use_dynamic_shifting=True)
    return pipe


def encoded(prompts: tuple[str, ...], *shape: int) -> torch.Tensor:
    """(B, *shape): random numbers in place of a text encoder's, the same for the same prompt."""
    generators = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators])


def sampling_of(mode: str, prompts: tuple[str, ...], num_inference_steps: int, **changes: object) -> Sampling:
    """A rollout of this mode; `changes` are further fields of `Sampling`."""
    negative = ("grey",) * len(prompts)
    embeddings = {"prompt_embeds": encoded(prompts, 5, 32)}
    if MODES[mode].backbone == "flux":
        embeddings["pooled_prompt_embeds"] = encoded(prompts, 32)
    if MODES[mode].calls == 2:
        embeddings |= {f"negative_{name}": encoded(negative, *rows.shape[1:]) for name, rows in embeddings.items()}
    fields = {**MODES[mode].guidance, "embeddings": embeddings, "size": (HEIGHT, WIDTH), **changes}
    return Sampling(prompts, num_inference_steps, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# The brute force itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("float64_scheduler", "bound"), [(True, EXACT), (False, FLOAT32_SCHEDULER)])
def test_brute_force_is_the_stock_pipelines_autograd(mode: str, float64_scheduler: bool, bound: float):
    """Full backpropagation through its own loop is what autograd finds through the pipeline's."""
    pipe = tiny_pipeline(mode, 3, float64_scheduler)
    sampling = sampling_of(mode, PROMPTS[:2], 5, unconditional_gradient=True, float32_scheduler=not float64_scheduler)
    expected = brute_force(pipe, "full", {}, Drawn(), sampling)
    assert relative_difference(expected.gradients, stock_gradients(pipe, sampling)) < bound
    images = pipe(**sampling.call_arguments()).images
    torch.testing.assert_close(images, expected.images, rtol=0, atol=1e-13)
    assert images.shape == (2, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", MODES)
def test_brute_force_tells_the_rows_and_branches_apart(mode: str):
    """The tiny pipelines are generic: every row, and the unconditional branch, changes the gradient by over 1 %."""
    pipe = tiny_pipeline(mode, 4)
    sampling = sampling_of(mode, PROMPTS[:2], 6)
    drawn = {
        "refl": Drawn(t=4, posterior_step=4),
        "drtune": Drawn(active=(1, 3), t=4, posterior_step=4),
        "leapalign": Drawn(k=1, j=3),
        "flowbp-sparse": Drawn(active=(0, 2, 3, 5)),
        "flowbp-bridge": Drawn(active=(0, 2, 3, 4, 5), j=3),
        "flowbp-lagrange": Drawn(k=1, j=3),
    }
    found = [
        brute_force(pipe, name, ROWS[name], drawn.get(name, Drawn()), sampling).gradients
        for name in ROWS
        if name != "draft-lv"
    ]
    uncoupled = brute_force(pipe, "leapalign", {**LEAPALIGN, "alpha": 0.0}, drawn["leapalign"], sampling)
    found.append(uncoupled.gradients)
    if MODES[mode].calls == 2:
        both = dataclasses.replace(sampling, unconditional_gradient=True)
        found.append(brute_force(pipe, "leapalign", LEAPALIGN, drawn["leapalign"], both).gradients)
    for place, one in enumerate(found):
        assert all(relative_difference(one, other) > 0.01 for other in found[:place])


# ---------------------------------------------------------------------------------------------------------------------
# The engine against the brute force
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "unconditional_gradient", "seed"), RUNS)
@pytest.mark.parametrize("name", ROWS)
def test_row_is_its_papers_formula(name: str, mode: str, unconditional_gradient: bool, seed: int):
    """Every row in every mode, one branch or both, on rollouts of different lengths and batches."""
    pipe = tiny_pipeline(mode, seed)
    sampling = sampling_of(mode, **ROLLOUTS[seed], seed=10 + seed, unconditional_gradient=unconditional_gradient)
    gradients, out, callback = engine(
        pipe, get_method(name, **ROWS[name]), sampling, seed=seed, unconditional_gradient=unconditional_gradient
    )
    assert {len(step.calls) for step in callback.trajectory.steps.values()} == {MODES[mode].calls}
    expected = brute_force(pipe, name, ROWS[name], drawn_steps(name, callback.surrogate), sampling)
    assert_agrees(gradients, out, expected)


@pytest.mark.parametrize("mode", GUIDED)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value).replace(" ", ""))
def test_options(name: str, options: dict[str, object], mode: str):
    """Every option that changes a formula, at other values than the table's."""
    pipe = tiny_pipeline(mode, 5)
    sampling = sampling_of(mode, PROMPTS[1:], 8, seed=5)
    gradients, out, callback = engine(pipe, get_method(name, **options), sampling, seed=20)
    same_draw = None
    if name in ("refl", "drtune"):
        method = get_method(name, **{**options, "endpoint": "posterior-mean"})
        same_draw = method.draw(pipe.scheduler.sigmas, torch.Generator().manual_seed(20)).endpoint
    drawn = drawn_steps(name, callback.surrogate, same_draw)
    assert_agrees(gradients, out, brute_force(pipe, name, options, drawn, sampling))


@pytest.mark.parametrize("mode", ["flux", *GUIDED])
@pytest.mark.parametrize("name", ROWS)
def test_recipe_of_the_backbone(name: str, mode: str):
    """The table's defaults for the backbone, with the float32 sigmas and roundings of the stock scheduler."""
    pipe = tiny_pipeline(mode, 6, float64_scheduler=False)
    sampling = sampling_of(mode, PROMPTS[:2], 12, float32_scheduler=True)
    method = get_method(name, backbone=MODES[mode].backbone)
    assert not method.unconditional_gradient
    gradients, out, callback = engine(pipe, method, sampling, seed=3, unconditional_gradient=None)
    expected = brute_force(pipe, name, method.options, drawn_steps(name, callback.surrogate), sampling)
    assert_agrees(gradients, out, expected)


CHANGES = [
    ("flux", {"guidance_scale": 1.0}),
    ("flux", {"latents": torch.linspace(-2, 2, 192, dtype=torch.float64).reshape(2, 6, 16).sin()}),
    ("flux-true-guidance", {"true_cfg_scale": 1.0}),
    ("flux-true-guidance", {"true_cfg_scale": 1.2}),
    ("flux-true-guidance", {"true_cfg_scale": 6.0, "guidance_scale": 2.0, "unconditional_gradient": True}),
    ("flux-true-guidance", {"seeds": (3, 4)}),
    ("flux-true-guidance", {"size": (12, 4)}),
    ("klein", {"num_images_per_prompt": 2}),
    ("klein", {"num_images_per_prompt": 2, "unconditional_gradient": True, "seeds": (3, 4, 5, 6)}),
    ("klein", {"latents": torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(2, 4, 2, 3).sin()}),
    ("klein", {"sigmas": (1.0, 0.93, 0.8, 0.5, 0.31, 0.3, 0.11)}),
    ("klein", {"guidance_scale": 1.2}),
    ("klein", {"size": (12, 4)}),
]


@pytest.mark.parametrize(
    ("mode", "changes"), CHANGES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@pytest.mark.parametrize("name", ["full", "flowbp-lagrange"])
def test_pipeline_arguments(name: str, mode: str, changes: dict[str, object]):
    """The pipelines' own ways of giving noise, schedule, size and guidance."""
    pipe = tiny_pipeline(mode, 7)
    sampling = sampling_of(mode, PROMPTS[:2], 7, **changes)
    gradients, out, callback = engine(
        pipe,
        get_method(name, **ROWS[name]),
        sampling,
        seed=1,
        unconditional_gradient=sampling.unconditional_gradient,
    )
    assert_agrees(gradients, out, brute_force(pipe, name, ROWS[name], drawn_steps(name, callback.surrogate), sampling))


@pytest.mark.parametrize("mode", GUIDED)
def test_the_conditional_call_comes_first_and_alone_is_computed_again(mode: str):
    """Two calls a step; with `unconditional_gradient=False` the sweep runs the first of them only."""
    pipe = tiny_pipeline(mode, 0)
    sampling = sampling_of(mode, PROMPTS[:2], 6)
    prompts: list[torch.Tensor] = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs["encoder_hidden_states"].detach()), with_kwargs=True
    )
    engine(pipe, get_method("flowbp-sparse", num_active=2), sampling)
    handle.remove()
    # The first block sees the prompt through one linear layer.
    conditional = pipe.transformer.context_embedder(sampling.embeddings["prompt_embeds"])
    unconditional = pipe.transformer.context_embedder(sampling.embeddings["negative_prompt_embeds"])
    expected = [conditional, unconditional] * 6 + [conditional] * 2
    assert len(prompts) == len(expected)
    for found, prompt in zip(prompts, expected, strict=True):
        torch.testing.assert_close(found, prompt)


@pytest.mark.parametrize(("mode", "unconditional_gradient"), BRANCHES)
@pytest.mark.parametrize("name", ["full", "flowbp-sparse"])
def test_memory_settings_do_not_change_the_gradient(name: str, mode: str, unconditional_gradient: bool):
    """`samples_per_decode`: same drawn steps, same gradient."""
    pipe = tiny_pipeline(mode, 3)
    sampling = sampling_of(mode, PROMPTS, 8)
    memory_settings = ({}, {"samples_per_decode": 2})
    reference, found = (
        engine(
            pipe,
            get_method(name, **ROWS[name]),
            sampling,
            seed=6,
            reward_as_function=True,
            unconditional_gradient=unconditional_gradient,
            memory=memory,
        )[0]
        for memory in memory_settings
    )
    assert relative_difference(found, reference) < EXACT
