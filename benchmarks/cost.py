# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Measures what one update costs: seconds and peak memory by stage, against the usual way and against the floor.

Three variants take turns on one pipeline, with the same surrogate, noise and prompts:

- `sweep`: this library, `FlowBPCallback` on the stock `StableDiffusion3Pipeline`;
- `usual`: one autograd graph. The active steps' velocities are evaluated again, both guidance branches in one batch,
  all graphs stay alive until a single `loss.backward()`;
- `floor`: the passes that no implementation avoids, alone: the rollout's forward passes, decode and reward forward
  and backward, one forward and backward pass for each active step, the optimizer's step. Its gradient means nothing.

The models have random weights and are built from configs; nothing is downloaded. benchmarks/README.md explains the
numbers.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import cast_training_params
from diffusers.utils.logging import set_verbosity_error
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm.auto import tqdm

from flowbp import METHODS, FlowBPCallback, Method, Objective, Surrogate, get_method
from flowbp.objectives import connector_gaps, sample_weights
from flowbp.sweep import SweepOutput

STAGES = ("rollout", "decode", "reward", "sweep", "optimizer")
VARIANTS = ("sweep", "usual", "floor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_NUM_ACTIVE = (1, 2, 4, 8)
LORA_RANK = 16
# The attention layers that diffusers' LoRA script for Stable Diffusion 3 trains.
LORA_LAYERS = [
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
]


@dataclass(frozen=True)
class ModelSize:
    """A pipeline to build, and what a run of it takes by default.

    Attributes:
        transformer: arguments of `SD3Transformer2DModel`.
        vae: arguments of `AutoencoderKL` that set its size.
        text_tokens: length of the prompt embeddings.
        resolution: default width and height in pixels.
        num_inference_steps: default N.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int
    resolution: int
    num_inference_steps: int


MODELS: Mapping[str, ModelSize] = {
    # For the tests, and to see a table in seconds.
    "tiny": ModelSize(
        transformer={
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "sample_size": 8,
            "pos_embed_max_size": 16,
        },
        vae={"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2},
        text_tokens=4,
        resolution=16,
        num_inference_steps=10,
    ),
    # About 100M parameters. The VAE is narrow, so that the transformer's graph is the larger one.
    "100m": ModelSize(
        transformer={
            "num_layers": 11,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "caption_projection_dim": 512,
            "joint_attention_dim": 768,
            "pooled_projection_dim": 768,
            "sample_size": 32,
            "pos_embed_max_size": 32,
            "qk_norm": "rms_norm",
        },
        vae={"block_out_channels": (16, 32, 32, 32), "layers_per_block": 2, "norm_num_groups": 8},
        text_tokens=77,
        resolution=128,
        num_inference_steps=10,
    ),
    # The published config of Stable Diffusion 3.5 Medium, and 77 CLIP tokens followed by 256 of T5.
    "sd3.5-medium": ModelSize(
        transformer={
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "sample_size": 128,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        text_tokens=333,
        resolution=512,
        num_inference_steps=25,
    ),
}


# Stages: where an update's time and memory go.


class Stages:
    """Splits one update into stages.

    Args:
        device: where the models are; on CUDA each mark waits for the device.
        take_peak: gives the largest number of bytes in use since it was last called, or `None`.

    Attributes:
        seconds: wall time by stage.
        cpu_seconds: CPU time of this process by stage.
        peaks: largest number of bytes by stage, empty without `take_peak`.
    """

    def __init__(self, device: torch.device, take_peak: Callable[[], int] | None = None) -> None:
        self._device = device
        self._take_peak = take_peak
        self.current: str | None = None
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cpu_seconds = dict.fromkeys(STAGES, 0.0)
        self.peaks: dict[str, int] = {}

    def mark(self, stage: str | None) -> None:
        """The stage that runs ends here and `stage` begins; `None` ends the update."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, cpu_now = time.perf_counter(), time.process_time()
        if self.current is not None:
            self.seconds[self.current] += now - self._start
            self.cpu_seconds[self.current] += cpu_now - self._cpu_start
        if self._take_peak is not None:
            peak = self._take_peak()
            if self.current is not None:
                self.peaks[self.current] = max(peak, self.peaks.get(self.current, 0))
        # The profiler sees the same boundaries.
        with record_function(f"flowbp stage {stage}"):
            self.current = stage
        self._start, self._cpu_start = time.perf_counter(), time.process_time()


class SavedBytes:
    """Counts the bytes that autograd keeps for backward, live, each storage once.

    What is kept inside `torch.utils.checkpoint` (`samples_per_decode`) is not seen here; the allocator sees it.

    Args:
        excluded: tensors that exist anyway (parameters, buffers, prompt embeddings).
    """

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._users: dict[int, int] = {}
        self.live = 0
        self._peak = 0

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def take_peak(self) -> int:
        """Largest number of live bytes since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def _pack(self, tensor: torch.Tensor) -> "_Saved":
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._excluded:
            return _Saved(self, tensor, None)
        users = self._users.get(key, 0)
        if not users:
            self.live += storage.nbytes()
            self._peak = max(self._peak, self.live)
        self._users[key] = users + 1
        return _Saved(self, tensor, key)

    def release(self, key: int, size: int) -> None:
        """One saved tensor of the storage `key` is gone."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


class _Saved:
    """What autograd keeps in a tensor's place; its end is the tensor's release."""

    __slots__ = ("tensor", "_counter", "_key")

    def __init__(self, counter: SavedBytes, tensor: torch.Tensor, key: int | None) -> None:
        self.tensor, self._counter, self._key = tensor, counter, key

    def __del__(self) -> None:
        if self._key is not None:
            self._counter.release(self._key, self.tensor.untyped_storage().nbytes())


def cpu_allocator_peaks(run: Callable[[], None]) -> dict[str, int]:
    """Largest number of bytes above the start that PyTorch's CPU allocator holds in each stage of `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return peaks_by_stage(events)


def peaks_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Running sum of a profiler trace's memory events: its largest value between the marks of `Stages`."""
    relevant = [
        event
        for event in events
        if event.get("ph") in ("X", "i")
        and (event.get("name") == "[memory]" or str(event.get("name")).startswith("flowbp stage "))
    ]
    peaks: dict[str, int] = {}
    live, stage = 0, None
    for event in sorted(relevant, key=lambda event: float(event["ts"])):
        if event["name"] == "[memory]":
            # Type 0 is the CPU.
            if event["args"]["Device Type"] == 0:
                live += event["args"]["Bytes"]
        else:
            stage = event["name"].removeprefix("flowbp stage ")
        if stage in STAGES:
            peaks[stage] = max(peaks.get(stage, 0), live)
    return peaks


class CudaPeak:
    """Peak of `torch.cuda.max_memory_allocated` above what was allocated when this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def take_peak(self) -> int:
        """Largest number of bytes above the base since the last call."""
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


# The pipeline.


@dataclass
class Bench:
    """The models and inputs that all variants share."""

    pipe: StableDiffusion3Pipeline
    reward_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    noise: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    negative_pooled_embeds: torch.Tensor
    resolution: int
    steps_per_forward: int
    samples_per_decode: int | None

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.noise.device

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The LoRA's parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def existing_tensors(self) -> list[torch.Tensor]:
        """What is loaded before an update starts."""
        modules = [self.pipe.transformer, self.pipe.vae, self.reward_model]
        return [
            *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())),
            *(self.noise, self.prompt_embeds, self.pooled_embeds),
            *(self.negative_prompt_embeds, self.negative_pooled_embeds),
        ]

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards `(B,)` of images `(B, 3, H, W)`."""
        return self.reward_model(images.float()).flatten()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1], as the pipeline makes them."""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)

    def transformer(self, latents: torch.Tensor, step: int, branches: Sequence[str]) -> torch.Tensor:
        """The transformer's output for a batch of guidance branches, `(len(branches) * B, ...)`."""
        embeds = {"conditional": self.prompt_embeds, "unconditional": self.negative_prompt_embeds}
        pooled = {"conditional": self.pooled_embeds, "unconditional": self.negative_pooled_embeds}
        latents = torch.cat([latents] * len(branches))
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=self.pipe.scheduler.timesteps[step].expand(len(latents)),
            encoder_hidden_states=torch.cat([embeds[branch] for branch in branches]),
            pooled_projections=torch.cat([pooled[branch] for branch in branches]),
            return_dict=False,
        )[0]


