# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The gradients of every row, computed the expensive and obvious way.

This module shares nothing with `flowbp` but the pipeline's components. It samples with its own Euler loop, writes each
method's surrogate out as one autograd graph in which every active velocity is alive, pins the graph's value to the
sampled latents (straight-through), decodes, scores, and calls `backward` once. What it takes from the engine is only
which steps were drawn (`Drawn`); all weights, gaps and sample weights are computed here, by exact rational integration
of Lagrange polynomials where a method integrates.

What differs between Stable Diffusion 3, FLUX.1 and FLUX.2-Klein is the table `BACKBONES`. Of FLUX pipelines only the
transformer, the VAE and the scheduler are used, no function of the pipeline itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline, StableDiffusion3Pipeline

Velocity = Callable[[torch.Tensor, int], torch.Tensor]
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a rollout is asked for; the fields are the pipeline call's arguments of the same names.

    `seed` seeds one generator for the whole batch; `seeds` one generator per image; `latents`, in the shape that the
    pipeline takes, replaces both. `embeddings` are the pipeline's arguments for prompts and negative prompts that are
    encoded already, by name, a row for each prompt; `prompts` are then the reward's only. `size` is (height, width) of
    the images; None for the pipeline's default. `float32_scheduler` says that the pipeline's scheduler is the stock
    one, which rounds the latents that it is given to float32.
    """

    prompts: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    seed: int | None = 0
    seeds: tuple[int, ...] | None = None
    latents: torch.Tensor | None = None
    sigmas: tuple[float, ...] | None = None
    negative_prompt: str | None = None
    embeddings: Mapping[str, torch.Tensor] | None = None
    true_cfg_scale: float | None = None
    size: tuple[int, int] | None = None
    num_images_per_prompt: int = 1
    max_sequence_length: int = 2
    unconditional_gradient: bool = False
    float32_scheduler: bool = False

    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """A fresh generator (or one per image) in the state that the pipeline is to be given."""
        if self.latents is not None:
            return None
        if self.seeds is not None:
            return [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return torch.Generator().manual_seed(self.seed)

    def image_prompts(self) -> list[str]:
        """The prompt of each image."""
        return [prompt for prompt in self.prompts for _ in range(self.num_images_per_prompt)]

    def call_arguments(self) -> dict[str, object]:
        """The arguments with which the pipeline is called to do the same rollout."""
        arguments: dict[str, object] = {
            "num_inference_steps": self.num_inference_steps,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "guidance_scale": self.guidance_scale,
            "num_images_per_prompt": self.num_images_per_prompt,
            "generator": self.generator(),
            "latents": self.latents,
            "output_type": "pt",
            "max_sequence_length": self.max_sequence_length,
        }
        if self.embeddings is None:
            arguments |= {"prompt": list(self.prompts), "negative_prompt": self.negative_prompt}
        else:
            arguments |= self.embeddings
        if self.true_cfg_scale is not None:
            arguments["true_cfg_scale"] = self.true_cfg_scale
        if self.size is not None:
            arguments["height"], arguments["width"] = self.size
        return arguments


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The random choices of one surrogate, and nothing that follows from them.

    `active` are the steps with a term; `t` is the step at which ReFL and DRTune denoise; `k` and `j` are the start and
    the connector of rows with two legs (Bridge has only `j`); `posterior_step` is the step of a posterior-mean
    endpoint, None for the sample; `noise_seed` seeds the noise of DRaFT-LV's copies, drawn in float32.
    """

    active: tuple[int, ...] = ()
    t: int | None = None
    k: int | None = None
    j: int | None = None
    posterior_step: int | None = None
    noise_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A finished rollout: `sigmas` as floats (N + 1), `latents` (N + 1) and `velocities` (N), all detached."""

    sigmas: list[float]
    latents: list[torch.Tensor]
    velocities: list[torch.Tensor]
    velocity: Velocity

    @property
    def steps(self) -> int:
        return len(self.velocities)

    def h(self, step: int) -> float:
        return self.sigmas[step + 1] - self.sigmas[step]


@dataclasses.dataclass(frozen=True)
class Result:
    """Gradient of every trainable parameter by name, and the detached quantities that the engine reports too.

    `images`, `rewards` and `weights` have DRaFT-LV's copies after the samples.
    """

    gradients: dict[str, torch.Tensor]
    rewards: torch.Tensor
    loss: torch.Tensor
    weights: torch.Tensor
    gaps: dict[int, torch.Tensor]
    images: torch.Tensor
    rollout: Rollout


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: velocity, initial noise, schedule and latents of each pipeline
# ---------------------------------------------------------------------------------------------------------------------


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, sampling: Sampling) -> torch.Tensor:
    """u + s (c - u), with `u` detached where the unconditional branch is to have no gradient."""
    if not sampling.unconditional_gradient:
        unconditional = unconditional.detach()
    return unconditional + scale * (conditional - unconditional)


def noise(sampling: Sampling, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Standard normal numbers (B, *shape), from one generator for all images or one for each."""
    generator = sampling.generator()
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape, generator=one, dtype=dtype) for one in generator])
    return torch.randn((len(sampling.image_prompts()), *shape), generator=generator, dtype=dtype)


