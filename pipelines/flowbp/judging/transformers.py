# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Transformers of which all weights were trained: checked against the base's, and put in its place one at a time."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..rewards.loading import HUB_ERRORS, hub_reason
from .models import EvaluatedModel, Line, check_names, name_and_sources, seed_labels

FOLDER = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def transformer_lines(given: Sequence[str], base: Mapping[str, Any]) -> list[Line]:
    """A line for each transformer; those on the Hub are downloaded.

    Args:
        given: each `[NAME=]SOURCE`, or `NAME=SOURCE,SOURCE,...` for several seeds. A source is the output folder of a
            run with `--train full`, its folder `transformer`, or a Hub id.
        base: the config of the base's transformer.

    Raises:
        ValueError: a source does not exist, is not whole, or is no transformer of the base's architecture.
    """
    lines = []
    for each in given:
        name, sources = name_and_sources(each, "--transformer")
        models = [
            EvaluatedModel(name + label, digest=_checked_digest(source, base), transformer=source)
            for label, source in zip(seed_labels(sources), sources, strict=True)
        ]
        if len({model.digest for model in models}) < len(models):
            raise ValueError(f"--transformer {name}: expected transformers of different seeds, got the same twice.")
        lines.append(Line(name, tuple(models)))
    check_names(lines, "--transformer")
    return lines


def _folder(source: str) -> Path:
    """The folder with a transformer's config, downloaded where `source` is a Hub id."""
    path = Path(source)
    if not path.is_dir():
        wrong = f"--transformer {source}: expected a folder or a Hub id (user/name), got no such folder"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise ValueError(f"{wrong}; check the path.")
        names = ("config.json", "diffusion_pytorch_model*.safetensors", f"{WEIGHTS}.index.json")
        try:
            path = Path(snapshot_download(source, allow_patterns=[*names, *(f"{FOLDER}/{name}" for name in names)]))
        except HUB_ERRORS as error:
            raise ValueError(f"{wrong}, and the Hub does not give it: {hub_reason(error)}; check the name.") from error
    for folder in (path / FOLDER, path):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"--transformer {source}: expected the folder of a run with --train full, got no config.json.")


def _weights(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.is_file():
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / name for name in names]


def _checked_digest(source: str, base: Mapping[str, Any]) -> str:
    """SHA-256 of a transformer's config and weights."""
    folder = _folder(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_config(source, config, base)
        with torch.device("meta"):
            expected = getattr(diffusers, base["_class_name"]).from_config(dict(base)).state_dict()
        shapes: dict[str, list[int]] = {}
        for file in _weights(folder):
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if str(error).startswith("--transformer"):
            raise
        raise ValueError(f"--transformer {source}: not whole ({type(error).__name__}: {error}).") from error
    wrong = [
        name for name in {**expected, **shapes} if [*getattr(expected.get(name), "shape", "-")] != shapes.get(name)
    ]
    if wrong:
        raise ValueError(
            f"--transformer {source}: expected the tensors of the base's transformer, got another "
            f"{min(wrong)}, and {len(wrong)} that differ in all; choose the base model that it was trained from."
        )
    digest = hashlib.sha256()
    for file in (folder / "config.json", *_weights(folder)):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _check_config(source: str, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raise ValueError for another class or other settings; those that a config leaves out have their defaults."""
    name = base["_class_name"]
    if config.get("_class_name") != name:
        raise ValueError(
            f"--transformer {source}: expected a {name}, as in the base pipeline, got {config.get('_class_name')}; "
            "choose the base model that it was trained from."
        )
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    whole = [json.loads(json.dumps({**defaults, **each}, default=str)) for each in (config, base)]
    for key in sorted({*whole[0], *whole[1]}):
        found, expected = (each.get(key) for each in whole)
        if found != expected and not key.startswith("_"):
            raise ValueError(
                f"--transformer {source}: expected {key} {expected}, as in the base pipeline, got {found}; choose the "
                "base model that it was trained from."
            )


class Transformers:
    """The weights of a pipeline's transformer, replaced in place and put back.

    Args:
        pipe: with all LoRAs; it may be offloaded.
        component: name of the transformer.
    """

    def __init__(self, pipe: DiffusionPipeline, component: str) -> None:
        self._module = getattr(pipe, component)
        self._source: str | None = None
        self._base: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def use(self, source: str | None) -> None:
        """Switch to a transformer's weights, in the dtype of the pipeline; None for the base's."""
        if source == self._source:
            return
        # Layers with a LoRA keep the base's weights under another name.
        state = self._module.state_dict().items()
        own = {name.replace(".base_layer.", "."): tensor for name, tensor in state if ".lora_" not in name}
        if not self._base:
            self._base = {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}
        for name, tensor in self._base.items() if source is None else _tensors(_folder(source)):
            own[name].copy_(tensor)
        self._source = source


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformer's tensors, one at a time."""
    for path in _weights(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
