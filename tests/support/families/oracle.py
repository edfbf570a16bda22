# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The stock pipeline as oracle: torch's autograd through its own undecorated call gives the exact gradient.

The oracle uses nothing of the engine: it calls `type(pipe).__call__.__wrapped__`, the pipeline's code without its
`no_grad`, and differentiates a fixed random projection of what it returns. Where only the conditional branch is to
have a gradient, the unconditional outputs are detached in a wrapped transformer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError
from flowbp.methods import Method
from flowbp.surrogate import Surrogate, Term

from .family import Case, Part

NUM_INFERENCE_STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: its label.
        difference: |found - expected| / |expected| over all parameters, gradients through both branches of guidance.
        conditional_difference: the same with `unconditional_gradient=False`; `None` where the case has no
            unconditional branch to leave out.
        coupling: how much of the gradient (relative norm) crosses from step to step: what a gradient that is cut there
            misses. A small value would make the comparison blind to the coupling.
        refused: the engine's message, where it refused.
        conditional_refused: its message, where it refused `unconditional_gradient=False` alone.
    """

    case: str
    difference: float | None = None
    conditional_difference: float | None = None
    coupling: float | None = None
    refused: str | None = None
    conditional_refused: str | None = None


def transformers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The pipeline's transformers (in DreamLite a UNet) by component name."""
    components = pipe.components.items()
    is_one = {name for name, module in components if "transformer" in name or name == "unet"}
    return {name: module for name, module in components if name in is_one and module is not None}


def call_arguments(case: Case) -> dict[str, Any]:
    """Arguments of the pipeline's call, copied, so that no call can change another's."""
    torch.manual_seed(0)  # for pipelines that draw from the global generator
    copied = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, dict(case.arguments))
    copied.setdefault("num_inference_steps", NUM_INFERENCE_STEPS)
    if copied["num_inference_steps"] is None:  # the pipeline counts its steps in another way
        del copied["num_inference_steps"]
    generator = torch.Generator().manual_seed(1)
    return {**copied, "generator": generator, "output_type": "pt", "return_dict": False}


def project(output: Any, count: int | None = None) -> torch.Tensor:
    """(count,) numbers, by default (B,): each sample's picture or video along a fixed random direction."""
    output = torch.stack(output) if isinstance(output, list) else output  # a list with each sample's pictures
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (output.double() * direction).reshape(count or len(output), -1).sum(1)


def gradients(pipe: DiffusionPipeline) -> torch.Tensor:
    """All parameters' gradients as one vector, zeros where there is none; they are taken off the parameters."""
    pieces = []
    for module in transformers(pipe).values():
        for parameter in module.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pieces.append(gradient.detach().double().flatten())
            parameter.grad = None
    return torch.cat(pieces)


def stock_gradient(pipe: DiffusionPipeline, case: Case, detached: Part | None = None) -> torch.Tensor:
    """Gradient by autograd through the stock pipeline, with the outputs of `detached` cut off the graph."""
    undo: list[Callable[[], None]] = []
    if detached is not None:
        undo = _detach(pipe, detached)
    try:
        with torch.enable_grad():
            output = type(pipe).__call__.__wrapped__(pipe, **call_arguments(case))[0]
            project(output, 1).sum().backward()
    finally:
        for each in undo:
            each()
    return gradients(pipe)


def _detach(pipe: DiffusionPipeline, part: Part) -> list[Callable[[], None]]:
    """Wrap transformers and scheduler on their instances so that the part's outputs carry no gradient."""
    calls = {"number": 0}
    owner = type(pipe.scheduler)
    step = owner.step

    @functools.wraps(step)
    def counted_step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is pipe.scheduler:  # and not a copy of it, for sound
            calls["number"] = 0
        return step(scheduler, *args, **kwargs)

    # On the class, because pipelines copy their schedulers.
    owner.step = counted_step
    undo = [functools.partial(setattr, owner, "step", step)]
    for module in transformers(pipe).values():
        module.forward = functools.partial(_detached_call, module.forward, calls, part)
        undo.append(functools.partial(delattr, module, "forward"))
    return undo


def _detached_call(forward: Callable[..., Any], calls: dict[str, int], part: Part, *args: Any, **kwargs: Any) -> Any:
    result = forward(*args, **kwargs)
    number = calls["number"]
    calls["number"] += 1
    if number != part.call:
        return result
    if part.rows == "all":
        return tree_map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value, result)
    leaves, spec = tree_flatten(result)
    is_list = len(leaves) > 1 and not (isinstance(result, tuple) and isinstance(result[0], torch.Tensor))
    if part.size is not None and part.size != (len(leaves) if is_list else len(leaves[0])):
        return result
    if is_list:  # a tensor for each sample
        half = len(leaves) // 2
        cut = range(half) if part.rows == "first half" else range(half, len(leaves))
        leaves = [leaf.detach() if index in cut else leaf for index, leaf in enumerate(leaves)]
    else:
        halves = [leaf.chunk(2) for leaf in leaves]
        cut = [(a.detach(), b) if part.rows == "first half" else (a, b.detach()) for a, b in halves]
        leaves = [torch.cat(pair) for pair in cut]
    return tree_unflatten(leaves, spec)


class Uncoupled(Method):
    """The row `full` with all couplings cut."""

    def draw(self, sigmas: torch.Tensor, generator: torch.Generator | None = None) -> Surrogate:
        lengths = sigmas.double().diff().tolist()
        return Surrogate("sample", tuple(Term(step, length, 0.0) for step, length in enumerate(lengths)))


def engine_gradient(
    pipe: DiffusionPipeline, case: Case, unconditional_gradient: bool = True, coupled: bool = True
) -> torch.Tensor:
    """Gradient by the engine: the row `full`, or its terms with all couplings cut."""
    method = get_method("full") if coupled else Uncoupled("full", {}, True, False)
    callback = FlowBPCallback(method, unconditional_gradient=unconditional_gradient)
    with callback.record(pipe):
        output = pipe(**call_arguments(case))[0]
    callback.backward(
        project(output, len(callback.endpoint)), objective=lambda rewards, weights: (rewards * weights).sum()
    )
    return gradients(pipe)


def try_case(pipe: DiffusionPipeline, case: Case) -> Outcome:
    """Put one case to the test."""
    try:
        found = engine_gradient(pipe, case)
    except (RecordingError, ValueError) as error:
        gradients(pipe)
        return Outcome(case.label, refused=str(error))
    expected = stock_gradient(pipe, case)
    size = expected.norm()
    if not (torch.isfinite(size) and size > 0):
        raise AssertionError(f"{type(pipe).__name__}, {case.label}: the oracle's gradient has norm {size}")
    difference = ((found - expected).norm() / size).item()
    uncoupled = engine_gradient(pipe, case, coupled=False)
    coupling = ((uncoupled - expected).norm() / size).item()
    conditional_difference = conditional_refused = None
    if case.unconditional is not None:
        try:
            found = engine_gradient(pipe, case, unconditional_gradient=False)
        except RecordingError as error:
            gradients(pipe)
            conditional_refused = str(error)
        else:
            expected = stock_gradient(pipe, case, detached=case.unconditional)
            conditional_difference = ((found - expected).norm() / expected.norm()).item()
    return Outcome(case.label, difference, conditional_difference, coupling, None, conditional_refused)
