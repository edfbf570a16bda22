# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Samples of a transformer call: choosing them, and putting gradients of them back in their places."""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .caches import KeptCache
from .trajectory import Call

# Slices of a call's samples; `None` for all of them, an empty tuple for none.
Samples = tuple[slice, ...] | None


def take(tensor: torch.Tensor, samples: Samples) -> torch.Tensor:
    """These samples of a tensor `(B, ...)`."""
    if samples is None:
        return tensor
    return tensor[samples[0]] if len(samples) == 1 else torch.cat([tensor[part] for part in samples])


def put_back(gradient: torch.Tensor, whole: torch.Tensor, samples: Samples) -> torch.Tensor:
    """The gradient of `whole` from that of its samples, 0 for the others. One that is whole already is returned."""
    if samples is None or len(gradient) == len(whole):
        return gradient
    result = torch.zeros_like(whole, dtype=gradient.dtype)
    start = 0
    for part in samples:
        size = part.stop - part.start
        result[part] = gradient[start : start + size]
        start += size
    return result


def masked(tensor: torch.Tensor, samples: Samples) -> torch.Tensor:
    """The tensor `(B, ...)` with 0 in place of all other samples."""
    if samples is None:
        return tensor
    result = torch.zeros_like(tensor)
    for part in samples:
        result[part] = tensor[part]
    return result


def numbers(samples: tuple[slice, ...]) -> list[int]:
    """The samples one by one."""
    return [number for part in samples for number in range(part.start, part.stop)]


def has_samples(tensor: torch.Tensor, call: Call) -> bool:
    """Whether the samples of a call stand along the first dimension of a tensor."""
    return tensor.ndim > 0 and len(tensor) == call.size


def recorded_outputs(call: Call, samples: Samples) -> list[tuple[torch.Tensor, Samples]]:
    """The recorded outputs that hold these samples, each with what to take of it."""
    if call.is_list and samples is not None:
        return [(call.outputs[number], None) for number in numbers(samples)]
    # A number for the whole batch, such as a load-balancing loss, is taken as it is.
    return [(output, samples if has_samples(output, call) else None) for output in call.outputs]


def chosen_arguments(call: Call, samples: Samples) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, torch.Tensor]]:
    """A call's arguments for these samples.

    Returns:
        `args`, `kwargs`, and `{index in call.leaves: leaf}` of the inputs that require a gradient.
    """
    inputs: dict[int, torch.Tensor] = {}
    lists = _entries_of_lists(call)
    chosen = list(call.leaves)
    for index, leaf in enumerate(chosen):
        if isinstance(leaf, KeptCache):
            chosen[index] = leaf.again()
        if not isinstance(leaf, torch.Tensor):
            continue
        if index not in lists and has_samples(leaf, call):
            leaf = take(leaf, samples)
        if index in call.attached:
            inputs[index] = leaf.detach().requires_grad_()
            # A copy, because a transformer may write into its inputs.
            chosen[index] = inputs[index].clone()
        else:
            # Another object each time, so that nothing is taken for what an earlier replay was given.
            chosen[index] = leaf.detach()
    args, kwargs = tree_unflatten(chosen, call.spec)
    if lists and samples is not None:
        args = tuple(_choose(value, call, samples) for value in args)
        kwargs = {name: _choose(value, call, samples) for name, value in kwargs.items()}
    return args, kwargs, inputs


def _choose(value: Any, call: Call, samples: tuple[slice, ...]) -> Any:
    return [value[number] for number in numbers(samples)] if _is_list_of_samples(value, call) else value


def _is_list_of_samples(value: Any, call: Call) -> bool:
    """Whether an argument of a call with a list of outputs is a list with an entry for each sample."""
    return call.is_list and isinstance(value, list | tuple) and len(value) == call.size


def _entries_of_lists(call: Call) -> set[int]:
    """Indices in `call.leaves` of the entries of its lists of samples."""
    args, kwargs = tree_unflatten(list(range(len(call.leaves))), call.spec)
    lists = [value for value in (*args, *kwargs.values()) if _is_list_of_samples(value, call)]
    return {index for value in lists for index in tree_flatten(value)[0]}


def floating_outputs(result: Any) -> list[torch.Tensor]:
    """The floating point tensors of what a transformer returned."""
    return [
        value for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
