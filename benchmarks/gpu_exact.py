# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Gradients on a device against other ways to compute them: the tests' tiny pipelines and their brute force."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from brute_force import Sampling, brute_force, relative_difference, stock_gradients
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from gradient_rows import NOISE_SEED, PROMPTS, ROWS, drawn_steps, found_gradients, pipeline_of, sampling_of
from journal import Journal
from tiny_sd3 import Float64Scheduler, tiny_sd3_pipeline

from flowbp import FlowBPCallback, get_method

# The brute force draws the noise of DRaFT-LV's copies on the CPU.
METHODS = ("full", "leapalign", "flowbp-sparse", "flowbp-bridge", "flowbp-lagrange")
NUM_STEPS = 6

Gradients = dict[str, torch.Tensor]


class DeviceScheduler(Float64Scheduler):
    """Puts timesteps on the pipeline's device where nobody names one, as the brute force does not.

    Attributes:
        device: the device.
    """

    device = torch.device("cpu")

    # Pipelines read the signature.
    @functools.wraps(Float64Scheduler.set_timesteps)
    def set_timesteps(self, *args: Any, device: str | torch.device | None = None, **kwargs: Any) -> None:
        """See `Float64Scheduler`."""
        super().set_timesteps(*args, device=self.device if device is None else device, **kwargs)


@dataclass(frozen=True)
class Rollout:
    """A tiny pipeline and how it samples, both in float64 on the CPU.

    Attributes:
        build: makes the pipeline.
        sampling: with noise in the shape that the pipeline takes.
    """

    build: Callable[[], DiffusionPipeline]
    sampling: Sampling

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[DiffusionPipeline, Sampling]:
        """Both on the device in this dtype; the brute force and the engine then have the same scheduler."""
        pipe = self.build()
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                # Not diffusers' own `to`, which warns that from_pretrained should be used.
                torch.nn.Module.to(module, device, dtype)
        scheduler_class = FlowMatchEulerDiscreteScheduler if dtype == torch.bfloat16 else DeviceScheduler
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        pipe.scheduler.device = device
        pipe.set_progress_bar_config(disable=True)
        embeddings = self.sampling.embeddings
        if embeddings is not None:
            embeddings = {name: tensor.to(device, dtype) for name, tensor in embeddings.items()}
        latents = self.sampling.latents.to(device, dtype)
        return pipe, replace(self.sampling, latents=latents, embeddings=embeddings)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


ROLLOUTS = {
    "SD3": Rollout(lambda: tiny_sd3_pipeline(seed=3), Sampling(PROMPTS[:2], NUM_STEPS, 3.5, latents=_noise(4, 4, 4))),
    "FLUX.1": Rollout(
        lambda: pipeline_of("flux-true-guidance", 3),
        sampling_of("flux-true-guidance", PROMPTS[:2], NUM_STEPS, latents=_noise(6, 16)),
    ),
    "FLUX.2-Klein": Rollout(
        lambda: pipeline_of("klein", 3), sampling_of("klein", PROMPTS[:2], NUM_STEPS, latents=_noise(4, 2, 3))
    ),
}


def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A smooth reward `(B,)` that sees every pixel, on any device."""
    values = images.flatten(1).to(torch.promote_types(images.dtype, torch.float32))
    directions = torch.arange(values.shape[1], device=images.device).to(values).cos()
    return torch.tanh((values * directions).mean(1) + 0.1 * values.square().mean(1))


def engine(pipe: DiffusionPipeline, sampling: Sampling, name: str, **options: Any) -> tuple[Gradients, FlowBPCallback]:
    """This library's gradients."""
    pipe.transformer.zero_grad()
    callback = FlowBPCallback(
        get_method(name, **ROWS[name]),
        generator=torch.Generator().manual_seed(5),
        noise_generator=torch.Generator().manual_seed(NOISE_SEED),
        unconditional_gradient=sampling.unconditional_gradient,
        strict=True,
        **options,
    )
    with callback.record(pipe):
        parts = [pipe(**sampling.call_arguments()).images for _ in range(1 + callback.copies)]
    callback.backward(reward, torch.cat(parts), sampling.image_prompts())
    return found_gradients(pipe), callback


def against_brute_force(rollout: Rollout, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Relative difference from autograd through all active steps on the same device, by method."""
    pipe, sampling = rollout.on(device, dtype)
    found = {}
    for name in METHODS:
        sampling = replace(sampling, unconditional_gradient=name == "full")
        gradients, callback = engine(pipe, sampling, name)
        with device:
            drawn = drawn_steps(name, callback.surrogate)
            expected = brute_force(pipe, name, ROWS[name], drawn, sampling, reward=reward)
        found[name] = relative_difference(gradients, expected.gradients)
    sampling = replace(sampling, unconditional_gradient=True)
    gradients, _ = engine(pipe, sampling, "full")
    found["full, stock pipeline's autograd"] = relative_difference(gradients, stock_gradients(pipe, sampling, reward))
    return found


def against_the_cpu(rollout: Rollout, device: torch.device) -> dict[str, Any]:
    """Relative difference of float64 gradients on the device from those on the CPU."""
    found = {}
    for name in ("full", "draft-lv", "flowbp-sparse"):
        gradients = []
        for place in (device, torch.device("cpu")):
            pipe, sampling = rollout.on(place, torch.float64)
            gradients.append({key: value.cpu() for key, value in engine(pipe, sampling, name)[0].items()})
        found[name] = relative_difference(*gradients)
    return found


def in_bfloat16(rollout: Rollout, device: torch.device) -> dict[str, Any]:
    """bf16 gradients against bf16 autograd through the stock, undecorated call; and how large rounding itself is."""
    pipe, sampling = rollout.on(device, torch.bfloat16)
    sampling = replace(sampling, unconditional_gradient=True)
    gradients, again, decoded_alone = (
        engine(pipe, sampling, "full", **options)[0] for options in ({}, {}, {"samples_per_decode": 1})
    )
    stock = stock_gradients(pipe, sampling, reward)
    exact = stock_gradients(*rollout.on(device, torch.float64), reward)
    return {
        "full, stock pipeline's autograd": relative_difference(gradients, stock),
        "twice": relative_difference(gradients, again),
        "samples_per_decode 1": relative_difference(decoded_alone, gradients),
        "stock pipeline's autograd, float64": relative_difference(stock, exact),
    }


@contextmanager
def _exact_float32() -> Iterator[None]:
    # cuDNN's convolutions take tf32 by default.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def exact(journal: Journal, device: torch.device) -> None:
    """Relative differences (2-norm over all parameters) for each tiny pipeline and dtype."""
    with _exact_float32():
        for dtype in (torch.float64, torch.float32):
            for name, rollout in ROLLOUTS.items():
                journal.attempt(
                    f"{name}, {str(dtype)[6:]}, brute force on the device",
                    lambda rollout=rollout, dtype=dtype: against_brute_force(rollout, device, dtype),
                )
        for name, rollout in ROLLOUTS.items():
            journal.attempt(f"{name}, bfloat16", lambda rollout=rollout: in_bfloat16(rollout, device))
        for name, rollout in ROLLOUTS.items():
            journal.attempt(f"{name}, float64, CPU", lambda rollout=rollout: against_the_cpu(rollout, device))
