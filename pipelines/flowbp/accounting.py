# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The accounting of a rollout: told of its events, it asks `checks` and remembers what they need of earlier steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_leaves

from . import checks
from .marks import TrainedUses
from .plan import Plan
from .state import ModelState, parameters_of, parts_that_run, random_states


@dataclass(eq=False)
class Kind:
    """Calls of one transformer at one place in their steps, with arguments of one structure and in one state.

    Attributes:
        module: the transformer.
        place: how many calls come before in the step.
        spec: structure of the arguments.
        state: of the transformer.
        parts: trained parts that ran in the rollout's first call of this kind.
    """

    module: torch.nn.Module
    place: int
    spec: TreeSpec
    state: ModelState
    parts: frozenset[torch.nn.Module]

    def is_like(self, module: torch.nn.Module, place: int, spec: TreeSpec) -> bool:
        """Whether a call is of this kind, if its state is."""
        return module is self.module and place == self.place and spec == self.spec


class Accounting:
    """Follows one rollout of one pipeline.

    Args:
        name: the pipeline's class, for messages.
        transformers: that are recorded.
        others: the pipeline's other modules, by component; they are not trained.
        uses: marks what trained parameters went into outside of the recorded calls.

    Every method raises RecordingError at once for what the host knows. What needs numbers waits on the device until
    `settle`, or until the record block is left.
    """

    def __init__(
        self,
        name: str,
        transformers: Sequence[torch.nn.Module],
        others: Mapping[str, torch.nn.Module],
        uses: TrainedUses,
    ) -> None:
        self.name = name
        self.uses = uses
        self.verdicts = checks.Verdicts()
        trained = {id(parameter) for module in transformers for parameter in parameters_of(module)}
        # Those of a VAE at PyTorch's default, for example, whose gradient nobody wants.
        self._ignored = {id(parameter) for module in others.values() for parameter in parameters_of(module)} - trained
        self._kinds: list[Kind] = []
        # Of each call of this step and of the one before: inputs without a graph, with their versions.
        self._inputs: list[list[Any]] = []
        self._previous_inputs: list[list[Any]] = []

    def allows(self, own: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
        """Which leaves a graph may end in: `own`, and parameters that are not trained."""
        known = {*map(id, own), *self._ignored}
        return lambda leaf: id(leaf) in known

    # A transformer's call.

    def call_begins(
        self, step: int, module: torch.nn.Module, leaves: Sequence[Any], kwargs: Mapping[str, Any], own: Sequence[Any]
    ) -> None:
        """Judge the inputs of a call.

        Args:
            step: the step.
            module: the transformer.
            leaves: its flattened arguments.
            kwargs: its keyword arguments.
            own: leaves that the step has so far: its latents, and outputs of its earlier calls.
        """
        checks.check_inference_tensors(self.name, step, leaves)
        checks.check_arguments(self.name, step, leaves)
        checks.check_lora_scale(self.name, module, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        what = f"the transformer's inputs at step {step}"
        checks.check_unmarked(self.name, what, tensors)
        checks.check_roots(self.name, what, tensors, self.allows(own), self.verdicts)
        place = len(self._inputs)
        before = self._previous_inputs[place] if place < len(self._previous_inputs) else []
        if len(before) == len(leaves):
            for index, (leaf, seen) in enumerate(zip(leaves, before, strict=True)):
                if seen is not None and isinstance(leaf, torch.Tensor) and not leaf.requires_grad:
                    earlier, version = seen
                    checks.check_drift(
                        self.name, step, index, leaf, (earlier, earlier._version != version), self.verdicts
                    )
        # What carries a graph is explained by it, and is not kept.
        self._inputs.append(
            [
                (leaf, leaf._version) if isinstance(leaf, torch.Tensor) and not leaf.requires_grad else None
                for leaf in leaves
            ]
        )

    @contextmanager
    def computing(
        self, step: int, module: torch.nn.Module, place: int, spec: TreeSpec, is_active: bool
    ) -> Iterator[list[Kind]]:
        """Watch a call. When the block closes, the list that it was given has the call's kind, for active steps.

        States and parts are looked at where they matter: at the first call of a kind, and at active steps.
        """
        result: list[Kind] = []
        kind = next((known for known in self._kinds if known.is_like(module, place, spec)), None)
        if kind is not None and not is_active:
            yield result
            return
        state, random = ModelState.of(module), random_states(module)
        alike = [known for known in self._kinds if known.is_like(module, place, spec)]
        kind = next((known for known in alike if known.state.parts == state.parts), None)
        if kind is None:
            with parts_that_run(module) as ran:
                yield result
            kind = Kind(module, place, spec, state, frozenset(ran))
            self._kinds.append(kind)
        else:
            yield result
        checks.check_random(self.name, step, module, random, random_states(module))
        result.append(Kind(module, place, spec, state, kind.parts))

    # The scheduler's steps.

    def step_made(
        self,
        step: int,
        plan: Plan,
        scheduler: Any,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        outputs: Sequence[torch.Tensor],
        latents: torch.Tensor | None,
    ) -> None:
        """Judge a step that was computed.

        Args:
            step: the step.
            plan: of the rollout.
            scheduler: that made it.
            tensors: latents before, velocity, latents after.
            outputs: leaves of the step's transformer calls.
            latents: leaf of the step, `None` for the first.
        """
        velocity = tensors[1]
        own = outputs if latents is None else [*outputs, latents]
        checks.check_euler(self.name, scheduler, step, plan.length(step), tensors, self.verdicts)
        checks.check_unmarked(self.name, f"the velocities of step {step}", [velocity])
        checks.check_connected(self.name, step, velocity, outputs)
        checks.check_roots(self.name, f"the velocities of step {step}", [velocity], self.allows(own), self.verdicts)

    def step_ends(self) -> None:
        """The inputs of this step become those of the step before."""
        self._previous_inputs, self._inputs = self._inputs, []

    def settle(self) -> None:
        """The last step that is needed was made: read the verdicts, before anything is decoded."""
        self._inputs, self._previous_inputs, self._kinds = [], [], []
        self.verdicts.read()

    def returned(self, returned: Any, endpoint: torch.Tensor) -> None:
        """Judge what the pipeline returned: its graph may end in the endpoint only."""
        tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        checks.check_returned(self.name, tensors, self.uses.has_left_torch)
        checks.check_unmarked(self.name, "the images", tensors)
        checks.check_roots(self.name, "the images", tensors, self.allows([endpoint]), self.verdicts)
        self.verdicts.read()
