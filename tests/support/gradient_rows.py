# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Every row of the method table with options, rollouts that they fit, and what the engine finds for them.

The bounds: `EXACT` holds against `brute_force`, with float64 sigmas as with the stock scheduler's float32 sigmas and
roundings, which the brute force repeats. Autograd through the stock scheduler rounds the gradient itself to float32 at
every step, hence `FLOAT32_SCHEDULER`.
"""

import torch
from brute_force import Drawn, Result, Sampling, relative_difference, toy_reward
from diffusers import DiffusionPipeline

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
