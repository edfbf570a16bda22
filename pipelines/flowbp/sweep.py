# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The sweep: one pass over a surrogate's terms, latest step first, with one step's graph alive at a time.

    for step, weight, coupling in reversed(terms):
        v = velocity(latents[step])                 # evaluated again, with gradients
        backward(v, weight * adjoint)               # parameter gradients; the graph is freed
        adjoint = adjoint + coupling * (gradient of latents[step])

All cutting, scaling and coupling of gradients happens here (DESIGN.md, section 2). The cotangent of a velocity goes
through the recorded glue to the transformer's outputs, the transformer is called again, and the gradient of its inputs
goes through the glue to the latents.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .methods import Term
from .recording import REPLAY_TOLERANCE, ActiveStep, Call, RecordingError, Trajectory

# Rows of a call that are computed: slices of its batch, `None` for the whole call, an empty tuple for none of it.
Rows = tuple[slice, ...] | None


class Sweep:
    """The reverse sweep over recorded trajectories.

    Args:
        name: the pipeline's class name, for messages.
        unconditional_gradient: whether the unconditional branch of guidance gets a gradient. If not, it is not even
            computed.
        steps_per_forward: up to this many steps that share an adjoint are evaluated in one forward pass.
        modules: `{recorded transformer: module to call in its place}`, for wrapped transformers.
    """

    def __init__(
        self,
        name: str,
        unconditional_gradient: bool,
        steps_per_forward: int,
        modules: Mapping[torch.nn.Module, torch.nn.Module],
    ) -> None:
        self.name = name
        self.unconditional_gradient = unconditional_gradient
        self.steps_per_forward = steps_per_forward
        self.modules = modules
        # Turned off for good where rows or steps prove not to be separable.
        self._can_cut = True

    def run(self, trajectories: Sequence[Trajectory], adjoints: Sequence[torch.Tensor]) -> None:
        """Add the gradient to the transformers' parameters.

        Args:
            trajectories: recorded, of one surrogate.
            adjoints: for each, the loss's gradient at its endpoint, `(B, ...)`, float32 or float64.

        Raises:
            RecordingError: where a replay differs from the recording, or the unconditional branch cannot be found.
        """
        chunks = [
            (trajectory, chunk, index)
            for index, trajectory in enumerate(trajectories)
            for chunk in self._chunks(trajectory.surrogate.terms)
        ]
        adjoints = list(adjoints)
        for number, (trajectory, chunk, index) in enumerate(chunks):
            adjoints[index] = self._run_chunk(trajectory, chunk, adjoints[index], is_last=number == len(chunks) - 1)

    def _chunks(self, terms: Sequence[Term]) -> list[tuple[Term, ...]]:
        # A coupling changes the adjoint, so a chunk ends with the coupled term.
        chunks: list[tuple[Term, ...]] = []
        chunk: list[Term] = []
        for term in reversed(terms):
            chunk.append(term)
            if term.coupling or len(chunk) == self.steps_per_forward:
                chunks.append(tuple(chunk))
                chunk = []
        return [*chunks, tuple(chunk)] if chunk else chunks

    def _run_chunk(
        self, trajectory: Trajectory, chunk: tuple[Term, ...], adjoint: torch.Tensor, is_last: bool
    ) -> torch.Tensor:
        steps = [trajectory.steps[term.step] for term in chunk]
        if len({len(step.calls) for step in steps}) > 1:
            for position, term in enumerate(chunk):
                adjoint = self._run_chunk(trajectory, (term,), adjoint, is_last and position == len(chunk) - 1)
            return adjoint
        gradients = [_StepGradients(step) for step in steps]
        rows = [self._rows(term.step, step) for term, step in zip(chunk, steps, strict=True)]
        for term, step, gradient in zip(chunk, steps, gradients, strict=True):
            gradient.pull([step.velocity], [(term.weight * adjoint).to(step.velocity.dtype)])
        computed = [
            number
            for number in range(len(steps[0].calls))
            if any(step_rows[number] != () for step_rows in rows)
            and any(
                gradient.has_cotangent(step.calls[number]) for step, gradient in zip(steps, gradients, strict=True)
            )
        ]
        for number in reversed(computed):
            self._run_calls(
                [step.calls[number] for step in steps],
                [step_rows[number] for step_rows in rows],
                gradients,
                [term.step for term in chunk],
                synchronise=is_last and number == computed[0],
            )
        for term, gradient in zip(chunk, gradients, strict=True):
            if term.coupling and gradient.latents is not None:
                adjoint = adjoint + term.coupling * gradient.latents.to(adjoint.dtype)
        return adjoint

    # Which rows are the unconditional branch.

    def _rows(self, number: int, step: ActiveStep) -> list[Rows]:
        """For each call of a step, the rows that get a gradient."""
        if self.unconditional_gradient:
            return [None] * len(step.calls)
        parts = self._parts(step)
        if len(parts) == 1:
            return [None] * len(step.calls)
        unconditional = self._unconditional_part(number, step, parts)
        rows: list[Rows] = []
        for call in range(len(step.calls)):
            of_call = [(part, part_rows) for part, (owner, part_rows) in enumerate(parts) if owner == call]
            kept = tuple(part_rows for part, part_rows in of_call if part != unconditional)
            rows.append(None if len(kept) == len(of_call) else kept)
        return rows

    def _parts(self, step: ActiveStep) -> list[tuple[int, slice]]:
        """The branches of guidance as (call, rows): each call's output cut to the latents' batch."""
        batch = len(step.velocity)
        parts = []
        for number, call in enumerate(step.calls):
            size = len(call.outputs[0])
            if size % batch:
                raise self._undecided(f"an output of batch {size} for latents of batch {batch}")
            parts += [(number, slice(start, start + batch)) for start in range(0, size, batch)]
        return parts

    def _unconditional_part(self, number: int, step: ActiveStep, parts: list[tuple[int, slice]]) -> int:
        """Index of the part that guidance `u + s (c - u)`, s > 1, weighs against the sum of all parts."""
        outputs = [call.outputs[0] for call in step.calls]
        found: set[int] = set()
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            probe = torch.randn(step.velocity.shape, generator=generator).to(step.velocity)
            pulled = torch.autograd.grad(step.velocity, outputs, probe, allow_unused=True, retain_graph=True)
            if any(gradient is None for gradient in pulled):
                raise self._undecided(f"a transformer call at step {number} that the velocity does not use")
            pieces = [pulled[call][rows].flatten().double() for call, rows in parts]
            if len({piece.shape for piece in pieces}) > 1:
                raise self._undecided(f"outputs of several shapes at step {number}")
            whole = torch.stack(pieces).sum(0)
            cosines = [torch.nn.functional.cosine_similarity(piece, whole, dim=0).item() for piece in pieces]
            against = [part for part, cosine in enumerate(cosines) if cosine < -0.5]
            if len(against) != 1 or any(abs(cosine) <= 0.5 for cosine in cosines):
                raise self._undecided(
                    f"branches with cosines {', '.join(f'{c:+.2f}' for c in cosines)} at step {number}"
                )
            found.add(against[0])
        if len(found) != 1:
            raise self._undecided(f"another branch with each probe at step {number}")
        return found.pop()

    def _undecided(self, found: str) -> RecordingError:
        return RecordingError(
            f"{self.name}: unconditional_gradient=False needs exactly one unconditional branch, found {found}; pass "
            "unconditional_gradient=True to send gradients through all branches."
        )

    # Calling the transformer again.

    def _run_calls(
        self,
        calls: Sequence[Call],
        rows: Sequence[Rows],
        gradients: "Sequence[_StepGradients]",
        numbers: Sequence[int],
        synchronise: bool,
    ) -> None:
        """Replay one call of each step of a chunk, in one forward pass if they can be joined, and differentiate."""
        if not self._can_cut or (len(calls) > 1 and not _joinable(calls, rows)):
            positions = [position for position in range(len(calls)) if rows[position] != ()]
            for position in positions:
                computed, mask = (rows[position], None) if self._can_cut else (None, rows[position])
                last = synchronise and position == positions[-1]
                self._replay([calls[position]], [computed], [mask], [gradients[position]], [numbers[position]], last)
            return
        self._replay(calls, rows, [None] * len(calls), gradients, numbers, synchronise)

    def _replay(
        self,
        calls: Sequence[Call],
        rows: Sequence[Rows],
        masks: Sequence[Rows],
        gradients: "Sequence[_StepGradients]",
        numbers: Sequence[int],
        synchronise: bool,
    ) -> None:
        if not any(
            output in gradient.cotangents
            for call, gradient in zip(calls, gradients, strict=True)
            for output in call.outputs
        ):
            return
        recorded = calls[0].module
        module = self.modules.get(recorded, recorded)
        for call in calls:
            if call.versions != [p._version for p in recorded.parameters() if p.requires_grad]:
                raise RecordingError(
                    f"{self.name}: the transformer's parameters changed after the rollout was recorded; call backward "
                    "before the optimizer's step."
                )
        is_whole = len(calls) == 1 and rows[0] is None
        with ExitStack() as stack:
            if not synchronise and hasattr(module, "no_sync"):
                # Processes exchange gradients once, with the last pass.
                stack.enter_context(module.no_sync())
            stack.enter_context(torch.enable_grad())
            try:
                inputs, outputs = _forward(module, calls, rows)
                problem = self._difference(calls, rows, outputs, is_whole, module is recorded)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                if is_whole or isinstance(error, RecordingError):
                    raise
                problem = str(error)
            if problem and not is_whole:
                # Rows or steps of this transformer do not stand alone: whole calls, one step at a time, from now on.
                self._can_cut = False
                self._run_calls(calls, rows, gradients, numbers, synchronise)
                return
            if problem:
                raise RecordingError(
                    f"{self.name}: step {numbers[0]}: the transformer called again does not reproduce its recorded "
                    f"output: {problem}; switch dropout and caches off (transformer.eval()) and change nothing "
                    "between record and backward."
                )
            tensors, cotangents = [], []
            for position, (call, gradient) in enumerate(zip(calls, gradients, strict=True)):
                for index, output in enumerate(call.outputs):
                    cotangent = gradient.cotangents.get(output)
                    if cotangent is not None:
                        tensors.append(outputs[position][index])
                        cotangents.append(_masked(_take(cotangent, rows[position]), masks[position]))
            torch.autograd.backward(tensors, cotangents)
            del outputs, tensors
        for call, call_rows, leaves, gradient in zip(calls, rows, inputs, gradients, strict=True):
            received = {index: leaf.grad for index, leaf in leaves.items() if leaf.grad is not None}
            gradient.pull(
                [call.attached[index] for index in received],
                [_put_back(grad, call.leaves[index], call_rows) for index, grad in received.items()],
            )

    def _difference(
        self,
        calls: Sequence[Call],
        rows: Sequence[Rows],
        outputs: list[list[torch.Tensor]],
        is_whole: bool,
        is_recorded_module: bool,
    ) -> str | None:
        """In words, how replayed outputs differ from the recorded ones beyond rounding; `None` if they do not."""
        for call, call_rows, replayed in zip(calls, rows, outputs, strict=True):
            if len(replayed) != len(call.outputs):
                return f"it has {len(replayed)} floating point outputs, recorded were {len(call.outputs)}"
            for new, old in zip(replayed, call.outputs, strict=True):
                old, new = _take(old.detach(), call_rows), new.detach()
                if new.shape != old.shape:
                    return f"shape {tuple(new.shape)}, recorded was {tuple(old.shape)}"
                if is_whole and is_recorded_module and new.device.type == "cpu":
                    tolerance = 0.0
                else:
                    tolerance = REPLAY_TOLERANCE[old.dtype]
                difference = (new.double() - old.double()).abs().amax()
                size = old.double().abs().amax()
                if not difference <= tolerance * size:
                    return f"largest difference {difference:.2e} of values up to {size:.2e}, tolerance {tolerance:g}"
        return None


