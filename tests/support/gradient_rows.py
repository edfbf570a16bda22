# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Every row of the method table with options, the tiny pipelines and rollouts for it, and what the engine finds.

The bounds: `EXACT` holds against `brute_force`, with float64 sigmas as with the stock scheduler's float32 sigmas and
roundings, which the brute force repeats. Autograd through the stock scheduler rounds the gradient itself to float32 at
every step, hence `FLOAT32_SCHEDULER`.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from brute_force import Drawn, Result, Sampling, relative_difference, toy_reward
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families.paper import build_flux, build_flux2_klein
from tiny_sd3 import Float64Scheduler, redraw, tiny_sd3_pipeline

from flowbp import FlowBPCallback, Surrogate

EXACT = 1e-10
FLOAT32_SCHEDULER = 1e-6
NOISE_SEED = 99

# Each row with options that fit rollouts of 6 steps and more; every option that its formula uses is written out.
LEAPALIGN = {"alpha": 0.3, "tau": 0.1}
SPARSE = {"num_active": 4, "late_bias": 1.0, "grad_rescale": 0.5}
BRIDGE = {"num_active": 5, "late_bias": 4.0, "grad_rescale": 0.25, "alpha": 0.5}
LAGRANGE = {
    "order": 3,
    "active_supports": "midpoint",
    "support_scale": 0.25,
    "weights": "lagrange",
    "anchor_lambda": 1.0,
    "alpha": 0.1,
    "tau": 0.2,
    "grad_rescale": 0.5,
}
ROWS = {
    "full": {},
    "draft-k": {"last_k": 2},
    "refl": {"last_n": 4},
    "draft-lv": {"num_noised": 2},
    "drtune": {"num_active": 2, "early_stop_ratio": 0.6},
    "leapalign": LEAPALIGN,
    "flowbp-sparse": SPARSE,
    "flowbp-bridge": BRIDGE,
    "flowbp-lagrange": LAGRANGE,
}

# Rollouts of different lengths and batch sizes, one per seed.
PROMPTS = ('a "42" in red', "blue 7 on white", 'the text "k9"')
ROLLOUTS = {
    0: {"prompts": PROMPTS[:2], "num_inference_steps": 6},
    1: {"prompts": PROMPTS[2:], "num_inference_steps": 11},
    2: {"prompts": PROMPTS, "num_inference_steps": 7, "sigmas": tuple(1 - step / 7 for step in range(7))},
}

