# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark measures of a pipeline of real size."""

import collections
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from meters import GIB, CudaPeak, Stages
from peft.tuners.lora import LoraLayer
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPConfig, CLIPModel
from updates import Bench, record, sweep_update, whole_update

from flowbp import FlowBPCallback, Surrogate, Term, get_method
from flowbp.guidance import kept_samples
from flowbp.observers import adapters_off
from flowbp.replayed import TOLERANCE, deviations
from flowbp.rewards.clip import CLIPReward
from flowbp.rewards.openclip import VIT_H_14, crop_long
from flowbp.samples import Samples, chosen_arguments, floating_outputs
from flowbp.training import speed
from flowbp.training.distributed import full_tensor
from flowbp.trajectory import Call

# What the profiler shows on the device beside its work.
MARKS = ("flowbp stage", "Optimizer.")


class ClipReward(torch.nn.Module):
    """HPSv2.1's network with random weights in float32, called as the product calls it."""

    def __init__(self, device: torch.device, is_tiny: bool) -> None:
        super().__init__()
        config = {key: dict(value) if isinstance(value, dict) else value for key, value in VIT_H_14.items()}
        if is_tiny:
            for tower in ("text_config", "vision_config"):
                config[tower] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
                config[tower]["num_attention_heads"] = 2
        with torch.device(device):
            model = CLIPModel(CLIPConfig(**config))
        self.reward = CLIPReward(model.float(), self._tokens, crop_long)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards `(B,)`."""
        return self.reward(images.float(), list(prompts))

    @staticmethod
    def _tokens(prompts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.full((len(prompts), 77), 49407, device=device)
        ids[:, :4] = 1000
        return ids, torch.ones_like(ids)


# Seconds and bytes.


def timed(bench: Bench, make_gradients: Callable[[Stages], Any], repeats: int = 1, warm_up: int = 0) -> dict[str, Any]:
    """Whole updates: seconds of each, seconds and peak memory by stage of the last one.

    Peaks are GiB above `loaded`, which includes the optimizer's state. On a CPU there are none.
    """
    is_cuda = bench.device.type == "cuda"
    for _ in range(warm_up):
        whole_update(bench, make_gradients, Stages(bench.device))
    seconds = []
    for _ in range(repeats):
        bench.forget_gradients()
        peak = CudaPeak(bench.device) if is_cuda else None
        stages = Stages(bench.device, peak.take_peak if is_cuda else None)
        whole_update(bench, make_gradients, stages)
        seconds.append(sum(stages.seconds.values()))
    norm = full_tensor(torch.nn.utils.get_total_norm([parameter.grad for parameter in bench.parameters])).item()
    if not 0 < norm < float("inf"):
        raise RuntimeError(f"the gradient's norm is {norm}")
    bench.forget_gradients()
    found = {"seconds": seconds, "stages": stages.seconds, "gradient_norm": norm}
    if is_cuda:
        found |= {
            "loaded": peak.base / GIB,
            "peaks": {stage: size / GIB for stage, size in stages.peaks.items()},
            "reserved": torch.cuda.memory_reserved(bench.device) / GIB,
        }
    return found


def gradient_differences(bench: Bench, ways: dict[str, Callable[[Stages], Any]], reference: str) -> dict[str, Any]:
    """Relative difference (2-norm over all parameters) of each way's gradients from those of the reference."""
    gradients = {}
    for name, make_gradients in ways.items():
        bench.forget_gradients()
        make_gradients(Stages(bench.device))
        gradients[name] = bench.gradient()
    bench.forget_gradients()
    known = gradients.pop(reference)
    return {name: ((gradient - known).norm() / known.norm()).item() for name, gradient in gradients.items()}


def stock_rollout(bench: Bench) -> dict[str, Any]:
    """Seconds of the pipeline's own call up to the latents, without recording."""
    stages = Stages(bench.device)
    stages.mark("rollout")
    with torch.no_grad():
        bench.pipe(**{**bench.call, "output_type": "latent"})
    stages.mark(None)
    return {"seconds": [stages.seconds["rollout"]]}


