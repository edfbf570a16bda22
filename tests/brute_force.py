# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The gradients of every row, computed the expensive and obvious way.

This module shares nothing with `flowbp` but the pipeline's components. It samples with its own Euler loop, writes each
method's surrogate out as one autograd graph in which every active velocity is alive, pins the graph's value to the
sampled latents (straight-through), decodes, scores, and calls `backward` once. What it takes from the engine is only
which steps were drawn (`Drawn`); all weights, gaps and sample weights are computed here, by exact rational integration
of Lagrange polynomials where a method integrates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from diffusers import StableDiffusion3Pipeline

Velocity = Callable[[torch.Tensor, int], torch.Tensor]
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a rollout is asked for; the fields are the pipeline call's arguments of the same names.

    `seed` seeds one generator for the whole batch; `seeds` one generator per image; `latents` (B, C, H, W) replaces
    both. `float32_scheduler` says that the pipeline's scheduler is the stock one, which rounds the latents that it is
    given to float32.
    """

    prompts: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    seed: int | None = 0
    seeds: tuple[int, ...] | None = None
    latents: torch.Tensor | None = None
    sigmas: tuple[float, ...] | None = None
    negative_prompt: str | None = None
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
        return {
            "prompt": list(self.prompts),
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "guidance_scale": self.guidance_scale,
            "num_images_per_prompt": self.num_images_per_prompt,
            "generator": self.generator(),
            "latents": self.latents,
            "output_type": "pt",
            "max_sequence_length": self.max_sequence_length,
        }


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
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def velocity_function(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> Velocity:
    """The guided velocity `v(x, step)`: `c` without guidance, `u + s (c - u)` with it, `u` detached if asked for."""
    guided = sampling.guidance_scale > 1
    with torch.no_grad():
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            prompt=list(sampling.prompts),
            prompt_2=None,
            prompt_3=None,
            num_images_per_prompt=sampling.num_images_per_prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=sampling.negative_prompt,
            max_sequence_length=sampling.max_sequence_length,
        )
    timesteps = pipe.scheduler.timesteps

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        if guided:
            both = pipe.transformer(
                hidden_states=torch.cat([x, x]),
                timestep=timesteps[step].expand(2 * len(x)),
                encoder_hidden_states=torch.cat([negative_embeds, embeds]),
                pooled_projections=torch.cat([negative_pooled, pooled]),
                return_dict=False,
            )[0]
            unconditional, conditional = both[: len(x)], both[len(x) :]
            if not sampling.unconditional_gradient:
                unconditional = unconditional.detach()
            return unconditional + sampling.guidance_scale * (conditional - unconditional)
        return pipe.transformer(
            hidden_states=x,
            timestep=timesteps[step].expand(len(x)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    return velocity


def initial_latents(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> torch.Tensor:
    """The noise that the rollout starts from."""
    if sampling.latents is not None:
        return sampling.latents
    config = pipe.transformer.config
    images = len(sampling.prompts) * sampling.num_images_per_prompt
    shape = (config.in_channels, config.sample_size, config.sample_size)
    generator = sampling.generator()
    dtype = pipe.transformer.dtype
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape, generator=one, dtype=dtype) for one in generator])
    return torch.randn((images, *shape), generator=generator, dtype=dtype)


@torch.no_grad()
def sample(pipe: StableDiffusion3Pipeline, sampling: Sampling) -> Rollout:
    """Integrates the whole trajectory without gradients."""
    if sampling.sigmas is None:
        pipe.scheduler.set_timesteps(sampling.num_inference_steps)
    else:
        pipe.scheduler.set_timesteps(sigmas=list(sampling.sigmas))
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    velocity = velocity_function(pipe, sampling)
    latents = [initial_latents(pipe, sampling)]
    velocities = []
    for step in range(sampling.num_inference_steps):
        velocities.append(velocity(latents[-1], step))
        before = latents[-1].float().double() if sampling.float32_scheduler else latents[-1]
        # the difference is taken in the scheduler's dtype, as its own step does: values agree to the last bit
        latents.append(before + (pipe.scheduler.sigmas[step + 1] - pipe.scheduler.sigmas[step]) * velocities[-1])
    return Rollout(sigmas, latents, velocities, velocity)


def decode(pipe: StableDiffusion3Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1]."""
    config = pipe.vae.config
    pictures = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
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


def leapalign(roll: Rollout, drawn: Drawn, alpha: float) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """LeapAlign (Liang et al., 2026): leap from k to j and from j to the end; the second leap's input is damped."""
    k, j, end = drawn.k, drawn.j, roll.steps
    first = roll.latents[k] + (roll.sigmas[j] - roll.sigmas[k]) * roll.velocity(roll.latents[k], k)
    connector = pin(roll.latents[j], first)
    second = connector + (roll.sigmas[end] - roll.sigmas[j]) * roll.velocity(damped(connector, alpha), j)
    gaps = {
        j: (first.detach() - roll.latents[j]).abs().mean(dim=(1, 2, 3)),
        end: (second.detach() - roll.latents[end]).abs().mean(dim=(1, 2, 3)),
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
        j: (first_value - roll.latents[j]).abs().mean(dim=(1, 2, 3)),
        end: (second_value - roll.latents[end]).abs().mean(dim=(1, 2, 3)),
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
    pipe: StableDiffusion3Pipeline,
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
        pipe: the pipeline; its scheduler's timesteps are set, nothing else of it changes.
        name: method, a key of DESIGN.md's table, or "table" for the user's own `terms`.
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
            sigma = roll.sigmas[end - 1]
            noise = torch.randn(roll.latents[end].shape, generator=noise_generator, dtype=torch.float32)
            noised = (1 - sigma) * roll.latents[end] + sigma * noise.to(roll.latents[end])
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
        images = torch.cat([decode(pipe, endpoint) for endpoint in endpoints])
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
    pipe: StableDiffusion3Pipeline,
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