OPTIONS = [
    ("draft-k", {"last_k": 1}),
    ("draft-k", {"last_k": 5}),
    ("draft-lv", {"num_noised": 1}),
    ("drtune", {"num_active": 1, "early_stop_ratio": 0.4}),
    ("drtune", {"num_active": 3, "early_stop_ratio": 0.5}),
    ("leapalign", {**LEAPALIGN, "alpha": 0.0}),
    ("leapalign", {**LEAPALIGN, "alpha": 1.0, "tau": 0.001}),
    ("leapalign", {**LEAPALIGN, "step_sampling": "midpoint"}),
    ("leapalign", {**LEAPALIGN, "step_sampling": "midpoint-j"}),
    ("leapalign", {**LEAPALIGN, "step_sampling": "uniform", "max_tail": 3}),
    ("refl", {"last_n": 6, "endpoint": "sample"}),
    ("drtune", {"num_active": 2, "early_stop_ratio": 0.5, "endpoint": "sample"}),
    ("leapalign", {**LEAPALIGN, "endpoint": "posterior-mean"}),
    ("flowbp-sparse", {**SPARSE, "endpoint": "posterior-mean"}),
    ("flowbp-bridge", {**BRIDGE, "num_active": 3, "endpoint": "posterior-mean"}),
    ("flowbp-sparse", {**SPARSE, "num_active": 1, "grad_rescale": 1.0}),
    ("flowbp-sparse", {**SPARSE, "num_active": 6, "grad_rescale": 0.0}),
    ("flowbp-sparse", {**SPARSE, "num_active": 3, "tail_ratio": 0.6}),
    ("flowbp-bridge", {**BRIDGE, "alpha": 1.0, "grad_rescale": 0.0}),
    ("flowbp-bridge", {**BRIDGE, "num_active": 3, "grad_rescale": 1.0, "tail_ratio": 0.7}),
    ("flowbp-lagrange", {**LAGRANGE, "order": 1}),
    ("flowbp-lagrange", {**LAGRANGE, "order": 2, "support_scale": 1.0}),
    ("flowbp-lagrange", {**LAGRANGE, "order": 4, "active_supports": "all", "alpha": 1.0}),
    ("flowbp-lagrange", {**LAGRANGE, "active_supports": "start", "grad_rescale": 1.0}),
    ("flowbp-lagrange", {**LAGRANGE, "active_supports": "none", "anchor_lambda": 0.25}),
    ("flowbp-lagrange", {**LAGRANGE, "anchor_lambda": 0.6, "tau": 0.01}),
    ("flowbp-lagrange", {**LAGRANGE, "anchor_lambda": 0.0}),
    ("flowbp-lagrange", {**LAGRANGE, "weights": "uniform", "grad_rescale": 0.0}),
    ("flowbp-lagrange", {**LAGRANGE, "weights": "adams-bashforth", "active_supports": "start"}),
    ("flowbp-lagrange", {**LAGRANGE, "tail_ratio": 0.7}),
    ("flowbp-lagrange", {**LAGRANGE, "step_sampling": "uniform"}),
    ("flowbp-lagrange", {**LAGRANGE, "step_sampling": "dirichlet", "dirichlet": (1.0, 3.0, 1.0), "max_tail": 2}),
]


# Not square, so that swapped rows and columns show.
HEIGHT, WIDTH = 8, 12


@dataclasses.dataclass(frozen=True)
class Mode:
    """A pipeline and how its guidance is used.

    Attributes:
        build: makes the tiny pipeline, for backbones other than Stable Diffusion 3.
        backbone: the backbone's name in the method table.
        guidance: fields of `Sampling`.
        branches: 2 where there is an unconditional branch.
        calls: transformer calls of a step, the conditional one first.
    """

    build: Callable[[], DiffusionPipeline] | None
    backbone: str
    guidance: Mapping[str, float]
    branches: int
    calls: int


MODES = {
    "sd3": Mode(None, "sd3", {"guidance_scale": 1.0}, 1, 1),
    "sd3-guidance": Mode(None, "sd3", {"guidance_scale": 3.5}, 2, 1),
    "flux": Mode(build_flux, "flux", {"guidance_scale": 3.5}, 1, 1),
    "flux-true-guidance": Mode(build_flux, "flux", {"guidance_scale": 3.5, "true_cfg_scale": 4.0}, 2, 2),
    "klein": Mode(partial(build_flux2_klein, is_distilled=False), "flux2", {"guidance_scale": 4.0}, 2, 2),
    "klein-no-guidance": Mode(partial(build_flux2_klein, is_distilled=False), "flux2", {"guidance_scale": 1.0}, 1, 1),
    "klein-distilled": Mode(partial(build_flux2_klein, is_distilled=True), "flux2", {"guidance_scale": 4.0}, 1, 1),
}
SD3_MODES = ("sd3", "sd3-guidance")
GUIDED = [name for name, mode in MODES.items() if mode.branches == 2]
TWO_CALLS = [name for name, mode in MODES.items() if mode.calls == 2]


def pipeline_of(mode: str, seed: int, float64_scheduler: bool = True) -> DiffusionPipeline:
    """The mode's pipeline with weights of this seed, all of the transformer's parameters trainable."""
    if mode in SD3_MODES:
        return tiny_sd3_pipeline(seed=seed, float64_scheduler=float64_scheduler)
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
    if mode in SD3_MODES:
        return Sampling(prompts, num_inference_steps, **{**MODES[mode].guidance, **changes})
    negative = ("grey",) * len(prompts)
    embeddings = {"prompt_embeds": encoded(prompts, 5, 32)}
    if MODES[mode].backbone == "flux":
        embeddings["pooled_prompt_embeds"] = encoded(prompts, 32)
    if MODES[mode].calls == 2:
        embeddings |= {f"negative_{name}": encoded(negative, *rows.shape[1:]) for name, rows in embeddings.items()}
    fields = {**MODES[mode].guidance, "embeddings": embeddings, "size": (HEIGHT, WIDTH), **changes}
    return Sampling(prompts, num_inference_steps, **fields)


