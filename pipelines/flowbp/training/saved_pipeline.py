# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A pipeline in a folder or on the Hub: its configs, and all its files, checked before any of them is loaded."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub import hf_hub_download, model_info, resolve_revision
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from ..rewards.loading import HUB_ERRORS, brief, hub_reason

INDEX = "model_index.json"
# diffusers' and transformers' names; shards of a variant had it at the end formerly.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-(?P<shard>\d+)-of-(?P<shards>\d+))?"
    r"(?:\.(?P<former>\w+))?\.safetensors"
)
SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".sft", ".pth", ".pt", ".bin")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class SavedPipeline:
    """A pipeline that `save_pretrained` saved. Only configs are read here; `fetch` gets the rest.

    Args:
        pipeline: its class; `DiffusionPipeline` for any.
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub; None for its main branch.
        variant: of the weights' files, such as fp16.

    Attributes:
        commit: that the revision is now, of which all files are; None for a folder.
        index: its `model_index.json`.

    Raises:
        ValueError: for what is no saved pipeline, or one of another class.
        OSError: where the Hub does not give it.
    """

    def __init__(
        self, pipeline: type[DiffusionPipeline], model: str, revision: str | None = None, variant: str | None = None
    ) -> None:
        self.model = model
        self.variant = variant
        self.is_local = Path(model).is_dir()
        self._folder: Path | None = None
        if not self.is_local and (Path(model).is_file() or model.lower().endswith(SINGLE_FILES)):
            raise self._single_file(model, pipeline)
        self.commit = None if self.is_local else self._resolve(revision)
        self.index = self._read(INDEX, pipeline)
        name = self.index.get("_class_name")
        # A list is diffusers' mark of code that comes with the model.
        if not isinstance(name, str) or (pipeline is not DiffusionPipeline and name != pipeline.__name__):
            others = "train_flowbp.py takes any pipeline of diffusers that can be recorded"
            remedy = "choose another model" if pipeline is DiffusionPipeline else others
            raise ValueError(f"{model}: expected a saved {pipeline.__name__}, got {name}; {remedy}.")

    def config(self, component: str) -> dict[str, Any]:
        """The config of a model in the pipeline; {} for a component that it was saved without.

        Raises:
            ValueError, OSError: where it cannot be read.
        """
        return {} if self.index.get(component, (None, None))[1] is None else self._read(f"{component}/config.json")

    def check_folder(self) -> None:
        """Check the files of a folder now; those of a repository are checked when they were downloaded.

        Raises:
            ValueError: see `fetch`.
        """
        if self.is_local:
            self.fetch()

    def fetch(self) -> Path:
        """The folder with all files of the pipeline, downloaded if necessary, and checked once.

        Raises:
            ValueError: in one line, for a component that is missing, incomplete or damaged; with the remedy.
            OSError: where the Hub does not give the files.
        """
        if self._folder is None:
            folder = Path(self.model) if self.is_local else self._download()
            self._check_files(folder)
            self._folder = folder
        return self._folder

    # Getting files.

    def _resolve(self, revision: str | None) -> str:
        try:
            return resolve_revision(self.model, revision=revision).resolved
        except HUB_ERRORS as error:
            raise self._no_model(error) from error

    def _read(self, name: str, pipeline: type[DiffusionPipeline] = DiffusionPipeline) -> dict[str, Any]:
        path = Path(self.model, name)
        try:
            if not self.is_local:
                path = Path(hf_hub_download(self.model, name, revision=self.commit))
            content = json.loads(path.read_text(encoding="utf-8"))
        except LocalEntryNotFoundError as error:
            raise self._no_model(error) from error
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise self._no_file(name, pipeline) from error
        except HUB_ERRORS as error:
            if self.is_local:
                # It names the file that may not be read.
                raise
            raise self._no_model(error) from error
        except ValueError as error:
            raise self._damaged(path, brief(error)) from error
        if not isinstance(content, dict):
            raise self._damaged(path, "not a JSON object")
        return content

    def _download(self) -> Path:
        """The files that the pipeline's `from_pretrained` downloads, from the cache where they all are in it."""
        try:
            files = model_info(self.model, revision=self.commit).siblings
        except HUB_ERRORS:
            # Offline: what the cache has is checked instead.
            files = None
        if files:
            self._check_names([file.rfilename for file in files])
        try:
            folder = DiffusionPipeline.download(
                self.model, revision=self.commit, variant=self.variant, use_safetensors=True, trust_remote_code=False
            )
        except (*HUB_ERRORS, ValueError) as error:
            raise self._no_model(error) from error
        return Path(folder)

    # Checking them.

    def _components(self) -> dict[str, type]:
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

    def _check_files(self, folder: Path) -> None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        weights = self._check_names(names)
        for name, component in self._components().items():
            part = folder / name if (folder / name).is_dir() else folder
            for path in part.iterdir():
                if path.is_file():
                    with path.open("rb") as file:
                        if file.read(len(LFS_POINTER)) == LFS_POINTER:
                            remedy = "run `git lfs pull` in the folder" if self.is_local else self._remedy(path)
                            raise ValueError(f"{path}: expected {name}'s file, got a Git LFS pointer to it; {remedy}.")
            if issubclass(component, torch.nn.Module):
                self._read(f"{part.relative_to(folder)}/config.json")
            else:
                self._check_loading(name, component, part)
        for path in (folder / name for name in weights):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise self._damaged(path, brief(error)) from error

    def _check_loading(self, name: str, component: Any, part: Path) -> None:
        """Load a tokenizer, or a scheduler's config, which takes no time: each class has files of its own."""
        files = set(getattr(component, "vocab_files_names", {}).values()) - {"tokenizer.json"}
        if files and not any({found.name for found in part.iterdir()} >= each for each in ({"tokenizer.json"}, files)):
            # transformers makes an empty tokenizer of such a folder, without a warning.
            raise ValueError(
                f"{self.model}: component {name}: no vocabulary (tokenizer.json, or {' and '.join(sorted(files))}); "
                f"{self._remedy()}."
            )
        try:
            if issubclass(component, ConfigMixin):
                component.load_config(part, local_files_only=True)
            else:
                component.from_pretrained(part, local_files_only=True, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise anything for files that are missing or cut
            raise ValueError(
                f"{self.model}: component {name}: its {component.__name__} cannot be loaded ({brief(error)}); "
                f"{self._remedy(part)}."
            ) from error

    def _check_names(self, names: Collection[str]) -> list[str]:
        """The files of weights that will be loaded, of all files of the model.

        Raises:
            ValueError: for a component without complete weights.
        """
        chosen, has_variant = [], self.variant is None
        for name, component in self._components().items():
            prefix = f"{name}/" if any(each.startswith(f"{name}/") for each in names) else ""
            own = [each.removeprefix(prefix) for each in names if each.startswith(prefix)]
            if prefix == "" and "config.json" not in own:
                raise ValueError(f"{self.model}: no files of the component {name}; {self._remedy()}.")
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
            raise ValueError(f"{where} has no weights (*.safetensors); {self._remedy()}.")
        found = by_variant[variant]
        whole = [match.string for match in found if match["shard"] is None]
        if whole:
            return variant, whole
        missing = set(range(1, int(found[0]["shards"]) + 1)) - {int(match["shard"]) for match in found}
        if missing:
            raise ValueError(
                f"{where}: no shard {min(missing)} of {int(found[0]['shards'])} of its weights; {self._remedy()}."
            )
        if not any(".safetensors.index." in each for each in own):
            raise ValueError(f"{where}: the index of its shards (*.index.json) is missing; {self._remedy()}.")
        return variant, [match.string for match in found]

    # Messages.

    def _remedy(self, path: Path | None = None) -> str:
        if self.is_local:
            return "copy or download the folder again"
        # The cache links to what it downloaded.
        damaged = "" if path is None else f"remove {path.resolve()} and "
        return f"{damaged}start once with network access, HF_HUB_OFFLINE unset"

    def _damaged(self, path: Path, what: str) -> ValueError:
        return ValueError(f"{path}: the file is damaged or incomplete ({what}); {self._remedy(path)}.")

    def _no_model(self, error: Exception) -> OSError:
        return OSError(
            f"{self.model}: no such folder, and the Hub does not give it: {hub_reason(error)}; check the name and "
            f"--revision, start once with network access (HF_HUB_OFFLINE unset), and log in with `hf auth login` if "
            f"https://huggingface.co/{self.model} asks to accept terms."
        )

    def _no_file(self, name: str, pipeline: type[DiffusionPipeline]) -> ValueError:
        component, _, _ = name.rpartition("/")
        if component:
            return ValueError(f"{self.model}: component {component}: no config.json; {self._remedy()}.")
        names = {path.name for path in Path(self.model).iterdir()} if self.is_local else set()
        expected = f"{self.model}: expected a pipeline with a {INDEX}, got"
        if LORA_WEIGHT_NAME_SAFE in names:
            return ValueError(f"{expected} the folder of a LoRA; give the base model that it is for.")
        if "config.json" in names:
            return ValueError(f"{expected} the folder of a single model; give the folder of the whole pipeline.")
        if files := sorted(each for each in names if each.lower().endswith(SINGLE_FILES)):
            return self._single_file(str(Path(self.model, files[0])), pipeline)
        return ValueError(f"{expected} no such file; choose a model in diffusers' format.")

    @staticmethod
    def _single_file(path: str, pipeline: type[DiffusionPipeline]) -> ValueError:
        name = "StableDiffusion3Pipeline" if pipeline is DiffusionPipeline else pipeline.__name__
        own = ", with the class of its pipeline" if pipeline is DiffusionPipeline else ""
        return ValueError(
            f"{path}: expected a folder or a Hub id, got a single file; convert it once{own}: "
            f'{name}.from_single_file("{path}").save_pretrained("FOLDER"), and give FOLDER.'
        )
