# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What an update of the benchmarks needs, and this library's update of it."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from meters import Stages
from model_sizes import MODELS, add_lora, build_pipeline, call_arguments

from flowbp import FlowBPCallback, Method, Surrogate
from flowbp.callback import BackwardOutput

LORA_RANK = 16


@dataclass
class Bench:
    """A pipeline with a LoRA, how it is called, a reward and an optimizer.

    Attributes:
        pipe: the pipeline; only the LoRA's parameters require gradients.
        call: arguments of the pipeline's call.
        reward: `f(images (B, 3, H, W), prompts) -> (B,)`, a module.
        optimizer: of the LoRA's parameters.
        samples_per_decode: the callback's option.
        sharded: the transformer, where FSDP2 shards it.
    """

    pipe: DiffusionPipeline
    call: dict[str, Any]
    reward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    samples_per_decode: int | None = None
    sharded: torch.nn.Module | None = None

    @property
    def noise(self) -> torch.Tensor:
        """What the rollouts start from, as the pipeline takes it."""
        return self.call["latents"]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.noise.device

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA's parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def existing_tensors(self) -> list[torch.Tensor]:
        """What is loaded before an update starts."""
        modules = [self.pipe.transformer, self.pipe.vae, self.reward]
        loaded = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return [*loaded, *(value for value in self.call.values() if isinstance(value, torch.Tensor))]

    def gradient(self) -> torch.Tensor:
        """The parameters' gradients as one vector, float64 on the CPU."""
        return torch.cat([parameter.grad.flatten().cpu().double() for parameter in self.parameters])

    def forget_gradients(self) -> None:
        """Free gradients and what else is garbage."""
        self.optimizer.zero_grad()
        gc.collect()


def build_bench(
    name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    batch: int,
    resolution: int | None = None,
    num_inference_steps: int | None = None,
    reward: torch.nn.Module | None = None,
    samples_per_decode: int | None = None,
    prepare: Callable[[torch.nn.Module], None] | None = None,
    lora: bool = True,
) -> Bench:
    """A model of `MODELS` with random weights; what is not given is the model's default.

    `prepare` is given the transformer before it gets its LoRA; without `lora` all its weights are trained.
    """
    model = MODELS[name]
    pipe = build_pipeline(model, device, dtype)
    if prepare is not None:
        prepare(pipe.transformer)
    if lora:
        parameters = add_lora(pipe.transformer, model.lora_layers, LORA_RANK)
    else:
        parameters = list(pipe.transformer.requires_grad_(True).parameters())
    call = call_arguments(
        model, pipe, batch, resolution or model.resolution, num_inference_steps or model.num_inference_steps
    )
    # A learning rate of 0 costs the same step, and leaves all updates of a run the same work to do.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4)
    return Bench(pipe, call, SmallReward(device) if reward is None else reward, optimizer, samples_per_decode)


class SmallReward(torch.nn.Module):
    """A small convolutional network in float32 that does not look at the prompts."""

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()
        with torch.device(device):
            self.layers = torch.nn.Sequential(
                *(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.SiLU()),
                *(torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.SiLU()),
                *(torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.SiLU()),
                *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1)),
            )
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards `(B,)`."""
        return self.layers(images.float()).flatten()


def record(bench: Bench, callback: FlowBPCallback) -> torch.Tensor:
    """The images of a recorded call of the pipeline, DRaFT-LV's copies after them."""
    with callback.record(bench.pipe):
        parts = [bench.pipe(**bench.call, callback_on_step_end=callback).images for _ in range(1 + callback.copies)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sweep_update(bench: Bench, method: Method | Surrogate, stages: Stages, **options: Any) -> BackwardOutput:
    """An update of this library up to the gradients.

    Args:
        bench: what is trained.
        method: of `FlowBPCallback`, as are `options`.
        stages: told of every stage.
    """
    callback = FlowBPCallback(
        method,
        generator=torch.Generator().manual_seed(0),
        samples_per_decode=bench.samples_per_decode,
        on_stage=stages.mark,
        **options,
    )
    images = record(bench, callback)
    return callback.backward(bench.reward, images, [""] * len(images), transformer=bench.sharded)


def whole_update(bench: Bench, make_gradients: Callable[[Stages], Any], stages: Stages) -> None:
    """`make_gradients`, which marks the stages that it enters after "rollout", and the optimizer's step."""
    stages.mark("rollout")
    make_gradients(stages)
    stages.mark("optimizer")
    bench.optimizer.step()
    stages.mark(None)