def drawn_steps(name: str, surrogate: Surrogate, endpoint_of_same_draw: tuple[str, int] | None = None) -> Drawn:
    """Reads which steps were drawn, and no weight, from the engine's surrogate.

    `endpoint_of_same_draw` says where ReFL or DRTune denoise if the surrogate itself has the sample as its endpoint.
    """
    active = tuple(term.step for term in surrogate.terms)
    posterior_step = None if surrogate.endpoint == "sample" else surrogate.endpoint[1]
    k = j = t = None
    if name in ("refl", "drtune"):
        t = posterior_step if endpoint_of_same_draw is None else endpoint_of_same_draw[1]
    elif name == "leapalign":
        k, j = active
    elif name == "flowbp-bridge":
        (j,) = (term.step for term in surrogate.terms if term.coupling != 0)
    elif name == "flowbp-lagrange":
        first, second = surrogate.legs
        k, j = first.start, first.end
        assert second.start == j
    return Drawn(active=active, t=t, k=k, j=j, posterior_step=posterior_step, noise_seed=NOISE_SEED)


def found_gradients(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Copies of `.grad` of the transformer's trainable parameters by name, zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in pipe.transformer.named_parameters()
        if parameter.requires_grad
    }


def engine(
    pipe: DiffusionPipeline,
    method: object,
    sampling: Sampling,
    seed: int = 0,
    reward_as_function: bool = False,
    unconditional_gradient: bool | None = False,
    memory: dict[str, int | None] | None = None,
    backward: dict[str, object] | None = None,
    zero_grad: bool = True,
) -> tuple[dict[str, torch.Tensor], object, FlowBPCallback]:
    """Records one rollout with the engine and sweeps it.

    `memory` holds `samples_per_decode`, `backward` further arguments of `callback.backward`.
    Returns the transformer's gradients by name, what `backward` returned, and the callback.
    """
    if zero_grad:
        pipe.transformer.zero_grad(set_to_none=True)
    callback = FlowBPCallback(
        method,
        generator=torch.Generator().manual_seed(seed),
        noise_generator=torch.Generator().manual_seed(NOISE_SEED),
        unconditional_gradient=unconditional_gradient,
        **(memory or {}),
    )
    with callback.record(pipe):
        images = pipe(**sampling.call_arguments(), callback_on_step_end=callback).images
        copies = [pipe(**sampling.call_arguments()).images for _ in range(callback.copies)]
    images = torch.cat([images, *copies])
    prompts = sampling.image_prompts() * (1 + len(copies))
    if reward_as_function:
        out = callback.backward(toy_reward, images, prompts, **(backward or {}))
    else:
        out = callback.backward(toy_reward(images, prompts), **(backward or {}))
    return found_gradients(pipe), out, callback


def assert_agrees(gradients: dict[str, torch.Tensor], out: object, expected: Result, bound: float = EXACT) -> None:
    """Gradients, and everything else that `backward` reports."""
    assert relative_difference(gradients, expected.gradients) < bound
    torch.testing.assert_close(out.rewards, expected.rewards, rtol=0, atol=bound)
    torch.testing.assert_close(out.loss, expected.loss, rtol=bound, atol=bound)
    torch.testing.assert_close(out.weights, expected.weights, rtol=bound, atol=bound)
    assert out.gaps.keys() == expected.gaps.keys()
    for step, gap in expected.gaps.items():
        torch.testing.assert_close(out.gaps[step], gap, rtol=bound, atol=bound)
