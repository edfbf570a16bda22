# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The accounting of a rollout: told of its events, it asks `checks` and remembers what they need of earlier steps."""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from . import checks
from .caches import Caches, is_cache
from .graph import leaves_of
from .marks import Draws, TrainedUses
from .plan import Plan
from .state import (
    Kind,
    ModelState,
    is_compiled,
    is_sharded,
    parameters_of,
    parts_that_run,
    random_states,
    trained_parameters,
)
from .trajectory import Call

# What the first calls of each kind computed with, for every transformer; later rollouts compare with it too. A model
# whose hooks are others at every rollout would add kinds without end.
_kinds: "weakref.WeakKeyDictionary[torch.nn.Module, deque[Kind]]" = weakref.WeakKeyDictionary()
MOST_KINDS = 16


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

    def compute(
        self, step: int, module: torch.nn.Module, spec: TreeSpec, is_active: bool, call: Callable[[], Any]
    ) -> tuple[Any, ModelState | None, Kind | None]:
        """Make a call without gradients.

        Returns:
            What it returned; and for active steps the state in which it was made, and its kind.
        """
        place = len(self._inputs) - 1
        kinds = _kinds.setdefault(module, deque(maxlen=MOST_KINDS))
        alike = [kind for kind in kinds if kind.place == place and kind.spec == spec]
        if alike and not is_active:
            with torch.no_grad():
                return call(), None, None
        state = ModelState.of(module)
        checks.check_hooks(self.name, step, module, state.placed.hooks)
        trained = frozenset(map(id, trained_parameters(module)))
        kind = next((kind for kind in alike if kind.structure == state.structure and kind.trained == trained), None)
        if kind is None:
            returned, reached, parts = self._first_of_its_kind(step, module, call)
            kind = Kind(place, spec, state.structure, trained, reached, parts)
            kinds.append(kind)
        else:
            with torch.no_grad():
                returned = call()
        checks.check_random(self.name, step, module, state.random, random_states(module))
        if step == 0:
            # What the first call sets up once (a table of positions, say) belongs to its state.
            state = replace(state, values=ModelState.of(module).values)
        return returned, state, kind

    def call_made(self, step: int, call: Call | None, leaves: Sequence[Any], returned: Any) -> None:
        """Note the text caches that a call filled, see `Caches.call_made`; `call` is `None` if it fills none."""
        if tensors := self.caches.call_made(step, call, leaves, returned):
            self.uses.note(tensors, "what a text cache holds")

    def _first_of_its_kind(
        self, step: int, module: torch.nn.Module, call: Callable[[], Any]
    ) -> tuple[Any, frozenset[int] | None, frozenset[int]]:
        """Make a call and find out what it computes with; -> what it returned, parameters reached, parts that ran."""
        draws = nullcontext() if is_compiled(module) else Draws()
        with draws, parts_that_run(module) as ran:
            if is_sharded(module) or not trained_parameters(module):
                with torch.no_grad():
                    returned, reached = call(), None
            else:
                # A graph without the tensors that backward would need: it costs no memory, and shows its leaves.
                with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: None):
                    returned = call()
                tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
                trained = set(map(id, trained_parameters(module)))
                reached = frozenset(id(leaf) for leaf in leaves_of(tensors) if id(leaf) in trained)
                returned = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, returned)
        if isinstance(draws, Draws):
            checks.check_draws(self.name, step, module, draws.found)
        return returned, reached, frozenset(ran)

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
        self._inputs, self._previous_inputs = [], []
        self.verdicts.read()

    def returned(self, returned: Any, endpoint: torch.Tensor) -> None:
        """Judge what the pipeline returned: its graph may end in the endpoint only."""
        tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        checks.check_returned(self.name, tensors, self.uses.has_left_torch)
        checks.check_unmarked(self.name, "the images", tensors)
        checks.check_roots(self.name, "the images", tensors, self.allows([endpoint]), self.verdicts)
        self.verdicts.read()
