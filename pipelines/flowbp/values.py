# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Comparisons of values that stay on the device, and what counts as state."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_PLAIN_ARGUMENTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def agree(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Whether two tensors of one shape have the same values wherever both are finite: a scalar flag."""
    return ((left == right) | ~left.isfinite() | ~right.isfinite()).all()


def takes_two_values(tensor: torch.Tensor) -> torch.Tensor:
    """Whether a tensor holds one number, or two (the second one marks tokens that are given): a scalar flag."""
    return ((tensor == tensor.amin()) | (tensor == tensor.amax())).all()


def holds_state(value: Any) -> bool:
    """Whether an argument may keep tensors from call to call. An empty cache object does not."""
    if isinstance(value, (torch.Tensor, *_PLAIN_ARGUMENTS)):
        return False
    pending, seen = [value], set()
    while pending:
        part = pending.pop()
        if isinstance(part, _PLAIN_ARGUMENTS) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping):
            pending += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            pending += part
        elif callable(part) or isinstance(part, torch.Tensor) or not hasattr(part, "__dict__"):
            return True
        else:
            pending += vars(part).values()
    return False


def layout(args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What chooses the parts of a model that compute: flags, words, lists of numbers, and which arguments there are.

    Other numbers may be timesteps.

    Args:
        args, kwargs: of a call.
        leaves: the same, flattened.
    """
    chosen = [leaf if isinstance(leaf, bool | str | None) else type(leaf) for leaf in leaves]
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list | tuple)]
    return (*chosen, *(tuple(each) for each in lists if all(isinstance(number, int) for number in each)))


def is_list_of_samples(result: Any, outputs: list[torch.Tensor]) -> bool:
    """Whether a transformer returned `(list of tensors, ...)`, one for each sample."""
    values = list(result.values()) if isinstance(result, dict) else result
    first = values[0] if isinstance(values, list | tuple) and values else None
    return isinstance(first, list | tuple) and len(first) == len(outputs)
