# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The sweep: one pass over a surrogate's terms, latest step first, with one step's graph alive at a time.

    for step, weight, coupling in reversed(terms):
        v = velocity(latents[step])                 # evaluated again, with gradients
        backward(v, weight * adjoint)               # parameter gradients; the graph is freed
        adjoint = adjoint + coupling * (gradient of latents[step])

All cutting, scaling and coupling of gradients happens here (docs/methods.md, section 2). The cotangent of a velocity
goes through the recorded glue to the transformer's outputs, the velocity anchor adds its own, the transformer is
called again, and the gradient of its inputs goes through the glue to the latents.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .methods import Term
from .objectives import widened
from .recording import REPLAY_TOLERANCE, ActiveStep, Call, RecordingError, Trajectory, agree, switches

# Rows of a call that are computed: slices of its batch, `None` for the whole call, an empty tuple for none of it.
Rows = tuple[slice, ...] | None


@dataclass(frozen=True)
class SweepOutput:
    """What a sweep found beside the gradients, detached and without `gradient_scale`.

    Attributes:
        anchor: scalar, the velocity anchor with its factor beta; 0 without one.
        gradient_norms: `{active step: scalar}` norm of the gradient that it added to the parameters in this process;
            empty unless measured.
    """

    anchor: torch.Tensor
    gradient_norms: dict[int, torch.Tensor]


