# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation compares: the base model, trained ones, and the rewards that score them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256
from .lora_files import check_lora_file, lora_file

BASE = "base"
"""Name of the model without a LoRA."""
# Names that Windows keeps for devices, with any suffix, and those that mean another folder or lose their end.
_NO_FOLDER = re.compile(r"(?:(?:CON|PRN|AUX|NUL|COM\d|LPT\d)(?:\..*)?|.*\.|.{101,})", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class EvaluatedModel:
    """The base model, alone, with a LoRA, or with a transformer of which all weights were trained.

    Attributes:
        name: name in tables and in the report.
        lora: folder, file or Hub id of the LoRA; None for the base model.
        scale: factor on the LoRA.
        base_for_last: number of last steps that run without the LoRA.
        digest: SHA-256 of the LoRA's file, or of the transformer's files, in hexadecimal; None for the base model and
            for a LoRA on the Hub that is not in its cache yet.
        transformer: folder or Hub id of the transformer; None for the base's.
    """

    name: str
    lora: str | None = None
    scale: float = 1.0
    base_for_last: int = 0
    digest: str | None = None
    transformer: str | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's name."""
        return folder_name(self.name)


@dataclass(frozen=True)
class Line:
    """A line of the tables.

    Attributes:
        name: in tables and in `--against`.
        models: one, or several whose trainings differ by the seed alone.
    """

    name: str
    models: tuple[EvaluatedModel, ...]


def folder_name(name: str) -> str:
    """A name with only letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^\w.-]+", "_", name)


def can_be_folder(name: str) -> bool:
    """Whether folders can have the result of `folder_name` as their name on all systems."""
    return not _NO_FOLDER.fullmatch(name)


def evaluated_lines(loras: Sequence[str], scales: Sequence[float], base_for_last: Sequence[int]) -> list[Line]:
    """The base model, then every LoRA at every scale with every number of last steps without it.

    Args:
        loras: each `NAME=SOURCE`, or `SOURCE` alone, whose last part is then the name, or `NAME=SOURCE,SOURCE,...`
            for several seeds. A source is a folder, a .safetensors file or a Hub id.
        scales: at least one.
        base_for_last: at least one.

    Raises:
        ValueError: a source does not exist or is no plain LoRA, two seeds are the same LoRA, two models have the same
            folder, or a name cannot be that of a folder.
    """
    lines = [Line(BASE, (EvaluatedModel(BASE),))]
    for given in loras:
        name, sources = name_and_sources(given)
        digests = [_digest(source) for source in sources]
        labels = seed_labels(sources)
        for place, digest in enumerate(digests):
            if sources[place] in sources[:place] or (digest is not None and digest in digests[:place]):
                raise ValueError(f"--lora {name}: expected LoRAs of different seeds, got {sources[place]} twice.")
        for scale in scales:
            for last in base_for_last:
                title = name
                if len(scales) > 1 or scale != 1:
                    title += f" × {scale:g}"
                if last:
                    title += f", base for last {last}"
                each = zip(labels, sources, digests, strict=True)
                models = [EvaluatedModel(title + label, source, scale, last, digest) for label, source, digest in each]
                lines.append(Line(title, tuple(models)))
    check_names(lines)
    return lines


def check_names(lines: Sequence[Line], option: str = "--lora") -> None:
    """Raise ValueError where two models have the same folder, or a name cannot be that of a folder."""
    names = [model.name for line in lines for model in line.models]
    # A line of several seeds has a name of its own.
    names += [line.name for line in lines if len(line.models) > 1]
    # Windows and macOS take names that differ in case for the same one.
    folders = [folder_name(name).casefold() for name in names]
    for name in names:
        if not can_be_folder(folder_name(name)):
            raise ValueError(
                f"{option}: expected a name that folders can have on all systems, got {name!r}; choose another in "
                "NAME=SOURCE."
            )
        if folders.count(folder_name(name).casefold()) > 1:
            raise ValueError(f"{option}: expected different names, got {name!r} twice; write NAME=SOURCE.")


def name_and_sources(given: str, option: str = "--lora") -> tuple[str, list[str]]:
    """The name and the sources of `NAME=SOURCE`, `SOURCE` or `NAME=SOURCE,SOURCE,...`."""
    name, equals, source = given.partition("=")
    if not equals:
        source = given
        name = Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]
    sources = [source] if Path(source).exists() else source.split(",")
    if not name or not all(sources):
        raise ValueError(f"{option} {given}: expected NAME=SOURCE or SOURCE; write the missing part.")
    if len(sources) > 1 and not equals:
        raise ValueError(f"{option} {given}: expected a name for several seeds; write NAME=SOURCE,SOURCE.")
    # The option's own check has expanded the first one.
    return name, [str(Path(each).expanduser()) if each.startswith("~") else each for each in sources]


def seed_labels(sources: Sequence[str]) -> list[str]:
    """What follows the line's name in those of its models: the sources' last parts, or numbers where these are equal.

    The last parts keep their model when a seed is added.
    """
    if len(sources) == 1:
        return [""]
    parts = [source.rstrip("/\\").replace("\\", "/").rpartition("/")[2] for source in sources]
    return [f" {part if len({*parts}) == len(parts) else f'#{place}'}" for place, part in enumerate(parts, 1)]


def _digest(source: str) -> str | None:
    file = lora_file(source)
    if file is None:
        return None
    check_lora_file(source, file)
    return sha256(file)


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