def packed_size(sampling: Sampling) -> tuple[int, int]:
    """Rows and columns of tokens: the tiny VAEs halve the picture and FLUX packs squares of 2 x 2 latents."""
    height, width = sampling.size
    return height // 4, width // 4


def packed(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to tokens (B, H W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpacked(tokens: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The inverse of `packed`."""
    return tokens.transpose(1, 2).unflatten(2, packed_size(sampling))


def token_places(sampling: Sampling) -> torch.Tensor:
    """(H W, 2): row and column of each token."""
    rows, columns = packed_size(sampling)
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def sd3_velocity(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> Velocity:
    """`c` without guidance, `u + s (c - u)` with it, both branches in one batch."""
    has_guidance = sampling.guidance_scale > 1
    with torch.no_grad():
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            prompt=list(sampling.prompts),
            prompt_2=None,
            prompt_3=None,
            num_images_per_prompt=sampling.num_images_per_prompt,
            do_classifier_free_guidance=has_guidance,
            negative_prompt=sampling.negative_prompt,
            max_sequence_length=sampling.max_sequence_length,
        )
    timesteps = pipe.scheduler.timesteps

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        if has_guidance:
            both = pipe.transformer(
                hidden_states=torch.cat([x, x]),
                timestep=timesteps[step].expand(2 * len(x)),
                encoder_hidden_states=torch.cat([negative_embeds, embeds]),
                pooled_projections=torch.cat([negative_pooled, pooled]),
                return_dict=False,
            )[0]
            return guided(both[len(x) :], both[: len(x)], sampling.guidance_scale, sampling)
        return pipe.transformer(
            hidden_states=x,
            timestep=timesteps[step].expand(len(x)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    return velocity


def sd3_set_timesteps(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> None:
    """A constant shift; the scheduler's own sigmas unless others are given."""
    if sampling.sigmas is None:
        pipe.scheduler.set_timesteps(sampling.num_inference_steps)
    else:
        pipe.scheduler.set_timesteps(sigmas=list(sampling.sigmas))


def sd3_noise(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> torch.Tensor:
    """(B, C, H, W)."""
    config = pipe.transformer.config
    return noise(sampling, (config.in_channels, config.sample_size, config.sample_size), pipe.transformer.dtype)


def sd3_vae_latents(pipe: DiffusionPipeline, latents: torch.Tensor, sampling: Sampling | None = None) -> torch.Tensor:
    """Out of the unit scale in which the transformer sees them."""
    return latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor


def dynamic_shift(pipe: DiffusionPipeline, sampling: Sampling, mu: float) -> None:
    """Sigmas from 1 to 1 / N, shifted by `mu`."""
    steps = sampling.num_inference_steps
    sigmas = [1 - step / steps for step in range(steps)] if sampling.sigmas is None else list(sampling.sigmas)
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=mu)


def flux_velocity(pipe: FluxPipeline, sampling: Sampling) -> Velocity:
    """The guidance-distilled model, which is told the scale; true guidance `u + s (c - u)` on top of that."""
    timesteps, text = pipe.scheduler.timesteps, sampling.embeddings
    places = token_places(sampling).double()
    places = torch.cat([torch.zeros(len(places), 1), places], dim=1)

    def branch(x: torch.Tensor, step: int, kind: str) -> torch.Tensor:
        prompt = text[f"{kind}prompt_embeds"]
        return pipe.transformer(
            hidden_states=x,
            timestep=timesteps[step].to(x.dtype).expand(len(x)) / 1000,
            guidance=torch.full((len(x),), sampling.guidance_scale),
            pooled_projections=text[f"{kind}pooled_prompt_embeds"],
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, dtype=x.dtype),
            img_ids=places,
            return_dict=False,
        )[0]

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        conditional = branch(x, step, "")
        if sampling.true_cfg_scale is None or sampling.true_cfg_scale <= 1:
            return conditional
        return guided(conditional, branch(x, step, "negative_"), sampling.true_cfg_scale, sampling)

    return velocity


def flux_set_timesteps(pipe: FluxPipeline, sampling: Sampling) -> None:
    """The shift grows linearly with the number of tokens, between two points that the scheduler's config gives."""
    config = pipe.scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    dynamic_shift(
        pipe, sampling, config.base_shift + slope * (len(token_places(sampling)) - config.base_image_seq_len)
    )


def flux_noise(pipe: FluxPipeline, sampling: Sampling) -> torch.Tensor:
    """Drawn as a picture (B, C / 4, 2 H, 2 W), then packed to (B, H W, C)."""
    rows, columns = packed_size(sampling)
    shape = (pipe.transformer.config.in_channels // 4, 2 * rows, 2 * columns)
    return packed(torch.nn.functional.pixel_unshuffle(noise(sampling, shape, pipe.transformer.dtype), 2))


def flux_vae_latents(pipe: FluxPipeline, latents: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Each token's channels are 2 x 2 latents."""
    return sd3_vae_latents(pipe, torch.nn.functional.pixel_shuffle(unpacked(latents, sampling), 2))


def klein_velocity(pipe: Flux2KleinPipeline, sampling: Sampling) -> Velocity:
    """`u + s (c - u)`; without guidance, and always for the step-distilled model, `c`."""
    timesteps = pipe.scheduler.timesteps
    text = {
        name: rows.repeat_interleave(sampling.num_images_per_prompt, dim=0)
        for name, rows in sampling.embeddings.items()
    }
    places = token_places(sampling)
    zeros = torch.zeros(len(places), 1, dtype=places.dtype)
    places = torch.cat([zeros, places, zeros], dim=1)

    def branch(x: torch.Tensor, step: int, prompt: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(prompt.shape[1], 4, dtype=places.dtype)
        words[:, 3] = torch.arange(len(words))
        return pipe.transformer(
            hidden_states=x,
            timestep=timesteps[step].to(x.dtype).expand(len(x)) / 1000,
            guidance=None,
            encoder_hidden_states=prompt,
            txt_ids=words,
            img_ids=places,
            return_dict=False,
        )[0]

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        conditional = branch(x, step, text["prompt_embeds"])
        if pipe.config.is_distilled or sampling.guidance_scale <= 1:
            return conditional
        unconditional = branch(x, step, text["negative_prompt_embeds"])
        return guided(conditional, unconditional, sampling.guidance_scale, sampling)

    return velocity


def klein_set_timesteps(pipe: Flux2KleinPipeline, sampling: Sampling) -> None:
    """The shift is linear in the tokens at 10 and at 200 steps, and linear in the steps through these two."""
    tokens = len(token_places(sampling))
    at_10 = 1.89833333 + 8.73809524e-05 * tokens
    at_200 = 0.45666666 + 0.00016927 * tokens
    dynamic_shift(pipe, sampling, at_10 + (at_200 - at_10) * (sampling.num_inference_steps - 10) / 190)


def klein_noise(pipe: Flux2KleinPipeline, sampling: Sampling) -> torch.Tensor:
    """Drawn with a token's channels as such, (B, C, H, W)."""
    shape = (pipe.transformer.config.in_channels, *packed_size(sampling))
    return noise(sampling, shape, pipe.transformer.dtype)


def klein_vae_latents(pipe: Flux2KleinPipeline, latents: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Each token's channels are 2 x 2 latents, scaled by the VAE's batch-norm statistics before."""
    statistics = pipe.vae.bn
    scale = (statistics.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return torch.nn.functional.pixel_shuffle(unpacked(latents * scale + statistics.running_mean, sampling), 2)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What differs between pipelines.

    Attributes:
        velocity: of (pipe, sampling), makes the guided velocity `v(x, step)` of the loop's latents.
        set_timesteps: of (pipe, sampling), gives the scheduler the rollout's sigmas.
        noise: of (pipe, sampling), the initial noise in the shape in which the pipeline takes `latents`.
        packed: from that shape to the loop's latents.
        vae_latents: of (pipe, latents of the loop, sampling), what the VAE decodes.
    """

    velocity: Callable[[DiffusionPipeline, Sampling], Velocity]
    set_timesteps: Callable[[DiffusionPipeline, Sampling], None]
    noise: Callable[[DiffusionPipeline, Sampling], torch.Tensor]
    packed: Callable[[torch.Tensor], torch.Tensor]
    vae_latents: Callable[[DiffusionPipeline, torch.Tensor, Sampling], torch.Tensor]


def as_it_is(latents: torch.Tensor) -> torch.Tensor:
    return latents


BACKBONES = {
    StableDiffusion3Pipeline: Backbone(sd3_velocity, sd3_set_timesteps, sd3_noise, as_it_is, sd3_vae_latents),
    FluxPipeline: Backbone(flux_velocity, flux_set_timesteps, flux_noise, as_it_is, flux_vae_latents),
    Flux2KleinPipeline: Backbone(klein_velocity, klein_set_timesteps, klein_noise, packed, klein_vae_latents),
}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(pipe: DiffusionPipeline, sampling: Sampling) -> Rollout:
    """Integrates the whole trajectory without gradients."""
    backbone = BACKBONES[type(pipe)]
    backbone.set_timesteps(pipe, sampling)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    velocity = backbone.velocity(pipe, sampling)
    start = backbone.noise(pipe, sampling) if sampling.latents is None else sampling.latents
    latents = [backbone.packed(start)]
    velocities = []
    for step in range(sampling.num_inference_steps):
        velocities.append(velocity(latents[-1], step))
        before = latents[-1].float().double() if sampling.float32_scheduler else latents[-1]
        # the difference is taken in the scheduler's dtype, as its own step does: values agree to the last bit
        latents.append(before + (pipe.scheduler.sigmas[step + 1] - pipe.scheduler.sigmas[step]) * velocities[-1])
    return Rollout(sigmas, latents, velocities, velocity)


def decode(pipe: DiffusionPipeline, latents: torch.Tensor, sampling: Sampling | None = None) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1]. `sampling` says the size of the picture where latents are packed."""
    pictures = pipe.vae.decode(BACKBONES[type(pipe)].vae_latents(pipe, latents, sampling)).sample
    return (0.5 * pictures + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: weights of a leg
# ---------------------------------------------------------------------------------------------------------------------


def integrated_basis(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integral from `start` to `end` of each Lagrange basis polynomial over `nodes`, in exact rational arithmetic."""
    exact_nodes = [Fraction(node) for node in nodes]
    integrals = []
    for own in exact_nodes:
        coefficients = [Fraction(1)]  # of the polynomial's powers, lowest first
        for other in exact_nodes:
            if other == own:
                continue
            # times (x - other) / (own - other)
            shifted = [Fraction(0), *coefficients]
            scaled = [coefficient * -other for coefficient in coefficients] + [Fraction(0)]
            coefficients = [(a + b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        integral = sum(
            coefficient * (Fraction(end) ** (power + 1) - Fraction(start) ** (power + 1)) / (power + 1)
            for power, coefficient in enumerate(coefficients)
        )
        integrals.append(float(integral))
    return integrals


def round_half_even(value: Fraction) -> int:
    """Python's `round` of a Fraction is exact and rounds halves to even."""
    return round(value)


def leg_supports(start: int, end: int, order: int, kind: str) -> list[int]:
    """Support steps of the leg [start, end).

    Lagrange and uniform weights spread at most `order` of them evenly over the leg's steps, left end first.
    Adams-Bashforth takes the `order` latest steps up to the left end (fewer at the beginning of the rollout).
    """
    if kind == "adams-bashforth":
        return list(range(max(0, start - order + 1), start + 1))
    count = min(order, end - start)
    if count == 1:
        return [start]
    return [start + round_half_even(Fraction(place * (end - 1 - start), count - 1)) for place in range(count)]


def leg_weights(sigmas: Sequence[float], start: int, end: int, supports: Sequence[int], kind: str) -> list[float]:
    """One weight per support; they sum to sigma_end - sigma_start."""
    if kind == "uniform":
        return [(sigmas[end] - sigmas[start]) / len(supports)] * len(supports)
    return integrated_basis([sigmas[step] for step in supports], sigmas[start], sigmas[end])


def active_of(supports: Sequence[int], start: int, active_supports: str) -> list[int]:
    """Which supports are evaluated again with gradients."""
    if active_supports == "none":
        return []
    if active_supports == "start":
        return [start]
    if active_supports == "midpoint":
        return list(supports[:2])
    if active_supports == "all":
        return list(supports)
    raise ValueError(f"unknown active_supports {active_supports!r}")


def window_start(steps: int, tail_ratio: float, at_least: int) -> int:
    """First step of the trainable window: the last ceil(tail_ratio N) steps, but not fewer than `at_least`.

    The ratio is read as the decimal number that was written (0.7 N is 7 at N = 10, not 8 by binary rounding).
    """
    length = math.ceil(Fraction(str(tail_ratio)) * steps)
    return steps - min(steps, max(at_least, length))


def rescaling(total: Sequence[float], active: Sequence[float], grad_rescale: float) -> float:
    """rho: 1 at grad_rescale 0; at 1 the active weights' absolute sum becomes the total's."""
    return 1 + grad_rescale * (sum(map(abs, total)) / sum(map(abs, active)) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The surrogates, each from its paper's formula
# ---------------------------------------------------------------------------------------------------------------------


def pin(value: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
    """Straight-through: the value of `value`, the gradient of `graph`."""
    return value.detach() + (graph - graph.detach())


def damped(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """The value of `x` with `alpha` times its gradient."""
    return x.detach() + alpha * (x - x.detach())


def backpropagated_tail(roll: Rollout, first: int) -> torch.Tensor:
    """The sample as Euler steps compute it from `latents[first]`, which is a constant: the chain rule in full."""
    x = roll.latents[first]
    for step in range(first, roll.steps):
        x = pin(roll.latents[step + 1], x + roll.h(step) * roll.velocity(x, step))
    return x


def refl(roll: Rollout, t: int) -> torch.Tensor:
    """ReFL (Xu et al., 2023): the denoised estimate of one step, whose input is a constant."""
    return roll.latents[t] - roll.sigmas[t] * roll.velocity(roll.latents[t], t)


def drtune(roll: Rollout, active: tuple[int, ...], t: int) -> torch.Tensor:
    """DRTune (Wu et al., 2024): every network input detached, the state itself not; K steps train; denoise at t."""
    x = roll.latents[0]
    for step in range(t):
        x = pin(roll.latents[step], x)
        v = roll.velocity(x.detach(), step) if step in active else roll.velocities[step]
        x = x + roll.h(step) * v
    v = roll.velocity(roll.latents[t], t) if t in active else roll.velocities[t]
    return x - roll.sigmas[t] * v


def connector_gap(value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B,): mean absolute difference."""
    return (value - latents).abs().flatten(1).mean(dim=1)


def leapalign(roll: Rollout, drawn: Drawn, alpha: float) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """LeapAlign (Liang et al., 2026): leap from k to j and from j to the end; the second leap's input is damped."""
    k, j, end = drawn.k, drawn.j, roll.steps
    first = roll.latents[k] + (roll.sigmas[j] - roll.sigmas[k]) * roll.velocity(roll.latents[k], k)
    connector = pin(roll.latents[j], first)
    second = connector + (roll.sigmas[end] - roll.sigmas[j]) * roll.velocity(damped(connector, alpha), j)
    gaps = {
        j: connector_gap(first.detach(), roll.latents[j]),
        end: connector_gap(second.detach(), roll.latents[end]),
    }
    return second, gaps


def euler_lengths(roll: Rollout, drawn: Drawn) -> dict[int, float]:
    """Length of each active step; with a posterior-mean endpoint the last one is the leap from there to the end."""
    lengths = {step: roll.h(step) for step in drawn.active}
    if drawn.posterior_step is not None:
        lengths[drawn.posterior_step] = roll.sigmas[-1] - roll.sigmas[drawn.posterior_step]
    return lengths


def sparse(roll: Rollout, drawn: Drawn, grad_rescale: float, window: int) -> torch.Tensor:
    """FlowBP-Sparse: the sampler's own sum, in which only the active velocities carry gradients."""
    lengths = euler_lengths(roll, drawn)
    rho = rescaling([roll.h(step) for step in range(window, roll.steps)], list(lengths.values()), grad_rescale)
    graph = roll.latents[0]
    for step, length in lengths.items():
        graph = graph + rho * length * roll.velocity(roll.latents[step], step)
    return graph


def bridge(roll: Rollout, drawn: Drawn, alpha: float, grad_rescale: float, window: int) -> torch.Tensor:
    """FlowBP-Bridge: a sparse sum up to j, a sparse sum after it, and v_j seeing the first one's damped gradient."""
    lengths = euler_lengths(roll, drawn)
    rho = rescaling([roll.h(step) for step in range(window, roll.steps)], list(lengths.values()), grad_rescale)
    first = roll.latents[0]
    for step in drawn.active:
        if step < drawn.j:
            first = first + rho * lengths[step] * roll.velocity(roll.latents[step], step)
    connector = pin(roll.latents[drawn.j], first)
    graph = connector + rho * lengths[drawn.j] * roll.velocity(damped(connector, alpha), drawn.j)
    for step in drawn.active:
        if step > drawn.j:
            graph = graph + rho * lengths[step] * roll.velocity(roll.latents[step], step)
    return graph


def lagrange_leg(
    roll: Rollout,
    state: torch.Tensor,
    input_at_start: torch.Tensor,
    start: int,
    end: int,
    options: dict[str, object],
    anchor_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One leg of FlowBP-Lagrange from `state` (the pinned latents[start], with its gradient).

    `input_at_start` is what the velocity at the left end sees. Returns the graph for gradients (active supports,
    rescaled and scaled) and the leg's value from cached velocities (every support, unscaled).
    """
    kind = options["weights"]
    supports = leg_supports(start, end, options["order"], kind)
    weights = dict(zip(supports, leg_weights(roll.sigmas, start, end, supports, kind), strict=True))
    assert math.isclose(sum(weights.values()), roll.sigmas[end] - roll.sigmas[start], rel_tol=1e-9)
    active = active_of(supports, start, options["active_supports"])
    leap = roll.sigmas[end] - roll.sigmas[start]

    value = roll.latents[start] + (1 - anchor_lambda) * leap * roll.velocities[start]
    for step in supports:
        value = value + anchor_lambda * weights[step] * roll.velocities[step]

    graph = state
    start_weight = (1 - anchor_lambda) * leap
    if active:
        rho = rescaling(list(weights.values()), [weights[step] for step in active], options["grad_rescale"])
        for step in active:
            weight = anchor_lambda * rho * weights[step]
            if step == start:
                start_weight += weight
            else:
                graph = graph + weight * options["support_scale"] * roll.velocity(roll.latents[step], step)
    if start_weight != 0:
        graph = graph + start_weight * roll.velocity(input_at_start, start)
    return graph, value


def lagrange(roll: Rollout, drawn: Drawn, options: dict[str, object]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """FlowBP-Lagrange: both legs integrate a polynomial through their supports' velocities."""
    k, j, end = drawn.k, drawn.j, roll.steps
    first, first_value = lagrange_leg(
        roll, roll.latents[k], roll.latents[k], k, j, options, anchor_lambda=options["anchor_lambda"]
    )
    connector = pin(roll.latents[j], first)
    second, second_value = lagrange_leg(
        roll, connector, damped(connector, options["alpha"]), j, end, options, anchor_lambda=1.0
    )
    gaps = {
        j: connector_gap(first_value, roll.latents[j]),
        end: connector_gap(second_value, roll.latents[end]),
    }
    return second, gaps


def surrogate_graph(
    name: str, options: dict[str, object], drawn: Drawn, roll: Rollout
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The surrogate endpoint's graph (its value is not pinned yet) and the connector gaps of rows that have them.

    `options` are every option of the method that its formula uses, defaults written out by the caller.
    """
    if name == "full":
        return backpropagated_tail(roll, 0), {}
    if name == "draft-k":
        return backpropagated_tail(roll, roll.steps - options["last_k"]), {}
    if name == "draft-lv":
        return backpropagated_tail(roll, roll.steps - 1), {}
    if name == "refl":
        return refl(roll, drawn.t), {}
    if name == "drtune":
        return drtune(roll, drawn.active, drawn.t), {}
    if name == "leapalign":
        return leapalign(roll, drawn, options["alpha"])
    window = window_start(roll.steps, options.get("tail_ratio", 1.0), 1 if name == "flowbp-sparse" else 3)
    if name == "flowbp-sparse":
        return sparse(roll, drawn, options["grad_rescale"], window), {}
    if name == "flowbp-bridge":
        return bridge(roll, drawn, options["alpha"], options["grad_rescale"], window), {}
    if name == "flowbp-lagrange":
        return lagrange(roll, drawn, options)
    raise ValueError(f"unknown method {name!r}")


def table_graph(terms: Sequence[tuple[int, float, float]], roll: Rollout) -> torch.Tensor:
    """The endpoint of a user's own table of (step, weight, coupling), steps rising, as one graph.

    By the definition of a term: the weight multiplies the velocity in the endpoint, and the coupling the gradient that
    crosses the velocity's input to everything accumulated before it.
    """
    graph = torch.zeros_like(roll.latents[0])
    for step, weight, coupling in terms:
        x = roll.latents[step] + coupling * (graph - graph.detach())
        graph = graph + weight * roll.velocity(x, step)
    return graph


# ---------------------------------------------------------------------------------------------------------------------
# Reward, objective, gradient
# ---------------------------------------------------------------------------------------------------------------------


def toy_reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """A smooth reward (B,) in (-1, 1) that sees every pixel and each image's prompt."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64) / 2
    second = torch.randn(4, 6, 3, 3, generator=generator, dtype=torch.float64) / 4
    features = torch.tanh(torch.nn.functional.conv2d(images.double() - 0.5, first, padding=1))
    features = torch.nn.functional.conv2d(features, second, stride=2).mean(dim=(2, 3))
    phases = torch.tensor([sum(map(ord, prompt)) % 17 for prompt in prompts], dtype=torch.float64)
    directions = torch.stack([torch.cos(phases + 0.7 * place) for place in range(4)], dim=1)
    return torch.tanh(0.5 * (features * directions).sum(dim=1))


def plain(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """mean(-w r) over the samples that the gap filter kept (those with a weight); 0 if it kept none."""
    return -(weights * rewards).sum() / max(1, int((weights > 0).sum()))


def hinge(clip: float, scale: float, undo_guidance: float = 1.0) -> Objective:
    """scale * mean(w relu(clip - r)) / undo_guidance over the samples that the gap filter kept."""

    def objective(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        losses = weights * torch.relu(clip - rewards)
        return scale * losses.sum() / max(1, int((weights > 0).sum())) / undo_guidance

    return objective


def similarity_weights(gaps: dict[int, torch.Tensor], j: int, end: int, tau: float) -> torch.Tensor:
    """1 / (max(d_j, tau) + max(d_0, tau)), where d_0 is the gap at the sample."""
    return 1 / (gaps[j].clamp(min=tau) + gaps[end].clamp(min=tau))


def brute_force(
    pipe: DiffusionPipeline,
    name: str,
    options: dict[str, object],
    drawn: Drawn,
    sampling: Sampling,
    objective: Objective = plain,
    reward: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] = toy_reward,
    gradient_scale: float = 1.0,
    sample_weights: torch.Tensor | None = None,
    terms: Sequence[tuple[int, float, float]] | None = None,
) -> Result:
    """One rollout's gradient.

    Args:
        pipe: the pipeline, one of `BACKBONES`; its scheduler's timesteps are set, nothing else of it changes.
        name: method, a key of docs/methods.md's table, or "table" for the user's own `terms`.
        options: the method's options, none left to a default. `tau` (None: weights 1), `max_gap_j` and
            `max_gap_0` (None or absent: keep all) are the objective's part of them.
        drawn: the steps that were drawn.
        sampling: the rollout.
        objective: of (rewards, weights), both (B,); with DRaFT-LV's n copies ((n + 1) B,), the samples first.
        reward: of (images, prompts).
        gradient_scale: multiplies the gradients only.
        sample_weights: (B,), multiply the method's own weights.
        terms: for "table".
    """
    parameters = {key: value for key, value in pipe.transformer.named_parameters() if value.requires_grad}
    roll = sample(pipe, sampling)
    prompts = sampling.image_prompts()
    end = roll.steps

    with torch.enable_grad():
        if name == "table":
            graph, gaps = table_graph(terms, roll), {}
        else:
            graph, gaps = surrogate_graph(name, options, drawn, roll)
        if drawn.posterior_step is None:
            value = roll.latents[end]
        else:
            t = drawn.posterior_step
            value = roll.latents[t] - roll.sigmas[t] * roll.velocities[t]
        endpoints = [pin(value, graph)]
        noise_generator = torch.Generator().manual_seed(drawn.noise_seed)
        for _ in range(options["num_noised"] if name == "draft-lv" else 0):
            sigma = pipe.scheduler.sigmas[end - 1]  # 1 - sigma is rounded to the scheduler's dtype
            drawn_noise = torch.randn(roll.latents[end].shape, generator=noise_generator, dtype=torch.float32)
            noised = (1 - sigma) * roll.latents[end] + sigma * drawn_noise.to(roll.latents[end])
            before = noised.float().double() if sampling.float32_scheduler else noised
            endpoints.append(before + roll.h(end - 1) * roll.velocity(noised, end - 1))

        weights = torch.ones(len(prompts), dtype=torch.float64)
        if gaps and options.get("tau") is not None:
            weights = similarity_weights(gaps, drawn.j, end, options["tau"])
        for step, option in ((drawn.j, "max_gap_j"), (end, "max_gap_0")):
            if options.get(option) is not None:
                weights = weights * (gaps[step] <= options[option])
        if sample_weights is not None:
            weights = weights * sample_weights

        # DRaFT-LV: the copies are further samples, and the mean over all of them is the mean over the n + 1.
        weights = weights.repeat(len(endpoints))
        images = torch.cat([decode(pipe, endpoint, sampling) for endpoint in endpoints])
        rewards = reward(images, prompts * len(endpoints))
        loss = objective(rewards, weights)
        found = torch.autograd.grad(loss * gradient_scale, list(parameters.values()), allow_unused=True)

    gradients = {
        key: torch.zeros_like(parameter) if gradient is None else gradient
        for (key, parameter), gradient in zip(parameters.items(), found, strict=True)
    }
    return Result(
        gradients=gradients,
        rewards=rewards.detach(),
        loss=loss.detach(),
        weights=weights.detach(),
        gaps={step: gap.detach() for step, gap in gaps.items()},
        images=images.detach(),
        rollout=roll,
    )


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector, in the parameters' order."""
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients.values()])


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected|, Euclidean norms over all parameters."""
    assert found.keys() == expected.keys()
    reference = flat(expected)
    return ((flat(found) - reference).norm() / reference.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# The stock pipeline as oracle
# ---------------------------------------------------------------------------------------------------------------------


def stock_gradients(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    reward: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] = toy_reward,
    more_arguments: dict[str, object] | None = None,
) -> dict[str, torch.Tensor]:
    """Backpropagates mean(-reward) through the pipeline's own `__call__` with its `no_grad` decorator taken off.

    `more_arguments` are added to the call's arguments.
    """
    arguments = {**sampling.call_arguments(), **(more_arguments or {})}
    parameters = {key: value for key, value in pipe.transformer.named_parameters() if value.requires_grad}
    with torch.enable_grad():
        images = type(pipe).__call__.__wrapped__(pipe, **arguments).images
        loss = -reward(images, sampling.image_prompts()).mean()
        found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))
