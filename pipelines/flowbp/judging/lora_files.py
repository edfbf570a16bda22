# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Where a LoRA's file is, and checks of it before diffusers and peft build what its metadata and names say."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from ..rewards.loading import HUB_ERRORS, hub_reason

# peft takes names of layers for regular expressions. Matching those of an unknown author may take for ever.
_LAYER = re.compile(r"\^?[\w.-]+")
# In front of the names of peft's own files.
_OF_PEFT = "base_model.model."
# Settings that change nothing about an evaluation.
_FREE = "auto_mapping base_model_name_or_path inference_mode lora_dropout peft_version revision task_type".split()


def lora_file(source: str, option: str = "--lora") -> Path | None:
    """The local file of a LoRA; None for one on the Hub.

    Args:
        source: folder with one .safetensors file (or one of diffusers' standard name), .safetensors file, Hub id, or
            Hub id and the path of a file in that repository (`user/name/file.safetensors`).
        option: that has the source, for messages.

    Raises:
        ValueError: the source is none of these.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        standard = path / LORA_WEIGHT_NAME_SAFE
        found = [standard] if standard.is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(
                f"{option} {source}: expected one .safetensors file in the folder, got {names}; name the file."
            )
        return found[0]
    repository, name = _hub_parts(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.endswith(".safetensors") or name.startswith("/"):
        raise ValueError(
            f"{option} {source}: expected a folder, a file or a Hub id (user/name), got no such file or folder; check "
            "the path."
        )
    return None


def download_lora(source: str, option: str = "--lora") -> Path:
    """The file of a LoRA, from the Hub or its cache where `lora_file` has none.

    Raises:
        ValueError: the source is none of what `lora_file` takes, or not to be had.
    """
    file = lora_file(source, option)
    if file is not None:
        return file
    repository, name = _hub_parts(source)
    patterns = [name] if name else ["*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*patterns, f"*{CONFIG_NAME}"]))
    except HUB_ERRORS as error:
        raise ValueError(
            f"{option} {source}: no such folder or file, and not found on the Hub or in its cache "
            f"({hub_reason(error)}); give a folder, a .safetensors file or a Hub id."
        ) from error
    if name and not (folder / name).is_file():
        raise ValueError(f"{option} {source}: the repository {repository} has no file {name}; check its name.")
    try:
        return lora_file(str(folder / name), option)
    except ValueError as error:
        message = str(error).replace(str(folder / name), source)
        raise ValueError(f"{message} On the Hub that is {repository}/FILE.safetensors.") from None


def _hub_parts(source: str) -> tuple[str, str]:
    """A repository, and the path of a file in it or an empty text."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    # Without the ending it is the path of a folder that does not exist.
    return (f"{owner}/{name}", file) if not file or file.endswith(".safetensors") else (source, "")


def lora_settings(file: Path, names: Collection[str], metadata: Mapping[str, str] | None) -> Any:
    """The settings of peft's LoraConfig that come with a LoRA: of its file's header, or of peft beside it; or `{}`."""
    if is_of_peft(file, names):
        return json.loads(file.with_name(CONFIG_NAME).read_text(encoding="utf-8"))
    return json.loads((metadata or {}).get(LORA_ADAPTER_METADATA_KEY) or "{}")


def is_of_peft(file: Path, names: Collection[str]) -> bool:
    """Whether peft's own `save_pretrained` wrote a LoRA; without the config beside it, its scale would be unknown."""
    return all(name.startswith(_OF_PEFT) for name in names) and file.with_name(CONFIG_NAME).is_file()


def read_lora(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA for `load_lora_adapter` of a transformer, from a file in names of diffusers or of peft.

    Returns:
        Tensors and settings ({} where the file has none), all names with the prefix "transformer.".
    """
    tensors = load(file.read_bytes())
    with safe_open(file, framework="pt") as header:
        settings = lora_settings(file, tensors, header.metadata())
    if is_of_peft(file, tensors):
        tensors = {name.removeprefix(_OF_PEFT): tensor for name, tensor in tensors.items()}
        known = LoraConfig().to_dict()
        settings = {name: value for name, value in settings.items() if name in known}
        # diffusers takes the layers from the tensors' names.
        layers = {name.partition(".lora_")[0] for name in tensors}
        settings |= {"target_modules": sorted(layers), "exclude_modules": None}
    return with_prefix(tensors), with_prefix(settings)


def with_prefix(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same by names with the prefix "transformer.", which files have or lack."""
    prefix = "transformer."
    if any(name.startswith(prefix) for name in values):
        return dict(values)
    return {f"{prefix}{name}": value for name, value in values.items()}


def check_lora_file(source: str, file: Path, option: str = "--lora") -> None:
    """Check that a file is a plain LoRA with finite values.

    Raises:
        ValueError: in one line, for a file that is no safetensors file or has NaN or infinite values, for names of
            layers that are regular expressions, and for settings in its metadata that no plain LoRA has.
    """
    width, has_magnitudes, wrong = 0, False, None
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                values = tensors.get_tensor(name)
                width = max(width, *values.shape, 0)
                has_magnitudes |= "lora_magnitude_vector" in name
                if not _LAYER.fullmatch(name):
                    wrong = f"a tensor named {name!r:.100}"
                elif not torch.isfinite(values.float()).all():
                    wrong = f"NaN or infinity in {name}"
            settings = lora_settings(file, names, tensors.metadata())
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{option} {source}: expected a LoRA in a safetensors file, got {error}; use another."
        ) from error
    if not isinstance(settings, dict):
        wrong = "metadata that is no object"
    else:
        for name, value in settings.items():
            if not _is_plain(name.rpartition(".")[2], value, width, has_magnitudes):
                wrong = f"{name!r:.100}: {value!r:.100} in its metadata"
    if wrong:
        raise ValueError(
            f"{option} {source}: expected a plain LoRA with finite values, got {wrong}; use another file."
        )


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
