# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""When a run writes a checkpoint, what is in it, and how a run resumes."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .checkpoints import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    read_json,
    rotate,
    save_tensors,
    write_folder,
    write_json,
)
from .config import TrainingConfig
from .console import Console
from .distributed import all_ranks_max
from .evaluation import Evaluation, SaveLora
from .signals import StopSignals, TrainingStopped
from .state import TrainingError, TrainingState, save_files

# Options that a resumed run may have of its own without taking another course.
MAY_CHANGE = (
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpointing_minutes "
    "checkpoints_total_limit report_to logging_dir run_name tracker_project tracker_group tracker_tags push_to_hub "
    "hub_model_id prompt_embeds_dir dry_run strict select verify"
).split()


class Checkpointer:
    """Writes checkpoints and resumes from them.

    Args:
        config: of the run.
        accelerator: of the run.
        state, evaluation: what a checkpoint holds.
        console: of the run.
        save_lora: see `Evaluation`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        state: TrainingState,
        evaluation: Evaluation,
        console: Console,
        save_lora: SaveLora,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.evaluation = evaluation
        self.console = console
        self.save_lora = save_lora
        self._last = time.monotonic()

    @property
    def is_overdue(self) -> bool:
        """Whether the last checkpoint of this process' run is `--checkpointing_minutes` old."""
        return time.monotonic() - self._last >= 60 * self.config.checkpointing_minutes

    def resume(self) -> Path | None:
        """Continue as `--resume_from_checkpoint` says; returns the checkpoint's folder.

        Raises:
            CheckpointError: for a checkpoint that is missing, damaged, or does not fit.
        """
        config = self.config
        if config.resume_from_checkpoint is None:
            if checkpoints(config.output_dir) and not config.dry_run:
                self.console.tell(
                    f"{config.output_dir} has checkpoints of an earlier run; --resume_from_checkpoint latest would "
                    "resume from them until this run has written its own."
                )
            return None
        folder = find_checkpoint(config.output_dir, config.resume_from_checkpoint, self.console.tell)
        where = f"--resume_from_checkpoint {folder}"
        state = read_json(folder / "state.json")
        if state.get("format") != 2:
            raise CheckpointError(f"{where}: written by another version of flowbp; resume with that version.")
        before, now = state["settings"], self._course()
        if before["lora_alpha"] != now["lora_alpha"]:
            raise CheckpointError(f"{where}: use the --lora_alpha of that run, {before['lora_alpha']}.")
        names = dict.fromkeys([*now, *before])
        changes = [
            f"--{name} was {before.get(name)}, is {now.get(name)}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        self.state.load(folder, state["training"])
        self.evaluation.load(folder, state["evaluation"])
        if changes:
            self.console.tell(f"{where}: other settings than that run's: {'; '.join(changes)}.")
        return folder

    def judge_and_write(self, signals: StopSignals) -> None:
        """What is due after an update: evaluation, validation, a checkpoint, and the end after a signal. Collective.

        Raises:
            TrainingStopped: after a signal, with a checkpoint written.
            TrainingError: after `--max_skipped_updates` in a row.
        """
        config, state = self.config, self.state
        if state.skipped_in_a_row >= config.max_skipped_updates:
            raise TrainingError(
                f"{state.skipped_in_a_row} updates in a row had a reward, loss or gradient that is not finite, "
                f"expected fewer than --max_skipped_updates {config.max_skipped_updates}; lower --learning_rate or "
                "look at the reward, then resume from the last checkpoint."
            )
        if not all_ranks_max(self.accelerator, [signals.number])[0]:
            # After a signal there is no time: launchers kill after 30 seconds. The resumed run makes up for it.
            with self.console.pause():
                self.evaluation.judge_update()
        stop, is_overdue = all_ranks_max(self.accelerator, [signals.number, self.is_overdue])
        is_last = state.update == config.max_train_steps or self.evaluation.must_stop
        if state.update % config.checkpointing_steps == 0 or is_overdue or is_last or stop:
            self.write()
        if stop:
            stopped = TrainingStopped(int(stop), state.update)
            self.console.tell(str(stopped))
            self.accelerator.end_training()
            raise stopped

    def write(self) -> None:
        """Write `checkpoint-N` and remove what `--checkpoints_total_limit` asks for. Collective."""
        config = self.config
        tensors = self.state.tensors()
        result = self.state.result()
        content = {
            "format": 2,
            "settings": self._course(),
            "training": self.state.state_dict(),
            "evaluation": self.evaluation.state_dict(),
        }
        best: dict[str, torch.Tensor] | None = self.evaluation.best_lora

        def fill(folder: Path) -> None:
            save_files(folder, tensors)
            if best is not None:
                save_tensors(folder / "best.safetensors", best)
            write_json(folder / "state.json", content)
            self.save_lora(folder, result)

        if self.accelerator.is_main_process:
            write_folder(config.output_dir / f"checkpoint-{self.state.update}", fill)
            if config.checkpoints_total_limit is not None:
                rotate(config.output_dir, config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self._last = time.monotonic()

    def _course(self) -> dict[str, Any]:
        """The settings that the course of a run depends on."""
        return {name: value for name, value in self.config.settings().items() if name not in MAY_CHANGE}
