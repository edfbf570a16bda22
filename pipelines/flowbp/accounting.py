# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The accounting of a rollout: told of its events, it asks `checks` and remembers what they need of earlier steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from . import checks
from .caches import Caches, is_cache
from .marks import TrainedUses
from .plan import Plan
from .state import parameters_of
from .trajectory import Call


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
        self.caches = Caches(name)
        # A mask of what no step has moved, where steps have a length for each token.
        self.given: torch.Tensor | None = None
        trained = {id(parameter) for module in transformers for parameter in parameters_of(module)}
        # Those of a VAE at PyTorch's default, for example, whose gradient nobody wants.
        self._ignored = {id(parameter) for module in others.values() for parameter in parameters_of(module)} - trained
        # Of each call of this step and of the one before: inputs without a graph, with their versions.
        self._inputs: list[list[Any]] = []
        self._previous_inputs: list[list[Any]] = []

    def allows(self, own: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
        """Which leaves a graph may end in: `own`, and parameters that are not trained."""
        known = set(map(id, own))
        return lambda leaf: id(leaf) in known or id(leaf) in self._ignored

    # A transformer's call.

    def call_begins(
        self, step: int, module: torch.nn.Module, leaves: Sequence[Any], kwargs: Mapping[str, Any], own: Sequence[Any]
    ) -> int:
        """Judge the inputs of a call; -> how many calls came before it in the step.

        Args:
            leaves: its flattened arguments, of which `kwargs` are some.
            own: leaves that the step has so far: its latents, and outputs of its earlier calls.
        """
        checks.check_inference_tensors(self.name, step, leaves)
        self.caches.call_begins(step, module, leaves, kwargs)
        checks.check_arguments(self.name, step, [leaf for leaf in leaves if not is_cache(leaf)])
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
        return place

    def call_made(self, step: int, call: Call | None, leaves: Sequence[Any], returned: Any) -> None:
        """Note the text caches that a call filled, see `Caches.call_made`; `call` is `None` if it fills none."""
        if tensors := self.caches.call_made(step, call, leaves, returned):
            self.uses.note(tensors, "what a text cache holds")

    # The scheduler's steps.

    def handed_on(
        self,
        step: int,
        tensors: tuple[torch.Tensor, torch.Tensor],
        is_untouched: bool,
        outputs: Sequence[torch.Tensor],
        sampled: torch.Tensor | None,
    ) -> torch.Tensor:
        """Judge what the pipeline made of the latents between two steps.

        Args:
            step: the second one.
            tensors: latents that the scheduler was given, and the leaf that it returned before.
            is_untouched: whether these are one tensor that nobody has written into or hooked: nothing is compared.
            outputs: of the step's transformer calls.
            sampled: mask of the places that were handed on between earlier steps, `None` for none.

        Returns:
            That mask.
        """
        sample, leaf = tensors
        passed = torch.ones((), dtype=torch.bool, device=leaf.device)
        if not is_untouched:
            what = f"the latents given to step {step}"
            dtypes = [output.dtype for output in outputs]
            passed = checks.check_handed_on(self.name, step, sample, leaf, sampled is None, dtypes, self.verdicts)
            checks.check_unmarked(self.name, what, [sample])
            checks.check_roots(self.name, what, [sample], self.allows([leaf]), self.verdicts)
        checks.check_same_places(self.name, step, passed, sampled, self.verdicts)
        return passed if sampled is None else sampled

    def signed(
        self, step: int, plan: Plan, scheduler: Any, velocity: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The velocity times 0, 1 or -1, as each of its elements makes a step of this length."""
        if not plan.skips(step):
            # Here, as marks are not passed on to the product.
            checks.check_unmarked(self.name, f"the velocities of step {step}", [velocity])
        signs = (lengths / plan.length(step)).round().clamp(-1, 1)
        checks.check_lengths(self.name, scheduler, step, plan.length(step), lengths, signs, self.verdicts)
        self.given = (signs == 0) if self.given is None else (signs == 0) & self.given
        return velocity * signs

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
        self._inputs, self._previous_inputs = [], []
        self.verdicts.read()

    def returned(self, returned: Any, endpoint: torch.Tensor) -> None:
        """Judge what the pipeline returned: its graph may end in the endpoint only."""
        tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        checks.check_returned(self.name, tensors, self.uses.has_left_torch)
        checks.check_unmarked(self.name, "the images", tensors)
        checks.check_roots(self.name, "the images", tensors, self.allows([endpoint]), self.verdicts)
        self.verdicts.read()
