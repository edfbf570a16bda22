# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Measures what one update costs: seconds and peak memory by stage, against the usual way and against the floor.

Four variants take turns on one pipeline, with the same surrogate, noise and prompts:

- `sweep`: this library, `FlowBPCallback` on the stock `StableDiffusion3Pipeline`;
- `paper`: the way of the paper's code, one autograd graph. The active steps' velocities are evaluated again, the
  unconditional branch on its own and without gradients where the method cuts it, and the graphs of all active steps
  stay alive until a single `loss.backward()`;
- `usual`: the same with both guidance branches in one batch, so that the graph holds both;
- `floor`: the passes that no implementation avoids, alone: the rollout's forward passes, decode and reward forward
  and backward, one forward and backward pass for each active step, the optimizer's step. Its gradient means nothing.

The models have random weights and are built from configs; nothing is downloaded. benchmarks/README.md explains the
numbers.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils.logging import set_verbosity_error
from meters import STAGES, CudaPeak, SavedBytes, Stages, cpu_allocator_peaks, hardware
from model_sizes import MODELS as ALL_MODELS
from tqdm.auto import tqdm
from updates import LORA_RANK, Bench, build_bench, sweep_update, whole_update

from flowbp import METHODS, Method, Objective, Surrogate, get_method
from flowbp.objectives import connector_gaps, sample_weights
from flowbp.publishing.run_info import versions

