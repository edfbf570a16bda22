# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""When a run writes a checkpoint, what is in it, and how a run resumes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .checkpoints import (
    CheckpointError,
    find_checkpoint,
    read_json,
    remove,
    rotate,
    save_tensors,
    write_folder,
    write_folder_together,
    write_json,
)
from .config import TrainingConfig
from .console import Console
from .distributed import all_ranks_max, uses_fsdp2
from .evaluation import Evaluation
from .ingredients import changes
from .lora import scales
from .output_folder import RESCUE, OutputFolder
from .saved_state import check_saved_state
from .shards import write_shards
from .signals import JudgingStopped, StopSignals, TrainingStopped
from .state import TrainingError, TrainingState, save_files

# Options that a resumed run may have of its own without taking another course.
MAY_CHANGE = (
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpointing_minutes "
    "checkpoints_total_limit report_to logging_dir run_name tracker_project tracker_group tracker_tags push_to_hub "
    "hub_model_id hub_private_repo prompt_embeds_dir dry_run strict select verify overwrite_output_dir strict_resume "
    "process_timeout_minutes"
).split()


class Checkpointer:
    """Writes checkpoints and resumes from them.

    Args:
        config: of the run.
        accelerator: of the run.
        state, evaluation: what a checkpoint holds.
        console: of the run.
        signals: that end the run.
        folder: of the run.
        ingredients: of the run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        state: TrainingState,
        evaluation: Evaluation,
        console: Console,
        signals: StopSignals,
        folder: OutputFolder,
        ingredients: Mapping[str, Any],
    ) -> None:
        self.signals = signals
        self.folder = folder
        self.ingredients = ingredients
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.evaluation = evaluation
        self.console = console
        self._last = time.monotonic()
        self._written = 0
        # The last checkpoint of this run, where the steps did not ask for it; the next one takes its place. One that
        # a run resumes from stays: that run's end or other steps may have asked for it.
        self._extra: Path | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether the last checkpoint of this process' run is `--checkpointing_minutes` old."""
        return time.monotonic() - self._last >= 60 * self.config.checkpointing_minutes

    def resume(self) -> Path | None:
        """Continue as `--resume_from_checkpoint` says; returns the checkpoint's folder.

        Raises:
            CheckpointError: for a checkpoint that is missing, damaged, or does not fit; with `--strict_resume` also
                for one of other settings, prompts, rewards or versions.
        """
        config = self.config
        if config.resume_from_checkpoint is None:
            return None
        folder = find_checkpoint(
            config.output_dir, config.resume_from_checkpoint, self.console.tell, check_saved_state
        )
        where = f"--resume_from_checkpoint {folder}"
        state = read_json(folder / "state.json")
        if state.get("format") != 3:
            raise CheckpointError(f"{where}: written by another version of flowbp; resume with that version.")
        before, now = state["settings"], self._course()
        if before["train"] != now["train"]:
            raise CheckpointError(f"{where}: use the --train of that run, {before['train']}.")
        other = [f"--{change}" for change in changes(before, now)] + changes(state["ingredients"], self.ingredients)
        if other and config.strict_resume:
            raise CheckpointError(f"{where}: {'; '.join(other)}; --strict_resume asks for the same as in that run.")
        self.state.load(folder, state["training"])
        if scaled := changes(state["scales"], scales(self.state.transformer)):
            raise CheckpointError(
                f"{where}: its LoRA has other scales, {scaled[0]}; use the --lora_alpha, --use_rslora and --init_lora "
                "of that run."
            )
        self.evaluation.load(folder, state["evaluation"])
        self._written = self.state.update
        if other:
            self.console.tell(f"{where}: other settings than that run's: {'; '.join(other)}.")
        if self.state.update >= config.max_train_steps:
            self.console.tell(
                f"{where}: nothing is left to train, {self.state.update} updates are done and --max_train_steps is "
                f"{config.max_train_steps}."
            )
        return folder

    def judge_and_write(self) -> None:
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
        if not self._stop_signal():
            # After a signal there is no time: launchers kill after 30 seconds. The resumed run makes up for it.
            if any(self.evaluation.is_due):
                self.write()
            with self.console.pause(), suppress(JudgingStopped):
                self.evaluation.judge_update()
        must_stop, is_overdue = all_ranks_max(self.accelerator, [self.signals.number, self.is_overdue])
        is_last = state.update == config.max_train_steps or self.evaluation.must_stop
        if state.update % config.checkpointing_steps == 0 or is_overdue or is_last or must_stop:
            self.write()
        if must_stop:
            self.stop()

    def _stop_signal(self) -> int:
        return int(all_ranks_max(self.accelerator, [self.signals.number])[0])

    def stop(self) -> None:
        """End the run after a signal. Collective.

        Raises:
            TrainingStopped: always.
        """
        stopped = TrainingStopped(self._stop_signal(), self.state.update)
        self.console.tell(str(stopped))
        self.accelerator.end_training()
        raise stopped

    @contextmanager
    def guard(self) -> Iterator[None]:
        """The updates and the results of a run: signals and errors inside lose no whole update.

        Raises:
            TrainingStopped: after a signal.
            TrainingError: where something inside called `sys.exit`, whose code may be 0.
        """
        try:
            with self.signals:
                yield
        except JudgingStopped:
            self.stop()
        except (TrainingStopped, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.rescue()
            if isinstance(error, SystemExit):
                raise TrainingError(f"the reward or a library called sys.exit({error.code})") from error
            raise

    def rescue(self) -> None:
        """After an error: write the state of the last whole update if no checkpoint has it. By this process alone."""
        config, state = self.config, self.state
        if (
            config.dry_run
            or uses_fsdp2(self.accelerator)
            or config.train == "full"
            or not state.is_whole
            or state.update in (0, self._written)
        ):
            return
        mark = config.output_dir / RESCUE
        try:
            self.folder.check()
            # Of several processes the first one that fails writes.
            mark.open("x").close()
            try:
                self._write_lora(self._lora_files())
            finally:
                mark.unlink()
            self.console.tell(
                f"The state after update {state.update} is in {config.output_dir}/checkpoint-{state.update}; resume "
                "with --resume_from_checkpoint latest."
            )
        except FileExistsError:
            # Another process writes it.
            pass
        except (OSError, ValueError) as error:
            # The error that ends the run is told, too.
            self.console.tell(f"The state after update {state.update} could not be written: {error}")

    def write(self) -> None:
        """Write `checkpoint-N` and remove what `--checkpoints_total_limit` asks for. Collective.

        Raises:
            FileNotFoundError: the output folder is gone.
        """
        if self.config.train == "full":
            self._write_shards()
        else:
            fill = self._lora_files()
            if self.accelerator.is_main_process:
                self.folder.check()
                self._write_lora(fill)
        self.accelerator.wait_for_everyone()
        self._written = self.state.update
        self._last = time.monotonic()

    def _lora_files(self) -> Callable[[Path], None]:
        """What fills the folder of a LoRA's checkpoint. Collective, where parameters are sharded."""
        tensors, result = self.state.tensors(), self.state.result()
        best, trained = self.evaluation.best_weights, self.state.trained

        def fill(folder: Path) -> None:
            save_files(folder, tensors)
            if best is not None:
                save_tensors(folder / "best.safetensors", best)
            self._write_state(folder)
            trained.save(folder, result)

        return fill

    def _write_lora(self, fill: Callable[[Path], None]) -> None:
        write_folder(self._path, fill)
        self._make_room()

    def _write_shards(self) -> None:
        """Write a checkpoint of all weights. Collective."""
        tensors = self.state.shards()
        if self.evaluation.best_weights is not None:
            tensors |= {f"best.{name}": each for name, each in self.evaluation.best_weights.items()}

        def fill(folder: Path) -> None:
            if self.accelerator.is_main_process:
                self.folder.check()
                self._write_state(folder)
                self.evaluation.save_base_images(folder)
                save_tensors(folder / "steps.safetensors", self.state.steps())

        write_folder_together(
            self.accelerator, self._path, fill, lambda folder: write_shards(self.accelerator, folder, tensors)
        )
        if self.accelerator.is_main_process:
            self._make_room()

    def _write_state(self, folder: Path) -> None:
        content = {
            "format": 3,
            "settings": self._course(),
            "ingredients": self.ingredients,
            "scales": scales(self.state.transformer),
            "training": self.state.state_dict(),
            "evaluation": self.evaluation.state_dict(),
        }
        write_json(folder / "state.json", content)

    @property
    def _path(self) -> Path:
        return self.config.output_dir / f"checkpoint-{self.state.update}"

    def _make_room(self) -> None:
        """Remove what the new checkpoint replaces."""
        update, folder = self.state.update, self._path
        if self._extra not in (None, folder) and self._extra.is_dir():
            remove(self._extra)
        is_asked_for = update % self.config.checkpointing_steps == 0 or update == self.config.max_train_steps
        self._extra = None if is_asked_for else folder
        if self.config.checkpoints_total_limit is not None:
            rotate(self.config.output_dir, self.config.checkpoints_total_limit)

    def _course(self) -> dict[str, Any]:
        """The settings that the course of a run depends on."""
        settings = self.config.settings()
        if not self.config.lr_scheduler.startswith("constant"):
            # The schedule ends with the run.
            settings["max_train_steps of the schedule"] = settings["max_train_steps"]
        return {name: value for name, value in settings.items() if name not in MAY_CHANGE}
