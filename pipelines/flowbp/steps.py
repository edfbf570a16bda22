# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Step callbacks, and calls of `scheduler.step`, also those in which each token's step has a length of its own.

LTX gives the scheduler a timestep for each token. Tokens that are given, such as those of a first frame, are not
moved, and the scheduler gets the negative of the velocity. Such a step is an Euler step of `signs * velocity`, with
signs of 0, 1 and -1. Autograd through `scheduler.step` says what they are; another length is refused
(`checks.check_lengths`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch.utils._pytree import tree_map_only


def made(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make a step without gradients.

    Args:
        step, args, kwargs: the scheduler's method and its arguments.

    Returns:
        The next latents; and where tokens have timesteps of their own, each element's step length.
    """
    # Copies, because a scheduler may write into what it is given.
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
    if kwargs.get("per_token_timesteps") is None:
        with torch.no_grad():
            return _following(step(*args, **kwargs)), None
    velocity = (args[0] if args else kwargs["model_output"]).requires_grad_()
    with torch.enable_grad():
        following = _following(step(*args, **kwargs))
    (lengths,) = torch.autograd.grad(following, velocity, torch.ones_like(following))
    return following.detach(), lengths


def _following(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


def returned(sample: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """What `scheduler.step` returns for these latents, as its arguments ask for it."""
    is_tuple = arguments.get("return_dict", True) is False
    return (sample,) if is_tuple else FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample)


def wrap_callback(arguments: dict[str, Any], outside: Callable[..., Any]) -> None:
    """Let the user's step callback, if it is among a pipeline's arguments, be called by `outside(callback, ...)`."""
    callback = arguments.get("callback_on_step_end")
    if callback is None:
        return
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        # Pipelines read this of their own callback classes, which the wrapper hides.
        arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    arguments["callback_on_step_end"] = functools.partial(outside, callback)
