# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a `TrainingState` in a checkpoint: a LoRA's whole, by one process; all weights' in shards, by all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoints import CheckpointError, load_tensors, save_tensors, write_folder, write_folder_together
from .distributed import full_lora, full_tensor, full_tensors, like, local, uses_fsdp2
from .optimizers import load_optimizer, optimizer_tensors
from .shards import read_shards, write_shards

if TYPE_CHECKING:
    from .state import TrainingState

Tensors = Mapping[str, torch.Tensor]
Check = Callable[[], None]
Add = Callable[[Path], None]


class StateFiles(ABC):
    """Writes and reads the tensors of a state: weights, moments, average, and the best snapshot.

    Attributes:
        has_result: a checkpoint has the result too, as users load it.
    """

    has_result: bool

    def __init__(self, state: "TrainingState") -> None:
        self.state = state
        self.accelerator = state.accelerator

    @property
    @abstractmethod
    def needs_all_processes(self) -> bool:
        """Whether no process can write alone."""

    @abstractmethod
    def write(self, folder: Path, best: Tensors | None, check: Check, add: Add, alone: bool = False) -> None:
        """Write a checkpoint. Collective, unless `alone`.

        Args:
            folder: `checkpoint-N`.
            best: a snapshot to keep.
            check: raises where nothing may be written any more; called in the process that calls `add`.
            add: writes the other files into an empty folder; called in the main process, or in the one that is alone.
            alone: this process writes, whichever it is; not where `needs_all_processes`.

        Raises:
            CheckpointError, OSError: see `write_folder` and `write_folder_together`.
        """

    @abstractmethod
    def read(self, folder: Path, numbers: Mapping[str, float]) -> None:
        """Continue from the files of a checkpoint. Collective.

        Raises:
            CheckpointError: for tensors that do not fit.
        """

    @abstractmethod
    def read_best(self, folder: Path) -> dict[str, torch.Tensor]:
        """The best snapshot that a checkpoint keeps. Collective."""


class LoraFiles(StateFiles):
    """A LoRA, its moments and its average, whole: `lora`, `optimizer`, `ema` and `best.safetensors`."""

    has_result = True

    @property
    def needs_all_processes(self) -> bool:
        """With FSDP2, because tensors are gathered."""
        return uses_fsdp2(self.accelerator)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Whole tensors by file. Collective where parameters are sharded."""
        state = self.state
        moments = full_tensors(optimizer_tensors(state.optimizer, state.parameters))
        found = {"lora": full_lora(state.transformer), "optimizer": moments}
        if state.average is not None:
            found["ema"] = {str(index): full_tensor(value) for index, value in enumerate(state.average)}
        return found

    def write(self, folder: Path, best: Tensors | None, check: Check, add: Add, alone: bool = False) -> None:
        tensors, result = self.tensors(), self.state.result()
        if best is not None:
            tensors["best"] = best

        def fill(partial: Path) -> None:
            save_files(partial, tensors)
            add(partial)
            self.state.trained.save(partial, result)

        if alone or self.accelerator.is_main_process:
            check()
            write_folder(folder, fill)

    def read(self, folder: Path, numbers: Mapping[str, float]) -> None:
        state = self.state
        lora = load_tensors(folder / "lora.safetensors")
        expected = {name: tensor.shape for name, tensor in full_lora(state.transformer).items()}
        if {name: tensor.shape for name, tensor in lora.items()} != expected:
            raise CheckpointError(
                f"--resume_from_checkpoint {folder}: its LoRA has other layers or another rank; use the "
                "--lora_layers, --rank, --use_dora and --init_lora of that run."
            )
        state.trained.restore(lora)
        load_optimizer(state.optimizer, state.parameters, load_tensors(folder / "optimizer.safetensors"), numbers)
        if state.average is not None:
            average = load_tensors(folder / "ema.safetensors")
            for index, own in enumerate(state.average):
                local(own).copy_(local(like(average[str(index)], own)))

    def read_best(self, folder: Path) -> dict[str, torch.Tensor]:
        return load_tensors(folder / "best.safetensors")


class ShardFiles(StateFiles):
    """All weights, AdamW's moments and the average, in the file of each process; its steps in `steps.safetensors`."""

    has_result = False
    needs_all_processes = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """Sharded tensors by name: weights, moments and average."""
        state, names = self.state, self.state.trained.parameters
        found = {f"weights.{name}": each.detach() for name, each in names.items()}
        for name, parameter in names.items():
            moments = state.optimizer.state[parameter].items()
            found |= {f"{moment}.{name}": value for moment, value in moments if moment != "step"}
        if state.average is not None:
            found |= {f"ema.{name}": each for name, each in zip(names, state.average, strict=True)}
        return found

    def steps(self) -> dict[str, torch.Tensor]:
        """How often AdamW has moved each parameter, by name; those that have got no gradient yet are left out."""
        moments = self.state.optimizer.state
        states = {name: moments[parameter] for name, parameter in self.state.trained.parameters.items()}
        return {name: found["step"] for name, found in states.items() if found}

    def write(self, folder: Path, best: Tensors | None, check: Check, add: Add, alone: bool = False) -> None:
        tensors = self.tensors() | {f"best.{name}": each for name, each in (best or {}).items()}

        def fill(partial: Path) -> None:
            check()
            add(partial)
            save_tensors(partial / "steps.safetensors", self.steps())

        write_folder_together(
            self.accelerator, folder, fill, lambda partial: write_shards(self.accelerator, partial, tensors)
        )

    def read(self, folder: Path, numbers: Mapping[str, float]) -> None:
        """See `StateFiles`; AdamW has no numbers."""
        state = self.state
        for name, step in load_tensors(folder / "steps.safetensors").items():
            parameter = state.trained.parameters[name]
            moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            state.optimizer.state[parameter] = {"step": step, **moments}
        read_shards(self.accelerator, folder, self.tensors())
        state.trained.has_changed = True

    def read_best(self, folder: Path) -> dict[str, torch.Tensor]:
        best = self.state.trained.empty_snapshot()
        read_shards(self.accelerator, folder, {f"best.{name}": each for name, each in best.items()})
        return best


def save_files(folder: Path, tensors: Mapping[str, Tensors]) -> None:
    """Write `LoraFiles.tensors` into a folder."""
    for name, content in tensors.items():
        save_tensors(folder / f"{name}.safetensors", content)
