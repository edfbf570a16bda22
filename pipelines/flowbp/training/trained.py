# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a run trains of a transformer, a LoRA or all weights: how it is copied, put back, left out and saved."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from ..files import apply_umask, move
from ..observers import adapters_off
from ..publishing.published_files import LORA_FILE, TRANSFORMER_FOLDER
from .backbone import Backbone
from .checkpoints import check_finite, write_folder, write_json
from .config import TrainingConfig
from .distributed import full_lora, full_tensor, load_lora, local
from .state_files import LoraFiles, ShardFiles, StateFiles

Tensors = Mapping[str, torch.Tensor]


class TrainedWeights(ABC):
    """The trained weights of a transformer.

    Args:
        transformer: on its device, wrapped or sharded.

    Attributes:
        parameters: that are trained, by their names in the transformer.
        has_changed: since the model was loaded.
    """

    title: str
    """For messages and tables."""
    dtype: torch.dtype
    """Of the result."""
    loses_base: bool
    """Whether the base model is gone after the first update."""
    has_whole_gradients: bool
    """Whether a process has whole gradients, whose norms can be measured by step."""
    state_files: type[StateFiles]

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer
        self.parameters = {name: each for name, each in transformer.named_parameters() if each.requires_grad}
        self.has_changed = False

    @abstractmethod
    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU for `restore` and `write`. Collective."""

    @abstractmethod
    def restore(self, snapshot: Tensors) -> None:
        """Put a snapshot back.

        Raises:
            ValueError: for other names or shapes, naming one.
        """

    @abstractmethod
    def left_out(self) -> AbstractContextManager[None]:
        """The transformer without what is trained: the base model.

        Raises:
            ValueError: the base model is gone.
        """

    @abstractmethod
    def write(self, accelerator: Accelerator, output_dir: Path, snapshot: Tensors) -> None:
        """Write what users load into the output folder; readers find the old one or the new one. Collective.

        Raises:
            CheckpointError: the snapshot is not finite, and nothing was written.
        """

    @abstractmethod
    def path(self, output_dir: Path) -> Path:
        """What `write` writes."""

    @abstractmethod
    def write_best(self, output_dir: Path, snapshot: Tensors, scores: Mapping[str, Any]) -> None:
        """Write a snapshot and its scores into the folder `best`; large ones are in checkpoints only."""

    @abstractmethod
    def describe(self, config: TrainingConfig) -> str:
        """What is trained, for the plan of a run."""

    @property
    @abstractmethod
    def result_class(self) -> str | None:
        """The class that loads the result, where the pipeline does not load it itself."""

    @abstractmethod
    def how_to_load(self, backbone: Backbone, output_dir: Path) -> str:
        """Python that loads the result into a pipeline `pipe`."""


class LoraWeights(TrainedWeights):
    """A LoRA; snapshots have its whole tensors by peft's names.

    Args:
        transformer: see `TrainedWeights`.
        save: writes a snapshot into a folder as the pipeline's users load it.
    """

    title = "LoRA"
    dtype = torch.float32
    loses_base = False
    has_whole_gradients = True
    state_files = LoraFiles
    result_class = None

    def __init__(self, transformer: torch.nn.Module, save: Callable[[Path, Tensors], None]) -> None:
        super().__init__(transformer)
        self.save = save

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu() for name, tensor in full_lora(self.transformer).items()}

    def restore(self, snapshot: Tensors) -> None:
        load_lora(self.transformer, snapshot)

    def left_out(self) -> AbstractContextManager[None]:
        return adapters_off(self.transformer)

    def write(self, accelerator: Accelerator, output_dir: Path, snapshot: Tensors) -> None:
        if not accelerator.is_main_process:
            return
        file, partial = self.path(output_dir), output_dir / "lora.partial"
        check_finite(file, snapshot)
        # A killed run may have left something there.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        self.save(partial, snapshot)
        apply_umask(partial)
        move(partial / LORA_FILE, file)
        partial.rmdir()

    def path(self, output_dir: Path) -> Path:
        """The LoRA's file."""
        return output_dir / LORA_FILE

    def write_best(self, output_dir: Path, snapshot: Tensors, scores: Mapping[str, Any]) -> None:
        def fill(folder: Path) -> None:
            self.save(folder, snapshot)
            write_json(folder / "evaluation.json", scores)

        write_folder(output_dir / "best", fill)

    def describe(self, config: TrainingConfig) -> str:
        rank = "several ranks" if config.rank is None else f"rank {config.rank}"
        start = "" if config.init_lora is None else f", from {config.init_lora}"
        return f"{'DoRA' if config.use_dora else 'LoRA'} of {rank}{start}"

    def how_to_load(self, backbone: Backbone, output_dir: Path) -> str:
        return backbone.how_to_load(output_dir)