class _StepGradients:
    """Cotangents of one step while it is differentiated."""

    def __init__(self, step: ActiveStep) -> None:
        self.step = step
        self.cotangents: dict[torch.Tensor, torch.Tensor] = {}
        self.latents: torch.Tensor | None = None

    def pull(self, tensors: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> None:
        """Send cotangents back through the glue, adding them up at the outputs and at the latents."""
        if not tensors:
            return
        outputs = [output for call in self.step.calls for output in call.outputs]
        sources = outputs if self.step.latents is None else [*outputs, self.step.latents]
        pulled = torch.autograd.grad(tensors, sources, cotangents, allow_unused=True, retain_graph=True)
        for source, gradient in zip(sources, pulled, strict=True):
            if gradient is None:
                continue
            if source is self.step.latents:
                self.latents = gradient if self.latents is None else self.latents + gradient
            else:
                known = self.cotangents.get(source)
                self.cotangents[source] = gradient if known is None else known + gradient

    def has_cotangent(self, call: Call) -> bool:
        """Whether the velocity depends on this call."""
        return any(output in self.cotangents for output in call.outputs) or any(
            later.attached for later in self.step.calls[self.step.calls.index(call) + 1 :]
        )


def _forward(
    module: torch.nn.Module, calls: Sequence[Call], rows: Sequence[Rows]
) -> tuple[list[dict[int, torch.Tensor]], list[list[torch.Tensor]]]:
    """Call the transformer on the joined rows of recorded calls.

    Returns:
        For each call its input leaves `{index: tensor requiring a gradient}` and its floating point outputs.
    """
    inputs: list[dict[int, torch.Tensor]] = [{} for _ in calls]
    joined = []
    for index, first in enumerate(calls[0].leaves):
        if not isinstance(first, torch.Tensor):
            joined.append(first)
            continue
        pieces = []
        for call, call_rows, leaves in zip(calls, rows, inputs, strict=True):
            piece = call.leaves[index]
            if _has_batch(piece, call):
                piece = _take(piece, call_rows)
            if index in call.attached:
                piece = piece.detach().requires_grad_()
                leaves[index] = piece
            pieces.append(piece)
        joined.append(torch.cat(pieces) if len(pieces) > 1 and _has_batch(first, calls[0]) else pieces[0])
    args, kwargs = tree_unflatten(joined, calls[0].spec)
    results = [
        result
        for result in tree_flatten(module(*args, **kwargs))[0]
        if isinstance(result, torch.Tensor) and result.is_floating_point()
    ]
    sizes = [len(_take(call.outputs[0], call_rows)) for call, call_rows in zip(calls, rows, strict=True)]
    if len(calls) == 1:
        return inputs, [results]
    return inputs, [list(pieces) for pieces in zip(*(result.split(sizes) for result in results), strict=True)]


def _has_batch(tensor: torch.Tensor, call: Call) -> bool:
    return tensor.ndim > 0 and len(tensor) == len(call.outputs[0])


def _joinable(calls: Sequence[Call], rows: Sequence[Rows]) -> bool:
    """Whether calls of several steps can be one call: same structure, and what has no batch is the same."""
    first = calls[0]
    for call, call_rows in zip(calls[1:], rows[1:], strict=True):
        if call.module is not first.module or call.spec != first.spec or call_rows != rows[0]:
            return False
        for left, right in zip(first.leaves, call.leaves, strict=True):
            if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
                if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor) or left != right:
                    return False
            elif left.shape != right.shape or (not _has_batch(left, first) and not torch.equal(left, right)):
                return False
    return True


def _take(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    if rows is None:
        return tensor
    return tensor[rows[0]] if len(rows) == 1 else torch.cat([tensor[part] for part in rows])


def _put_back(gradient: torch.Tensor, recorded: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The gradient of a whole input from that of its rows."""
    if rows is None or len(gradient) == len(recorded):
        return gradient
    whole = torch.zeros_like(recorded)
    start = 0
    for part in rows:
        size = part.stop - part.start
        whole[part] = gradient[start : start + size]
        start += size
    return whole


def _masked(cotangent: torch.Tensor, kept: Rows) -> torch.Tensor:
    """The cotangent with the rows outside `kept` set to 0, for calls that are replayed whole."""
    return cotangent if kept is None else _put_back(_take(cotangent, kept), cotangent, kept)
