# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""How good each surrogate's gradient is: against exact backpropagation, on the demo's pipeline.

    python benchmarks/gradients.py --output benchmarks/results/demo_gradients.json     # about 25 minutes of one core
    python benchmarks/documents.py --write                                             # tables of the documents

With a new LoRA and after a short training, for the same prompts, noise and augmentation: cosine and norm ratio with
the gradient of `full`, how much of the gradient varies with the draw and how much with noise and prompts, what steps
along it change the reward of other batches by, its norm by step, and the connector gaps of legs. A state that is in
the output file already is not measured again.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo_runs
import torch
from own_rows import closed_supports
from results import ALL_LINES, LINES, Line, rounded

from flowbp import FlowBPCallback, Leg, Method, Surrogate, Term, get_method
from flowbp.files import write_atomically
from flowbp.training.loop import one_update
from flowbp.training.prompts import Record
from flowbp.training.seeds import make_generator, sample_generators, seed_globally
from flowbp.training.setup import Run
from flowbp.weights import LEG_WEIGHTS, leg_supports, leg_weights, step_lengths

RESULTS = Path(__file__).parent / "results" / "demo_gradients.json"
ORDERS = (1, 2, 3, 4)
CLOSED = "lagrange, closed"
# How the gradient grows with the steps, and the row of own_rows.py, beside the lines of results.py.
MORE = {f"draft-{count}": Line("draft-k", {"last_k": count}) for count in (2, 6, 8)}
MORE |= {name: ALL_LINES[name] for name in ("flowbp-lagrange closed supports",)}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        batches: of prompts and noise.
        draws: of a surrogate for each batch.
        other_batches: on which the reward after steps along a gradient is measured.
        steps: how many updates' lengths such steps have.
        updates: of the training between the two states, by the demo's recipe; 0 for the first one alone.
        lines: of results.py and of `MORE`.
        options: of the run.
    """

    batches: int = 12
    draws: int = 2
    other_batches: int = 4
    steps: tuple[int, ...] = (1, 4, 16, 64)
    updates: int = 60
    lines: tuple[str, ...] = (*LINES, *MORE)
    options: Mapping[str, Any] = field(default_factory=dict)


TINY = Size(2, 2, 1, (1,), 0, ("full", "leapalign"), {"train_batch_size": 1, "num_inference_steps": 4})


def euler(sigmas: Sequence[float], coupling: float) -> Surrogate:
    """Every step with its Euler weight and this coupling; coupling 1 is exact backpropagation.

    Its legs make the rollout keep all latents and velocities. Being Euler's, they have no gap.
    """
    lengths = step_lengths(sigmas)
    terms = tuple(Term(step, length, coupling) for step, length in enumerate(lengths))
    ends = range(1, len(lengths) + 1)
    return Surrogate("sample", terms, tuple(Leg(0, end, tuple(range(end)), tuple(lengths[:end])) for end in ends))


class Gradients:
    """Gradients of the run's objective on fixed batches.

    Args:
        run: of `demo_runs.demo_run`.
        size: how much is measured.
    """

    def __init__(self, run: Run, size: Size) -> None:
        self.run, self.size = run, size
        count = size.batches + size.other_batches
        self.batches: list[list[Record]] = [next(run.state.sampler) for _ in range(count)]
        self.callback: FlowBPCallback | None = None

    def gradient(self, method: Method | Surrogate, batch: int, draw: int, **options: Any) -> torch.Tensor:
        """`(parameters,)`, as an update would compute it before clipping. Noise depends on the batch alone."""
        run, records = self.run, self.batches[batch]
        places = range(len(records))
        self.callback = callback = FlowBPCallback(
            method,
            generator=make_generator("surrogate", batch, draw),
            noise_generator=sample_generators("copies", draw, batch, places),
            measure_gradients=True,
            **options,
        )
        seed_globally(0, batch, places)
        inputs = run.sampling.inputs(records)
        with callback.record(run.sampling.pipe):
            images = [self._images(inputs, batch) for _ in range(1 + callback.copies)]
        self.out = callback.backward(
            run.rewards.scoring, torch.cat(images), [record.prompt for record in records], objective=run.objective
        )
        parameters = run.state.parameters
        found = torch.cat([parameter.grad.flatten() for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
        return found

    def _images(self, inputs: Mapping[str, Any], batch: int) -> torch.Tensor:
        generators = sample_generators("noise", 0, batch, range(len(self.batches[batch])))
        return self.run.sampling.images(inputs, generators, self.run.sampling.size(0, 0))

    @torch.no_grad()
    def reward(self) -> float:
        """The mean over the other batches."""
        values = []
        for batch in range(self.size.batches, len(self.batches)):
            records = self.batches[batch]
            seed_globally(0, batch, range(len(records)))
            images = self._images(self.run.sampling.inputs(records), batch)
            values.append(self.run.rewards.scoring(images, [record.prompt for record in records]).mean())
        return torch.stack(values).mean().item()

    def gains(self, found: torch.Tensor) -> dict[str, float]:
        """What `steps` updates of Adam along one direction, that of these gradients, change the reward by.

        Args:
            found: `(batches, parameters)`. Adam's direction is their mean over the root of their mean square, in
                each element, so noise shortens it.
        """
        direction = found.mean(0) / found.square().mean(0).sqrt().clamp_min(1e-12)
        parameters, kept = self.run.state.parameters, [each.detach().clone() for each in self.run.state.parameters]
        before, gains = self.reward(), {}
        for steps in self.size.steps:
            parts = direction.split([each.numel() for each in parameters])
            for parameter, old, part in zip(parameters, kept, parts, strict=True):
                length = steps * self.run.config.learning_rate
                parameter.data.copy_(old - length * part.view_as(old))
            gains[str(steps)] = self.reward() - before
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.data.copy_(old)
        return gains

    def of(self, method: Method | Surrogate, draws: int, **options: Any) -> tuple[torch.Tensor, dict[int, float]]:
        """`(batches, draws, parameters)`, and the mean norm of the part that each step adds."""
        found, norms = [], {}
        for batch in range(self.size.batches):
            parts = []
            for draw in range(draws):
                parts.append(self.gradient(method, batch, draw, **options))
                for step, norm in self.out.gradient_norms.items():
                    norms.setdefault(step, []).append(float(norm))
            found.append(torch.stack(parts))
        return torch.stack(found), {step: sum(each) / len(each) for step, each in sorted(norms.items())}


def compare(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float | None]:
    """Statistics of a line's gradients `(batches, draws, parameters)` against `exact`, `(batches, parameters)`.

    Returns:
        `cosine` and `norm_ratio` (geometric mean) of single gradients, `cosine_of_mean_draw`; of the mean squared
        norm the shares `of_draws` and `of_batches` that vary and `of_mean`, the expected gradient's; and
        `cosine_of_means` of the two expected gradients. Products of different batches estimate the last two without
        bias; None where an estimate is not above 0 (the sampling noise is larger).
    """
    batches, draws = found.shape[:2]
    single, mean = found.double(), found.double().mean(1)
    exact = exact.double()
    cosines = torch.cosine_similarity(single, exact[:, None], dim=-1)
    ratios = single.norm(dim=-1) / exact.norm(dim=-1)[:, None]
    total = single.square().sum(-1).mean().item()
    of_draws = (single - mean[:, None]).square().sum(-1).sum(1).mean().item() / (draws - 1) if draws > 1 else 0.0
    own, cross, theirs = (_across(a, b) for a, b in ((mean, mean), (mean, exact), (exact, exact)))
    return {
        "cosine": cosines.mean().item(),
        "cosine_sd": cosines.flatten().std().item(),
        "cosine_of_mean_draw": torch.cosine_similarity(mean, exact, dim=-1).mean().item(),
        "norm_ratio": ratios.log().mean().exp().item(),
        "of_draws": of_draws / total,
        "of_batches": 1 - (of_draws + own) / total,
        "of_mean": own / total,
        "cosine_of_means": cross / math.sqrt(own * theirs) if min(own, theirs) > 0 else None,
    }


def _across(left: torch.Tensor, right: torch.Tensor) -> float:
    """Mean product of the gradients of different batches."""
    products = left @ right.T
    return (products.sum() - products.diagonal().sum()).item() / (len(left) * (len(left) - 1))


def gaps(latents: Mapping[int, torch.Tensor], velocities: Mapping[int, torch.Tensor], sigmas: Sequence[float]) -> Any:
    """Mean connector gaps by weights, order and length of the leg: those that end at the sample, and the others."""
    found: dict[tuple[str, int, int, bool], list[float]] = {}
    num_steps = len(sigmas) - 1
    for kind in (*LEG_WEIGHTS, CLOSED):
        for order in ORDERS:
            for start in range(num_steps):
                # There is no velocity at the last leg's end.
                for end in range(start + 1, num_steps + (kind != CLOSED)):
                    if kind == CLOSED:
                        supports = closed_supports(start, end, order)
                    else:
                        supports = leg_supports(kind, start, end, order)
                    weights = leg_weights(kind.partition(",")[0], sigmas, start, end, supports)
                    value = latents[start] + sum(w * velocities[s] for s, w in zip(supports, weights, strict=True))
                    gap = (value - latents[end]).abs().mean().item()
                    found.setdefault((kind, order, end - start, end == num_steps), []).append(gap)
    names = ("weights", "order", "length", "is_last")
    return [{**dict(zip(names, key, strict=True)), "gap": sum(each) / len(each)} for key, each in found.items()]


def measure(run: Run, size: Size) -> dict[str, Any]:
    """All of a state."""
    gradients = Gradients(run, size)
    sigmas = run.sampling.pipe.scheduler.sigmas
    if len(sigmas) != run.config.num_inference_steps + 1:
        # The scheduler has those of a rollout after the first one.
        gradients.gradient(get_method("draft-k"), 0, 0)
        sigmas = run.sampling.pipe.scheduler.sigmas
    sigmas = sigmas.tolist()
    began = time.process_time()
    exact, norms = gradients.of(euler(sigmas, 1.0), 1)
    trajectory = gradients.callback.trajectory
    found: dict[str, Any] = {
        "gaps": gaps(trajectory.latents, trajectory.velocities, sigmas),
        "latents": float(trajectory.latents[len(sigmas) - 1].abs().mean()),
        "norms": {"1": norms},
        "cosine_of_batches": _across(*[torch.nn.functional.normalize(exact[:, 0].double(), dim=-1)] * 2),
        "lines": {},
    }
    exact = exact[:, 0]

    def line(each: torch.Tensor) -> dict[str, Any]:
        return compare(each, exact) | {"gains": gradients.gains(each[:, 0])}

    for coupling in (0.0, 0.5):
        each, found["norms"][f"{coupling:g}"] = gradients.of(euler(sigmas, coupling), 1)
        found["lines"][f"all steps, coupling {coupling:g}"] = line(each)
    for name in size.lines:
        of = {**LINES, **MORE}[name]
        draws = 1 if of.method in ("full", "draft-k") else size.draws
        found["lines"][name] = line(gradients.of(get_method(of.method, **of.options), draws)[0])
    both = gradients.of(get_method("full"), 1, unconditional_gradient=True)[0]
    found["lines"]["full, both branches"] = line(both)
    return found | {"cpu_seconds": time.process_time() - began}


def main(argv: list[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; it is complete or keeps what it had.")
    parser.add_argument("--tiny", action="store_true", help="Two small batches, to test the benchmark itself.")
    args = parser.parse_args(argv)
    if argv is None and os.environ.get("OMP_NUM_THREADS") != "1":
        # Threads and allocator are chosen when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **demo_runs.ENVIRONMENT})
    size = TINY if args.tiny else Size()
    report: dict[str, Any] = {"batches": size.batches, "draws": size.draws, "updates": size.updates, "states": {}}
    if args.output.exists():
        report = json.loads(args.output.read_text(encoding="utf-8"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with demo_runs.demo_run(size.options) as run:
        for state, updates in (("initial", 0), ("trained", size.updates)):
            if state in report["states"] or (state == "trained" and not updates):
                continue
            for update in range(updates):
                one_update(run, update)
            report["states"][state] = rounded(measure(run, size))
            report["environment"] = demo_runs.environment()
            write_atomically(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