class FullWeights(TrainedWeights):
    """All weights, in shards; snapshots have this process' shards in the dtype of the computation.

    Args:
        transformer: see `TrainedWeights`; sharded.
        model_class: of the transformer before it was sharded.
        component: its name in the pipeline.
        dtype: of the computation, which snapshots and the result have.
    """

    title = "transformer"
    loses_base = True
    has_whole_gradients = False
    state_files = ShardFiles

    def __init__(
        self, transformer: torch.nn.Module, model_class: type[ModelMixin], component: str, dtype: torch.dtype
    ) -> None:
        super().__init__(transformer)
        self.model_class = model_class
        self.component = component
        self.dtype = dtype

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: each.detach().to("cpu", self.dtype, copy=True) for name, each in self.parameters.items()}

    def empty_snapshot(self) -> dict[str, torch.Tensor]:
        """A snapshot to read values into."""
        return {name: torch.empty_like(each, dtype=self.dtype).to("cpu") for name, each in self.parameters.items()}

    @torch.no_grad()
    def restore(self, snapshot: Tensors) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(snapshot[name]))
        self.has_changed = True

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """See `TrainedWeights`; possible before the first update only."""
        if self.has_changed:
            raise ValueError(
                "images of the base model are to be drawn, and with --train full it is gone after the first update; "
                "resume with the evaluation and validation prompts, rewards and sampling options of that run."
            )
        yield

    def write(self, accelerator: Accelerator, output_dir: Path, snapshot: Tensors) -> None:
        """See `TrainedWeights`; as `save_pretrained` writes it, with a manifest."""
        device = accelerator.device
        whole = {}
        for name in sorted(snapshot):
            # One at a time on the device, all of them in the main process' memory.
            tensor = full_tensor(snapshot[name].to(device))
            if accelerator.is_main_process:
                whole[name] = tensor.cpu()
        if not accelerator.is_main_process:
            return
        check_finite(self.path(output_dir), whole)
        state = self.transformer.state_dict()
        whole |= {name: state[name].cpu() for name in state.keys() - whole.keys()}
        # Not where the model was loaded from, which may be a folder of this machine.
        config = {name: value for name, value in self.transformer.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = self.model_class.from_config(config)
        model.load_state_dict(whole, assign=True)
        write_folder(self.path(output_dir), model.save_pretrained)

    def path(self, output_dir: Path) -> Path:
        """The folder of the transformer."""
        return output_dir / TRANSFORMER_FOLDER

    def write_best(self, output_dir: Path, snapshot: Tensors, scores: Mapping[str, Any]) -> None:
        """Checkpoints have them."""

    def describe(self, config: TrainingConfig) -> str:
        return "all weights, in shards (FSDP2)"

    @property
    def result_class(self) -> str:
        """The transformer's."""
        return self.model_class.__name__

    def how_to_load(self, backbone: Backbone, output_dir: Path) -> str:
        load = f'{self.result_class}.from_pretrained("{output_dir.as_posix()}", subfolder="{TRANSFORMER_FOLDER}"'
        return f"pipe.{self.component} = {load}, dtype={self.dtype})"
