# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a pipeline tells of itself: its models, its guidance scales, how it is called and whose code is running."""

import inspect
import sys
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline


def is_velocity_model(component: str) -> bool:
    """Whether a pipeline's component of this name computes velocities: a transformer, in few pipelines a UNet."""
    return "transformer" in component or component == "unet"


def calling_pipeline() -> Any:
    """The pipeline whose code is running, found on the stack; `None` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self":
            variables = frame.f_locals
            owner = variables["self"] if "self" in variables else None
            if isinstance(variables, dict):
                # Before Python 3.13 this is a copy that the frame keeps, and with it tensors of earlier steps.
                variables.clear()
            if isinstance(owner, DiffusionPipeline | ModularPipeline):
                return owner
        frame = frame.f_back
    return None


def guidance_scales(pipe: Any) -> dict[str, float]:
    """The guidance scales of a pipeline and its guider at this moment, by the names of their attributes."""
    found = {}
    for owner in (pipe, getattr(pipe, "guider", None)):
        for name in ("guidance_scale", "true_cfg_scale", "_guidance_scale", "_true_cfg_scale"):
            value = getattr(owner, name, None) if owner is not None else None
            if isinstance(value, int | float | np.number | np.ndarray | torch.Tensor):
                found[name.removeprefix("_")] = float(torch.as_tensor(value).min())
    return found


def begin_index(pipe: Any, scheduler: Any) -> int:
    """The scheduler's step from which the pipeline samples: above 0 for images that start from images.

    Schedulers that were not told find it by the first timestep, which pipelines note as their current one.
    """
    first = getattr(scheduler, "begin_index", None)
    timestep = getattr(pipe, "_current_timestep", None)
    if first is None and isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
        first = next(iter((scheduler.timesteps == timestep).nonzero().flatten().tolist()), None)
    return first or 0


def keyword_arguments(call: inspect.BoundArguments) -> list[dict[str, Any]]:
    """What a call collects in its `**kwargs`."""
    parameters = call.signature.parameters
    return [value for name, value in call.arguments.items() if parameters[name].kind is inspect.Parameter.VAR_KEYWORD]
