# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The model of a run: checks of what is to be loaded, and quantisation."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def launched_precision() -> str:
    """The key of `WEIGHT_DTYPES` that `accelerate launch` was told.

    Raises:
        ValueError: for another one.
    """
    found = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if found not in WEIGHT_DTYPES:
        raise ValueError(f"--mixed_precision must be no, fp16 or bf16, accelerate says {found}")
    return found


def missing_components(config: Mapping[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, as the arguments `from_pretrained` wants for them."""
    return {name: None for name, spec in config.items() if spec == [None, None]}


def load_quantization_config(path: Path | None, dtype: torch.dtype) -> QuantizationConfigMixin | None:
    """A diffusers quantisation config from a JSON file, for a model's `from_pretrained`.

    Args:
        path: file with the config's arguments; `quant_method` says whose they are, bitsandbytes' where it is left out.
        dtype: what 4-bit weights of bitsandbytes are computed in where the file does not say.

    Raises:
        ValueError: for a file that cannot be read as such a config, and where its library or a GPU is missing.
    """
    if path is None:
        return None
    try:
        content = {"quant_method": "bitsandbytes", **json.loads(path.read_text(encoding="utf-8-sig"))}
        if content.get("load_in_4bit"):
            content.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
        config = DiffusersAutoQuantizer.from_dict(content)
        # diffusers takes keys that it does not know without a word.
        known = config.to_dict()
        if unknown := content.keys() - known:
            raise ValueError(f"unknown {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}")
        DiffusersAutoQuantizer.from_config(config).validate_environment(device_map=None)
    except (OSError, ValueError, TypeError, KeyError, AssertionError, ImportError, RuntimeError) as error:
        # The libraries raise all of these for a file that they cannot use.
        raise ValueError(f"--quantization_config_path {path}: {type(error).__name__}: {error}") from error
    return config


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Switch gradients and dropout off."""
    return module.requires_grad_(False).eval()