VARIANTS = ("sweep", "paper", "usual", "floor")
# Whose cost is given as a share of whose.
PAIRS = (("sweep", "paper"), ("sweep", "usual"), ("sweep", "floor"), ("floor", "paper"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_NUM_ACTIVE = (1, 2, 4, 8)
# What recording and sweep may cost on top of the unavoidable passes.
FLOOR_BOUND = 1.03
# The variants call a transformer of Stable Diffusion 3.
MODELS = {name: model for name, model in ALL_MODELS.items() if model.pipeline is StableDiffusion3Pipeline}


def decode(bench: Bench, latents: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` in [0, 1], as the pipeline makes them."""
    vae = bench.pipe.vae
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)


def call_transformer(bench: Bench, latents: torch.Tensor, step: int, branches: Sequence[str]) -> torch.Tensor:
    """The transformer's output for a batch of guidance branches, `(len(branches) * B, ...)`."""
    signs = {"conditional": "", "unconditional": "negative_"}

    def joined(name: str) -> torch.Tensor:
        return torch.cat([bench.call[signs[branch] + name] for branch in branches])

    latents = torch.cat([latents] * len(branches))
    return bench.pipe.transformer(
        hidden_states=latents,
        timestep=bench.pipe.scheduler.timesteps[step].expand(len(latents)),
        encoder_hidden_states=joined("prompt_embeds"),
        pooled_projections=joined("pooled_prompt_embeds"),
        return_dict=False,
    )[0]


# The variants. Each leaves gradients in `.grad` and marks the stages that it enters after "rollout".


@dataclass(frozen=True)
class Case:
    """What one line of the table measures."""

    surrogate: Surrogate
    guidance_scale: float
    unconditional_gradient: bool
    seed: int

    @property
    def branches(self) -> list[str]:
        """The branches of guidance."""
        return ["unconditional", "conditional"] if self.guidance_scale > 1 else ["conditional"]

    @property
    def trained_branches(self) -> list[str]:
        """Those that get a gradient."""
        return self.branches if self.unconditional_gradient else ["conditional"]

    def noise_generator(self) -> torch.Generator:
        """Generator of the noise of DRaFT-LV's copies, the same for all variants."""
        return torch.Generator().manual_seed(self.seed)


def library_update(bench: Bench, case: Case, stages: Stages) -> None:
    """This library: record the stock pipeline, then `backward`."""
    bench.call["guidance_scale"] = case.guidance_scale
    sweep_update(
        bench,
        case.surrogate,
        stages,
        unconditional_gradient=case.unconditional_gradient,
        noise_generator=case.noise_generator(),
    )


def joint_velocity(bench: Bench, case: Case, latents: torch.Tensor, step: int) -> torch.Tensor:
    """The velocity by one transformer call for all branches."""
    outputs = call_transformer(bench, latents, step, case.branches).chunk(len(case.branches))
    return _guided(case, *outputs)


def separate_velocity(bench: Bench, case: Case, latents: torch.Tensor, step: int) -> torch.Tensor:
    """The velocity with a call of its own, without gradients, for a branch that gets none."""
    if case.trained_branches == case.branches:
        return joint_velocity(bench, case, latents, step)
    with torch.no_grad():
        unconditional = call_transformer(bench, latents, step, ["unconditional"])
    return _guided(case, unconditional, call_transformer(bench, latents, step, ["conditional"]))


def _guided(case: Case, *outputs: torch.Tensor) -> torch.Tensor:
    if len(outputs) == 1:
        return outputs[0]
    unconditional, conditional = outputs
    if not case.unconditional_gradient:
        unconditional = unconditional.detach()
    return unconditional + case.guidance_scale * (conditional - unconditional)


Velocity = Callable[[Bench, Case, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """Latents and velocities of every step, and the endpoint's value."""

    latents: list[torch.Tensor]
    velocities: list[torch.Tensor]
    endpoint: torch.Tensor


@torch.no_grad()
def plain_rollout(bench: Bench, case: Case) -> Rollout:
    """A rollout without a pipeline around it, up to the last step that the surrogate needs."""
    surrogate, sigmas = case.surrogate, bench.pipe.scheduler.sigmas
    latents, velocities = [bench.noise], []
    for step in range(surrogate.last_step(len(sigmas) - 1) + 1):
        velocities.append(joint_velocity(bench, case, latents[-1], step))
        # As the scheduler does: the product in the model's dtype, the sum in float32.
        following = latents[-1].float() + (sigmas[step + 1] - sigmas[step]) * velocities[-1]
        latents.append(following.to(bench.noise.dtype))
    if surrogate.endpoint == "sample":
        return Rollout(latents, velocities, latents[-1])
    step = surrogate.endpoint[1]
    mean = (latents[step].float() - sigmas[step] * velocities[step].float()).to(bench.noise.dtype)
    return Rollout(latents, velocities, mean)


def endpoints_of_one_graph(bench: Bench, case: Case, rollout: Rollout, velocity: Velocity) -> list[torch.Tensor]:
    """The endpoint, and DRaFT-LV's after it, with the graphs of all active steps behind them."""
    surrogate, sigmas = case.surrogate, bench.pipe.scheduler.sigmas
    # Zero in value; carries the gradient of all terms so far.
    path = torch.zeros_like(bench.noise)
    for term in surrogate.terms:
        state = rollout.latents[term.step]
        if term.coupling:
            state = state + term.coupling * (path - path.detach())
        active = velocity(bench, case, state, term.step)
        path = path + term.weight * (active - active.detach())
    sample = rollout.endpoint
    endpoints = [sample + (path - path.detach())]
    noise_generator = case.noise_generator()
    for _ in range(surrogate.num_noised):
        # DRaFT-LV: the sample, noised back to the last step's level, and that step once more.
        (term,) = surrogate.terms
        noise = torch.randn(sample.shape, generator=noise_generator).to(sample)
        state = (1 - sigmas[term.step]) * sample + sigmas[term.step] * noise
        endpoints.append(state + term.weight * velocity(bench, case, state, term.step))
    return endpoints


def one_graph_update(bench: Bench, case: Case, stages: Stages, velocity: Velocity) -> None:
    """Every active step's graph is alive until one `loss.backward()`."""
    rollout = plain_rollout(bench, case)
    stages.mark("sweep")
    endpoints = endpoints_of_one_graph(bench, case, rollout, velocity)
    stages.mark("decode")
    images = [decode(bench, endpoint) for endpoint in endpoints]
    for endpoint, decoded in zip(endpoints, images, strict=True):
        decoded.register_hook(lambda gradient: stages.mark("decode"))
        endpoint.register_hook(lambda gradient: stages.mark("sweep"))
    stages.mark("reward")
    rewards = bench.reward(torch.cat(images), [""] * len(images) * len(bench.noise))
    surrogate = case.surrogate
    gaps = connector_gaps(surrogate, dict(enumerate(rollout.latents)), dict(enumerate(rollout.velocities)))
    weights = sample_weights(surrogate, gaps)
    Objective()(rewards, torch.ones_like(rewards) if weights is None else weights).backward()


def floor_update(bench: Bench, case: Case, stages: Stages) -> None:
    """The unavoidable passes alone."""
    surrogate = case.surrogate
    last = surrogate.last_step(len(bench.pipe.scheduler.timesteps))
    with torch.no_grad():
        for step in [*range(last + 1), *[last] * surrogate.num_noised]:
            call_transformer(bench, bench.noise, step, case.branches)
    for _ in range(1 + surrogate.num_noised):
        stages.mark("decode")
        endpoint = bench.noise.clone().requires_grad_()
        images = decode(bench, endpoint)
        stages.mark("reward")
        scored = images.detach().requires_grad_()
        bench.reward(scored, [""] * len(scored)).sum().backward()
        stages.mark("decode")
        images.backward(scored.grad)
        for term in surrogate.terms:
            stages.mark("sweep")
            state = bench.noise.clone().requires_grad_(term.coupling != 0)
            output = call_transformer(bench, state, term.step, case.trained_branches)
            output.backward(torch.ones_like(output))


UPDATES: Mapping[str, Callable[[Bench, Case, Stages], None]] = {
    "sweep": library_update,
    "paper": functools.partial(one_graph_update, velocity=separate_velocity),
    "usual": functools.partial(one_graph_update, velocity=joint_velocity),
    "floor": floor_update,
}


def update(variant: str, bench: Bench, case: Case, stages: Stages) -> None:
    """One whole update; the gradients stay in `.grad`."""
    whole_update(bench, functools.partial(UPDATES[variant], bench, case), stages)


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
    bench.forget_gradients()
    try:
        update(variant, bench, case, stages)
    except torch.OutOfMemoryError:
        measured.is_out_of_memory = True
    if not measured.is_out_of_memory and measured.gradient is None and variant != "floor":
        measured.gradient = bench.gradient()
    bench.optimizer.zero_grad()
    if measured.is_out_of_memory:
        bench.forget_gradients()
        torch.cuda.empty_cache()
    return not measured.is_out_of_memory


def _measure_memory(measured: Measured, variant: str, bench: Bench, case: Case) -> None:
    if bench.device.type == "cuda":
        bench.forget_gradients()
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
    mine = measured["sweep"].gradient
    differences = {}
    for variant in ("paper", "usual"):
        other = measured[variant].gradient
        is_known = mine is not None and other is not None
        differences[variant] = ((mine - other).norm() / other.norm()).item() if is_known else None
    return {
        "num_terms": len(case.surrogate.terms),
        "guidance_scale": case.guidance_scale,
        "unconditional_gradient": case.unconditional_gradient,
        "endpoint": case.surrogate.endpoint,
        "terms": [(term.step, term.weight, term.coupling) for term in case.surrogate.terms],
        **by_variant,
        **{f"{first}_to_{second}": compare(by_variant[first], by_variant[second]) for first, second in PAIRS},
        "gradient_difference": differences,
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
                share = by_terms[terms]["sweep_to_paper"]["peak_allocated_bytes"]
                add(f"{words}: memory / paper's way, K = {terms}", share, bound)
        for terms, case in by_terms.items():
            if scale > 1:
                add(f"{words}: seconds / paper's way, K = {terms}", case["sweep_to_paper"][clock], 1.0)
            add(f"{words}: seconds / floor, K = {terms}", case["sweep_to_floor"][clock], FLOOR_BOUND)
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    settings, machine = report["settings"], report["hardware"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    lines = [
        f"# Cost of one update: {settings['method']}, {settings['model']}",
        "",
        f"{settings['transformer_parameters'] / 1e6:.0f}M parameters, LoRA rank {LORA_RANK} on attention "
        f"({settings['trainable_parameters'] / 1e6:.1f}M), {settings['dtype']}, {settings['resolution']} pixels, "
        f"batch {settings['batch']}, N = {settings['num_inference_steps']}, samples_per_decode "
        f"{settings['samples_per_decode']}. On {on}; torch "
        f"{report['versions']['torch']}, diffusers {report['versions']['diffusers']}. Medians of "
        f"{settings['repeats']} repeats in which the four variants took turns; ratios are medians of the repeats' "
        f"ratios. Load average {report['load_average'][0]:.1f} before, {report['load_average'][1]:.1f} after on "
        f"{machine['cores']} cores.",
        *_seconds_tables(report),
        *_memory_table(report),
        *_stage_table(report),
        *("", "## Targets", "", "| target | found | bound | reached |", "|---|---|---|---|"),
    ]
    for target in report["targets"]:
        reached = "yes" if target["reached"] else "no"
        lines.append(f"| {target['target']} | {target['value']:.3f} | {target['bound']:.3f} | {reached} |")
    differences = [value for case in report["cases"] for value in case["gradient_difference"].values()]
    differences = [difference for difference in differences if difference is not None]
    if differences:
        lines += [
            "",
            f"Largest relative difference of the sweep's gradient from the paper's and the usual way's: "
            f"{max(differences):.1e}.",
        ]
    return "\n".join(lines) + "\n"


def _label(case: Mapping[str, Any]) -> str:
    return f"| {case['guidance_scale']:g} | {case['num_terms']} |"


def _cell(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:.2f}"


def _total(case: Mapping[str, Any], variant: str, name: str, scale: float = 1.0) -> float | None:
    return None if case[variant] is None else case[variant][name]["total"] / scale


def _seconds_tables(report: Mapping[str, Any]) -> list[str]:
    clocks = {"seconds": "Seconds per update"}
    if report["target_clock"] == "cpu_seconds":
        clocks = {"cpu_seconds": "CPU seconds per update (one thread)", "seconds": "Wall seconds per update"}
    pairs = [" / ".join(pair) for pair in PAIRS]
    lines = []
    for clock, title in clocks.items():
        lines += [
            *("", f"## {title}", ""),
            f"| guidance | K | {' | '.join([*VARIANTS, *pairs])} |",
            "|---|---|" + "---|" * len([*VARIANTS, *pairs]),
        ]
        for case in report["cases"]:
            cells = [_cell(_total(case, variant, clock)) for variant in VARIANTS]
            cells += [_cell(case["_to_".join(pair)][clock]) for pair in PAIRS]
            lines.append(f"{_label(case)} {' | '.join(cells)} |")
    return lines


def _memory_table(report: Mapping[str, Any]) -> list[str]:
    kinds = {"peak_allocated_bytes": "allocated"}
    explained = "Allocated: the allocator's peak."
    if report["hardware"]["gpu"] is None:
        kinds["peak_saved_bytes"] = "saved"
        explained += " Saved: live bytes kept for backward."
    header = " | ".join(f"sweep, {kind} | paper | usual | sweep / paper | sweep / usual" for kind in kinds.values())
    lines = ["", "## Peak memory above the loaded model, MiB", "", explained, "", f"| guidance | K | {header} |"]
    lines.append("|---|---|" + "---|" * 5 * len(kinds))
    for case in report["cases"]:
        cells = []
        for name in kinds:
            cells += [_cell(_total(case, variant, name, 2**20)) for variant in ("sweep", "paper", "usual")]
            cells += [_cell(case[pair][name]) for pair in ("sweep_to_paper", "sweep_to_usual")]
        lines.append(f"{_label(case)} {' | '.join(cells)} |")
    return lines


def _stage_table(report: Mapping[str, Any]) -> list[str]:
    clock = report["target_clock"]
    lines = [
        *("", f"## By stage: {'CPU ' * (clock == 'cpu_seconds')}seconds; allocated MiB", ""),
        f"| guidance | K | variant | {' | '.join(STAGES)} |",
        "|---|---|---|" + "---|" * len(STAGES),
    ]
    for case in report["cases"]:
        for variant in (variant for variant in VARIANTS if case[variant] is not None):
            peaks = case[variant]["peak_allocated_bytes"]
            cells = [f"{case[variant][clock][stage]:.3f}; {peaks[stage] / 2**20:.0f}" for stage in STAGES]
            lines.append(f"{_label(case)} {variant} | {' | '.join(cells)} |")
    return lines


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
    add("--samples_per_decode", type=int, help="The callback's option; the other variants have none (default: all).")
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
    model = MODELS[args.model]
    args.num_inference_steps = (
        args.num_inference_steps if args.num_inference_steps is not None else model.num_inference_steps
    )
    args.resolution = args.resolution if args.resolution is not None else model.resolution
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    try:
        _check(args)
        args.methods = chosen_methods(args.method, args.num_active, args.num_inference_steps)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for values that no run can have."""
    for name in ("batch", "repeats", "num_inference_steps", "num_threads", "samples_per_decode"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    model = MODELS[args.model]
    multiple = 2 * 2 ** (len(model.vae[1]["block_out_channels"]) - 1)
    largest = model.transformer[1]["pos_embed_max_size"] * multiple
    if args.resolution % multiple or not 0 < args.resolution <= largest:
        raise ValueError(
            f"--resolution must be a multiple of {multiple} up to {largest} for {args.model}, got {args.resolution}."
        )
    if args.output is not None and args.output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {args.output}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu.")


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
            method.draw(stock_sigmas(num_steps), torch.Generator().manual_seed(0))
        except ValueError:
            if num_active is not None:
                raise
            continue
        methods.append(method)
    if not methods:
        raise ValueError(f"{name} takes none of K = {DEFAULT_NUM_ACTIVE} at N = {num_steps}; give --num_active.")
    return methods


def stock_sigmas(num_steps: int) -> torch.Tensor:
    """The schedule of Stable Diffusion 3, `(N + 1,)`."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


def build(args: argparse.Namespace) -> Bench:
    """The models and inputs that all variants share."""
    torch.manual_seed(args.seed)
    bench = build_bench(
        args.model,
        args.device,
        DTYPES[args.dtype],
        args.batch,
        args.resolution,
        args.num_inference_steps,
        samples_per_decode=args.samples_per_decode,
    )
    bench.pipe.scheduler.set_timesteps(args.num_inference_steps, device=bench.device)
    return bench


def draw_cases(args: argparse.Namespace) -> list[Case]:
    """The lines of the table."""
    sigmas = stock_sigmas(args.num_inference_steps)
    return [
        Case(
            method.draw(sigmas, torch.Generator().manual_seed(args.seed)),
            scale,
            method.unconditional_gradient and scale > 1,
            args.seed,
        )
        for scale in args.guidance_scale
        for method in args.methods
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the tables and return the report."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    set_verbosity_error()
    load_before = psutil.getloadavg()[0]
    bench, cases = build(args), draw_cases(args)
    started = time.time()
    measured = measure(bench, cases, args.repeats)
    reports = [case_report(case, result) for case, result in zip(cases, measured, strict=True)]
    # One thread's CPU time is what its wall time would be on an idle machine.
    clock = "cpu_seconds" if bench.device.type == "cpu" and args.num_threads == 1 else "seconds"
    names = ("model", "method", "num_inference_steps", "resolution", "batch", "repeats", "samples_per_decode")
    report = {
        "settings": {name: vars(args)[name] for name in (*names, "device", "dtype", "seed")}
        | {
            "transformer_parameters": sum(p.numel() for p in bench.pipe.transformer.parameters()),
            "trainable_parameters": sum(p.numel() for p in bench.parameters),
            "lora_rank": LORA_RANK,
        },
        "hardware": hardware(bench.device),
        "versions": versions(),
        "load_average": [load_before, psutil.getloadavg()[0]],
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
