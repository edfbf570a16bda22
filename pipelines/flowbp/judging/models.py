# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation compares: the base model, its LoRAs, and the rewards that score them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from .lora_files import check_lora_file

BASE = "base"
"""Name of the model without a LoRA."""
# Names that Windows keeps for devices, with any suffix, and those that mean another folder or lose their end.
_NO_FOLDER = re.compile(r"(?:(?:CON|PRN|AUX|NUL|COM\d|LPT\d)(?:\..*)?|.*\.|.{101,})", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class EvaluatedModel:
    """The base model, or the base model with a LoRA.

    Attributes:
        name: name in tables and in the report.
        lora: folder, file or Hub id of the LoRA; None for the base model.
        scale: factor on the LoRA.
        base_for_last: number of last steps that run without the LoRA.
        digest: SHA-256 of the LoRA's file in hexadecimal; None for the base model and for a LoRA on the Hub.
    """

    name: str
    lora: str | None = None
    scale: float = 1.0
    base_for_last: int = 0
    digest: str | None = None

    @property
    def folder(self) -> str:
        """The name with only letters, digits, `_`, `.` and `-`, as a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def evaluated_models(
    loras: Sequence[str], scales: Sequence[float], base_for_last: Sequence[int]
) -> list[EvaluatedModel]:
    """The base model, then every LoRA at every scale with every number of last steps without it.

    Args:
        loras: each `NAME=SOURCE`, or `SOURCE` alone, whose last part is then the name. A source is a folder, a
            .safetensors file or a Hub id.
        scales: at least one.
        base_for_last: at least one.

    Raises:
        ValueError: a source does not exist or is no plain LoRA, two models have the same folder, or a name cannot be
            that of a folder.
    """
    models = [EvaluatedModel(BASE)]
    for given in loras:
        name, source = _name_and_source(given)
        file = lora_file(source)
        if file is not None:
            check_lora_file(source, file)
        digest = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        for scale in scales:
            for last in base_for_last:
                title = name
                if len(scales) > 1 or scale != 1:
                    title += f" × {scale:g}"
                if last:
                    title += f", base for last {last}"
                models.append(EvaluatedModel(title, source, scale, last, digest))
    # Windows and macOS take names that differ in case for the same one.
    folders = [model.folder.casefold() for model in models]
    for model in models:
        if _NO_FOLDER.fullmatch(model.folder):
            raise ValueError(
                f"--lora: expected a name that folders can have on all systems, got {model.name!r}; choose another in "
                "NAME=SOURCE."
            )
        if folders.count(model.folder.casefold()) > 1:
            raise ValueError(f"--lora: expected different names, got {model.name!r} twice; write NAME=SOURCE.")
    return models


def _name_and_source(given: str) -> tuple[str, str]:
    name, equals, source = given.partition("=")
    if not equals:
        source = given
        name = Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]
    if not name or not source:
        raise ValueError(f"--lora {given}: expected NAME=SOURCE or SOURCE; write the missing part.")
    return name, source


def lora_file(source: str) -> Path | None:
    """The local file of a LoRA; None for a Hub id.

    Args:
        source: folder with one .safetensors file (or one of diffusers' standard name), .safetensors file, or Hub id.

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
                f"--lora {source}: expected one .safetensors file in the folder, got {names}; name the file."
            )
        return found[0]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith(".safetensors"):
        raise ValueError(
            f"--lora {source}: expected a folder, a file or a Hub id (user/name), got no such file or folder; check "
            "the path."
        )
    return None


def reward_names(spec: str) -> list[str]:
    """The names in `--rewards`, which are separated by commas and have no weights.

    Raises:
        ValueError: a name is empty, occurs twice or has a weight.
    """
    names = [name.strip() for name in spec.split(",")]
    for name in names:
        if not name or names.count(name) > 1:
            got = f"{name!r} twice" if name else "''"
            raise ValueError(f"--rewards {spec}: expected different names separated by commas, got {got}; remove it.")
        if re.fullmatch(r".+:[-+]?[\d.]+(e[-+]?\d+)?", name):
            raise ValueError(
                f"--rewards {spec}: expected names without weights, got {name!r}; each reward is scored by itself, so "
                "leave its weight out."
            )
    return names
