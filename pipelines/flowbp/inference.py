# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A pipeline at inference: `BaseForLast` for its users, and the checks of what a script loads and calls it with."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin

from .introspection import is_velocity_model

# What scripts give a pipeline themselves.
OWN_ARGUMENTS = "prompt generator output_type return_dict callback_on_step_end".split()
OWN_ARGUMENTS += ["num_images_per_prompt", "num_videos_per_prompt"]


class BaseForLast:
    """`callback_on_step_end` that runs the last steps of a call with the base model, and the others with the LoRA.

    Early steps lay a picture out, the last ones draw its texture. A LoRA that was trained for long against one reward
    may paint texture which that reward likes and people do not; this keeps its layout and the base model's texture.

        pipe.load_lora_weights("my-lora")
        pipe(prompt, num_inference_steps=25, callback_on_step_end=BaseForLast(5)).images

    The LoRA is switched off when `steps` steps are left and on again after the last one. A call that is stopped in
    between (an exception, `pipe._interrupt`) leaves it off: call `pipe.enable_lora()`. The LoRA must not be fused.

    Args:
        steps: how many of the last steps; 0 changes nothing. A callback hears of a step when it is over, so it cannot
            leave *all* steps to the base model: that is `pipe.disable_lora()`.

    Raises:
        ValueError: `steps` is negative; in the call: the pipeline has no LoRA, or no more than `steps` steps.
    """

    # Pipelines read this of callbacks that are objects of their own class; it names tensors that the callback wants.
    tensor_inputs: list[str] = []

    def __init__(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"BaseForLast: expected 0 steps or more, got {steps}.")
        self.steps = steps

    def __call__(
        self, pipe: DiffusionPipeline, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after each step."""
        models = lora_models(pipe)
        if not models:
            raise ValueError(f"BaseForLast: expected a LoRA, this {type(pipe).__name__} has none; load one first.")
        # The scheduler has counted the step that is over.
        left = len(pipe.scheduler.timesteps) - pipe.scheduler.step_index
        if step == 0 and left < self.steps:
            raise ValueError(
                f"BaseForLast: expected more than {self.steps} steps in a call, got {left + 1}; for the base model "
                "alone call pipe.disable_lora()."
            )
        if self.steps and left == self.steps:
            for model in models:
                model.disable_lora()
        elif self.steps and left == 0:
            for model in models:
                model.enable_lora()
        return {}


def lora_models(pipe: DiffusionPipeline) -> list[PeftAdapterMixin]:
    """The pipeline's models of diffusers that have a LoRA: its transformers, not its text encoders."""
    return [
        component
        for component in pipe.components.values()
        if isinstance(component, PeftAdapterMixin) and hasattr(component, "peft_config")
    ]


def saved_class(config: Mapping[str, Any], component: str) -> type[DiffusionPipeline]:
    """The class that a pipeline was saved with, if a transformer of it can have a LoRA.

    Args:
        config: the pipeline's `model_index.json`.
        component: name of that transformer.

    Raises:
        ValueError: the class is not one of diffusers, the component is none of its transformers, or PEFT cannot add
            a LoRA to it.
    """
    name = config["_class_name"]
    if not hasattr(diffusers, name):
        raise ValueError(f"{name}: not a pipeline of diffusers {diffusers.__version__}; use one of diffusers' own.")
    transformers = [part for part, spec in config.items() if is_velocity_model(part) and spec != [None, None]]
    if component not in transformers:
        raise ValueError(f"--lora_component {component}: {name} has {', '.join(transformers) or 'no transformer'}.")
    transformer = config[component][1]
    if not issubclass(getattr(diffusers, transformer, object), PeftAdapterMixin):
        raise ValueError(f"{name}: diffusers cannot add a LoRA to its {transformer}; choose another pipeline.")
    return getattr(diffusers, name)


def call_arguments(pipeline: type[DiffusionPipeline], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of every call of a pipeline but prompts and noise: those given, and tensors in a tuple as output.

    Args:
        pipeline: its class.
        given: by name; None leaves one to the pipeline.

    Raises:
        ValueError: an argument that the pipeline's call does not have, or that the script gives it itself.
    """
    known = set(inspect.signature(pipeline.__call__).parameters) - {"self", *OWN_ARGUMENTS}
    arguments = {name: value for name, value in given.items() if value is not None}
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{pipeline.__name__} takes no argument {name} here; did you mean {near[0]}?")
    return {**arguments, "output_type": "pt", "return_dict": False}


def usual_size_multiple(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int | None:
    """What heights and widths must be a multiple of, in pixels; None where the configs do not say it as usual."""
    patch = transformer.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if "block_out_channels" not in vae or not isinstance(patch, int):
        return None
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * patch
    # Twice that where latents are packed two by two.
    return 2 * multiple if transformer.get("in_channels") == 4 * vae.get("latent_channels", 0) else multiple