def build(size: ModelSize, args: argparse.Namespace) -> Bench:
    """The pipeline with random weights and a LoRA, a reward model, an optimizer and inputs."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    levels = len(size.vae["block_out_channels"])
    with torch.device(device):
        transformer = SD3Transformer2DModel(in_channels=16, out_channels=16, patch_size=2, **size.transformer)
        transformer.to(dtype)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **size.vae,
        ).to(dtype)
        reward_model = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.SiLU()),
            *(torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.SiLU()),
            *(torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.SiLU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1)),
        )
    for module in (transformer, vae, reward_model):
        module.requires_grad_(False).eval()
    # Random matrices: with the usual zeros, half of the LoRA would get no gradient to compare.
    transformer.add_adapter(
        LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights=False, target_modules=LORA_LAYERS)
    )
    transformer.to(device)
    cast_training_params(transformer, dtype=torch.float32)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3"), None),
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(args.num_inference_steps, device=device)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    # A learning rate of 0 costs the same step, and leaves all updates of a run the same work to do.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(args.batch, *shape).to(device, dtype)

    side = args.resolution // pipe.vae_scale_factor
    return Bench(
        pipe=pipe,
        reward_model=reward_model,
        optimizer=optimizer,
        noise=normal(16, side, side),
        prompt_embeds=normal(size.text_tokens, size.transformer["joint_attention_dim"]),
        pooled_embeds=normal(size.transformer["pooled_projection_dim"]),
        negative_prompt_embeds=normal(size.text_tokens, size.transformer["joint_attention_dim"]),
        negative_pooled_embeds=normal(size.transformer["pooled_projection_dim"]),
        resolution=args.resolution,
        steps_per_forward=args.steps_per_forward,
        samples_per_decode=args.samples_per_decode,
    )


# The three variants. Each leaves gradients in `.grad` and marks the stages that it enters after "rollout".


@dataclass(frozen=True)
class Case:
    """What one line of the table measures."""

    surrogate: Surrogate
    guidance_scale: float
    unconditional_gradient: bool
    seed: int

    @property
    def is_guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.guidance_scale > 1

    def noise_generator(self) -> torch.Generator:
        """Generator of the noise of DRaFT-LV's copies, the same for all variants."""
        return torch.Generator().manual_seed(self.seed)


