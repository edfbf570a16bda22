# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the files of a saved pipeline, by their names and by what is in them, before it is loaded."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from safetensors import SafetensorError, safe_open

from ..rewards.loading import brief

# diffusers' and transformers' names; shards of a variant had it at the end formerly.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?"
    r"(?:\.(?P<former>\w+))?\.safetensors"
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class PipelineFiles:
    """The files that a pipeline should have.

    Attributes:
        model: folder or Hub id.
        is_local: whether it is a folder.
        variant: of the weights' files, None for those without one.
        index: its `model_index.json`.
        read: gives the content of a JSON file by its name in the model, or raises ValueError.
    """

    model: str
    is_local: bool
    variant: str | None
    index: Mapping[str, Any]
    read: Callable[[str], Mapping[str, Any]]

    def components(self) -> dict[str, type]:
        """The classes of diffusers and transformers by component."""
        found = {}
        for name, spec in self.index.items():
            if name.startswith("_") or not isinstance(spec, list) or len(spec) != 2 or spec[1] is None:
                continue
            library, class_name = spec
            if library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, library):
                try:
                    found[name] = simple_get_class_obj(library, class_name)
                except AttributeError as error:
                    raise ValueError(
                        f"{self.model}: component {name}: this {library} has no {class_name}; update {library}, or "
                        "choose another model."
                    ) from error
        return found

    def check(self, folder: Path) -> None:
        """Check the files of all components.

        Raises:
            ValueError: in one line, for a component that is missing, incomplete or damaged; with the remedy.
        """
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        weights = self.check_names(names)
        for name, component in self.components().items():
            part = folder / name if (folder / name).is_dir() else folder
            for path in part.iterdir():
                if path.is_file():
                    with path.open("rb") as file:
                        if file.read(len(LFS_POINTER)) == LFS_POINTER:
                            advice = "run `git lfs pull` in the folder" if self.is_local else remedy(False, path)
                            raise ValueError(f"{path}: expected {name}'s file, got a Git LFS pointer to it; {advice}.")
            if issubclass(component, torch.nn.Module):
                self.read(f"{part.relative_to(folder)}/config.json")
            else:
                self._check_loading(name, component, part)
        for path in (folder / name for name in weights):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise damaged(path, brief(error), self.is_local) from error

    def _check_loading(self, name: str, component: Any, part: Path) -> None:
        """Load a tokenizer, or a scheduler's config, which takes no time: each class has files of its own."""
        files = set(getattr(component, "vocab_files_names", {}).values()) - {"tokenizer.json"}
        if files and not any({found.name for found in part.iterdir()} >= each for each in ({"tokenizer.json"}, files)):
            # transformers makes an empty tokenizer of such a folder, without a warning.
            raise ValueError(
                f"{self.model}: component {name}: no vocabulary (tokenizer.json, or {' and '.join(sorted(files))}); "
                f"{remedy(self.is_local)}."
            )
        try:
            if issubclass(component, ConfigMixin):
                component.load_config(part, local_files_only=True)
            else:
                component.from_pretrained(part, local_files_only=True, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise anything for files that are missing or cut
            raise ValueError(
                f"{self.model}: component {name}: its {component.__name__} cannot be loaded ({brief(error)}); "
                f"{remedy(self.is_local, part)}."
            ) from error

    def check_names(self, names: Collection[str]) -> list[str]:
        """The files of weights that will be loaded, of all files of the model.

        Raises:
            ValueError: for a component without complete weights.
        """
        chosen, has_variant = [], self.variant is None
        for name, component in self.components().items():
            prefix = f"{name}/" if any(each.startswith(f"{name}/") for each in names) else ""
            own = [each.removeprefix(prefix) for each in names if each.startswith(prefix)]
            if prefix == "" and "config.json" not in own:
                raise ValueError(f"{self.model}: no files of the component {name}; {remedy(self.is_local)}.")
            if issubclass(component, torch.nn.Module):
                variant, weights = self._choose_weights(name, own)
                has_variant = has_variant or variant is not None
                chosen += [prefix + each for each in weights]
        if not has_variant:
            raise ValueError(f"{self.model}: no weights of --variant {self.variant}; leave the option out.")
        return chosen

    def _choose_weights(self, name: str, own: Collection[str]) -> tuple[str | None, list[str]]:
        """The variant of a component's weights, and their files."""
        by_variant: dict[str | None, list[re.Match[str]]] = {}
        for match in filter(None, map(WEIGHTS.fullmatch, own)):
            by_variant.setdefault(match["variant"] or match["former"], []).append(match)
        variant = self.variant if self.variant in by_variant else None
        where = f"{self.model}: component {name}"
        if variant not in by_variant:
            if others := sorted(filter(None, by_variant)):
                raise ValueError(f"{where} has weights of the variant {others[0]} only; add --variant {others[0]}.")
            if any(each.endswith(".bin") for each in own):
                raise ValueError(
                    f"{where}: expected .safetensors, got pickled weights (.bin), which are not loaded; save the "
                    "pipeline anew with save_pretrained(...), or choose another revision."
                )
            raise ValueError(f"{where} has no weights (*.safetensors); {remedy(self.is_local)}.")
        found = by_variant[variant]
        whole = [match.string for match in found if match["shard"] is None]
        if whole:
            return variant, whole
        shards = int(found[0]["shards"])
        if missing := {*range(1, shards + 1)} - {int(match["shard"]) for match in found}:
            raise ValueError(f"{where}: no shard {min(missing)} of {shards} of its weights; {remedy(self.is_local)}.")
        if not any(".safetensors.index." in each for each in own):
            raise ValueError(f"{where}: the index of its shards (*.index.json) is missing; {remedy(self.is_local)}.")
        return variant, [match.string for match in found]


def remedy(is_local: bool, path: Path | None = None) -> str:
    """What to do about files that are missing, or about a damaged one; see `PipelineFiles`."""
    if is_local:
        return "copy or download the folder again"
    # The cache links to what it downloaded.
    damaged = "" if path is None else f"remove {path.resolve()} and "
    return f"{damaged}start once with network access, HF_HUB_OFFLINE unset"


def damaged(path: Path, what: str, is_local: bool) -> ValueError:
    """The error about a file that cannot be read."""
    return ValueError(f"{path}: the file is damaged or incomplete ({what}); {remedy(is_local, path)}.")
