# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Which samples of a step's transformer calls are the unconditional branch of guidance, and so get no gradient.

Guidance is `v = u + s (c - u)` with s > 1, whatever the pipeline's code looks like: of all branches, only the
unconditional one counts against the others. So random cotangents of the velocity are sent back through the pipeline's
own glue, and the branch whose share points the other way is the unconditional one. Nothing is replayed for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import RecordingError, check_guidance_sign
from .host import read, widened
from .samples import Samples, recorded_outputs, take
from .trajectory import ActiveStep

# Independent cotangents that must agree.
NUM_PROBES = 4


@dataclass(frozen=True, eq=False)
class _Probe:
    """A step's branches, and how each stands to the sum of all.

    Attributes:
        step: the step.
        parts: `(call, samples)` of each branch.
        cosines: for each probe the branches' cosines with their sum, scalars on the device.
        is_finite: whether the step's values are, a scalar on the device.
    """

    step: ActiveStep
    parts: list[tuple[int, slice]]
    cosines: list[list[torch.Tensor]]
    is_finite: torch.Tensor


def kept_samples(
    name: str, steps: Sequence[ActiveStep], unconditional_gradient: bool
) -> dict[ActiveStep, list[Samples]]:
    """For each step the samples of each of its calls that get a gradient.

    Args:
        name: the pipeline's class, for messages.
        steps: active steps.
        unconditional_gradient: whether all of them do.

    Returns:
        `{step: [samples of each call]}`; `None` stands for all samples of a call, `()` for none of them.

    Raises:
        RecordingError: where no single branch is the unconditional one.
    """
    kept: dict[ActiveStep, list[Samples]] = {step: [None] * len(step.calls) for step in steps}
    if unconditional_gradient:
        return kept
    probes = []
    for step in steps:
        parts = _branches(name, step)
        if len(parts) > 1:
            check_guidance_sign(name, step.number, step.guidance_scales)
            probes.append(_probe(name, step, parts))
    # One read for all steps.
    values = iter(read([each for probe in probes for each in (*sum(probe.cosines, []), probe.is_finite)]))
    for probe in probes:
        cosines = [[next(values) for _ in of_probe] for of_probe in probe.cosines]
        try:
            unconditional = _unconditional_branch(name, probe.step, cosines)
        except RecordingError:
            if next(values):
                raise
            # The gradient will not be finite whichever branch is left out. One is, so that this process makes as many
            # calls as the others, which FSDP2 waits for.
            unconditional = 0
        else:
            next(values)
        kept[probe.step] = _without(probe, unconditional)
    return kept


def _branches(name: str, step: ActiveStep) -> list[tuple[int, slice]]:
    """The branches as (call, samples): each call's samples cut to the latents' batch."""
    batch = len(step.velocity)
    parts = []
    for number, call in enumerate(step.calls):
        if call.size % batch:
            raise _undecided(name, f"an output of batch {call.size} for latents of batch {batch}")
        parts += [(number, slice(start, start + batch)) for start in range(0, call.size, batch)]
    return parts


def _probe(name: str, step: ActiveStep, parts: list[tuple[int, slice]]) -> _Probe:
    # Of a call with several output tensors the first holds the velocity; of a list every sample's.
    of_parts = [
        recorded_outputs(step.calls[call], (samples,))[: None if step.calls[call].is_list else 1]
        for call, samples in parts
    ]
    outputs = [output for of_part in of_parts for output, _ in of_part]
    cosines = []
    for seed in range(NUM_PROBES):
        generator = torch.Generator(step.velocity.device).manual_seed(seed)
        cotangent = torch.randn(step.velocity.shape, generator=generator, device=step.velocity.device)
        pulled = torch.autograd.grad(
            step.velocity, outputs, cotangent.to(step.velocity.dtype), allow_unused=True, retain_graph=True
        )
        if any(gradient is None for gradient in pulled):
            raise _undecided(name, f"a transformer call at step {step.number} that the velocity does not use")
        remaining = iter(pulled)
        pieces = [
            torch.cat([widened(take(next(remaining), cut)).flatten() for _, cut in of_part]) for of_part in of_parts
        ]
        if len({piece.shape for piece in pieces}) > 1:
            # Some outputs have rows of text beside those of the image, which the velocity does not use.
            pieces = [piece[piece != 0] for piece in pieces]
        if len({piece.shape for piece in pieces}) > 1:
            raise _undecided(name, f"outputs of several shapes at step {step.number}")
        whole = torch.stack(pieces).sum(0)
        cosines.append([torch.nn.functional.cosine_similarity(piece, whole, dim=0) for piece in pieces])
    values = [step.velocity, *(output for call in step.calls for output in call.outputs)]
    is_finite = torch.stack([value.detach().isfinite().all() for value in values]).all()
    return _Probe(step, parts, cosines, is_finite)


def _unconditional_branch(name: str, step: ActiveStep, cosines: list[list[float]]) -> int:
    """The branch that counts against the others, in every probe the same."""
    found: set[int] = set()
    for of_probe in cosines:
        against = [part for part, cosine in enumerate(of_probe) if cosine < -0.5]
        if len(against) != 1 or not all(abs(cosine) > 0.5 for cosine in of_probe):
            words = ", ".join(f"{cosine:+.2f}" for cosine in of_probe)
            raise _undecided(name, f"branches with cosines {words} at step {step.number}")
        found.add(against[0])
    if len(found) != 1:
        raise _undecided(name, f"another branch with each probe at step {step.number}")
    return found.pop()


def _without(probe: _Probe, unconditional: int) -> list[Samples]:
    kept: list[Samples] = []
    for call in range(len(probe.step.calls)):
        of_call = [part for part, (owner, _) in enumerate(probe.parts) if owner == call]
        left = tuple(probe.parts[part][1] for part in of_call if part != unconditional)
        kept.append(None if len(left) == len(of_call) else left)
    return kept


def _undecided(name: str, found: str) -> RecordingError:
    return RecordingError(
        f"{name}: unconditional_gradient=False needs exactly one unconditional branch, found {found}; pass "
        "unconditional_gradient=True to send gradients through all branches."
    )
