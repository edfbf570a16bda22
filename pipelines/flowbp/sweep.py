# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The sweep: one pass over a surrogate's terms, latest step first, with one step's graph alive at a time.

    for step, weight, coupling in reversed(terms):
        v = velocity(latents[step])                 # evaluated again, with gradients
        backward(v, weight * adjoint)               # parameter gradients; the graph is freed
        adjoint = adjoint + coupling * (gradient of latents[step])

All cutting, scaling and coupling of gradients happens here (docs/methods.md, section 2). The cotangent of a velocity
goes through the recorded glue to the transformer's outputs, the transformer is called again, and the gradient of its
inputs goes through the glue to the latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from .glue import Glue
from .observers import GradientNorms, VelocityAnchor
from .replay import Replay
from .samples import Samples
from .state import trained_parameters
from .surrogate import Term
from .trajectory import ActiveStep, Call, Trajectory


def sweep(
    trajectories: Sequence[Trajectory],
    adjoints: Sequence[torch.Tensor],
    kept: Mapping[ActiveStep, Sequence[Samples]],
    replay: Replay,
    anchor: VelocityAnchor | None = None,
    norms: GradientNorms | None = None,
) -> list[torch.Tensor]:
    """Add the gradient to the transformers' parameters; -> what became of each adjoint.

    Args:
        trajectories: recorded, of one surrogate.
        adjoints: for each, the loss's gradient at its endpoint, `(B, ...)`, float32 or float64.
        kept: for each step the samples of each of its calls that get a gradient, see `guidance.kept_samples`.
        replay: calls transformers again.
        anchor: adds its penalty to each replay.
        norms: measures each step.
    """
    passes = [
        (index, trajectory.steps[term.step], term)
        for index, trajectory in enumerate(trajectories)
        for term in reversed(trajectory.surrogate.terms)
        if trajectory.steps[term.step].velocity.requires_grad
    ]
    adjoints = list(adjoints)
    for number, (index, step, term) in enumerate(passes):
        with norms.of(term.step) if norms is not None else nullcontext():
            adjoints[index] = _differentiate(
                step, term, adjoints[index], kept[step], replay, anchor, is_last=number == len(passes) - 1
            )
    return adjoints


def _differentiate(
    step: ActiveStep,
    term: Term,
    adjoint: torch.Tensor,
    kept: Sequence[Samples],
    replay: Replay,
    anchor: VelocityAnchor | None,
    is_last: bool,
) -> torch.Tensor:
    """Send the adjoint through one step's velocity; -> the adjoint of the terms before it."""
    glue = Glue(step)
    glue.pull({step.velocity: (term.weight * adjoint).to(step.velocity.dtype)})
    computed = glue.used(lambda number: kept[number] != () and _is_needed(step.calls[number]))
    for number in computed:
        call = step.calls[number]
        if not any(output in glue.cotangents for output in call.outputs):
            continue
        # Processes exchange gradients once, with the last pass.
        synchronises = is_last and number == computed[-1]
        with replay.replayed(term.step, call, kept[number], synchronises) as replayed:
            cotangents = replayed.cotangents(glue.cotangents)
            if anchor is not None:
                anchor.add_to(cotangents, replayed)
            replayed.backward(cotangents)
            glue.pull(replayed.input_gradients())
            # The graph is gone; let its outputs go too before the next one is made.
            del replayed
    if term.coupling and glue.of_latents is not None:
        adjoint = adjoint + term.coupling * glue.of_latents.to(adjoint.dtype)
    return adjoint


def _is_needed(call: Call) -> bool:
    """A frozen transformer beside the trained one matters only where a gradient passes through it."""
    return bool(call.attached) or bool(trained_parameters(call.module))


@contextmanager
def all_or_nothing(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Take first gradients of these parameters away if the block fails: a part of a gradient is worse than none.

    Copies of gradients that were there before would take too much memory, so a note on the error says what they are.
    """
    fresh = [parameter for parameter in parameters if parameter.grad is None]
    try:
        yield
    except BaseException as error:
        for parameter in fresh:
            parameter.grad = None
        if len(fresh) < len(parameters):
            error.add_note(
                "Gradients that were accumulated before may hold a part of this one now: call zero_grad() and begin "
                "with the first micro-batch again."
            )
        raise
