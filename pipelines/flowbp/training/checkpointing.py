# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""When a run writes a checkpoint, and what is in it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .checkpoints import remove, rotate, write_json
from .config import TrainingConfig
from .console import Console
from .distributed import all_ranks_max
from .evaluation import Evaluation
from .lora import scales
from .output_folder import RESCUE, OutputFolder
from .resuming import course
from .signals import DrawingStopped, StopSignals, TrainingStopped
from .state import TrainingError, TrainingState


@dataclass(eq=False)
class Checkpointer:
    """Writes checkpoints of a run that is new or resumed."""

    config: TrainingConfig
    accelerator: Accelerator
    state: TrainingState
    evaluation: Evaluation
    console: Console
    signals: StopSignals
    folder: OutputFolder
    fingerprint: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._last = time.monotonic()
        self._written = self.state.update
        # The last checkpoint of this run, where the steps did not ask for it; the next one takes its place. One that
        # a run resumes from stays: that run's end or other steps may have asked for it.
        self._extra: Path | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether the last checkpoint of this process' run is `--checkpointing_minutes` old."""
        return time.monotonic() - self._last >= 60 * self.config.checkpointing_minutes

    def after_update(self) -> None:
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
            with self.console.pause(), suppress(DrawingStopped):
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
        except DrawingStopped:
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
        is_kept = state.update in (0, self._written)
        if config.dry_run or state.files.needs_all_processes or not state.is_whole or is_kept:
            return
        mark = config.output_dir / RESCUE
        try:
            self.folder.check()
            # Of several processes the first one that fails writes.
            mark.open("x").close()
            try:
                self._write(alone=True)
                self._make_room()
            finally:
                mark.unlink()
            self.console.tell(
                f"The state after update {state.update} is in {config.output_dir}/checkpoint-{state.update}; resume "
                "with --resume_from_checkpoint latest."
            )
        except FileExistsError:
            # Another process writes it.
            pass
        except Exception as error:
            # Whatever it is, such as one of a GPU that answers nothing any more: the one that ends the run is raised.
            self.console.tell(f"The state after update {state.update} could not be written: {error}")

    def write(self) -> None:
        """Write `checkpoint-N` and remove what `--checkpoints_total_limit` asks for. Collective.

        Raises:
            FileNotFoundError: the output folder is gone.
        """
        self._write()
        if self.accelerator.is_main_process:
            self._make_room()
        self.accelerator.wait_for_everyone()
        self._written = self.state.update
        self._last = time.monotonic()

    def _write(self, alone: bool = False) -> None:
        best = self.evaluation.best_weights
        self.state.files.write(self._path, best, self.folder.check, self._write_rest, alone)

    def _write_rest(self, folder: Path) -> None:
        """Write what is no tensor."""
        content = {
            "format": 3,
            "settings": course(self.config),
            "ingredients": self.fingerprint,
            "scales": scales(self.state.transformer),
            "training": self.state.state_dict(),
            "evaluation": self.evaluation.state_dict(),
        }
        write_json(folder / "state.json", content)
        self.evaluation.validation.save_images(folder)

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