class Sweep:
    """One reverse sweep over recorded trajectories.

    Args:
        name: the pipeline's class name, for messages.
        unconditional_gradient: whether the unconditional branch of guidance gets a gradient. If not, it is not even
            computed.
        steps_per_forward: up to this many steps that share an adjoint are evaluated in one forward pass.
        modules: `{recorded transformer: module to call in its place}`, for wrapped transformers.
        strict: every recorded call of every active step is first called again as a whole, without gradients, and
            compared with the recording.
        velocity_anchor: beta >= 0 of the velocity anchor (see `FlowBPCallback`), 0 for none.
        measure_gradients: whether to find each active step's gradient norm.
        gradient_scale: factor that the adjoints have already; the anchor's gradient gets it too.
    """

    def __init__(
        self,
        name: str,
        unconditional_gradient: bool,
        steps_per_forward: int,
        modules: Mapping[torch.nn.Module, torch.nn.Module],
        strict: bool = False,
        velocity_anchor: float = 0.0,
        measure_gradients: bool = False,
        gradient_scale: float = 1.0,
    ) -> None:
        self.name = name
        self.unconditional_gradient = unconditional_gradient
        self.steps_per_forward = steps_per_forward
        self.modules = modules
        self.strict = strict
        self.velocity_anchor = velocity_anchor
        self.measure_gradients = measure_gradients
        self.gradient_scale = gradient_scale
        # Turned off for good where rows or steps prove not to be separable.
        self._can_cut = True
        self._watched: set[torch.nn.Module] = set()
        self._anchor: torch.Tensor | float = 0.0

    def run(self, trajectories: Sequence[Trajectory], adjoints: Sequence[torch.Tensor]) -> SweepOutput:
        """Add the gradient to the transformers' parameters.

        Args:
            trajectories: recorded, of one surrogate.
            adjoints: for each, the loss's gradient at its endpoint, `(B, ...)`, float32 or float64.

        Returns:
            The velocity anchor and the gradient norms.

        Raises:
            RecordingError: where a replay differs from the recording, the unconditional branch cannot be found, or
                another transformer than the wrapped one was called.
            ValueError: for a velocity anchor where a trained transformer has no LoRA, or a fused one.
        """
        calls = [call for trajectory in trajectories for step in trajectory.steps.values() for call in step.calls]
        if self.modules and any(call.module not in self.modules for call in calls):
            raise RecordingError(
                f"{self.name}: expected one transformer, the wrapped one, got several: the pass that exchanges "
                "gradients between processes would not be known; train in one process."
            )
        trained = {call.module: [each for each in call.module.parameters() if each.requires_grad] for call in calls}
        if self.velocity_anchor:
            for module in (module for module, parameters in trained.items() if parameters):
                self._check_adapters(module)
        norms = _GradientNorms(list(trained) if self.measure_gradients else [])
        chunks = [
            (trajectory, chunk, index)
            for index, trajectory in enumerate(trajectories)
            for chunk in self._chunks(trajectory.surrogate.terms)
        ]
        adjoints = list(adjoints)
        for number, (trajectory, chunk, index) in enumerate(chunks):
            with norms.of([term.step for term in chunk]):
                adjoints[index] = self._run_chunk(
                    trajectory, chunk, adjoints[index], is_last=number == len(chunks) - 1
                )
        anchor = torch.as_tensor(self._anchor, device=adjoints[0].device)
        return SweepOutput(anchor, {step: norm / self.gradient_scale for step, norm in norms.found.items()})

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
        if self.strict:
            for term, step in zip(chunk, steps, strict=True):
                self._check_whole(term.step, step)
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
        try:
            unconditional = self._unconditional_part(number, step, parts)
        except RecordingError:
            values = [step.velocity, *(output for call in step.calls for output in call.outputs)]
            if all(bool(value.isfinite().all()) for value in values):
                raise
            # The gradient will not be finite whichever branch is left out. One is, so that this process makes as many
            # passes as the others, which FSDP2 waits for.
            unconditional = 0
        rows: list[Rows] = []
        for call in range(len(step.calls)):
            of_call = [(part, part_rows) for part, (owner, part_rows) in enumerate(parts) if owner == call]
            kept = tuple(part_rows for part, part_rows in of_call if part != unconditional)
            rows.append(None if len(kept) == len(of_call) else kept)
        return rows

    def _parts(self, step: ActiveStep) -> list[tuple[int, slice]]:
        """The branches of guidance as (call, samples): each call's output cut to the latents' batch."""
        batch = len(step.velocity)
        parts = []
        for number, call in enumerate(step.calls):
            if call.size % batch:
                raise self._undecided(f"an output of batch {call.size} for latents of batch {batch}")
            parts += [(number, slice(start, start + batch)) for start in range(0, call.size, batch)]
        return parts

    def _unconditional_part(self, number: int, step: ActiveStep, parts: list[tuple[int, slice]]) -> int:
        """Index of the part that guidance `u + s (c - u)`, s > 1, weighs against the sum of all parts."""
        # Of a call with several output tensors the first holds the velocity; of a list every sample's.
        of_parts = [
            _recorded(step.calls[call], (rows,))[: None if step.calls[call].is_list else 1] for call, rows in parts
        ]
        outputs = [output for of_part in of_parts for output, _ in of_part]
        found: set[int] = set()
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            probe = torch.randn(step.velocity.shape, generator=generator).to(step.velocity)
            pulled = torch.autograd.grad(step.velocity, outputs, probe, allow_unused=True, retain_graph=True)
            if any(gradient is None for gradient in pulled):
                raise self._undecided(f"a transformer call at step {number} that the velocity does not use")
            remaining = iter(pulled)
            pieces = [
                torch.cat([_take(next(remaining), cut).flatten().double() for _, cut in of_part])
                for of_part in of_parts
            ]
            if len({piece.shape for piece in pieces}) > 1:
                # Some outputs have rows of text beside those of the picture, which the velocity does not use.
                pieces = [piece[piece != 0] for piece in pieces]
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
        is_trained = any(parameter.requires_grad for parameter in recorded.parameters())
        if not is_trained and not any(call.attached for call in calls):
            # A frozen transformer beside the trained one: no gradient ends or passes here.
            return
        module = self.modules.get(recorded, recorded)
        for call in calls:
            if call.versions != [p._version for p in recorded.parameters() if p.requires_grad]:
                raise RecordingError(
                    f"{self.name}: the transformer's parameters changed after the rollout was recorded; call backward "
                    "before the optimizer's step."
                )
        now = switches(recorded)
        for call, number in zip(calls, numbers, strict=True):
            if call.switches != now:
                changed = ", ".join(sorted(set(call.switches) ^ set(now))[:2])
                raise RecordingError(
                    f"{self.name}: step {number}: parts of the transformer were exchanged for one call ({changed}, "
                    "...), so it cannot be called again as it was; switch that guidance off."
                )
        is_anchored = is_trained and self.velocity_anchor > 0
        is_whole = len(calls) == 1 and rows[0] is None
        with ExitStack() as stack:
            if not synchronise:
                # Processes exchange gradients once, with the last pass.
                stack.enter_context(_no_exchange(module))
            stack.enter_context(torch.enable_grad())
            try:
                if is_anchored:
                    # Before the pass with gradients, so that the two are not in memory together.
                    with torch.no_grad(), adapters_off(recorded):
                        _, bases = _forward(module, calls, rows)
                with self._watch(recorded):
                    inputs, outputs = _forward(module, calls, rows)
                problem = self._difference(calls, rows, outputs, is_whole, module is recorded)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                if is_whole or isinstance(error, RecordingError) or hasattr(module, "set_requires_gradient_sync"):
                    # FSDP2 cannot go on after a call that broke off.
                    raise
                problem = str(error)
            if problem and not is_whole:
                # Rows or steps of this transformer do not stand alone: whole calls, one step at a time, from now on.
                self._can_cut = False
                self._run_calls(calls, rows, gradients, numbers, synchronise)
                return
            if problem:
                raise self._not_reproduced(numbers[0], problem)
            tensors, cotangents = [], []
            for position, (call, gradient) in enumerate(zip(calls, gradients, strict=True)):
                kept = {output for output, _ in _recorded(call, masks[position])}
                mask = None if call.is_list else masks[position]
                places = []
                for place, (output, cut) in enumerate(_recorded(call, rows[position])):
                    cotangent = gradient.cotangents.get(output)
                    if cotangent is not None and output in kept:
                        places.append(place)
                        tensors.append(outputs[position][place])
                        cotangents.append(_masked(_take(cotangent, cut), mask))
                if is_anchored and places:
                    of_anchor = self._anchored(
                        [outputs[position][place].detach() for place in places],
                        [bases[position][place] for place in places],
                        mask,
                    )
                    for index, anchor in enumerate(of_anchor, start=-len(places)):
                        cotangents[index] = cotangents[index] + anchor.to(cotangents[index].dtype)
            torch.autograd.backward(tensors, cotangents)
            del outputs, tensors
        for call, call_rows, leaves, gradient in zip(calls, rows, inputs, gradients, strict=True):
            received = {index: leaf.grad for index, leaf in leaves.items() if leaf.grad is not None}
            gradient.pull(
                [call.attached[index] for index in received],
                [_put_back(grad, call.leaves[index], call_rows) for index, grad in received.items()],
            )

    # The velocity anchor.

    def _check_adapters(self, module: torch.nn.Module) -> None:
        adapters = _adapters(module)
        if not adapters:
            raise ValueError(
                f"{self.name}: `velocity_anchor` compares with the transformer without its LoRA, which has none; add "
                "a LoRA adapter, or set it to 0."
            )
        if any(adapter.merged for adapter in adapters):
            raise ValueError(
                f"{self.name}: `velocity_anchor` switches the LoRA off, which is fused into the weights; call "
                "pipe.unfuse_lora()."
            )

    def _anchored(
        self, outputs: Sequence[torch.Tensor], bases: Sequence[torch.Tensor], kept: Rows
    ) -> list[torch.Tensor]:
        """The anchor's cotangents of the outputs of one call, whose value is added up."""
        gaps = [_masked(widened(output) - widened(base), kept) for output, base in zip(outputs, bases, strict=True)]
        size = sum(_take(gap, kept).numel() for gap in gaps)
        self._anchor = self._anchor + self.velocity_anchor * sum(gap.square().sum() for gap in gaps) / size
        return [self.gradient_scale * self.velocity_anchor * 2 / size * gap for gap in gaps]

    @contextmanager
    def _watch(self, module: torch.nn.Module) -> Iterator[None]:
        """Raise RecordingError where a part of the transformer switches gradients off; at the first pass only."""
        if module in self._watched:
            yield
            return

        def check(name: str, part: torch.nn.Module, inputs: object) -> None:
            if not torch.is_grad_enabled():
                raise RecordingError(
                    f"{self.name}: {name} ({type(part).__name__}) runs without gradients inside the transformer, so "
                    "its part of the gradient would be missing; if its code does so in evaluation mode only, put the "
                    "module that holds it in training mode."
                )

        # Parts without parameters, such as tables of positions, may do as they like.
        handles = [
            part.register_forward_pre_hook(functools.partial(check, name))
            for name, part in module.named_modules()
            if next(part.parameters(recurse=False), None) is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._watched.add(module)

    def _check_whole(self, number: int, step: ActiveStep) -> None:
        """Raise RecordingError unless every call of a step, repeated whole, gives what was recorded."""
        for call in step.calls:
            with torch.no_grad():
                _, outputs = _forward(call.module, [call], [None])
            problem = self._difference([call], [None], outputs, is_whole=True, is_recorded_module=True)
            if problem:
                raise self._not_reproduced(number, problem)

    def _not_reproduced(self, number: int, problem: str) -> RecordingError:
        return RecordingError(
            f"{self.name}: step {number}: the transformer called again does not reproduce its recorded output: "
            f"{problem}; switch dropout, caches and gradient checkpointing off and change nothing between record and "
            "backward."
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
            recorded = _recorded(call, call_rows)
            if len(replayed) != len(recorded):
                return f"it has {len(replayed)} floating point outputs, recorded were {len(recorded)}"
            for new, (old, cut) in zip(replayed, recorded, strict=True):
                old, new = _take(old.detach(), cut), new.detach()
                if new.shape != old.shape:
                    return f"shape {tuple(new.shape)}, recorded was {tuple(old.shape)}"
                if is_whole and is_recorded_module and new.device.type == "cpu":
                    tolerance = 0.0
                else:
                    tolerance = REPLAY_TOLERANCE[old.dtype]
                old, new = old.double(), new.double()
                is_finite = old.isfinite() & new.isfinite()
                difference = (new - old).abs().where(is_finite, 0).amax()
                size = old.abs().where(is_finite, 0).amax()
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


class _GradientNorms:
    """Norms of what passes send to parameters, found by hooks on them: `.grad` holds the sum over all passes.

    The hooks are placed when the parts of the transformers are called, because FSDP2's whole parameters are there then
    only.

    Attributes:
        found: `{step: norm}`, the same for steps of one block.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.parts = [
            part
            for module in modules
            for part in module.modules()
            if any(parameter.requires_grad for parameter in part.parameters(recurse=False))
        ]
        self.found: dict[int, torch.Tensor] = {}
        self._steps: list[int] = []
        self._sums: dict[int, torch.Tensor] = {}

    @contextmanager
    def of(self, steps: list[int]) -> Iterator[None]:
        """Measure the passes of this block. Blocks of the same steps in a row (DRaFT-LV's copies) add up."""
        if steps != self._steps:
            self._steps, self._sums = steps, {}
        hooks: dict[int, RemovableHandle] = {}

        def place(part: torch.nn.Module, inputs: object) -> None:
            for parameter in part.parameters(recurse=False):
                if torch.is_grad_enabled() and parameter.requires_grad and id(parameter) not in hooks:
                    hooks[id(parameter)] = parameter.register_hook(functools.partial(self._add, id(parameter)))

        handles = [part.register_forward_pre_hook(place) for part in self.parts]
        try:
            yield
        finally:
            for handle in (*handles, *hooks.values()):
                handle.remove()
        if self._sums:
            norms = [torch.linalg.vector_norm(widened(each)) for each in self._sums.values()]
            norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
            self.found |= dict.fromkeys(steps, norm)

    def _add(self, number: int, gradient: torch.Tensor) -> None:
        known = self._sums.get(number)
        self._sums[number] = gradient.detach() if known is None else known + gradient


def _adapters(module: torch.nn.Module) -> list[BaseTunerLayer]:
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


@contextmanager
def adapters_off(module: torch.nn.Module) -> Iterator[None]:
    """Switch all adapters of a model off, whichever are active, and back to what they were."""
    adapters = _adapters(module)
    before = [adapter._disable_adapters for adapter in adapters]
    try:
        for adapter in adapters:
            # Not enable_adapters(), which sets requires_grad too, on which DDP and FSDP2 rely.
            adapter._disable_adapters = True
        yield
    finally:
        for adapter, was_disabled in zip(adapters, before, strict=True):
            adapter._disable_adapters = was_disabled


@contextmanager
def _no_exchange(module: torch.nn.Module) -> Iterator[None]:
    """Backward passes of this block leave their gradients in the process: in DDP's `no_sync`, or FSDP2's switch."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    elif hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def _forward(
    module: torch.nn.Module, calls: Sequence[Call], rows: Sequence[Rows]
) -> tuple[list[dict[int, torch.Tensor]], list[list[torch.Tensor]]]:
    """Call the transformer on the joined rows of recorded calls.

    Returns:
        For each call its input leaves `{index: tensor requiring a gradient}` and its floating point outputs.
    """
    inputs: list[dict[int, torch.Tensor]] = [{} for _ in calls]
    joined = []
    lists = _list_entries(calls[0])
    for index, first in enumerate(calls[0].leaves):
        if not isinstance(first, torch.Tensor):
            joined.append(first)
            continue
        pieces = []
        for call, call_rows, leaves in zip(calls, rows, inputs, strict=True):
            piece = call.leaves[index]
            if index not in lists and _has_batch(piece, call):
                piece = _take(piece, call_rows)
            if index in call.attached:
                piece = piece.detach().requires_grad_()
                leaves[index] = piece
            pieces.append(piece)
        joined.append(torch.cat(pieces) if len(pieces) > 1 and _has_batch(first, calls[0]) else pieces[0])
    args, kwargs = tree_unflatten(joined, calls[0].spec)
    if lists and rows[0] is not None:
        chosen = [number for part in rows[0] for number in range(part.start, part.stop)]
        args = [[value[number] for number in chosen] if _is_sample_list(value, calls[0]) else value for value in args]
        kwargs = {
            name: [value[number] for number in chosen] if _is_sample_list(value, calls[0]) else value
            for name, value in kwargs.items()
        }
    results = [
        result
        for result in tree_flatten(module(*args, **kwargs))[0]
        if isinstance(result, torch.Tensor) and result.is_floating_point()
    ]
    if len(calls) == 1:
        return inputs, [results]
    sizes = [len(_take(call.outputs[0], call_rows)) for call, call_rows in zip(calls, rows, strict=True)]
    return inputs, [list(pieces) for pieces in zip(*(result.split(sizes) for result in results), strict=True)]


def _has_batch(tensor: torch.Tensor, call: Call) -> bool:
    return tensor.ndim > 0 and len(tensor) == call.size


def _is_sample_list(value: Any, call: Call) -> bool:
    """Whether an argument of a call with a list of outputs is a list with an entry for each sample."""
    return call.is_list and isinstance(value, list | tuple) and len(value) == call.size


def _list_entries(call: Call) -> set[int]:
    """Indices in `call.leaves` of the entries of its lists of samples."""
    args, kwargs = tree_unflatten(list(range(len(call.leaves))), call.spec)
    lists = [value for value in (*args, *kwargs.values()) if _is_sample_list(value, call)]
    return {index for value in lists for index in tree_flatten(value)[0]}


def _recorded(call: Call, rows: Rows) -> list[tuple[torch.Tensor, Rows]]:
    """The recorded outputs of these samples, each with the rows to take of it."""
    if call.is_list and rows is not None:
        return [(call.outputs[number], None) for part in rows for number in range(part.start, part.stop)]
    return [(output, rows) for output in call.outputs]


def _joinable(calls: Sequence[Call], rows: Sequence[Rows]) -> bool:
    """Whether calls of several steps can be one call: same structure, and what has no batch is the same."""
    first = calls[0]
    if first.is_list:
        return False
    for call, call_rows in zip(calls[1:], rows[1:], strict=True):
        if call.module is not first.module or call.spec != first.spec or call_rows != rows[0]:
            return False
        for left, right in zip(first.leaves, call.leaves, strict=True):
            if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
                if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor) or left != right:
                    return False
            elif left.shape != right.shape or (not _has_batch(left, first) and not agree(left, right)):
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
