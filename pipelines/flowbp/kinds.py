# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the first transformer call of each kind computes with; a replay that computes with less is refused.

See `checks.check_reach`, which compares them.
"""

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only

from . import checks
from .graph import leaves_of
from .marks import Draws
from .state import CallKind, ModelState, is_compiled, is_sharded, parts_that_run, random_states, trained_parameters

logger = logging.get_logger(__name__)

# By transformer; later rollouts compare with them too. A model whose hooks are others at every rollout would add kinds
# without end.
_kinds: "weakref.WeakKeyDictionary[torch.nn.Module, deque[CallKind]]" = weakref.WeakKeyDictionary()
MOST_KINDS = 16


def compute(
    name: str,
    step: int,
    module: torch.nn.Module,
    place: tuple[int, TreeSpec, tuple[Any, ...]],
    is_active: bool,
    call: Callable[[], Any],
) -> tuple[Any, ModelState | None, CallKind | None]:
    """Make a call without gradients.

    Args:
        name: the pipeline's class, for messages.
        step: of the call.
        module: the transformer.
        place: how many calls come before in the step, the structure of the arguments, and their `values.layout`.
        is_active: whether the call may be replayed.
        call: makes it.

    Returns:
        What it returned; and for active steps the state in which it was made, and its kind.
    """
    known = _kinds.setdefault(module, deque(maxlen=MOST_KINDS))
    alike = [kind for kind in known if (kind.place, kind.spec, kind.layout) == place]
    if alike and not is_active:
        with torch.no_grad():
            return call(), None, None
    state = ModelState.of(module)
    checks.check_hooks(name, step, module, state.placed.hooks)
    trained = frozenset(map(id, trained_parameters(module)))
    kind = next((kind for kind in alike if kind.structure == state.structure and kind.trained == trained), None)
    if kind is None:
        returned, reached, parts = first_of_its_kind(name, step, module, call)
        if place[0] == 0 and reached is not None and all(each.trained != trained for each in known):
            _tell_what_is_unreached(name, module, trained - reached)
        kind = CallKind(*place, state.structure, trained, reached, parts)
        known.append(kind)
    else:
        with torch.no_grad():
            returned = call()
    checks.check_random(name, step, module, state.random, random_states(module))
    if step == 0:
        # What the first call sets up once (a table of positions, say) belongs to its state.
        state = replace(state, values=ModelState.of(module).values)
    return returned, state, kind


def _tell_what_is_unreached(name: str, module: torch.nn.Module, unreached: frozenset[int]) -> None:
    """Autograd finds no gradient for them either, so this is no error."""
    found = [path for path, parameter in module.named_parameters() if id(parameter) in unreached]
    if found:
        logger.warning(
            f"{name}: {len(found)} trained parameters of {type(module).__name__}, such as {found[0]}, get no gradient "
            "because autograd does not lead from its outputs to them: it may not use what they compute, or compute "
            "with a kernel without a backward pass (attention backends such as sage)."
        )


def first_of_its_kind(
    name: str, step: int, module: torch.nn.Module, call: Callable[[], Any]
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
            returned = tree_map_only(torch.Tensor, torch.Tensor.detach, returned)
    if isinstance(draws, Draws):
        checks.check_draws(name, step, module, draws.found)
    return returned, reached, frozenset(ran)
