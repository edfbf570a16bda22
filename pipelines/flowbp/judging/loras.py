# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""LoRAs side by side in one pipeline, and the scores of what it makes."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ..columns import Columns
from ..host import float64_on_host
from ..inference import BaseForLast, lora_models
from ..rewards import WeightedReward
from ..rewards.loading import brief
from ..videos import score_samples
from .images import are_finite, check_range
from .lora_files import download_lora, is_of_peft, read_lora
from .models import EvaluatedModel


def load_loras(
    pipe: DiffusionPipeline, models: Sequence[EvaluatedModel], component: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Load the LoRAs of all models.

    Args:
        pipe: of the base model.
        models: to evaluate.
        component: name of the transformer that the LoRAs are for.

    Returns:
        Adapter names by source, and a remark on each source of which only some layers fit the pipeline.

    Raises:
        ValueError: for a LoRA that does not fit.
    """
    names: dict[str, str] = {}
    remarks: dict[str, str] = {}
    for source in dict.fromkeys(model.lora for model in models if model.lora is not None):
        names[source] = name = f"lora_{len(names)}"
        # A LoRA of the Hub is in its cache; offline, diffusers finds it there only with the name of its file.
        file = download_lora(source)
        try:
            # Pipelines without a LoRA loader have the LoRA in the transformer itself.
            if hasattr(pipe, "load_lora_weights") and component == "transformer" and not _is_of_peft(file):
                pipe.load_lora_weights(file.parent, weight_name=file.name, use_safetensors=True, adapter_name=name)
            else:
                tensors, settings = read_lora(file)
                getattr(pipe, component).load_lora_adapter(tensors, metadata=settings or None, adapter_name=name)
        except Exception as error:  # diffusers and peft raise a dozen unrelated types
            raise ValueError(f"--lora {source}: does not fit {type(pipe).__name__}: {_misfit(error)}.") from error
        # LoRAs of other models are skipped with a warning by diffusers.
        if not any(name in part.peft_config for part in lora_models(pipe)):
            raise ValueError(f"--lora {source}: has no layer of this {type(pipe).__name__}'s transformer.")
        fitting, total = _count_layers(pipe, name), _layers_of(file)
        if fitting < total:
            remarks[source] = f"only {fitting} of its {total} layers fit {type(pipe).__name__}"
    for part in lora_models(pipe):
        # New layers are in training mode, where a LoRA's dropout would change the images at random.
        part.eval()
    return names, remarks


def _count_layers(pipe: DiffusionPipeline, adapter: str) -> int:
    """Layers of a pipeline, its text encoders included, that an adapter was loaded into."""
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(f".lora_A.{adapter}." in f".{name}" for part in models for name, _ in part.named_parameters())


def _is_of_peft(file: Path) -> bool:
    with safe_open(file, framework="pt") as tensors:
        return is_of_peft(file, tensors.keys())


def _layers_of(file: Path) -> int:
    """Layers of a LoRA's file, in the names of peft, of kohya's scripts or of diffusers before peft."""
    with safe_open(file, framework="pt") as tensors:
        return sum(bool(re.search(r"\.lora_A\.|\.lora_down\.|[._]lora\.down\.", name)) for name in tensors.keys())


def _misfit(error: Exception) -> str:
    """Why a LoRA cannot be loaded. torch's message has a line for each tensor of another shape."""
    shape = r"torch\.Size\((\[[\d, ]*\])\)"
    wrong = re.findall(rf"size mismatch for (\S+): .*?{shape}.*?{shape}", str(error))
    if not wrong:
        return brief(error)
    name, found, expected = wrong[0]
    return f"{len(wrong)} of its tensors have another shape, first {name} with {found}, expected {expected}"


def use_model(
    pipe: DiffusionPipeline, model: EvaluatedModel, adapters: Mapping[str, str], steps: int
) -> BaseForLast | None:
    """Switch the pipeline to a model.

    Returns:
        The `callback_on_step_end` that its calls need, if any.
    """
    if not adapters:
        return None
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
    reward: torch.nn.Module, names: Sequence[str], images: torch.Tensor, prompts: Sequence[str], columns: Columns
) -> dict[str, list[float]]:
    """B scores by reward; NaN for images that are not finite and for those to which the reward gives no finite score.

    The tables leave such images out and count them.

    Args:
        reward: of `load_reward`, for these names.
        names: of the rewards.
        images: `(B, 3, H, W)`, or `(B, F, 3, H, W)` of videos, in [0, 1].
        prompts: B of them.
        columns: name -> B values; each reward gets those that it has a place for.

    Raises:
        ValueError: for finite images that are not in [0, 1].
    """
    found = {name: [math.nan] * len(images) for name in names}
    # Rewards raise an error for images that are not finite; one model must not stop the evaluation of all.
    places = are_finite(images).nonzero().flatten().tolist()
    if not places:
        return found
    of_places = {name: [values[place] for place in places] for name, values in columns.items()}
    finite, texts = images[places], [prompts[place] for place in places]
    check_range(finite)
    # Of several rewards load_reward makes a sum whose parts can be had alone.
    is_sum = isinstance(reward, WeightedReward) and list(reward.weights) == list(names)
    if is_sum:
        parts = reward.parts(finite, texts, **of_places)
    else:
        parts = {names[0]: score_samples(reward, finite, texts, of_places)}
    for name, values in parts.items():
        # NaN is a judge's answer without a score, and an infinite score is none either.
        values = float64_on_host(values)
        values = values.masked_fill(~values.isfinite(), math.nan)
        for place, score in zip(places, values.tolist(), strict=True):
            found[name][place] = score
    return found
