# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A pipeline in a folder or on the Hub: its configs, and all its files, checked before any of them is loaded."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, model_info, resolve_revision
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
)

from ..publishing.published_files import LORA_FILE
from ..rewards.loading import HUB_ERRORS, brief, hub_reason
from .pipeline_files import PipelineFiles, damaged, remedy

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".sft", ".pth", ".pt", ".bin")


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
            advice = "choose another model" if pipeline is DiffusionPipeline else others
            raise ValueError(f"{model}: expected a saved {pipeline.__name__}, got {name}; {advice}.")
        self._files = PipelineFiles(model, self.is_local, variant, self.index, self._read)

    def config(self, component: str) -> dict[str, Any]:
        """The config of a model in the pipeline; {} for a component that it was saved without.

        Raises:
            ValueError, OSError: where it cannot be read.
        """
        return {} if self.index.get(component, (None, None))[1] is None else self._read(f"{component}/config.json")

    def components(self) -> dict[str, type]:
        """The classes of diffusers and transformers by component.

        Raises:
            ValueError: for a class that the installed version does not have.
        """
        return self._files.components()

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
            self._files.check(folder)
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
            raise damaged(path, brief(error), self.is_local) from error
        if not isinstance(content, dict):
            raise damaged(path, "not a JSON object", self.is_local)
        return content

    def _download(self) -> Path:
        """The files that the pipeline's `from_pretrained` downloads, from the cache where they all are in it."""
        try:
            files = model_info(self.model, revision=self.commit).siblings
        except HUB_ERRORS:
            # Offline: what the cache has is checked instead.
            files = None
        if files:
            self._files.check_names([file.rfilename for file in files])
        try:
            folder = DiffusionPipeline.download(
                self.model, revision=self.commit, variant=self.variant, use_safetensors=True, trust_remote_code=False
            )
        except (*HUB_ERRORS, ValueError) as error:
            raise self._no_model(error) from error
        return Path(folder)

    # Messages.

    def _no_model(self, error: Exception) -> OSError:
        return OSError(
            f"{self.model}: no such folder, and the Hub does not give it: {hub_reason(error)}; check the name and "
            f"--revision, start once with network access (HF_HUB_OFFLINE unset), and log in with `hf auth login` if "
            f"https://huggingface.co/{self.model} asks to accept terms."
        )

    def _no_file(self, name: str, pipeline: type[DiffusionPipeline]) -> ValueError:
        component, _, _ = name.rpartition("/")
        if component:
            return ValueError(f"{self.model}: component {component}: no config.json; {remedy(self.is_local)}.")
        names = {path.name for path in Path(self.model).iterdir()} if self.is_local else set()
        expected = f"{self.model}: expected a pipeline with a {INDEX}, got"
        if LORA_FILE in names:
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