class _MarkedCallback(FlowBPCallback):
    """Marks where `backward` goes over from the endpoint to the sweep."""

    stages: Stages

    def sweep(self, adjoint: torch.Tensor | Sequence[torch.Tensor], **options: Any) -> SweepOutput:
        self.stages.mark("sweep")
        return super().sweep(adjoint, **options)


def sweep_update(bench: Bench, case: Case, stages: Stages) -> None:
    """This library: record the stock pipeline, then `backward`."""
    callback = _MarkedCallback(
        case.surrogate,
        unconditional_gradient=case.unconditional_gradient,
        samples_per_decode=bench.samples_per_decode,
        steps_per_forward=bench.steps_per_forward,
        noise_generator=case.noise_generator(),
    )
    callback.stages = stages
    objective = Objective()

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        stages.mark("reward")
        return bench.reward(images, prompts)

    def marked_objective(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        loss = objective(rewards, weights)
        # The decoder's backward pass follows.
        stages.mark("decode")
        return loss

    def decoder_starts(*_: object) -> None:
        if stages.current == "rollout":
            stages.mark("decode")

    handle = bench.pipe.vae.decoder.register_forward_pre_hook(decoder_starts)
    parts = []
    try:
        with callback.record(bench.pipe):
            for _ in range(1 + callback.copies):
                stages.mark("rollout")
                parts.append(
                    bench.pipe(
                        prompt_embeds=bench.prompt_embeds,
                        pooled_prompt_embeds=bench.pooled_embeds,
                        negative_prompt_embeds=bench.negative_prompt_embeds,
                        negative_pooled_prompt_embeds=bench.negative_pooled_embeds,
                        height=bench.resolution,
                        width=bench.resolution,
                        num_inference_steps=len(bench.pipe.scheduler.timesteps),
                        guidance_scale=case.guidance_scale,
                        latents=bench.noise,
                        output_type="pt",
                        callback_on_step_end=callback,
                    ).images
                )
    finally:
        handle.remove()
    images = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    callback.backward(reward, images, [""] * len(images), objective=marked_objective)


def usual_update(bench: Bench, case: Case, stages: Stages) -> None:
    """The usual way: every active step's graph, with both branches, is alive until one `loss.backward()`."""
    surrogate, sigmas = case.surrogate, bench.pipe.scheduler.sigmas

    def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
        if not case.is_guided:
            return bench.transformer(latents, step, ["conditional"])
        unconditional, conditional = bench.transformer(latents, step, ["unconditional", "conditional"]).chunk(2)
        if not case.unconditional_gradient:
            unconditional = unconditional.detach()
        return unconditional + case.guidance_scale * (conditional - unconditional)

    latents, velocities = [bench.noise], []
    with torch.no_grad():
        for step in range(surrogate.last_step(len(sigmas) - 1) + 1):
            velocities.append(velocity(latents[-1], step))
            # The scheduler's arithmetic: float32, then the model's dtype.
            following = latents[-1].float() + (sigmas[step + 1] - sigmas[step]) * velocities[-1].float()
            latents.append(following.to(bench.noise.dtype))
        if surrogate.endpoint == "sample":
            sample = latents[-1]
        else:
            step = surrogate.endpoint[1]
            sample = (latents[step].float() - sigmas[step] * velocities[step].float()).to(bench.noise.dtype)

    stages.mark("sweep")
    # Zero in value; carries the gradient of all terms so far.
    path = torch.zeros_like(bench.noise)
    for term in surrogate.terms:
        state = latents[term.step]
        if term.coupling:
            state = state + term.coupling * (path - path.detach())
        active = velocity(state, term.step)
        path = path + term.weight * (active - active.detach())
    endpoints = [sample + (path - path.detach())]
    noise_generator = case.noise_generator()
    for _ in range(surrogate.num_noised):
        # DRaFT-LV: the sample, noised back to the last step's level, and that step once more.
        (term,) = surrogate.terms
        noise = torch.randn(sample.shape, generator=noise_generator).to(sample)
        state = (1 - sigmas[term.step]) * sample + sigmas[term.step] * noise
        endpoints.append(state + term.weight * velocity(state, term.step))

    stages.mark("decode")
    images = [bench.decode(endpoint) for endpoint in endpoints]
    for endpoint, decoded in zip(endpoints, images, strict=True):
        decoded.register_hook(lambda gradient: stages.mark("decode"))
        endpoint.register_hook(lambda gradient: stages.mark("sweep"))
    stages.mark("reward")
    rewards = bench.reward(torch.cat(images), [])
    gaps = connector_gaps(surrogate, dict(enumerate(latents)), dict(enumerate(velocities)))
    weights = sample_weights(surrogate, gaps)
    loss = Objective()(rewards, torch.ones_like(rewards) if weights is None else weights)
    loss.backward()


def floor_update(bench: Bench, case: Case, stages: Stages) -> None:
    """The unavoidable passes alone."""
    surrogate = case.surrogate
    branches = ["unconditional", "conditional"] if case.is_guided else ["conditional"]
    trained_branches = branches if case.unconditional_gradient else ["conditional"]
    last = surrogate.last_step(len(bench.pipe.scheduler.timesteps))
    with torch.no_grad():
        for step in [*range(last + 1), *[last] * surrogate.num_noised]:
            bench.transformer(bench.noise, step, branches)
    for _ in range(1 + surrogate.num_noised):
        stages.mark("decode")
        endpoint = bench.noise.clone().requires_grad_()
        images = bench.decode(endpoint)
        stages.mark("reward")
        pictures = images.detach().requires_grad_()
        bench.reward(pictures, []).sum().backward()
        stages.mark("decode")
        images.backward(pictures.grad)
        for term in surrogate.terms:
            stages.mark("sweep")
            state = bench.noise.clone().requires_grad_(term.coupling != 0)
            output = bench.transformer(state, term.step, trained_branches)
            output.backward(torch.ones_like(output))


UPDATES: Mapping[str, Callable[[Bench, Case, Stages], None]] = {
    "sweep": sweep_update,
    "usual": usual_update,
    "floor": floor_update,
}


def update(variant: str, bench: Bench, case: Case, stages: Stages) -> None:
    """One whole update; the gradients stay in `.grad`."""
    stages.mark("rollout")
    UPDATES[variant](bench, case, stages)
    stages.mark("optimizer")
    bench.optimizer.step()
    stages.mark(None)


# Measuring.


@dataclass
class Measured:
    """All numbers of one variant of one case."""

    stages: list[Stages] = field(default_factory=list)
    peak_allocated: dict[str, int] = field(default_factory=dict)
    peak_saved: dict[str, int] = field(default_factory=dict)
    gradient: torch.Tensor | None = None
    is_out_of_memory: bool = False


def measure(bench: Bench, cases: Sequence[Case], repeats: int) -> list[dict[str, Measured]]:
    """Memory once, then seconds `repeats` times; cases and variants take turns within each repeat."""
    # Allocates the optimizer's state, which belongs to the loaded model.
    _run(Measured(), "floor", bench, cases[0], Stages(bench.device))
    results = [{variant: Measured() for variant in VARIANTS} for _ in cases]
    with tqdm(total=(1 + repeats) * len(cases) * len(VARIANTS), desc="updates", file=sys.stderr) as progress:
        for case, result in zip(cases, results, strict=True):
            for variant in VARIANTS:
                _measure_memory(result[variant], variant, bench, case)
                progress.update()
        for repeat in range(repeats):
            for case, result in zip(cases, results, strict=True):
                # Back and forth, so that none always follows the same other.
                for variant in VARIANTS if repeat % 2 == 0 else reversed(VARIANTS):
                    stages = Stages(bench.device)
                    if _run(result[variant], variant, bench, case, stages):
                        result[variant].stages.append(stages)
                    progress.update()
    return results


def _run(measured: Measured, variant: str, bench: Bench, case: Case, stages: Stages) -> bool:
    """One update, with its gradient kept in `measured` the first time; False if the GPU's memory is too small."""
    if measured.is_out_of_memory:
        return False
    bench.optimizer.zero_grad()
    gc.collect()
    try:
        update(variant, bench, case, stages)
    except torch.OutOfMemoryError:
        measured.is_out_of_memory = True
    if not measured.is_out_of_memory and measured.gradient is None and variant != "floor":
        measured.gradient = torch.cat([parameter.grad.flatten().double().cpu() for parameter in bench.trainable])
    bench.optimizer.zero_grad()
    if measured.is_out_of_memory:
        gc.collect()
        torch.cuda.empty_cache()
    return not measured.is_out_of_memory


def _measure_memory(measured: Measured, variant: str, bench: Bench, case: Case) -> None:
    if bench.device.type == "cuda":
        bench.optimizer.zero_grad()
        gc.collect()
        stages = Stages(bench.device, CudaPeak(bench.device).take_peak)
        if _run(measured, variant, bench, case, stages):
            measured.peak_allocated = stages.peaks
    else:
        counter = SavedBytes(bench.existing_tensors())
        stages = Stages(bench.device, counter.take_peak)

        def run() -> None:
            with counter:
                _run(measured, variant, bench, case, stages)

        measured.peak_allocated = cpu_allocator_peaks(run)
        measured.peak_saved = stages.peaks


# Reporting.


def summary(measured: Measured) -> dict[str, Any] | None:
    """Medians by stage and peaks of one variant; `None` if the GPU's memory was too small for it."""
    if measured.is_out_of_memory:
        return None

    def medians(of: Callable[[Stages], Mapping[str, float]]) -> dict[str, float]:
        by_stage = {stage: statistics.median(of(stages)[stage] for stages in measured.stages) for stage in STAGES}
        return {"total": statistics.median(sum(of(stages).values()) for stages in measured.stages)} | by_stage

    return {
        "seconds": medians(lambda stages: stages.seconds),
        "seconds_of_repeats": [sum(stages.seconds.values()) for stages in measured.stages],
        "cpu_seconds": medians(lambda stages: stages.cpu_seconds),
        "cpu_seconds_of_repeats": [sum(stages.cpu_seconds.values()) for stages in measured.stages],
        "peak_allocated_bytes": _with_total(measured.peak_allocated),
        "peak_saved_bytes": _with_total(measured.peak_saved) if measured.peak_saved else None,
    }


def _with_total(peaks: Mapping[str, int]) -> dict[str, int]:
    return {"total": max(peaks.values())} | {stage: peaks[stage] for stage in STAGES}


def compare(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The first variant's cost as a share of the second's; times are medians over the repeats of paired ratios."""
    if first is None or second is None:
        return {"seconds": None, "cpu_seconds": None, "peak_allocated_bytes": None, "peak_saved_bytes": None}

    def paired(name: str) -> float:
        pairs = zip(first[name], second[name], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def peaks(name: str) -> float | None:
        return first[name]["total"] / second[name]["total"] if first[name] is not None else None

    return {
        "seconds": paired("seconds_of_repeats"),
        "cpu_seconds": paired("cpu_seconds_of_repeats"),
        "peak_allocated_bytes": peaks("peak_allocated_bytes"),
        "peak_saved_bytes": peaks("peak_saved_bytes"),
    }


def case_report(case: Case, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """One case in plain values."""
    by_variant = {variant: summary(measured[variant]) for variant in VARIANTS}
    mine, usual = measured["sweep"].gradient, measured["usual"].gradient
    difference = None if mine is None or usual is None else ((mine - usual).norm() / usual.norm()).item()
    return {
        "num_terms": len(case.surrogate.terms),
        "guidance_scale": case.guidance_scale,
        "unconditional_gradient": case.unconditional_gradient,
        "endpoint": case.surrogate.endpoint,
        "terms": [(term.step, term.weight, term.coupling) for term in case.surrogate.terms],
        **by_variant,
        "sweep_to_usual": compare(by_variant["sweep"], by_variant["usual"]),
        "sweep_to_floor": compare(by_variant["sweep"], by_variant["floor"]),
        "floor_to_usual": compare(by_variant["floor"], by_variant["usual"]),
        "gradient_difference": difference,
    }


def targets(cases: Sequence[Mapping[str, Any]], clock: str) -> list[dict[str, Any]]:
    """The project's targets that these cases can decide, with what was found.

    Args:
        cases: of `case_report`.
        clock: `"seconds"` or `"cpu_seconds"`, which decides about times.
    """
    found = []

    def add(name: str, value: float | None, bound: float) -> None:
        if value is not None:
            found.append({"target": name, "value": value, "bound": bound, "reached": value <= bound})

    for scale in dict.fromkeys(case["guidance_scale"] for case in cases):
        by_terms = {case["num_terms"]: case for case in cases if case["guidance_scale"] == scale}
        words = f"guidance {scale:g}"
        if 2 in by_terms and 8 in by_terms and by_terms[2]["sweep"] and by_terms[8]["sweep"]:
            few, many = (by_terms[terms]["sweep"]["peak_allocated_bytes"]["total"] for terms in (2, 8))
            add(f"{words}: memory at K = 8 / memory at K = 2", many / few, 1.05)
        for terms, bound in ((4, 1 / 3), (8, 1 / 6)):
            if terms in by_terms:
                share = by_terms[terms]["sweep_to_usual"]["peak_allocated_bytes"]
                add(f"{words}: memory / usual way's, K = {terms}", share, bound)
        for terms, case in by_terms.items():
            if scale > 1:
                add(f"{words}: seconds / usual way's, K = {terms}", case["sweep_to_usual"][clock], 0.8)
            add(f"{words}: seconds / floor's, K = {terms}", case["sweep_to_floor"][clock], 1.05)
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        # glibc's allocator decides how often large tensors cost page faults.
        "malloc_settings": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def versions() -> dict[str, str]:
    """Versions of what runs."""
    import flowbp

    names = ("torch", "diffusers", "transformers", "peft")
    return {"python": platform.python_version(), "flowbp": flowbp.__version__} | {n: version(n) for n in names}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    settings, machine = report["settings"], report["hardware"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    lines = [
        f"# Cost of one update: {settings['method']}, {settings['model']}",
        "",
        f"{settings['transformer_parameters'] / 1e6:.0f}M parameters, LoRA rank {LORA_RANK} on attention "
        f"({settings['trainable_parameters'] / 1e6:.1f}M), {settings['dtype']}, {settings['resolution']} pixels, "
        f"batch {settings['batch']}, N = {settings['num_inference_steps']}, steps_per_forward "
        f"{settings['steps_per_forward']}, samples_per_decode {settings['samples_per_decode']}. On {on}; torch "
        f"{report['versions']['torch']}, diffusers {report['versions']['diffusers']}. Medians of "
        f"{settings['repeats']} repeats in which the three variants took turns; ratios are medians of the repeats' "
        f"ratios. Load average {report['load_average'][0]:.1f} before, {report['load_average'][1]:.1f} after on "
        f"{machine['cores']} cores.",
    ]

    def label(case: Mapping[str, Any]) -> str:
        return f"| {case['guidance_scale']:g} | {case['num_terms']} |"

    def cell(value: float | None) -> str:
        return "out of memory" if value is None else f"{value:.2f}"

    def total(case: Mapping[str, Any], variant: str, name: str, scale: float = 1.0) -> float | None:
        return None if case[variant] is None else case[variant][name]["total"] / scale

    pairs = ("sweep_to_usual", "sweep_to_floor", "floor_to_usual")
    clocks = {"seconds": "Seconds per update"}
    if report["target_clock"] == "cpu_seconds":
        clocks = {"cpu_seconds": "CPU seconds per update (one thread)", "seconds": "Wall seconds per update"}
    for clock, title in clocks.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| guidance | K | sweep | usual | floor | sweep / usual | sweep / floor | floor / usual |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for case in report["cases"]:
            cells = [cell(total(case, variant, clock)) for variant in VARIANTS]
            cells += [cell(case[pair][clock]) for pair in pairs]
            lines.append(f"{label(case)} {' | '.join(cells)} |")
    saved = machine["gpu"] is None
    lines += [
        "",
        "## Peak memory above the loaded model, MiB",
        "",
        "Allocated: the allocator's peak." + (" Saved: live bytes kept for backward." if saved else ""),
        "",
        "| guidance | K | sweep, allocated | usual | sweep / usual |"
        + (" sweep, saved | usual | sweep / usual |" * saved),
        "|---|---|---|---|---|" + "---|---|---|" * saved,
    ]
    for case in report["cases"]:
        cells = []
        for name in ("peak_allocated_bytes", "peak_saved_bytes")[: 1 + saved]:
            cells += [cell(total(case, variant, name, 2**20)) for variant in ("sweep", "usual")]
            cells.append(cell(case["sweep_to_usual"][name]))
        lines.append(f"{label(case)} {' | '.join(cells)} |")
    lines += [
        "",
        f"## By stage: {'CPU ' * (report['target_clock'] == 'cpu_seconds')}seconds; allocated MiB",
        "",
        f"| guidance | K | variant | {' | '.join(STAGES)} |",
        "|---|---|---|" + "---|" * len(STAGES),
    ]
    for case in report["cases"]:
        for variant in VARIANTS:
            if case[variant] is None:
                continue
            cells = [
                f"{case[variant][report['target_clock']][stage]:.3f}; "
                f"{case[variant]['peak_allocated_bytes'][stage] / 2**20:.0f}"
                for stage in STAGES
            ]
            lines.append(f"{label(case)} {variant} | {' | '.join(cells)} |")
    lines += ["", "## Targets", "", "| target | found | bound | reached |", "|---|---|---|---|"]
    for target in report["targets"]:
        reached = "yes" if target["reached"] else "no"
        lines.append(f"| {target['target']} | {target['value']:.3f} | {target['bound']:.3f} | {reached} |")
    differences = [case["gradient_difference"] for case in report["cases"]]
    differences = [difference for difference in differences if difference is not None]
    if differences:
        lines += ["", f"Largest relative difference of the gradients, sweep and usual way: {max(differences):.1e}."]
    return "\n".join(lines) + "\n"


# The command line.


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="100m", help="Size of the random pipeline to build (default: 100m).")
    add("--method", choices=list(METHODS), default="flowbp-sparse", help="Row of the method table.")
    add(
        "--num_active",
        type=int,
        nargs="+",
        help="Numbers of active steps K, for the methods that have such an option (draft-k: its last_k). Default: "
        f"those of {', '.join(map(str, DEFAULT_NUM_ACTIVE))} that the method takes. Other methods run with their own.",
    )
    add(
        "--guidance_scale",
        type=float,
        nargs="+",
        default=[3.5, 1.0],
        help="Guidance scales; 1 is without guidance (default: 3.5 1).",
    )
    add("--num_inference_steps", type=int, help="Rollout steps N (default: 10; 25 for sd3.5-medium).")
    add("--resolution", type=int, help="Width and height in pixels (default: 128; tiny 16, sd3.5-medium 512).")
    add("--batch", type=int, default=1, help="Samples per update (default: 1).")
    add("--repeats", type=int, default=5, help="Timed updates of each variant of each case (default: 5).")
    add("--steps_per_forward", type=int, default=1, help="The callback's option; the usual way has none (default: 1).")
    add("--samples_per_decode", type=int, help="The callback's option; the usual way has none (default: all).")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Default: cuda where there is one.",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        help="Dtype of the models; the LoRA is float32 (default: float32 on the CPU, bfloat16 on a GPU).",
    )
    add("--num_threads", type=int, default=1, help="CPU threads of torch (default: 1).")
    add("--seed", type=int, default=0, help="Seed of weights, inputs and surrogates (default: 0).")
    add("--output", type=Path, help="JSON file to write; the table goes beside it as .md (default: print only).")
    args = parser.parse_args(argv)
    size = MODELS[args.model]
    if args.num_inference_steps is None:
        args.num_inference_steps = size.num_inference_steps
    if args.resolution is None:
        args.resolution = size.resolution
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    counts = ("batch", "repeats", "num_inference_steps", "num_threads", "steps_per_forward", "samples_per_decode")
    for name in counts:
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}.")
    multiple = 2 * 2 ** (len(size.vae["block_out_channels"]) - 1)
    largest = size.transformer["pos_embed_max_size"] * multiple
    if args.resolution % multiple or not 0 < args.resolution <= largest:
        parser.error(
            f"--resolution must be a multiple of {multiple} up to {largest} for {args.model}, got {args.resolution}."
        )
    if args.output is not None and args.output.suffix != ".json":
        parser.error(f"--output must end in .json, got {args.output}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu.")
    try:
        args.methods = chosen_methods(args.method, args.num_active, args.num_inference_steps)
    except ValueError as error:
        parser.error(str(error))
    return args


def chosen_methods(name: str, num_active: Sequence[int] | None, num_steps: int) -> list[Method]:
    """The method with each number of active steps, or once as it is where it has no such option.

    Raises:
        ValueError: where the method does not take a number that was asked for.
    """
    option = next((option for option in ("num_active", "last_k") if option in METHODS[name].options), None)
    if option is None:
        if num_active is not None:
            raise ValueError(f"--num_active: {name} has no number of active steps to choose; leave it out.")
        return [get_method(name)]
    methods = []
    for count in num_active or DEFAULT_NUM_ACTIVE:
        try:
            method = get_method(name, **{option: count})
            method.draw(_sigmas(num_steps), torch.Generator().manual_seed(0))
        except ValueError:
            if num_active is not None:
                raise
            continue
        methods.append(method)
    if not methods:
        raise ValueError(f"{name} takes none of K = {DEFAULT_NUM_ACTIVE} at N = {num_steps}; give --num_active.")
    return methods


def _sigmas(num_steps: int) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the tables and return the report."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    set_verbosity_error()
    load_before = os.getloadavg()[0]
    bench = build(MODELS[args.model], args)
    sigmas = _sigmas(args.num_inference_steps)
    cases = [
        Case(
            method.draw(sigmas, torch.Generator().manual_seed(args.seed)),
            scale,
            method.unconditional_gradient and scale > 1,
            args.seed,
        )
        for scale in args.guidance_scale
        for method in args.methods
    ]
    started = time.time()
    measured = measure(bench, cases, args.repeats)
    reports = [case_report(case, result) for case, result in zip(cases, measured, strict=True)]
    # One thread's CPU time is what its wall time would be on an idle machine.
    clock = "cpu_seconds" if bench.device.type == "cpu" and args.num_threads == 1 else "seconds"
    names = ("model", "method", "num_inference_steps", "resolution", "batch", "repeats", "steps_per_forward")
    names += ("samples_per_decode", "device", "dtype", "seed")
    report = {
        "settings": {name: vars(args)[name] for name in names}
        | {
            "transformer_parameters": sum(p.numel() for p in bench.pipe.transformer.parameters()),
            "trainable_parameters": sum(p.numel() for p in bench.trainable),
            "lora_rank": LORA_RANK,
        },
        "hardware": hardware(bench.device),
        "versions": versions(),
        "load_average": [load_before, os.getloadavg()[0]],
        "seconds_of_benchmark": time.time() - started,
        "cases": reports,
        "target_clock": clock,
        "targets": targets(reports, clock),
    }
    text = markdown(report)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
