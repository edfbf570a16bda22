# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""LoRAs side by side in one pipeline, and the scores of what it makes."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ..inference import BaseForLast, lora_models
from ..rewards import WeightedReward
from .images import frames
from .models import EvaluatedModel, lora_file


def load_loras(pipe: DiffusionPipeline, models: Sequence[EvaluatedModel], component: str) -> dict[str, str]:
    """Load the LoRAs of all models; returns adapter names by source.

    Args:
        pipe: of the base model.
        models: to evaluate.
        component: name of the transformer that the LoRAs are for.

    Raises:
        ValueError: for a LoRA that does not fit.
    """
    names: dict[str, str] = {}
    for source in dict.fromkeys(model.lora for model in models if model.lora is not None):
        names[source] = name = f"lora_{len(names)}"
        file = lora_file(source)
        given = {"weight_name": file.name} if file is not None else {}
        where = file.parent if file is not None else source
        try:
            # As train_flowbp.py saves them: pipelines without a LoRA loader have the LoRA in the transformer itself.
            if hasattr(pipe, "load_lora_weights") and component == "transformer":
                pipe.load_lora_weights(where, adapter_name=name, use_safetensors=True, **given)
            else:
                part = getattr(pipe, component)
                part.load_lora_adapter(where, adapter_name=name, prefix=None, use_safetensors=True, **given)
        except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"--lora {source}: does not fit {type(pipe).__name__}: {error}") from error
        # LoRAs of other models are skipped with a warning by diffusers.
        if not any(name in part.peft_config for part in lora_models(pipe)):
            raise ValueError(f"--lora {source}: has no layer of this {type(pipe).__name__}'s transformer.")
    return names


def use_model(
    pipe: DiffusionPipeline, model: EvaluatedModel, adapters: Mapping[str, str], steps: int
) -> BaseForLast | None:
    """Switch the pipeline to a model.

    Args:
        pipe: with the LoRAs of `load_loras`.
        model: to switch to.
        adapters: of `load_loras`.
        steps: of a rollout.

    Returns:
        The `callback_on_step_end` that its calls need, if any.
    """
    # Loaders of pipelines know LoRAs of text encoders too.
    parts = [pipe] if hasattr(pipe, "set_adapters") else lora_models(pipe)
    for part in parts:
        if model.lora is None or model.base_for_last >= steps:
            part.disable_lora()
        else:
            part.enable_lora()
            part.set_adapters(adapters[model.lora], model.scale)
    return BaseForLast(model.base_for_last) if 0 < model.base_for_last < steps else None


def scores_by_reward(
    reward: torch.nn.Module, names: Sequence[str], images: torch.Tensor, prompts: Sequence[str]
) -> dict[str, list[float]]:
    """B scores by reward.

    Args:
        reward: of `load_reward`, for these names.
        names: of the rewards.
        images: `(B, 3, H, W)`, or `(B, F, 3, H, W)` of videos, whose frames' mean counts, in [0, 1].
        prompts: B of them.

    Raises:
        ValueError: for images that are not in [0, 1], and for scores that are infinite or of another shape.
    """
    if bool(images.isnan().any()):
        raise ValueError("Expected images in [0, 1], the pipeline made NaN; try another --mixed_precision.")
    each, texts = frames(images, prompts)
    # Of several rewards load_reward makes a sum whose parts can be had alone.
    is_sum = isinstance(reward, WeightedReward) and list(reward.weights) == list(names)
    parts = reward.parts(each, texts) if is_sum else {names[0]: reward(each, texts)}
    found = {}
    for name, values in parts.items():
        # NaN is a judge's answer without a score; the tables leave such images out and count them.
        if values.shape != (len(each),) or bool(values.isinf().any()):
            raise ValueError(
                f"reward {name}: expected {len(each)} finite scores, got {tuple(values.shape)}: {values.tolist()}."
            )
        found[name] = values.double().unflatten(0, (len(images), -1)).nanmean(1).tolist()
    return found
