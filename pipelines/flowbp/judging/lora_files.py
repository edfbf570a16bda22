# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of a LoRA's file before diffusers and peft build what its metadata and the names of its tensors say."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

# peft takes names of layers for regular expressions. Matching those of an unknown author may take for ever.
_LAYER = re.compile(r"\^?[\w.-]+")
# Settings that change nothing about an evaluation.
_FREE = "auto_mapping base_model_name_or_path inference_mode lora_dropout peft_version revision task_type".split()


def check_lora_file(source: str, file: Path) -> None:
    """Check that a file is a plain LoRA with finite values.

    Args:
        source: as the user named it.
        file: of the LoRA.

    Raises:
        ValueError: in one line, for a file that is no safetensors file or has NaN or infinite values, for names of
            layers that are regular expressions, and for settings in its metadata that no plain LoRA has.
    """
    width, has_magnitudes, wrong = 0, False, None
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                values = tensors.get_tensor(name)
                width = max(width, *values.shape, 0)
                has_magnitudes |= "lora_magnitude_vector" in name
                if not _LAYER.fullmatch(name):
                    wrong = f"a tensor named {name!r:.100}"
                elif not torch.isfinite(values.float()).all():
                    wrong = f"NaN or infinity in {name}"
            settings = json.loads((tensors.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY) or "{}")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--lora {source}: expected a LoRA in a safetensors file, got {error}; use another."
        ) from error
    if not isinstance(settings, dict):
        wrong = "metadata that is no object"
    else:
        for name, value in settings.items():
            if not _is_plain(name.rpartition(".")[2], value, width, has_magnitudes):
                wrong = f"{name!r:.100}: {value!r:.100} in its metadata"
    if wrong:
        raise ValueError(f"--lora {source}: expected a plain LoRA with finite values, got {wrong}; use another file.")


def _is_plain(name: str, value: Any, width: int, has_magnitudes: bool) -> bool:
    """Whether a setting of peft's LoraConfig is one of a plain LoRA.

    Args:
        name: of the setting.
        value: as JSON has it.
        width: the largest dimension of the LoRA's tensors, which no rank exceeds.
        has_magnitudes: whether its tensors are those of DoRA.
    """
    if name == "r":
        return type(value) is int and 0 < value <= width
    if name == "lora_alpha":
        return type(value) in (int, float) and math.isfinite(value)
    if name in ("rank_pattern", "alpha_pattern"):
        kind = "r" if name == "rank_pattern" else "lora_alpha"
        return isinstance(value, dict) and all(
            _LAYER.fullmatch(layer) and _is_plain(kind, each, width, has_magnitudes) for layer, each in value.items()
        )
    if name in ("target_modules", "exclude_modules") and value is not None:
        return isinstance(value, list) and all(isinstance(each, str) and _LAYER.fullmatch(each) for each in value)
    if name == "use_dora":
        return value is has_magnitudes
    if name in ("use_rslora", "lora_bias"):
        return isinstance(value, bool)
    if name == "init_lora_weights":
        # Others (PiSSA, OLoRA, ...) change the base model.
        return value is True or value is False or value == "gaussian"
    return name in _FREE or value == LoraConfig().to_dict().get(name)