def graphs_alive(bench: Bench, method: str, **options: Any) -> dict[str, Any]:
    """The part of the paper's way that differs: the graphs of all active steps, until one backward pass."""
    callback = FlowBPCallback(get_method(method, **options), generator=torch.Generator().manual_seed(0))
    record(bench, callback)
    peak = CudaPeak(bench.device) if bench.device.type == "cuda" else None
    stages = Stages(bench.device, peak.take_peak if peak else None)
    steps = list(callback.trajectory.steps.values())
    kept = kept_samples(type(bench.pipe).__name__, steps, callback.unconditional_gradient)
    stages.mark("sweep")
    with torch.enable_grad():
        outputs = [
            replay(call, samples)
            for step in steps
            for call, samples in zip(step.calls, kept[step], strict=True)
            if samples != ()
        ]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    stages.mark(None)
    bench.forget_gradients()
    found = {"terms": len(steps), "calls": len(outputs), "seconds": stages.seconds["sweep"]}
    if peak is not None:
        found["peak"] = stages.peaks["sweep"] / GIB
    return found


# Replays.


def replay(call: Call, samples: Samples = None) -> torch.Tensor:
    """The first output of a recorded call that is made again on these samples."""
    with call.state.under_autocast():
        args, kwargs, _ = chosen_arguments(call, samples)
        return floating_outputs(call.module(*args, **kwargs))[0]


