# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Calling a transformer again on chosen samples of a recorded call, with gradients: verified outputs, or an error."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers.utils import logging

from . import checks
from .host import read
from .replayed import TOLERANCE, Replayed, deviations
from .samples import Samples, chosen_arguments, floating_outputs, take
from .state import CallKind, is_compiled, is_sharded, parts_that_run, trained_parameters, with_random_states
from .trajectory import ActiveStep, Call

logger = logging.get_logger(__name__)

# Transformers whose samples do not stand alone, as one replay has shown; they are called whole from then on.
_called_whole: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
# Kinds of calls whose parts were seen to run with gradients.
_seen_with_gradients: "weakref.WeakSet[CallKind]" = weakref.WeakSet()


class Replay:
    """Replays the calls of a sweep.

    Args:
        name: the pipeline's class, for messages.
        modules: `{recorded transformer: module to call in its place}`, for wrapped transformers.
    """

    def __init__(self, name: str, modules: Mapping[torch.nn.Module, torch.nn.Module]) -> None:
        self.name = name
        self.modules = modules

    @contextmanager
    def replayed(self, step: int, call: Call, samples: Samples, synchronises: bool) -> Iterator[Replayed]:
        """A replay that gives what was recorded; the block may differentiate it.

        Args:
            step: of the call.
            call: recorded.
            samples: to compute; others are computed with them where they do not stand alone.
            synchronises: whether processes exchange gradients in this block's backward pass.

        Raises:
            RecordingError: where the call gives something else, or leaves a part of the transformer out.
        """
        module = self.modules.get(call.module, call.module)
        with ExitStack() as stack:
            if not synchronises:
                stack.enter_context(_no_exchange(module))
            stack.enter_context(call.state.in_place(call.module))
            stack.enter_context(torch.enable_grad())
            replayed = self._verified(step, call, samples, module)
            try:
                yield replayed
            except (RuntimeError, TypeError) as error:
                checks.check_graph(self.name, step, error)
                raise

    def check_whole(self, steps: Sequence[ActiveStep]) -> None:
        """Raise RecordingError unless all calls, repeated whole and without gradients, give what was recorded."""
        for number, call in ((step.number, call) for step in steps for call in step.calls):
            replayed = Replayed(call, call.module, None, None, {}, [])
            with torch.no_grad(), call.state.in_place(call.module), with_random_states(call.module, call.state.random):
                replayed.outputs = replayed.forward()
            checks.check_reproduced(self.name, number, self._problem(replayed))

    def _verified(self, step: int, call: Call, samples: Samples, module: torch.nn.Module) -> Replayed:
        if samples is not None and call.module not in _called_whole:
            replayed, problem = self._attempt(step, call, samples, module)
            if problem is None:
                return replayed
            # Free the graph that failed before the next one is made.
            del replayed
            _called_whole.add(call.module)
            logger.warning(
                f"{self.name}: samples of {type(call.module).__name__} cannot be computed alone ({problem}); its "
                "calls are repeated whole from now on, the unconditional branch included."
            )
        replayed, problem = self._attempt(step, call, None, module)
        checks.check_reproduced(self.name, step, problem)
        replayed.kept = samples
        return replayed

    def _attempt(
        self, step: int, call: Call, samples: Samples, module: torch.nn.Module
    ) -> tuple[Replayed | None, str | None]:
        """The replay of these samples, and in words how it differs from the recording."""

        def check_gradients(path: str, part: torch.nn.Module) -> None:
            checks.check_runs_with_gradients(self.name, path, part)

        on_part = None if call.kind in _seen_with_gradients else check_gradients
        try:
            with parts_that_run(call.module, on_part) as ran, call.state.under_autocast():
                with with_random_states(call.module, call.state.random):
                    # Which may fill text caches anew.
                    args, kwargs, inputs = chosen_arguments(call, samples)
                    outputs = floating_outputs(module(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if samples is None or isinstance(error, checks.RecordingError) or is_sharded(module):
                # FSDP2 cannot go on after a call that broke off.
                raise
            return None, str(error).partition("\n")[0]
        _seen_with_gradients.add(call.kind)
        replayed = Replayed(call, module, samples, None, inputs, outputs)
        problem = self._problem(replayed)
        if problem is None:
            checks.check_reach(self.name, step, call.module, call.kind, ran, outputs)
        return replayed, problem

    def _problem(self, replayed: Replayed) -> str | None:
        """In words, how replayed outputs differ from the recorded ones beyond rounding; `None` if they do not."""
        recorded = [take(output.detach(), cut) for output, cut in replayed.recorded]
        if len(replayed.outputs) != len(recorded):
            return f"it has {len(replayed.outputs)} floating point outputs, recorded were {len(recorded)}"
        # Code that is compiled for gradients, or for other sizes, rounds in another way.
        is_exact = replayed.computed is None and replayed.module is replayed.call.module
        is_exact = is_exact and not is_compiled(replayed.module)
        largest, tolerances = [], []
        for new, old in zip(replayed.outputs, recorded, strict=True):
            if new.shape != old.shape:
                return f"shape {tuple(new.shape)}, recorded was {tuple(old.shape)}"
            if new.numel():
                largest.append(deviations(new.detach(), old).amax())
                tolerances.append(0.0 if is_exact and new.device.type == "cpu" else TOLERANCE[old.dtype])
        for value, tolerance in zip(read(largest), tolerances, strict=True):
            if not value <= tolerance:
                return f"relative difference {value:.2e} in one sample, tolerance {tolerance:g}"
        return None


@contextmanager
def _no_exchange(module: torch.nn.Module) -> Iterator[None]:
    """Backward passes of this block leave their gradients in the process, in DDP's `no_sync`.

    FSDP2 exchanges them at every replay: else each process would hold the whole gradient of all that is trained.
    """
    if hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def wrapped(
    transformers: Sequence[torch.nn.Module], transformer: torch.nn.Module | None
) -> dict[torch.nn.Module, torch.nn.Module]:
    """What to call in place of the trained transformer, where processes share it.

    Args:
        transformers: that were recorded.
        transformer: DDP's wrapper, the recorded transformer itself under FSDP2, or `None`.
    """
    trained = [module for module in transformers if trained_parameters(module)]
    is_wrapped = transformer is not None and (transformer is not trained[0] or is_sharded(transformer))
    return {trained[0]: transformer} if is_wrapped else {}