def consecutive_steps(bench: Bench) -> Surrogate:
    """Active are two steps next to each other at the beginning, in the middle and at the end."""
    num_steps = bench.call["num_inference_steps"]
    steps = sorted({0, 1, num_steps // 2, num_steps // 2 + 1, num_steps - 2, num_steps - 1})
    return Surrogate("sample", tuple(Term(step, -1 / num_steps) for step in steps))


@torch.no_grad()
def replay_deviations(bench: Bench) -> dict[str, Any]:
    """How far replays are from the recording, and how far what a replay must never be mistaken for (`wrong`).

    By kind of replay the smallest and the largest of the samples' relative 2-norms, and their median.
    """
    callback = FlowBPCallback(consecutive_steps(bench))
    record(bench, callback)
    found: dict[str, list[float]] = collections.defaultdict(list)

    def put(kind: str, new: torch.Tensor, old: torch.Tensor) -> None:
        found[kind] += deviations(new, old).tolist()

    trajectory = callback.trajectory
    for step in trajectory.steps.values():
        for position, call in enumerate(step.calls):
            _replay_in_all_ways(call, len(step.velocity), put)
            before = trajectory.steps.get(step.number - 1)
            if before is not None:
                put("wrong: previous step's output", before.calls[position].outputs[0], call.outputs[0])
    numbers = {kind: torch.tensor(values).quantile(torch.tensor([0, 0.5, 1])) for kind, values in found.items()}
    return {
        "tolerance": TOLERANCE[bench.noise.dtype],
        **{kind: dict(zip(("least", "median", "most"), each.tolist(), strict=True)) for kind, each in numbers.items()},
    }


def _replay_in_all_ways(call: Call, batch: int, put: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
    recorded, size = call.outputs[0].detach(), call.size
    put("whole", replay(call), recorded)
    with torch.enable_grad():
        put("whole, with gradients", replay(call).detach(), recorded)
    with adapters_off(call.module):
        put("wrong: LoRA lost", replay(call), recorded)
    if size > batch:
        conditional = slice(size - batch, size)
        put("conditional samples alone", replay(call, (conditional,)), recorded[conditional])
        put("wrong: other branch's samples", recorded[:batch], recorded[conditional])
    if size > 1:
        last = slice(size - 1, size)
        put("one sample alone", replay(call, (last,)), recorded[last])
        put("wrong: another sample of the branch", recorded[size - 2 : size - 1], recorded[last])


# Waiting.


@contextmanager
def blocking_points(device: torch.device) -> Iterator[tuple[collections.Counter[str], Callable[[str], None]]]:
    """Counts where the host waits for the device in this block, as CUDA reports it.

    Yields:
        `{place: count}`, and a function that says which stage begins.
    """
    stage = ["rollout"]
    places: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):
            places[f"{stage[0]}: {_innermost_place()}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places, lambda name: stage.__setitem__(0, name)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _innermost_place() -> str:
    """The innermost line of this library, of diffusers or of a benchmark that is running."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if {"flowbp", "diffusers", "peft"} & set(parts) or parts[-2:-1] == ("benchmarks",):
            if frame.filename != __file__:
                return f"{'/'.join(parts[-2:])}:{frame.lineno}"
    return "elsewhere"


def waiting(bench: Bench, method: str, **options: Any) -> dict[str, Any]:
    """Blocking points of the stock pipeline's call and of a whole update, by place."""
    with blocking_points(bench.device) as (of_pipeline, _), torch.no_grad():
        bench.pipe(**bench.call)
    with blocking_points(bench.device) as (of_update, begin_stage):
        callback = FlowBPCallback(
            get_method(method, **options),
            generator=torch.Generator().manual_seed(0),
            on_stage=begin_stage,
            measure_gradients=True,
        )
        images = record(bench, callback)
        callback.backward(bench.reward, images, [""] * len(images))
    bench.forget_gradients()
    return {
        "pipeline": sum(of_pipeline.values()),
        "update": sum(of_update.values()),
        "places_of_pipeline": dict(of_pipeline.most_common()),
        "places_of_update": dict(of_update.most_common(40)),
    }


def idle_time(bench: Bench, method: str, **options: Any) -> dict[str, Any]:
    """Seconds of one update in which the device computes, and in which it waits for the host.

    The profiler slows the host down; `seconds` is without it.
    """

    def make_gradients(stages: Stages) -> None:
        sweep_update(bench, get_method(method, **options), stages)

    seconds = timed(bench, make_gradients, repeats=1)["seconds"][0]
    stages = Stages(bench.device)
    activity = ProfilerActivity.CUDA if bench.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        whole_update(bench, make_gradients, stages)
    bench.forget_gradients()
    spans, host_calls = [], collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith(MARKS):
            continue
        if "CUDA" in str(event.device_type()) and event.duration_ns():
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            kernels[event.name()[:90]] += event.duration_ns()
        elif event.name().startswith("cuda"):
            host_calls[event.name()] += 1
    busy, gaps = busy_and_gaps(spans)
    long = [gap for gap in gaps if gap > 0.2e-3]
    return {
        "seconds": seconds,
        "seconds_profiled": sum(stages.seconds.values()),
        "busy": busy,
        "idle": seconds - busy,
        "idle_profiled": sum(gaps),
        "gaps_over_0.2_ms": {"count": len(long), "seconds": sum(long)},
        "kernels": len(spans),
        "host_calls": dict(host_calls.most_common(8)),
        "seconds_by_kernel": {name: duration / 1e9 for name, duration in kernels.most_common(15)},
    }


def busy_and_gaps(spans: Sequence[tuple[int, int]]) -> tuple[float, list[float]]:
    """Seconds that spans of nanoseconds cover together, and seconds of the gaps between them."""
    busy, gaps, end = 0, [], None
    for start, stop in sorted(spans):
        if end is not None and start > end:
            gaps.append((start - end) / 1e9)
        busy += max(0, stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    return busy / 1e9, gaps


# Switches.


def quantise(transformer: torch.nn.Module) -> None:
    """Replace the linear layers by bitsandbytes' nf4 layers, but for the last."""
    import bitsandbytes

    for name, layer in list(transformer.named_modules()):
        if type(layer) is not torch.nn.Linear or name == "proj_out":
            continue
        weight = layer.weight.data
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        quantised.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        quantised.bias = layer.bias
        # Moving quantises.
        transformer.set_submodule(name, quantised.to(weight.device))
        layer.weight = None
    # PEFT asks for it.
    transformer.is_loaded_in_4bit = True


def compile_blocks(bench: Bench) -> None:
    """Compile the transformer's blocks in place, for good."""
    speed.COMPILER = "inductor" if bench.device.type == "cuda" else "aot_eager"
    speed.compile_blocks(bench.pipe.transformer)


@contextmanager
def float32_lora(bench: Bench) -> Iterator[None]:
    """Let the LoRA compute in float32 in this block, as peft has it."""
    layers = [layer for layer in bench.pipe.transformer.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = True
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.__class__ = torch.nn.Linear
    try:
        yield
    finally:
        speed.compute_lora_in_base_dtype(bench.pipe.transformer)


def lora_dtypes(bench: Bench, method: str, **options: Any) -> dict[str, Any]:
    """Relative difference of an update's gradients with the LoRA in bf16 from those with it in float32."""

    def make_gradients(stages: Stages) -> None:
        sweep_update(bench, get_method(method, **options), stages)

    def in_float32(stages: Stages) -> None:
        with float32_lora(bench):
            make_gradients(stages)

    return gradient_differences(bench, {"bf16": make_gradients, "float32": in_float32}, "float32")
